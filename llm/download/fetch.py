"""Brings the files that a source lists onto this disk, and lets none through unchecked.

A file is a local `path` (or glob), or a `url`, looked for in this order: a mirror folder, an earlier download, the URL
itself, its backup. http and https go through requests, which honours proxies, certificates and .netrc of the
environment; file, s3, gs and hf go through fsspec. What is wrong with a file is one `InputError`; the part of a
download that did arrive stays, so that the next attempt goes on from there.

What arrives is not trusted: a redirect leads to http(s) only and never from https to http, nothing is unpacked to disk,
and an archive is refused that would unpack to much more than it is, or that lists members without end.
A URL may name environment variables, `https://host/a.txt?token=${TOKEN}`: its secret then stands in no file.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import fsspec
import requests
import urllib3
from filelock import FileLock
from tqdm import tqdm

from llm.common.errors import InputError
from llm.common.sanitize import one_line
from llm.config import SourceFile

SCHEMES = ("https", "http", "file", "s3", "gs", "hf")
TRACKED = (Path("data/own"), Path("data/sample"))  # DVC notices changes of local files here
BLOCK = 1 << 20  # bytes read at once
MAX_RATIO = 200  # bytes that a packed one may become; text and tables become 3 to 30
FREE_SIZE = 1 << 26  # unpacked bytes that need no such ratio
MAX_DIRECTORY = 1 << 22  # bytes of a zip archive's table of members, about 50,000 of them
TIMEOUT = (10.0, 30.0)  # seconds to connect, and without a byte from a server
PAUSES = (1.0, 2.0, 4.0)  # seconds before each retry; they start again whenever an attempt brought something new
NETWORK = "check the network and the proxy settings (HTTPS_PROXY), or give a folder with the file in LLM_DATA_MIRROR"
VARIABLE = re.compile(r"\$\{(\w+)\}")  # of the environment, in a URL
HTML = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True)
class DataFile:
    """A checked file on this disk, or one member of a zip archive."""

    name: str  # what messages call it: the path, or the URL without its secrets; decides the format
    path: Path
    sha256: str  # of the member where the source names one, else of the file
    size: int  # bytes of what the sha256 is of
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.member}" if self.member else self.name

    @property
    def packing(self) -> str:
        """`.gz`, `.zst`, `.zip` or nothing."""
        ending = PurePosixPath(unquote(self.name).lower()).suffix
        return ending if ending in (".gz", ".zst", ".zip") else ""

    @property
    def suffix(self) -> str:
        """What it holds once unpacked: `.txt` for `a.txt`, `a.txt.gz` and the member `a.txt`."""
        path = PurePosixPath(unquote(self.member or self.name).lower())
        return path.suffix if self.member or not self.packing else PurePosixPath(path.stem).suffix

    def blocks(self) -> Iterator[bytes]:
        """The unpacked content, a block at a time."""
        size, packed = 0, self.path.stat().st_size if self.packing else None
        with _unpacking(str(self)), self._open() as stream:
            while block := stream.read(BLOCK):
                size += len(block)
                if packed is not None:
                    _check_ratio(str(self), size, packed)
                yield block

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self.member is not None:
            with _zip_archive(self.path) as archive, archive.open(self.member) as stream:
                yield stream
        elif self.packing == ".gz":
            with gzip.open(self.path) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif self.packing == ".zst":
            import pyarrow  # zstandard's own reader takes a truncated file for a whole one

            with pyarrow.input_stream(str(self.path), compression="zstd") as stream:
                yield stream
        else:
            with self.path.open("rb") as plain:
                yield plain


@contextmanager
def _unpacking(name: str) -> Iterator[None]:
    """What the packing libraries raise for a damaged file is one line; what is wrong with the disk stays."""
    try:
        yield
    except InputError:
        raise
    except (
        *(OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error),
        *(RuntimeError, ValueError, LookupError),  # a password, an unknown method, a name without characters
    ) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the start
            raise
        raise InputError(f"{name}: cannot be unpacked ({_line(error)}); fetch or pack it again") from None


def fetch(file: SourceFile, cache: Path, mirror: Path | None = None) -> list[DataFile]:
    """The files behind one entry of a source: several for a glob, or for a pattern of zip members."""
    if file.path is not None:
        return _from_paths(file.path, file)
    urls = [url for url in (file.url, file.backup_url) if url is not None]
    for url in urls:
        if urlsplit(url).scheme not in SCHEMES:
            raise InputError(
                f"{redact(url)}: expected one of {', '.join(s + '://' for s in SCHEMES)}; for a local file use path:"
            )
    for place in _mirrored(urls, mirror):
        try:
            found = _accept(redact(urls[0]), place, file)
            note(f"{redact(urls[0])}: taken from {place}")
            return _ask_to_pin(found, file)
        except InputError as error:
            note(f"{place}: not used ({error})")
    problems = []
    for url in urls:
        try:
            # whichever place it came from, what is written about it must be the same
            return _ask_to_pin([replace(f, name=redact(urls[0])) for f in _download(url, file, cache)], file)
        except InputError as error:
            problems.append(str(error))
    raise InputError("; the backup failed too: ".join(problems))


def redact(url: str) -> str:
    """The URL without user, password, query and fragment: any of them may hold a secret."""
    scheme, netloc, path, *_ = urlsplit(url)
    return urlunsplit((scheme, netloc.rpartition("@")[2], path, "", ""))


def note(message: str) -> None:
    tqdm.write(one_line(message), file=sys.stderr)


# ---- local files and mirrors -----------------------------------------------------------------------------------------


def _from_paths(pattern: str, file: SourceFile) -> list[DataFile]:
    try:
        path = Path(pattern).expanduser()
        there = path.exists()
    except (RuntimeError, OSError) as error:  # no such user's home, a name that is too long
        raise InputError(f"{pattern}: cannot be a path ({_line(error)}); correct path:") from None
    if path.is_dir():
        raise InputError(
            f"{pattern}: expected a file, found a folder; write {pattern.rstrip('/')}/*.txt for its text files"
        )
    paths = [path]
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
        note(f"{pattern}: DVC will not notice when it changes; pin its sha256 in params.yaml or move it to data/own")
    return [found for p in paths for found in _accept(p.as_posix(), p, file)]


def _mirrored(urls: list[str], mirror: Path | None) -> list[Path]:
    """Files of the mirror that are called like the last part of a URL, as it stands or decoded (%2B: +)."""
    if mirror is None:
        return []
    if not mirror.is_dir():
        raise InputError(f"LLM_DATA_MIRROR: expected a folder, found nothing at {mirror}; correct or unset it")
    last = [PurePosixPath(urlsplit(url).path).name for url in urls]
    names = dict.fromkeys(form for name in last for form in (name, PurePosixPath(unquote(name)).name) if form)
    return [mirror / name for name in names if (mirror / name).is_file()]


# ---- checks ----------------------------------------------------------------------------------------------------------


def _accept(name: str, path: Path, file: SourceFile) -> list[DataFile]:
    """Checks a file that has arrived, and picks the members of an archive; `name` is what messages call it."""
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{name}: expected data, found an empty file; remove it from the source or fill it")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        start = stream.read(2048)
    if HTML.match(start) and digest != file.sha256:
        raise InputError(f"{name}: expected data, found an HTML page (an error or login page?); open it in a browser")
    members: list[str | None] = [None]
    if unquote(name).lower().endswith(".zip"):
        members = [*_members(name, path, file.member)]
    elif file.member is not None:
        raise InputError(
            f"{name}: expected a .zip, as it has member: {file.member}; remove member: or correct the name"
        )
    if members == [file.member] and file.member is not None:
        digest, size = _digest(DataFile(name, path, "", size, file.member).blocks())
    if file.sha256 not in (None, digest):
        what = f"{name}:{file.member}" if file.member else name
        raise InputError(
            f"{what}: expected sha256 {file.sha256}, found {digest}; if the new content is right, pin that one"
        )
    return [DataFile(name, path, digest, size, member) for member in members]


def _members(name: str, path: Path, wanted: str | None) -> list[str]:
    """The members to read: the one named, those that a pattern names, or the only one."""
    with _unpacking(name), _zip_archive(path) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.filename.endswith("/")}
    names = sorted(infos)
    for member in names:
        parts = PureWindowsPath(member)  # knows both slashes, roots and drives
        if parts.drive or parts.root or ".." in parts.parts:
            raise InputError(f"{name}: member {member!r} leads out of the archive; do not trust this file")
    names = [member for member in names if not member.startswith("__MACOSX/")]
    found = f"found {len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    if wanted is None:
        if len(names) != 1:
            raise InputError(
                f"{name}: expected one member, {found}; say which with member:, a name or a pattern as *.txt"
            )
        chosen = names
    else:
        chosen = [wanted] if wanted in names else fnmatch.filter(names, wanted)
    if not chosen:
        raise InputError(f"{name}: expected a member {wanted!r}, {found}; correct member:")
    for member in chosen:
        if stat.S_ISLNK(infos[member].external_attr >> 16):
            raise InputError(f"{name}: member {member!r} is a link, and links are not followed; pack the file itself")
    _check_ratio(name, sum(infos[member].file_size for member in chosen), path.stat().st_size)
    return chosen


class _ZipReader(io.BufferedReader):
    """A file for `zipfile`, which reads a table of members at once, however long an archive says that it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of members has {size:,} bytes, {MAX_DIRECTORY:,} are read")
        return super().read(size)


