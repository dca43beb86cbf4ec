"""What all stages share: parameters, inputs, one process at a time, signals, metrics files, errors in one line.

A stage is a function of one argument, run as a module from the repository's root:

    def pretrain(run: Run) -> None:
        ...

    if __name__ == "__main__":
        main("pretrain", pretrain)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TextIO

import yaml

from llm.common.errors import InputError
from llm.common.files import write_atomic
from llm.config import Params, parse_params
from stages.tracking.journal import Clock, Journal, repository

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM}
NO_MEMORY = re.compile("can't allocate memory|out of memory")  # torch on a CPU, on CUDA
LOCK_PATIENCE = 5.0  # seconds in which a stage that is just ending may free its lock


# ---- what a stage gets -----------------------------------------------------------------------------------------------


class Run:
    """One execution of one stage: its parameters, its place for resumable state, and where its figures go."""

    def __init__(
        self, stage: str, params: Params, state_dir: Path, journal: Journal, stable_dir: Path | None = None
    ) -> None:
        self.stage = stage
        self.params = params
        self.state_dir = state_dir  # survives a kill, and only the same inputs find it again; removed after success
        self.stable_dir = (
            stable_dir  # survives success too; a pretraining of another length finds it (`pre_decay_inputs`)
        )
        self.stop_requested = False
        self.phase = journal.clock  # `with run.phase("saving"):` says what the time in it goes to; it begins with data
        self._journal = journal

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Cheap, and never raises: tracking must not hurt a training."""
        with self.phase("tracking"):
            self._journal.metrics(metrics, step)

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Writes `reports/metrics/<stage>.json`, which DVC compares; logs its numbers, nested ones as `a/b`."""
        values = _rounded(values)
        path = Path("reports/metrics") / f"{self.stage.replace('-', '_')}.json"
        with self.phase("saving"):
            write_atomic(path, json.dumps(values, indent=2) + "\n")
        with self.phase("tracking"):
            self._journal.summary({k: v for k, v in flatten(values, "/").items() if isinstance(v, int | float)})

    def log_as(self, prefix: str) -> Callable[[Mapping[str, float], int], None]:
        """`log` for a second training of the stage: `prefix/train/loss` and so on."""
        return lambda metrics, step: self.log({f"{prefix}/{name}": value for name, value in metrics.items()}, step)

    def write_history(self, rows: list[dict[str, float]]) -> None:
        """Writes a training's evaluations to `reports/plots/<stage>.csv`, which DVC plots."""
        lines = [",".join(rows[0])] + [",".join(f"{value:.6g}" for value in row.values()) for row in rows]
        with self.phase("saving"):
            write_atomic(Path("reports/plots") / f"{self.stage.replace('-', '_')}.csv", "\n".join(lines) + "\n")

    def artifact(self, path: Path) -> None:
        """Attaches a small file or folder, as it is now, to the tracked run."""
        with self.phase("tracking"):
            self._journal.artifact(path)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Names data that the run used: an md5, where it came from, and what for (`train`, `val`, `test`)."""
        with self.phase("tracking"):
            self._journal.dataset(name, digest, source, context)

    def register(self, name: str, folder: Path) -> None:
        """Hands a model folder over to the model registry under this name."""
        with self.phase("tracking"):
            self._journal.model(name, folder)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Within it the first SIGTERM or SIGINT only sets `stop_requested`, so that the training can save its state.

        The stage then ends where the block ends; a second signal ends it at once.
        """
        received: list[signal.Signals] = []

        def handler(number: int, frame: FrameType | None) -> None:
            if received:
                _leave(number, frame)
            received.append(signal.Signals(number))
            self.stop_requested = True

        previous = {number: signal.signal(number, handler) for number in EXIT_STATUS}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)
        if received:
            print(f"{self.stage}: stopped by {received[0].name}; run it again to go on from here", file=sys.stderr)
            raise SystemExit(EXIT_STATUS[received[0]])


Body = Callable[[Run], None]


