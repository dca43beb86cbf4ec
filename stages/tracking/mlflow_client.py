"""MLflow's tracking server and model registry, and journal events as MLflow's entities."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from llm.common.errors import InputError
from llm.common.lock import locked
from stages.tracking.journal import Event
from stages.tracking.process import repository, runs_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

CONNECT_TIMEOUT = 180.0  # seconds in which another process makes the database


def set_environment() -> None:
    """Set MLflow's own variables, before it is imported."""
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print user and password too
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # none of our models needs it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # whoever names a folder wants one
    os.environ.pop("MLFLOW_RUN_ID", None)  # a caller's run must not swallow ours


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, else a database in the repository, wherever DVC runs the stage.

    What it says of a place relative to the working directory is relative to the repository.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return database_uri(default_database())
    if given.startswith(SQLITE) and not given.startswith((f"{SQLITE}/", f"{SQLITE}file:", f"{SQLITE}:memory:")):
        path, query = re.fullmatch(r"([^?]*)(.*)", given.removeprefix(SQLITE), re.DOTALL).groups()  # type: ignore[union-attr]
        return database_uri(repository().resolve() / unquote(path)) + query
    if is_folder(given):
        path = unquote(given.removeprefix("file:")) if given.startswith("file:") else given
        return (repository().resolve() / Path(path).expanduser()).as_uri()
    return given


SQLITE = "sqlite:///"


def default_database() -> Path:
    return repository().resolve() / "mlflow.db"


def database_uri(path: Path) -> str:
    """Return the URI of a database file: `%`, `?`, `#` and spaces of its path are quoted."""
    return f"{SQLITE}{quote(str(path))}"


def database_file() -> Path | None:
    """Return the file of an SQLite database, None for any other store."""
    match = re.match(f"{SQLITE}([^?]+)", tracking_uri())
    return Path(unquote(match[1]).removeprefix("file:")) if match and match[1] != ":memory:" else None


def is_folder(uri: str) -> bool:
    """Return True for a folder's path or `file:` URI with a path below or beside the working directory."""
    return (not re.match(r"[a-zA-Z][\w+.-]*:", uri) and uri != "databricks") or bool(re.match("file:(?!//)", uri))


def redact_urls(text: str) -> str:
    """Return a text without the user, password and query of its URLs."""
    return re.sub(r"(//[^\s?'\"]*)\?[^\s'\"]*", r"\1", re.sub(r"//[^/\s]*@", "//", text))


def connect() -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id, under a lock: processes that create the database at once break it."""
    import mlflow

    warnings.filterwarnings("ignore", category=UserWarning, module="mlflow")
    mlflow.set_tracking_uri(tracking_uri())
    lock = store_lock()
    with locked(lock, CONNECT_TIMEOUT) as holder:
        if holder is not None:
            raise TimeoutError(f"process {holder} holds {lock}")
        own = is_own_store()
        if database_file() == default_database():
            relocate(default_database())
        client = mlflow.MlflowClient()
        experiment = experiment_id(client)
        if own:
            delete_empty_default(client)
    mlflow.set_experiment(experiment_id=experiment)  # where models are logged
    return client, experiment


def is_own_store() -> bool:
    """Return True for a database that this project makes: its default one, or one that is not there yet."""
    database = database_file()
    return database is not None and (database == default_database() or not database.exists())


def experiment_id(client: MlflowClient) -> str:
    """Return the experiment's id; create it, unless another clone that delivers to the same server was faster."""
    from mlflow import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "llm"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location(), tags=EXPERIMENT_TAGS)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise InputError(f"experiment {name}: it was deleted; restore it with `mlflow experiments restore`")
    for key, value in EXPERIMENT_TAGS.items():
        if key not in experiment.tags:  # what a person has written stays
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def delete_empty_default(client: MlflowClient) -> None:
    """Delete the experiment that MLflow makes with every new store, as long as it is empty."""
    from mlflow.entities import ViewType

    default = client.get_experiment_by_name("Default")
    if default is None or default.experiment_id != "0" or default.lifecycle_stage != "active":
        return
    used = client.search_runs(["0"], run_view_type=ViewType.ALL, max_results=1)
    if not used and not client.search_logged_models(["0"], max_results=1):
        client.delete_experiment("0")


def relocate(database: Path) -> None:
    """Write the present place of artifacts into the repository's own database, if it was moved or copied.

    MLflow stores them as absolute addresses and has no call that changes them.
    """
    if not database.exists():
        return
    new = (repository() / "mlruns").resolve().as_uri()
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        places = [row[0] for row in connection.execute("SELECT artifact_location FROM experiments")]
        old_places = {place for place in places if place and place.startswith("file:") and place.endswith("/mlruns")}
        for old in old_places - {new}:
            for table, column in ADDRESSES.items():
                if table in tables:
                    change = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    where = f"WHERE substr({column} || '/', 1, ?) = ?"
                    connection.execute(f"{change} {where}", (new, len(old) + 1, len(old) + 1, f"{old}/"))


ADDRESSES = {  # of artifacts in MLflow's database
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else MLflow takes it for an app's traces
    "mlflow.note.content": (
        "One run for each `dvc repro` or `dvc exp run`, with a child run for each stage that ran. Its metrics are the "
        "headline figures on held-out data and the validation losses of the three trainings; all others are on the "
        "stages' runs. Select two runs and open *Chart view*, or *Compare* for the params that differ."
    ),
}


def store_lock() -> Path:
    """Return the lock beside a database file, which all clones that deliver to it see; for a server one of our own."""
    database = database_file()
    return runs_folder() / "lock" if database is None else database.with_name(f"{database.name}.lock")


def artifact_location() -> str | None:
    """Return a folder in the repository for a database, which has none of its own; None for a server or a folder."""
    if re.match(r"https?:|databricks|file:|uc:", tracking_uri()):
        return None
    return (repository() / "mlruns").resolve().as_uri()


def log_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    """Log the params that the run lacks; stages share some in the parent run."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    missing = [Param(valid_name(key), value) for key, value in params.items() if valid_name(key) not in known]
    for first in range(0, len(missing), 100):
        client.log_batch(run_id, params=missing[first : first + 100])


def to_metrics(event: Event) -> list[Metric]:
    """Return the metrics of an event, none for other kinds of event."""
    if event["event"] not in ("metrics", "summary"):
        return []
    return metrics(event["values"], event["time"], event.get("step", 0))


def metrics(values: dict[str, float], time: int, step: int) -> list[Metric]:
    """Return values as MLflow's metrics."""
    from mlflow.entities import Metric

    return [Metric(valid_name(key), value, time, step) for key, value in values.items()]


def to_dataset_input(event: Event) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(event["name"], event["digest"][:36], "local", json.dumps({"uri": event["source"]}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def valid_name(key: str) -> str:
    """Replace the characters that MLflow's names may not have: all but letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", key)
