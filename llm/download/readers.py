"""Reads what a source's files hold, in every supported format, and writes it as JSON Lines for `data/raw/`.

Formats go by suffix: .txt .md (text), .jsonl .json .csv .tsv .parquet (rows), each plain or as .gz, .zst or .zip.
Memory stays bounded whatever the size: text is streamed in pieces, rows one at a time. Every error names the file and
the line or row.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm.common.errors import InputError
from llm.common.files import parse_json
from llm.config import CorpusSource, InstructionsSource, MessagesSource
from llm.download.fetch import BLOCK, DataFile

TEXT = (".txt", ".md")
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PIECE = 1_000_000  # characters of a document in one record
LARGEST_ROW = 64_000_000  # characters
SPLITS = ("train", "val", "test")
BETWEEN = re.compile(r"[\s,]*")  # what separates two objects of a JSON file

# Older books break a long title in the START line, and some name the end once more before the END line.
GUTENBERG_START = re.compile(r"\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG EBOOK")
GUTENBERG_END = re.compile(r"\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG EBOOK|End of (the )?Project Gutenberg")

Section = CorpusSource | MessagesSource | InstructionsSource


class Written(NamedTuple):
    counts: list[int]  # documents or rows from each file
    md5: str


def write_records(section: Section, files: list[DataFile], path: Path) -> Written:
    """Writes all files of a section as one JSON Lines file: see `corpus`, `messages` and `instructions`."""
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


# ---- the three kinds of data -----------------------------------------------------------------------------------------


def corpus(section: CorpusSource, file: DataFile, first: int = 0) -> Iterator[dict[str, Any]]:
    """`{"doc": 0, "text": ...}`: records in a row with one number are one document, numbered from `first`."""
    if file.suffix in TEXT:
        text = _text(file)
        if section.strip == "gutenberg":
            lines = strip_gutenberg(text, str(file))
            text = iter(lambda: "".join(islice(lines, 10_000)), "")
        documents = _documents(text, section.document_separator)
    else:
        column = section.text or "text"
        texts = (_value(row, column, "text", where) for where, row in _rows(file, {column}))
        documents = ((number, piece) for number, text in enumerate(filter(str.strip, texts)) for piece in _pieces(text))
    for number, piece in documents:
        yield {"doc": first + number, "text": piece}


def messages(section: MessagesSource, file: DataFile) -> Iterator[dict[str, Any]]:
    """`{"text", "label"}`, and `"split"` where the source has such a column."""
    columns = {section.text, section.label} | ({section.split} if section.split else set())
    rows = _unquoted_rows(file, section) if section.format == "tsv" else _rows(file, columns)
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
    """`{"instruction", "input", "output"}`, and `"task"` and `"split"` where the source has such columns."""
    names = (section.instruction, section.input, section.output, section.task, section.split)
    must_have_input = "input" in section.model_fields_set  # a column named `input` may be absent, one that you name not
    for where, row in _rows(file, {name for name in names if name}):
        record = {"instruction": _filled(row, section.instruction, "instruction", where), "input": ""}
        if section.input and (must_have_input or section.input in row):
            record["input"] = _value(row, section.input, "input", where)
        record["output"] = _filled(row, section.output, "output", where)
        if section.task:
            record["task"] = _value(row, section.task, "task", where)
        yield record | _split(row, section.split, where)


def _value(row: Mapping[str, Any], column: str, key: str, where: str) -> str:
    """A cell as text. Numbers and truth values are taken as they are written."""
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


# ---- text ------------------------------------------------------------------------------------------------------------


def _text(file: DataFile) -> Iterator[str]:
    """UTF-8 decoded, without byte order mark, all line ends as \\n."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    offset, at_start = 0, True

    def decode(block: bytes, final: bool) -> str:
        held_back = len(decoder.getstate()[0])  # the first bytes of a character that the last block cut
        try:
            return decoder.decode(block, final=final)
        except UnicodeDecodeError as error:
            at = offset - held_back + error.start
            raise InputError(
                f"{file}: expected UTF-8, found byte 0x{error.object[error.start]:02x} at offset {at}; "
                "convert it, for example with: iconv -f WINDOWS-1252 -t UTF-8"
            ) from None

    for block in file.blocks():
        text = decode(block, final=False)
        offset += len(block)
        if text:
            yield text.removeprefix("\ufeff") if at_start else text
            at_start = False
    yield decode(b"", final=True)


def _lines(text: Iterable[str], name: str) -> Iterator[str]:
    """Lines without their ends, cut at \\n only: the other Unicode line ends may stand inside JSON."""
    rest = ""
    for block in text:
        *lines, rest = (rest + block).split("\n")
        yield from lines
        if len(rest) > LARGEST_ROW:
            raise InputError(f"{name}: expected lines, found one of more than {LARGEST_ROW:,} characters; cut it")
    if rest:
        yield rest


def strip_gutenberg(text: Iterable[str], name: str) -> Iterator[str]:
    """The book alone, a line at a time: without Project Gutenberg's header, licence and the lines that mark them."""
    state = "before"
    for line in _lines(text, name):
        if state == "book":
            if GUTENBERG_END.match(line):
                return
            yield line + "\n"
        elif state == "marker" or GUTENBERG_START.match(line):
            state = "book" if line.rstrip().endswith("***") else "marker"
    missing = "*** END OF" if state == "book" else "*** START OF"
    raise InputError(
        f"{name}: expected a line '{missing} THIS PROJECT GUTENBERG EBOOK', found none; remove strip: gutenberg"
    )


