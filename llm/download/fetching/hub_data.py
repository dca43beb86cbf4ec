"""Data sets of the Hugging Face hub by name: list their files at one revision, choose a split's, fetch them."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llm.common.errors import InputError
from llm.common.sanitize import error_text
from llm.config import SPLITS, TRAIN, SourceFile, split_name
from llm.download.content.archives import DataFile
from llm.download.content.detect import BY_SUFFIX
from llm.download.records.splits import named_split

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ABOUT = ("readme.md", "license.md", "license.txt", "dataset_infos.json", "dataset_info.json", "state.json")
MOST_FILES = 500  # of one entry; a larger data set is read in part

log = logging.getLogger("llm")


class HubFile(NamedTuple):
    """The SHA-256 and the size of a file, as far as the hub states them."""

    sha256: str | None
    size: int | None


def hub_files(entry: SourceFile, most: int | None = None) -> list[tuple[str, Path, str | None]]:
    """Fetch the files of a data set into the hub's cache; return their names, places and SHA-256 where it is known.

    `entry.hf` is `OWNER/NAME@REVISION`. `entry.split` chooses files by the split in their names, `entry.member` by a
    pattern of paths. Else parquet files come before others, as a data set often has its rows in several formats. With
    `most` only the smallest file is fetched, of the training split where there is one, and only if it has at most so
    many bytes.
    """
    assert entry.hf is not None
    name, _, revision = entry.hf.partition("@")
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"hf: {name}: huggingface_hub is missing; pip install 'textmill[hf]'") from None
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        commit, known = _listing(huggingface_hub, name, revision or None, endpoint)
        if not COMMIT.fullmatch(revision):
            log.warning("hf: %s: not pinned, so it may change unnoticed; write hf: %s@%s", name, name, commit)
        found = []
        chosen = _choose(name, sorted(known), entry)
        for path in chosen if most is None else [_smallest(name, {path: known[path] for path in chosen}, most)]:
            place = huggingface_hub.hf_hub_download(name, path, repo_type="dataset", revision=commit, endpoint=endpoint)
            found.append((f"hf://datasets/{name}@{commit}/{path}", Path(place), known[path].sha256))
        return found
    except InputError:
        raise
    except Exception as error:  # no network, no such name, no permission: of several libraries' classes
        if type(error) is OSError:  # of this disk
            raise
        reason = (error_text(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"the hub did not give it ({reason})"
        raise InputError(f"hf: {entry.hf}: {problem}; check name, revision and your access to it") from None


def _smallest(name: str, files: Mapping[str, HubFile], most: int) -> str:
    training = [path for path in files if named_split(DataFile(path, Path(), "", 0)) == SPLITS[TRAIN]]
    path = min(training or files, key=lambda path: files[path].size or 0)
    if (size := files[path].size or 0) > most:
        raise InputError(
            f"hf: {name}: {path} has {size:,} bytes, more than the {most:,} that are fetched for a look, and is read "
            "as a whole; raise the limit, or choose a smaller file by member"
        )
    return path


def _listing(hub: Any, name: str, revision: str | None, endpoint: str | None) -> tuple[str, Mapping[str, HubFile]]:
    """Return the commit and all files by path; from the hub's cache where the hub cannot be asked."""
    try:
        info = hub.HfApi(endpoint=endpoint).dataset_info(name, revision=revision, files_metadata=True)
        return info.sha, {
            each.rfilename: HubFile(each.lfs.sha256 if each.lfs else None, each.size) for each in info.siblings
        }
    except Exception as asked:
        try:
            place = hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        except Exception:
            raise asked from None
    folder = Path(place)
    log.warning("hf: %s: the hub cannot be asked; takes what its cache has of %s", name, folder.name)
    known = {}
    for path in folder.rglob("*"):
        digest = path.resolve().name  # large files are named by their SHA-256
        if path.is_file():
            sha256 = digest if SHA256.fullmatch(digest) else None
            known[path.relative_to(folder).as_posix()] = HubFile(sha256, path.stat().st_size)
    return folder.name, known


def _choose(name: str, paths: Sequence[str], entry: SourceFile) -> list[str]:
    """Return the files to read; raise `InputError` where there is none, or where several subsets would mix."""
    if entry.member:
        data = fnmatch.filter(paths, entry.member)
    else:
        data = [path for path in paths if PurePosixPath(path).name.lower() not in ABOUT]
        data = [path for path in data if PurePosixPath(path.removesuffix(".gz")).suffix in BY_SUFFIX]
        data = [path for path in data if path.endswith(".parquet")] or data
    if entry.split in SPLITS:
        data = [path for path in data if named_split(DataFile(path, Path(), "", 0)) == entry.split]
    if not data:
        stated = [f"{key}: {value}" for key, value in (("split", entry.split), ("member", entry.member)) if value]
        wanted = f" for {' and '.join(stated)}" if stated else ""
        shown = f"{len(paths)}: {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}"
        raise InputError(f"hf: {name}: expected files of data{wanted}, found {shown}; choose with member:, a pattern")
    if len(data) > MOST_FILES:
        raise InputError(f"hf: {name}: expected at most {MOST_FILES} files, found {len(data)}; choose with member:")
    subsets = sorted({_subset(path) for path in data})
    if not entry.member and len(subsets) > 1:
        shown = f"{', '.join(subsets[:8])}{', ...' if len(subsets) > 8 else ''}"
        raise InputError(f"hf: {name}: expected one subset, found {shown}; choose with member:, as in {subsets[0]}/*")
    return data


def _subset(path: str) -> str:
    """Return the folder of a file, above one that is named for a split."""
    folder = PurePosixPath(path).parent
    return (folder.parent if split_name(folder.name) else folder).as_posix()
