"""Fetch the files that a source lists, and let none through unchecked.

A file is a local `path` (glob, folder), a data set of the Hugging Face hub, or a `url`, looked for in this order: a
mirror folder, an earlier download, the URL, its backup. A file that is wrong raises `InputError`. A part of a download
stays on disk, and the next attempt resumes.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from llm.common.errors import InputError
from llm.common.sanitize import error_text
from llm.config import SourceFile
from llm.download.content.archives import DataFile, archive_kind, archive_members, is_workbook, read_head
from llm.download.content.signatures import HTML, HTML_SUFFIXES, check_pointer
from llm.download.fetching.folders import folder_files
from llm.download.fetching.hub_data import hub_files
from llm.download.fetching.remote import SCHEMES, redact
from llm.download.fetching.transfer import transfer

TRACKED = (Path("data/own"), Path("data/sample"))  # DVC notices changes of local files here

log = logging.getLogger("llm")


def downloads_folder(repository: Path) -> Path:
    """Return the folder of earlier downloads."""
    return repository / ".work" / "downloads"


def mirror_folder(repository: Path) -> Path | None:
    """Return the folder that LLM_DATA_MIRROR names: files in it are taken in place of downloads."""
    folder = os.environ.get("LLM_DATA_MIRROR")
    return repository / Path(folder).expanduser() if folder else None


def fetch(file: SourceFile, cache: Path, mirror: Path | None = None, most: int | None = None) -> list[DataFile]:
    """Return the files behind one entry of a source: several for a glob, or for a pattern of zip members.

    With `most`, a download of more bytes raises `TooLargeError`, and of a data set of the hub one file is fetched.
    """
    if file.path is not None:
        return _from_paths(file.path, file)
    if file.hf is not None:
        return _from_hub(file, most)
    urls = [url for url in (file.url, file.backup_url) if url is not None]
    for url in urls:
        if urlsplit(url).scheme not in SCHEMES:
            raise InputError(
                f"{redact(url)}: expected one of {', '.join(s + '://' for s in SCHEMES)}; for a local file use path:"
            )
    for place in _mirrored(urls, mirror):
        try:
            found = check_file(redact(urls[0]), place, file)
            log.info("%s: taken from %s", redact(urls[0]), place)
            return _ask_to_pin(found, file)
        except InputError as error:
            log.warning("%s: not used (%s)", place, error)
    problems = []
    for url in urls:
        try:
            # the same name whichever place it came from: outputs quote it
            return _ask_to_pin([replace(f, name=redact(urls[0])) for f in _download(url, file, cache, most)], file)
        except InputError as error:
            problems.append(str(error))
    raise InputError("; the backup failed too: ".join(problems))


def _from_hub(file: SourceFile, most: int | None) -> list[DataFile]:
    files = hub_files(file, most)
    if file.sha256 is not None and len(files) > 1:
        raise InputError(
            f"hf: {file.hf}: expected one file, as it has a sha256, found {len(files)}; choose with member:"
        )
    return [
        found
        for name, path, sha256 in files
        for found in check_file(name, path, file.model_copy(update={"sha256": file.sha256 or sha256, "member": None}))
    ]


def _from_paths(pattern: str, file: SourceFile) -> list[DataFile]:
    try:
        path = Path(pattern).expanduser()
        there = path.exists()
    except (RuntimeError, OSError) as error:  # no such user's home, a name that is too long
        raise InputError(f"{pattern}: cannot be a path ({error_text(error)}); correct path:") from None
    paths = folder_files(path) if path.is_dir() else [path]
    if not there:
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 Path.glob refuses absolute patterns
        paths = [Path(match) for match in matches if Path(match).is_file()]
    if not paths:
        raise InputError(
            f"{pattern}: expected a file or a pattern of files, found nothing in {Path.cwd()}; correct path:"
        )
    if file.sha256 is not None and len(paths) > 1:
        raise InputError(
            f"{pattern}: expected one file, as it has a sha256, found {len(paths)}; list each with its own"
        )
    tracked = all(any(folder.resolve() in p.resolve().parents for folder in TRACKED) for p in paths)
    if file.sha256 is None and not tracked:
        log.warning(
            "%s: DVC will not notice when it changes; pin its sha256 in params.yaml or move it to data/own", pattern
        )
    return [found for p in paths for found in check_file(p.as_posix(), p, file)]


def _mirrored(urls: list[str], mirror: Path | None) -> list[Path]:
    """Return the mirror's files with the name of a URL's last part, as it stands or decoded (%2B: +)."""
    if mirror is None:
        return []
    if not mirror.is_dir():
        raise InputError(f"LLM_DATA_MIRROR: expected a folder, found nothing at {mirror}; correct or unset it")
    last = [PurePosixPath(urlsplit(url).path).name for url in urls]
    names = dict.fromkeys(form for name in last for form in (name, PurePosixPath(unquote(name)).name) if form)
    return [mirror / name for name in names if (mirror / name).is_file()]


def _download(url: str, file: SourceFile, cache: Path, most: int | None) -> list[DataFile]:
    cache.mkdir(parents=True, exist_ok=True)
    unpinned = cache / hashlib.sha256(url.encode()).hexdigest()
    key = file.sha256 or unpinned.name
    whole, part = cache / key, cache / f"{key}.part"
    with FileLock(cache / f"{key}.lock"):  # experiments of a queue share the cache
        if not whole.exists() and unpinned.exists():  # fetched before its hash was written to params.yaml
            unpinned.replace(whole)
        if whole.exists():
            try:
                found = check_file(redact(url), whole, file)
                log.info("%s: taken from %s, an earlier download; delete that to fetch it again", redact(url), whole)
                return found
            except InputError:
                whole.unlink()
        found = _complete(part, url, file, most)
        part.replace(whole)
        log.info("%s: fetched %s bytes", redact(url), f"{whole.stat().st_size:,}")
        return [replace(f, path=whole) for f in found]


def _complete(part: Path, url: str, file: SourceFile, most: int | None) -> list[DataFile]:
    while True:
        resumed = transfer(url, part, file.sha256 is not None, most)
        try:
            return check_file(redact(url), part, file)
        except InputError:
            part.unlink()
            if not resumed:
                raise
            log.warning("%s: does not continue what had been downloaded before; starting again", redact(url))


def check_file(name: str, path: Path, file: SourceFile) -> list[DataFile]:
    """Check a file that has arrived, and pick the members of an archive; messages call it `name`."""
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{name}: expected data, found an empty file; remove it from the source or fill it")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        start = read_head(stream)
    check_pointer(name, start)
    is_page = PurePosixPath(unquote(name).lower()).suffix in HTML_SUFFIXES or file.format in ("html", "text")
    if HTML.match(start) and digest != file.sha256 and not is_page:
        raise InputError(
            f"{name}: expected data, found an HTML page (an error or login page?); open it in a browser, or, to read "
            "its text, write format: html (format: text keeps the markup)"
        )
    members: list[str | None] = [None]
    if archive_kind(name, path):
        members = [*archive_members(name, path, file.member)]
    elif file.member is not None and not is_workbook(path):
        raise InputError(
            f"{name}: expected a .zip or .tar, as it has member: {file.member}; remove member: or correct the name"
        )
    if members == [file.member] and file.member is not None:
        digest, size = _digest(DataFile(name, path, "", size, file.member).blocks())
    if file.sha256 not in (None, digest):
        what = f"{name}:{file.member}" if file.member else name
        raise InputError(
            f"{what}: expected sha256 {file.sha256}, found {digest}; if the new content is right, pin that one"
        )
    return [DataFile(name, path, digest, size, member, file) for member in members]


def _digest(blocks: Iterable[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _ask_to_pin(found: list[DataFile], file: SourceFile) -> list[DataFile]:
    if file.sha256 is None:
        log.warning("%s: not pinned, so it may change unnoticed; add sha256: %s", found[0].name, found[0].sha256)
    return found
