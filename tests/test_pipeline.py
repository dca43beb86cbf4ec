"""The whole pipeline, as a user runs it: a copy of the repository with little data, tiny models and few steps.

Each training is killed at one random step. To try more: `LLM_TEST_KILLS=5 pytest tests/test_pipeline.py`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from llm.checkpoint.folder import load_checkpoint
from stages.runtime.from_scratch import BASELINE, has_room_beside
from stages.tracking import timeline
from tests.conftest import ROOT
from tests.forks import module, run_forked
from tests.pipelines import (
    CHANGES,
    STEPS,
    change_params,
    contents,
    dvc_stages,
    environment,
    execute,
    outputs,
    read_params,
    tiny_copy,
    write_params,
)

KILLS = int(os.environ.get("LLM_TEST_KILLS", "1"))
TRAININGS = {  # by stage, the names of its training states below `.work/<stage>/<fingerprint>/`
    "pretrain": ["."],
    "finetune-classify": ["classifier", "classifier_scratch"],
    "finetune-instruct": ["instruct", "instruct_scratch"],
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository in which `dvc repro` has run once."""
    folder = tiny_copy(tmp_path_factory.mktemp("pipeline-in-a-place-of-its-own"))
    said = execute(folder, "dvc", "repro")
    assert re.findall(r"Running stage '(.*)'", said) == list(dvc_stages(folder)), "each runs once, in this order"
    lines = (
        "download: corpus of sample: 1 file, ",
        "tokenize: vocabulary of 400; tokens: ",
        "| follow instructions | ",
    )
    assert all(line in said for line in (*lines, "Open reports/report.html.")), said
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
    folder = load_checkpoint(pipeline / "models" / name)
    assert folder.config.kind == name.removesuffix("_scratch")
    assert (folder.config.gpt.n_layers, folder.config.gpt.vocab_size) == (2, 400)


