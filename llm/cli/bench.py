"""`python -m llm bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm.cli.options import add_command
from llm.common.errors import InputError

if TYPE_CHECKING:
    from llm.config import Params

SUMMARY = "measure speed beside other projects"
DESCRIPTION = "Measures this project beside its peers. Each KIND has options of its own: see its --help."
EXAMPLES = (
    "python -m llm bench train --help",
    "python -m llm bench train",
    "python -m llm bench learn --text book.txt --vocab 4096 --steps 500",
)
ROUNDS, SECONDS = 5, 5.0
IN_ROUNDS = (
    " Installed peers do the same, in rounds. The table shows the median of the rounds, its "
    "ratio to the best peer, its share of the machine's own limit, measured in the same rounds, and the memory."
)


class Kind(NamedTuple):
    """A kind of benchmark: the texts of its help, and the sizes that it has."""

    summary: str
    description: str
    sizes: tuple[str, ...]
    examples: tuple[str, ...]


SERVED = ("layers", "width", "heads", "kv_heads", "ffn", "vocab", "context", "clients", "prompt", "new")
MODEL = ("layers", "width", "heads", "vocab", "context", "batch")
KINDS = {
    "tokenize": Kind(
        "encode a text",
        "Encodes a text with one vocabulary for all. Peers: tiktoken, tokenizers, rustbpe." + IN_ROUNDS,
        ("megabytes", "vocab", "processes", "text"),
        ("python -m llm bench tokenize --megabytes 20 --text book.txt",),
    ),
    "train": Kind(
        "make optimizer steps of pretraining",
        "Makes optimizer steps in GPT-2's form. Peers: transformers, litgpt, llms-from-scratch." + IN_ROUNDS,
        MODEL,
        ("python -m llm bench train", "python -m llm bench train --vocab 50257 --rounds 7 --out bench"),
    ),
    "finetune": Kind(
        "make optimizer steps of a classifier's finetuning",
        "Finetunes the last block of a classifier on short messages. Peer: transformers." + IN_ROUNDS,
        MODEL,
        ("python -m llm bench finetune --batch 32",),
    ),
    "generate": Kind(
        "continue prompts",
        "Continues prompts with random weights. The rows of a batch have different lengths, at most --prompt and "
        "--new. The tokens that were asked for count. Peers: transformers, llama.cpp (as xllamacpp)." + IN_ROUNDS,
        (*MODEL, "prompt", "new", "kv_heads", "ffn"),
        (
            "python -m llm bench generate --batch 16 --new 64",
            'python -m llm bench generate --form llama --only "this project" --only "llama.cpp, Q8_0"',
        ),
    ),
    "serve": Kind(
        "stream to one client and to many",
        "Serves SmolLM2-135M's form with random weights: to one client at a time, then to --clients at once. "
        "Peer: llama.cpp's server (as xllamacpp), in F32 and Q8_0. Servers take turns in rounds.",
        SERVED,
        (
            "python -m llm bench serve --rounds 1 --seconds 20",
            'python -m llm bench serve --only "this project" --clients 32',
        ),
    ),
    "load": Kind(
        "keep the server beyond its limits",
        "Asks our server by more clients than its queue takes. One in twenty leaves in the middle, and the model is "
        "swapped once. The table shows what the requests came to, errors, memory, and what is left over.",
        SERVED,
        ("python -m llm bench load --seconds 600",),
    ),
    "precisions": Kind(
        "compare precisions of one model",
        "Measures a model folder in fp32, int8 and int4, and in llama.cpp as F32, F16, Q8_0, Q4_1 and Q4_0: weights on "
        "disk, memory, decoding on one thread, and bits per byte of --text. A GGUF file's are of its weights, in fp32.",
        ("text", "new"),
        ("python -m llm bench precisions models/base --text book.txt",),
    ),
    "gpu": Kind(
        "measure a GPU: one table to send",
        "Trains and decodes GPT-2 124M in bf16 on the CUDA device. Peers: transformers, litgpt, llms-from-scratch."
        + IN_ROUNDS,
        ("batch", "context", "prompt", "new"),
        ("python -m llm bench gpu", "python -m llm bench gpu --batch 4  # for a GPU with little memory"),
    ),
    "learn": Kind(
        "measure time to a loss beside nanoGPT's recipe",
        "Trains nanoGPT's recipe at the best learning rate of a small sweep. Then it trains ours, from params.yaml and "
        "with as many parameters, until its loss on held-out text is as low. The table shows what each took.",
        ("steps", "our_steps", *MODEL, "text"),
        ("python -m llm bench learn --text book.txt --vocab 4096 --steps 500 -S pretrain.lr=0.004",),
    ),
    "scale": Kind(
        "predict a larger model from smaller ones",
        "Trains four small models by our recipe, fits a power law to their losses and predicts the loss of the model "
        "of --width. Then it trains that model.",
        ("tokens", *MODEL, "text"),
        ("python -m llm bench scale --text book.txt --vocab 4096 --tokens 2",),
    ),
}
APART = ("serve", "load", "precisions", "gpu")  # not in the harness's rounds
TRAININGS = ("learn", "scale")  # of params.yaml's recipe, not in rounds
SIZES = {
    "megabytes": "length of the text in MB",
    "processes": "processes that encode together",
    "text": "a text file, or data/raw/corpus.jsonl, in place of the sample",
    "tokens": "training tokens for each parameter",
    "steps": "steps of the training that sets the target",
    "our_steps": "steps of our schedule (default: as many)",
    "layers": "blocks",
    "width": "embedding dimension",
    "heads": "attention heads",
    "kv_heads": "key-value heads (form llama)",
    "ffn": "width of the feed-forward layers (form llama)",
    "vocab": "size of the vocabulary",
    "context": "context length in tokens",
    "batch": "rows of a batch",
    "clients": "clients at once, and rows of the decode batch",
    "prompt": "tokens of a prompt",
    "new": "tokens to generate",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a command for each kind, with its own options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        command = add_command(kinds, name, kind.summary, kind.description, kind.examples)
        sizes = command.add_argument_group("sizes (default: those of docs/benchmarks.md)")
        for size in kind.sizes:
            form: dict[str, Any] = {"metavar": "FILE"} if size == "text" else {"metavar": "N", "type": positive}
            sizes.add_argument(f"--{size.replace('_', '-')}", help=SIZES[size], **form)
        add = command.add_argument
        if name == "generate":
            add("--form", choices=["gpt2", "llama"], default="gpt2", help="GPT-2 124M (default) or SmolLM2-135M")
        if name in TRAININGS:
            add(
                "-S",
                "--set-param",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="a value in place of that of params.yaml, as in `dvc exp run`; may be repeated",
            )
        elif name == "precisions":
            add("model_dir", type=Path, metavar="MODEL_DIR", help="a model folder")
        elif name == "load":
            add("--seconds", type=float, default=600.0, metavar="X", help="length of the load (default: %(default)s)")
        else:
            if name != "gpu":
                add("--only", action="append", metavar="NAME", help="an implementation; may be repeated (default: all)")
            add("--rounds", type=positive, default=ROUNDS, metavar="N", help="number of rounds (default: %(default)s)")
            add("--seconds", type=float, default=SECONDS, metavar="X", help="length of a round (default: %(default)s)")
        add("--out", type=Path, metavar="DIR", help="where to leave the figures as JSON and a picture")


def run(args: argparse.Namespace) -> None:
    """Print a table of a benchmark's results, and leave them in a folder if one is named."""
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # an error of it shows now
    compare = (
        compare_trainings if args.kind in TRAININGS else compare_apart if args.kind in APART else compare_in_rounds
    )
    module, results = compare(args)
    if args.out is not None:
        (args.out / f"{args.kind}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        module.draw(results, args.out / f"{args.kind}.png")
    print(module.markdown(results), end="")


def compare_in_rounds(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Run tokenize, train, finetune or generate; return the module that reports the results, and these."""
    from llm.bench import harness

    benchmark = harness.load_benchmark(args.kind)
    sizes = benchmark.forms[args.form] if args.kind == "generate" else benchmark.sizes
    return harness, harness.compare(benchmark, given_sizes(args, sizes), args.rounds, args.seconds, args.only)


def compare_apart(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Run serve, load, precisions or gpu; return the module that reports the results, and these."""
    if args.kind == "precisions":
        from llm.bench import precisions

        if args.text is None:
            raise InputError("--text: not given; name a text file that the model has not been trained on")
        text = Path(args.text).read_text(encoding="utf-8")
        return precisions, precisions.compare_precisions(args.model_dir, text, args.new or precisions.NEW)
    if args.kind == "gpu":
        from llm.bench import gpu

        return gpu, gpu.measure(given_sizes(args, gpu.GPT2), args.rounds, args.seconds)
    from llm.bench import serving

    given = {"batch" if name == "clients" else name: getattr(args, name) for name in SERVED}
    shape = serving.SIZES._replace(**{name: value for name, value in given.items() if value is not None})
    if args.kind == "load":
        return serving, serving.load(shape, args.seconds)
    return serving, serving.serve(shape, args.rounds, args.seconds, args.only)


def compare_trainings(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Run learn or scale; return the module that reports the results, and these."""
    from llm.bench import learning, scaling

    params = shipped_params(args.set_param)
    if args.kind == "learn":
        return learning, learning.learn(given_sizes(args, learning.default_sizes(params)), params)
    return scaling, scaling.scale(given_sizes(args, scaling.default_sizes(params)), params)


def given_sizes(args: argparse.Namespace, sizes: Any) -> Any:
    """Return the sizes, a NamedTuple, with those of the command line in place."""
    given = {name: getattr(args, name) for name in KINDS[args.kind].sizes}
    return sizes._replace(**{name: value for name, value in given.items() if value is not None})


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def shipped_params(changes: Sequence[str] = ()) -> Params:
    """Return this clone's `params.yaml`, with changes as for `dvc exp run -S`: `key=value`, `+key=value` to add one."""
    import yaml

    from llm.config import parse_params

    path = Path(__file__).resolve().parents[2] / "params.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; our recipe is taken from it: run this in a clone") from None
    for change in changes:
        key, equals, value = change.partition("=")
        *names, last = key.removeprefix("+").split(".")
        section = values
        for name in names:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or (last in section) == key.startswith("+"):
            raise InputError(
                f"--set-param {change}: expected KEY=VALUE with a key of params.yaml, as pretrain.lr=0.004"
            )
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set-param {change}: the value is not valid YAML") from None
    return parse_params(values, str(path))
