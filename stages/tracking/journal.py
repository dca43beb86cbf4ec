"""Writer of a run's local, append-only journal. It knows nothing of MLflow, so MLflow cannot hurt a training.

    .work/runs/<pipeline>/                        one folder for each invocation of `dvc repro` or `dvc exp run`
        <stage>-<id>/events.jsonl                 one journal for each stage that ran in it, one event a line
        <stage>-<id>/times.json                   seconds of each phase until then
        <stage>-<id>/files/                       copies of reports and models until they are delivered
        delivery.log                              output of the delivering process

`python -m stages.sync --follow`, a process of its own, delivers the journals of a pipeline to MLflow. It may be slow or
fail without the stage noticing. `LLM_TRACKING=off` leaves it out, the journals remain.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

import llm
from llm.common.files import write_atomic
from stages.tracking.clock import Clock
from stages.tracking.process import Process, invocation, pipeline_name, process_age, repository, runs_folder
from stages.tracking.provenance import copy_description, dvc_tags, git_tags, in_workspace
from stages.tracking.system_metrics import SystemMetricsMonitor

DELIVERY_TIMEOUT = 20.0  # seconds that the end of the last stage waits for MLflow
MODEL_DELIVERY_TIMEOUT = 120.0  # the same where models are registered

Event = dict[str, Any]
logger = logging.getLogger("llm")


class Journal:
    """Writer of one run's events. After `start` nothing raises: the first event that is not recorded is a warning."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self.folder = folder
        self.clock = clock or Clock()
        self.delivery_timeout = 0.0
        self._warned = False
        self._line_end = ""  # missing after a line that a full disk cut
        self._monitor: SystemMetricsMonitor | None = None
        self._earlier_curves: dict[str, list[Event]] = {}  # by metric

    @classmethod
    def start(
        cls,
        stage: str,
        params: Mapping[str, Any],
        corpus: str,
        is_last: bool = True,
        clock: Clock | None = None,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Journal:
        """Open the journal of a stage; start the system metrics and, unless tracking is off, the delivery.

        The end of the pipeline's last stage waits a while for the delivery.
        """
        process, own = invocation(), Process.from_psutil(psutil.Process())
        pipeline = pipeline_name(process)
        journal = cls(runs_folder() / pipeline / f"{stage}-{uuid.uuid4().hex[:8]}", clock)
        tags = git_tags() | dvc_tags()
        journal.write(
            event="start",
            stage=stage,
            pipeline=pipeline,
            title=os.environ.get("DVC_EXP_NAME") or f"{tags.get('mlflow.source.git.commit', 'run')[:7]} {corpus}",
            process=own._asdict(),
            invoked=time.time() - process_age(psutil.Process(process.pid)),
            params={key: str(value)[:6000] for key, value in params.items()},
            tags=tags,
            environment=environment or {},
            workspace=in_workspace(),
        )
        try:
            copy_description(journal.folder / "files" / "pipeline")
        except OSError as error:
            journal._warn(f"the pipeline's description is not recorded: {error}")
        journal.write_times()
        try:
            journal._monitor = SystemMetricsMonitor(journal._system_metrics)
        except (psutil.Error, OSError, RuntimeError) as error:
            journal._warn(f"no system metrics: {error}")
        if os.environ.get("LLM_TRACKING", "on") != "off":
            journal.delivery_timeout = DELIVERY_TIMEOUT if is_last or process == own else 0.0
            try:
                start_delivery(pipeline, process, journal.folder.parent / "delivery.log")
            except OSError as error:
                journal._warn(f"no delivery: {error}")
        return journal

    def resume(self, state_dir: Path, stable_dir: Path | None = None, stable_steps: int = 0) -> None:
        """Read the curves of this training's earlier runs, and list this run for later ones.

        A resumed training logs only what follows its checkpoint. The points before are copied as soon as the step is
        known at which a metric continues, so that its curve is whole and has each step once.

        A training without a list of its own resumes from the checkpoint before the decay, and from the list there.
        Runs that continue this one from there have its curves up to `stable_steps`.
        """
        own_list, stable_list = state_dir / "journals", stable_dir and stable_dir / "journals"
        try:
            source = stable_list if stable_list is not None and not own_list.exists() else own_list
            lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
            self._earlier_curves = read_curves(lines)
            own = str(self.folder.resolve())
            with own_list.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in ([own] if source == own_list else [*lines, own])))
            if stable_list is not None:
                limited = [line if "\t" in line else f"{line}\t{stable_steps}" for line in [*lines, own]]
                stable_list.write_text("".join(f"{line}\n" for line in limited), encoding="utf-8")
        except (OSError, ValueError) as error:
            self._warn(f"the record of the interrupted run is not taken over: {error}")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for key in self._earlier_curves.keys() & values.keys():
            self._copy_earlier(key, step)
        self.write(event="metrics", step=step, values=values)

    def _copy_earlier(self, key: str, before: float) -> None:
        for event in self._earlier_curves.pop(key):
            if event["step"] < before:
                self.write(**event)

    def _system_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.write_times()
        if values:
            self.metrics(values, step)

    def summary(self, values: Mapping[str, float]) -> None:
        """Record final metrics, which the pipeline's own run shows too."""
        self.write(event="summary", values=values)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record an input: its md5, origin and use."""
        self.write(event="dataset", name=name, digest=digest, source=source, context=context)

    def outputs(self, digests: Mapping[str, str]) -> None:
        """Record the md5 of each output."""
        self.write(event="outputs", digests=digests)

    def artifact(self, path: Path) -> None:
        """Record a copy of a file or folder, which may change before it is delivered."""
        if self._copy(path, path.name):
            self.write(event="artifact", name=path.name)

    def table(self, path: Path) -> None:
        """Record a copy of a file of rows, which MLflow shows as a table and compares between runs."""
        if self._copy(path, f"tables/{path.name}"):
            self.write(event="table", name=path.name)

    def register_model(self, name: str, folder: Path) -> None:
        """Record a model folder and the code that loads it, as hard links where the file system has them."""
        if self._copy(folder, f"models/{name}", link=True) and self._copy(Path(llm.__file__).parent, "code/llm"):
            self.write(event="model", name=name)
            self.delivery_timeout = self.delivery_timeout and MODEL_DELIVERY_TIMEOUT

    def end(self, status: str) -> None:
        """Record the end: FINISHED, FAILED or KILLED. Only FINISHED waits for the delivery, unless that has failed."""
        if self._monitor is not None:
            self._monitor.stop()
        for key in list(self._earlier_curves):
            self._copy_earlier(key, before=float("inf"))
        self.write(event="metrics", step=0, values={f"time/{k}": round(v, 3) for k, v in self.clock.seconds().items()})
        self.write_times()
        self.write(event="end", status=status)
        timeout = self.delivery_timeout if status == "FINISHED" else 0.0
        deadline = time.monotonic() + timeout
        try:
            while not (problem := delivery_problem(self.folder.parent)) and time.monotonic() < deadline:
                if is_delivered(self.folder):
                    break
                time.sleep(0.1)
        finally:
            self.write_times()  # the waiting counts too
        if problem or (timeout and not is_delivered(self.folder)):
            self._warn(f"{problem or 'not all delivered yet'}; the record is kept: python -m stages.sync delivers it")

    def write_times(self) -> None:
        """Write the seconds of each phase until now beside the events, in place of the last ones."""
        seconds, now = self.clock.seconds(), time.time()
        times = {"began": now - sum(seconds.values()), "until": now, "seconds": seconds}
        try:
            write_atomic(self.folder / "times.json", json.dumps(times))
        except OSError as error:
            self._warn(f"the time line is not recorded: {error}")

    def write(self, **event: Any) -> None:
        """Append an event, with the time in milliseconds."""
        try:
            line = json.dumps({"time": int(time.time() * 1000)} | event, default=float)
            content = f"{self._line_end}{line}\n".encode()
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "events.jsonl").open("ab", buffering=0) as file:
                written = file.write(content)  # one write: lines of two threads never mix
            self._line_end = "" if written == len(content) else "\n"
            if self._line_end:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, TypeError, ValueError) as error:
            self._warn(f"{event['event']} is not recorded: {error}")

    def _copy(self, path: Path, name: str, link: bool = False) -> bool:
        target = self.folder / "files" / name
        copy = link_or_copy if link else shutil.copy2
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, target, copy_function=copy, ignore=ignore, dirs_exist_ok=True)
            else:
                copy(path, target)
        except OSError as error:
            self._warn(f"{path} is not recorded: {error}")
            return False
        return True

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning("tracking: %s", message)
        self._warned = True


def link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---- journals of other runs ------------------------------------------------------------------------------------------


def iter_events(journal: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Yield the whole lines from a byte offset on, each with the offset of the next line."""
    with (journal / "events.jsonl").open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:
                continue  # cut by a kill or a full disk