def test_metrics_include_the_baselines(pipeline: Path) -> None:
    metrics = json.loads((pipeline / "reports/metrics/evaluate.json").read_text(encoding="utf-8"))
    compared = {
        "bpb": ["base", "base_ngram", "base_xz"],
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
    assert len(shown) >= 7
    assert shown == set((pipeline / "reports/figures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in shown)
    page = (pipeline / "reports/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(shown) and len(page) < 1_500_000
    assert all(f"<h2>{heading}</h2>" in page for heading in re.findall("^## (.*)$", report, re.MULTILINE))
    assert "<h2>Predictions: messages</h2>" in page and "<td>torch</td>" in page


def test_every_step_of_a_training_is_kept_for_its_curve(pipeline: Path) -> None:
    for stage in TRAININGS:
        rows = curve(pipeline, f"{stage}_steps")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert all(row["train/loss"] > 0 and row["lr"] > 0 for row in rows)


def test_time_line_has_the_phases_of_every_stage(pipeline: Path) -> None:
    [invocation] = [folder for folder in (pipeline / ".work/runs").iterdir() if len(list(folder.glob("*/"))) > 1]
    rows = {row.stage: row for row in timeline.read_timeline(invocation).rows}
    assert list(rows) == list(dvc_stages(pipeline))
    common = {"start-up", "data", "tracking"}
    for stage in rows:
        expected = common | ({"training", "evaluation", "saving"} if stage in TRAININGS else set())
        expected |= {"evaluation", "saving"} if stage == "evaluate" else set()
        noted = set(json.loads(next(invocation.glob(f"{stage}-*/times.json")).read_text(encoding="utf-8"))["seconds"])
        assert expected <= noted <= timeline.PHASES.keys(), stage
        assert "control" in noted or "finetune" not in stage or not has_room_beside("cpu"), stage
    assert all(earlier.end <= later.begin for earlier, later in pairwise(rows.values()))
    assert rows["download"].begin > 0, "the line begins with dvc"
    assert "seconds until the end of the last stage" in execute(pipeline, "python", "-m", "stages.timeline")
    report = (pipeline / "reports/report.md").read_text(encoding="utf-8")
    assert "`python -m stages.timeline` draws it to `.work/timeline.png`" in report
    assert (pipeline / ".work/timeline.png").is_file()


def test_outputs_name_neither_the_folder_nor_the_machine(pipeline: Path) -> None:
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


@pytest.mark.slow
def test_another_copy_in_another_place_makes_the_same_bytes(pipeline: Path, tmp_path: Path) -> None:
    other = tiny_copy(tmp_path)
    said = execute(other, "dvc", "repro")
    assert said.count("Running stage") == len(dvc_stages(other))
    assert (other / "dvc.lock").read_text() == (pipeline / "dvc.lock").read_text()


# ---- interrupted trainings -------------------------------------------------------------------------------------------


def interrupt(folder: Path, stage: str, number: signal.Signals, ready: Callable[[], bool]) -> int:
    """Send the signal to a running stage once `ready()`; return its exit status."""
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
    """Return the step of the last checkpoint, -1 without one."""
    found = (folder / ".work" / stage).glob(f"*/{training}/step-*")
    return max((int(path.name.removeprefix("step-")) for path in found if path.suffix == ""), default=-1)


@pytest.mark.parametrize("attempt", range(KILLS))
@pytest.mark.parametrize("stage", TRAININGS)
@pytest.mark.slow
def test_training_killed_at_any_step_resumes_to_the_same_bits(pipeline: Path, stage: str, attempt: int) -> None:
    undisturbed = contents(outputs(pipeline, stage))
    chance = random.Random(f"{stage} {attempt}")
    training, step = chance.choice(TRAININGS[stage]), chance.randrange(1, STEPS * 2 // 3)
    status = interrupt(pipeline, stage, signal.SIGKILL, lambda: saved_step(pipeline, stage, training) >= step)
    assert status == -signal.SIGKILL
    assert saved_step(pipeline, stage, training) >= step

    said = execute(pipeline, "python", "-m", f"stages.{stage.replace('-', '_')}")
    title = stage if training == "." else training
    continued = re.search(rf"\b{title}: continues at step (\d+) of {STEPS}", said)  # perhaps behind the other's bar
    assert continued and int(continued[1]) >= step, said
    assert contents(outputs(pipeline, stage)) == undisturbed


@pytest.mark.parametrize("stage", ["pretrain"])
@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_first(pipeline: Path, stage: str) -> None:
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


@pytest.mark.slow
def test_longer_wsd_pretraining_resumes_from_the_pre_decay_checkpoint(pipeline: Path) -> None:
    shipped, before = (pipeline / "params.yaml").read_text(), contents(outputs(pipeline))
    lr = read_params(pipeline)["pretrain"]["lr"]
    wsd = {"schedule": "wsd", "warmup_steps": 5, "decay_steps": 10, "dropout": 0.1}

    def pretrain(**changes: int | float) -> tuple[str, dict[Path, bytes], list[str]]:
        """Return the stage's messages, its outputs and the checkpoints left."""
        change_params(pipeline, {"pretrain": wsd | changes})
        said = execute(pipeline, "python", "-m", "stages.pretrain")
        states = sorted(path.name for path in (pipeline / ".work/pretrain").glob("*/step-*"))
        return said, contents(outputs(pipeline, "pretrain")), states

    try:
        said, _, states = pretrain(max_steps=STEPS)
        assert "continues" not in said and states == [f"step-{STEPS - 10:08d}"]
        said, prolonged, states = pretrain(max_steps=STEPS + 15)
        assert f"pretrain: continues at step {STEPS - 10} of {STEPS + 15}" in said
        assert states == [f"step-{STEPS - 10:08d}", f"step-{STEPS + 5:08d}"]
        said, _, states = pretrain(max_steps=STEPS + 15, lr=lr / 2)
        assert "continues" not in said and len(states) == 3

        shutil.rmtree(pipeline / ".work/pretrain")
        said, undisturbed, _ = pretrain(max_steps=STEPS + 15, lr=lr)
        assert "continues" not in said
        assert prolonged == undisturbed
    finally:
        (pipeline / "params.yaml").write_text(shipped)
        shutil.rmtree(pipeline / ".work/pretrain")
        for path, content in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a training stage run on two ranks; restore the outputs afterwards."""
    before = contents(outputs(pipeline))
    monkeypatch.setenv("LLM_NPROC", "2")
    yield
    for path, content in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def curve(folder: Path, stage: str) -> list[dict[str, float]]:
    text = (folder / "reports/plots" / f"{stage.replace('-', '_')}.csv").read_text(encoding="utf-8")
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def journals(folder: Path) -> set[Path]:
    return set((folder / ".work/runs").glob("*/*/events.jsonl"))


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("stage", TRAININGS)
@pytest.mark.slow
def test_two_ranks_train_the_same_model_as_one(pipeline: Path, stage: str) -> None:
    alone, before = curve(pipeline, stage), journals(pipeline)
    models = [path for path in outputs(pipeline, stage) if (path / "config.json").is_file()]
    weights = {path: load_checkpoint(path).model.state_dict() for path in models}
    for path in outputs(pipeline, stage):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = execute(pipeline, "python", "-m", f"stages.{stage.replace('-', '_')}")
    trainings = len(TRAININGS[stage])
    assert len(re.findall(r"^\w+: 2 processes train together$", said, re.MULTILINE)) == trainings
    assert len(re.findall(rf"step {STEPS},", said)) == trainings, "rank 0 alone prints"
    assert len(journals(pipeline) - before) == 1, "rank 0 alone logs"
    together = curve(pipeline, stage)
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for row, expected in zip(together, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-4), "they differ by rounding alone"
    for path, expected_weights in weights.items():
        for name, tensor in load_checkpoint(path).model.state_dict().items():
            torch.testing.assert_close(tensor, expected_weights[name], atol=2e-3, rtol=1e-2, msg=name)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("stage", ["finetune-classify", "finetune-instruct"])
@pytest.mark.slow
def test_frozen_activations_are_cached_on_each_rank(
    pipeline: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = (pipeline / "params.yaml").read_text(encoding="utf-8")
    changes = {"trainable": "last_blocks", "last_blocks": 1, "scratch_control": False, "batch_size": 16}
    change_params(pipeline, {stage.replace("-", "_"): changes})
    curves = []
    try:
        for processes in ("2", "1"):
            monkeypatch.setenv("LLM_NPROC", processes)
            said = execute(pipeline, "python", "-m", f"stages.{stage.replace('-', '_')}")
            cached = re.findall(r"^activations of the lower 1 of 2 blocks for \d+ examples: cached", said, re.MULTILINE)
            assert len(cached) == 2, "train and val, on rank 0 alone"
            curves.append(curve(pipeline, stage))
    finally:
        (pipeline / "params.yaml").write_text(shipped, encoding="utf-8")
    assert len(curves[0]) == len(curves[1]) == STEPS // 10 + 1
    for row, expected in zip(*curves, strict=True):
        assert row == pytest.approx(expected, rel=1e-4), "they differ by rounding alone"


@pytest.mark.usefixtures("two")
@pytest.mark.slow
def test_torchrun_starts_the_ranks(pipeline: Path) -> None:
    execute(pipeline, "python", "-m", "stages.pretrain")
    started_by_us, before = contents(outputs(pipeline, "pretrain")), journals(pipeline)
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = execute(pipeline, *launcher, "-m", "stages.pretrain")
    assert "pretrain: 2 processes train together" in said
    assert contents(outputs(pipeline, "pretrain")) == started_by_us
    assert len(journals(pipeline) - before) == 1


@pytest.mark.usefixtures("two")
@pytest.mark.slow
def test_two_ranks_stop_together_and_resume(pipeline: Path) -> None:
    stage = "pretrain"
    command = ["python", "-m", "stages.pretrain"]
    execute(pipeline, *command)
    undisturbed = contents(outputs(pipeline, stage))
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        ended = interrupt(pipeline, stage, number, lambda: saved_step(pipeline, stage, ".") >= STEPS // 3)
        assert ended == status
        deadline = time.monotonic() + 30
        while running(pipeline) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not running(pipeline), "the second process ends with the first"
        said = execute(pipeline, *command)
        assert re.search(rf"continues at step \d+ of {STEPS}", said)
        assert contents(outputs(pipeline, stage)) == undisturbed


def running(folder: Path) -> list[psutil.Process]:
    """Return the running processes of stages in this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()) == folder and "stages." in " ".join(process.cmdline()):
                found.append(process)
    return found


def execute_changed(folder: Path, stage: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run a stage whose every process runs this code first."""
    changed = folder / "changed"
    changed.mkdir()
    (changed / "sitecustomize.py").write_text(code)
    done = subprocess.run(
        ["python", "-m", f"stages.{stage.replace('-', '_')}"],
        cwd=folder,
        env=environment() | {"PYTHONPATH": f"{changed}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    shutil.rmtree(changed)
    return done


@pytest.mark.usefixtures("two")
@pytest.mark.slow
def test_sigterm_during_an_evaluation_stops_all_ranks(pipeline: Path) -> None:
    """Rank 0 is, in the first one: no rank goes on with the baseline."""
    done = execute_changed(
        pipeline,
        "finetune-classify",
        "import os, signal\nif 'RANK' not in os.environ:\n"
        "    import llm.training.fit\n    evaluate = llm.training.losses.label_metrics\n"
        "    def stopped(*given, **more):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return evaluate(*given, **more)\n    llm.training.losses.label_metrics = stopped\n",
    )
    assert done.returncode == 143
    assert "finetune-classify: stopped by SIGTERM" in done.stderr
    assert "step 0," not in done.stderr and "scratch" not in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(pipeline / ".work/finetune-classify")


@pytest.mark.usefixtures("two")
@pytest.mark.slow
def test_error_of_all_ranks_is_reported_once(pipeline: Path) -> None:
    shipped = (pipeline / "params.yaml").read_text(encoding="utf-8")
    change_params(pipeline, {"pretrain": {"trainable": "last_blocks", "last_blocks": 9}})
    try:
        done = execute_changed(pipeline, "pretrain", "")
    finally:
        (pipeline / "params.yaml").write_text(shipped, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr == "pretrain: last_blocks: 9, but the model has 2 blocks\n"


@pytest.mark.usefixtures("two")
@pytest.mark.slow
def test_failing_rank_ends_all_with_its_message(pipeline: Path) -> None:
    """Its copy of the base model is damaged, as on a second machine it might be."""
    done = execute_changed(
        pipeline,
        "pretrain",
        "import os\nif os.environ.get('RANK') == '1':\n"
        "    from pathlib import Path\n    from llm.data import examples, shards\n"
        "    shards.TokenShards = lambda *_: examples.read_lines(Path('/no/shards'))\n",
    )
    assert done.returncode == 1
    assert "pretrain: /no/shards: missing" in done.stderr
    assert "process 1 of 2 ended with status 1; its message is above" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", ["0", "two", "-1", ""])
def test_invalid_number_of_processes_is_one_line(pipeline: Path, number: str) -> None:
    with contextlib.chdir(pipeline):
        done = run_forked(module("stages.pretrain"), LLM_NPROC=number, LLM_TRACKING="off")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"pretrain: LLM_NPROC in the environment: expected a whole number, at least 1, found {number!r}"
    )


@pytest.mark.slow
def test_a_killed_baseline_ends_its_stage_and_both_resume(pipeline: Path) -> None:
    stage, training = "finetune-classify", "classifier_scratch"
    undisturbed = contents(outputs(pipeline, stage))

    def kill_baseline() -> bool:
        """Once it has saved a step; the stage gets a signal that it does not notice."""
        if saved_step(pipeline, stage, training) < 1:
            return False
        for process in running(pipeline):
            if BASELINE in process.environ():
                process.kill()
        return True

    ended = interrupt(pipeline, stage, signal.SIGCONT, kill_baseline)
    assert ended == 1
    said = (pipeline / ".work" / "stage.log").read_text(encoding="utf-8")
    assert f"{stage}: the from-scratch baseline ended with status -9; its message is above" in said
    said = execute(pipeline, "python", "-m", "stages.finetune_classify")
    assert re.search(rf"\bclassifier: continues at step {STEPS} of {STEPS}", said)
    assert re.search(rf"\b{training}: continues at step \d+ of {STEPS}", said)
    assert contents(outputs(pipeline, stage)) == undisturbed


# ---- tables of DVC, and other places ---------------------------------------------------------------------------------


def commit_results(pipeline: Path) -> None:
    execute(pipeline, "git", "add", "-A")
    execute(pipeline, "git", "commit", "-q", "--allow-empty", "-m", "Results")


@pytest.mark.slow
def test_tables_of_dvc_hold_what_is_compared(pipeline: Path) -> None:
    commit_results(pipeline)
    shown = json.loads(execute(pipeline, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert {Path(name).stem for name in shown} == {"headlines", "pretrain", "finetune_classify", "finetune_instruct"}
    headlines = shown["reports/metrics/headlines.json"]["data"]
    assert {"bpb", "accuracy", "exact_match"} <= headlines.keys() and len(headlines) <= 10
    text = (ROOT / "docs/dvc.md").read_text(encoding="utf-8")
    headline_form, changes_form = [line for line in text.splitlines() if re.match("dvc exp show .*--drop", line)]
    table = execute(pipeline, *shlex.split(headline_form)).splitlines()[0]
    shown = [cell.strip() for cell in table.strip("|").split("|")]
    assert shown == ["Experiment", "Created", "bpb", "accuracy", "exact_match", "pretrain.max_steps"]
    table = execute(pipeline, *shlex.split(changes_form)).splitlines()[0]
    assert "sources" not in table and "bytes" not in table and "llm/" not in table and "Experiment" in table


@pytest.mark.slow
def test_a_changed_source_makes_the_pipeline_stale(pipeline: Path) -> None:
    shipped = (pipeline / "params.yaml").read_text(encoding="utf-8")
    values = read_params(pipeline)
    values["sources"]["sample"]["licence"] = "another"
    write_params(pipeline, values)
    try:
        assert "sources" in execute(pipeline, "dvc", "status", "download")
    finally:
        (pipeline / "params.yaml").write_text(shipped, encoding="utf-8")
    assert "up to date" in execute(pipeline, "dvc", "status", "download")


@pytest.mark.slow
def test_results_go_through_a_remote_to_a_fresh_clone(pipeline: Path, tmp_path: Path) -> None:
    execute(pipeline, "git", "add", "-A")
    execute(pipeline, "git", "commit", "-q", "--allow-empty", "-m", "Results")
    execute(pipeline, "dvc", "remote", "add", "--local", "-d", "store", str(tmp_path / "store"))
    execute(pipeline, "dvc", "push")
    clone = tmp_path / "clone"
    execute(tmp_path, "git", "clone", "-q", str(pipeline), str(clone))
    execute(clone, "dvc", "remote", "add", "--local", "-d", "store", str(tmp_path / "store"))
    execute(clone, "dvc", "pull")
    assert "up to date" in execute(clone, "dvc", "status")
    assert load_checkpoint(clone / "models/instruct").config.kind == "instruct"
    said = execute(clone, "python", "-m", "llm", "compare", "HEAD", "reports")
    assert "They differ on 0 examples." in said and "Messages" in said and "Instructions" in said


# ---- without git, and from a subfolder -------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_run_without_git_and_from_a_subfolder(tmp_path: Path) -> None:
    folder = tiny_copy(tmp_path)
    shutil.rmtree(folder / ".git")
    done = subprocess.run(["dvc", "repro"], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode and "is not a git repository" in done.stderr
    execute(folder, "dvc", "config", "core.no_scm", "true")
    said = execute(folder / "data", "dvc", "repro", "../dvc.yaml:download")
    assert "Running stage" in said and "download: no git repository here, so its run names no commit" in said
    assert (folder / "data/raw/messages.jsonl").is_file() and not (folder / "data/data").exists()
    for command in (["dvc", "repro"], ["python", "-m", "stages.download"]):
        env = environment() | {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder / "data", env=env, capture_output=True, text=True)
        assert done.returncode and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (folder / "data/.work").exists()
    assert "run from the repository's root" in done.stderr


# ---- experiments -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_experiment_changes_one_value_and_its_figures_can_be_compared(pipeline: Path) -> None:
    commit_results(pipeline)
    said = execute(pipeline, "dvc", "exp", "run", "-S", f"pretrain.max_steps={STEPS + 7}", "pretrain")
    assert re.findall(r"Running stage '(.*)'", said) == ["pretrain"]
    difference = json.loads(execute(pipeline, "dvc", "metrics", "diff", "--json"))
    steps = difference["reports/metrics/pretrain.json"]["steps"]
    assert (steps["old"], steps["new"]) == (STEPS, STEPS + 7)
