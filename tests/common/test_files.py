"""Atomic writes and the JSON reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.common.errors import InputError
from llm.common.files import atomic_file, read_json, read_json_object, replaced_folder, sync, write_atomic


def test_a_written_file_holds_text_and_bytes_unchanged(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new/folder/a", "ä\n")
    assert (tmp_path / "new/folder/a").read_bytes() == b"\xc3\xa4\n"
    write_atomic(tmp_path / "new/folder/a", b"\r\n\xff")
    assert (tmp_path / "new/folder/a").read_bytes() == b"\r\n\xff"
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["a"]


def test_a_failing_writer_leaves_the_earlier_file_and_no_other(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bytes, bool]] = []

    def note(path: Path) -> None:
        synced.append((path.read_bytes(), (tmp_path / "a").exists()))

    monkeypatch.setattr("llm.common.files.sync", note)
    write_atomic(tmp_path / "a", "all")
    assert synced == [(b"all", False)]


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def note(path: Path) -> None:
        synced.append(f"{path.relative_to(tmp_path)} {(tmp_path / 'it').exists()}")
        sync(path)

    monkeypatch.setattr("llm.common.files.sync", note)
    with replaced_folder(tmp_path / "it") as new:
        (new / "inner").mkdir()
        (new / "inner/a").touch()
        (new / "b").touch()
    inside = {f"it.partial{name} False" for name in ("", "/b", "/inner", "/inner/a")}
    assert set(synced[:-1]) == inside
    assert synced[-1] == ". True"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing"),
        (b"{", "not valid JSON (Expecting"),
        (b"\xff", "not valid JSON ('utf-8'"),
        (b"[" * 100_000, "not valid JSON (too many brackets"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_json_errors_name_the_file_the_problem_and_the_fix(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_json_object(path, "fetch it again")
    assert str(raised.value).startswith(f"{path}: {problem}") and str(raised.value).endswith("; fetch it again")


def test_json_may_hold_any_value(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "[1, null]")
    assert read_json(tmp_path / "a.json") == [1, None]
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); make or copy it again$"):
        read_json(tmp_path)
