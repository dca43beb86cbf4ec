"""Time line: a stage's phases, and the table and picture of a pipeline."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from llm.common.errors import InputError
from stages.timeline import main
from stages.tracking import clock as tracking_clock
from stages.tracking import journal as tracking_journal
from stages.tracking import timeline
from stages.tracking.clock import Clock
from stages.tracking.delivery import deliver_all, undelivered_pipelines
from stages.tracking.journal import Journal, read_events
from stages.tracking.process import Process, process_age, runs_folder
from tests.conftest import ROOT

IMPORTED = time.monotonic()
BEGAN = 1_800_000_000.0
GONE = Process(2**22, 1, socket.gethostname())
HERE = Process.from_psutil(psutil.Process())


def stage(
    name: str, begin: float, seconds: dict[str, float], status: str = "", process: Process = GONE, pipeline: str = "p"
) -> Path:
    """Write the journal of a stage that began so many seconds after its pipeline; without a status it has no end."""
    journal = runs_folder() / pipeline / f"{name}-1"
    journal.mkdir(parents=True)
    start, end = BEGAN + begin, BEGAN + begin + sum(seconds.values())
    events: list[dict[str, Any]] = [
        {"time": int(1000 * start) + 100, "event": "start", "stage": name, "title": "the_title", "invoked": BEGAN}
        | {"process": process._asdict(), "params": {}, "tags": {}}
    ]
    if status:
        events.append({"time": int(1000 * end), "event": "end", "status": status})
    (journal / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    os.utime(journal / "events.jsonl", (end, end))
    note(journal, start, seconds)
    return journal


def note(journal: Path, began: float, seconds: dict[str, float]) -> None:
    times = {"began": began, "until": began + sum(seconds.values()), "seconds": seconds}
    (journal / "times.json").write_text(json.dumps(times))


# ---- phases of a stage -----------------------------------------------------------------------------------------------


def test_inner_phase_interrupts_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(tracking_clock, "process_age", lambda process: 3.0)
    clock = Clock()
    clock.enter("data")
    now += 1
    with pytest.raises(KeyError), clock("evaluation"):
        now += 10
        with clock("tracking"):
            now += 100
        now += 20
        raise KeyError
    now += 4
    assert clock.seconds() == {"start-up": 3, "data": 5, "evaluation": 30, "tracking": 100}


def test_process_age_equals_wall_time() -> None:
    """To two ticks of the system's clock, on whatever machine."""
    since_import = time.monotonic() - IMPORTED
    assert process_age(psutil.Process()) >= since_import - 0.02
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        age = process_age(psutil.Process(process.pid))
        at_most = time.monotonic() - before
        process.communicate(b"\n")
    assert -0.02 <= age <= at_most + 0.02


