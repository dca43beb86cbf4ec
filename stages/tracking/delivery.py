"""Delivery of journals to MLflow, always in a process of its own.

Delivering twice, late or in any order gives the same runs. A run is found again by its tag `llm.run`, a point of a
curve keeps the journal's time, a model version is looked up before it is made, a file replaces its earlier version.
`progress.json` beside a journal says how far it is delivered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import traceback
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.files import read_json_object, write_atomic
from llm.common.lock import locked
from stages.tracking import journal_reader, mlflow_client, timeline
from stages.tracking.journal import Event, is_delivered, iter_events
from stages.tracking.journal_reader import end_event, is_running, list_journals, start_event
from stages.tracking.mlflow_client import redact_urls, tracking_uri
from stages.tracking.process import Process, runs_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 1000  # metrics that MLflow takes in one request
POLL_INTERVAL = 0.5  # seconds between two looks at the journals
LONGEST_PAUSE = 60.0  # seconds between two attempts at a server that does not answer

logger = logging.getLogger("llm")


def deliver_all() -> int:
    """Deliver all pipelines; print a line of result and return the exit status."""
    delivery, delivered, failed = Delivery(), 0, False
    for pipeline in undelivered_pipelines():
        with locked(pipeline / "lock") as holder:
            if holder is not None:
                print(f"{pipeline.name}: process {holder} is delivering it")
                continue
            waiting = [journal for journal in list_journals(pipeline) if not is_delivered(journal)]
            if problem := try_to_deliver(delivery, pipeline):
                logger.error("tracking: %s; the record is kept", problem)
                if problem.endswith("did not answer") or not delivery.is_connected():
                    return 1  # the others would only wait for the same
                failed = True
            delivered += sum(is_delivered(journal) for journal in waiting)
    print(f"{delivered} runs delivered to {redact_urls(tracking_uri())}")
    return int(failed)


def follow(pipeline: Path, invocation: Process) -> int:
    """Deliver a pipeline's journals while they grow, until the invocation is over; return the exit status."""
    os.nice(10)  # the training goes first
    with locked(pipeline / "lock") as holder:
        if holder is not None:
            return 0
        delivery, pause = Delivery(), POLL_INTERVAL
        while True:
            over = invocation.is_gone() and not any(is_running(journal) for journal in list_journals(pipeline))
            problem = try_to_deliver(delivery, pipeline)
            if over:
                break
            pause = min(2 * pause, LONGEST_PAUSE) if problem else POLL_INTERVAL
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not (pause > POLL_INTERVAL and invocation.is_gone()):
                time.sleep(POLL_INTERVAL)
    return 1 if problem else deliver_all()  # earlier pipelines too


def try_to_deliver(delivery: Delivery, pipeline: Path) -> str | None:
    """Draw a pipeline's time line and deliver both; return the error in one line, None for success."""
    try:
        timeline.update(pipeline)
    except Exception as error:
        logger.warning("tracking: no time line: %s: %s", type(error).__name__, error)
    try:
        delivery.deliver(pipeline)
    except Exception as error:
        return record_problem(pipeline, error)
    return None


def record_problem(pipeline: Path, error: Exception) -> str:
    """Print the traceback; return the error in one line, and write it where the stage reads it."""
    place, text = redact_urls(tracking_uri()), redact_urls(str(error))
    silent = re.search(r"Max retries exceeded|timed out|failed with exception|Connection", text)
    reason = (text.splitlines() or [type(error).__name__])[0][:200]
    problem = f"MLflow at {place} " + ("did not answer" if silent else f"failed: {reason}")
    write_atomic(pipeline / "problem", problem)
    print(redact_urls("".join(traceback.format_exception(error))), file=sys.stderr)
    return problem


# ---- progress --------------------------------------------------------------------------------------------------------


def undelivered_pipelines() -> list[Path]:
    """Return the pipelines with an undelivered rest of a journal, or a time line that has changed since."""
    return [
        pipeline
        for pipeline in sorted(runs_folder().glob("*/"))
        if not all(is_delivered(journal) for journal in list_journals(pipeline))
        or read_if_exists(pipeline / "timeline.json").get("md5") not in (None, timeline_md5(pipeline))
    ]


def timeline_md5(pipeline: Path) -> str | None:
    path = pipeline / timeline.TABLE
    return hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else None


def read_offset(journal: Path) -> int:
    """Return how many bytes of the journal the present server has; another server starts from nothing."""
    progress = read_if_exists(journal / "progress.json")
    return int(progress["offset"]) if progress.get("server") == redact_urls(tracking_uri()) else 0


def write_offset(journal: Path, offset: int) -> None:
    write_atomic(journal / "progress.json", json.dumps({"server": redact_urls(tracking_uri()), "offset": offset}))


def is_complete(journal: Path) -> bool:
    return end_event(journal) is not None and read_offset(journal) == (journal / "events.jsonl").stat().st_size


