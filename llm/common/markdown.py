"""Markdown, in which text from files and models is shown as text and never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm.common.sanitize import BIDI, visible

NOT_IN_A_LINE = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{BIDI}]")  # also what ends a line
MARKUP = re.compile(r"[\\`*{}\[\]()#+!|<>~&$:@-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.")  # in a_b it is a plain character


def escape(text: str) -> str:
    r"""Return text for a line or a table cell.

    >>> print(escape("a_b | <script> [x](javascript:y)"))
    a_b \| \<script\> \[x\]\(javascript\:y\)
    """
    return MARKUP.sub(r"\\\g<0>", " ".join(NOT_IN_A_LINE.sub(" ", text).split()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with the numbers to the right."""
    return [
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def fenced(text: str) -> list[str]:
    """Return the lines of a code block that nothing inside it can close; control characters become U+FFFD."""
    text = visible(re.sub(r"[^\S \n]", " ", text))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}text", text, fence, ""]
