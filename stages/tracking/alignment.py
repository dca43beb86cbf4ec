"""Alignment of the registry with the workspace, where DVC changed `models/` without running a stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from llm.common.digests import path_md5
from llm.common.errors import InputError
from llm.common.files import read_json_object
from llm.config import effective_params
from stages.tracking import mlflow_client, registry
from stages.tracking.pipeline_run import digests_of, leaves
from stages.tracking.process import repository
from stages.tracking.provenance import git_tags, pipeline_stages

if TYPE_CHECKING:
    from mlflow import MlflowClient


def align_workspace() -> int:
    """Make each `candidate` the workspace's model, registering what no version has; print a line for each."""
    models = registry.workspace_models()
    if not models:
        raise InputError(f"{repository() / 'models'}: no model (expected a model folder); run `dvc checkout`")
    client, experiment = mlflow_client.connect()
    known = registry.align(client)
    code = Path(llm.__file__).parent
    for name, folder in models.items():
        if name not in known:
            registry.register(client, experiment, name, folder, code, origin(client, experiment, name, folder))
    for name, version in registry.align(client).items():
        print(f"{name}: {registry.CANDIDATE} is version {version}" + ("" if name in known else ", new"))
    return 0


def origin(client: MlflowClient, experiment: str, name: str, folder: Path) -> registry.Origin:
    """Return what the workspace and MLflow know of a model folder's lineage."""
    path, md5 = f"models/{folder.name}", path_md5(folder)
    locked = pipeline_stages(repository() / "dvc.lock")
    made = {stage: each for stage, each in locked.items() if digest(each, "outs", path) == md5}
    stage, content = next(iter(made.items()), ("", {}))
    trained = registry.find_training(client, experiment, path, md5 or "", stage)
    lineage = {"stage": stage} if stage else {}
    lineage |= registry.commit_tags(git_tags())
    lineage |= {f"md5.{key}": value for key, value in digests_of(made).items() if key.startswith("data/")}
    if trained is not None:
        lineage[f"run.{stage}"] = trained.info.run_id
    return registry.Origin(
        run_id=trained.info.run_id if trained is not None else None,
        params=locked_params(content),
        metrics=registry.metrics_of(name, evaluation(locked, path, md5)),
        tags=lineage,
    )


def digest(stage: Mapping[str, object], kind: str, path: str) -> str | None:
    """Return the md5 of one of the `deps` or `outs` of a stage of `dvc.lock`."""
    return digests_of({"": {kind: stage.get(kind)}}).get(path)


def locked_params(stage: Mapping[str, Any]) -> dict[str, str]:
    """Return the effective params that `dvc.lock` has of a stage."""
    values = dict((stage.get("params") or {}).get("params.yaml") or {})
    return leaves({key: value for key, value in effective_params(values).items() if value != {}})


def evaluation(locked: Mapping[str, Mapping[str, object]], path: str, md5: str | None) -> dict[str, float]:
    """Return the evaluation's metrics in the workspace, if they are of this model."""
    file = repository() / "reports" / "metrics" / "evaluate.json"
    if digest(locked.get("evaluate", {}), "deps", path) != md5 or not file.is_file():
        return {}
    return {
        f"{kind}/{key}": float(value)
        for kind, found in read_json_object(file).items()
        if isinstance(found, dict)
        for key, value in found.items()
        if isinstance(value, int | float)
    }
