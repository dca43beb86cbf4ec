"""Content of a pipeline's own run in MLflow: its name, all params, all digests, headline metrics and curves.

A pipeline in which DVC skipped stages has them too, from the description of the pipeline that each journal holds.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llm.common.errors import InputError
from llm.config import effective_params
from stages.tracking.journal import Event, read_events
from stages.tracking.provenance import COMMITTED, OUTPUTS, entries, paths, pipeline_stages

HEADLINES = {  # of `evaluate`, by section of MLflow's chart view, which has capitals first
    "base/bpb": "Held out/bpb",
    "classifier/accuracy": "Held out/accuracy",
    "instruct/exact_match": "Held out/exact_match",
    "classifier_scratch/accuracy": "Without pretraining/accuracy",
    "instruct_scratch/exact_match": "Without pretraining/exact_match",
}
CURVE = "val/loss"  # of a training; on the pipeline's run `Val loss/<stage>`
NOT_COMPARED = ("sources", "gpt2_files")
CODE = ("llm", "stages")  # the commit says which
MAX_NAME = 100  # characters


def description(journal: Path) -> Path:
    """Return the folder of the pipeline's description as it was at the start of a journal."""
    return journal / "files" / "pipeline"


def run_name(start: Event, journal: Path) -> str:
    """Return a name that tells two runs of one commit apart: by the params that differ from the committed ones."""
    tags: Mapping[str, str] = start["tags"]
    name = tags.get("dvc.exp_name") or tags.get("mlflow.source.git.commit", "")[:7]
    changes = changed_params(description(journal))
    if not name or not changes:
        title = str(start["title"])
        return f"{title}, edited" if tags.get("git.dirty") == "true" and not changes else title
    for number, change in enumerate(changes):
        if len(f"{name} {change}") > MAX_NAME:
            return f"{name} and {len(changes) - number} more"
        name = f"{name} {change}"
    return name


def changed_params(folder: Path) -> list[str]:
    """Return `key=value` for each param that differs from the commit's, a new source by its name alone."""
    present, committed = read_values(folder / "params.yaml"), read_values(folder / COMMITTED)
    if not committed:
        return []
    old, new = leaves(committed), leaves(present)
    keys = [*new, *sorted(old.keys() - new.keys())]
    changed = {key: new.get(key, "removed") for key in keys if new.get(key) != old.get(key)}
    compared = {key: value for key, value in changed.items() if key.split(".")[0] not in NOT_COMPARED}
    if compared or not changed:
        return [f"{key}={value}" for key, value in compared.items()]
    return sorted({".".join(key.split(".")[:2]) for key in changed})


def read_values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested mapping's values as texts by dotted key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def all_params(journal: Path) -> dict[str, str]:
    """Return the effective params of all stages, but for the addresses of data."""
    values = effective_params(read_values(description(journal) / "params.yaml"))
    return leaves({key: value for key, value in values.items() if key not in NOT_COMPARED})


def stage_params(journal: Path, stage: str) -> dict[str, str]:
    """Return the effective params that a stage lists in `dvc.yaml`."""
    keys = paths(pipeline_stages(description(journal) / "dvc.yaml").get(stage, {}), "params")
    return {
        name: value
        for name, value in all_params(journal).items()
        if any(name == key or name.startswith(f"{key}.") for key in keys)
    }


def producer(journal: Path, output: str) -> str | None:
    """Return the stage with this output."""
    stages = pipeline_stages(description(journal) / "dvc.yaml")
    return next((name for name, stage in stages.items() if output in paths(stage, *OUTPUTS)), None)


def settled_stages(journal: Path, stage: str) -> list[str]:
    """Return the stages that a stage depends on: when it starts, DVC has run or skipped them."""
    stages = pipeline_stages(description(journal) / "dvc.yaml")
    made_by = {output: name for name, each in stages.items() for output in paths(each, *OUTPUTS)}
    found: list[str] = []
    waiting = [stage]
    while waiting:
        for dep in paths(stages.get(waiting.pop(), {}), "deps"):
            for output, name in made_by.items():
                if name not in found and (dep == output or dep.startswith(f"{output}/")):
                    found.append(name)
                    waiting.append(name)
    return found


def lock_digests(journal: Path, stage: str) -> dict[str, str]:
    """Return the md5 of the inputs and outputs of the stages that are settled when a stage starts, but for code."""
    locked = pipeline_stages(description(journal) / "dvc.lock")
    return digests_of({name: locked[name] for name in settled_stages(journal, stage) if name in locked})


def digests_of(locked: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return the md5 of each input and output in stages of `dvc.lock`, but for code."""
    found: dict[str, str] = {}
    for stage in locked.values():
        for kind in ("deps", "outs"):
            for entry in entries(stage, kind):
                if entry["path"].split("/")[0] not in CODE and "md5" in entry:
                    found[entry["path"]] = entry["md5"].removesuffix(".dir")
    return found


def curve_metrics(event: Event, stage: str) -> dict[str, float]:
    """Return the point of a training's curve in an event, by its name on the pipeline's run."""
    values = event["values"] if event["event"] == "metrics" else {}
    return {f"Val loss/{stage}": values[CURVE]} if CURVE in values else {}


def headlines(event: Event, stage: str) -> dict[str, float]:
    """Return the headline metrics of an event, by their names on the pipeline's run."""
    values = event["values"] if event["event"] == "summary" and stage == "evaluate" else {}
    return {name: values[key] for key, name in HEADLINES.items() if key in values}


def skipped_curves(journal: Path, stage: str, ran: set[str]) -> dict[str, list[tuple[int, float]]]:
    """Return the finished curves of settled stages that DVC skipped, as steps with their loss."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name in settled_stages(journal, stage):
        path = description(journal) / f"{name.replace('-', '_')}.csv"
        if name in ran or not path.exists():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row.get("step"), row.get(CURVE)) for row in csv.DictReader(file)]
        try:
            points = [(int(float(step)), float(loss)) for step, loss in rows if step and loss]
        except ValueError as error:
            raise InputError(f"{path.name}: {error}") from None
        if points:
            found[f"Val loss/{name}"] = points
    return found


def summary_of(journal: Path) -> dict[str, float]:
    """Return the final metrics of a journal."""
    found: dict[str, float] = {}
    for event in read_events(journal):
        if event["event"] == "summary":
            found |= event["values"]
    return found
