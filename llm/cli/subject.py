"""Find the data that `inspect` is asked about: a file, a source of params.yaml, a data set of the hub, or a URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llm.common.errors import InputError
from llm.config import KINDS, Params, SourceFile, parse_params
from llm.download.content.archives import DataFile
from llm.download.fetching.fetch import check_file, downloads_folder, mirror_folder
from llm.download.inspection import Inspection, inspect_data, inspect_file, params_lines, pinned_entry
from llm.download.look import FirstRecords, first_records, look, named_entry
from llm.download.records.splits import Section


class Subject(NamedTuple):
    """Data of one kind, read so far, with what there is to say about it."""

    about: list[str]
    kind: str
    section: Section
    first: FirstRecords
    is_all: bool  # no record is left
    params_lines: str


class Request(NamedTuple):
    """The name and the options of the command."""

    name: str
    member: str | None
    format: str | None
    rows: int
    most: int  # bytes of a download


def find_params() -> tuple[Path, Params]:
    """Return the `params.yaml` of the working directory, or else of this clone."""
    import yaml

    places = (Path("params.yaml"), Path(__file__).resolve().parents[2] / "params.yaml")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(f"params.yaml: not found in {Path.cwd()}; run from the repository's root")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys with values, found {type(values).__name__}")
    return path, parse_params(values, str(path))


def find_subjects(request: Request, params: Params | None, scratch: Path) -> Iterator[Subject]:
    """Yield the data behind a name: a source may have several kinds. `scratch` is a folder for parts of downloads."""
    if not Path(request.name).expanduser().is_file():
        entry = named_entry(request.name, member=request.member, format=request.format)
        if entry is not None:
            yield _download(request, entry, scratch)
            return
        if params is not None and request.name in params.sources:
            yield from _source(request, params, scratch)
            return
        if not Path(request.name).expanduser().exists():
            known = "" if params is None else f" one of the sources {', '.join(params.sources)},"
            raise InputError(
                f"{request.name}: no such file and no such source (expected a file,{known} hf:OWNER/NAME or a URL); "
                "correct it"
            )
    found = inspect_file(request.name, request.member, request.format)
    [file, *_] = check_file(request.name, Path(request.name).expanduser(), found.section.files[0])
    yield _inspected(request, found, file, None)


def _download(request: Request, entry: SourceFile, scratch: Path) -> Subject:
    seen = look(entry, downloads(), mirror(), request.most, scratch)
    file = seen.files[0]
    found = inspect_data(file, entry)
    pinned = pinned_entry(found, file, seen.part is None)
    found = found._replace(section=found.section.model_copy(update={"files": [pinned]}))
    return _inspected(request, found, file, seen.part)


def _inspected(request: Request, found: Inspection, file: DataFile, part: str | None) -> Subject:
    about = [f"looks like: {found.form}", f"read as:    {found.kind}"]
    about += [f"fetched:    {part}; its hash is not known before all is fetched"] if part else []
    about += [f"note:       {note}" for note in found.notes]
    first = first_records(found.section, [file], request.rows)
    return Subject(about, found.kind, found.section, first, first.is_all and part is None, params_lines(found))


def _source(request: Request, params: Params, scratch: Path) -> Iterator[Subject]:
    """Yield each kind of data of a source, fetched file by file as far as it is read."""
    source = params.sources[request.name]
    for kind in KINDS:
        section: Section | None = getattr(source, kind)
        if section is None:
            continue
        about = [f"source:     {request.name}, {kind} (licence: {source.licence})"]
        parts: list[str] = []

        def files(section: Section = section, about: list[str] = about, parts: list[str] = parts) -> Iterator[DataFile]:
            for entry in section.files:
                seen = look(section.entry(entry), downloads(), mirror(), request.most, scratch)
                if seen.part is not None:
                    parts.append(f"{seen.files[0]}: {seen.part}")
                if entry.hf is not None:
                    parts.append(f"{seen.files[0]}: one file of the data set")
                about.extend(f"file:       {file}" for file in seen.files)
                yield from seen.files

        first = first_records(section, files(), request.rows)
        about += [f"note:       {part}" for part in parts]
        lines = f"data:\n  {kind}: {request.name}"
        yield Subject(about, kind, section, first, first.is_all and not parts, lines)


def downloads() -> Path:
    """Return the folder of the download stage, which finds there what was fetched for a look."""
    return downloads_folder(_repository())


def mirror() -> Path | None:
    return mirror_folder(_repository())


def _repository() -> Path:
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())
