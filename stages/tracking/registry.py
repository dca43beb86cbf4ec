"""MLflow's model registry: model folders that load without pickle, with the code that they were made with."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.files import read_json_object

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUIREMENTS = ("torch", "tiktoken", "rustbpe", "safetensors", "pydantic", "numpy")


def register_model(client: MlflowClient, run_id: str, name: str, folder: Path, code: Path) -> None:
    """Log a model folder and register it as the candidate, unless the run has done so already."""
    import mlflow
    from mlflow.models import Model

    query = f"name = '{name}' and run_id = '{run_id}'"
    versions = client.search_model_versions(query)
    if not versions:
        Model.log(
            None,
            name=name,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            registered_model_name=name,
            python_model=str(code / "serving/mlflow_model.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(code)],
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
            input_example=input_example(folder),
        )
        versions = client.search_model_versions(query)
    client.set_registered_model_alias(name, "candidate", versions[0].version)


def input_example(folder: Path) -> Any:
    """Return an input, from which and the type hints MLflow derives the model's signature."""
    if read_json_object(folder / "config.json")["kind"] == "classifier":
        return ["Call now to claim your prize"]
    return ["One morning"], {"max_new_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0}