def read_if_exists(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


# ---- delivery --------------------------------------------------------------------------------------------------------


class Delivery:
    """A connection to MLflow, made when it is first needed."""

    def __init__(self) -> None:
        self._run_ids: dict[str, str] = {}  # by the tag `llm.run`
        self._statuses: dict[Path, tuple[str, int]] = {}  # as last set, of each pipeline's parent run

    def is_connected(self) -> bool:
        return "connection" in vars(self)

    @cached_property
    def connection(self) -> tuple[MlflowClient, str]:
        return mlflow_client.connect()

    def deliver(self, pipeline: Path) -> None:
        """Deliver the new events of all journals of a pipeline, its status and its time line."""
        waiting = [journal for journal in list_journals(pipeline) if not is_delivered(journal)]
        for journal in waiting:
            journal_reader.close_if_killed(journal)
            self._deliver_journal(journal)
        ended = [journal for journal in waiting if is_complete(journal)]
        if waiting:
            self._set_status(pipeline)
        self._deliver_timeline(pipeline)
        for journal in ended:
            (journal / "delivered").touch()
            shutil.rmtree(journal / "files", ignore_errors=True)
        (pipeline / "problem").unlink(missing_ok=True)

    def _find_or_create_run(self, name: str, start: Event, run_name: str, tags: dict[str, str]) -> tuple[str, bool]:
        """Return the id of the MLflow run with this tag `llm.run`, and True if it is new."""
        if name in self._run_ids:
            return self._run_ids[name], False
        client, experiment = self.connection
        found = client.search_runs([experiment], f"tags.`llm.run` = '{name}'", max_results=1)
        run = found[0] if found else client.create_run(experiment, start["time"], tags | {"llm.run": name}, run_name)
        self._run_ids[name] = run.info.run_id
        return self._run_ids[name], not found

    def _parent_run(self, pipeline: Path, start: Event) -> str:
        tags = {key: value for key, value in start["tags"].items() if key != "dvc.stage"}
        tags["mlflow.source.name"] = "dvc.yaml"
        run_id, is_new = self._find_or_create_run(pipeline.name, start, start["title"], tags)
        if is_new:
            (pipeline / "timeline.json").unlink(missing_ok=True)
        return run_id

    def _deliver_journal(self, journal: Path) -> None:
        start, offset = start_event(journal), read_offset(journal)
        parent = self._parent_run(journal.parent, start)
        tags = start["tags"] | {
            "mlflow.parentRunId": parent,
            "mlflow.source.name": f"stages/{start['stage'].replace('-', '_')}.py",
            "mlflow.source.type": "LOCAL",
        }
        name = f"{journal.parent.name}/{journal.name}"
        run_id, is_new = self._find_or_create_run(name, start, start["stage"], tags)
        batch: list[Metric] = []
        for event, next_offset in iter_events(journal, 0 if is_new else offset):
            points = mlflow_client.to_metrics(event)
            if not points or len(batch) + len(points) > BATCH:
                self._log_metrics(run_id, batch)
                batch = []
            batch += points
            self._deliver_event(event, run_id, parent, journal)
            if not batch:
                write_offset(journal, next_offset)
            offset = next_offset
        self._log_metrics(run_id, batch)
        write_offset(journal, offset)

    def _log_metrics(self, run_id: str, batch: list[Metric]) -> None:
        if batch:
            self.connection[0].log_batch(run_id, metrics=batch)

    def _deliver_event(self, event: Event, run_id: str, parent: str, journal: Path) -> None:
        client, files = self.connection[0], journal / "files"
        match event["event"]:
            case "start":
                mlflow_client.log_params(client, run_id, event["params"])
                mlflow_client.log_params(client, parent, event["params"])
            case "summary":
                self._log_metrics(parent, mlflow_client.to_metrics(event, prefix=f"{start_event(journal)['stage']}/"))
            case "dataset":
                client.log_inputs(run_id, [mlflow_client.to_dataset_input(event)])
            case "artifact" if (files / event["name"]).is_dir():
                client.log_artifacts(run_id, str(files / event["name"]), event["name"])
            case "artifact":
                client.log_artifact(run_id, str(files / event["name"]))
            case "model":
                mlflow_client.register_model(client, run_id, event["name"], files)
            case "end":
                client.set_terminated(run_id, event["status"], event["time"])

    def _deliver_timeline(self, pipeline: Path) -> None:
        """Log a changed time line to the parent run; `timeline.json` says which one it has."""
        delivered = {"server": redact_urls(tracking_uri()), "md5": timeline_md5(pipeline)}
        if delivered["md5"] is None or read_if_exists(pipeline / "timeline.json") == delivered:
            return
        parent = self._parent_run(pipeline, start_event(list_journals(pipeline)[0]))
        for name in (timeline.PICTURE, timeline.TABLE):
            self.connection[0].log_artifact(parent, str(pipeline / name))
        write_atomic(pipeline / "timeline.json", json.dumps(delivered))

    def _set_status(self, pipeline: Path) -> None:
        """Set the parent run's status: running while a stage is, then that of the worst stage."""
        status, ended = journal_reader.pipeline_status(pipeline)
        if self._statuses.get(pipeline) == (status, ended):
            return
        parent = self._parent_run(pipeline, start_event(list_journals(pipeline)[0]))
        if status == "RUNNING":
            self.connection[0].update_run(parent, status)
        else:
            self.connection[0].set_terminated(parent, status, ended)
        self._statuses[pipeline] = status, ended
