"""Packed files: members, damage, and archives that are made to do harm."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import stat
import struct
import zipfile
from pathlib import Path

import pyarrow
import pytest

from llm.common.errors import InputError
from llm.config import SourceFile
from llm.download.content import archives
from llm.download.fetching.fetch import fetch
from tests.download.files import DATA, content, refused, sha, zipped


def local(tmp_path: Path, name: str, packed: bytes, member: str | None = None, pinned: str | None = None) -> SourceFile:
    (tmp_path / name).write_bytes(packed)
    return SourceFile(path=str(tmp_path / name), member=member, sha256=pinned)


@pytest.mark.parametrize(
    ("name", "packed", "suffix"),
    [
        ("a.txt.gz", gzip.compress(DATA) + gzip.compress(DATA), ".txt"),
        ("A.JSONL.ZST", pyarrow.compress(DATA + DATA, "zstd", asbytes=True), ".jsonl"),
        ("a.zip", zipped({"x.csv": DATA + DATA, "__MACOSX/x.csv": b"?"}), ".csv"),
    ],
)
def test_unpacks(tmp_path: Path, cache: Path, name: str, packed: bytes, suffix: str) -> None:
    (found,) = fetch(local(tmp_path, name, packed, pinned=sha(packed)), cache)
    assert content(found) == DATA + DATA
    assert found.suffix == suffix


def test_members(tmp_path: Path, cache: Path) -> None:
    packed = zipped({"b.txt": b"two", "a.txt": b"one", "notes.pdf": b"%PDF"})
    pinned = fetch(local(tmp_path, "a.zip", packed, "b.txt", sha(b"two")), cache)
    assert [(content(file), file.sha256, file.size) for file in pinned] == [(b"two", sha(b"two"), 3)]
    several = fetch(local(tmp_path, "a.zip", packed, "*.txt", sha(packed)), cache)
    assert [(str(file), content(file)) for file in several] == [
        (f"{tmp_path}/a.zip:a.txt", b"one"),
        (f"{tmp_path}/a.zip:b.txt", b"two"),
    ]
    message = refused(local(tmp_path, "a.zip", packed), cache)
    assert "found 3: a.txt, b.txt, notes.pdf" in message and "member:" in message
    message = refused(local(tmp_path, "a.zip", packed, "c.txt"), cache)
    assert "expected a member 'c.txt', found 3: a.txt, b.txt, notes.pdf" in message
    assert f"expected sha256 {sha(packed)}, found {sha(b'two')}" in refused(
        local(tmp_path, "a.zip", packed, "b.txt", sha(packed)), cache
    )
    assert "expected a .zip or .tar" in refused(local(tmp_path, "a.txt", DATA, "b.txt"), cache)


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"]
)
def test_members_that_lead_out(tmp_path: Path, cache: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    message = refused(local(tmp_path, "a.zip", zipped({"good.txt": DATA, name: DATA}), "good.txt"), cache)
    assert "leads out of the archive" in message and "evil.txt" in message
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "a.zip"]


# ---- archives made to do harm ----------------------------------------------------------------------------------------

BOMB = bytes(archives.FREE_SIZE + 2 * archives.BLOCK)  # packed it is about a thousandth of it


def bomb(kind: str) -> bytes:
    if kind == ".gz":
        return gzip.compress(BOMB, 6)
    if kind == ".zst":
        return pyarrow.compress(BOMB, "zstd", asbytes=True)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.txt", BOMB)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [".gz", ".zst", ".zip"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, cache: Path, kind: str) -> None:
    packed = bomb(kind)
    assert len(BOMB) > 900 * len(packed)
    wanted = local(tmp_path, f"a.txt{kind}", packed, pinned=None if kind == ".zip" else sha(packed))
    unpacked = 0
    with pytest.raises(InputError, match=r"unpacks to more than 200 times its [\d,]+ bytes") as caught:
        for block in fetch(wanted, cache)[0].blocks():
            unpacked += len(block)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert unpacked <= archives.FREE_SIZE


def test_a_zip_that_lies_about_its_size_ends_where_it_said(tmp_path: Path, cache: Path) -> None:
    packed = bomb(".zip").replace(struct.pack("<L", len(BOMB)), struct.pack("<L", 1000))
    (found,) = fetch(local(tmp_path, "a.zip", packed), cache)
    with pytest.raises(InputError, match="cannot be unpacked"):
        content(found)


def test_many_members_are_a_bomb_together(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of data that many members share, as in the bombs that a limit for each member does not stop."""
    monkeypatch.setattr(archives, "FREE_SIZE", 10_000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x0.txt", bytes(100_000))
        first = archive.infolist()[0]
        for i in range(1, 50):
            again = zipfile.ZipInfo(f"x{i}.txt")
            for name in ("compress_type", "compress_size", "file_size", "CRC", "header_offset"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
    assert 100_000 < archives.MAX_RATIO * len(buffer.getvalue()) < 50 * 100_000
    message = refused(local(tmp_path, "a.zip", buffer.getvalue(), "*.txt"), cache)
    assert "unpacks to more than 200 times" in message
    assert len(content(fetch(local(tmp_path, "a.zip", buffer.getvalue(), "x0.txt"), cache)[0])) == 100_000


def test_little_that_is_packed_well_is_no_bomb(tmp_path: Path, cache: Path) -> None:
    text = b"the same line\n" * 100_000
    packed = gzip.compress(text)
    assert len(text) > archives.MAX_RATIO * len(packed)
    assert content(fetch(local(tmp_path, "a.txt.gz", packed), cache)[0]) == text


def test_a_million_members_are_not_listed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1_000_000
    name_length = 1
    entry = struct.pack("<4s4B4H3L5H2L", b"PK\1\2", 20, 0, 20, *(0,) * 8, name_length, *(0,) * 6) + b"a"
    table = entry * n
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n & 0xFFFF, n & 0xFFFF, len(table), 0, 0)
    listed = []
    monkeypatch.setattr(zipfile, "ZipInfo", lambda name: listed.append(name))
    message = refused(local(tmp_path, "a.zip", table + end), cache)
    assert f"its table of members has {len(table):,} bytes" in message
    assert listed == []


def test_links_are_not_followed(tmp_path: Path, cache: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("x.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("y.txt", DATA)
    wanted = local(tmp_path, "a.zip", buffer.getvalue(), "*.txt")
    assert "member 'x.txt' is a link, and links are not followed" in refused(wanted, cache)
    assert content(fetch(local(tmp_path, "a.zip", buffer.getvalue(), "y.txt"), cache)[0]) == DATA


def test_an_encrypted_member_is_named(tmp_path: Path, cache: Path) -> None:
    packed = bytearray(zipped({"x.txt": DATA}))
    packed[6] |= 1
    packed[packed.index(b"PK\1\2") + 8] |= 1
    (found,) = fetch(local(tmp_path, "a.zip", bytes(packed)), cache)
    with pytest.raises(InputError, match=r"a\.zip:x\.txt: cannot be unpacked \(.*encrypted"):
        content(found)


def test_an_archive_in_an_archive_stays_packed(tmp_path: Path, cache: Path) -> None:
    inner = zipped({"x.txt": DATA})
    (found,) = fetch(local(tmp_path, "a.zip", zipped({"b.zip": inner})), cache)
    assert found.suffix == ".zip" and content(found) == inner  # which no reader of a source takes
    packed = gzip.compress(gzip.compress(DATA))
    assert fetch(local(tmp_path, "a.txt.gz.gz", packed), cache)[0].suffix == ".gz"


def test_damage_of_an_archive_is_never_more_than_an_error(tmp_path: Path, cache: Path) -> None:
    chooser = random.Random(0)
    sound = [zipped({"x.txt": DATA[:500], "é.txt": DATA[:99]}), gzip.compress(DATA[:500]), bomb(".zst")]
    for i in range(300):
        number = i % len(sound)
        damaged = bytearray(sound[number])
        for _ in range(chooser.choice([1, 2, 4])):
            damaged[chooser.randrange(len(damaged))] = chooser.choice([0, 255, chooser.randrange(256)])
        wanted = local(
            tmp_path, ("a.zip", "a.txt.gz", "a.txt.zst")[number], bytes(damaged), "*.txt" if not number else None
        )
        with contextlib.suppress(InputError):
            for found in fetch(wanted, cache):
                for _ in zip(found.blocks(), range(3), strict=False):
                    pass
