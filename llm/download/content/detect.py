"""Tell the format of a file, and read its rows.

A format is what a source states, or what the name ends in, or what the content looks like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llm.common.errors import InputError
from llm.config import ReadOptions
from llm.download.content.archives import DataFile
from llm.download.content.encodings import decoded_head, find_encoding
from llm.download.content.extract import document_kind, sheet_rows
from llm.download.content.formats import Row, Wanted, json_lines, json_rows, parquet_rows
from llm.download.content.nested import inner_rows
from llm.download.content.signatures import DOCUMENTS, check_binary, check_pointer, is_parquet, looks_binary
from llm.download.content.tables import SAMPLE_LINES, SEPARATOR_LINE, SEPARATORS, first_row, parse_rows, read_table

BY_SUFFIX = {
    **dict.fromkeys((".txt", ".md", ".text", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".ldjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
NO_DATA = (".dvc", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".epub")  # names that promise something else than text
KNOWN = ".jsonl .json .csv .tsv .parquet .xlsx (rows) or, for a corpus, .txt .md .pdf .html .epub .docx"


def read_rows(file: DataFile, found: str, wanted: Wanted, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a file whose format has been found."""
    if found == "parquet":
        return parquet_rows(file, wanted)
    if found == "xlsx":
        return sheet_rows(file, wanted, options)
    if found in ("csv", "tsv"):
        return read_table(file, wanted, options, "\t" if found == "tsv" else ",")
    rows = (json_rows if found == "json" else json_lines)(file, options)
    return rows if options.records is None else inner_rows(rows, options.records)


def find_format(file: DataFile, wanted: Wanted, options: ReadOptions) -> str:
    """Return the format of a file; raise `InputError` for content that is none, or is no data."""
    head = file.head()
    check_pointer(str(file), head)
    if is_parquet(head):
        return "parquet"
    if kind := document_kind(file, head, options.format):
        if kind != "xlsx" and not wanted.may_be_text:
            raise InputError(
                f"{file}: expected rows, found {DOCUMENTS[kind]}; a corpus reads it, other data are tables"
            )
        return kind
    check_binary(str(file), head)
    is_utf8 = options.encoding is None and find_encoding(head) == "utf-8"
    text = decoded_head(head, options.encoding)
    expected = options.format or BY_SUFFIX.get(file.suffix)
    if expected == "parquet":
        return expected  # its reader says what is wrong
    if expected is not None and (expected != "text" or wanted.may_be_text):
        if is_utf8 and b"\0" in head and looks_binary(head):
            place = f"zero bytes, the first at offset {head.find(0)}"
            raise InputError(f"{file}: expected UTF-8, found {place}; is it damaged, or of another encoding:?")
        return "json" if expected == "jsonl" and text.lstrip().startswith("[") else expected
    found = None if file.suffix in NO_DATA or (is_utf8 and looks_binary(head)) else sniff(text, wanted)
    if found is None:
        seen = f"{file.suffix or 'no ending'}"
        raise InputError(
            f"{file}: expected a name that ends in {KNOWN}, found {seen}; convert or rename it, or state its format:"
        )
    return found


def sniff(text: str, wanted: Wanted) -> str | None:
    """Return the format that the beginning of a file looks like, or None."""
    row = first_object(text)
    if row is not None and (not wanted.may_be_text or wanted.columns.keys() <= row.keys()):
        line = text.lstrip().partition("\n")[0]
        return "jsonl" if line.startswith("{") and line.rstrip().endswith("}") else "json"
    lines = [line for line in text.split("\n") if line.strip()][:SAMPLE_LINES]
    if lines and SEPARATOR_LINE.fullmatch(lines[0]):
        return "csv"
    for separator in ("\t", *SEPARATORS):
        rows = parse_rows(lines[:-1] or lines, separator)  # the last one may be cut
        names = {*first_row(lines, separator)[0]} if lines else set()
        is_table = len(names) > 1 and wanted.columns.keys() <= names
        if is_table or (not wanted.may_be_text and {len(row) for row in rows} not in (set(), {1}) and _is_even(rows)):
            return "tsv" if separator == "\t" else "csv"
    return "text" if wanted.may_be_text else None


def _is_even(rows: list[list[str]]) -> bool:
    return len({len(row) for row in rows}) == 1


def first_object(text: str) -> dict[str, Any] | None:
    """Return the first object of JSON or of a list in JSON; an empty one where text begins as one and is cut."""
    start = text.lstrip("\ufeff \t\n")
    inner = start[1:].lstrip() if start.startswith("[") else start
    if not inner.startswith("{"):
        return None
    try:
        row, _ = json.JSONDecoder().raw_decode(inner)
    except (ValueError, RecursionError):
        return {} if inner[1:].lstrip().startswith('"') else None
    return row if isinstance(row, dict) else None
