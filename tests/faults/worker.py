"""Runs stages in forked copies of itself, which spares importing torch for each, and strikes them with a fault.

    python -m tests.faults.worker      reads a job a line from stdin, answers each with a line

A fault strikes from outside after some seconds, or from inside: so many calls after a function of the project was
entered so many times. How long a stage takes, and how many calls there are, a run without a fault tells.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from select import select
from types import FrameType
from typing import Any

import stages.runtime.run

STAGES = ("download", "tokenize", "pretrain", "finetune-classify", "finetune-instruct", "evaluate")
PLACES = {  # functions that stages call, where it would hurt most
    "download": "llm.download.fetching.fetch._download",
    "tokenizer": "llm.tokenizer.bpe.Tokenizer.save",
    "state": "llm.training.fit.save_state",
    "evaluation": "llm.training.fit.Trainer.evaluate",
    "model": "llm.checkpoint.adapter.save_checkpoint",
    "file": "stages.runtime.run.write_atomic",
    "classifiers": "stages.evaluate.evaluate_classifiers",
    "pictures": "llm.reporting.pictures.draw_classifiers",
}
HEAVY = (
    "matplotlib.pyplot",
    "pandas",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "sklearn.linear_model",
    "torch._dynamo",
)


def wrap(place: str, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Replace each call of the place's function by `around(call)`."""
    path, _, name = PLACES[place].rpartition(".")
    module, _, owner = path.rpartition(".")
    holder: Any = (
        getattr(importlib.import_module(module), owner) if owner[:1].isupper() else importlib.import_module(path)
    )
    function = getattr(holder, name)

    @wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(lambda: function(*arguments, **named))

    setattr(holder, name, wrapped)


def record(place: str, found: dict[str, list[int]]) -> None:
    """Record the number of calls inside each call of the place's function."""

    def around(call: Callable[[], Any]) -> Any:
        calls = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event.endswith("call")

        outer = sys.getprofile()
        sys.setprofile(count)
        try:
            return call()
        finally:
            sys.setprofile(outer)
            found[place].append(calls)

    wrap(place, around)


def strike_inside(kind: str, place: str, entry: int, call: int) -> None:
    """Strike at the `call`-th call in the `entry`-th call of the place's function (both from 0)."""
    entries, calls = 0, 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event.endswith("call")
        if calls > call:
            sys.setprofile(None)
            if kind == "memory":
                raise MemoryError
            strike(os.getpid(), kind)

    def around(function: Callable[[], Any]) -> Any:
        nonlocal entries
        entries += 1
        if entries == entry + 1:
            sys.setprofile(count)
        return function()

    wrap(place, around)


def strike(process: int, kind: str) -> None:
    """Send a signal by its name; with `disk` no file can grow from now on, as on a full disk."""
    if kind == "disk":
        resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    else:
        os.kill(process, signal.Signals[kind])


def run(job: dict[str, Any]) -> int:
    """Run a stage; return the exit status of a process of its own."""
    os.chdir(job["folder"])
    stage = job["stage"]
    name = stage.replace("-", "_")
    found: dict[str, list[int]] = defaultdict(list)
    if "record" in job:
        for place in PLACES:
            record(place, found)
    if "place" in job.get("fault", ()):
        strike_inside(**job["fault"])
    status: Any = 0
    try:
        stages.runtime.run.main(stage, getattr(importlib.import_module(f"stages.{name}"), name))
    except SystemExit as error:
        status = error.code
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    sys.setprofile(None)
    if "record" in job:
        with open(job["record"], "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(found, file)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stderr.flush()
    return int(status)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a copy of this process; return its status, output and seconds."""
    reader, writer = os.pipe()
    fault, start = job.get("fault", {}), time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        for stream in (1, 2):
            os.dup2(writer, stream)
        os._exit(run(job))
    os.close(writer)
    said, patience = b"", fault.get("after")
    while True:
        if select([reader], [], [], patience and max(0.0, start + patience - time.monotonic()))[0]:
            block = os.read(reader, 2**16)
            if not block:
                break
            said += block
        else:
            patience = None
            with suppress(OSError):  # it has ended just now
                strike(child, fault["kind"])
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "said": said.decode(errors="replace"), "seconds": time.monotonic() - start}


if __name__ == "__main__":
    for module in (*HEAVY, *(f"stages.{name.replace('-', '_')}" for name in STAGES)):
        importlib.import_module(module)  # what it has imported, its copies need not
    for number in stages.runtime.run.EXIT_STATUS:  # for the moments before a stage does so
        signal.signal(number, stages.runtime.run.exit_on_signal)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
