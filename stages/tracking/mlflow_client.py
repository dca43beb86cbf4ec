"""MLflow's tracking server and model registry, and journal events as MLflow's entities."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.files import read_json_object
from llm.common.lock import locked
from stages.tracking.journal import Event
from stages.tracking.process import repository, runs_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

REQUIREMENTS = ("torch", "tiktoken", "rustbpe", "safetensors", "pydantic", "numpy")  # of a registered model
CONNECT_TIMEOUT = 60.0  # seconds in which another process makes the database


def set_environment() -> None:
    """Set MLflow's own variables, before it is imported."""
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print user and password too
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # none of our models needs it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.pop("MLFLOW_RUN_ID", None)  # a caller's run must not swallow ours


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, else a database in the repository, wherever DVC runs the stage."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository().resolve()}/mlflow.db"


def redact_urls(text: str) -> str:
    """Return a text without the user, password and query of its URLs."""
    return re.sub(r"(//[^\s?'\"]*)\?[^\s'\"]*", r"\1", re.sub(r"//[^/\s]*@", "//", text))


def connect() -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id, under a lock: processes that create the database at once break it."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    lock = store_lock()
    with locked(lock, CONNECT_TIMEOUT) as holder:
        if holder is not None:
            raise TimeoutError(f"process {holder} holds {lock}")
        client = mlflow.MlflowClient()
        experiment = experiment_id(client)
    mlflow.set_experiment(experiment_id=experiment)  # where models are logged
    return client, experiment


def experiment_id(client: MlflowClient) -> str:
    """Return the experiment's id; create it, unless another clone that delivers to the same server was faster."""
    from mlflow import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "llm"
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifact_location())
    except MlflowException:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id


def store_lock() -> Path:
    """Return the lock beside a database file, which all clones that deliver to it see; for a server one of our own."""
    database = re.match("sqlite:///([^?]+)", tracking_uri())
    return Path(f"{database[1]}.lock") if database else runs_folder() / "lock"


def artifact_location() -> str | None:
    """Return a folder in the repository for a database, which has none of its own; None for a server."""
    if re.match(r"https?:|databricks", tracking_uri()):
        return None
    return (repository() / "mlruns").resolve().as_uri()


def log_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    """Log the params that the run lacks; stages share some in the parent run."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    missing = [Param(valid_name(key), value) for key, value in params.items() if valid_name(key) not in known]
    for first in range(0, len(missing), 100):
        client.log_batch(run_id, params=missing[first : first + 100])


def register_model(client: MlflowClient, run_id: str, name: str, files: Path) -> None:
    """Log a model folder with the code that loads it, without pickle, and register it as the candidate."""
    import mlflow
    from mlflow.models import Model

    folder, code = files / "models" / name, files / "code/llm"
    query = f"name = '{name}' and run_id = '{run_id}'"
    versions = client.search_model_versions(query)
    if not versions:  # else an interrupted delivery has logged it
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


def to_metrics(event: Event, prefix: str = "") -> list[Metric]:
    """Return the metrics of an event, none for other kinds of event."""
    from mlflow.entities import Metric

    if event["event"] not in ("metrics", "summary"):
        return []
    time_and_step = event["time"], event.get("step", 0)
    return [Metric(valid_name(prefix + key), value, *time_and_step) for key, value in event["values"].items()]


def to_dataset_input(event: Event) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(event["name"], event["digest"][:36], "local", json.dumps({"uri": event["source"]}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def valid_name(key: str) -> str:
    """Replace the characters that MLflow's names may not have: all but letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", key)
