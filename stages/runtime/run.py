"""Run of one stage: parameters, lock, state folder, journal, signals, metrics files, errors in one line.

A stage is a function of one argument, run as a module from the repository's root:

    def pretrain(run: Run) -> None:
        ...

    if __name__ == "__main__":
        main("pretrain", pretrain)
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llm.common.errors import InputError
from llm.common.files import write_atomic
from llm.common.lock import locked
from llm.common.log import setup_logging
from llm.common.namesake import check_namesake
from llm.config import Params, parse_params
from stages.runtime.inputs import (
    Inputs,
    check_unchanged,
    data_digests,
    environment,
    fingerprint,
    flatten,
    output_digests,
    pre_decay_inputs,
    read_inputs,
    read_yaml,
)
from stages.tracking.clock import Clock
from stages.tracking.journal import Journal
from stages.tracking.process import repository

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM}
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")  # torch on a CPU, on CUDA
LOCK_TIMEOUT = 5.0  # seconds in which a stage that is just ending may free its lock

logger = logging.getLogger("llm")


class Run:
    """Run of one stage: its params, its state folder, its journal and its metrics files."""

    def __init__(
        self, stage: str, params: Params, state_dir: Path, journal: Journal, stable_dir: Path | None = None
    ) -> None:
        self.stage = stage
        self.params = params
        self.state_dir = state_dir  # checkpoints, which only the same inputs find again; removed after success
        self.stable_dir = stable_dir  # checkpoints before the decay, kept for a longer pretraining
        self.prefix = ""  # of the metrics' names
        self.stop_requested = False
        self.phase = journal.clock  # `with run.phase("saving"):` counts its time; begins with data
        self._journal = journal

    def child(self, name: str, prefix: str = "") -> Run:
        """Return the run of one of several trainings of the stage: own state folder, `prefix` before its metrics."""
        child = copy.copy(self)
        child.state_dir, child.stable_dir, child.prefix = self.state_dir / name, None, prefix
        return child

    def should_stop(self) -> bool:
        return self.stop_requested

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log to the journal. Cheap, and never raises: tracking must not hurt a training."""
        with self.phase("tracking"):
            self._journal.metrics({f"{self.prefix}{name}": value for name, value in metrics.items()}, step)

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Write `reports/metrics/<stage>.json`, which DVC compares; log its numbers, nested ones as `a/b`."""
        values = rounded(values)
        path = Path("reports/metrics") / f"{self.stage.replace('-', '_')}.json"
        with self.phase("saving"):
            write_atomic(path, json.dumps(values, indent=2) + "\n")
        with self.phase("tracking"):
            self._journal.summary({k: v for k, v in flatten(values, "/").items() if isinstance(v, int | float)})

    def write_history(self, evaluations: list[dict[str, float]], curve: list[dict[str, float]]) -> None:
        """Write a training's evaluations and its curve to `reports/plots/`, as `STAGE.csv` and `STAGE_steps.csv`."""
        name = self.stage.replace("-", "_")
        with self.phase("saving"):
            for file, rows, empty in ((name, evaluations, []), (f"{name}_steps", curve, ["step", "train/loss", "lr"])):
                columns = list(rows[-1]) if rows else empty  # the start has no train/loss: an empty cell
                cells = [[f"{row[column]:.6g}" if column in row else "" for column in columns] for row in rows]
                lines = [",".join(line) for line in (columns, *cells)]
                write_atomic(Path("reports/plots") / f"{file}.csv", "\n".join(lines) + "\n")

    def artifact(self, path: Path) -> None:
        """Log a copy of a small file or folder."""
        with self.phase("tracking"):
            self._journal.artifact(path)

    def table(self, path: Path) -> None:
        """Log the rows of a .csv or .jsonl file as a table."""
        with self.phase("tracking"):
            self._journal.table(path)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Log an input: its md5, origin and use (`train`, `val`, `test`)."""
        with self.phase("tracking"):
            self._journal.dataset(name, digest, source, context)

    def register(self, name: str, folder: Path) -> None:
        """Register a model folder under this name."""
        with self.phase("tracking"):
            self._journal.register_model(name, folder)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Defer the first SIGTERM or SIGINT to the end of the block, which `stop_requested` asks for.

        A training has time to save a checkpoint. A second signal ends the stage at once.
        """
        received: list[signal.Signals] = []

        def handler(number: int, frame: FrameType | None) -> None:
            if received:
                exit_on_signal(number, frame)
            received.append(signal.Signals(number))
            self.stop_requested = True

        previous = {number: signal.signal(number, handler) for number in EXIT_STATUS}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)
        if received:
            logger.warning("%s: stopped by %s; run it again to go on from here", self.stage, received[0].name)
            raise SystemExit(EXIT_STATUS[received[0]])


