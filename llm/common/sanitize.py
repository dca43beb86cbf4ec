"""Text from files and models on its way to a terminal, a message or a page: shown as text, never obeyed.

A terminal obeys escape sequences, a page markup, and both let some characters turn the text around them. What is
dangerous is shown by another sign or escaped; everything else stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BIDI = "\u202a-\u202e\u2066-\u2069"  # turn the direction of what follows them
CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}]")  # all but tab and line feed
NOT_IN_A_LINE = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{BIDI}]")  # also what ends a line
MARKUP = re.compile(r"[\\`*{}\[\]()#+!|<>~&$:@-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.")  # in a_b it is a plain character


def visible(text: str) -> str:
    """What a model or a file wrote, with U+FFFD for each control character but tab and line feed.

    >>> visible("one\\x1b[2J\\ttwo\\n")
    'one\ufffd[2J\\ttwo\\n'
    """
    return CONTROLS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """A message, with what cannot be seen in it (control characters, line ends, odd spaces) as Python writes it.

    >>> print(one_line("no column 'a\\x1b[2J\\nb'"))
    no column 'a\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def error_text(error: BaseException) -> str:
    """Return an error's message on one line, or the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def escape(text: str) -> str:
    """Text for a line or a table cell of Markdown, shown as it is.

    >>> print(escape("a_b | <script> [x](javascript:y)"))
    a_b \\| \\<script\\> \\[x\\]\\(javascript\\:y\\)
    """
    return MARKUP.sub(r"\\\g<0>", " ".join(NOT_IN_A_LINE.sub(" ", text).split()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with the numbers to the right."""
    return [
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
