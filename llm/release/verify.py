"""Check of a lineage card: every digest in it against what is at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm.checkpoint.card import README, Base, Card, DataFile, digests_of
from llm.common.digests import file_sha256
from llm.common.errors import InputError
from llm.common.files import read_json
from llm.config import SourceFile, effective_params, parse_params
from llm.data.about import CARD_FILE
from llm.download.fetching.fetch import downloads_folder, fetch
from llm.release.lineage import commit_of, workspace

State = Literal["unchanged", "changed", "not at hand"]
SECTIONS = {"base": "pretrain", "classifier": "finetune_classify", "instruct": "finetune_instruct"}
NOT_OURS = (".gitattributes", ".gitignore")  # what a hub adds to a folder


class Check(NamedTuple):
    """The result for one digest or one param of a card."""

    what: str
    state: State
    reason: str = ""


def verify(place: Path, card: Card) -> list[Check]:
    """Check all that a card states, the workspace's files as far as they are at hand."""
    root = workspace(place) or Path.cwd()
    checks = [*check_folder(place, card.files)] if place.is_dir() else []
    near = [place.resolve().parent, root / "models"]
    for role, base in (("model", card.model), ("base", card.base)):
        while base is not None:
            checks += check_base(role, base, near)
            base = base.base
    for kind, source in card.data.items():
        for number, file in enumerate(source.files, 1):
            what = f"data {kind}: {file.file or f'{source.source}, private file {number}'}"
            checks.append(Check(what, *state_of(data_digest(root, kind, file), file.sha256)))
    return [*checks, *check_params(root, card), *check_origin(root, card)]


def state_of(found: str | None, stated: str) -> tuple[State]:
    return ("not at hand" if found is None else "unchanged" if found == stated else "changed",)


def check_folder(folder: Path, stated: Mapping[str, str]) -> Iterator[Check]:
    """Check a folder's files. One that is missing or that the card does not know is a change."""
    found = digests_of(folder)
    for name, digest in stated.items():
        if name not in found:
            yield Check(f"file {name}", "changed", "missing")
        else:
            yield Check(f"file {name}", *state_of(found[name], digest))
    for name in sorted(found.keys() - stated.keys() - {CARD_FILE, README, *NOT_OURS}):
        yield Check(f"file {name}", "changed", "not in the card")


def check_base(role: str, base: Base, near: list[Path]) -> Iterator[Check]:
    """Check the files of a base, or of the model that an export was made from, in a folder of its name."""
    folder = next((found for place in near if (found := place / base.name).exists()), None)
    for name, digest in base.files.items():
        path = None if folder is None else folder / name if folder.is_dir() else folder
        now = file_sha256(path) if path is not None and path.is_file() else None
        yield Check(f"{role} {base.name}: {name}", *state_of(now, digest))


def data_digest(root: Path, kind: str, file: DataFile) -> str | None:
    """Return the digest of a data file at hand: in the workspace, or among the downloads."""
    raw, downloads = root / "data/raw/sources.json", downloads_folder(root)
    known = read_json(raw).get(kind, {}).get("files", []) if raw.is_file() else []
    names = [file.file, *(str(each["file"]) for each in known if each.get("sha256") == file.sha256)]
    for name in filter(None, names):
        if "://" in name:
            url = hashlib.sha256(name.encode()).hexdigest()
            stored = next((path for key in (file.sha256, url) if (path := downloads / key).is_file()), None)
            if stored is not None and ":" not in name.rpartition("/")[2]:  # else one member of an archive
                return file_sha256(stored)
            continue
        archive, _, member = name.rpartition(":")
        entries = [SourceFile(path=str(root / name))]
        if archive:
            entries.append(SourceFile(path=str(root / archive), member=member))
        for entry in entries:
            try:
                return fetch(entry, downloads)[0].sha256
            except InputError:
                continue
    return None


def check_params(root: Path, card: Card) -> Iterator[Check]:
    """Check the params of the training against params.yaml."""
    path = root / "params.yaml"
    if not card.params:
        return
    if not path.is_file():
        yield Check("params", "not at hand")
        return
    import yaml

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    parse_params(values, str(path))
    effective = effective_params(values)
    now: dict[str, Any] = {"seed": effective["seed"], **effective[SECTIONS[card.kind]]}
    if card.kind == "base":
        now["model"] = effective["model"]
    differing = [key for key, value in card.params.items() if differs(key, value, now)]
    for key in differing:
        reason = f"{card.params[key]!r} in the card, {now.get(key)!r} in params.yaml"
        yield Check(f"params {SECTIONS[card.kind]}.{key}", "changed", reason)
    if not differing:
        yield Check("params", "unchanged")


def differs(key: str, value: Any, now: Mapping[str, Any]) -> bool:
    """Tell whether params.yaml has another value; open weights are stated by name alone, their model by its weights."""
    found = now.get(key)
    if key == "init":
        return bool(value != found and value != Path(str(found)).resolve().name)
    return bool(value != found) and not (key == "model" and value == {})


def check_origin(root: Path, card: Card) -> Iterator[Check]:
    """Check `dvc.lock` and the commit."""
    if card.origin is None:
        return
    lock = root / "dvc.lock"
    yield Check("dvc.lock", *state_of(file_sha256(lock) if lock.is_file() else None, card.origin.lock))
    if card.origin.commit is not None:
        commit = commit_of(root)[0]
        yield Check("git commit", *state_of(commit, card.origin.commit))
