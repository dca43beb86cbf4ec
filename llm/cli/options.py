"""Options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.device import DEVICES
from llm.common.errors import InputError

if TYPE_CHECKING:
    from llm.api import Model

WRONG_INPUT = 2  # exit status of commands whose 1 is a finding


class CommandHelp(argparse.HelpFormatter):
    """Wraps descriptions but leaves the lines of the examples alone."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def add_command(
    commands: Any, name: str, summary: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Add the parser of a command, with the options that all commands have."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=CommandHelp,
    )
    level = command.add_mutually_exclusive_group()  # without a default: a command below would put it over that above
    form: dict[str, Any] = {"dest": "log_level", "action": "store_const", "default": argparse.SUPPRESS}
    level.add_argument("-v", "--verbose", const="debug", help="show all messages, with their time", **form)
    level.add_argument("-q", "--quiet", const="warning", help="show warnings only", **form)
    return command


def add_model(parser: argparse.ArgumentParser) -> None:
    what = "a model folder; or a folder of transformers, a .gguf file or a hub name, imported to a cache at first"
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help=what)


def add_device(parser: Any) -> None:
    where = "where the model runs (default: auto, a GPU if there is one)"
    parser.add_argument("--device", choices=DEVICES, default="auto", help=where)


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to this file, not to stdout")


def add_rounding(parser: Any) -> None:
    """Add the options for weights of fewer bits."""
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument(
        "--int8", action="store_true", help="round the weights to 8 bits: faster on a CPU, a little less exact"
    )
    bits.add_argument("--int4", action="store_true", help="round them to 4 bits: faster still, less exact; needs g++")


def add_int8_cache(parser: Any) -> None:
    what = "keep keys and values in 8 bits: a quarter of the KV cache's memory, a little less exact"
    parser.add_argument("--int8-cache", action="store_true", help=what)


def add_decoding(parser: argparse.ArgumentParser) -> None:
    text = "Defaults are the model's generation settings; without them the likeliest token is taken."
    add = parser.add_argument_group("how the text is chosen", text).add_argument
    add("--max-new-tokens", type=int, default=200, metavar="N", help="generate at most N tokens (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="0: always the likeliest token; 1: the model's own distribution",
    )
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that together reach probability P")
    add("--min-p", type=float, metavar="P", help="exclude tokens less likely than P times the likeliest")
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: tokens that occurred become less likely",
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text (default: %(default)s)")
    speed = parser.add_argument_group("how fast it comes")
    add_device(speed)
    add_rounding(speed)
    add_int8_cache(speed)
    speed.add_argument(
        "--compile", action="store_true", help="compile decoding: half a minute at the first start, then much faster"
    )
    speed.add_argument(
        "--draft",
        metavar="MODEL_DIR",
        help="for speculative decoding: a smaller model with the same tokenizer, or `prompt` to draft what "
        "followed the last tokens before",
    )


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `llm.load` that the options of `add_decoding` give."""
    names = ("device", "int8", "int4", "int8_cache", "draft")
    return {"compiled": args.compile} | {name: getattr(args, name) for name in names}


def decoding_options(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Return the arguments of `Model.stream` that the options of `add_decoding` give; the model says the others."""
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    sampling = dataclasses.replace(model.sampling, **given)
    return {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "seed": args.seed}


def check_output(out: Path, source: str | Path, kind: str = "model folder", holds: str = "config.json") -> None:
    """Raise `InputError` where a written folder would replace its own source, or a folder of another kind."""
    if out.resolve() == Path(source).resolve():
        raise InputError(f"{out}: the source itself; name another folder to write to")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / holds).is_file()):
        raise InputError(f"{out}: exists and is no {kind}; name a new folder to write to")
