"""Read checked files: plain, compressed, or one member of a zip archive.

Nothing is unpacked to disk. An archive is refused that unpacks to much more than its size, or that lists members
without end.
"""

from __future__ import annotations

import errno
import fnmatch
import gzip
import io
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO
from urllib.parse import unquote

from llm.common.errors import InputError
from llm.common.sanitize import error_text

BLOCK = 1 << 20  # bytes read at once
MAX_RATIO = 200  # unpacked bytes for each packed one; text and tables have 3 to 30
FREE_SIZE = 1 << 26  # unpacked bytes that are exempt from MAX_RATIO
MAX_DIRECTORY = 1 << 22  # bytes of a zip archive's table of members, about 50,000 of them
COMPRESSIONS = (".gz", ".zst", ".zip")


@dataclass(frozen=True)
class DataFile:
    """A checked file on this disk, or one member of a zip archive."""

    name: str  # for messages: the path, or the URL without its secrets; its ending decides the format
    path: Path
    sha256: str  # of the member where the source names one, else of the file
    size: int  # bytes that the sha256 covers
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.member}" if self.member else self.name

    @property
    def compression(self) -> str:
        """Return `.gz`, `.zst`, `.zip` or nothing."""
        ending = PurePosixPath(unquote(self.name).lower()).suffix
        return ending if ending in COMPRESSIONS else ""

    @property
    def suffix(self) -> str:
        """Return the suffix of the unpacked content: `.txt` for `a.txt`, `a.txt.gz` and the member `a.txt`."""
        path = PurePosixPath(unquote(self.member or self.name).lower())
        return path.suffix if self.member or not self.compression else PurePosixPath(path.stem).suffix

    def blocks(self) -> Iterator[bytes]:
        """Yield the unpacked content, a block at a time."""
        size, packed = 0, self.path.stat().st_size if self.compression else None
        with _unpack_errors(str(self)), self._open() as stream:
            while block := stream.read(BLOCK):
                size += len(block)
                if packed is not None:
                    check_ratio(str(self), size, packed)
                yield block

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self.member is not None:
            with _zip_archive(self.path) as archive, archive.open(self.member) as stream:
                yield stream
        elif self.compression == ".gz":
            with gzip.open(self.path) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif self.compression == ".zst":
            import pyarrow  # zstandard's own reader takes a truncated file for a whole one

            with pyarrow.input_stream(str(self.path), compression="zstd") as stream:
                yield stream
        else:
            with self.path.open("rb") as plain:
                yield plain


def zip_members(name: str, path: Path, wanted: str | None) -> list[str]:
    """Return the members to read: the named one, the matches of a pattern, or the only one."""
    with _unpack_errors(name), _zip_archive(path) as archive:
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
    check_ratio(name, sum(infos[member].file_size for member in chosen), path.stat().st_size)
    return chosen


def check_ratio(name: str, size: int, packed: int) -> None:
    """Raise `InputError` for an archive that would fill the disk."""
    if size > max(FREE_SIZE, MAX_RATIO * packed):
        raise InputError(
            f"{name}: unpacks to more than {MAX_RATIO} times its {packed:,} bytes, as if made to fill a disk; "
            "if you trust it, unpack it yourself"
        )


@contextmanager
def _unpack_errors(name: str) -> Iterator[None]:
    """Turn the errors of a damaged file into one `InputError`; errors of the disk pass through."""
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
        raise InputError(f"{name}: cannot be unpacked ({error_text(error)}); fetch or pack it again") from None


class _ZipReader(io.BufferedReader):
    """A file for `zipfile`, which reads the table of members at once, whatever size the archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of members has {size:,} bytes, {MAX_DIRECTORY:,} are read")
        return super().read(size)


@contextmanager
def _zip_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with _ZipReader(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        yield archive
