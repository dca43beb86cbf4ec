"""The whole pipeline, as a user runs it: a copy of the repository with little data, tiny models and few steps.

Each training is killed at one random step. To try more: `LLM_TEST_KILLS=5 pytest tests/test_pipeline.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.checkpoint import load_model_folder
from tests.pipelines import (
    CHANGES,
    STEPS,
    change_params,
    contents,
    dvc_stages,
    environment,
    execute,
    outputs,
    tiny_copy,
)

KILLS = int(os.environ.get("LLM_TEST_KILLS", "1"))
TRAININGS = {  # by stage, the names of its training states below `.work/<stage>/<fingerprint>/`
    "pretrain": ["."],
    "finetune-classify": ["classifier", "classifier_scratch"],
    "finetune-instruct": ["instruct", "instruct_scratch"],
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which `dvc repro` has run once."""
    folder = tiny_copy(tmp_path_factory.mktemp("pipeline-in-a-place-of-its-own"))
    said = execute(folder, "dvc", "repro")
    assert re.findall(r"Running stage '(.*)'", said) == list(dvc_stages(folder)), "each runs once, in this order"
    return folder


# ---- from raw text to reports ----------------------------------------------------------------------------------------


def test_all_declared_outputs_are_there_and_nothing_is_left_over(pipeline: Path) -> None:
    missing = [path for path in outputs(pipeline) if not path.exists() or not contents([path])]
    assert not missing
    made = set(contents([pipeline / "reports", pipeline / "models", pipeline / "data/raw", pipeline / "data/tokens"]))
    assert made - set(contents(outputs(pipeline))) <= set(pipeline.rglob(".gitignore"))
    assert not [path for path in (pipeline / ".work").glob("*/*/") if path.parent.name != "runs"], "training state"


@pytest.mark.parametrize("name", ["base", "classifier", "classifier_scratch", "instruct", "instruct_scratch"])
def test_every_model_folder_can_be_loaded(pipeline: Path, name: str) -> None:
    folder = load_model_folder(pipeline / "models" / name)
    assert folder.config.kind == name.removesuffix("_scratch")
    assert (folder.config.gpt.n_layers, folder.config.gpt.vocab_size) == (2, 400)


def test_the_figures_stand_beside_their_baselines(pipeline: Path) -> None:
    metrics = json.loads((pipeline / "reports/metrics/evaluate.json").read_text(encoding="utf-8"))
    compared = {
        "bits_per_byte": ["base", "base_ngram", "base_xz"],
        "accuracy": ["classifier"] + [f"classifier_{name}" for name in ("scratch", "majority", "naive_bayes", "tfidf")],
        "exact_match": ["instruct", "instruct_base", "instruct_scratch"],
    }
    for figure, sections in compared.items():
        assert all(isinstance(metrics[section][figure], float) for section in sections), figure
    for stage in TRAININGS:
        figures = json.loads((pipeline / f"reports/metrics/{stage.replace('-', '_')}.json").read_text(encoding="utf-8"))
        assert figures["steps"] == STEPS