def _documents(text: Iterable[str], separator: str | None) -> Iterator[tuple[int, str]]:
    """Numbered documents in pieces. A document of blanks only is left out."""
    number, waiting, begun = 0, "", False
    for block in text:
        waiting += block
        if separator and separator in waiting:
            *ended, waiting = waiting.split(separator)
            for document in ended:
                if begun or document.strip():
                    yield from ((number, piece) for piece in _pieces(document))
                    number, begun = number + 1, False
        keep = PIECE + len(separator or "")  # so that no separator is cut in two
        while len(waiting) > keep:
            at = _cut(waiting)
            yield number, waiting[:at]
            waiting, begun = waiting[at:], True
    if waiting.strip() or (begun and waiting):
        yield from ((number, piece) for piece in _pieces(waiting))


def _pieces(text: str) -> Iterator[str]:
    while len(text) > PIECE:
        at = _cut(text)
        yield text[:at]
        text = text[at:]
    if text:
        yield text


def _cut(text: str) -> int:
    """Where to end a piece: after the last line end that fits in, or else the last space, or else at its limit."""
    return text.rfind("\n", 0, PIECE) + 1 or text.rfind(" ", 0, PIECE) + 1 or PIECE


# ---- rows ------------------------------------------------------------------------------------------------------------

Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages; its columns


def _rows(file: DataFile, columns: set[str]) -> Iterator[Row]:
    """The rows of a file of any format with columns."""
    readers = {".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    if file.suffix == ".parquet":
        return _parquet_rows(file, columns)
    if file.suffix not in readers:
        known = f"{' '.join(ROWS)} (rows) or, for a corpus, {' '.join(TEXT)}"
        found = file.suffix or "no ending"
        raise InputError(f"{file}: expected a name that ends in {known}, found {found}; convert or rename it")
    return readers[file.suffix](file)


def _unquoted_rows(file: DataFile, section: MessagesSource) -> Iterator[Row]:
    """label TAB text, without header; quotes are plain characters."""
    for number, line in enumerate(_lines(_text(file), str(file)), 1):
        label, tab, text = line.partition("\t")
        if not tab and line.strip():
            raise InputError(f"{file}, line {number}: expected label TAB text, found no tab; correct the line")
        if tab:
            yield f"{file}, line {number}", {section.label: label, section.text: text}


def _json_lines(file: DataFile) -> Iterator[Row]:
    for number, line in enumerate(_lines(_text(file), str(file)), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: expected one JSON object, found an error ({error}); correct the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected one JSON object, found {type(row).__name__}; correct the line")
        yield where, row


def _json_rows(file: DataFile) -> Iterator[Row]:
    """The objects of a JSON array, or objects in a row, decoded one at a time."""
    decode, blocks = json.JSONDecoder().raw_decode, _text(file)
    waiting, at, passed = "", 0, 0  # text, the position in it, and how many lines came before it
    array, number = False, 0
    while True:
        at = BETWEEN.match(waiting, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if number == 0 and not array and waiting.startswith("[", at):
            array, at = True, at + 1
            continue
        if array and waiting.startswith("]", at):
            return
        try:
            row, end = decode(waiting, at)
        except (ValueError, RecursionError) as error:
            more = "".join(islice(blocks, 1 + (len(waiting) - at) // BLOCK))  # twice as much each time
            if more and len(waiting) - at <= LARGEST_ROW:
                passed += waiting.count("\n", 0, at)
                waiting, at = waiting[at:] + more, 0
                continue
            if at == len(waiting) and not array:
                return
            line = passed + (error.lineno if isinstance(error, json.JSONDecodeError) else 1)
            raise InputError(
                f"{file}, line {line}: expected a list of JSON objects, found an error ({error})"
            ) from None
        number += 1
        if not isinstance(row, dict):
            raise InputError(
                f"{file}, row {number}: expected a JSON object, found {type(row).__name__}; correct the file"
            )
        yield f"{file}, row {number}", row
        at = end


def _csv_rows(file: DataFile) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW)
    lines = (line + "\n" for line in _lines(_text(file), str(file)))
    reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            where = f"{file}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{where}: expected {len(header)} columns as in line 1, found {len(cells)}; correct the row"
                )
            if cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{file}, line {reader.line_num}"
        hint = "write a quote inside a quoted cell twice"
        raise InputError(f"{where}: expected cells with closed quotes, found an error ({error}); {hint}") from None


def _parquet_rows(file: DataFile, columns: set[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:  # parquet is read from its end
        if file.packing:
            for block in file.blocks():
                unpacked.write(block)
        try:
            table = pyarrow.parquet.ParquetFile(unpacked if file.packing else file.path)
            names = table.schema_arrow.names
            wanted = sorted(columns) if columns <= set(names) else names  # all of them, so that a message can tell
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, EOFError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(
                f"{file}: expected a parquet file, found an error ({' '.join(str(error).split())})"
            ) from None
