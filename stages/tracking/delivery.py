"""Delivery of journals to MLflow, always in a process of its own.

Delivering twice, late or in any order gives the same runs. A run is found again by its tag `llm.run`, a point of a
curve keeps the journal's time, a model version is looked up before it is made, a file replaces its earlier version.
`progress.json` beside a journal says how far it is delivered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import textwrap
import time
import traceback
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.common.digests import path_md5
from llm.common.files import read_json_object, write_atomic
from llm.common.lock import locked
from stages.tracking import journal_reader, mlflow_client, pipeline_run, registry, timeline
from stages.tracking.journal import Event, is_delivered, iter_events, read_events
from stages.tracking.journal_reader import end_event, is_running, list_journals, start_event
from stages.tracking.mlflow_client import redact_urls, tracking_uri
from stages.tracking.process import Process, repository, runs_folder
from stages.tracking.provenance import pipeline_stages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

BATCH = 1000  # metrics that MLflow takes in one request
POLL_INTERVAL = 0.5  # seconds between two looks at the journals
LONGEST_PAUSE = 60.0  # seconds between two attempts at a server that does not answer
DATASETS = ("data/raw", "data/tokens")  # of a pipeline's run
REPORTS = ("report.html", "report.md", "figures")  # artifacts that the pipeline's run has too

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
                problem = problem or try_to_finish(delivery, pipeline)
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


def try_to_finish(delivery: Delivery, pipeline: Path) -> str | None:
    """Complete the run of a pipeline that is over, and align the registry with the workspace; return an error."""
    try:
        delivery.finish(pipeline)
    except Exception as error:
        return record_problem(pipeline, error)
    return None


def record_problem(pipeline: Path, error: Exception) -> str:
    """Return the error in one line, and write it where the stage reads it; the traceback goes to `delivery.log`."""
    problem = one_line(error)
    write_atomic(pipeline / "problem", problem)
    with contextlib.suppress(OSError), (pipeline / "delivery.log").open("a", encoding="utf-8") as log:
        log.write(redact_urls("".join(traceback.format_exception(error))))
    return problem


def one_line(error: Exception) -> str:
    """Return an error of MLflow in one line without secrets, shortened between words."""
    place, text = redact_urls(tracking_uri()), redact_urls(str(error))
    if re.search(r"Max retries exceeded|timed out|failed with exception|Connection", text):
        return f"MLflow at {place} did not answer"
    line = (text.strip().splitlines() or [type(error).__name__])[0]
    return (
        f"MLflow at {place} failed: {textwrap.shorten(line, 300, placeholder=' ...', break_long_words=False) or line}"
    )


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
        if any(event["event"] == "model" for journal in ended for event in read_events(journal)):
            registry.align(self.connection[0])
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

    def finish(self, pipeline: Path) -> None:
        """Log the digests at the end and align the registry, if the pipeline ran in the workspace."""
        journals = list_journals(pipeline)
        if not journals or not start_event(journals[0]).get("workspace", False):
            return
        parent = self._parent_run(pipeline, journals[0])
        if journal_reader.pipeline_status(pipeline)[0] == "FINISHED":
            self._log_digests(parent, pipeline_run.digests_of(pipeline_stages(repository() / "dvc.lock")))
        registry.align(self.connection[0])

    def _log_digests(self, run_id: str, digests: dict[str, str]) -> None:
        """Log the digests of data and models as tags, and the data as the run's datasets."""
        from mlflow.entities import RunTag

        client = self.connection[0]
        known = client.get_run(run_id)
        new = {
            key: md5
            for key, md5 in ((f"md5.{mlflow_client.valid_name(path)}", md5) for path, md5 in sorted(digests.items()))
            if known.data.tags.get(key) != md5
        }
        if new:
            client.log_batch(run_id, tags=[RunTag(key, md5) for key, md5 in new.items()])
        inputs = known.inputs.dataset_inputs if known.inputs else []
        logged = {(each.dataset.name, each.dataset.digest) for each in inputs}
        datasets = [
            mlflow_client.to_dataset_input({"name": path, "digest": md5, "source": path, "context": "pipeline"})
            for path, md5 in sorted(digests.items())
            if path in DATASETS and (path, md5[:36]) not in logged
        ]
        if datasets:
            client.log_inputs(run_id, datasets)

    def _parent_run(self, pipeline: Path, journal: Path) -> str:
        if pipeline.name in self._run_ids:  # this is asked every second, and the name takes two params.yaml to find
            return self._run_ids[pipeline.name]
        start = start_event(journal)
        tags = {key: value for key, value in start["tags"].items() if key != "dvc.stage"}
        tags["mlflow.source.name"] = "dvc.yaml"
        name = pipeline_run.run_name(start, journal)
        run_id, is_new = self._find_or_create_run(pipeline.name, start, name, tags)
        if is_new:
            (pipeline / "timeline.json").unlink(missing_ok=True)
        return run_id

    def _deliver_journal(self, journal: Path) -> None:
        start, offset = start_event(journal), read_offset(journal)
        parent = self._parent_run(journal.parent, journal)
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
            shown = pipeline_run.curve_metrics(event, start["stage"]) | pipeline_run.headlines(event, start["stage"])
            self._log_metrics(parent, mlflow_client.metrics(shown, event["time"], event.get("step", 0)))
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
                self._deliver_start(event, run_id, parent, journal)
            case "dataset" if event["name"].startswith("models/"):
                client.set_tag(run_id, f"md5.{event['name']}", event["digest"])
            case "dataset":
                client.log_inputs(run_id, [mlflow_client.to_dataset_input(event)])
            case "outputs":
                self._log_digests(run_id, event["digests"])
                self._log_digests(parent, event["digests"])
            case "artifact":
                for run in (run_id, parent) if event["name"] in REPORTS else (run_id,):
                    log_artifact(client, run, files / event["name"])
            case "table":
                for run in (run_id, parent):
                    log_table(client, run, files / "tables" / event["name"])
            case "model":
                self._deliver_model(event["name"], run_id, parent, journal)
            case "end":
                client.set_terminated(run_id, event["status"], event["time"])

    def _deliver_start(self, event: Event, run_id: str, parent: str, journal: Path) -> None:
        """Log params and environment; on the pipeline's run all params, and what the stages before this one left."""
        client, stage = self.connection[0], event["stage"]
        machine = {f"environment.{key}": value for key, value in event.get("environment", {}).items()}
        mlflow_client.log_params(client, run_id, event["params"] | machine)
        mlflow_client.log_params(client, parent, event["params"] | pipeline_run.all_params(journal) | machine)
        self._log_digests(parent, pipeline_run.lock_digests(journal, stage))
        ran = {start_event(each)["stage"] for each in list_journals(journal.parent)}
        known = client.get_run(parent).data.metrics
        for name, points in pipeline_run.skipped_curves(journal, stage, ran).items():
            if name not in known:
                curve = [mlflow_client.metrics({name: loss}, event["time"], step)[0] for step, loss in points]
                self._log_metrics(parent, curve)

    def _deliver_model(self, name: str, run_id: str, parent: str, journal: Path) -> None:
        """Register a model folder, unless a version has its bytes; show it on the runs that have it."""
        from mlflow.entities import LoggedModelOutput

        client, experiment = self.connection
        folder = journal / "files" / "models" / name
        md5 = path_md5(folder)
        version = registry.find_version(client, name, md5) if md5 else None
        if version is None:
            origin = self._origin(name, md5 or "", run_id, parent, journal)
            code = journal / "files/code/llm"
            version = registry.register(client, experiment, name, folder, code, origin)
        for run in (parent, run_id):
            client.set_tag(run, name, f"version {version.version}")
            outputs = client.get_run(run).outputs
            shown = {each.model_id for each in outputs.model_outputs} if outputs else set()
            if (model := registry.model_id(version)) not in shown:
                client.log_outputs(run, [LoggedModelOutput(model, 0)])

    def _origin(self, name: str, md5: str, run_id: str, parent: str, journal: Path) -> registry.Origin:
        """Return the lineage of a model: the run of its training, here or earlier, and what is known of it."""
        client, experiment = self.connection
        folder = f"models/{name.removeprefix(registry.PREFIX)}"
        stage = pipeline_run.producer(journal, folder) or start_event(journal)["stage"]
        runs = {each.info.run_name: each.info.run_id for each in self._children(parent)}
        found = registry.find_training(client, experiment, folder, md5, stage)
        trained = found or client.get_run(runs.get(stage, run_id))
        lineage = {"stage": stage, "run.pipeline": parent} | {f"run.{each}": run for each, run in sorted(runs.items())}
        lineage[f"run.{stage}"] = trained.info.run_id
        lineage |= registry.commit_tags(trained.data.tags)
        data = pipeline_run.lock_digests(journal, start_event(journal)["stage"])
        lineage |= {f"md5.{path}": digest for path, digest in data.items() if path.startswith("data/")}
        return registry.Origin(
            run_id=trained.info.run_id,
            params=pipeline_run.stage_params(journal, stage),
            metrics=registry.metrics_of(name, pipeline_run.summary_of(journal)),
            tags=lineage,
        )

    def _children(self, parent: str) -> list[Run]:
        client, experiment = self.connection
        return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"))

    def _deliver_timeline(self, pipeline: Path) -> None:
        """Log a changed time line to the parent run; `timeline.json` says which one it has."""
        delivered = {"server": redact_urls(tracking_uri()), "md5": timeline_md5(pipeline)}
        if delivered["md5"] is None or read_if_exists(pipeline / "timeline.json") == delivered:
            return
        parent = self._parent_run(pipeline, list_journals(pipeline)[0])
        for name in (timeline.PICTURE, timeline.CURVES, timeline.TABLE):
            if (pipeline / name).exists():
                self.connection[0].log_artifact(parent, str(pipeline / name))
        write_atomic(pipeline / "timeline.json", json.dumps(delivered))

    def _set_status(self, pipeline: Path) -> None:
        """Set the parent run's status: running while a stage is, then that of the worst stage."""
        status, ended = journal_reader.pipeline_status(pipeline)
        if self._statuses.get(pipeline) == (status, ended):
            return
        parent = self._parent_run(pipeline, list_journals(pipeline)[0])
        if status == "RUNNING":
            self.connection[0].update_run(parent, status)
        else:
            self.connection[0].set_terminated(parent, status, ended)
        self._statuses[pipeline] = status, ended


def log_artifact(client: MlflowClient, run_id: str, path: Path) -> None:
    """Log a file, or a folder under its name."""
    if path.is_dir():
        client.log_artifacts(run_id, str(path), path.name)
    else:
        client.log_artifact(run_id, str(path))


def log_table(client: MlflowClient, run_id: str, path: Path) -> None:
    """Log the rows of a file as a table, unless the run has it: MLflow would add them to those that are there."""
    import pandas as pd

    folder = "tables" if path.suffix == ".csv" else "predictions"
    name = f"{folder}/{path.stem}.json"
    if name not in {each.path for each in client.list_artifacts(run_id, folder)}:
        if path.suffix == ".csv":
            rows = pd.read_csv(path)
        else:
            rows = pd.json_normalize([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        client.log_table(run_id, rows, name)
