"""Folders for Ollama: the Modelfile's template, stops and settings give our own text in llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llm.api import Model
from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.common.errors import InputError
from llm.devices.ollama import export_ollama, modelfile
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_source import GenerationConfig
from tests.convert.test_gguf import LLAMA, LlamaCpp, folder_of
from tests.devices.test_chat_form import ollama_prompt
from tests.helpers import gpt_config, randomize, tiny_tokenizer
from tests.tokenizer.test_own_template import made

CHAT = [("user", "the cat sat on"), ("assistant", "the mat"), ("user", "and the dog")]
MESSAGES: Any = [{"role": role, "content": text} for role, text in CHAT]


class Modelfile(NamedTuple):
    """The instructions of a Modelfile, read as Ollama reads them."""

    weights: str
    template: str
    parameters: dict[str, float]
    stops: list[str]


def read(path: Path) -> Modelfile:
    text = path.read_text(encoding="utf-8")
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert template is not None
    rest = text.replace(template[0], "")
    lines = [line.split(maxsplit=2) for line in rest.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} == {"FROM", "PARAMETER"}
    [weights] = [line[1] for line in lines if line[0] == "FROM"]
    values = [(line[1], line[2]) for line in lines if line[0] == "PARAMETER"]
    stops = [value.removeprefix('"').removesuffix('"') for key, value in values if key == "stop"]
    return Modelfile(weights, template[1], {key: float(value) for key, value in values if key != "stop"}, stops)


def chat_model(tokenizer: Tokenizer, **values: Any) -> Checkpoint:
    """A random instruct model. What it writes is ASCII without a special token: it says something, to the limit."""
    config = gpt_config(**LLAMA | {"vocab_size": tokenizer.vocab_size, "context_length": 256})
    model = randomize(GPT(config), std=0.2)
    assert isinstance(model, GPT)
    printable = [tokenizer.decode_bytes([i]).decode("latin-1").isprintable() for i in range(config.vocab_size)]
    ascii_only = [tokenizer.decode_bytes([i]).isascii() for i in range(config.vocab_size)]
    special = set(tokenizer.special_tokens.values())
    silent = [i for i in range(config.vocab_size) if not (printable[i] and ascii_only[i]) or i in special]
    with torch.no_grad():
        for weight in (model.tok_emb.weight, model.lm_head.weight):
            weight[silent] = 0.0
    return Checkpoint(model.eval(), tokenizer, CheckpointConfig(kind="instruct", gpt=config, **values))


def own_chat(name: str) -> Checkpoint:
    """A model with a family's tokenizer and chat template."""
    encoder = made(name).ours
    assert encoder.own is not None
    own = {"chat_templates": dict(encoder.own.sources), "special_tokens": dict(encoder.own.special_tokens)}
    return chat_model(encoder.tokenizer, **own)


def texts(checkpoint: Checkpoint, out: Path, n_tokens: int = 24) -> tuple[str, str]:
    """Our greedy answer, and llama.cpp's to the prompt and the settings of the exported folder."""
    export_ollama(checkpoint, out, "f32")
    found = read(out / "Modelfile")
    assert found.weights == "./model.gguf" and found.parameters["num_ctx"] == checkpoint.config.gpt.context_length
    server = LlamaCpp(out / "model.gguf", checkpoint.config.gpt.context_length).server
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n")
    request = {name: found.parameters[name] for name in names} | {"stop": found.stops, "n_predict": n_tokens}
    reply = server.handle_completions(request | {"prompt": ollama_prompt(found.template, CHAT), "cache_prompt": False})
    ours = Model(checkpoint).chat(MESSAGES, max_new_tokens=n_tokens)
    assert len(ours) >= n_tokens
    return ours, reply["choices"][0]["text"]


@pytest.mark.parametrize("template", ["chatml", "llama3", "alpaca"])
def test_models_with_our_templates(template: str, tmp_path: Path) -> None:
    ours, theirs = texts(chat_model(tiny_tokenizer(), template=template), tmp_path / "out")
    assert theirs == ours


@pytest.mark.parametrize("name", ["qwen3", "mistral-v3", "zephyr", "r1-distill"])
def test_models_with_their_own_templates(name: str, tmp_path: Path) -> None:
    """With a BOS token that the template writes; zephyr's writes none, though the tokenizer adds it to texts."""
    ours, theirs = texts(own_chat(name), tmp_path / "out")
    assert theirs == ours


def test_stops_and_settings_are_the_models_own(tmp_path: Path) -> None:
    checkpoint = chat_model(tiny_tokenizer(), template="chatml")
    names = {number: name for name, number in checkpoint.tokenizer.special_tokens.items()}
    greedy = GenerationConfig(do_sample=False, repetition_penalty=1.3, eos_token_id=[checkpoint.tokenizer.eot])
    penalized = checkpoint._replace(config=checkpoint.config.model_copy(update={"generation": greedy}))
    ours, theirs = texts(penalized, tmp_path / "out", n_tokens=40)
    assert theirs == ours != Model(checkpoint).chat(MESSAGES, max_new_tokens=40)
    found = read(tmp_path / "out/Modelfile")
    assert set(found.stops) == {names[i] for i in Model(penalized).stop_ids} and "<|im_end|>" in found.stops
    sampled = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.01)
    text = modelfile(checkpoint._replace(config=checkpoint.config.model_copy(update={"generation": sampled})))
    for line in ("temperature 0.6", "top_k 20", "top_p 0.95", "min_p 0.01", "repeat_penalty 1"):
        assert f"PARAMETER {line}\n" in text


def test_a_base_model_continues_its_prompt() -> None:
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in modelfile(folder_of(LLAMA))


def test_notes_say_what_ollama_cannot(tmp_path: Path) -> None:
    text = modelfile(own_chat("llama3.1"))
    assert (
        text.startswith("# The model's own template removes white space")
        and "# The model's own template writes today" in text
    )
    assert "Knowledge ends" in text and not modelfile(own_chat("qwen3")).startswith("#")


@pytest.mark.parametrize(("name", "reason"), [("smollm3", "today's date"), ("phi3", "strips the text beside it")])
def test_a_template_that_ollama_cannot_express_is_one_line_and_leaves_nothing(
    name: str, reason: str, tmp_path: Path
) -> None:
    message = rf"{reason}.*Ollama's templates cannot express; use --format gguf .* --jinja"
    with pytest.raises(InputError, match=message) as raised:
        export_ollama(own_chat(name), tmp_path / "out", "f16")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm.cli.main import main

    save_checkpoint(tmp_path / "model", folder_of(LLAMA, kind="instruct", template="chatml"))
    for _ in range(2):  # a folder may be written again
        assert (
            main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "ollama", "--dtype", "q8_0"])
            == 0
        )
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "Modelfile"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note").touch()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "mine"), "--format", "ollama"]) == 1
    assert "exists and is no folder of Ollama" in capsys.readouterr().err and (tmp_path / "mine/note").exists()
