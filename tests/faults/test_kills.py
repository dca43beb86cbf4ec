"""Stages that are killed at points drawn at random, and run again, end with the bits of a run that nothing disturbed.

A few faults each time; `LLM_TEST_KILLS=300 pytest tests/faults` is a campaign of so many, over more forms of training.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.tracking.journal import read_events
from tests.conftest import ROOT
from tests.faults.worker import PLACES, STAGES
from tests.pipelines import change_params, contents, environment, outputs, read_params, tiny_copy, write_params

KILLS = int(os.environ.get("LLM_TEST_KILLS", "0"))
INTERVAL = 3  # steps between saves of the training state
STEPS = {"max_steps": 10, "eval_interval": 4}
FORMS: dict[str, dict[str, dict[str, Any]]] = {  # what each training changes
    "muon, adapters": {
        "pretrain": {"optimizer": "muon", "dropout": 0.1},
        "finetune_classify": {"optimizer": "adamw", "trainable": "lora"},
        "finetune_instruct": {"optimizer": "muon", "scratch_control": False},
    },
    "adamw, adapters": {
        "pretrain": {"optimizer": "adamw", "grad_accum_steps": 2},
        "finetune_classify": {"optimizer": "muon", "trainable": "last_blocks", "scratch_control": False},
        "finetune_instruct": {"optimizer": "muon", "trainable": "lora", "dropout": 0.1},
    },
}
KINDS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "memory": 1, "disk": 1}  # and the status that it ends with


class Pipeline:
    """A small pipeline whose stages run in copies of one process, and the undisturbed outputs of each."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder = tiny_copy(folder)
        change_params(folder, {section: STEPS | change for section, change in FORMS[form].items()})
        change_params(folder, {"runtime": {"checkpoint_interval": INTERVAL, "log_interval": 1}})
        self.undisturbed: dict[str, dict[Path, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, dict[str, list[int]]] = {}  # for each stage and place
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._worker.communicate()

    def run(self, stage: str, **more: Any) -> dict[str, Any]:
        """Run a stage; return its status, its output and its seconds."""
        assert self._worker.stdin is not None and self._worker.stdout is not None
        print(json.dumps({"stage": stage, "folder": str(self.folder), **more}), file=self._worker.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._worker.stdout.readline())
        return answer

    def run_all(self) -> None:
        record = self.folder / "calls.json"
        for stage in STAGES:
            ended = self.run(stage, record=str(record))
            assert ended["status"] == 0, ended["said"]
            self.seconds[stage] = ended["seconds"]
            self.calls[stage] = json.loads(record.read_text())
            self.undisturbed[stage] = self.made(stage)
            assert self.undisturbed[stage]
        assert {place for calls in self.calls.values() for place in calls} == PLACES.keys(), "each is entered"

    def made(self, stage: str) -> dict[Path, bytes]:
        return contents(outputs(self.folder, stage))

    def clear(self, stage: str) -> None:
        """Remove the stage's outputs, as DVC does before it runs a stage, and the downloads."""
        for path in outputs(self.folder, stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / ".work/downloads", ignore_errors=True)

    def journals(self) -> set[Path]:
        return {path.parent for path in self.folder.glob(".work/runs/*/*/events.jsonl")}

    def logged_steps(self, stage: str, journals: set[Path]) -> dict[str, int]:
        """Return the last step of each training in these journals, by its name in messages."""
        curves = [event for journal in journals for event in read_events(journal) if event["event"] == "metrics"]
        name = stage.removeprefix("finetune-").replace("classify", "classifier")
        return {
            training: max(event["step"] for event in curves if key in event["values"])
            for training, key in ((name, "train/loss"), (f"{name}_scratch", "scratch/train/loss"))
            if any(key in event["values"] for event in curves)
        }

    def leftovers(self) -> list[Path]:
        """Return the files that only an unfinished run has."""
        inside = [self.folder / name for name in ("data", "models", "reports")]
        found = [path for place in inside for path in place.rglob("*") if path.suffix in (".partial", ".old", ".tmp")]
        return found + [path for stage in STAGES for path in (self.folder / ".work" / stage).glob("*/")]


@pytest.fixture(scope="module", params=FORMS if KILLS else [next(iter(FORMS))])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Return a pipeline that has run once; its corpus comes from a server."""
    pipeline = Pipeline(tmp_path_factory.mktemp("faults"), request.param)
    shared = tmp_path_factory.mktemp("served")
    stories = pipeline.folder / "data/sample/stories.txt"
    shutil.copy(stories, shared)
    handler = functools.partial(Quiet, directory=str(shared))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values = read_params(pipeline.folder)
        url = f"http://127.0.0.1:{server.server_address[1]}/stories.txt"
        digest = hashlib.sha256(stories.read_bytes()).hexdigest()
        values["sources"]["sample"]["corpus"]["files"] = [{"url": url, "sha256": digest}]
        write_params(pipeline.folder, values)
        pipeline.run_all()
        yield pipeline
        server.shutdown()
    pipeline.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def draw(pipeline: Pipeline, chance: random.Random, stage: str, kind: str) -> dict[str, Any]:
    """Draw a fault after some seconds, or inside a call of a place that the stage enters."""
    places = sorted(pipeline.calls[stage])
    if KILLS and kind != "memory" and chance.random() < 0.4:  # every day only what does not depend on the clock
        return {"kind": kind, "after": chance.uniform(0, pipeline.seconds[stage])}
    place = chance.choice(places)
    entry = chance.randrange(len(pipeline.calls[stage][place]))
    return {"kind": kind, "place": place, "entry": entry, "call": chance.randrange(pipeline.calls[stage][place][entry])}


def strike(pipeline: Pipeline, chance: random.Random, stage: str, kind: str) -> bool:
    """Strikes the stage and runs it again, to the same end; False if it came to that end in spite of the fault.

    Of the steps that were made at most those since the last saved state are made again.
    """
    pipeline.clear(stage)
    fault, journals = draw(pipeline, chance, stage, kind), pipeline.journals()
    struck = pipeline.run(stage, fault=fault)
    told = f"{stage} {fault}\n{struck['said']}"
    if struck["status"] != 0:
        assert struck["status"] == KINDS[kind], told
        assert "Traceback" not in struck["said"], told
        steps = pipeline.logged_steps(stage, pipeline.journals() - journals)
        ended = pipeline.made(stage) == pipeline.undisturbed[stage]  # and the state is gone already
        if chance.random() < 0.5:
            pipeline.clear(stage)  # DVC does, a user need not
        again = pipeline.run(stage)
        assert again["status"] == 0, f"{told}\n{again['said']}"
        continued = {name: int(step) for name, step in re.findall(r"(\S+): continues at step (\d+) of", again["said"])}
        for name, step in steps.items():
            assert ended or step - continued.get(name, 0) <= INTERVAL, told
    assert pipeline.made(stage) == pipeline.undisturbed[stage], told
    assert pipeline.leftovers() == [], told
    return bool(struck["status"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_stage_resumes_to_the_same_bits_after_a_fault(pipeline: Pipeline, stage: str) -> None:
    chance, struck = random.Random(f"{stage} {KILLS}"), Counter[str]()
    for number in range(-(-KILLS // (len(STAGES) * len(FORMS))) or 1):
        kind = list(KINDS)[(number + STAGES.index(stage)) % len(KINDS)]
        while not strike(pipeline, chance, stage, kind):
            pass
        struck[kind] += 1
    print(f"{stage}: {dict(struck)}")


@pytest.mark.parametrize(("lacking", "mended"), [("size=64k", "size=64m"), ("ro", "rw")], ids=["full", "read-only"])
@pytest.mark.slow
def test_disk_that_refuses_the_model_costs_no_training(pipeline: Pipeline, lacking: str, mended: str) -> None:
    models = pipeline.folder / "models"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", lacking, "none", models], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    try:
        refused = pipeline.run("pretrain")
        assert refused["status"] == 1
        [line] = [
            line for line in refused["said"].splitlines() if line.startswith("pretrain: ") and "step " not in line
        ][-1:]
        assert re.fullmatch(
            r"pretrain: (models/base\S*|writing): (No space left on device|Read-only file system)", line
        )
        assert "Traceback" not in refused["said"]
        assert list(models.iterdir()) == []
        subprocess.run(["mount", "-o", f"remount,{mended}", models], check=True)
        again = pipeline.run("pretrain")
        assert again["status"] == 0, again["said"]
        assert f"pretrain: continues at step {STEPS['max_steps']} of" in again["said"]
        assert pipeline.made("pretrain") == pipeline.undisturbed["pretrain"]
    finally:
        subprocess.run(["umount", models], check=True)
