"""`python -m llm`: what a model folder can do, from the command line.

Answers go to stdout, everything else to stderr. Exit status: 0 done, 1 something the user gave is wrong (one line says
what), 2 a command line that cannot be parsed, 130 interrupted. PyTorch is imported when a model is loaded, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llm.bench import KINDS, TRAININGS
from llm.common.errors import InputError
from llm.common.sanitize import CONTROLS, one_line, visible

if TYPE_CHECKING:
    from llm.checkpoint.folder import Checkpoint
    from llm.config import Params
    from llm.model.gpt import GPT

BENCH_SIZES = {
    "megabytes": "of text (tokenize)",
    "processes": "that encode it together (tokenize)",
    "text": "a text file, or data/raw/corpus.jsonl, in place of the sample (tokenize, learn, scale)",
    "tokens": "for each parameter (scale)",
    "steps": "of the training that sets the target (learn)",
    "our_steps": "that our schedule is made for (learn; default: as many)",
    "layers": "blocks",
    "width": "emb_dim",
    "heads": "of the attention",
    "kv_heads": "of its keys and values (generate, form llama)",
    "ffn": "width of the feed-forward layers (generate, form llama)",
    "vocab": "tokens of the vocabulary",
    "context": "tokens of a row",
    "batch": "rows",
    "prompt": "tokens that are continued (generate)",
    "new": "tokens of the continuation (generate)",
}
ROUNDS, SECONDS = 5, 5.0  # of a contest
CLASSIFY_BATCH = 32  # texts classified together: no answer depends on it, only speed and memory


def generate(args: argparse.Namespace) -> None:
    """Prints the prompt and its continuation."""
    prompt = checked_text(args.prompt, "--prompt")
    if not prompt:
        raise InputError("--prompt is empty; give some text to continue")
    folder, model = load_gpt(args.model_dir, "base", "instruct", int8=args.int8)
    begin = [] if folder.tokenizer.bos is None else [folder.tokenizer.bos]
    answer = answering(folder, model, args)
    continuation = answer([*begin, *folder.tokenizer.encode(prompt)], args.seed)
    write(itertools.chain([prompt], continuation))


def chat(args: argparse.Namespace) -> None:
    """Answers one instruction a line; each stands alone, the model does not see earlier ones."""
    from llm.tokenizer.prompts import encode_prompt

    context = checked_text(args.input, "--input")
    folder, model = load_gpt(args.model_dir, "instruct", int8=args.int8)
    template = folder.config.template
    if template is None:
        raise InputError(f"{args.model_dir}: config.json names no template; make the model folder again")
    answer = answering(folder, model, args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (line editing and history for input())
        note("One instruction a line. Ctrl-C ends an answer, Ctrl-D the chat.")
    answered = 0
    for line in typed_lines() if interactive else stdin_lines():
        instruction = line.strip()
        if not instruction:
            continue
        ids = encode_prompt(folder.tokenizer, template, instruction, context, folder.config.system)
        try:
            write(answer(ids, args.seed + answered))  # asked again, it may answer otherwise
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        answered += 1


def classify(args: argparse.Namespace) -> None:
    """Prints one JSON object for each text."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.inference.classify import classify_texts

    folder = load_checkpoint(args.model_dir)
    labels = folder.config.labels
    if folder.config.kind != "classifier" or labels is None:
        raise InputError(wrong_kind(args.model_dir, folder.config.kind, "classifier"))
    texts = named_texts(args.texts)
    while batch := list(itertools.islice(texts, CLASSIFY_BATCH)):
        for text, row in zip(batch, classify_texts(folder, batch).tolist(), strict=True):
            probabilities = {label: round(p, 6) for label, p in zip(labels, row, strict=True)}
            label = labels[row.index(max(row))]
            print_json({"text": text, "label": label, "probabilities": probabilities})


def score(args: argparse.Namespace) -> None:
    """Prints how well the model predicts a text."""
    import torch

    from llm.inference.score import score_tokens

    name = "stdin" if args.file == "-" else args.file
    content = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    text = decoded(content, name)
    if not text:
        raise InputError(f"{name}: empty; give a text to score")
    folder, model = load_gpt(args.model_dir, "base", "instruct", int8=args.int8)
    ids = folder.tokenizer.encode(text)
    if len(ids) < 2:
        raise InputError(f"{name}: a single token; the first is never scored, so a text needs at least two")
    result = score_tokens(model, torch.tensor(ids))
    print_json(
        {
            "tokens": result.tokens,
            "bytes": len(content),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bpb": result.bpb(len(content)),
        }
    )


