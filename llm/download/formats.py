"""Parse files of every supported format into text or rows, streamed.

Formats go by suffix: .txt .md (text), .jsonl .json .csv .tsv .parquet (rows), each plain or as .gz, .zst or .zip.
Every error names the file and the line or row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from llm.common.errors import InputError
from llm.common.files import parse_json
from llm.common.sanitize import error_text
from llm.download.archives import BLOCK, DataFile

TEXT = (".txt", ".md")
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LARGEST_ROW = 64_000_000  # characters
BETWEEN = re.compile(r"[\s,]*")  # separates two objects of a JSON file

Row = tuple[str, Mapping[str, Any]]  # its place, for messages; its columns


def decode_text(file: DataFile) -> Iterator[str]:
    """Yield UTF-8 text, without byte order mark, each line end as a line feed."""
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


def split_lines(text: Iterable[str], name: str) -> Iterator[str]:
    """Yield lines without their ends, cut at line feeds only: other Unicode line ends may stand inside JSON."""
    rest = ""
    for block in text:
        *lines, rest = (rest + block).split("\n")
        yield from lines
        if len(rest) > LARGEST_ROW:
            raise InputError(f"{name}: expected lines, found one of more than {LARGEST_ROW:,} characters; cut it")
    if rest:
        yield rest


def read_rows(file: DataFile, columns: set[str]) -> Iterator[Row]:
    """Yield the rows of a file of any format with columns."""
    readers = {".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    if file.suffix == ".parquet":
        return _parquet_rows(file, columns)
    if file.suffix not in readers:
        known = f"{' '.join(ROWS)} (rows) or, for a corpus, {' '.join(TEXT)}"
        found = file.suffix or "no ending"
        raise InputError(f"{file}: expected a name that ends in {known}, found {found}; convert or rename it")
    return readers[file.suffix](file)


def unquoted_rows(file: DataFile, label_column: str, text_column: str) -> Iterator[Row]:
    """Yield rows of label TAB text, without header; quotes are plain characters."""
    for number, line in enumerate(split_lines(decode_text(file), str(file)), 1):
        label, tab, text = line.partition("\t")
        if not tab and line.strip():
            raise InputError(f"{file}, line {number}: expected label TAB text, found no tab; correct the line")
        if tab:
            yield f"{file}, line {number}", {label_column: label, text_column: text}


def _json_lines(file: DataFile) -> Iterator[Row]:
    for number, line in enumerate(split_lines(decode_text(file), str(file)), 1):
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
    """Yield the objects of a JSON array, or objects in a row, decoded one at a time."""
    decode, blocks = json.JSONDecoder().raw_decode, decode_text(file)
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
    lines = (line + "\n" for line in split_lines(decode_text(file), str(file)))
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
        if file.compression:
            for block in file.blocks():
                unpacked.write(block)
        try:
            table = pyarrow.parquet.ParquetFile(unpacked if file.compression else file.path)
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
            raise InputError(f"{file}: expected a parquet file, found an error ({error_text(error)})") from None