@pytest.mark.parametrize(("failure", "status"), [("", "FINISHED"), ("raise InputError('x')", "FAILED")])
def test_stage_writes_its_times_however_it_ends(place: Path, failure: str, status: str) -> None:
    (place / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (place / "dvc.yaml").write_text("stages: {demo: {cmd: x}, other: {cmd: y}}")
    (place / "demo.py").write_text(
        "import stages.runtime.run\nfrom llm.config import InputError\ndef demo(run):\n"
        "    with run.phase('training'):\n        run.log({'a': 1.0}, 1)\n"
        f"    with run.phase('saving'):\n        pass\n    {failure}\nstages.runtime.run.main('demo', demo)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "demo.py"], cwd=place, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == bool(failure), done.stderr
    pipeline = timeline.last_pipeline()
    assert pipeline is not None
    [row] = timeline.read_timeline(pipeline).rows
    assert (row.stage, row.status) == ("demo", status)
    [times] = [json.loads(path.read_text()) for path in pipeline.glob("*/times.json")]
    assert list(times["seconds"]) == ["start-up", "data", "tracking", "training", "saving"]
    assert all(value > 0 for value in times["seconds"].values())
    assert times["until"] - times["began"] == pytest.approx(sum(times["seconds"].values()))
    points = [e["values"] for e in read_events(next(pipeline.glob("*/"))) if e["event"] == "metrics"]
    assert [key for values in points for key in values if key.startswith("time/")] == [
        f"time/{phase}" for phase in times["seconds"]
    ]


# ---- table and picture -----------------------------------------------------------------------------------------------


def test_time_line_has_a_row_for_each_stage_however_it_ended(place: Path) -> None:
    stage("download", 2, {"start-up": 1, "data": 0.5}, "FINISHED")
    stage("pretrain", 5, {"start-up": 2, "training": 30.25, "saving": 0.001}, "FAILED")
    killed = stage("evaluate", 40, {"start-up": 2, "evaluation": 8})
    os.utime(killed / "events.jsonl", (BEGAN + 52, BEGAN + 52))  # its last sign of life
    line = timeline.read_timeline(runs_folder() / "p")
    assert [(row.stage, row.status, row.begin, row.end) for row in line.rows] == [
        ("download", "FINISHED", 2, 3.5),
        ("pretrain", "FAILED", 5, pytest.approx(37.251)),
        ("evaluate", "KILLED", 40, 52),
    ]
    assert line.rows[2].seconds == {"start-up": 2, "evaluation": 8, "not recorded": 2}
    text = timeline.markdown(line)
    assert text.split("\n\n")[3] == "\n".join(
        [
            "| seconds | begins after | start-up | data | training | evaluation | not recorded | all |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            "| download | 2.0 | 1.0 | 0.5 | - | - | - | 1.5 |",
            "| pretrain, failed | 5.0 | 2.0 | - | 30.2 | - | - | 32.3 |",
            "| evaluate, killed | 40.0 | 2.0 | - | - | 8.0 | 2.0 | 12.0 |",
            "| before and between the stages |  |  |  |  |  |  | 6.2 |",
            "| all |  | 5.0 | 0.5 | 30.2 | 8.0 | 2.0 | 52.0 |",
        ]
    )


def test_picture_has_a_bar_for_each_phase(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage("download", 2, {"start-up": 1, "data": 0.5}, "FINISHED")
    stage("pretrain", 5, {"start-up": 2, "training": 30, "brooding": 1.0}, "FINISHED")
    rows = timeline.read_timeline(runs_folder() / "p").rows
    figures = []
    monkeypatch.setattr(timeline, "save", lambda figure, path: figures.append(figure))
    timeline.draw(rows, place / "x.png")
    axes = figures[0].axes[0]
    bars = {
        container.get_label(): [(bar.get_x(), bar.get_width()) for bar in container if bar.get_width()]
        for container in axes.containers
    }
    expected = {"start-up": [(2, 1), (5, 2)], "data": [(3, 0.5)], "training": [(7, 30)], "brooding": [(37, 1)]}
    assert bars == expected
    assert [label.get_text() for label in axes.get_yticklabels()] == ["download", "pretrain"]
    monkeypatch.undo()
    for name in ("one.png", "two.png"):
        timeline.draw(rows, place / name)
    assert (place / "one.png").read_bytes() == (place / "two.png").read_bytes()


def test_curves_of_a_training_stand_beside_it_with_their_speed(place: Path) -> None:
    folder = stage("pretrain", 2, {"training": 1.0}, "FINISHED")
    journal = Journal(folder)
    values = {"train/loss": 3.0, "lr": 0.1, "tokens_per_s": 900.0}
    for step, loss in ((1, 4.0), (2, 3.0), (2, 2.0)):
        journal.write(event="metrics", step=step, values=values | {"train/loss": loss})
    journal.write(event="metrics", step=2, values={"val/loss": 2.5, "scratch/val/loss": 9.0})
    line = timeline.read_timeline(folder.parent)
    [training] = line.trainings
    assert training.train == [(1, 4.0), (2, 2.0)] and training.val == [(2, 2.5)]
    assert training.speed == [(1, 900.0), (2, 900.0)] and training.lr == [(1, 0.1), (2, 0.1)]
    timeline.write(line, place)
    assert (place / timeline.CURVES).read_bytes().startswith(b"\x89PNG")
    assert f"({timeline.CURVES})" in (place / timeline.TABLE).read_text()


def test_journal_without_times_is_drawn(place: Path) -> None:
    """A full disk refused them."""
    journal = stage("download", 2, {"data": 3.0}, "FINISHED")
    (journal / "times.json").write_text("")
    [row] = timeline.read_timeline(runs_folder() / "p").rows
    assert (row.begin, row.end) == (pytest.approx(2.1), 5)
    assert row.seconds == {"not recorded": pytest.approx(2.9)}
    timeline.update(runs_folder() / "p")
    assert (place / ".work/timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_stage_of_no_duration_is_drawn(place: Path) -> None:
    [row] = timeline.read_timeline(stage("download", 0, {}, "KILLED").parent).rows
    assert (row.end, row.seconds) == (0, {})
    timeline.draw([row], place / "x.png")
    assert (place / "x.png").read_bytes().startswith(b"\x89PNG")


def test_command_shows_the_last_pipeline_also_while_it_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no stage has run here yet; `dvc repro` runs all"):
        main([])
    with pytest.raises(SystemExit):
        main(["pretrain"])
    assert "unrecognized arguments: pretrain" in capsys.readouterr().err
    stage("download", 2, {"data": 1.0}, "FINISHED", pipeline="1")
    stage("pretrain", 2, {"training": 1.0}, process=HERE, pipeline="2")
    main([])
    said = capsys.readouterr().out
    assert "pretrain, running" in said and "download" not in said
    assert (place / ".work/timeline.md").read_text() == said
    assert (place / ".work/timeline.png").read_bytes().startswith(b"\x89PNG")
    assert not (place / ".work/runs/2/timeline.md").exists(), "it is delivered when it is whole"


# ---- delivery to MLflow ----------------------------------------------------------------------------------------------


@pytest.fixture
def store(place: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    shutil.copy(database, place / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    return MlflowClient(f"sqlite:///{place}/mlflow.db")


def delivered(client: MlflowClient, place: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of each run in MLflow, by its tag `llm.run`."""
    experiment = client.get_experiment_by_name("llm")
    assert experiment is not None
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        found[run.data.tags["llm.run"]] = {path.name: path.read_bytes() for path in folder.glob("*")}
    return found


def test_time_line_is_delivered_once_and_again_when_it_changes(
    store: MlflowClient, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage("download", 2, {"data": 1.0}, "FINISHED", pipeline="1")
    stage("pretrain", 2, {"training": 3.0}, pipeline="2")
    for _ in range(2):
        assert deliver_all() == 0
    files = delivered(store, place)
    assert {name: set(content) for name, content in files.items()} == {
        **{"1": {"timeline.md", "timeline.png"}, "1/download-1": set()},
        **{"2": {"timeline.md", "timeline.png"}, "2/pretrain-1": set()},
    }
    assert b"| download | 2.0 | 1.0 | 1.0 |" in files["1"]["timeline.md"]
    assert b"| pretrain, killed |" in files["2"]["timeline.md"]
    for name, content in files["2"].items():
        assert (place / ".work" / name).read_bytes() == content, "the last pipeline's lies where the user finds it"

    calls = []
    monkeypatch.setattr(MlflowClient, "log_artifact", lambda *given: calls.append(given))
    assert deliver_all() == 0 and not calls, "it is there"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    note(first, BEGAN + 2, {"data": 1.0, "tracking": 7.0})  # it waited for the delivery, which is now known
    timeline.update(first.parent)
    assert undelivered_pipelines() == [first.parent]
    assert deliver_all() == 0
    again = delivered(store, place)
    assert again.keys() == files.keys()
    assert b"| download | 2.0 | 1.0 | 7.0 | 8.0 |" in again["1"]["timeline.md"]
    assert again["2"] == files["2"]
    assert undelivered_pipelines() == []
    assert capsys.readouterr().err == ""


def test_failure_to_draw_does_not_stop_the_delivery(
    store: MlflowClient, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    stage("download", 2, {"data": 1.0}, "FINISHED")
    monkeypatch.setattr(timeline, "save", full)
    assert deliver_all() == 0
    assert capsys.readouterr().err == "tracking: no time line: OSError: [Errno 28] No space left on device\n"
    assert delivered(store, place) == {"p": {}, "p/download-1": {}}


def test_delivered_journal_without_a_time_line_is_not_delivered_again(store: MlflowClient, place: Path) -> None:
    journal = stage("download", 2, {"data": 1.0}, "FINISHED")
    (journal / "delivered").touch()
    timeline.update(journal.parent)
    assert undelivered_pipelines() == []


def test_wait_for_the_delivery_counts_as_tracking(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    journal = Journal.start("demo", {}, "sample")
    journal.delivery_timeout = 60.0
    noted = []

    def deliver(folder: Path) -> bool:
        nonlocal now
        noted.append(json.loads((journal.folder / "times.json").read_text())["seconds"]["tracking"])
        now += 5
        return True

    monkeypatch.setattr(tracking_journal, "is_delivered", deliver)
    with journal.clock("tracking"):
        now += 1
        journal.end("FINISHED")
    assert noted[0] == 1
    assert json.loads((journal.folder / "times.json").read_text())["seconds"]["tracking"] >= 6