def import_(args: argparse.Namespace) -> None:
    """Writes a model folder from another tool's model, or from a base and an adapter that was trained on it."""
    from llm.checkpoint.folder import save_checkpoint
    from llm.convert.load import describe, import_model

    check_place(args.model_dir, args.source)
    folder = import_model(args.source)
    if args.adapter is not None:
        from llm.checkpoint.adapter import load_adapter
        from llm.model.lora import merge_lora

        folder = load_adapter(args.adapter, folder)
        merge_lora(folder.model)
    save_checkpoint(args.model_dir, folder)
    note(f"{args.model_dir}: {describe(folder)}")


def export(args: argparse.Namespace) -> None:
    """Writes a model folder, or the adapter in it, in another tool's format."""
    from llm.checkpoint.folder import load_checkpoint

    if args.dtype is not None and args.format != "gguf":
        raise InputError("--dtype goes with --format gguf; in the other formats the weights keep theirs")
    if args.base is not None and args.format != "peft":
        raise InputError("--base goes with --format peft; in the other formats a model stands on its own")
    if args.format == "peft":
        from llm.convert.peft import export_peft

        check_place(args.out, args.model_dir, "adapter", holds="adapter_config.json")
        if not (args.model_dir / "adapter").is_dir():
            raise InputError(f"{args.model_dir}: holds no adapter; train it with trainable: lora, or use --format hf")
        export_peft(args.model_dir / "adapter", args.out, args.base)
        note(f"{args.out}: written")
        return
    if args.format == "hf":
        check_place(args.out, args.model_dir)
    folder = load_checkpoint(args.model_dir, dtype=None)
    try:
        if args.format == "hf":
            from llm.convert.hf import export_hf

            export_hf(folder, args.out)
        else:
            from llm.convert.gguf import export_gguf

            export_gguf(folder, args.out, args.dtype or "f16")
    except InputError as error:
        raise InputError(f"{args.model_dir}: {error}") from None
    note(f"{args.out}: written")


def bench(args: argparse.Namespace) -> None:
    """Prints a table of how fast this project and its peers do the same."""
    from llm.bench import contest_of
    from llm.bench.contest import compare, draw, markdown

    if args.kind in TRAININGS:
        bench_trainings(args)
        return
    if args.set_param:
        raise InputError(f"--set-param is no option of bench {args.kind}, which does not use params.yaml")
    contest = contest_of(args.kind)
    if args.form is not None and args.form not in contest.forms:
        raise InputError(f"--form {args.form}: bench {args.kind} has no other form than GPT-2's")
    sizes = with_sizes(args, contest.forms.get(args.form, contest.sizes))
    found = compare(
        contest, sizes, args.rounds or ROUNDS, SECONDS if args.seconds is None else args.seconds, note, args.only
    )
    show_bench(args, found, markdown, draw)


def bench_trainings(args: argparse.Namespace) -> None:
    """Those that are no contest, but one training after another."""
    from llm.bench import learning, scaling

    for name in ("form", "only", "rounds", "seconds"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is no option of bench {args.kind}, which is one training after another")
    params = shipped_params(args.set_param)
    if args.kind == "learn":
        found = learning.learn(with_sizes(args, learning.lesson_of(params)), params, note)
        show_bench(args, found, learning.markdown, learning.draw)
    else:
        found = scaling.scale(with_sizes(args, scaling.ladder_of(params)), params, note)
        show_bench(args, found, scaling.markdown, scaling.draw)


def shipped_params(changes: Sequence[str] = ()) -> Params:
    """`params.yaml` of this clone, with changes as `dvc exp run -S` takes them: `key=value`."""
    import yaml

    from llm.config import parse_params

    path = Path(__file__).resolve().parents[1] / "params.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; our recipe is taken from it: run this in a clone") from None
    for change in changes:
        key, equals, value = change.partition("=")
        *names, last = key.split(".")
        section = values
        for name in names:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            raise InputError(
                f"--set-param {change}: expected KEY=VALUE with a key of params.yaml, as pretrain.lr=0.004"
            )
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set-param {change}: the value is not valid YAML") from None
    return parse_params(values, str(path))


