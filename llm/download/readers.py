"""Write the files of a source as JSON Lines for `data/raw/`: a corpus, messages or instruction pairs.

Memory stays bounded whatever the size: text is streamed in pieces, rows one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm.common.errors import InputError
from llm.config import SPLITS, CorpusSource, InstructionsSource, MessagesSource
from llm.download.archives import DataFile
from llm.download.documents import cut_pieces, split_documents
from llm.download.formats import TEXT, decode_text, read_rows, unquoted_rows
from llm.download.gutenberg import read_books

Section = CorpusSource | MessagesSource | InstructionsSource


class Written(NamedTuple):
    counts: list[int]  # documents or rows from each file
    md5: str


def write_records(section: Section, files: list[DataFile], path: Path) -> Written:
    """Write all files of a section as one JSON Lines file: see `corpus`, `messages` and `instructions`."""
    digest = hashlib.md5(usedforsecurity=False)
    counts: list[int] = []
    with path.open("wb") as out, tqdm(desc=path.stem, unit=" records", disable=None, leave=False) as bar:
        for file in files:
            count = 0
            for record in _records(section, file, sum(counts)):
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                digest.update(line)
                bar.update()
                count = record["doc"] + 1 - sum(counts) if "doc" in record else count + 1
            if count == 0:
                raise InputError(f"{file}: expected text, found none; remove it from the source or fill it")
            counts.append(count)
        out.flush()
        os.fsync(out.fileno())
    return Written(counts, digest.hexdigest())


def _records(section: Section, file: DataFile, first: int) -> Iterator[dict[str, Any]]:
    if isinstance(section, CorpusSource):
        return corpus(section, file, first)
    return messages(section, file) if isinstance(section, MessagesSource) else instructions(section, file)


def corpus(section: CorpusSource, file: DataFile, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yield `{"doc": 0, "text": ...}`. Records in a row with one number are one document, numbered from `first`."""
    if file.suffix in TEXT:
        documents = _text_documents(section, file)
    else:
        column = section.text or "text"
        cells = (_value(row, column, "text", where) for where, row in read_rows(file, {column}))
        texts = enumerate(filter(str.strip, cells))
        documents = ((number, piece) for number, text in texts for piece in cut_pieces(text))
    for number, piece in documents:
        yield {"doc": first + number, "text": piece}


def _text_documents(section: CorpusSource, file: DataFile) -> Iterator[tuple[int, str]]:
    """Yield numbered documents in pieces; each book of Project Gutenberg is a document, or several."""
    if section.strip != "gutenberg":
        yield from split_documents(decode_text(file), section.document_separator)
        return
    first = 0
    for _, lines in groupby(read_books(decode_text(file), str(file)), key=itemgetter(0)):
        text = iter(lambda lines=lines: "".join(line for _, line in islice(lines, 10_000)), "")  # type: ignore[misc]
        number = -1
        for number, piece in split_documents(text, section.document_separator):
            yield first + number, piece
        first += number + 1


def messages(section: MessagesSource, file: DataFile) -> Iterator[dict[str, Any]]:
    """Yield `{"text", "label"}`, and `"split"` where the source has such a column."""
    columns = {section.text, section.label} | ({section.split} if section.split else set())
    rows = unquoted_rows(file, section.label, section.text) if section.format == "tsv" else read_rows(file, columns)
    for where, row in rows:
        record = {
            "text": _filled(row, section.text, "text", where),
            "label": _filled(row, section.label, "label", where),
        }
        if record["label"] not in section.labels:
            allowed = ", ".join(section.labels)
            raise InputError(
                f"{where}: expected a label out of {allowed}, found {record['label']!r}; correct it or labels:"
            )
        yield record | _split(row, section.split, where)


def instructions(section: InstructionsSource, file: DataFile) -> Iterator[dict[str, Any]]:
    """Yield `{"instruction", "input", "output"}`, with `"task"` and `"split"` where the source has such columns."""
    names = (section.instruction, section.input, section.output, section.task, section.split)
    must_have_input = "input" in section.model_fields_set  # a column named `input` may be absent, one that you name not
    for where, row in read_rows(file, {name for name in names if name}):
        record = {"instruction": _filled(row, section.instruction, "instruction", where), "input": ""}
        if section.input and (must_have_input or section.input in row):
            record["input"] = _value(row, section.input, "input", where)
        record["output"] = _filled(row, section.output, "output", where)
        if section.task:
            record["task"] = _value(row, section.task, "task", where)
        yield record | _split(row, section.split, where)


def _value(row: Mapping[str, Any], column: str, key: str, where: str) -> str:
    """Return a cell as text. Numbers and truth values are taken as they are written."""
    if column not in row:
        raise InputError(
            f"{where}: expected {column!r}, found only {', '.join(row) or 'nothing'}; name the right one with {key}:"
        )
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise InputError(f"{where}: expected text in {column!r}, found {type(value).__name__}; correct the row")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = f"half a character (\\u{ord(text[error.start]):04x}) at position {error.start}"
        raise InputError(
            f"{where}: expected Unicode text in {column!r}, found {at}; correct or remove the row"
        ) from None
    return text


def _filled(row: Mapping[str, Any], column: str, key: str, where: str) -> str:
    text = _value(row, column, key, where)
    if not text.strip():
        raise InputError(f"{where}: expected text in {column!r}, found none; fill it or remove the row")
    return text


def _split(row: Mapping[str, Any], column: str | None, where: str) -> dict[str, str]:
    if column is None:
        return {}
    split = _value(row, column, "split", where)
    if split not in SPLITS:
        raise InputError(f"{where}: expected a split out of {', '.join(SPLITS)}, found {split!r}; correct it")
    return {"split": split}