@contextmanager
def _zip_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with _ZipReader(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _check_ratio(name: str, size: int, packed: int) -> None:
    """Raises `InputError` for what would fill the disk."""
    if size > max(FREE_SIZE, MAX_RATIO * packed):
        raise InputError(
            f"{name}: unpacks to more than {MAX_RATIO} times its {packed:,} bytes, as if made to fill a disk; "
            "if you trust it, unpack it yourself"
        )


def _digest(blocks: Iterable[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for block in blocks:
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _ask_to_pin(found: list[DataFile], file: SourceFile) -> list[DataFile]:
    if file.sha256 is None:
        note(f"{found[0].name}: not pinned, so it may change unnoticed; add sha256: {found[0].sha256}")
    return found


# ---- downloads -------------------------------------------------------------------------------------------------------


class _TransientError(Exception):
    """An error that may be gone on the next attempt."""


class _Body(NamedTuple):
    """An answer under way."""

    blocks: Iterator[bytes]
    start: int  # position of its first byte in the file
    total: int | None  # size of the whole file
    version: str  # names this content: a later answer with the same one continues it


def _download(url: str, file: SourceFile, cache: Path) -> list[DataFile]:
    cache.mkdir(parents=True, exist_ok=True)
    key = file.sha256 or hashlib.sha256(url.encode()).hexdigest()
    whole, part = cache / key, cache / f"{key}.part"
    with FileLock(cache / f"{key}.lock"):  # experiments of a queue share the cache
        if whole.exists():
            try:
                found = _accept(redact(url), whole, file)
                note(f"{redact(url)}: taken from {whole}, an earlier download; delete that to fetch it again")
                return found
            except InputError:
                whole.unlink()
        found = _complete(part, url, file)
        part.replace(whole)
        note(f"{redact(url)}: fetched {whole.stat().st_size:,} bytes")
        return [replace(f, path=whole) for f in found]


def _complete(part: Path, url: str, file: SourceFile) -> list[DataFile]:
    while True:
        resumed = _fill(part, url, file.sha256 is not None)
        try:
            return _accept(redact(url), part, file)
        except InputError:
            part.unlink()
            if not resumed:
                raise
            note(f"{redact(url)}: does not continue what had been downloaded before; starting again")


def _fill(part: Path, url: str, pinned: bool) -> bool:
    """Downloads until `part` is whole; True if it continued what had been there before this call.

    That is only done if the server says that the content is the same still, or if a sha256 will tell.
    """
    version_file = part.with_suffix(".version")
    resumed, best, attempt = None, 0, 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        version = version_file.read_text(encoding="utf-8") if start and version_file.exists() else ""
        try:
            with _open(url, start if version or pinned else 0, version) as body:
                resumed = body.start > 0 if resumed is None else resumed
                version_file.write_text(body.version, encoding="utf-8")
                _write(part, body, redact(url))
            version_file.unlink()
            return resumed
        except _TransientError as error:
            arrived = part.stat().st_size if part.exists() else 0
            if arrived > best:
                best, attempt = arrived, 0
            if attempt == len(PAUSES):
                raise InputError(f"{redact(url)}: {error}, also after {attempt} retries; {NETWORK}") from None
            note(f"{redact(url)}: {error}; next attempt in {PAUSES[attempt]:g} s")
            time.sleep(PAUSES[attempt])
            attempt += 1


def _write(part: Path, body: _Body, name: str) -> None:
    with (
        part.open("ab" if body.start else "wb") as out,
        tqdm(
            desc=PurePosixPath(name).name,
            total=body.total,
            initial=body.start,
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar,
    ):
        try:
            for block in body.blocks:
                out.write(block)
                bar.update(len(block))
        finally:
            out.flush()
            os.fsync(out.fileno())
        if body.total is not None and out.tell() != body.total:
            raise _TransientError(f"ended after {out.tell():,} of {body.total:,} bytes")


@contextmanager
def _open(url: str, start: int, version: str) -> Iterator[_Body]:
    """Asks for the bytes from `start` on; where the answer starts, its `start` says."""
    opener = _open_http if urlsplit(url).scheme in ("http", "https") else _open_fsspec
    with opener(url, start, version) as body:
        yield body


@contextmanager
def _open_http(url: str, start: int, version: str) -> Iterator[_Body]:
    headers = {"Accept-Encoding": "identity"}  # packed in transfer, neither Range nor the length would fit the file
    if start:
        headers["Range"] = f"bytes={start}-"
        headers |= {"If-Range": version} if version else {}
    with _http_errors(url):
        response = requests.get(
            _with_variables(url), headers=headers, stream=True, timeout=TIMEOUT, hooks={"response": _check_redirect}
        )
    with response:
        status = f"HTTP status {response.status_code} {response.reason or ''}".strip()
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise _TransientError(status)
        if response.status_code == 416:  # what lies there is longer than the file
            with _open_http(url, 0, "") as body:
                yield body
            return
        if response.status_code not in (200, 206):
            raise InputError(f"{redact(url)}: expected the file, found {status}; correct the URL or your access to it")
        first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status_code == 206 and (first is None or int(first[1]) != start):
            raise InputError(
                f"{redact(url)}: the server answered with another part than it was asked for; try a backup_url"
            )
        begin = start if response.status_code == 206 else 0
        length = response.headers.get("Content-Length", "")
        etag = response.headers.get("ETag", "")
        tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        yield _Body(_http_blocks(response, url), begin, begin + int(length) if length.isdigit() else None, tag)


def _with_variables(url: str) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise InputError(f"{redact(url)}: the environment variable {found[1]} is not set; its URL needs it")
        return quote(os.environ[found[1]], safe="")

    return VARIABLE.sub(value, url)


def _check_redirect(response: requests.Response, *args: Any, **kwargs: Any) -> None:
    """Called by requests before it follows a redirect."""
    if not response.is_redirect:
        return
    there = urljoin(response.url, response.headers["Location"])
    schemes = ("https",) if urlsplit(response.url).scheme == "https" else ("https", "http")
    if urlsplit(there).scheme not in schemes:
        raise InputError(
            f"{redact(response.url)}: redirects to {redact(there)}, expected {' or '.join(schemes)}; give the right URL"
        )


def _http_blocks(response: requests.Response, url: str) -> Iterator[bytes]:
    with _http_errors(url):
        yield from response.raw.stream(BLOCK, decode_content=False)


@contextmanager
def _http_errors(url: str) -> Iterator[None]:
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise InputError(
            f"{redact(url)}: {_cause(error)}; set REQUESTS_CA_BUNDLE to your network's certificates"
        ) from None
    except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
        raise _TransientError(_cause(error)) from None
    except requests.RequestException as error:
        raise InputError(f"{redact(url)}: {type(error).__name__}; correct the URL") from None


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _cause(error: BaseException) -> str:
    """The innermost reason. Outer messages repeat the URL, and with it its secrets."""
    error = _innermost(error)
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return f"connection failed ({error.strerror or _line(error)})"
    return f"connection failed ({type(error).__name__})"


@contextmanager
def _open_fsspec(url: str, start: int, version: str) -> Iterator[_Body]:
    with _fsspec_errors(url):
        filesystem: Any = fsspec.filesystem(urlsplit(url).scheme)
        total, found = filesystem.info(url)["size"], str(filesystem.ukey(url))
        stream = filesystem.open(url, "rb")
    with stream:
        begin = start if found == version else 0
        stream.seek(begin)
        yield _Body(_fsspec_blocks(stream, url), begin, total, found)


def _fsspec_blocks(stream: IO[bytes], url: str) -> Iterator[bytes]:
    while True:
        with _fsspec_errors(url):
            block = stream.read(BLOCK)
        if not block:
            return
        yield block


@contextmanager
def _fsspec_errors(url: str) -> Iterator[None]:
    """Backends raise what they like: only what looks like the network is worth another attempt."""
    try:
        yield
    except ImportError as error:
        install = f"pip install -e '.[{urlsplit(url).scheme}]'"
        raise InputError(f"{redact(url)}: needs another package ({_line(error)}); {install}") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(
            f"{redact(url)}: expected a file, found {error.strerror or type(error).__name__}; correct url:"
        ) from None
    except OSError as error:
        raise _TransientError(error.strerror or type(error).__name__) from None
    except Exception as error:
        if isinstance(_innermost(error), OSError):
            raise _TransientError(_cause(error)) from None
        raise InputError(f"{redact(url)}: {type(error).__name__}: {_line(error).replace(url, redact(url))}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
