"""Ollama's folder of a model: a GGUF file, and a Modelfile with its chat template, stop tokens and settings.

Ollama's templates are Go's: fixed texts and conditions, no filters. `llm.devices.chat_form` finds the texts.
"""

from __future__ import annotations

import logging
from pathlib import Path

from llm.checkpoint.card import Card
from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.common.files import replaced_folder
from llm.convert.gguf import FileType, export_gguf
from llm.devices.chat_form import ChatForm, chat_form, check_tokens
from llm.inference.sampling import GREEDY, sampling_of

MODEL, MODELFILE = "model.gguf", "Modelfile"
WAY_ON = "use --format gguf with a server that runs Jinja, such as llama-server --jinja"
STRIPPED = "The model's own template removes white space around messages; Ollama's templates cannot."
DATED = "The model's own template writes today's date where it is told; here stands the date that it has without."

log = logging.getLogger("llm")


def export_ollama(checkpoint: Checkpoint, out: Path, kind: FileType, card: Card | None = None) -> None:
    """Write a folder for `ollama create`, whole or not at all; raise `InputError` where it cannot be."""
    text = modelfile(checkpoint)
    with replaced_folder(out) as new:
        # A chat's template writes the BOS token itself, or none.
        chat = {"tokenizer.ggml.add_bos_token": False} if checkpoint.config.kind == "instruct" else {}
        export_gguf(checkpoint, new / MODEL, kind, chat, card)
        (new / MODELFILE).write_text(text, encoding="utf-8", newline="\n")


def modelfile(checkpoint: Checkpoint) -> str:
    """Return the content of a Modelfile."""
    _, tokenizer, config = checkpoint
    notes: list[str] = []
    template = "{{ .Prompt }}"
    if config.kind == "instruct":
        try:
            form = chat_form(config, tokenizer)
            check_tokens(form, tokenizer)
        except InputError as error:
            raise InputError(f"{error}, which Ollama's templates cannot express; {WAY_ON}") from None
        template = go_template(form)
        notes = [note for note, needed in ((STRIPPED, form.strips), (DATED, form.dated)) if needed]
    if '"""' in template:
        raise InputError(f'its chat template holds """, which a Modelfile has no way to write; {WAY_ON}')
    for note in notes:
        log.info(note)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    stops = [names[number] for number in sorted(config.stop_ids(tokenizer)) if number in names]
    lines = [*(f"# {note}" for note in notes), f"FROM ./{MODEL}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {key} {value:.8g}" for key, value in parameters(checkpoint).items()]
    lines += [f'PARAMETER stop "{name}"' for name in stops if '"' not in name and name.isprintable()]
    return "\n".join(lines) + "\n"


def parameters(checkpoint: Checkpoint) -> dict[str, float]:
    """Return the settings that make Ollama choose tokens as this model's own settings say."""
    settings = checkpoint.config.generation
    sampling = GREEDY if settings is None else sampling_of(settings)
    context_length = checkpoint.config.gpt.context_length
    return {
        "num_ctx": context_length,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,  # 0: off, where Ollama's own default is 40
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "min_p": sampling.min_p or 0.0,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context_length,  # all tokens count
    }


def go_template(form: ChatForm) -> str:
    """Return the form as a template of Go."""
    before = _go(form.start)
    if form.system_start is not None and not form.system_last:
        system = f"{_go(form.system_start)}{{{{ .System }}}}{_go(form.system_end)}"
        before = f"{{{{ if .System }}}}{system}{{{{ else }}}}{before}{{{{ end }}}}"
    last = ""
    if form.system_last:
        ends = "(eq (len (slice $.Messages $i)) 1)"
        last = f"{{{{ if and $.System {ends} }}}}{{{{ $.System }}}}{_go(form.system_end)}{{{{ end }}}}"
    thoughts = ""
    if form.thoughts != "kept":  # never written: it tells Ollama how to find the thoughts of an answer
        thoughts = "{{ if and .Thinking false }}<think>{{ .Thinking }}</think>{{ end }}"
    answer = _go(form.answer)
    if form.answer_without_thoughts is not None:
        without = _go(form.answer_without_thoughts)
        answer = f"{{{{ if and $.IsThinkSet (not $.Think) }}}}{without}{{{{ else }}}}{answer}{{{{ end }}}}"
    return (
        f"{before}{{{{ $later := false }}}}{{{{ $asked := false }}}}{{{{ range $i, $_ := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $later }}}}{_go(form.user)}{{{{ end }}}}'
        f"{{{{ $later = true }}}}{{{{ $asked = true }}}}{last}{{{{ .Content }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{_go(form.assistant)}{thoughts}'
        "{{ .Content }}{{ $asked = false }}{{ end }}{{ end }}"
        f"{{{{ if $asked }}}}{answer}{{{{ end }}}}"
    )


def _go(text: str) -> str:
    """Return a fixed text as Go's templates write it."""
    return text.replace("{{", '{{ "{{" }}')
