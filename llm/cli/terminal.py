"""Texts in from arguments and stdin, answers out to stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llm.common.errors import InputError
from llm.common.files import write_atomic
from llm.common.sanitize import CONTROLS, one_line, visible

if TYPE_CHECKING:
    from llm.data.about import About


def write(pieces: Iterable[str]) -> None:
    """Write each piece as soon as it is there, then a line end; control characters are made visible."""
    for piece in pieces:
        print(visible(piece), end="", flush=True)
    print(flush=True)


def write_result(text: str, out: Path | None) -> None:
    """Write a text to a file, or to stdout where that is None."""
    if out is None:
        print(visible(text), end="")
    else:
        write_atomic(out, text)


def print_json(value: dict[str, Any]) -> None:
    """Print one line of JSON. The control characters that JSON leaves alone are escaped too."""
    text = json.dumps(value, ensure_ascii=False)
    print(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def checked_text(text: str, name: str) -> str:
    """Return an argument that is text; bytes outside the terminal's encoding arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not valid UTF-8; convert it first") from None
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
    """Yield the lines that are typed at a prompt, until Ctrl-D; Ctrl-C drops the line."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (line editing and history for input())
    prompt = "> "
    if has_colour(sys.stdout) and "readline" in sys.modules:
        prompt = "\001\033[1;36m\002> \001\033[0m\002"  # 1 and 2 enclose what takes no place on the line
    while True:
        try:
            yield checked_text(input(prompt), "the instruction")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def has_colour(stream: TextIO) -> bool:
    """Return whether colours may be written: to terminals that know them, and never with NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def named_texts(arguments: list[str]) -> Iterator[str]:
    """Yield the texts as given; `-` stands for the lines of stdin."""
    for argument in arguments:
        if argument == "-":
            yield from stdin_lines()
        else:
            yield checked_text(argument, "TEXT")


def describe_training(labels: Sequence[str], about: About | None) -> list[str]:
    """Return lines that say what a model was trained on, as far as its folder tells it."""
    lines = [f"labels: {', '.join(labels)}"] if labels else []
    if about is not None and about.tasks:
        lines.append(f"tasks: {', '.join(f'{task} ({n:,})' for task, n in about.tasks.items())}")
    if about is not None and about.examples:
        lines += ["trained on texts such as:", *(f"  {' '.join(text.split())}" for text in about.examples)]
    return [one_line(line) for line in lines]
