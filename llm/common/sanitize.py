"""Text from files and models on its way to a terminal or into a message: shown, never obeyed.

A terminal obeys escape sequences, and some characters turn the text around them. These are shown by another sign or
escaped; everything else stays as it is.
"""

from __future__ import annotations

import re

BIDI = "\u202a-\u202e\u2066-\u2069"  # turn the direction of what follows them
CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}]")  # all but tab and line feed


def visible(text: str) -> str:
    r"""Return a text with U+FFFD for each control character but tab and line feed.

    >>> visible("one\x1b[2J\ttwo\n")
    'one�[2J\ttwo\n'
    """
    return CONTROLS.sub("\ufffd", text)


def one_line(text: str) -> str:
    r"""Return a message with its control characters, line ends and odd spaces as Python writes them.

    >>> print(one_line("no column 'a\x1b[2J\nb'"))
    no column 'a\x1b[2J\nb'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def error_text(error: BaseException) -> str:
    """Return an error's message on one line, or the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
