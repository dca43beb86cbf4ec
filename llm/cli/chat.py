"""`python -m llm chat`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys

from llm.cli.options import add_decoding, add_model, decoding_options, load_options
from llm.cli.terminal import checked_text, stdin_lines, typed_lines, write

SUMMARY = "answer instructions"
DESCRIPTION = (
    "Answers one instruction a line, from the terminal or from stdin. Each stands alone: the model does not see "
    "earlier ones. In a terminal Ctrl-C ends an answer and Ctrl-D the chat."
)
EXAMPLES = (
    "python -m llm chat models/instruct",
    'echo "Name the opposite of cold." | python -m llm chat models/instruct',
    'python -m llm chat models/instruct --input "Ada sold bread at the harbour on Monday."',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--input", default="", metavar="TEXT", help="a text that the instructions are about")
    add_decoding(parser)


def run(args: argparse.Namespace) -> None:
    """Answer one instruction a line; each stands alone."""
    from llm.api import load

    context = checked_text(args.input, "--input")
    model = load(args.model_dir, **load_options(args))
    model.require("instruct")
    options = decoding_options(args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (line editing and history for input())
        logging.getLogger("llm").info("One instruction a line. Ctrl-C ends an answer, Ctrl-D the chat.")
    for line in typed_lines() if interactive else stdin_lines():
        if not (instruction := line.strip()):
            continue
        message = {"role": "user", "content": instruction, "input": context}
        try:
            write(model.stream([message], **options))
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        options["seed"] += 1  # asked again, it may answer otherwise