def with_sizes(args: argparse.Namespace, sizes: Any) -> Any:
    """The sizes, a NamedTuple, with those that the command line gives."""
    given = {name: value for name in BENCH_SIZES if (value := getattr(args, name)) is not None}
    for name in given:
        if name not in sizes._fields:
            known = ", ".join(option(field) for field in sizes._fields if field in BENCH_SIZES)
            raise InputError(f"--{option(name)} is no size of bench {args.kind}; it has {known}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # what is wrong with it shows now
    return sizes._replace(**given)


def show_bench(args: argparse.Namespace, found: dict[str, Any], markdown: Any, draw: Any) -> None:
    if args.out is not None:
        (args.out / f"{args.kind}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(found, args.out / f"{args.kind}.png")
    print(markdown(found), end="")


def check_place(out: Path, source: str | Path, kind: str = "model folder", holds: str = "config.json") -> None:
    """A folder that is written replaces what is in its place: refused where that is of another kind, or the source."""
    if out.resolve() == Path(source).resolve():
        raise InputError(f"{out}: the source itself; name another folder to write to")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / holds).is_file()):
        raise InputError(f"{out}: exists and is no {kind}; name a new folder to write to")


# ---- model folders and answers ---------------------------------------------------------------------------------------


def load_gpt(path: Path, *kinds: str, int8: bool = False) -> tuple[Checkpoint, GPT]:
    """A model folder of one of these kinds, and its GPT."""
    from llm.checkpoint.folder import load_checkpoint
    from llm.inference.int8 import to_int8
    from llm.model.gpt import GPT

    folder = load_checkpoint(path)
    if folder.config.kind not in kinds or not isinstance(folder.model, GPT):
        raise InputError(wrong_kind(path, folder.config.kind, *kinds))
    if int8:
        to_int8(folder.model)
    return folder, folder.model


def load_draft(path: Path | None, folder: Checkpoint) -> GPT | None:
    """A smaller model with the same tokenizer as the one in the folder."""
    if path is None:
        return None
    draft, model = load_gpt(path, "base", "instruct")
    if draft.tokenizer != folder.tokenizer:
        raise InputError(f"--draft {path}: has another tokenizer than the model; it must guess the same tokens")
    return model


def wrong_kind(path: Path, kind: str, *wanted: str) -> str:
    return f"{path}: a model of kind {kind}; this command needs {' or '.join(wanted)}, such as models/{wanted[0]}"


def answering(folder: Checkpoint, model: GPT, args: argparse.Namespace) -> Callable[[list[int], int], Iterator[str]]:
    """A function that says, piece by piece, what the model adds to a prompt with a seed.

    What a prompt begins with as the one before it did is not read again.
    """
    from llm.inference.compiled import compile_step
    from llm.inference.generate import stream, stream_text
    from llm.inference.prefill import PrefixCache
    from llm.inference.sampling import Sampling
    from llm.tokenizer.prompts import end_tokens

    sampling = Sampling(
        repetition_penalty=args.repetition_penalty,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )
    stop = end_tokens(folder.tokenizer, folder.config.template)
    prefix, draft = PrefixCache(), load_draft(args.draft, folder)
    if args.compile:
        note("compiling the step of a token")
        for each in (model, draft):
            if each is not None:
                compile_step(each)

    def answer(prompt: list[int], seed: int) -> Iterator[str]:
        tokens = stream(
            model,
            prompt,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            prefix=prefix,
            draft=draft,
        )
        context_length = model.config.context_length
        if len(prompt) > context_length:
            note(f"the prompt has {len(prompt)} tokens, the model reads the last {context_length}")
        return stream_text(folder.tokenizer, tokens)

    return answer


# ---- reading and writing ---------------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(one_line(text), file=sys.stderr, flush=True)


