"""Read checked files: plain, compressed, or one member of an archive, told by content before name.

Nothing stays unpacked on disk. An archive is refused that unpacks to much more than its size, or that lists members
without end.
"""

from __future__ import annotations

import bz2
import errno
import fnmatch
import gzip
import io
import lzma
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

from backports import zstd

from llm.common.errors import InputError
from llm.common.sanitize import error_text
from llm.config import SourceFile
from llm.download.content.signatures import HEAD, OFFICE, OFFICE_DOCUMENTS, archive_of, compression_of

BLOCK = 1 << 20  # bytes read at once
MAX_RATIO = 200  # unpacked bytes for each packed one; text and tables have 3 to 30
FREE_SIZE = 1 << 26  # unpacked bytes that are exempt from MAX_RATIO
MAX_DIRECTORY = 1 << 22  # bytes of a zip archive's table of members, about 50,000 of them
MAX_MEMBERS = 50_000  # of a tar archive
OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {  # of compressed streams, by the ending of their files
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda stream: zstd.open(stream, options={zstd.DecompressionParameter.window_log_max: 31}),  # --long=31
}
PACKED_TARS = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}


@dataclass(frozen=True)
class DataFile:
    """A checked file on this disk, or one member of an archive."""

    name: str  # for messages: the path, or the URL without its secrets; its ending tells the format
    path: Path
    sha256: str  # of the member where the source names one, else of the file
    size: int  # bytes that the sha256 covers
    member: str | None = None
    declared: SourceFile | None = None  # the entry of the source that named it

    def __str__(self) -> str:
        return f"{self.name}:{self.member}" if self.member else self.name

    @property
    def suffix(self) -> str:
        """Return the suffix of the unpacked content: `.txt` for `a.txt`, `a.txt.gz` and the member `a.txt`."""
        path = PurePosixPath(unquote(self.member or self.name).lower())
        packed = path.suffix in OPENERS or (path.suffix == ".zip" and not self.member)
        return PurePosixPath(path.stem).suffix if packed else path.suffix

    @property
    def is_plain(self) -> bool:
        """Return whether `path` holds the content itself."""
        with self.path.open("rb") as stream:
            return self.member is None and not compression_of(read_head(stream))

    def blocks(self) -> Iterator[bytes]:
        """Yield the unpacked content, a block at a time."""
        size, packed = 0, self.path.stat().st_size
        with _unpack_errors(str(self)), self._open() as stream:
            while block := stream.read(BLOCK):
                size += len(block)
                if size > packed:  # so it was packed
                    check_ratio(str(self), size, packed)
                yield block

    def head(self) -> bytes:
        """Return the first bytes of the unpacked content."""
        with _unpack_errors(str(self)), self._open() as stream:
            return read_head(stream)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self.member is None:
            with self.path.open("rb") as file, _decompressed(file, self.name) as content:
                yield content
        else:
            with _open_member(self.name, self.path, self.member) as stream:
                compression = compression_of(read_head(stream))
            with _open_member(self.name, self.path, self.member) as stream:
                if not compression:
                    yield stream
                else:
                    with OPENERS[compression](stream) as content:
                        yield content


@contextmanager
def seekable(file: DataFile) -> Iterator[IO[bytes]]:
    """Open the unpacked content as a file on this disk, for formats that are read from their end."""
    if file.is_plain:
        with file.path.open("rb") as stream:
            yield stream
        return
    with tempfile.NamedTemporaryFile() as unpacked:  # mammoth wants a name
        for block in file.blocks():
            unpacked.write(block)
        unpacked.seek(0)
        yield unpacked


def read_head(stream: IO[bytes]) -> bytes:
    """Return the first bytes of a stream, which may give fewer at a time than it is asked for."""
    head = b""
    while len(head) < HEAD and (block := stream.read(HEAD - len(head))):
        head += block
    return head


