"""Brings journals to MLflow: the only stage module that imports it, and always in a process of its own.

    python -m stages.sync                 delivers everything that is not delivered yet, then ends
    python -m stages.sync --follow ...    started by a stage; follows one pipeline until it has ended

Delivering twice, late or in any order gives the same runs: a run is found again by its tag `llm.run`, a point of a
curve keeps the journal's time, a model version is looked up before it is made, a file takes the place of its earlier
version. `progress.json` beside a journal says how far it is delivered.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.files import write_atomic
from stages.runtime.run import locked
from stages.tracking import timeline
from stages.tracking.journal import Process, is_delivered, printable, repository, runs_folder, tracking_uri
from stages.tracking.journal_reader import (
    Event,
    close_if_dead,
    end_event,
    events_from,
    first_event,
    is_open,
    journals,
    pipeline_state,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 1000  # metrics that MLflow takes in one request
POLL = 0.5  # seconds between two looks at the journals
LONGEST_PAUSE = 60.0  # seconds between two attempts at a server that does not answer
REQUIREMENTS = ("torch", "tiktoken", "rustbpe", "safetensors", "pydantic", "numpy")


def main(arguments: list[str]) -> int:
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print user and password too
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # none of our models needs it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.pop("MLFLOW_RUN_ID", None)  # a caller's run must not swallow ours
    if arguments[:1] == ["--follow"]:
        return follow(runs_folder() / arguments[1], Process(*json.loads(arguments[2])))
    return sync()


def sync() -> int:
    """Delivers what is left of all pipelines; one line of result."""
    delivery, delivered, failed = Delivery(), 0, False
    for pipeline in undelivered():
        with locked(pipeline / "lock") as holder:
            if holder is not None:
                print(f"{pipeline.name}: process {holder} is delivering it")
                continue
            waiting = [journal for journal in journals(pipeline) if not is_delivered(journal)]
            draw_timeline(pipeline)
            try:
                delivery.pipeline(pipeline)
            except Exception as error:
                problem, failed = note_problem(pipeline, error), True
                print(f"tracking: {problem}; the record is kept", file=sys.stderr)
                if problem.endswith("did not answer") or not delivery.is_connected():
                    return 1  # the others would only wait for the same
            delivered += sum(is_delivered(journal) for journal in waiting)
    print(f"{delivered} runs delivered to {printable(tracking_uri())}")
    return int(failed)


def follow(pipeline: Path, invocation: Process) -> int:
    """Delivers a pipeline's journals while they grow. Ends when the pipeline is over, delivered or not."""
    os.nice(10)  # the training goes first
    with locked(pipeline / "lock") as holder:
        if holder is not None:
            return 0
        delivery, pause = Delivery(), POLL
        while True:
            over = invocation.is_gone() and not any(is_open(journal) for journal in journals(pipeline))
            draw_timeline(pipeline)
            try:
                delivery.pipeline(pipeline)
                pause = POLL
            except Exception as error:
                note_problem(pipeline, error)
                if over:
                    return 1
                pause = min(2 * pause, LONGEST_PAUSE)
            if over:
                break
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not (pause > POLL and invocation.is_gone()):
                time.sleep(POLL)
    return sync()  # what earlier pipelines could not deliver


def note_problem(pipeline: Path, error: Exception) -> str:
    """The details into the process's own output, one line for the stage to show."""
    place, text = printable(tracking_uri()), printable(str(error))
    silent = re.search(r"Max retries exceeded|timed out|failed with exception|Connection", text)
    reason = (text.splitlines() or [type(error).__name__])[0][:200]
    problem = f"MLflow at {place} " + ("did not answer" if silent else f"failed: {reason}")
    write_atomic(pipeline / "problem", problem)
    print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    return problem


# ---- progress --------------------------------------------------------------------------------------------------------


def undelivered() -> list[Path]:
    """The pipelines with a journal that is not delivered to its end, or with a time line that has changed since."""
    return [
        pipeline
        for pipeline in sorted(runs_folder().glob("*/"))
        if not all(is_delivered(journal) for journal in journals(pipeline))
        or read_json(pipeline / "timeline.json").get("md5") not in (None, timeline_md5(pipeline))
    ]


def timeline_md5(pipeline: Path) -> str | None:
    """Of the time line as it is now; None if there is none yet."""
    path = pipeline / timeline.TABLE
    return hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else None