def read_events(journal: Path) -> list[Event]:
    """Return the events of a journal."""
    return [event for event, _ in iter_events(journal)]


def read_curves(lines: list[str]) -> dict[str, list[Event]]:
    """Return the points of each metric over successive runs, a journal a line: `folder` or `folder TAB last step`."""
    curves: dict[str, list[Event]] = {}
    for line in lines:
        folder, _, last = line.partition("\t")
        for event in read_events(Path(folder)):
            if event["event"] != "metrics" or event["step"] > float(last or "inf"):
                continue
            for key, value in event["values"].items():
                if not key.startswith("system/"):
                    curve = curves.setdefault(key, [])
                    while curve and curve[-1]["step"] >= event["step"]:
                        curve.pop()
                    curve.append(event | {"values": {key: value}})
    return curves


# ---- delivery --------------------------------------------------------------------------------------------------------


def start_delivery(pipeline: str, process: Process, log: Path) -> None:
    """Start the delivering process, which ends at once where another one already follows this pipeline."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_RUN_ID"}  # it would hijack every new run
    environment["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    environment |= {"DVC_ROOT": str(repository().resolve()), "OMP_NUM_THREADS": "1"}  # the training needs the cores
    with log.open("ab") as file:
        subprocess.Popen(
            [sys.executable, "-m", "stages.sync", "--follow", pipeline, json.dumps(process)],
            cwd=repository(),  # a temporary experiment copy is gone before everything is delivered
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is meant for the stage
        )


def is_delivered(journal: Path) -> bool:
    return (journal / "delivered").exists()


def delivery_problem(pipeline: Path) -> str | None:
    """Return the error of the last delivery in one line, None if it succeeded."""
    try:
        return (pipeline / "problem").read_text(encoding="utf-8")
    except OSError:
        return None
