"""Lineage card of a model, completed by the workspace: the commit, the digest of `dvc.lock`, the figures."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.checkpoint.card import NOTHING, Base, Card, Figure, Origin, digests_of, new_card, read_card
from llm.checkpoint.folder import read_checkpoint_config
from llm.common.digests import file_md5, file_sha256, path_md5
from llm.common.files import read_json_object
from llm.data.about import CARD_FILE, read_about

SOURCES = ("dvc.yaml", "dvc.lock", "params.yaml", "llm", "stages")  # what a commit says of a model
FIGURES = Path("reports/metrics/evaluate.json")
COUNTS = ("tokens", "bytes", "messages", "pairs")  # among the figures


def lineage(folder: Path) -> Card:
    """Return the card of a model folder with what the workspace around it knows.

    A folder of an earlier version has no card: then this states its files alone.
    """
    card = read_card(folder)
    if card is None:
        card = new_card(read_checkpoint_config(folder)[0].kind, about=read_about(folder) or NOTHING)
        card = card.model_copy(update={"files": digests_of(folder), "versions": {}})
    root = workspace(folder)
    if root is None:
        return card
    path, md5 = folder.resolve().relative_to(root).as_posix(), path_md5(folder)
    stages = locked_stages(root)
    if not any(digest(stage, "outs", path) == md5 for stage in stages.values()):
        return card
    evaluated = stages.get("evaluate", {})
    figures = None
    if digest(evaluated, "deps", path) == md5 and digest(evaluated, "outs", FIGURES.as_posix()) == md5_of(
        root / FIGURES
    ):
        figures = figures_of(read_json_object(root / FIGURES).get(card.kind, {}))
    commit, dirty = commit_of(root)
    origin = Origin(commit=commit, dirty=dirty, lock=file_sha256(root / "dvc.lock"))
    return card.model_copy(update={"origin": origin, "figures": figures})


def exported(folder: Path, card: Card) -> Card:
    """Return the card for an export of a model folder: it names the folder's files, and no text of private data."""
    about = card.about.model_copy(update={"tasks": {}, "examples": []}) if card.is_private else card.about
    model = Base(name=folder.resolve().name, files=card.files, carded=(folder / CARD_FILE).is_file())
    return card.model_copy(update={"about": about, "model": model, "files": {}})


def workspace(folder: Path) -> Path | None:
    """Return the folder above a model that has a `dvc.lock`, None where there is none."""
    return next((above for above in folder.resolve().parents if (above / "dvc.lock").is_file()), None)


def locked_stages(root: Path) -> dict[str, Mapping[str, Any]]:
    """Return the stages of `dvc.lock`, none where it is no such file."""
    import yaml

    try:
        stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        return {str(name): stage for name, stage in stages.items() if isinstance(stage, Mapping)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return {}


def digest(stage: Mapping[str, Any], kind: str, path: str) -> str | None:
    """Return the md5 of one of the `deps` or `outs` of a stage of `dvc.lock`."""
    entries = stage.get(kind)
    found = (
        each.get("md5")
        for each in (entries if isinstance(entries, list) else [])
        if isinstance(each, Mapping) and each.get("path") == path
    )
    return str(next(found, "")).removesuffix(".dir") or None


def md5_of(path: Path) -> str | None:
    return file_md5(path) if path.is_file() else None


def figures_of(values: Mapping[str, Any]) -> dict[str, Figure]:
    """Return a model's metrics, each with its interval where it has one."""
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    ends = {f"{key}{end}" for key in numbers for end in ("_low", "_high") if f"{key}{end}" in numbers}
    return {
        key: Figure(value=value, low=numbers.get(f"{key}_low"), high=numbers.get(f"{key}_high"))
        for key, value in numbers.items()
        if key not in ends and key not in COUNTS
    }


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit, and whether code, params or the lock differ from it; nothing without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True, encoding="utf-8")
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno", "--", *SOURCES))
    except (OSError, subprocess.CalledProcessError):
        return None, None
