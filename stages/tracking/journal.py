"""The record of a run: a local, append-only journal. Nothing here knows MLflow, so nothing of it can hurt a training.

    .work/runs/<pipeline>/                        one folder for each invocation of `dvc repro` or `dvc exp run`
        <stage>-<id>/events.jsonl                 one journal for each stage that ran in it, one event a line
        <stage>-<id>/times.json                   what the stage has spent its time on until then
        <stage>-<id>/files/                       reports and models as they were, until they are delivered
        delivery.log                              what the delivering process said

`stages.sync`, a process of its own, follows the journals of a pipeline and brings them to MLflow; it may be slow, fail
or be missing without the stage noticing. `LLM_TRACKING=off` leaves it out, the journals remain.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

import llm

SAMPLE_INTERVAL = 10.0  # seconds between system metrics
DELIVERY_PATIENCE = 20.0  # seconds that the end of the last stage waits for MLflow
MODEL_PATIENCE = 120.0  # and when it handed over models


# ---- where -----------------------------------------------------------------------------------------------------------


def repository() -> Path:
    """The user's repository: DVC names it in DVC_ROOT, also to the stages of a temporary experiment copy."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def runs_folder() -> Path:
    return repository() / ".work" / "runs"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a database in the repository, wherever DVC runs the stage."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository().resolve()}/mlflow.db"


def printable(text: str) -> str:
    """An address, or a text with one in it, without user, password and query."""
    return re.sub(r"(//[^\s?'\"]*)\?[^\s'\"]*", r"\1", re.sub(r"//[^/\s]*@", "//", text))


