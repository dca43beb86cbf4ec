"""Parse lines, JSON Lines, JSON and parquet, streamed. Every error names the file and the line or row.

A row that cannot be used is yielded as its error: who reads the rows raises it, or leaves that row out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.common.files import parse_json
from llm.common.sanitize import error_text
from llm.config import ReadOptions
from llm.download.content.archives import BLOCK, DataFile, seekable
from llm.download.content.encodings import decode_text

LARGEST_ROW = 64_000_000  # characters
BETWEEN = re.compile("[\\s,\ufeff]*")  # separates two objects of a JSON file

Row = tuple[str, Mapping[str, Any] | InputError]  # its place, for messages; its columns, or why it has none


class Wanted(NamedTuple):
    """The columns that a source reads."""

    columns: Mapping[str, str]  # names that must be there, and the params that state them
    label: str | None = None  # the one with the labels
    labels: tuple[str, ...] = ()  # as far as they are known
    label_first: bool = False  # a table without header has lines of label TAB text
    may_be_text: bool = False  # a file without rows is text
    optional: tuple[str, ...] = ()  # names that may be missing
    others: tuple[tuple[str, ...], ...] = ()  # names that serve as well

    def fit(self, names: Collection[str]) -> bool:
        """Return whether all wanted columns, or all of another set that serves as well, are among the names."""
        return any({*wanted} <= {*names} for wanted in (self.columns, *self.others))


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


def json_lines(file: DataFile, options: ReadOptions) -> Iterator[Row]:
    """Yield the objects of JSON Lines."""
    for number, line in enumerate(split_lines(decode_text(file, options.encoding), str(file)), 1):
        where = f"{file}, line {number}"
        if not line.strip("\ufeff \t\r"):
            continue
        try:
            row = parse_json(line.removeprefix("\ufeff"))  # between files that were joined
        except ValueError as error:
            problem = f"found an error ({error}); correct the line, or, if objects span lines, write format: json"
            yield where, InputError(f"{where}: expected one JSON object, {problem}")
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            problem = f"found {type(row).__name__}; correct the line"
            yield where, InputError(f"{where}: expected one JSON object, {problem}")


def json_rows(file: DataFile, options: ReadOptions) -> Iterator[Row]:
    """Yield the objects of JSON arrays, of several one after the other too, or objects in a row, one at a time."""
    decode, blocks = json.JSONDecoder().raw_decode, decode_text(file, options.encoding)
    waiting, at, passed = "", 0, 0  # text, the position in it, and how many lines came before it
    in_array, number = False, 0
    while True:
        at = BETWEEN.match(waiting, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if waiting.startswith("]" if in_array else "[", at):
            in_array, at = not in_array, at + 1
            continue
        try:
            row, end = decode(waiting, at)
        except (ValueError, RecursionError) as error:
            more = "".join(islice(blocks, 1 + (len(waiting) - at) // BLOCK))  # twice as much each time
            if more and len(waiting) - at <= LARGEST_ROW:
                passed += waiting.count("\n", 0, at)
                waiting, at = waiting[at:] + more, 0
                continue
            if at == len(waiting) and not in_array:
                return
            line = passed + (error.lineno if isinstance(error, json.JSONDecodeError) else 1)
            reason = "too many brackets inside one another" if isinstance(error, RecursionError) else error
            raise InputError(
                f"{file}, line {line}: expected a list of JSON objects, found an error ({reason})"
            ) from None
        number += 1
        where = f"{file}, row {number}"
        if isinstance(row, dict):
            yield where, row
        elif isinstance(row, list) and isinstance(options.header, list) and len(row) == len(options.header):
            yield where, dict(zip(options.header, row, strict=True))
        else:
            problem = f"found {type(row).__name__}; correct the file"
            if isinstance(row, list):
                problem = f"found a list of {len(row)}; name its columns with header: [...]"
            yield where, InputError(f"{where}: expected a JSON object, {problem}")
        at = end


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of numbers, by column, that Hugging Face's ClassLabel keeps in the schema of a file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (LookupError, TypeError, ValueError):
        return {}
    if not isinstance(features, dict):
        return {}
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    return {
        name: [str(label) for label in kind["names"]]
        for name, kind in kinds.items()
        if kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)
    }


def parquet_rows(file: DataFile, wanted: Wanted) -> Iterator[Row]:
    """Yield the rows of a parquet file, with the wanted columns only if it has them all."""
    import pyarrow
    import pyarrow.parquet

    with seekable(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            names, named = table.schema_arrow.names, _class_names(table.schema_arrow.metadata)
            # all of them where one is missing, so that a message can tell
            needed = sorted({*wanted.columns, *wanted.optional} & {*names})
            columns = needed if wanted.columns and wanted.columns.keys() <= {*names} else names
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    for column, labels in named.items():
                        if isinstance(label := row.get(column), int) and 0 <= label < len(labels):
                            row[column] = labels[label]
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, EOFError, OSError, ValueError) as error:
            if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise InputError(f"{file}: expected a parquet file, found an error ({error_text(error)})") from None