def write(pieces: Iterable[str]) -> None:
    """Writes each piece as soon as it is there, and a line end. A terminal would obey control characters."""
    for piece in pieces:
        print(visible(piece), end="", flush=True)
    print(flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One line. JSON escapes some control characters itself; the others are escaped here, which is JSON as well."""
    text = json.dumps(value, ensure_ascii=False)
    print(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def checked_text(text: str, what: str) -> str:
    """An argument that is text: bytes that the terminal's encoding does not know arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} is not valid UTF-8; convert it first") from None
    return text


def decoded(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise InputError(f"{name}: not valid UTF-8 ({found}); convert it first") from None


def stdin_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield decoded(line, f"stdin, line {number}").rstrip("\r\n")


def typed_lines() -> Iterator[str]:
    while True:
        try:
            yield checked_text(input("> "), "the instruction")
        except EOFError:
            print()
            return


def named_texts(arguments: list[str]) -> Iterator[str]:
    """The texts as given; `-` stands for the lines of stdin."""
    for argument in arguments:
        if argument == "-":
            yield from stdin_lines()
        else:
            yield checked_text(argument, "TEXT")


# ---- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m llm",
        description="Use a trained model. `dvc repro` makes models/base, models/classifier and models/instruct.",
        epilog="`python -m llm COMMAND --help` shows a command's options and examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = add_command(
        commands,
        generate,
        "continue a text",
        "Prints the prompt and its continuation. An instruct model continues the text as it is, without its template.",
        'python -m llm generate models/base --prompt "One morning"',
        'python -m llm generate models/base --prompt "One morning" --temperature 0.8 --top-p 0.95 --seed 7',
        'python -m llm generate models/smollm2 --prompt "One morning" --int8',
    )
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    add_sampling(command)

    command = add_command(
        commands,
        chat,
        "answer instructions",
        "Answers one instruction a line, from the terminal or from stdin. Each stands alone: the model does not see "
        "earlier ones. In a terminal Ctrl-C ends an answer and Ctrl-D the chat.",
        "python -m llm chat models/instruct",
        'echo "Name the opposite of cold." | python -m llm chat models/instruct',
        'python -m llm chat models/instruct --input "Ada sold bread at the harbour on Monday."',
    )
    command.add_argument("--input", default="", metavar="TEXT", help="a text that the instructions are about")
    add_sampling(command)

    command = add_command(
        commands,
        classify,
        "label texts",
        "Prints a JSON object with text, label and probabilities for each text, one a line.",
        'python -m llm classify models/classifier "You have won a prize!" "See you at six"',
        "python -m llm classify models/classifier - < messages.txt",
    )
    command.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="a text, or - for the lines of stdin; after -- it may start with a dash",
    )

    command = add_command(
        commands,
        score,
        "measure how well a text is predicted",
        "Prints a JSON object: tokens (scored ones: all but the first), bytes of the text, loss, perplexity, "
        "bpb. A text longer than the context is read in windows of the full context that overlap by half; "
        "each token is scored once.",
        "python -m llm score models/base book.txt",
        "git show HEAD:README.md | python -m llm score models/base -",
    )
    command.add_argument("file", metavar="FILE", help="a UTF-8 text file, read as it is, or - for stdin")
    add_int8(command.add_argument)

    command = add_command(
        commands,
        import_,
        "make a model folder of open weights",
        "Makes a model folder of another tool's model: a folder of transformers (gpt2, llama, mistral, qwen2, qwen3; "
        "safetensors only), a .gguf file, or a name on the Hugging Face hub, whose cache is looked in first and which "
        "HF_HUB_OFFLINE=1 keeps from the network. The weights keep their dtype. A model folder is a source too: with "
        "--adapter it is the base that an adapter is merged into.",
        "python -m llm import SmolLM2-135M-Instruct.Q8_0.gguf models/smollm2",
        "python -m llm import openai-community/gpt2 models/gpt2",
        "python -m llm import models/base models/again --adapter models/instruct/adapter",
        source=True,
    )
    command.add_argument(
        "--adapter", type=Path, metavar="DIR", help="the adapter/ of a model that was trained with trainable: lora"
    )

    command = add_command(
        commands,
        export,
        "write a model for other tools",
        "Writes a folder that transformers' Auto classes open, or a GGUF file that llama.cpp runs, tokenizer and chat "
        "template included; or the adapter alone, in PEFT's form, of a model trained with trainable: lora. "
        "What the format has no place for is named and nothing is written.",
        "python -m llm export models/instruct exported --format hf",
        "python -m llm export models/instruct model.gguf --format gguf --dtype q8_0",
        "python -m llm export models/instruct adapter --format peft --base HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    command.add_argument("out", type=Path, metavar="OUT", help="the folder or file to write")
    command.add_argument(
        "--format", required=True, choices=["hf", "gguf", "peft"], help="for transformers, for llama.cpp or for PEFT"
    )
    command.add_argument("--dtype", choices=["f16", "q8_0", "f32"], help="of the weights in a GGUF file (default: f16)")
    command.add_argument("--base", metavar="NAME", help="the model that an adapter for PEFT says it belongs to")

    command = add_command(
        commands,
        bench,
        "measure speed beside other projects",
        "Lets this project and those of its peers that are installed (transformers, litgpt, llms-from-scratch; for "
        "generate llama.cpp as xllamacpp; for tokenize tiktoken, tokenizers and rustbpe) do the same in turns, and "
        "prints a table: the median of the rounds, its ratio to the best peer, its share of the machine's own limit, "
        "measured in the same rounds, and the memory of the process. tokenize encodes the sample's text, as often as "
        "it takes, with one vocabulary; train and finetune make optimizer steps; generate continues prompts, with "
        "random weights: the rows of a batch have different lengths, at most --prompt and --new, and what was asked "
        "for counts. learn is no such contest: nanoGPT's recipe trains on the sample, at the best learning rate of a "
        "small sweep, then ours from params.yaml with as many parameters until its loss on held-out text is as low; "
        "the table says what each took. scale trains four small models by our recipe, fits a power law to their "
        "losses, says what the model of --width will reach, and then trains it.",
        "python -m llm bench train",
        "python -m llm bench train --vocab 50257 --rounds 7 --out bench",
        "python -m llm bench tokenize --megabytes 20 --text book.txt",
        "python -m llm bench generate --batch 16 --new 64",
        "python -m llm bench learn --text book.txt --vocab 4096 --steps 500 -S pretrain.lr=0.004",
        "python -m llm bench scale --text book.txt --vocab 4096 --tokens 2",
        'python -m llm bench generate --form llama --only "this project" --only "llama.cpp, Q8_0"',
        model_dir=False,
    )
    command.add_argument("kind", choices=[*KINDS, *TRAININGS], help="what they do")
    sizes = command.add_argument_group("sizes, where they shall be others than those of the project's own figures")
    for name, meaning in BENCH_SIZES.items():
        if name == "text":
            sizes.add_argument("--text", metavar="FILE", help=meaning)
        else:
            sizes.add_argument(f"--{option(name)}", type=positive, metavar="N", help=meaning)
    command.add_argument(
        "--form",
        choices=["gpt2", "llama"],
        help="of generate: GPT-2 124M's (default) or SmolLM2-135M's, sizes included",
    )
    command.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of learn and scale: a value in place of that of params.yaml, as in `dvc exp run`; may be repeated",
    )
    command.add_argument("--only", action="append", metavar="NAME", help="a contestant; may be repeated (default: all)")
    command.add_argument("--rounds", type=positive, metavar="N", help=f"turns of each (default: {ROUNDS})")
    command.add_argument("--seconds", type=float, metavar="X", help=f"of a turn (default: {SECONDS})")
    command.add_argument("--out", type=Path, metavar="DIR", help="where to leave the figures as JSON and a picture")
    return parser


