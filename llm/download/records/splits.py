"""Tell which split a file belongs to, and refuse to mix files whose names say that they are kept apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from llm.common.errors import InputError
from llm.config import SPLITS, CorpusSource, InstructionsSource, MessagesSource, split_name
from llm.download.content.archives import DataFile

Section = CorpusSource | MessagesSource | InstructionsSource
STATED = {"train": "train", "val": "validation", "test": "test"}  # keys of `files`


def named_split(file: DataFile) -> str | None:
    """Return the split that the name of a file, or else of its folder, says.

    >>> named_split(DataFile("data/imdb_dev-00000-of-00001.parquet", Path(), "", 0))
    'val'
    """
    path = PurePosixPath(file.member or file.name)
    words = re.findall(r"[a-z]+", path.name.lower())
    found = [split for word in words if (split := split_name(word))]
    return found[0] if found else split_name(path.parent.name)


def file_splits(section: Section, files: Sequence[DataFile]) -> list[str | None]:
    """Return the split of each file, None where its rows say it or all are to be split.

    Raises `InputError` where only some files have one, and for files that look like splits of which nothing is said.
    """
    is_corpus = isinstance(section, CorpusSource)  # the split of a hub's data set has chosen its files
    stated = [file.declared.split if file.declared and not (is_corpus and file.declared.hf) else None for file in files]
    column = None if isinstance(section, CorpusSource) else section.split
    splits = [_stated_split(file, split) for file, split in zip(files, stated, strict=True)]
    kept = [file for file, split in zip(files, splits, strict=True) if split]
    if kept and column:
        raise InputError(f"{kept[0]}: expected one split, found split: {column} of its rows too; remove one of them")
    if kept and isinstance(section, CorpusSource):
        raise InputError(
            f"{kept[0]}: expected no split, as a corpus is split anew by document; list only the files to use"
        )
    if kept and len(kept) < len(files):
        other = next(file for file, split in zip(files, splits, strict=True) if split is None)
        raise InputError(
            f"{other}: expected a split, as {kept[0]} has one; list all files under train, validation, test"
        )
    if not kept and not column and "mixed" not in stated:
        _check_names(section, files)
    return splits


def _stated_split(file: DataFile, stated: str | None) -> str | None:
    if stated in SPLITS:
        return stated
    if stated != "from_name":
        return None
    split = named_split(file)
    if split is None:
        raise InputError(f"{file}: expected train, validation or test in its name, found none; list it under files:")
    return split


def _check_names(section: Section, files: Sequence[DataFile]) -> None:
    examples: dict[str, DataFile] = {}
    for file in files:
        if split := named_split(file):
            examples.setdefault(split, file)
    if len(examples) < 2:
        return
    found = ", ".join(f"{examples[split]} ({split})" for split in SPLITS if split in examples)
    keys = ", ".join(f"{STATED[split]}: [...]" for split in SPLITS if split in examples)
    keep = f"write files: {{{keys}}}, or split: from_name beside their path"
    if isinstance(section, CorpusSource):  # split anew by document, always
        keep = "list those to train on only"
    raise InputError(
        f"{next(iter(examples.values())).name}: expected files of one kind, found names of splits: {found}; to keep "
        f"these apart, {keep}; to mix all and split them anew, write split: mixed beside their path"
    )