def draw_timeline(pipeline: Path) -> None:
    """A picture that cannot be drawn does not keep the record back."""
    try:
        timeline.update(pipeline)
    except Exception as error:
        print(f"tracking: no time line: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)


def read_offset(journal: Path) -> int:
    """How much of the journal stands at the present tracking server; another server starts from nothing."""
    progress = read_json(journal / "progress.json")
    return int(progress["offset"]) if progress.get("server") == printable(tracking_uri()) else 0


def write_offset(journal: Path, offset: int) -> None:
    write_atomic(journal / "progress.json", json.dumps({"server": printable(tracking_uri()), "offset": offset}))


# ---- delivery --------------------------------------------------------------------------------------------------------


class Delivery:
    """A connection to MLflow, made when it is first needed."""

    def __init__(self) -> None:
        self._connection: tuple[MlflowClient, str] | None = None
        self._known: dict[str, str] = {}  # ids of MLflow's runs by our names
        self._states: dict[Path, tuple[str, int]] = {}  # what was last said about a pipeline's parent run

    def is_connected(self) -> bool:
        """Whether MLflow has answered yet."""
        return self._connection is not None

    def pipeline(self, pipeline: Path) -> None:
        """Delivers what is new in all journals of a pipeline, and the state of its parent run."""
        waiting = [journal for journal in journals(pipeline) if not is_delivered(journal)]
        for journal in waiting:
            close_if_dead(journal)
            self._journal(journal)
        ended = [journal for journal in waiting if is_complete(journal)]
        if waiting:
            self._parent_state(pipeline)
        self._timeline(pipeline)
        for journal in ended:
            (journal / "delivered").touch()
            shutil.rmtree(journal / "files", ignore_errors=True)
        (pipeline / "problem").unlink(missing_ok=True)

    def _client(self) -> tuple[MlflowClient, str]:
        """The client and the experiment's id. Under a lock: processes that create the database at once break it."""
        if self._connection is None:
            import mlflow

            mlflow.set_tracking_uri(tracking_uri())
            lock = store_lock()
            with locked(lock, patience=LONGEST_PAUSE) as holder:
                if holder is not None:
                    raise TimeoutError(f"process {holder} holds {lock}")
                client = mlflow.MlflowClient()
                self._connection = client, experiment_id(client)
            mlflow.set_experiment(experiment_id=self._connection[1])  # where models are logged
        return self._connection

    def _run(self, name: str, start: Event, run_name: str, tags: dict[str, str]) -> tuple[str, bool]:
        """The id of MLflow's run for one of ours, and whether it had to be made."""
        if name in self._known:
            return self._known[name], False
        client, experiment = self._client()
        found = client.search_runs([experiment], f"tags.`llm.run` = '{name}'", max_results=1)
        if found:
            self._known[name] = found[0].info.run_id
        else:
            new = client.create_run(experiment, start["time"], tags | {"llm.run": name}, run_name)
            self._known[name] = new.info.run_id
        return self._known[name], not found

    def _parent(self, pipeline: Path, start: Event) -> str:
        tags = {key: value for key, value in start["tags"].items() if key != "dvc.stage"}
        run_id, is_new = self._run(pipeline.name, start, start["title"], tags | {"mlflow.source.name": "dvc.yaml"})
        if is_new:
            (pipeline / "timeline.json").unlink(missing_ok=True)
        return run_id

    def _journal(self, journal: Path) -> None:
        start, offset = first_event(journal), read_offset(journal)
        parent = self._parent(journal.parent, start)
        tags = start["tags"] | {
            "mlflow.parentRunId": parent,
            "mlflow.source.name": f"stages/{start['stage'].replace('-', '_')}.py",
            "mlflow.source.type": "LOCAL",
        }
        run_id, is_new = self._run(f"{journal.parent.name}/{journal.name}", start, start["stage"], tags)
        batch: list[Metric] = []
        for event, behind in events_from(journal, 0 if is_new else offset):
            points = metric_points(event)
            if not points or len(batch) + len(points) > BATCH:
                self._send(run_id, batch)
                batch = []
            batch += points
            self._event(event, run_id, parent, journal)
            if not batch:
                write_offset(journal, behind)
            offset = behind
        self._send(run_id, batch)
        write_offset(journal, offset)

    def _send(self, run_id: str, batch: list[Metric]) -> None:
        if batch:
            self._client()[0].log_batch(run_id, metrics=batch)

    def _event(self, event: Event, run_id: str, parent: str, journal: Path) -> None:
        client, _ = self._client()
        files = journal / "files"
        match event["event"]:
            case "start":
                self._params(run_id, event["params"])
                self._params(parent, event["params"])
            case "summary":
                stage = first_event(journal)["stage"]
                self._send(parent, metric_points(event, prefix=f"{stage}/"))
            case "dataset":
                client.log_inputs(run_id, [dataset_input(event)])
            case "artifact" if (files / event["name"]).is_dir():
                client.log_artifacts(run_id, str(files / event["name"]), event["name"])
            case "artifact":
                client.log_artifact(run_id, str(files / event["name"]))
            case "model":
                self._model(run_id, event["name"], files / "models" / event["name"], files / "code/llm")
            case "end":
                client.set_terminated(run_id, event["status"], event["time"])

    def _params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        client, _ = self._client()
        there = client.get_run(run_id).data.params  # another stage may share some with the parent run
        missing = [Param(valid_name(key), value) for key, value in params.items() if valid_name(key) not in there]
        for first in range(0, len(missing), 100):
            client.log_batch(run_id, params=missing[first : first + 100])

    def _model(self, run_id: str, name: str, folder: Path, code: Path) -> None:
        """Logs and registers a model folder so that it loads without pickle, with the code that it was made with."""
        import mlflow
        from mlflow.models import Model

        client, _ = self._client()
        versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        if not versions:
            Model.log(
                None,
                name=name,
                flavor=mlflow.pyfunc,
                run_id=run_id,
                registered_model_name=name,
                python_model=str(code / "mlflow_model.py"),
                artifacts={"model": str(folder)},
                code_paths=[str(code)],
                pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
                input_example=input_example(folder),
            )
            versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        client.set_registered_model_alias(name, "candidate", versions[0].version)

    def _timeline(self, pipeline: Path) -> None:
        """The time line as it was last drawn, at the parent run; what stands in `timeline.json` has been delivered."""
        delivered = {"server": printable(tracking_uri()), "md5": timeline_md5(pipeline)}
        if delivered["md5"] is None or read_json(pipeline / "timeline.json") == delivered:
            return
        parent = self._parent(pipeline, first_event(journals(pipeline)[0]))
        for name in (timeline.PICTURE, timeline.TABLE):
            self._client()[0].log_artifact(parent, str(pipeline / name))
        write_atomic(pipeline / "timeline.json", json.dumps(delivered))

    def _parent_state(self, pipeline: Path) -> None:
        """The parent run is open while a stage runs, and ends as badly as its worst stage, whatever `dvc` does."""
        state = pipeline_state(pipeline)
        if self._states.get(pipeline) == state:
            return
        client, _ = self._client()
        parent = self._parent(pipeline, first_event(journals(pipeline)[0]))
        status, ended = state
        if status == "RUNNING":
            client.update_run(parent, status)
        else:
            client.set_terminated(parent, status, ended)
        self._states[pipeline] = state


def experiment_id(client: MlflowClient) -> str:
    """The experiment's id; makes it, unless another clone that delivers to the same server was faster."""
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
    """Beside a database file, which all clones that deliver to it see; for a server, in the repository."""
    database = re.match("sqlite:///([^?]+)", tracking_uri())
    return Path(f"{database[1]}.lock") if database else runs_folder() / "lock"


def artifact_location() -> str | None:
    """In the repository for a database, which would take the working directory; a server has a place of its own."""
    if re.match(r"https?:|databricks", tracking_uri()):
        return None
    return (repository() / "mlruns").resolve().as_uri()


def read_json(path: Path) -> dict[str, Any]:
    """Empty if the file is missing."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return values


def is_complete(journal: Path) -> bool:
    return end_event(journal) is not None and read_offset(journal) == (journal / "events.jsonl").stat().st_size


def metric_points(event: Event, prefix: str = "") -> list[Metric]:
    """Nothing for events other than figures."""
    from mlflow.entities import Metric

    if event["event"] not in ("metrics", "summary"):
        return []
    time_and_step = event["time"], event.get("step", 0)
    return [Metric(valid_name(prefix + key), value, *time_and_step) for key, value in event["values"].items()]


def dataset_input(event: Event) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(event["name"], event["digest"][:36], "local", json.dumps({"uri": event["source"]}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def input_example(folder: Path) -> Any:
    """What a model of this kind is asked; MLflow derives from it and the type hints what the model takes."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["kind"] == "classifier":
        return ["Call now to claim your prize"]
    return ["One morning"], {"max_new_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def valid_name(key: str) -> str:
    """MLflow's names: letters, digits and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", key)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
