"""Write the files of a source as JSON Lines for `data/raw/`: a corpus, messages or instruction pairs.

Memory stays bounded whatever the size: text is streamed in pieces, rows one at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm.common.errors import InputError
from llm.config import AUTO, CorpusSource, InstructionsSource, MessagesSource, ReadOptions, SourceFile, split_name
from llm.download.content.archives import DataFile
from llm.download.content.detect import find_format, read_rows
from llm.download.content.encodings import decode_text
from llm.download.content.extract import extract_text
from llm.download.content.formats import Wanted
from llm.download.content.nested import cell, columns_of
from llm.download.content.signatures import DOCUMENTS
from llm.download.records.conversations import conversation_columns, is_preference, read_conversation, read_preference
from llm.download.records.documents import cut_pieces, split_documents
from llm.download.records.gutenberg import read_books
from llm.download.records.shapes import describe_shape
from llm.download.records.splits import Section, file_splits

MOST_LABELS = 200  # that are found out; more are no labels
MOST_REASONS = 1000  # that are counted each for itself, for rows that are left out
SHOWN = 5  # examples of rows that are left out, for each reason
COMPLETION = ("prompt", "completion")  # columns of a pair that are known without being stated
UNSTATED = (COMPLETION, ("messages",), ("conversations",), ("chosen", "rejected"))  # columns that tell a form
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold")

log = logging.getLogger("llm")


class LeftOut:
    """Rows that were left out, by reason; their list goes to a file beside the records."""

    def __init__(self, path: Path | None = None, skip: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._path, self._skip = path, skip
        if path is not None:
            path.unlink(missing_ok=True)

    def add(self, where: str, error: InputError) -> None:
        """Record a row, or raise its error where none may be left out."""
        if not self._skip:
            raise error
        reason = str(error).removeprefix(f"{where}: ").partition(";")[0]
        counted = reason if reason in self.counts or len(self.counts) < MOST_REASONS else "other reasons"
        self.counts[counted] += 1
        examples = self.examples.setdefault(counted, [])
        if len(examples) < SHOWN:
            examples.append(where)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"row": where, "reason": reason}, ensure_ascii=False) + "\n")

    def tell(self, kept: int) -> None:
        """Log how many rows were left out, why, and the first of them."""
        if not self.counts or self._path is None:
            return
        reasons = "; ".join(
            f"{count:,}: {reason} ({', '.join(self.examples[reason])}{', ...' if count > SHOWN else ''})"
            for reason, count in self.counts.most_common(SHOWN)
        )
        total = self.counts.total()
        log.warning("%s: left out %s of %s rows: %s", self._path.stem.split(".")[0], total, total + kept, reasons)

    def summary(self) -> dict[str, Any]:
        reasons = [{"reason": reason, "rows": count} for reason, count in self.counts.most_common(20)]
        return {"rows": self.counts.total(), "reasons": reasons}


class Written(NamedTuple):
    counts: list[int]  # documents or rows from each file
    md5: str
    labels: list[str]  # of messages
    left_out: LeftOut


def write_records(section: Section, files: list[DataFile], path: Path) -> Written:
    """Write all files of a section as one JSON Lines file: see `corpus`, `messages` and `instructions`.

    Rows that are left out are listed beside it, in a file that ends in `.left_out.jsonl`.
    """
    splits = file_splits(section, files)
    digest = hashlib.md5(usedforsecurity=False)
    counts: list[int] = []
    labels: dict[str, None] = {}
    left_out = LeftOut(path.with_suffix(".left_out.jsonl"), section.skip_invalid)
    read: Counter[str | None] = Counter()  # records of each split
    preferences = 0
    seen: set[str] = set()  # the separator of documents, once it has occurred
    with path.open("wb") as out, tqdm(desc=path.stem, unit=" records", disable=None, leave=False) as bar:
        for file, split in zip(files, splits, strict=True):
            count = 0
            if section.max_rows is not None and read[split] >= section.max_rows:
                counts.append(0)
                continue
            for record in read_records(section, file, sum(counts), left_out, seen):
                number = record["doc"] - sum(counts) if "doc" in record else count
                if section.max_rows is not None and read[split] + number >= section.max_rows:
                    break
                count = number + 1
                labels.setdefault(record.get("label", ""))
                preferences += "rejected" in record
                line = json.dumps(record | ({"split": split} if split else {}), ensure_ascii=False).encode() + b"\n"
                out.write(line)
                digest.update(line)
                bar.update()
            if count == 0:
                why = next(iter(left_out.counts), "found none").removeprefix("expected text, ")
                raise InputError(f"{file}: expected text, {why}; remove it from the source or fill it")
            counts.append(count)
            read[split] += count
        out.flush()
        os.fsync(out.fileno())
    left_out.tell(sum(counts))
    if preferences:
        log.info("%s: %d preference pairs, of which the rejected answers are kept for later", path.stem, preferences)
    _tell_of_separator(section, files, seen)
    return Written(counts, digest.hexdigest(), _all_labels(section, labels), left_out)


def _tell_of_separator(section: Section, files: list[DataFile], seen: set[str]) -> None:
    separator = section.document_separator if isinstance(section, CorpusSource) else None
    if separator and not seen:
        log.warning(
            "%s: document_separator %r never occurs, so nothing was cut; correct it (in double quotes, \\n is a line "
            "end) or remove it",
            files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more",
            separator,
        )


def _all_labels(section: Section, found: Mapping[str, None]) -> list[str]:
    if not isinstance(section, MessagesSource) or section.labels != AUTO:
        return section.labels if isinstance(section, MessagesSource) else []
    labels = sorted(found)
    if len(labels) < 2:
        raise InputError(
            f"labels: auto: expected two labels or more in {section.label!r}, found {labels}; correct label:"
        )
    if several := next((label for label in labels if len(_several(label, labels)) > 1), None):
        raise InputError(
            f"labels: auto: expected one label a row, found several in one cell of {section.label!r}, {several!r}, "
            "which occur alone too; write a row for one of them"
        )
    log.warning("labels: auto: found %s; to have a new one refused, write labels: [%s]", len(labels), ", ".join(labels))
    return labels


def read_records(
    section: Section, file: DataFile, first: int, left_out: LeftOut, seen: set[str]
) -> Iterator[dict[str, Any]]:
    """Yield the records of one file; the documents of a corpus are numbered from `first`."""
    if isinstance(section, CorpusSource):
        return corpus(section, file, left_out, first, seen)
    return (
        messages(section, file, left_out)
        if isinstance(section, MessagesSource)
        else instructions(section, file, left_out)
    )


def read_options(section: Section, file: DataFile) -> ReadOptions:
    """Return what is stated about a file, or about all of its source."""
    return section.entry(file.declared or SourceFile(path=file.name))


def wanted_columns(section: Section) -> Wanted:
    """Return the columns that a source reads."""
    if isinstance(section, CorpusSource):
        return Wanted(dict.fromkeys(columns_of(section.text or "text"), "text"), may_be_text=True)
    keys = ["text", "label"] if isinstance(section, MessagesSource) else ["instruction", "output", "task"]
    if isinstance(section, InstructionsSource) and "input" in section.model_fields_set:
        keys.insert(1, "input")  # a column named `input` may be absent, one that you name not
    if isinstance(section, InstructionsSource) and section.messages is not None:
        keys = ["messages", "task"]
    columns = {
        name: key
        for key in [*keys, "split"]
        if getattr(section, key) is not None
        for name in columns_of(getattr(section, key))
    }
    if isinstance(section, InstructionsSource):
        more = tuple(name for name in (section.task, section.split) if name is not None)
        others = tuple((*names, *more) for names in UNSTATED) if _is_unstated(section) else ()
        return Wanted(columns, optional=(section.input,) if section.input else (), others=others)
    columns |= {name: "slices" for column in section.slices for name in columns_of(column)}
    return Wanted(columns, section.label, () if section.labels == AUTO else tuple(section.labels))


def _is_unstated(section: InstructionsSource) -> bool:
    """Return whether the fields of a row tell its form."""
    return not {"instruction", "output", "messages"} & section.model_fields_set


def _convert(
    section: Section, file: DataFile, left_out: LeftOut, convert: Callable[[Mapping[str, Any], str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the records that the rows of a file make."""
    options, wanted = read_options(section, file), wanted_columns(section)
    if isinstance(section, MessagesSource):
        label_first = options.format == "tsv" and section.split is None and not section.slices
        wanted = wanted._replace(label_first=label_first)
    is_first = True
    for where, row in read_rows(file, find_format(file, wanted, options), wanted, options):
        try:
            if isinstance(row, InputError):
                raise row
            if is_first:
                _tell_of_split_column(section, file, row)
                is_first = False
            record = convert(row, where)
        except InputError as error:
            left_out.add(where, error)
        else:
            yield record


