"""Journal of a run: its events, resumed curves, and a disk that refuses it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.tracking.journal import Journal, read_events
from stages.tracking.process import Process
from tests.conftest import ROOT
from tests.forks import run_forked

START = {"seed": 123, "model.n_layers": 6}


def record(stage: str = "pretrain", steps: int = 30, **params: Any) -> Journal:
    """Return a stage's open journal."""
    journal = Journal.start(stage, START | params, "sample")
    for step in range(0, steps, 10):
        journal.metrics({"train/loss": 5 - step / 10, "lr": 0.1}, step)
    journal.dataset("data/tokens", "0" * 32, "data/tokens", "pretrain")
    return journal


def test_journal_has_all_events_of_a_run(place: Path) -> None:
    journal = record()
    (place / "report.md").write_text("before")
    journal.artifact(place / "report.md")
    (place / "report.md").write_text("after")
    journal.summary({"val/loss": 1.5})
    journal.metrics({"val/loss": torch.tensor(0.5), "x": float("nan")}, 20)  # type: ignore[dict-item]
    journal.end("FINISHED")
    events = read_events(journal.folder)
    own = [e for e in events if not any("system/" in key or "time/" in key for key in e.get("values", {}))]
    assert [e["event"] for e in own] == [
        *["start", "metrics", "metrics", "metrics", "dataset", "artifact", "summary", "metrics", "end"]
    ]
    assert events[0]["params"] == {"seed": "123", "model.n_layers": "6"}
    assert Process(**events[0]["process"]).pid == os.getpid()
    system = {key for event in events for key in event.get("values", {}) if key.startswith("system/")}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= system
    assert (journal.folder / "files/report.md").read_text() == "before"
    assert own[-2]["values"]["val/loss"] == 0.5


def test_unwritable_journal_is_one_warning_and_no_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = record()
    (journal.folder / "events.jsonl").unlink()
    (journal.folder / "events.jsonl").mkdir()
    for step in range(5):
        journal.metrics({"train/loss": 1.0}, step)
    journal.artifact(place / "missing.md")
    journal.end("FINISHED")
    assert capsys.readouterr().err.count("\n") == 1


def test_resumed_run_has_the_whole_curve_once(place: Path) -> None:
    (place / "state").mkdir()
    for first, last in ((0, 50), (30, 60), (50, 80)):  # killed after 50 and 60, resumed from states at 30 and 50
        journal = Journal.start("pretrain", START, "sample")
        journal.resume(place / "state")
        for step in range(first, last, 10):
            journal.metrics({"train/loss": 100.0 * first + step}, step)
            if first == 0 and step == 20:
                journal.metrics({"scratch/loss": 7.0}, 400)
    journal.end("FINISHED")
    events = [event for event in read_events(journal.folder) if event["event"] == "metrics"]
    curve = {event["step"]: event["values"]["train/loss"] for event in events if "train/loss" in event["values"]}
    assert len([event for event in events if "train/loss" in event["values"]]) == 8
    assert curve == {0: 0, 10: 10, 20: 20, 30: 3030, 40: 3040, 50: 5050, 60: 5060, 70: 5070}
    assert [event["step"] for event in events if "scratch/loss" in event["values"]] == [400]


def test_longer_run_has_the_curve_of_the_shorter_one_before_its_decay(place: Path) -> None:
    """Steps of 40 and 60 that decay after 30 and 50; the longer one is killed in between. Another run logs less."""
    kept = place / "kept"
    kept.mkdir()
    runs = (("short", 0, 40, 30, 5), ("long", 30, 50, 50, 10), ("long", 40, 60, 50, 10), ("longest", 50, 80, 70, 10))
    for name, first, last, stable, interval in runs:
        (place / name).mkdir(exist_ok=True)
        journal = Journal.start("pretrain", START, "sample")
        journal.resume(place / name, kept, stable)
        for step in range(first + interval, last + 1, interval):
            journal.metrics({"train/loss": step + first / 100}, step)
        journal.end("FINISHED")
    events = [event for event in read_events(journal.folder) if event["event"] == "metrics"]
    curve = [event["values"]["train/loss"] for event in events if "train/loss" in event["values"]]
    assert curve == [5, 10, 15, 20, 25, 30, 40.3, 50.4, 60.5, 70.5, 80.5]


def test_pipeline_is_identified_by_the_dvc_process_above_it(place: Path) -> None:
    """Both stages of an invocation name the same process, those of another invocation another one."""
    (place / "dvc").write_text(
        "import subprocess, sys\n"
        "code = 'from stages.tracking.process import invocation, pipeline_name; print(pipeline_name(invocation()))'\n"
        "for _ in range(2):\n"
        "    subprocess.run(['sh', '-c', f'{sys.executable} -c \"{code}\"; true'])\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "dvc"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    first, second = (process.communicate(timeout=60)[0].split() for process in started)
    assert len(first) == len(second) == 2
    assert first[0] == first[1] != second[0] == second[1]


def test_line_cut_by_a_full_disk_does_not_spoil_the_next(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = record(steps=0)
    size = (journal.folder / "events.jsonl").stat().st_size

    def log_twice() -> None:
        again = Journal(journal.folder)
        for step, limit in ((1, size + 20), (2, resource.RLIM_INFINITY)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            again.metrics({"a": 1.0}, step)

    done = run_forked(log_twice)
    assert (done.returncode, done.stderr) == (
        0,
        "tracking: metrics is not recorded: [Errno 28] No space left on device\n",
    )
    assert [e["step"] for e in read_events(journal.folder) if e["event"] == "metrics"] == [2]


def test_tracking_off_keeps_the_journal_only(place: Path) -> None:
    journal = record()
    journal.end("FINISHED")
    assert [path.name for path in journal.folder.parent.iterdir()] == [journal.folder.name]
