"""Look at a file of which nothing is known: its form, the source that would read it, and its first records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.config import AUTO, CorpusSource, InstructionsSource, MessagesSource, SourceFile, split_name
from llm.download.content.archives import DataFile
from llm.download.content.detect import find_format, read_rows
from llm.download.content.encodings import find_encoding, guess
from llm.download.content.extract import document_kind
from llm.download.content.formats import Wanted
from llm.download.content.nested import cell, records_of
from llm.download.content.signatures import DOCUMENTS
from llm.download.content.tables import SEPARATOR_LINE, SEPARATORS, describe, parse_rows, sample_lines
from llm.download.fetching.fetch import check_file
from llm.download.records.conversations import conversation_columns, is_preference
from llm.download.records.readers import SPLIT_COLUMNS, LeftOut, read_records
from llm.download.records.shapes import describe_shape
from llm.download.records.splits import Section, named_split

ROWS = 10_000  # that are looked at
PAIRS = [  # columns of an instruction and its output
    *(("instruction", other) for other in ("output", "response", "answer", "completion")),
    *(("prompt", other) for other in ("completion", "response", "output", "answer", "chosen")),
    *(("question", other) for other in ("answer", "response")),
    *(("query", "response"), ("input", "output"), ("problem", "solution"), ("source", "target")),
]
INPUTS = ("input", "context")
TASKS = ("task", "category", "type")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "kind", "is_spam", "spam", "topic")
TEXTS = ("text", "message", "body", "content", "sentence", "review", "comment", "tweet", "sms", "email", "utterance")
PROSE = ("text", "content", "story", "document", "article", "body", "code", "markdown", "abstract", "passage")
MOST_LABELS, LONGEST_LABEL = 20, 40
SHORTEST_TEXT = 25  # mean characters of a column that is text by its content


class Inspection(NamedTuple):
    """A file, as far as it is understood."""

    form: str  # in words
    kind: str  # of data
    section: Section  # reads it
    options: dict[str, Any]  # of the section, without its files
    records: list[dict[str, Any]]  # the first
    notes: list[str]


def inspect_file(path: str, member: str | None = None, fmt: str | None = None) -> Inspection:
    """Return the form of a file and the source that reads it; raise `InputError` where none does."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise InputError(f"{path}: expected a file, found {'a folder' if place.is_dir() else 'nothing'}; correct it")
    entry = SourceFile(path=path, member=member, format=fmt)  # type: ignore[arg-type]  # argparse has checked it
    with _not_known(path):
        found = check_file(path, place, entry)
    return inspect_data(found[0], entry)


def inspect_data(file: DataFile, entry: SourceFile) -> Inspection:
    """Return the form of a checked file and the source that reads it; raise `InputError` where none does."""
    with _not_known(file.name):
        return _inspect(file, entry)


