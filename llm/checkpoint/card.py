"""Lineage card of a model: `card.json` in its folder.

A training writes the part that is a function of data, params and code. An export adds the commit, the digest of
`dvc.lock` and the figures of the evaluation.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from llm.common.digests import file_sha256
from llm.common.errors import InputError
from llm.common.files import read_json
from llm.config import Sha256, Strict, explain
from llm.data.about import CARD_FILE, About

README = "README.md"
SOURCE_FILE = "source.json"  # in each folder of data/tokens
PACKAGES = ("torch", "numpy", "tiktoken")  # that shape the bytes of a model
Content = TypeVar("Content", bound=Strict)

NOTHING = About(tasks={}, examples=[])


class DataFile(Strict):
    """A file of training data. Of private data only the digest is stated."""

    sha256: Sha256
    bytes: int
    file: str | None = None  # path in the repository, or URL


class DataSource(Strict):
    """A source of training data."""

    source: str
    licence: str
    quotable: bool
    files: list[DataFile]


class Base(Strict):
    """The model that a training began with, or that an export was made from."""

    name: str
    files: dict[str, Sha256]
    carded: bool  # its folder has a card: its data are stated
    base: Base | None = None


class Origin(Strict):
    """The commit and the lock that hold these bytes."""

    lock: Sha256  # of dvc.lock
    commit: str | None = None
    dirty: bool | None = None


class Figure(Strict):
    """A figure of the evaluation, with its 95 % interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Card(Strict):
    """The content of `card.json`."""

    kind: Literal["base", "classifier", "instruct"]
    files: dict[str, Sha256]  # of this folder, without card.json and README.md
    base: Base | None = None
    data: dict[str, DataSource]  # corpus, messages, instructions
    params: dict[str, Any]  # of the training
    versions: dict[str, str]
    about: About
    model: Base | None = None  # of an export: the model folder that it was made from
    origin: Origin | None = None
    figures: dict[str, Figure] | None = None

    @property
    def is_private(self) -> bool:
        """Tell whether texts of any source may not be shown."""
        return not all(source.quotable for source in self.data.values())


def new_card(
    kind: Literal["base", "classifier", "instruct"],
    *,
    tokens: Path | None = None,
    data: Sequence[str] = (),
    params: Mapping[str, Any] | None = None,
    base: Base | None = None,
    base_folder: Path | None = None,
    about: About = NOTHING,
) -> Card:
    """Return the card of a training on these kinds of data, without the files that it will be written beside.

    A base folder's own data count too. Params that no weight depends on are left out.
    """
    learned = card.data if base_folder is not None and (card := read_card(base_folder)) is not None else {}
    found = {each: source for each in data if tokens is not None and (source := read_source(tokens / each)) is not None}
    return Card(
        kind=kind,
        files={},
        base=base if base_folder is None else base_of(base_folder),
        data={**learned, **found},
        params={key: value for key, value in (params or {}).items() if key != "prompt"},
        versions=versions(),
        about=about,
    )


def base_of(folder: Path) -> Base:
    """Return a model folder as the base of a training; the card in it says what it was trained from itself."""
    card = read_card(folder)
    base = card.base if card is not None else None
    return Base(name=folder.name, files=digests_of(folder), carded=card is not None, base=base)


def foreign_base(source: str, files: Path) -> Base:
    """Return open weights as the base of a training: a hub name, or the last part of a path."""
    name = source if not Path(source).exists() else Path(source).resolve().name
    if files.is_file():
        return Base(name=name, files={files.name: file_sha256(files)}, carded=False)
    return base_of(files).model_copy(update={"name": name})


def digests_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of a folder's files by relative path, without what the card itself writes."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in inside if "__pycache__" not in path.parts}
    return {name: file_sha256(path) for name, path in names.items() if name not in (CARD_FILE, README)}


def versions() -> dict[str, str]:
    """Return the versions of the packages that shape a model's bytes, as an index has them."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}


def read_source(folder: Path) -> DataSource | None:
    """Read the source of a part of data/tokens; None where an earlier version wrote it."""
    path = folder / SOURCE_FILE
    return validated(DataSource, path, "run the tokenize stage again") if path.is_file() else None


def read_card(folder: Path) -> Card | None:
    """Read the card of a folder; None where it has none."""
    path = folder / CARD_FILE
    return validated(Card, path, "make the folder again") if path.is_file() else None


def validated(kind: type[Content], path: Path, fix: str) -> Content:
    """Read a JSON file of this kind; raise `InputError` for any other content."""
    try:
        return kind.model_validate(read_json(path, fix))
    except ValidationError as error:
        raise InputError(explain(error, str(path))) from None


def write_card(folder: Path, card: Card, readme: str) -> Card:
    """Write a card of the files that a folder holds now; return it."""
    card = card.model_copy(update={"files": digests_of(folder)})
    (folder / CARD_FILE).write_text(to_json(card), encoding="utf-8", newline="\n")
    (folder / README).write_text(readme, encoding="utf-8", newline="\n")
    return card


def to_json(card: Card) -> str:
    return card.model_dump_json(indent=2, exclude_none=True) + "\n"
