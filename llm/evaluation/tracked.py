"""Model folders of MLflow: of a run, or of a version in the registry."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from llm.common.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_ID = re.compile(r"[0-9a-f]{32}")
DATABASE = Path("mlflow.db")


def is_tracked(name: str) -> bool:
    """Tell whether a name can only be MLflow's: a URI or a run's id."""
    return name.startswith(("models:/", "runs:/")) or RUN_ID.fullmatch(name) is not None


def has_store() -> bool:
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or DATABASE.is_file()


def download_models(name: str, place: Path) -> list[Path]:
    """Download the models of a `models:/` URI, of a run's id or of a run's name; return their folders.

    The store is MLFLOW_TRACKING_URI, else `mlflow.db` here.
    """
    if not has_store():
        raise InputError(f"{name}: no MLflow store (expected MLFLOW_TRACKING_URI or {DATABASE}); run `dvc repro`")
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{quote(str(DATABASE.resolve()))}")
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    import mlflow

    client = mlflow.MlflowClient()
    try:
        uris = [name] if name.startswith("models:/") else models_of_run(client, name.removeprefix("runs:/"))
        paths = [
            Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(place / str(number))))
            for number, uri in enumerate(uris)
        ]
    except mlflow.MlflowException as error:
        raise InputError(f"{name}: MLflow has no such model or run ({str(error).splitlines()[0]})") from None
    folders = [found.parent for path in paths for found in sorted(path.glob("artifacts/*/config.json"))]
    if not folders:
        raise InputError(f"{name}: no model folder in MLflow; name a run that trained or evaluated models")
    return folders


def models_of_run(client: MlflowClient, name: str) -> list[str]:
    """Return the URIs of the models that a run has as its outputs; a name has to be that of one run alone."""
    if RUN_ID.fullmatch(name) is None:
        experiments = [each.experiment_id for each in client.search_experiments()]
        quoted = name.replace("'", "")
        found = client.search_runs(experiments, f"attributes.run_name = '{quoted}'", max_results=2)
        if len(found) != 1:
            count = "several runs have" if found else "no run has"
            raise InputError(f"{name}: {count} this name in MLflow; give a run's id")
        name = found[0].info.run_id
    outputs = client.get_run(name).outputs
    return [f"models:/{each.model_id}" for each in (outputs.model_outputs if outputs else [])]