@contextmanager
def _not_known(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: not known: {str(error).removeprefix(f'{name}: ')}") from None


def read_file(path: str) -> Iterator[dict[str, Any]]:
    """Yield all records of a file, read as `inspect_file` proposes."""
    section = inspect_file(path).section
    [file, *_] = check_file(path, Path(path).expanduser(), section.files[0])
    yield from read_records(section, file, 0, LeftOut(), set())


def _inspect(file: DataFile, entry: SourceFile) -> Inspection:
    file_entry = entry
    document = document_kind(file, file.head(), entry.format)
    entry, encoding = (entry, "") if document else _with_encoding(file, entry)
    notes = [] if not entry.encoding else [f"the encoding is a guess: {entry.encoding}"]
    if entry.hf is None and (split := named_split(file)):
        notes.append(f"its name says {split}: list the files under train:, validation: and test:, or split: from_name")
    options: dict[str, Any] = {"encoding": entry.encoding} if entry.encoding else {}
    options |= {"format": entry.format} if entry.format else {}
    rows, form, layout = _sample(file, entry)
    if rows is None:
        section: Section = CorpusSource(files=[file_entry], **options)
        records = list(islice(read_records(section, file, 0, LeftOut(), set()), 3))
        return _finish(Inspection(f"{form}{encoding}", "corpus", section, options, records, notes))
    if rows and (inner := records_of(rows[0])) and (len(rows) == 1 or ("[]" in inner and not _propose(rows))):
        entry = entry.model_copy(update={"records": inner})
        options["records"] = inner
        rows, form, layout = _sample(file, entry)
    if not rows:
        raise InputError("expected rows, found none")
    proposal = _propose(rows)
    if not proposal and (shape := describe_shape(rows[0])):
        raise InputError(f"found {shape}")
    if proposal is None:
        raise InputError(f"{form}, of which no column looks like a text; state one in params.yaml if there is one")
    kind, mapping = proposal
    if kind != "corpus" and (split := _split_column(rows)):
        mapping["split"] = split
    options |= layout | mapping
    section = _section(kind, file_entry, options)
    records = list(islice(read_records(section, file, 0, LeftOut(skip=section.skip_invalid), set()), 3))
    return _finish(Inspection(f"{form}{encoding}", kind, section, options, records, notes))


def _finish(found: Inspection) -> Inspection:
    if not found.records:
        raise InputError("expected text, found none")
    return found


def _section(kind: str, entry: SourceFile, options: Mapping[str, Any]) -> Section:
    if kind == "corpus":
        return CorpusSource(files=[entry], **options)
    if kind == "messages":
        return MessagesSource(files=[entry], **options)
    return InstructionsSource(files=[entry], **options)


def _with_encoding(file: DataFile, entry: SourceFile) -> tuple[SourceFile, str]:
    """Return the entry with the encoding that a sure guess names, and the encoding in words after a comma."""
    head = file.head()
    found = find_encoding(head)
    if found != "utf-8":
        return entry, f", {found.upper()}"
    try:
        head[: len(head) - 4].decode()
    except UnicodeDecodeError:
        guessed = guess(b"\n".join(line for line in head.splitlines() if not line.isascii())[: 1 << 14])
        if guessed is not None:
            return entry.model_copy(update={"encoding": guessed[0]}), f", {guessed[0]}"
    return entry, ", UTF-8"


# ---- rows ------------------------------------------------------------------------------------------------------------


def _sample(file: DataFile, entry: SourceFile) -> tuple[list[Mapping[str, Any]] | None, str, dict[str, Any]]:
    """Return the first rows or None for text, the form in words, and options that must be stated."""
    layout: dict[str, Any] = {}
    try:
        found = find_format(file, Wanted({}), entry)
    except InputError:
        found = find_format(file, Wanted({"\0": "text"}, may_be_text=True), entry)
    if found == "text" or found in DOCUMENTS.keys() - {"xlsx"}:
        return None, DOCUMENTS.get(found, "text"), {}
    if found in ("csv", "tsv"):
        table = _table(file, entry)
        if table is None:
            return None, "text", {}
        separator, names = table
        layout = {"header": names, "separator": separator} if names else {"separator": separator}
        entry = entry.model_copy(update=layout)
    rows = list(islice(_rows(file, found, entry), ROWS))
    names_found = list(rows[0]) if rows else []
    form = {"jsonl": "JSON Lines", "json": "JSON", "parquet": "parquet", "xlsx": "an Excel sheet"}.get(found, "a table")
    columns = f" with {len(names_found)} columns ({', '.join(map(str, names_found[:20]))})"
    if found in ("csv", "tsv"):
        columns += f" separated by {describe(layout['separator'])}{'' if 'header' in layout else ', with a header'}"
        if "header" not in layout:
            del layout["separator"]  # found out from the header
    return rows, f"{form}{columns}", layout


def _rows(file: DataFile, found: str, entry: SourceFile) -> Iterator[Mapping[str, Any]]:
    for _, row in read_rows(file, found, Wanted({}), entry):
        if isinstance(row, InputError):
            raise row
        yield row


def _table(file: DataFile, entry: SourceFile) -> tuple[str, list[str] | None] | None:
    """Return the separator of a table, and names for its columns where it has no header; None for no table."""
    lines = [line for line in sample_lines(file, entry) if line.strip()]
    if lines and SEPARATOR_LINE.fullmatch(lines[0]):
        lines = lines[1:]
    best: tuple[str, list[list[str]]] | None = None
    for separator in ("\t", *SEPARATORS):
        for rows in (parse_rows(lines, separator), [line.split(separator) for line in lines]):
            rows = rows[:-1] if len(rows) > 20 else rows  # the last one may be cut
            even = len({len(row) for row in rows}) == 1 and len(rows) > 1 and len(rows[0]) > 1
            if even and (best is None or len(rows[0]) > len(best[1][0])):
                best = separator, rows
    if best is None:
        return None
    separator, rows = best
    return separator, None if _has_header(rows) else _names(rows)


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    first = [cell.strip() for cell in rows[0]]
    below = [{row[i].strip() for row in rows[1:]} for i in range(len(first))]
    named = all(cell and len(cell) <= 40 and not _is_number(cell) for cell in first)
    return named and len(set(first)) == len(first) and not any(c in b for c, b in zip(first, below, strict=True))


def _names(rows: Sequence[Sequence[str]]) -> list[str]:
    names = [f"column{i}" for i in range(1, len(rows[0]) + 1)]
    table = [dict(zip(names, row, strict=True)) for row in rows]
    label = _label_column(table)
    text = _longest(table, but=label)
    return [{label: "label", text: "text"}.get(name, name) if name else name for name in names]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# ---- columns ---------------------------------------------------------------------------------------------------------


def _propose(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """Return the kind of data and the names of its columns, or None."""
    if proposal := _propose_conversation(rows):
        return proposal
    names = {str(name).lower(): str(name) for name in rows[0]}
    is_text = {name for name in rows[0] if _share_of_text(rows, name) > 0.5}

    def text_among(wanted: Sequence[str]) -> str | None:
        return next((names[name] for name in wanted if names.get(name) in is_text), None)

    for instruction, output in PAIRS:
        if {names.get(instruction), names.get(output)} <= is_text:
            mapping: dict[str, Any] = {"instruction": names[instruction], "output": names[output]}
            rest = [name for name in INPUTS if name != instruction]
            if (extra := text_among(rest)) and extra != "input":
                mapping["input"] = extra
            if task := text_among(TASKS):
                mapping["task"] = task
            return "instructions", {key: name for key, name in mapping.items() if key == "task" or key != name}
    label = next((names[name] for name in LABELS if name in names and _is_label(rows, names[name])), None)
    label = label or _label_column(rows)
    text = text_among([name for name in TEXTS if names.get(name) != label]) or _longest(rows, but=label)
    if label and text and text != label:
        labels = sorted({str(row.get(label)).strip() for row in rows} - {"", "None"})
        columns = {"text": text, "label": label}
        renamed = {key: name for key, name in columns.items() if key != name}
        return "messages", {"labels": labels if len(rows) < ROWS and len(labels) > 1 else AUTO, **renamed}
    document = text_among(PROSE) or _longest(rows, but=None)
    if document is None:
        return None
    return "corpus", {"text": document} if document != "text" else {}


def _propose_conversation(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """Return the mapping of conversations, preference pairs and questions on passages, or None."""
    mapping: dict[str, Any] = {}
    if is_preference(rows[0]):
        mapping["preferences"] = "chosen"
    elif columns := [name for name in conversation_columns(rows[0]) if name != "completion"]:
        if len(columns) > 1:
            mapping["messages"] = columns[0]
    elif {"question", "context", "answers"} <= rows[0].keys():
        path = "answers[0].text" if isinstance(rows[0]["answers"], list) else "answers.text[0]"
        mapping = {"instruction": "question", "input": "context", "output": path}
        if not all(cell(row, path)[1] for row in rows):
            mapping["skip_invalid"] = True
    elif not {"prompt", "completion"} <= rows[0].keys() or _share_of_text(rows, "prompt") <= 0.5:
        return None
    if task := next((name for name in TASKS if name in rows[0] and _share_of_text(rows, name) > 0.5), None):
        mapping["task"] = task
    return "instructions", mapping


def _split_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column that says train, validation or test in every row, or None."""
    names = [name for name in rows[0] if str(name).lower() in SPLIT_COLUMNS]
    return next((name for name in names if all(split_name(str(row.get(name))) for row in rows)), None)


def _share_of_text(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(isinstance(row.get(name), str) and not _is_number(row[name]) for row in rows) / len(rows)


def _is_label(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    if not all(value is None or isinstance(value, str | int | float) for value in values):
        return False
    different = {str(value) for value in values if value is not None}
    return 0 < len(different) <= 200 and max(map(len, different)) <= LONGEST_LABEL


def _label_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column with few short values that repeat, or None."""
    for name in rows[0]:
        different = {str(row.get(name)).strip() for row in rows}
        few = 2 <= len(different) <= min(MOST_LABELS, len(rows) * 2 // 3)
        if few and _is_label(rows, name) and _share_of_text(rows, name) > 0.5:
            return name
    return None


def _longest(rows: Sequence[Mapping[str, Any]], but: str | None) -> str | None:
    """Return the column with the longest texts, if they are long enough for texts."""
    means = {
        name: sum(len(str(row.get(name) or "")) for row in rows) / len(rows)
        for name in rows[0]
        if name != but and _share_of_text(rows, name) > 0.5
    }
    longest = max(means, key=lambda name: means[name], default=None)
    return longest if longest is not None and (but or means[longest] >= SHORTEST_TEXT) else None


# ---- params.yaml -----------------------------------------------------------------------------------------------------


def params_lines(found: Inspection, name: str = "mine") -> str:
    """Return the lines for params.yaml that read the file as what it was found to be."""
    file = found.section.files[0]
    licence = "private" if file.path else "not stated"
    lines = ["data:", f"  {found.kind}: {name}", "sources:", f"  {name}:", f"    licence: {licence}"]
    lines.append(f"    {found.kind}:")
    lines += [f"      {key}: {_yaml(value)}" for key, value in found.options.items()]
    place = next(key for key in ("path", "url", "hf") if getattr(file, key) is not None)
    lines += ["      files:", f"      - {place}: {_yaml(getattr(file, place))}"]
    more = {key: getattr(file, key) for key in ("member", "sha256", "split")}
    lines += [f"        {key}: {_yaml(value)}" for key, value in more.items() if value is not None]
    return "\n".join(lines)


def pinned_entry(found: Inspection, file: DataFile, is_whole: bool) -> SourceFile:
    """Return the entry of an inspected file with its hash or revision, and the split that its name says."""
    entry = found.section.files[0]
    if entry.hf is not None and (commit := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", file.name)):
        split = "from_name" if found.kind != "corpus" else named_split(file)
        update = {"split": split} if entry.split is None and named_split(file) else {}
        return entry.model_copy(update={"hf": f"{entry.hf.partition('@')[0]}@{commit[1]}"} | update)
    return entry.model_copy(update={"sha256": file.sha256}) if entry.url is not None and is_whole else entry


def _yaml(value: Any) -> str:
    """Return a value of params.yaml on one line: JSON is YAML."""
    return "auto" if value == AUTO else json.dumps(value, ensure_ascii=False)