def test_the_report_shows_pictures_that_exist(pipeline: Path) -> None:
    report = (pipeline / "reports/report.md").read_text(encoding="utf-8")
    shown = {pipeline / "reports" / name for name in re.findall(r"!\[.*?\]\((.*?)\)", report)}
    assert len(shown) == 5
    assert shown == set((pipeline / "reports/figures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in shown)


def test_no_output_names_the_place_or_the_machine(pipeline: Path) -> None:
    made = contents(outputs(pipeline))
    assert not [path for path, content in made.items() if pipeline.name.encode() in content]
    host = socket.gethostname().encode()
    given = contents([pipeline / "data/sample", pipeline / "params.yaml"]).values()
    if not any(host in content for content in given):  # a machine may be called like a word of the sample
        word = re.compile(rb"\b" + re.escape(host) + rb"\b")
        texts = {path for path in made if path.suffix in (".json", ".jsonl", ".csv", ".md")}
        assert texts and not [path for path in texts if word.search(made[path])]


def test_a_second_repro_runs_nothing(pipeline: Path) -> None:
    said = execute(pipeline, "dvc", "repro")
    assert "Running stage" not in said
    assert said.count("didn't change, skipping") == len(dvc_stages(pipeline))


def test_another_copy_in_another_place_makes_the_same_bytes(pipeline: Path, tmp_path: Path) -> None:
    other = tiny_copy(tmp_path)
    said = execute(other, "dvc", "repro")
    assert said.count("Running stage") == len(dvc_stages(other))
    assert (other / "dvc.lock").read_text() == (pipeline / "dvc.lock").read_text()


# ---- interrupted trainings -------------------------------------------------------------------------------------------


def interrupt(folder: Path, stage: str, number: signal.Signals, ready: Callable[[], bool]) -> int:
    """Sends the signal to a running stage once `ready()`; returns its exit status."""
    log = folder / ".work" / "stage.log"
    while True:
        for path in outputs(folder, stage):  # as DVC does before it runs a stage
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        with log.open("wb") as file:
            command = ["python", "-m", f"stages.{stage.replace('-', '_')}"]
            process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=file, stderr=file)
        while process.poll() is None and not ready():
            time.sleep(0.001)
        process.send_signal(number)
        if process.wait(timeout=120):
            assert "Traceback" not in log.read_text(encoding="utf-8")
            return process.returncode
        # it was done before the signal came, on a busy machine: once more


def saved_step(folder: Path, stage: str, training: str) -> int:
    """The last step whose state is saved, -1 if none is."""
    found = (folder / ".work" / stage).glob(f"*/{training}/step-*")
    return max((int(path.name.removeprefix("step-")) for path in found if path.suffix == ""), default=-1)


@pytest.mark.parametrize("attempt", range(KILLS))
@pytest.mark.parametrize("stage", TRAININGS)
def test_killed_at_any_step_and_run_again_it_ends_with_the_same_bits(pipeline: Path, stage: str, attempt: int) -> None:
    undisturbed = contents(outputs(pipeline, stage))
    chance = random.Random(f"{stage} {attempt}")
    training, step = chance.choice(TRAININGS[stage]), chance.randrange(1, STEPS * 2 // 3)
    status = interrupt(pipeline, stage, signal.SIGKILL, lambda: saved_step(pipeline, stage, training) >= step)
    assert status == -signal.SIGKILL
    assert saved_step(pipeline, stage, training) >= step

    said = execute(pipeline, "python", "-m", f"stages.{stage.replace('-', '_')}")
    continued = [int(found) for found in re.findall(rf"continues at step (\d+) of {STEPS}", said)]
    assert continued and continued[-1] >= step
    assert contents(outputs(pipeline, stage)) == undisturbed


@pytest.mark.parametrize("stage", ["pretrain"])
def test_asked_to_stop_it_saves_its_state_first(pipeline: Path, stage: str) -> None:
    undisturbed = contents(outputs(pipeline, stage))
    log = pipeline / ".work" / "stage.log"
    change_params(pipeline, {"runtime": {"checkpoint_interval": 1000}})  # no state but the one it saves when it stops
    try:
        status = interrupt(pipeline, stage, signal.SIGTERM, lambda: f"{stage}: step 0," in log.read_text())
        assert status == 143
        assert not outputs(pipeline, stage)[0].exists()
        step = saved_step(pipeline, stage, ".")
        assert 0 < step <= STEPS
        assert f"{stage}: stopped by SIGTERM; run it again" in log.read_text()

        said = execute(pipeline, "python", "-m", f"stages.{stage}")
    finally:
        change_params(pipeline, CHANGES)
    assert f"{stage}: continues at step {step} of {STEPS}" in said
    assert contents(outputs(pipeline, stage)) == undisturbed


# ---- experiments -----------------------------------------------------------------------------------------------------


def test_an_experiment_changes_one_value_and_its_figures_can_be_compared(pipeline: Path) -> None:
    execute(pipeline, "git", "add", "-A")
    execute(pipeline, "git", "commit", "-qm", "Results")
    said = execute(pipeline, "dvc", "exp", "run", "-S", f"pretrain.max_steps={STEPS + 7}", "pretrain")
    assert re.findall(r"Running stage '(.*)'", said) == ["pretrain"]
    difference = json.loads(execute(pipeline, "dvc", "metrics", "diff", "--json"))
    steps = difference["reports/metrics/pretrain.json"]["steps"]
    assert (steps["old"], steps["new"]) == (STEPS, STEPS + 7)
