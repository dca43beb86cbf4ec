"""Atomic writes of files and folders, and strict reading of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.common.errors import InputError

COPY_AGAIN = "make or copy it again"
WINDOWS = os.name == "nt"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise `ValueError` for any malformed text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too many brackets inside one another") from None


def read_json(path: Path, fix: str = COPY_AGAIN) -> Any:
    """Return the content of a JSON file.

    Raises `InputError` with the file, the problem and the `fix` for a missing, unreadable or malformed one.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {fix}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); {fix}") from None


def read_json_object(path: Path, fix: str = COPY_AGAIN) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object; raise `InputError` as `read_json`."""
    content = read_json(path, fix)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}; {fix}")
    return content


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    if WINDOWS and path.is_dir():
        return  # it opens no folder
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # it flushes what is open for writing alone
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
        # some file systems have no such thing for folders
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    A file has one writer at a time: a killed writer's temporary file is overwritten by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    try:
        yield draft
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing, text as UTF-8 with plain line feeds."""
    with atomic_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder that replaces `folder` when the block ends without an error.

    The earlier folder is moved aside before it is deleted, and the disk has all of the new one before it gets its name.
    """
    new, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