def option(field: str) -> str:
    return field.replace("_", "-")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_command(
    commands: Any,
    run: Any,
    summary: str,
    description: str,
    *examples: str,
    source: bool = False,
    model_dir: bool = True,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        run.__name__.rstrip("_"),
        help=summary,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=CommandHelp,
    )
    if source:
        command.add_argument("source", metavar="SOURCE", help="a folder, a .gguf file or a hub name such as org/name")
    if model_dir:
        command.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="a model folder")
    command.set_defaults(run=run)
    return command


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line; the commands' own parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {InputError(message)}; see {self.prog} --help\n")


class CommandHelp(argparse.HelpFormatter):
    """Wraps descriptions but leaves the lines of the examples alone."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("how the text is chosen").add_argument
    add("--max-new-tokens", type=int, default=200, metavar="N", help="tokens at most (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0: always the likeliest token (default); 1: as likely as the model says",
    )
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that together reach probability P")
    add("--min-p", type=float, metavar="P", help="leave out tokens less likely than P times the likeliest")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that occurred become less likely (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text (default: %(default)s)")
    add = command.add_argument_group("how fast it comes").add_argument
    add_int8(add)
    add("--compile", action="store_true", help="compile the step of a token: half a minute at first, then much faster")
    add(
        "--draft",
        type=Path,
        metavar="MODEL_DIR",
        help="a smaller model with the same tokenizer, which guesses tokens ahead",
    )


def add_int8(add: Callable[..., argparse.Action]) -> None:
    add("--int8", action="store_true", help="round the weights to 8 bits: faster on a CPU, a little less exact")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:  # whoever read the answers left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to fail at exit
        return 141  # as shells report the signal SIGPIPE
    except KeyboardInterrupt:
        note("")
        return 130
    except (InputError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        note(f"python -m llm {args.command}: {message}")
        return 1
    return 0


if __name__ == "__main__":
    for file in (sys.stdout, sys.stderr):
        file.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
