"""`python -m llm score`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm.cli.options import add_device, add_model, add_rounding
from llm.cli.terminal import decoded, print_json
from llm.common.errors import InputError

SUMMARY = "measure how well a text is predicted"
DESCRIPTION = (
    "Prints a JSON object: tokens (scored ones: all but the first), bytes of the text, loss, perplexity, bpb. A text "
    "longer than the context is read in windows of the full context that overlap by half; each token is scored once."
)
EXAMPLES = ("python -m llm score models/base book.txt", "git show HEAD:README.md | python -m llm score models/base -")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text file, read as it is, or - for stdin")
    add_device(parser)
    add_rounding(parser)


def run(args: argparse.Namespace) -> None:
    """Print how well the model predicts a text."""
    from llm.api import load

    name = "stdin" if args.file == "-" else args.file
    content = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    text = decoded(content, name)
    if not text:
        raise InputError(f"{name}: empty; give a text to score")
    model = load(args.model_dir, device=args.device, int8=args.int8, int4=args.int4)
    model.require("base", "instruct")
    try:
        score = model.score(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    values = {"loss": score.loss, "perplexity": score.perplexity, "bpb": score.bpb(len(content))}
    print_json({"tokens": score.tokens, "bytes": len(content), **values})
