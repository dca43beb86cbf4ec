"""The commands of `python -m llm`. Answers go to stdout, all else to stderr.

Exit status: 0 done, 1 wrong input (told in one line), 2 a command line that cannot be parsed, 130 interrupted.
`compare`, `card`, `audit` and `drift` state their own. A command imports PyTorch when it runs, so that `--help` answers
at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from llm.cli import (
    audit,
    bench,
    card,
    chat,
    classify,
    compare,
    drift,
    export,
    generate,
    harness,
    import_,
    inspect,
    judge,
    probe,
    score,
    serve,
)
from llm.cli.options import add_command
from llm.common.errors import InputError
from llm.common.log import setup_logging
from llm.common.namesake import check_namesake
from llm.common.sanitize import one_line

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "classify": classify,
    "score": score,
    "compare": compare,
    "card": card,
    "drift": drift,
    "audit": audit,
    "judge": judge,
    "probe": probe,
    "harness": harness,
    "serve": serve,
    "import": import_,
    "export": export,
    "inspect": inspect,
    "bench": bench,
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the commands' own parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {InputError(message)}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown arguments here, where argparse leaves it to the parser above, which knows no options."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; a command's function is in `run`."""
    parser = Parser(
        prog="python -m llm",
        description="Use a trained model. `dvc repro` makes models/base, models/classifier and models/instruct.",
        epilog="`python -m llm COMMAND --help` shows a command's options and examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = add_command(commands, name, module.SUMMARY, module.DESCRIPTION, module.EXAMPLES)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        setup_logging(getattr(args, "log_level", None))
        check_namesake()
        status: int | None = args.run(args)
    except BrokenPipeError:  # the reader of the answers left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to fail at exit
        return 141  # as shells report the signal SIGPIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(one_line(f"python -m llm {args.command}: {message}"), file=sys.stderr)
        return 1
    return status or 0
