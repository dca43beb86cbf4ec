"""Cut Project Gutenberg's files into their books, without its headers, licences and the lines that mark them.

Three kinds of lines mark a book. `*** START OF ... ***` and `*** END OF ... ***` surround it since 2003. Older ones
begin below the "small print" of the header. Both may have `End of Project Gutenberg's ...` as their last line.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from llm.common.errors import InputError
from llm.download.content.formats import split_lines

NAME = r"Proj?[ejgy]\w*[- ]Gutenberg"  # Project, Projekt, Projet, Progetto, Proyecto, Projeto
STARTS = r"(?:start|begin\w*|anfang|d[eé]but|in[ií]cio|inizio|comienzo|come[cç]o|alku)"
ENDS = r"(?:end|ende|einde|fine?|fim|final|loppu|slut)"
BOOK_START = re.compile(rf"[\ufeff\s]*\*\*+\s*{STARTS}\b.{{0,60}}?\b{NAME}\b", re.IGNORECASE)
BOOK_END = re.compile(rf"\s*\*\*+\s*{ENDS}\b.{{0,60}}?\b{NAME}\b", re.IGNORECASE)
CLOSED = re.compile(r"\*\*\s*$")  # the end of such a line
SMALL_PRINT_START = re.compile(r"[\ufeff\s]*\*+\s*START\W*THE SMALL PRINT")
SMALL_PRINT_END = re.compile(r"\s*\*+\s*END\W*THE SMALL PRINT")
LAST_LINE = re.compile(
    rf"\s*(?:End|END|Ende|Einde|Fin|Fine|Fim|Loppu|Slut)\b.{{0,30}}?\b(?:{NAME}|PROJECT GUTENBERG)\b"
)
BELOW_LAST_LINE = re.compile(  # header or licence
    r"gutenberg|small print|\*\*\*|this file should be named|updated editions|copyright laws|\[?(etext|ebook) #",
    re.IGNORECASE,
)
HEADER = re.compile(
    r"\W*(?:the |this is (?:a|the) )?(?:copyrighted )?project gutenberg(?:['’]s)?(?: \w+)? e-?(?:text|book)(?!s)"
    r"|\W*project gutenberg['’]s \w",
    re.IGNORECASE,
)
MARKER_LINES = 6  # of a marker with a long title
HEADER_LINES = 60  # between a small print and a `*** START OF` that follows it


class Lines:
    """The lines of a file, with a view of those ahead."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.number = 0  # of the last line that was taken
        self._lines = lines
        self._ahead: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        while self.ahead(1):
            self.number += 1
            yield self._ahead.popleft()

    def ahead(self, n: int) -> list[str]:
        self._ahead.extend(islice(self._lines, n - len(self._ahead)) if n > len(self._ahead) else ())
        return list(islice(self._ahead, n))

    def skip(self, n: int) -> None:
        for _ in range(n):
            self._ahead.popleft()
        self.number += n


def read_books(text: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of the books, the first book with 0; raise `InputError` where a marker is missing."""
    lines = Lines(split_lines(text, name))
    books, state, ended, has_header = 0, "outside", "", True
    for line in lines:
        where = f"{name}: line {lines.number}"
        if SMALL_PRINT_END.match(line) and state in ("outside", "small print"):
            # One that no header precedes is the licence of the book above.
            state = "etext" if has_header and not _start_ahead(lines) else "outside"
        elif SMALL_PRINT_START.match(line):
            if state in ("book", "etext"):
                raise _missing("End of Project Gutenberg", where, "before this small print")
            state = "small print"
        elif state == "small print":
            continue
        elif _is_marker(BOOK_START, line, lines):
            if state != "outside":
                raise _missing("*** END OF", where, "before this '*** START OF'")
            lines.skip(_rest_of_marker(line, lines))
            state = "book"
        elif _is_marker(BOOK_END, line, lines):
            if state == "outside" and ended != "by last line":
                raise _missing("*** START OF", where, "before this '*** END OF'")
            lines.skip(_rest_of_marker(line, lines))
            books, state, ended, has_header = books + (state != "outside"), "outside", "by marker", False
        elif state == "outside":
            has_header = has_header or bool(HEADER.match(line))
        elif _is_last_line(line, lines):
            books, state, ended, has_header = books + 1, "outside", "by last line", False
        else:
            yield books, line + "\n"
    if state == "small print":
        raise _missing("*END*THE SMALL PRINT", name)
    if state == "book" or (state == "outside" and not books):
        raise _missing("*** END OF" if state == "book" else "*** START OF", name)
    if state == "etext":
        logging.getLogger("llm").warning("%s: no line says 'End of Project Gutenberg': text is kept to the end", name)


def _missing(marker: str, where: str, place: str = "") -> InputError:
    marker += " THIS PROJECT GUTENBERG EBOOK" if marker.startswith("***") else ""
    return InputError(f"{where}: expected a line '{marker}'{' ' + place if place else ''}, found none; "
                      f"{'correct the file or ' if place else ''}remove strip: gutenberg")  # fmt: skip


def _is_marker(kind: re.Pattern[str], line: str, lines: Lines) -> bool:
    """Return whether a marker begins here: closed by asterisks within a few lines, or all in capitals."""
    if not kind.match(line):
        return False
    return _rest_of_marker(line, lines) > 0 or bool(CLOSED.search(line)) or line == line.upper()


def _rest_of_marker(line: str, lines: Lines) -> int:
    """Return the number of lines that the marker goes on for."""
    if CLOSED.search(line):
        return 0
    for n, more in enumerate(lines.ahead(MARKER_LINES), start=1):
        if not more.strip():
            break
        if CLOSED.search(more):
            return n
    return 0


def _start_ahead(lines: Lines) -> bool:
    """Return whether the header goes on: a `*** START OF` follows before anything else of Project Gutenberg's."""
    for line in lines.ahead(HEADER_LINES):
        if BOOK_START.match(line) and CLOSED.search(line):
            return True
        if HEADER.match(line) or LAST_LINE.match(line) or BOOK_END.match(line) or SMALL_PRINT_START.match(line):
            return False
    return False


def _is_last_line(line: str, lines: Lines) -> bool:
    """Return whether the book ends here: the next paragraph is a marker, a header or a licence, or there is none."""
    if not LAST_LINE.match(line):
        return False
    ahead = lines.ahead(MARKER_LINES + 30)
    title = next((n for n, more in enumerate(ahead) if not more.strip() or BELOW_LAST_LINE.search(more)), len(ahead))
    following = next((more for more in ahead[title:] if more.strip()), None)
    return title < MARKER_LINES and (following is None or bool(BELOW_LAST_LINE.search(following)))