def corpus(
    section: CorpusSource, file: DataFile, left_out: LeftOut, first: int = 0, seen: set[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield `{"doc": 0, "text": ...}`. Records in a row with one number are one document, numbered from `first`."""
    options = read_options(section, file)
    found = find_format(file, wanted_columns(section), options)
    if found == "text":
        documents = _text_documents(section, file, decode_text(file, options.encoding), seen)
    elif found in DOCUMENTS and found != "xlsx":
        documents = _text_documents(section, file, extract_text(file, found, options), seen)
    else:
        column = section.text or "text"
        cells = _convert(section, file, left_out, lambda row, where: {"text": _value(row, column, "text", where)})
        texts = enumerate(cell["text"] for cell in cells if cell["text"].strip())
        documents = ((number, piece) for number, text in texts for piece in cut_pieces(text))
    for number, piece in documents:
        yield {"doc": first + number, "text": piece}


def _text_documents(
    section: CorpusSource, file: DataFile, text: Iterator[str], seen: set[str] | None
) -> Iterator[tuple[int, str]]:
    """Yield numbered documents in pieces; each book of Project Gutenberg is a document, or several."""
    if section.strip != "gutenberg":
        yield from split_documents(text, section.document_separator, seen)
        return
    first = 0
    for _, lines in groupby(read_books(text, str(file)), key=itemgetter(0)):
        book = iter(lambda lines=lines: "".join(line for _, line in islice(lines, 10_000)), "")  # type: ignore[misc]
        number = -1
        for number, piece in split_documents(book, section.document_separator, seen):
            yield first + number, piece
        first += number + 1


def messages(section: MessagesSource, file: DataFile, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """Yield `{"text", "label"}`, and `"split"` and `"slices"` where the source has such columns."""
    found: set[str] = set()

    def convert(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        text, label = _filled(row, section.text, "text", where), _label(section, row, where)
        found.add(label)
        if len(found) > MOST_LABELS:
            raise InputError(
                f"{file}: expected labels in {section.label!r}, found more than {MOST_LABELS} different ones; "
                "correct label:, or list them under labels:"
            )
        slices = {column: _value(row, column, "slices", where).strip() for column in section.slices}
        return (
            {"text": text, "label": label} | _split(row, section.split, where) | ({"slices": slices} if slices else {})
        )

    return _convert(section, file, left_out, convert)


def _label(section: MessagesSource, row: Mapping[str, Any], where: str) -> str:
    text = _filled(row, section.label, "label", where)
    if section.label_names is not None:
        name = section.label_names.get(text.strip().removesuffix(".0"))
        if name is None:
            known = ", ".join(section.label_names)
            raise InputError(f"{where}: expected a number out of {known}, found {text!r}; correct it or label_names:")
        text = name
    if section.labels == AUTO:
        return text.strip()
    value = cell(row, section.label)[1] if section.label_names is None else text
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    for label in section.labels:
        same = text.strip() == label or (isinstance(value, bool) and text.lower() == label)
        if text == label or same or (is_number and _number(label) == value):
            return label
    if len(several := _several(text, section.labels)) > 1:
        raise InputError(
            f"{where}: expected one label, found {len(several)} in one cell, {text!r}; write a row for one of them"
        )
    allowed = ", ".join(section.labels)
    raise InputError(
        f"{where}: expected a label out of {allowed}, found {text!r}; correct it or labels:, or write labels: auto"
        f"{', or name the numbers with label_names:' if _number(text) is not None else ''}"
    )


def _several(text: str, labels: Collection[str]) -> list[str]:
    """Return the labels that a cell holds one beside the other, if it holds nothing else."""
    parts = [part.strip() for part in re.split(r"[,;|/+]", text) if part.strip()]
    return parts if all(part in labels for part in parts) else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def instructions(section: InstructionsSource, file: DataFile, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """Yield `{"instruction", "input", "output"}`, with `"task"` and `"split"` where the source has such columns.

    A conversation is `{"messages"}`, with `"tools"` where it has some; a preference pair `{"chosen", "rejected"}`, or
    `{"messages", "rejected"}` where `section` says that the chosen one is used.
    """
    must_have_input = "input" in section.model_fields_set

    def convert(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        if (record := _conversation(section, row, where)) is None:
            names = section.instruction, section.output
            if _is_unstated(section) and row.keys() >= {*COMPLETION} and not row.keys() >= {*names}:
                names = COMPLETION
            record = {"instruction": _filled(row, names[0], "instruction", where), "input": ""}
            if section.input and (must_have_input or section.input in row):
                record["input"] = _value(row, section.input, "input", where)
            record["output"] = _filled(row, names[1], "output", where)
        if section.task:
            record["task"] = _value(row, section.task, "task", where)
        return record | _split(row, section.split, where)

    return _convert(section, file, left_out, convert)


def _conversation(section: InstructionsSource, row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return the record of a conversation or a preference pair; None for a row that is another."""
    if section.messages is None and not _is_unstated(section):
        return None
    if section.messages is None and is_preference(row):
        pair = read_preference(row, where)
        return {"messages" if section.preferences else "chosen": pair.chosen, "rejected": pair.rejected}
    columns = [section.messages] if section.messages else conversation_columns(row)
    columns = [name for name in columns if not (name == "completion" and "prompt" in columns)]
    if len(columns) > 1:
        raise InputError(f"{where}: expected one conversation, found {', '.join(columns)}; name one with messages:")
    if not columns:
        return None
    record: dict[str, Any] = {"messages": read_conversation(row, columns[0], where)}
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise InputError(f"{where}: expected tools as JSON, found {tools[:60]!r}; correct the row") from None
    return record | ({"tools": tools} if tools else {})


# ---- cells -----------------------------------------------------------------------------------------------------------


def _value(row: Mapping[str, Any], column: str, key: str, where: str) -> str:
    """Return a cell as text: numbers and truth values as they are written, what is no number as nothing."""
    is_there, value = cell(row, column)
    if (not is_there or isinstance(value, list | Mapping)) and (shape := describe_shape(row)):
        raise InputError(f"{where}: expected text in {column!r}, found {shape}")
    if not is_there:
        raise InputError(
            f"{where}: expected {column!r}, found only {', '.join(row) or 'nothing'}; name the right one with {key}:"
        )
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if not isinstance(value, str | int | float):
        several = ", of which one may have several" if key == "label" else ""
        raise InputError(
            f"{where}: expected text in {column!r}, found {type(value).__name__}{several}; correct the row"
        )
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
        raise InputError(
            f"{where}: expected text in {column!r}, found none; fill it or remove the row, or write skip_invalid: true"
        )
    return text


def _split(row: Mapping[str, Any], column: str | None, where: str) -> dict[str, str]:
    if column is None:
        return {}
    value = _value(row, column, "split", where)
    split = split_name(value)
    if split is None:
        raise InputError(f"{where}: expected a split, train, validation or test, found {value!r}; correct it")
    return {"split": split}


def _tell_of_split_column(section: Section, file: DataFile, row: Mapping[str, Any]) -> None:
    """Log that a column that looks like splits is not used."""
    if isinstance(section, CorpusSource) or section.split is not None or (file.declared and file.declared.split):
        return
    for name, value in row.items():
        if name.lower() in SPLIT_COLUMNS and isinstance(value, str) and split_name(value):
            log.warning(
                "%s: column %r looks like splits and is not used; to keep them, write split: %s", file, name, name
            )