def run_stage(stage: str, body: Body) -> None:
    """Runs `body` with its lock, its state and its journal, and sees to it that what it read has not changed since."""
    clock = Clock()
    clock.enter("data")
    values = read_yaml(Path("params.yaml"))
    params = parse_params(values)
    work = Path(".work", stage)
    with locked(work / "lock", LOCK_PATIENCE) as holder:
        if holder is not None:
            raise InputError(f"already runs here as process {holder}; wait for it, or end it with: kill {holder}")
        inputs = read_inputs(stage, values)
        told = {key: value for key, value in inputs.params.items() if key not in ("sources", "gpt2_files")}
        last = list(read_yaml(Path("dvc.yaml"))["stages"])[-1] == stage
        digests = data_digests(inputs)
        with clock("tracking"):
            journal = Journal.start(stage, flatten(told), params.data.corpus, last, clock)
            for name, digest in digests.items():
                journal.dataset(name, digest, name, stage)
        status = "FAILED"
        try:
            stable = pre_decay_inputs(inputs)
            with (
                state_folder(stage, fingerprint(inputs, params)) as state_dir,
                nullcontext()
                if stable is None
                else state_folder(stage, fingerprint(stable, params), keep=True) as kept,
            ):
                with clock("tracking"):
                    journal.resume(state_dir, kept, params.pretrain.stable_steps)
                body(Run(stage, params, state_dir, journal, stable_dir=kept))
                check_unchanged(inputs, read_inputs(stage, read_yaml(Path("params.yaml")), inputs.files))
            status = "FINISHED"
        except SystemExit as error:
            status = "KILLED" if error.code in EXIT_STATUS.values() else "FAILED"
            raise
        finally:
            try:
                with clock("tracking"):
                    journal.end(status)
            except SystemExit:
                if status != "FINISHED":
                    raise  # else all is done, and asked to stop it only does not wait for the delivery


def main(stage: str, body: Body, execute: Callable[[str, Body], None] = run_stage) -> None:
    """Runs `body` and ends the process: 0 done, 1 error, 143 SIGTERM, 130 SIGINT.

    Errors that the user can act on are one line on stderr, all others keep their traceback.
    """
    for number in EXIT_STATUS:
        signal.signal(number, _leave)
    try:
        execute(stage, body)
    except InputError as error:
        sys.exit(f"{stage}: {error}")
    except Exception as error:
        lacking = resource_error(error)
        if lacking is None:
            raise
        sys.exit(f"{stage}: {lacking}")


def resource_error(error: Exception) -> str | None:
    """What the machine refused, in a line: room on a disk, permission, memory; None for any other error."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return f"{error.filename or 'writing'}: {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        return "out of memory; a training with a smaller batch_size and a larger grad_accum_steps needs less"
    return None


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_STATUS[signal.Signals(number)])


# ---- inputs ----------------------------------------------------------------------------------------------------------


class FileState(NamedTuple):
    stamp: tuple[int, int, int]  # size, modification time, inode: unchanged, they spare reading the file again
    md5: str


class Inputs(NamedTuple):
    """Everything that the stage's entry in `dvc.yaml` lists, with its content."""

    params: dict[str, Any]
    deps: list[str]  # files and folders
    files: dict[str, FileState]  # each file of them


def read_inputs(stage: str, values: Mapping[str, Any], known: Mapping[str, FileState] | None = None) -> Inputs:
    """Reads the stage's `params` and `deps`; a file in `known` and untouched since keeps its md5 unread."""
    stages = read_yaml(Path("dvc.yaml")).get("stages", {})
    if stage not in stages:
        raise InputError(f"dvc.yaml: no stage {stage!r}")
    params = {key: _lookup(values, key) for key in stages[stage].get("params", [])}
    deps: list[str] = stages[stage].get("deps", [])
    files: dict[str, FileState] = {}
    for dep in deps:
        if not Path(dep).exists():
            raise InputError(f"{dep}: missing, and this stage reads it; `dvc repro {stage}` makes it first")
        for path in files_under(Path(dep)):
            files[path.as_posix()] = _file_state(path, (known or {}).get(path.as_posix()))
    return Inputs(params, deps, files)


