"""The from-scratch baseline of a finetuning, trained by a process beside it.

Two small trainings use two cores better than one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from llm.common import distributed
from llm.common.device import device_kind
from llm.common.errors import InputError
from llm.common.files import read_json_object, write_atomic
from stages.runtime.run import Run
from stages.tracking.journal import read_events

BASELINE = "LLM_SCRATCH_BASELINE"  # in the environment of the baseline's process: the stage's state folder
END_TIMEOUT = 10.0  # seconds in which the baseline may save a checkpoint when the stage ends


def is_baseline() -> bool:
    return BASELINE in os.environ


def baseline_folder(state_dir: Path) -> Path:
    """Return the folder of the baseline's journal, lock and result, in the stage's state folder."""
    return state_dir / "baseline"


def has_room_beside(device: str) -> bool:
    """Return True if two trainings run in parallel: on more than one CPU core, and without other ranks."""
    return device_kind(device) == "cpu" and (os.cpu_count() or 1) > 1 and distributed.world_size() == 1


@contextmanager
def baseline_beside(run: Run) -> Iterator[Callable[[], dict[str, float]]]:
    """Train the stage's baseline in a process of its own, with half of the threads for each.

    Yields a function that waits for the end, logs the baseline's metrics and returns its result. The process ends with
    the block, after saving a checkpoint.
    """
    threads = max(1, torch.get_num_threads() // 2)
    torch.set_num_threads(threads)
    own = {BASELINE: str(run.state_dir.absolute()), "LLM_PARENT": str(os.getpid()), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{run.stage.replace('-', '_')}"],
        env=os.environ | own | {"OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the stage, which then ends this process
    )

    def finish() -> dict[str, float]:
        with run.phase("control"):
            status = process.wait()
        if status:
            raise InputError(f"the from-scratch baseline ended with status {status}; its message is above")
        folder = baseline_folder(run.state_dir)
        points: dict[int, dict[str, float]] = defaultdict(dict)
        for event in read_events(folder):
            if event["event"] == "metrics":
                points[event["step"]] |= event["values"]
        for step, values in sorted(points.items()):
            run.log(values, step)
        return read_json_object(folder / "result.json")

    try:
        yield finish
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_result(run: Run, result: Mapping[str, float]) -> None:
    """Write the baseline's metrics for the stage that waits for them."""
    write_atomic(baseline_folder(run.state_dir) / "result.json", json.dumps(result))