@contextmanager
def _decompressed(stream: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """Yield the content of a file that may be compressed, whether its name says so or not."""
    head = read_head(stream)
    stream.seek(0)
    if compression := compression_of(head):
        with OPENERS[compression](stream) as content:
            yield content
        return
    ending = PurePosixPath(unquote(name).lower()).suffix
    if PACKED_TARS.get(ending, ending) in OPENERS:
        raise ValueError(f"its content is not that of a {ending} file")
    yield stream


# ---- archives --------------------------------------------------------------------------------------------------------


def archive_kind(name: str, path: Path) -> str:
    """Return `.zip`, `.tar` or nothing, by content or by a name that promises an archive; documents are none."""
    endings = PurePosixPath(unquote(name).lower()).suffixes[-2:]
    with path.open("rb") as stream:
        head = read_head(stream)
        if archive_of(head) == ".zip" or endings[-1:] == [".zip"]:
            with _unpack_errors(name):
                return "" if endings[-1:] != [".zip"] and document_of(stream) else ".zip"
        if compression_of(head):
            stream.seek(0)
            with _unpack_errors(name), _decompressed(stream, name) as content:
                head = read_head(content)
    promised = endings[-1:] == [".tar"] or (endings and endings[-1] in PACKED_TARS)
    return ".tar" if promised or (endings[:1] == [".tar"] and endings[1] in OPENERS) else archive_of(head)


def document_of(stream: IO[bytes]) -> str | None:
    """Return `docx`, `epub` or `xlsx` for a zip archive that is such a document, None for any other."""
    with open_zip(stream) as archive:
        names = set(archive.namelist())
    return next((kind for member, kind in OFFICE_DOCUMENTS.items() if member in names), None)


def is_workbook(path: Path) -> bool:
    with path.open("rb") as stream:
        return archive_of(read_head(stream)) == ".zip" and document_of(stream) == "xlsx"


def archive_members(name: str, path: Path, wanted: str | None) -> list[str]:
    """Return the members to read: the named one, the matches of a pattern, or the only one."""
    with _unpack_errors(name):
        members = _zip_members(path) if archive_kind(name, path) == ".zip" else _tar(name, path).members
        for member in members:
            parts = PureWindowsPath(member)  # knows both slashes, roots and drives
            if parts.drive or parts.root or ".." in parts.parts:
                raise InputError(f"{name}: member {member!r} leads out of the archive; do not trust this file")
    for telltale, (noun, advice) in OFFICE.items():
        if telltale in members:
            raise InputError(f"{name}: expected text or rows, found {noun}; {advice}")
    chosen = _choose(name, sorted(filter(_is_content, members)), wanted)
    for member in chosen:
        if members[member].is_link:
            raise InputError(f"{name}: member {member!r} is a link, and links are not followed; pack the file itself")
    check_ratio(name, sum(members[member].size for member in chosen), path.stat().st_size)
    return chosen


def _is_content(member: str) -> bool:
    """Return whether a member is no by-product of macOS."""
    last = PurePosixPath(member).name
    return not (member.startswith("__MACOSX/") or last.startswith("._") or last == ".DS_Store")


def _choose(name: str, names: list[str], wanted: str | None) -> list[str]:
    found = f"found {len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    if wanted is None:
        if len(names) != 1:
            raise InputError(
                f"{name}: expected one member, {found}; say which with member:, a name or a pattern as *.txt"
            )
        return names
    chosen = [wanted] if wanted in names else fnmatch.filter(names, wanted)
    if not chosen:
        raise InputError(f"{name}: expected a member {wanted!r}, {found}; correct member:")
    return chosen


def check_ratio(name: str, size: int, packed: int) -> None:
    """Raise `InputError` for an archive that would fill the disk."""
    if size > max(FREE_SIZE, MAX_RATIO * packed):
        raise InputError(
            f"{name}: unpacks to more than {MAX_RATIO} times its {packed:,} bytes, as if made to fill a disk; "
            "if you trust it, unpack it yourself"
        )


class Member(NamedTuple):
    """A file of an archive."""

    size: int
    is_link: bool
    info: Any = None  # tarfile's


def _zip_members(path: Path) -> dict[str, Member]:
    with _zip_archive(path) as archive:
        infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    return {info.filename: Member(info.file_size, stat.S_ISLNK(info.external_attr >> 16)) for info in infos}


class _Tar(NamedTuple):
    """An unpacked tar archive on a disk without a name, and its files."""

    archive: tarfile.TarFile
    members: Mapping[str, Member]


def _tar(name: str, path: Path) -> _Tar:
    return _unpacked_tar(name, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # members are read one after the other
def _unpacked_tar(name: str, path: Path, changed: int) -> _Tar:
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the cache keeps it
    with path.open("rb") as stream, _decompressed(stream, name) as content:
        while block := content.read(BLOCK):
            unpacked.write(block)
            check_ratio(name, unpacked.tell(), path.stat().st_size)
    unpacked.seek(0)
    archive = tarfile.open(fileobj=unpacked, mode="r:")  # noqa: SIM115
    members: dict[str, Member] = {}
    for info in archive:
        if len(members) == MAX_MEMBERS:
            raise tarfile.TarError(f"it has more than {MAX_MEMBERS:,} members")
        if not info.isdir():
            members[info.name.removeprefix("./")] = Member(info.size, not info.isreg(), info)
    unpacked.seek(archive.offset)
    if any(mark := unpacked.read(tarfile.BLOCKSIZE)) or not mark:  # tarfile takes a damaged header for the end
        raise tarfile.TarError(f"damaged at byte {archive.offset:,} of the unpacked archive")
    return _Tar(archive, members)


@contextmanager
def _open_member(name: str, path: Path, member: str) -> Iterator[IO[bytes]]:
    if archive_kind(name, path) == ".zip":
        with _zip_archive(path) as archive, archive.open(member) as stream:
            yield stream
        return
    tar = _tar(name, path)
    found = tar.archive.extractfile(tar.members[member].info)
    assert found is not None  # links are refused before
    with found:
        yield found


@contextmanager
def _unpack_errors(name: str) -> Iterator[None]:
    """Turn the errors of a damaged file into one `InputError`; errors of the disk pass through."""
    try:
        yield
    except InputError:
        raise
    except (
        *(OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, zipfile.BadZipFile, tarfile.TarError),
        *(struct.error, MemoryError, RuntimeError),  # a password
        *(ValueError, LookupError),  # an unknown method, a name without characters
    ) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the start
            raise
        raise InputError(f"{name}: cannot be unpacked ({error_text(error)}); fetch or pack it again") from None


class _ZipReader(io.BufferedReader):
    """A file for `zipfile`, which reads the table of members at once, whatever size the archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of members has {size:,} bytes, {MAX_DIRECTORY:,} are read")
        return super().read(size)


@contextmanager
def open_zip(stream: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive on this disk; the stream stays open."""
    with _ZipReader(io.FileIO(stream.fileno(), closefd=False)) as file, zipfile.ZipFile(file) as archive:
        yield archive
    stream.seek(0)


@contextmanager
def _zip_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with path.open("rb") as stream, open_zip(stream) as archive:
        yield archive
