"""Cut a document into chunks: the parts that a split is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

CUTS = (  # the first that occurs; the cut is behind the match
    re.compile(r"\n[^\S\n]*\n\s*"),  # the end of a paragraph
    re.compile(r"\n"),
    re.compile(r"[.!?…]['\"”’)]*\s+|[。！？]"),  # the end of a sentence
    re.compile(r"\s+"),
)


def cut_chunks(text: str, limit: int) -> list[str]:
    r"""Cut a text into chunks of at most `limit` characters and about equal length, at paragraph ends where possible.

    >>> cut_chunks("One.\n\nTwo. Three.", 12)
    ['One.\n\n', 'Two. Three.']
    """
    chunks, start = [], 0
    while (rest := len(text) - start) > limit:
        longest = start + math.ceil(rest / math.ceil(rest / limit))
        end = _last_cut(text, (start + longest) // 2, longest)
        chunks.append(text[start:end])
        start = end
    return [*chunks, text[start:]] if start < len(text) else chunks


def _last_cut(text: str, low: int, high: int) -> int:
    for place in CUTS:
        ends = [match.end() for match in place.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high


def cut_at(text: str, lengths: Iterable[int]) -> list[str]:
    """Cut a text into chunks of the given lengths."""
    chunks, start = [], 0
    for length in lengths:
        chunks.append(text[start : start + length])
        start += length
    return chunks
