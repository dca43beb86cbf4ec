"""Fetch data for a look: whole where it is small, else its first bytes; and read its first records."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from llm.common.errors import InputError
from llm.config import SourceFile, explain
from llm.download.content.archives import OPENERS, DataFile, read_head
from llm.download.content.encodings import find_encoding
from llm.download.content.signatures import archive_of, check_binary, compression_of, is_parquet
from llm.download.fetching.fetch import check_file, fetch
from llm.download.fetching.remote import SCHEMES, redact
from llm.download.fetching.transfer import TooLargeError
from llm.download.records.readers import LeftOut, read_records
from llm.download.records.splits import Section

HUB = re.compile(r"hf:(?://)?(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<member>.+))?")
MOST_CHARACTERS = 4_000_000  # of a corpus that are read for a look


class Look(NamedTuple):
    """The files behind one entry of a source, or the first part of one."""

    files: list[DataFile]
    part: str | None = None  # in words, where it is not the whole


class FirstRecords(NamedTuple):
    """The first records of a source as `data/raw/` would have them."""

    records: list[dict[str, Any]]
    left_out: LeftOut
    is_all: bool


def named_entry(name: str, **options: Any) -> SourceFile | None:
    """Return the entry for a URL or a data set of the hub, `hf:OWNER/NAME@REVISION/PATH`; None for another name."""
    if name.startswith("hf:"):
        if (found := HUB.fullmatch(name)) is None:
            raise InputError(f"{name}: expected hf:OWNER/NAME, hf:OWNER/NAME@REVISION or that with /PATH; correct it")
        revision = unquote(found["revision"] or "")
        place = {"hf": f"{found['name']}@{revision}" if revision else found["name"]}
        options = options | ({"member": found["member"]} if found["member"] else {})
    elif urlsplit(name).scheme in SCHEMES and "://" in name:
        place = {"url": name}
    else:
        return None
    try:
        return SourceFile.model_validate(place | options)
    except ValidationError as error:
        raise InputError(explain(error, redact(name))) from None


def look(entry: SourceFile, cache: Path, mirror: Path | None, most: int, scratch: Path) -> Look:
    """Fetch an entry's files, of a download at most the first `most` bytes; a part is kept in the folder `scratch`."""
    try:
        return Look(fetch(entry, cache, mirror, most))
    except TooLargeError as large:
        name = redact(entry.url or "")
        total = f" of {large.total:,} bytes" if large.total else " bytes"
        kept = first_lines(name, large.part, most, scratch / "part")
        unchecked = entry.model_copy(update={"sha256": None})
        return Look(check_file(kept[0], kept[1], unchecked), f"the first {most:,}{total}, as far as whole lines go")


def first_lines(name: str, part: Path, most: int, out: Path) -> tuple[str, Path]:
    """Unpack the beginning of a file as far as whole lines go; return its name without the ending of what packed it.

    Raises `InputError` for a format that is read as a whole.
    """
    with part.open("rb") as packed:
        compression = compression_of(read_head(packed))
        packed.seek(0)
        with out.open("wb") as file:
            if compression:
                name = name.removesuffix(compression)
                with OPENERS[compression](packed) as stream:
                    _copy(stream, file, most)
            else:
                _copy(packed, file, most)
    with out.open("rb") as file:
        head = read_head(file)
    check_binary(name, head)
    by_lines = not (archive_of(head) or is_parquet(head) or head.startswith(b"%PDF") or head.lstrip()[:1] == b"[")
    if not by_lines or find_encoding(head) != "utf-8":
        raise InputError(
            f"{name}: has more than the {most:,} bytes that are fetched for a look, and this format is read as a "
            "whole; raise the limit, or download it and name the file"
        )
    with out.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        if end:
            file.truncate(end)
    return name, out


def _copy(stream: IO[bytes], out: IO[bytes], most: int) -> None:
    """Copy at most so many bytes of a stream that may be cut."""
    while out.tell() < most:
        try:
            block = stream.read(min(1 << 16, most - out.tell()))
        except EOFError:
            return
        if not block:
            return
        out.write(block)


def first_records(section: Section, files: Iterable[DataFile], rows: int) -> FirstRecords:
    """Return at most so many records of a source, and the rows before that cannot be used, with the reasons."""
    records: list[dict[str, Any]] = []
    left_out, seen = LeftOut(skip=True), set[str]()
    characters = 0
    for file in files:
        first = records[-1].get("doc", -1) + 1 if records else 0
        for record in read_records(section, file, first, left_out, seen):
            number = record.get("doc", len(records))
            if section.max_rows is not None and number >= section.max_rows:
                return FirstRecords(records, left_out, True)
            if len(records) == rows or characters >= MOST_CHARACTERS:
                return FirstRecords(records, left_out, False)
            records.append(record)
            characters += len(record["text"]) if "doc" in record else 0
    return FirstRecords(records, left_out, True)
