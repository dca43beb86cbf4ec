"""Digests of files and folders: md5 as DVC writes it into `dvc.lock`, sha256 for everybody else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def folder_md5(files: Mapping[str, str]) -> str:
    """Return the md5 of a folder by its files' md5, by relative path, as in `dvc.lock` without the `.dir`."""
    entries = [{"md5": files[path], "relpath": path} for path in sorted(files)]
    return hashlib.md5(json.dumps(entries).encode()).hexdigest()


def path_md5(path: Path) -> str | None:
    """Return the md5 of a file or folder as in `dvc.lock`, None where there is none."""
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        return folder_md5({file.relative_to(path).as_posix(): file_md5(file) for file in inside})
    return file_md5(path) if path.is_file() else None


def file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
