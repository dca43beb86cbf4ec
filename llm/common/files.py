"""Files that appear whole or not at all, and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, but whatever is wrong with the text is a `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too many brackets inside one another") from None


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the block ends without an error.

    The earlier folder is moved aside before it is deleted, and the disk has all of the new one before it gets its name:
    neither a kill nor a power cut leaves half a folder under it.
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


def sync(path: Path) -> None:
    """Returns when the disk has the file's content, or the folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
        # some file systems have no such thing for folders
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """The whole file or none of it, whenever the process ends; one writer at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")  # that of a killed process is taken by the next
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
