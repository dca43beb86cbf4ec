"""Read tables of text: find out their separator, header and quoting, or say what was expected and what is there."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.config import ReadOptions
from llm.download.content.archives import DataFile
from llm.download.content.encodings import decode_text, decoded_head
from llm.download.content.formats import LARGEST_ROW, Row, Wanted, split_lines
from llm.download.content.signatures import HEAD

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[,;\t|]*', re.IGNORECASE)  # the first line that Excel understands
SAMPLE_LINES = 100

log = logging.getLogger("llm")


class Dialect(NamedTuple):
    """The form of a table."""

    separator: str
    names: list[str]  # of the columns
    first_line: int  # lines before the first row
    has_header: bool
    quoted: bool = True  # cells may stand in quotes; else a quote is a character like any other
    splits: int = -1  # separators that count in a line; -1: all


def read_table(file: DataFile, wanted: Wanted, options: ReadOptions, default: str) -> Iterator[Row]:
    """Yield the rows of a table; `default` is the separator that its name promises."""
    dialect = find_dialect(file, wanted, options, default)
    n, names = len(dialect.names), dialect.names
    header = f" as in line {dialect.first_line}" if dialect.has_header else f" ({', '.join(names)})"
    for where, cells in _quoted_rows(file, dialect, options) if dialect.quoted else _plain_rows(file, dialect, options):
        if dialect.splits == 1 and len(cells) == 1:
            yield where, InputError(f"{where}: expected {names[0]} TAB {names[1]}, found no tab; correct the line")
        elif len(cells) != n:
            yield (
                where,
                InputError(
                    f"{where}: expected {n} columns{header}, found {len(cells)}; correct the row, quote cells that "
                    f"hold a separator, or state another separator: (separated by {describe(dialect.separator)})"
                ),
            )
        elif dialect.has_header and [cell.strip() for cell in cells] == names:
            log.warning("%s: repeats the header, so it is no row", where)
        else:
            yield where, dict(zip(names, cells, strict=True))


def describe(separator: str) -> str:
    return SEPARATORS.get(separator, repr(separator))


def _lines(file: DataFile, dialect: Dialect, options: ReadOptions) -> Iterator[str]:
    return islice(split_lines(decode_text(file, options.encoding), str(file)), dialect.first_line, None)


def _plain_rows(file: DataFile, dialect: Dialect, options: ReadOptions) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(_lines(file, dialect, options), dialect.first_line + 1):
        if line.strip():
            yield f"{file}, line {number}", line.split(dialect.separator, dialect.splits)


def _quoted_rows(file: DataFile, dialect: Dialect, options: ReadOptions) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(LARGEST_ROW)
    lines = (line + "\n" for line in _lines(file, dialect, options))
    reader = csv.reader(lines, delimiter=dialect.separator, strict=True)
    while True:
        begin = dialect.first_line + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{file}, line {dialect.first_line + reader.line_num}: expected cells with closed quotes, found an "
                f"error ({error}) in the row that begins in line {begin}; write a quote inside a quoted cell twice, "
                "or, where quotes are plain characters, quoting: none"
            ) from None
        if cells is None:
            return
        if cells:
            yield f"{file}, line {dialect.first_line + reader.line_num}", cells


# ---- separator and header --------------------------------------------------------------------------------------------


def find_dialect(file: DataFile, wanted: Wanted, options: ReadOptions, default: str) -> Dialect:
    """Return the form of a table as it is stated and as its first lines and, for quotes, the whole of it tell."""
    dialect = _find_columns(file, wanted, options, default)
    if dialect.splits == -1:
        dialect = dialect._replace(quoted=_is_quoted(file, dialect, wanted, options))
    return dialect


def sample_lines(file: DataFile, options: ReadOptions) -> list[str]:
    """Return the first lines of a file."""
    head = file.head()
    lines = decoded_head(head, options.encoding).split("\n")
    return (lines[:-1] or lines if len(head) >= HEAD else lines)[:SAMPLE_LINES]


def _find_columns(file: DataFile, wanted: Wanted, options: ReadOptions, default: str) -> Dialect:
    lines = sample_lines(file, options)
    start = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    if start == len(lines):
        return Dialect(options.separator or default, [], 0, has_header=True)
    candidates = [options.separator] if options.separator else [default, *(s for s in SEPARATORS if s != default)]
    if mark := SEPARATOR_LINE.fullmatch(lines[start]):
        start += 1
        candidates = candidates if options.separator else [mark[1]]
    lines = lines[start:]
    quoted = options.quoting != "none"
    firsts = {separator: first_row(lines, separator, quoted) for separator in candidates}
    widest = max(candidates, key=lambda separator: len(firsts[separator][0]))
    if isinstance(options.header, list):
        fitting = [separator for separator in candidates if len(firsts[separator][0]) == len(options.header)]
        dialect = Dialect(fitting[0] if fitting else widest, options.header, start, has_header=False)
        return _checked(file, dialect, wanted, firsts[dialect.separator][0])
    if options.header is not False:
        fitting = [separator for separator in candidates if wanted.fit(firsts[separator][0])]
        if fitting:
            separator = max(fitting, key=lambda separator: len(firsts[separator][0]))
            names, height = firsts[separator]
            return _checked(file, Dialect(separator, names, start + height, has_header=True), wanted, names)
    if options.header is None and wanted.label_first:
        assert wanted.label is not None
        names = [wanted.label, *(name for name in wanted.columns if name != wanted.label)]
        return Dialect("\t", names, start, has_header=False, quoted=False, splits=1)
    if options.header is not True:
        for separator in candidates:
            if labelled := _columns_by_label(lines, separator, wanted):
                log.info("%s: no header; columns %s, separated by %s", file, ", ".join(labelled), describe(separator))
                return Dialect(separator, labelled, start, has_header=False)
    names, height = firsts[widest]
    if options.header is False:
        numbers = [str(number) for number in range(1, len(names) + 1)]
        return _checked(file, Dialect(widest, numbers, start, has_header=False), wanted, names)
    return _checked(file, Dialect(widest, names, start + height, has_header=True), wanted, names)


def first_row(lines: Sequence[str], separator: str, quoted: bool = True) -> tuple[list[str], int]:
    """Return the stripped cells of the first row, and how many lines it has."""
    if not quoted:
        return [cell.strip() for cell in lines[0].split(separator)] if lines else [], 1
    reader = csv.reader((line + "\n" for line in lines), delimiter=separator)
    try:
        return [cell.strip() for cell in next(reader, [])], max(reader.line_num, 1)
    except csv.Error:
        return [cell.strip() for cell in lines[0].split(separator)], 1


def _columns_by_label(lines: Sequence[str], separator: str, wanted: Wanted) -> list[str] | None:
    """Return the names of two columns of which one holds labels in every row; None where that is not so."""
    texts = [name for name in wanted.columns if name != wanted.label]
    if wanted.label is None or not wanted.labels or len(texts) != 1:
        return None
    for rows in (parse_rows(lines, separator), [line.split(separator) for line in lines if line.strip()]):
        if rows and all(len(row) == 2 for row in rows):
            holds_labels = [all(row[i].strip() in wanted.labels for row in rows) for i in (0, 1)]
            if holds_labels[0] != holds_labels[1]:
                return [wanted.label, texts[0]] if holds_labels[0] else [texts[0], wanted.label]
    return None


def parse_rows(lines: Iterable[str], separator: str) -> list[list[str]]:
    """Return the rows of some lines, or none where they have none."""
    try:
        return [row for row in csv.reader((line + "\n" for line in lines), delimiter=separator) if row]
    except csv.Error:
        return []


def _checked(file: DataFile, dialect: Dialect, wanted: Wanted, found: Sequence[str]) -> Dialect:
    """Return the dialect; raise `InputError` where a column is missing or stands there twice."""
    line = f"{file}, line {dialect.first_line + 1}"
    by = f"separated by {describe(dialect.separator)}"
    if not dialect.has_header and len(found) != len(dialect.names):
        raise InputError(
            f"{line}: expected {len(dialect.names)} columns ({', '.join(dialect.names)}), found {len(found)}, {by}: "
            f"{_shown(found)}; correct header: or separator:"
        )
    missing = [] if wanted.fit(dialect.names) else [name for name in wanted.columns if name not in dialect.names]
    if missing:
        expected = " and ".join(repr(name) for name in missing)
        keys = " and ".join(f"{wanted.columns[name]}:" for name in missing)
        seen = _shown(dialect.names)
        rest = f"or, if that is no header, name all columns, as in header: [{', '.join(wanted.columns)}]"
        if not dialect.has_header:
            seen, rest = f"{seen} for {_shown(found)}", "or the columns with header:"
        fix = f"name the right one with {keys}, {rest}"
        raise InputError(f"{line}: expected {expected}, found only {seen}; {fix} ({by})")
    twice = [name for name in wanted.columns if dialect.names.count(name) > 1]
    if twice:
        raise InputError(f"{line}: expected one column {twice[0]!r}, found {dialect.names.count(twice[0])}; rename one")
    return dialect


def _shown(cells: Sequence[Any]) -> str:
    shown = [str(cell) if len(str(cell)) < 40 else f"{str(cell)[:37]}..." for cell in cells[:20]]
    return ", ".join(shown) or "nothing"


# ---- quoting ---------------------------------------------------------------------------------------------------------


def _is_quoted(file: DataFile, dialect: Dialect, wanted: Wanted, options: ReadOptions) -> bool:
    """Return whether cells may stand in quotes, which the whole file tells.

    A quote that is a character at the start of one cell, and another at the end of a later one, make one cell of all
    the rows between. Where each line is a row by itself, quotes are characters; where that cannot be told, an error.
    """
    if options.quoting in ("csv", "none"):
        return options.quoting == "csv"
    if not any(b'"' in block for block in file.blocks()):
        return True
    found = _scan(file, dialect, wanted, options)
    by_tabs = dialect.separator == "\t"
    if by_tabs and found.rows_are_lines and (not found.is_sound or (found.swallowed and wanted.labels)):
        log.info("%s: quotes are taken as characters, as each line is a row; else write quoting: csv", file)
        return False
    if found.swallowed and (by_tabs or found.rows_are_lines):
        raise InputError(
            f"{file}, line {found.swallowed}: expected rows, found a quoted cell with {describe(dialect.separator)} "
            "and a line end, which may be several rows; write quoting: none if quotes are plain characters, or "
            "quoting: csv"
        )
    return True


class Scan(NamedTuple):
    """The rows of a whole table, with cells in quotes and without."""

    is_sound: bool  # with cells in quotes, every row has all columns
    swallowed: int | None  # line of the first quoted cell that holds a separator and a line end
    rows_are_lines: bool  # without, every line has all columns, and its label where labels are known


def _scan(file: DataFile, dialect: Dialect, wanted: Wanted, options: ReadOptions) -> Scan:
    n, separator = len(dialect.names), dialect.separator
    label = dialect.names.index(wanted.label) if wanted.label in dialect.names and wanted.labels else None
    rows_are_lines, is_sound, swallowed, last = True, True, None, 0

    def watched() -> Iterator[str]:
        nonlocal rows_are_lines
        for line in _lines(file, dialect, options):
            cells = line.split(separator)
            if line.strip() and (
                len(cells) != n or '\\"' in line or (label is not None and cells[label].strip() not in wanted.labels)
            ):
                rows_are_lines = False
            yield line + "\n"

    csv.field_size_limit(LARGEST_ROW)
    lines = watched()
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for cells in reader:
            is_sound &= len(cells) in (0, n)
            if swallowed is None and any(separator in cell and "\n" in cell for cell in cells):
                swallowed = dialect.first_line + last + 1
            last = reader.line_num
    except csv.Error:
        is_sound = False
    for _ in lines:
        pass
    return Scan(is_sound, swallowed, rows_are_lines)
