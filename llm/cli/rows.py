"""Rows in from files by name, results out as CSV or JSON lines."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.cli.terminal import decoded, print_json
from llm.common.errors import InputError
from llm.common.files import atomic_file, parse_json
from llm.common.sanitize import visible

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".txt",)
SUFFIXES = (*TABLES, ".jsonl", *LINES)
FORMATS = ("csv", "jsonl")  # of what is written
LARGEST_CELL = 10_000_000  # characters

Row = dict[str, Any]


def is_file_name(argument: str) -> bool:
    """Return True for the name of a file with rows, False for a text.

    Raises `InputError` for a name of which there is no file, and for a file of another kind.
    """
    path = Path(argument)
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # a long text, or one with a zero byte
        return False
    known = path.suffix.lower() in SUFFIXES
    if known and not exists and len(argument.split()) == 1:
        raise InputError(f"{argument}: no such file; a text of this form goes through stdin (-)")
    if exists and path.suffix and not known:
        raise InputError(
            f"{argument}: expected a file that ends in {' '.join(SUFFIXES)}, got {path.suffix}; convert it"
        )
    return known and exists


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Yield the rows of a .csv, .tsv or .jsonl file, and each line of a .txt file as a row of one column.

    Raises `InputError` for a row without a text in `column` (default: text), or without the columns of the first.
    """
    suffix, name, where = path.suffix.lower(), column or "text", ""
    if suffix in LINES:
        rows = _text_lines(path, name)
    else:
        rows = read_table(path)
    for where, row in rows:
        if name not in row:
            found = ", ".join(row) or "nothing"
            raise InputError(f"{where}: no column {name!r} (found {found}); name the one with the text by --column")
        if not isinstance(row[name], str | int | float | None):
            raise InputError(f"{where}: expected text in {name!r}, got {type(row[name]).__name__}; correct the row")
        yield row
    if not where:
        raise InputError(f"{path}: no row to read (expected at least one); fill it or leave it out")


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a .csv, .tsv or .jsonl file, each behind its place for messages."""
    delimiter = TABLES.get(path.suffix.lower())
    return _json_lines(path) if delimiter is None else _table(path, delimiter)


def text_of(row: Mapping[str, Any], column: str | None = None) -> str:
    """Return the text of a row; an empty cell is an empty text."""
    value = row[column or "text"]
    return "" if value is None else str(value)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _text_lines(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        yield where, {name: decoded(line, where).rstrip("\r\n")}


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(LARGEST_CELL)
    text = (decoded(line, f"{path}, line {number}") for number, line in _lines(path))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path}, line 1: expected different column names, got one twice; rename it")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise InputError(f"{where}: expected {len(header)} columns as in line 1, got {len(cells)}; correct it")
            if cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error}); correct the line") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if not (text := decoded(line, where)).strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON ({error}); correct the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}; correct the line")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: holds half a character (a lone surrogate); correct the line") from None
        yield where, row


Write = Callable[[Row], None]


@contextlib.contextmanager
def writer(out: Path | None, form: str) -> Iterator[Write]:
    """Yield a function that writes rows, to stdout or to a file that is there when the block has ended.

    On stdout control characters are made visible. All rows of a CSV have the columns of the first.
    """
    if out is None:
        yield _csv_writer(sys.stdout, shown=True) if form == "csv" else print_json
        sys.stdout.flush()
        return
    with atomic_file(out) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        if form == "csv":
            yield _csv_writer(file)
        else:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)


def _csv_writer(file: io.TextIOBase | Any, shown: bool = False) -> Write:
    columns: list[str] = []
    lines = csv.writer(file, lineterminator="\n")

    def cell(value: Any) -> Any:
        if isinstance(value, list | dict):
            value = json.dumps(value, ensure_ascii=False)
        return visible(value) if shown and isinstance(value, str) else value

    def write(row: Row) -> None:
        if not columns:
            columns.extend(row)
            lines.writerow(map(cell, columns))
        if list(row) != columns:
            raise InputError(f"a row has the columns {', '.join(row)}, the first {', '.join(columns)}; write jsonl")
        lines.writerow(cell(value) for value in row.values())

    return write
