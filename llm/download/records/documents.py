"""Cut the text of a file into documents and those into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE = 1_000_000  # characters of a document in one record


def split_documents(
    text: Iterable[str], separator: str | None, seen: set[str] | None = None
) -> Iterator[tuple[int, str]]:
    """Yield numbered documents in pieces; add the separator to `seen` if it occurs. Blank documents are left out."""
    number, waiting, begun = 0, "", False
    for block in text:
        waiting += block
        if separator and separator in waiting:
            if seen is not None:
                seen.add(separator)
            *ended, waiting = waiting.split(separator)
            for document in ended:
                if begun or document.strip():
                    yield from ((number, piece) for piece in cut_pieces(document))
                    number, begun = number + 1, False
        keep = PIECE + len(separator or "")  # so that no separator is cut in two
        while len(waiting) > keep:
            at = _cut(waiting)
            yield number, waiting[:at]
            waiting, begun = waiting[at:], True
    if waiting.strip() or (begun and waiting):
        yield from ((number, piece) for piece in cut_pieces(waiting))


def cut_pieces(text: str) -> Iterator[str]:
    while len(text) > PIECE:
        at = _cut(text)
        yield text[:at]
        text = text[at:]
    if text:
        yield text


def _cut(text: str) -> int:
    """Return the end of a piece: after the last line end that fits in, or else the last space, or else its limit."""
    return text.rfind("\n", 0, PIECE) + 1 or text.rfind(" ", 0, PIECE) + 1 or PIECE