Body = Callable[[Run], None]


def run_stage(stage: str, body: Body) -> None:
    """Run `body` under the stage's lock, with its state folder and its journal; check its inputs again at the end."""
    clock = Clock()
    clock.enter("data")
    values = read_yaml(Path("params.yaml"))
    params = parse_params(values)
    with locked(Path(".work", stage, "lock"), LOCK_TIMEOUT) as holder:
        if holder is not None:
            raise InputError(f"already runs here as process {holder}; wait for it, or end it with: kill {holder}")
        inputs = read_inputs(stage, values)
        tracked = {key: value for key, value in inputs.params.items() if key not in ("sources", "gpt2_files")}
        stages = list(read_yaml(Path("dvc.yaml"))["stages"])
        is_last = stages[-1] == stage
        digests = data_digests(inputs)
        with clock("tracking"):
            journal = Journal.start(
                stage, flatten(tracked), params.data.corpus, is_last, clock, environment=environment(stage, params)
            )
            for name, digest in digests.items():
                journal.dataset(name, digest, name, stage)
        status = "FAILED"
        try:
            run_in_state_folder(stage, body, inputs, params, journal)
            with clock("tracking"):
                journal.outputs(output_digests(stage))
            if stage == stages[0] and not in_git():
                logger.info("%s: no git repository here, so its run names no commit", stage)
            if ahead := stages[stages.index(stage) + 1 :]:
                number = len(stages) - len(ahead)
                logger.info("%s: done, stage %d of %d; next %s", stage, number, len(stages), ", ".join(ahead))
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
                    raise  # else all is done: a signal only ends the wait for the delivery


def in_git() -> bool:
    """Return False for an unpacked archive of the repository."""
    return any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))


def run_in_state_folder(stage: str, body: Body, inputs: Inputs, params: Params, journal: Journal) -> None:
    """Run `body` with its state folders, and check that its inputs have not changed."""
    pre_decay = pre_decay_inputs(inputs)
    with contextlib.ExitStack() as stack:
        state_dir = stack.enter_context(state_folder(stage, fingerprint(inputs, params)))
        stable_dir = None
        if pre_decay is not None:
            stable_dir = stack.enter_context(state_folder(stage, fingerprint(pre_decay, params), keep=True))
        with journal.clock("tracking"):
            journal.resume(state_dir, stable_dir, params.pretrain.stable_steps)
        body(Run(stage, params, state_dir, journal, stable_dir=stable_dir))
        check_unchanged(inputs, read_inputs(stage, read_yaml(Path("params.yaml")), inputs.files))


@contextmanager
def state_folder(stage: str, fingerprint: str, keep: bool = False) -> Iterator[Path]:
    """Hold the folder of a fingerprint, in the repository even for DVC's temporary experiment copies.

    Experiments of a queue may have the same inputs at the same time: each takes the first folder that is free. A
    failure leaves what the stage saved there. Success removes the folder, unless it is to `keep`.
    """
    name = fingerprint[:16]
    for number in count():
        folder = repository() / ".work" / stage / (name if number == 0 else f"{name}-{number}")
        with locked(folder / "lock") as holder:
            if holder is not None:
                continue
            succeeded = False
            try:
                yield folder
                succeeded = True
            finally:
                names = {path.name for path in folder.iterdir()} if folder.is_dir() else None
                if names is not None and (names <= {"lock", "journals"} or (succeeded and not keep)):
                    _remove_held(folder)
            return


def _remove_held(folder: Path) -> None:
    """Remove a folder with its lock, at once for others: one that waits for it may then make it anew."""
    removed = folder.with_name(f".{folder.name}.{os.getpid()}")
    folder.rename(removed)
    shutil.rmtree(removed)


def main(stage: str, body: Body, execute: Callable[[str, Body], None] = run_stage) -> None:
    """Run `body` and end the process: 0 done, 1 error, 143 SIGTERM, 130 SIGINT.

    Errors that the user can act on are one line on stderr, all others keep their traceback.
    """
    for number in EXIT_STATUS:
        signal.signal(number, exit_on_signal)
    try:
        setup_logging()
        check_namesake()
        execute(stage, body)
    except InputError as error:
        sys.exit(f"{stage}: {error}")
    except Exception as error:
        message = resource_error(error)
        if message is None:
            raise
        sys.exit(f"{stage}: {message}")


def resource_error(error: Exception) -> str | None:
    """Return one line for a lack of disk space, permission or memory, None for any other error."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return f"{error.filename or 'writing'}: {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return "out of memory; a training with a smaller batch_size and a larger grad_accum_steps needs less"
    return None


def exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_STATUS[signal.Signals(number)])


def rounded(value: Any) -> Any:
    """Return a value with floats of six significant digits, null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
