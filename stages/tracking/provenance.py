"""Provenance of a run: the commit, what differs from it, the experiment, the files that say what goes into what."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.tracking.process import repository

DESCRIPTION = ("params.yaml", "dvc.yaml", "dvc.lock")  # of the pipeline, in the working tree
COMMITTED = "committed.yaml"  # the commit's params.yaml
PLOTS = Path("reports/plots")


def in_workspace() -> bool:
    """Return False in the copies of the working tree in which DVC runs queued and temporary experiments."""
    return Path.cwd().resolve() == repository().resolve()


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, encoding="utf-8")
    return done.stdout.strip()


def git_tags() -> dict[str, str]:
    """Return the commit, the branch, and whether code, params or data differ from it; nothing without git or commit."""
    try:
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "mlflow.source.git.branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain", "--", *source_paths()))).lower(),
        }
    except (OSError, ValueError, subprocess.CalledProcessError):
        return {}


def source_paths() -> list[str]:
    """Return git's pathspecs of code, params and data, without what the pipeline makes."""
    stages = pipeline_stages(Path("dvc.yaml"))
    made = {path for stage in stages.values() for path in paths(stage, *OUTPUTS)}
    deps = {path for stage in stages.values() for path in paths(stage, "deps")}
    excluded = [f":(exclude,top){path}" for path in sorted(made)] + [":(exclude,glob,top)**/__pycache__/**"]
    return ["dvc.yaml", "params.yaml", "llm", "stages", *sorted(deps - made), *excluded]


def dvc_tags() -> dict[str, str]:
    names = {"dvc.stage": "DVC_STAGE", "dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def copy_description(folder: Path) -> None:
    """Copy the pipeline's description, the commit's params and the finished curves, as they are now."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*map(Path, DESCRIPTION), *PLOTS.glob("*.csv")):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)  # its mode is as the umask says
    try:
        committed = git("show", f"{os.environ.get('DVC_EXP_BASELINE_REV') or 'HEAD'}:./params.yaml")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return
    (folder / COMMITTED).write_text(committed, encoding="utf-8")


# ---- dvc.yaml and dvc.lock -------------------------------------------------------------------------------------------

OUTPUTS = ("outs", "metrics", "plots")
Stage = Mapping[str, object]


def pipeline_stages(path: Path) -> dict[str, Stage]:
    """Return the stages of a `dvc.yaml` or `dvc.lock`, none where there is no such file or it is no such."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = content["stages"]
        return {str(name): stage for name, stage in stages.items() if isinstance(stage, Mapping)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return {}


def paths(stage: Stage, *kinds: str) -> list[str]:
    """Return the paths that a stage of `dvc.yaml` lists as `deps`, `outs`, `metrics` or `plots`."""
    found: list[str] = []
    for kind in kinds:
        found += [str(next(iter(entry)) if isinstance(entry, Mapping) else entry) for entry in entries(stage, kind)]
    return found


def entries(stage: Stage, kind: str) -> list[Any]:
    """Return a stage's list of this kind, empty where it has none."""
    found = stage.get(kind)
    return found if isinstance(found, list) else []