def fingerprint(inputs: Inputs, params: Params) -> str:
    """Names a training state: equal for equal inputs on the same kind of device with the same torch."""
    machine: list[str] = []
    if "torch" in sys.modules:
        machine = [importlib.metadata.version("torch"), device_kind(params.runtime.device)]
    content = [inputs.params, {path: state.md5 for path, state in inputs.files.items()}, machine]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def pre_decay_inputs(inputs: Inputs) -> Inputs | None:
    """With schedule wsd what a pretraining depends on before its decay, so that it can be prolonged from there."""
    section = inputs.params.get("pretrain")
    if section is None or section["schedule"] != "wsd":
        return None
    lasting = {key: value for key, value in section.items() if key not in ("max_steps", "decay_steps")}
    return inputs._replace(params=inputs.params | {"pretrain": lasting})


def data_digests(inputs: Inputs) -> dict[str, str]:
    """The md5 of each dep under `data/` and `models/`, as it stands in `dvc.lock` (a folder's there ends in `.dir`)."""
    digests: dict[str, str] = {}
    for dep in inputs.deps:
        if dep in inputs.files:
            digests[dep] = inputs.files[dep].md5
        else:
            inside = sorted(path for path in inputs.files if path.startswith(f"{dep}/"))
            entries = [{"md5": inputs.files[path].md5, "relpath": path.removeprefix(f"{dep}/")} for path in inside]
            digests[dep] = hashlib.md5(json.dumps(entries).encode()).hexdigest()
    return {dep: digest for dep, digest in digests.items() if dep.startswith(("data/", "models/"))}


def check_unchanged(before: Inputs, after: Inputs) -> None:
    """DVC records what it finds after the stage: what changed meanwhile would be taken for what made the outputs."""
    old = {path: state.md5 for path, state in before.files.items()} | flatten(before.params)
    new = {path: state.md5 for path, state in after.files.items()} | flatten(after.params)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise InputError(f"{changed[0]}{more} changed while the stage ran, so its outputs do not count; run it again")


def files_under(path: Path) -> list[Path]:
    """The file itself, or all files of a folder in a fixed order, without Python's caches."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def device_kind(device: str) -> str:
    """`auto` resolved: cuda, mps or cpu."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found in {Path.cwd()}; run from the repository's root") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys with values, found {type(values).__name__}")
    return values


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise InputError(f"params.yaml: no key {key}, which dvc.yaml lists")
        found = found[part]
    return found


def _file_state(path: Path, known: FileState | None) -> FileState:
    stat = path.stat()
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if known is not None and known.stamp == stamp:
        return known
    with path.open("rb") as file:
        return FileState(stamp, hashlib.file_digest(file, "md5").hexdigest())


# ---- one process at a time -------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[int | None]:
    """Yields None when this process holds the lock, else the id of the process that still does after the patience.

    POSIX record locks: gone with their process however it ends, and never inherited by its worker processes.
    """
    taken = _take(path, patience)
    if isinstance(taken, int):
        yield taken
    else:
        with taken:
            yield None


def _take(path: Path, patience: float) -> TextIO | int:
    deadline = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            if time.monotonic() >= deadline and holder:
                return int(holder)
            time.sleep(0.1)
            continue
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()  # its folder was removed by the holder before we had the lock


@contextmanager
def state_folder(stage: str, name: str, keep: bool = False) -> Iterator[Path]:
    """The folder of this fingerprint's training state, in the repository even for DVC's temporary experiment copies.

    Experiments of a queue may reach the same inputs at the same time: each then takes the first folder that is free.
    A failure leaves what the stage saved there, success leaves nothing unless it is to `keep`.
    """
    for number in count():
        folder = repository() / ".work" / stage / (name[:16] if number == 0 else f"{name[:16]}-{number}")
        with locked(folder / "lock") as holder:
            if holder is not None:
                continue
            try:
                yield folder
                if not keep:
                    shutil.rmtree(folder)
            finally:
                if folder.exists() and {path.name for path in folder.iterdir()} <= {"lock", "journals"}:
                    shutil.rmtree(folder)  # nothing was saved
            return


# ---- small things ----------------------------------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{inner}": v for inner, v in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat


def _rounded(value: Any) -> Any:
    """Six significant digits: enough to compare, without the noise of the last bits. JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