class Process(NamedTuple):
    """A process that can be asked for later: ids are used again, so the start counts too."""

    pid: int
    started: int  # seconds
    host: str

    @classmethod
    def of(cls, process: psutil.Process) -> Process:
        return cls(process.pid, int(process.create_time()), socket.gethostname())

    def is_gone(self) -> bool:
        """False also for what cannot be known: a process of another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True


def invocation() -> Process:
    """The `dvc` process that started this stage, else the stage itself, run by hand."""
    own = psutil.Process()
    for ancestor in own.parents():
        try:
            words = ancestor.cmdline()[:3]  # dvc repro; python .venv/bin/dvc repro; python -m dvc repro
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in words):
            return Process.of(ancestor)
    return Process.of(own)


def pipeline_name(process: Process) -> str:
    """One folder for all stages of an invocation; sorted by time, and unique on a server that machines share."""
    place = hashlib.md5(f"{process} {repository().resolve()}".encode()).hexdigest()[:8]
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(process.started))}-{place}"


# ---- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """What a process spends its time on, from its start on: it is always in one phase, which an inner one interrupts.

        with clock("saving"):
            ...

    Cheap enough for every step of a training.
    """

    def __init__(self) -> None:
        began = time.perf_counter() - age(psutil.Process())
        self._state: tuple[dict[str, float], str, float] = {}, "start-up", began  # replaced as one: threads read it

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._state[1]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, phase: str) -> None:
        """Ends the present phase."""
        now = time.perf_counter()
        self._state = self._sums(now), phase, now

    def seconds(self) -> dict[str, float]:
        """For each phase, how long it took in all until now."""
        return self._sums(time.perf_counter())

    def _sums(self, now: float) -> dict[str, float]:
        sums, phase, since = self._state
        return sums | {phase: sums.get(phase, 0.0) + now - since}


def age(process: psutil.Process) -> float:
    """Seconds since the process was started."""
    created: float = process.create_time()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time() - created
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (created - psutil.boot_time())  # which is rounded in both


# ---- the journal -----------------------------------------------------------------------------------------------------


class Journal:
    """Writes one run's events. After `start`, nothing raises: a record that cannot be written is one line on stderr."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self.folder = folder
        self.clock = clock or Clock()
        self.patience = 0.0
        self._warned = False
        self._torn = ""  # a line's end, after a line that a full disk cut
        self._sampler: Sampler | None = None
        self._earlier: dict[str, list[dict[str, Any]]] = {}

    @classmethod
    def start(
        cls, stage: str, params: Mapping[str, Any], corpus: str, last: bool = True, clock: Clock | None = None
    ) -> Journal:
        """Opens the journal of a stage and, unless tracking is off, starts its delivery and the system metrics.

        `last` says that no stage follows in the pipeline: its end waits a while for what is still to be delivered.
        """
        process, own = invocation(), Process.of(psutil.Process())
        pipeline = pipeline_name(process)
        journal = cls(runs_folder() / pipeline / f"{stage}-{uuid.uuid4().hex[:8]}", clock)
        tags = git_tags() | dvc_tags()
        journal._write(
            event="start",
            stage=stage,
            pipeline=pipeline,
            title=os.environ.get("DVC_EXP_NAME") or f"{tags.get('mlflow.source.git.commit', 'run')[:7]} {corpus}",
            process=own._asdict(),
            invoked=time.time() - age(psutil.Process(process.pid)),
            params={key: str(value)[:6000] for key, value in params.items()},
            tags=tags,
        )
        journal.note_times()
        try:
            journal._sampler = Sampler(journal)
        except (psutil.Error, OSError, RuntimeError) as error:
            journal._warn(f"no system metrics: {error}")
        if os.environ.get("LLM_TRACKING", "on") != "off":
            journal.patience = DELIVERY_PATIENCE if last or process == own else 0.0
            journal._deliver(pipeline, process)
        return journal

    def resume(self, state: Path, kept: Path | None = None, last_step: int = 0) -> None:
        """Takes over the curves of the runs before this one that the state folder lists, and enlists this one.

        A resumed training logs only what comes after its last saved state. The points before it are copied as soon as
        it is known where each metric goes on, so that its curve is whole and no step is in it twice.

        A training that has no state of its own begins with what is in the folder `kept`, and so does its list. Those
        that will prolong this one have its curves up to `last_step`.
        """
        journals = state / "journals"
        try:
            before = kept / "journals" if kept is not None and not journals.exists() else journals
            lines = before.read_text(encoding="utf-8").splitlines() if before.exists() else []
            for line in lines:
                folder, _, last = line.partition("\t")
                for event in read_events(Path(folder)):
                    if event["event"] != "metrics" or event["step"] > float(last or "inf"):
                        continue
                    for key, value in event["values"].items():
                        if not key.startswith("system/"):
                            curve = self._earlier.setdefault(key, [])
                            while curve and curve[-1]["step"] >= event["step"]:
                                curve.pop()
                            curve.append(event | {"values": {key: value}})
            own = str(self.folder.resolve())
            with journals.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in ([own] if before == journals else [*lines, own])))
            if kept is not None:
                lasting = [line if "\t" in line else f"{line}\t{last_step}" for line in [*lines, own]]
                (kept / "journals").write_text("".join(f"{line}\n" for line in lasting), encoding="utf-8")
        except (OSError, ValueError) as error:
            self._warn(f"the record of the interrupted run is not taken over: {error}")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for key in self._earlier.keys() & values.keys():
            self._take_over(key, step)
        self._write(event="metrics", step=step, values=values)

    def _take_over(self, key: str, before: float) -> None:
        for event in self._earlier.pop(key):
            if event["step"] < before:
                self._write(**event)

    def summary(self, values: Mapping[str, float]) -> None:
        """Final figures: they also stand beside the other stages' in the pipeline's own run."""
        self._write(event="summary", values=values)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self._write(event="dataset", name=name, digest=digest, source=source, context=context)

    def artifact(self, path: Path) -> None:
        """Keeps a copy: the file may change before it is delivered."""
        if self._keep(path, path.name):
            self._write(event="artifact", name=path.name)

    def model(self, name: str, folder: Path) -> None:
        """Keeps the model folder and the code that loads it, at no cost where the file system has links."""
        if self._keep(folder, f"models/{name}", link=True) and self._keep(Path(llm.__file__).parent, "code/llm"):
            self._write(event="model", name=name)
            self.patience = self.patience and MODEL_PATIENCE

    def end(self, status: str) -> None:
        """`status` is FINISHED, FAILED or KILLED. Only a good end waits for the delivery, and not for a dead server."""
        if self._sampler is not None:
            self._sampler.stop()
        for key in list(self._earlier):
            self._take_over(key, before=float("inf"))
        self._write(event="metrics", step=0, values={f"time/{k}": round(v, 3) for k, v in self.clock.seconds().items()})
        self.note_times()
        self._write(event="end", status=status)
        problem = delivery_problem(self.folder.parent)
        deadline = time.monotonic() + (self.patience if status == "FINISHED" else 0.0)
        try:
            while problem is None and time.monotonic() < deadline and not is_delivered(self.folder):
                time.sleep(0.1)
                problem = delivery_problem(self.folder.parent)
        finally:
            self.note_times()  # the waiting counts too
        if problem or (status == "FINISHED" and self.patience and not is_delivered(self.folder)):
            self._warn(f"{problem or 'not all delivered yet'}; the record is kept: python -m stages.sync delivers it")

    def note_times(self) -> None:
        """What the stage has spent its time on until now, beside the events: the last note is the one that counts."""
        seconds, now = self.clock.seconds(), time.time()
        note = {"began": now - sum(seconds.values()), "until": now, "seconds": seconds}
        draft = self.folder / "times.json.partial"
        try:
            draft.write_text(json.dumps(note), encoding="utf-8")
            draft.replace(self.folder / "times.json")
        except OSError as error:
            self._warn(f"the time line is not recorded: {error}")

    def _deliver(self, pipeline: str, process: Process) -> None:
        """Starts the process that delivers; where one already follows this pipeline, the new one ends at once."""
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_RUN_ID"}  # it would hijack every new run
        environment["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        environment |= {"DVC_ROOT": str(repository().resolve()), "OMP_NUM_THREADS": "1"}  # the training needs the cores
        try:
            with (self.folder.parent / "delivery.log").open("ab") as log:
                subprocess.Popen(
                    [sys.executable, "-m", "stages.tracking.delivery", "--follow", pipeline, json.dumps(process)],
                    cwd=repository(),  # a temporary experiment copy is gone before everything is delivered
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is meant for the stage
                )
        except OSError as error:
            self._warn(f"no delivery: {error}")

    def _keep(self, path: Path, name: str, link: bool = False) -> bool:
        target = self.folder / "files" / name
        copy = _link_or_copy if link else shutil.copy2
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

    def _write(self, **event: Any) -> None:
        try:
            line = json.dumps({"time": int(time.time() * 1000)} | event, default=float)
            content = f"{self._torn}{line}\n".encode()
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "events.jsonl").open("ab", buffering=0) as file:
                written = file.write(content)  # one write: lines of two threads never mix
            self._torn = "" if written == len(content) else "\n"
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, TypeError, ValueError) as error:
            self._warn(f"{event['event']} is not recorded: {error}")

    def _warn(self, message: str) -> None:
        if not self._warned:
            print(f"tracking: {message}", file=sys.stderr)
        self._warned = True


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal; a process may have died in the middle of one."""
    events = []
    for line in (folder / "events.jsonl").read_bytes().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def is_delivered(folder: Path) -> bool:
    return (folder / "delivered").exists()


def delivery_problem(pipeline: Path) -> str | None:
    """Why the last attempt at delivering failed, in one line; None if it did not."""
    try:
        return (pipeline / "problem").read_text(encoding="utf-8")
    except OSError:
        return None


# ---- what is noted at the start, and meanwhile -----------------------------------------------------------------------


def git_tags() -> dict[str, str]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "mlflow.source.git.branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}  # no git, or no commit yet


def dvc_tags() -> dict[str, str]:
    names = {"dvc.stage": "DVC_STAGE", "dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


class Sampler(threading.Thread):
    """Load of the machine, under the names that MLflow shows as system metrics, regularly and once at the end."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(name="system metrics", daemon=True)
        self._journal = journal
        self._ended = threading.Event()
        self._step = 0
        self._own = psutil.Process()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call starts the measurement
        self.start()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_INTERVAL):
            self._sample()

    def stop(self) -> None:
        self._ended.set()
        self.join()
        self._sample()

    def _sample(self) -> None:
        self._journal.note_times()
        try:
            values = self._load()
        except (psutil.Error, OSError, RuntimeError):
            return  # a missing sample is no reason to stop
        self._journal.metrics({f"system/{name}": round(value, 2) for name, value in values.items()}, self._step)
        self._step += 1

    def _load(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(".")
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": self._own.memory_info().rss / 1e6,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:  # None where there is no network at all
            values["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        return values | gpu_memory()


def gpu_memory() -> dict[str, float]:
    """Only where torch already works on a GPU: asking earlier would take memory there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    values: dict[str, float] = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        values[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / 1e6
        values[f"gpu_{number}_memory_usage_percentage"] = 100 * (1 - free / total)
    return values
