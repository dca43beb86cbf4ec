"""`python -m llm chat`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.cli.options import add_decoding, add_model, decoding_options, load_options
from llm.cli.terminal import checked_text, describe_training, stdin_lines, typed_lines, write
from llm.common.errors import InputError
from llm.common.sanitize import one_line

if TYPE_CHECKING:
    from llm.api import Model

SUMMARY = "have a conversation"
DESCRIPTION = (
    "Answers one question a line, from the terminal or from stdin, and remembers the conversation. The oldest turns "
    "are left out where the model's context has no place for them. /help lists the commands. In a terminal Ctrl-C ends "
    "an answer and Ctrl-D the chat. -v tells the speed."
)
EXAMPLES = (
    "python -m llm chat models/instruct",
    'echo "Name the opposite of cold." | python -m llm chat models/instruct',
    'python -m llm chat models/instruct --input "Ada sold bread at the harbour on Monday."',
    'python -m llm chat models/smollm2 --system "Answer in one sentence." --temperature 0.7',
)
log = logging.getLogger("llm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="a system message, above the conversation")
    add("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    add("--single-turn", action="store_true", help="answer each line by itself, without the earlier ones")
    text = "a text that the instructions are about; each is then answered by itself"
    add("--input", default="", metavar="TEXT", help=text)
    add_decoding(parser)


def run(args: argparse.Namespace) -> None:
    """Answer one question a line, as a conversation or each by itself."""
    from llm.api import load

    context = checked_text(args.input, "--input")
    system = None if args.system is None else checked_text(args.system, "--system")
    if args.load is not None and (context or args.single_turn):
        raise InputError("--load goes with a conversation, not with --input or --single-turn; leave one out")
    model = load(args.model_dir, **load_options(args))
    model.require("instruct")
    options = decoding_options(args, model)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if context or args.single_turn:
        answer_lines(model, options, system, context, interactive)
    else:
        converse(model, options, system, args.load, interactive)


def converse(model: Model, options: dict[str, Any], system: str | None, saved: Path | None, interactive: bool) -> None:
    """Answer lines as one conversation, and obey its commands."""
    from llm.cli.session import ChatSession

    session = ChatSession(model, options)
    if saved is not None:
        session.load(saved)
    if system is not None:
        session.set_system(system)
    if interactive:
        greet(model)
        log.info("One question a line. /help lists the commands, Ctrl-C ends an answer, Ctrl-D the chat.")
    for line in typed_lines() if interactive else stdin_lines():
        if not (text := line.strip()):
            continue
        try:
            session.take(text)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except InputError as error:
            if not interactive:
                raise
            print(one_line(str(error)), file=sys.stderr)


def answer_lines(model: Model, options: dict[str, Any], system: str | None, context: str, interactive: bool) -> None:
    """Answer each line by itself."""
    above = [] if system is None else [{"role": "system", "content": system}]
    if interactive:
        greet(model)
        log.info("One instruction a line, each by itself. Ctrl-C ends an answer, Ctrl-D the chat.")
    for line in typed_lines() if interactive else stdin_lines():
        if not (instruction := line.strip()):
            continue
        try:
            write(model.stream([*above, {"role": "user", "content": instruction, "input": context}], **options))
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        options["seed"] += 1  # asked again, it may answer otherwise


def greet(model: Model) -> None:
    """Say what the model was trained on."""
    for line in describe_training([], model.about):
        log.info(line)
