"""Card of a model as a person reads it: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llm.checkpoint.card import Base, Card, DataSource, Figure
from llm.common.markdown import escape, table

SPDX = {  # licences as params.yaml writes them, and as the hub does
    "mit": "mit",
    "apache-2.0": "apache-2.0",
    "cc by 4.0": "cc-by-4.0",
    "cc by-sa 4.0": "cc-by-sa-4.0",
    "cc0": "cc0-1.0",
    "cc0-1.0": "cc0-1.0",
}
USES = {
    "base": ("Continues a text in the manner of its training text.", "answers to questions, or facts"),
    "classifier": ("Gives each message one of its labels.", "messages of another kind, or labels that it never saw"),
    "instruct": ("Answers instructions of the tasks that it was trained on.", "other tasks, or facts about the world"),
}
TASKS = {"base": "text-generation", "classifier": "text-classification", "instruct": "text-generation"}
METRICS = {"accuracy": "accuracy", "f1": "f1", "exact_match": "exact_match", "rouge_l": "rouge", "chrf": "chrf"}
SHOWN_FILES = 20


def readme(card: Card, name: str, library: str = "textmill") -> str:
    """Return a README.md in the form of the hub's model cards."""
    purpose, limits = USES[card.kind]
    lines = ["---", *metadata(card, name, library), "---", "", f"# {escape(name)}", "", purpose, ""]
    lines += ["## Use", "", f"For: {purpose[0].lower()}{purpose[1:]}  ", f"Not for: {limits}.", ""]
    lines += ["Nobody has examined it for harmful or unfair answers.", ""]
    lines += figures_section(card.figures) + base_section(card.base) + data_section(card.data)
    lines += ["## Training", "", "```json", json.dumps(card.params, indent=2, ensure_ascii=False), "```", ""]
    made = ", ".join(f"{package} {version}" for package, version in card.versions.items())
    lines += ["## Origin", "", f"- packages: {made}"]
    if card.origin is not None:
        if card.origin.commit is not None:
            changed = ", with uncommitted changes" if card.origin.dirty else ""
            lines.append(f"- git commit: `{card.origin.commit}`{changed}")
        lines.append(f"- dvc.lock: sha256 `{card.origin.lock}`")
    lines += ["", "`python -m llm card FOLDER --verify` checks the digests in card.json.", ""]
    return "\n".join(lines)


def metadata(card: Card, name: str, library: str) -> list[str]:
    """Return the lines of the YAML header. JSON is YAML, and quotes every foreign text."""
    licence = hub_licence(card)
    values: dict[str, Any] = {
        "license": licence,
        **({"license_name": "see-data"} if licence == "other" else {}),
        "library_name": library,
        "pipeline_tag": TASKS[card.kind],
        "tags": ["textmill", card.kind],
    }
    if (origin := first_base(card.base)) is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", origin.name):
        values["base_model"] = origin.name
    if card.figures:
        dataset = card.data.get({"base": "corpus", "classifier": "messages", "instruct": "instructions"}[card.kind])
        source = dataset.source if dataset is not None else "held-out data"
        metrics = [{"type": METRICS.get(key, key), "value": each.value} for key, each in card.figures.items()]
        result = {"task": {"type": TASKS[card.kind]}, "dataset": {"type": source, "name": source}, "metrics": metrics}
        values["model-index"] = [{"name": name, "results": [result]}]
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def hub_licence(card: Card) -> str:
    """Return the hub's name of the one licence of all data, `other` where there are several or a foreign base."""
    found = {SPDX.get(source.licence.strip().lower(), "other") for source in card.data.values()}
    first = first_base(card.base)
    ours = first is None or first.carded
    return found.pop() if len(found) == 1 and ours else "other"


def first_base(base: Base | None) -> Base | None:
    """Return the model at the beginning of all trainings."""
    while base is not None and base.base is not None:
        base = base.base
    return base


def figures_section(figures: Mapping[str, Figure] | None) -> list[str]:
    if not figures:
        return []
    rows = [
        [escape(key), f"{each.value:.6g}", "-" if each.low is None else f"{each.low:.6g} to {each.high:.6g}"]
        for key, each in figures.items()
    ]
    return ["## Figures", "", "On held-out data.", "", *table(["metric", "value", "95 % interval"], rows)]


def base_section(base: Base | None) -> list[str]:
    lines = []
    while base is not None:
        lines.append(f"- {escape(base.name)}")
        lines += [f"  - {escape(name)}: sha256 `{digest}`" for name, digest in list(base.files.items())[:SHOWN_FILES]]
        base = base.base
    return ["## Base", "", *lines, ""] if lines else []


def data_section(data: Mapping[str, DataSource]) -> list[str]:
    lines = []
    for kind, source in data.items():
        lines.append(f"- {kind}: {escape(source.source)}, licence {escape(source.licence)}")
        for file in source.files[:SHOWN_FILES]:
            lines.append(f"  - {escape(file.file or 'private file')}: {file.bytes:,} bytes, sha256 `{file.sha256}`")
        if len(source.files) > SHOWN_FILES:
            lines.append(f"  - and {len(source.files) - SHOWN_FILES:,} more, in card.json")
    return ["## Data", "", *lines, ""] if lines else []
