"""`python -m llm generate`."""

from __future__ import annotations

import argparse
import itertools

from llm.cli.options import add_decoding, add_model, decoding_options, load_options
from llm.cli.terminal import checked_text, write
from llm.common.errors import InputError

SUMMARY = "continue a text"
DESCRIPTION = (
    "Prints the prompt and its continuation. An instruct model continues the text as it is, without its template."
)
EXAMPLES = (
    'python -m llm generate models/base --prompt "One morning"',
    'python -m llm generate models/base --prompt "One morning" --temperature 0.8 --top-p 0.95 --seed 7',
    'python -m llm generate models/smollm2 --prompt "One morning" --int8 --device cpu',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    add_decoding(parser)


def run(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    from llm.api import load

    prompt = checked_text(args.prompt, "--prompt")
    if not prompt:
        raise InputError("--prompt is empty; give some text to continue")
    model = load(args.model_dir, **load_options(args))
    model.require("base", "instruct")
    write(itertools.chain([prompt], model.stream(prompt, **decoding_options(args, model))))
