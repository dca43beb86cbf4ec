"""A stage's run: inputs, lock, state folder, signals, errors and metrics files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.common.errors import InputError
from llm.config import parse_params
from stages.runtime.inputs import data_digests, fingerprint, flatten, read_inputs, read_yaml
from stages.runtime.run import Run, state_folder
from tests.conftest import ROOT
from tests.forks import Ended, Fork, run_forked

SHIPPED = (ROOT / "params.yaml").read_text(encoding="utf-8")
DVC_YAML = """
stages:
  demo:
    cmd: python demo.py
    deps: [code.py, data/folder]
    params: [seed, pretrain.lr]
  last:
    cmd: "true"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository with the stage `demo`."""
    (tmp_path / "params.yaml").write_text(SHIPPED, encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "data/folder/inner").mkdir(parents=True)
    (tmp_path / "data/folder/b.txt").write_text("b")
    (tmp_path / "data/folder/inner/a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_TRACKING", "off")
    return tmp_path


def stage(body: str) -> Callable[[], object]:
    """Return a program that runs `body`, which can use `run`, as the stage `demo`."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = (
        "import errno, os, signal, sys, time\nfrom pathlib import Path\nfrom llm.common.errors import InputError\n"
        "from stages.runtime import run as runtime\nruntime.LOCK_TIMEOUT = 0\n"
        f"def demo(run):\n{lines}runtime.main('demo', demo)\n"
    )
    return lambda: exec(code, {"__name__": "__main__"})


def execute(body: str) -> Ended:
    return run_forked(stage(body))


def begin(body: str) -> Fork:
    """Start the stage and return when it has printed its first line."""
    process = Fork(stage(body))
    process.stdout.readline()
    return process


def current_fingerprint(**changes: Any) -> str:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    return fingerprint(read_inputs("demo", values), parse_params(values))


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_params_code_and_data_only(place: Path) -> None:
    before = current_fingerprint()
    assert current_fingerprint(seed=7) != before
    assert current_fingerprint(pretrain__lr=0.5) != before
    assert current_fingerprint(pretrain__max_steps=7) == before, "not in the stage's list"
    assert current_fingerprint(runtime__log_interval=77) == before
    os.utime("code.py", (1, 1))
    (place / "data/folder/__pycache__").mkdir()
    (place / "data/folder/__pycache__/x.pyc").write_text("x")
    assert current_fingerprint() == before
    (place / "code.py").write_text("a = 2\n")
    changed_code = current_fingerprint()
    assert changed_code != before
    (place / "data/folder/inner/a.txt").rename(place / "data/folder/inner/z.txt")
    assert current_fingerprint() not in (before, changed_code)


def test_fingerprint_and_journal_have_the_effective_values_of_a_training(place: Path) -> None:
    text = (place / "dvc.yaml").read_text().replace("pretrain.lr", "training, pretrain")
    (place / "dvc.yaml").write_text(text)
    before = current_fingerprint()
    assert current_fingerprint(training__beta1=0.5) != before
    assert current_fingerprint(training__precision="fp32") != before, "it changes bits"
    values = yaml.safe_load(SHIPPED)
    values["training"]["beta1"], values["pretrain"]["beta1"] = 0.5, values["training"]["beta1"]
    assert fingerprint(read_inputs("demo", values), parse_params(values)) == before, "pretrain has its own"
    found = flatten(read_inputs("demo", yaml.safe_load(SHIPPED)).params)
    assert found["pretrain.optimizer"] == "muon" and found["pretrain.lora.rank"] == 8
    assert not [key for key in found if key.startswith("training")]


def test_data_digests_once_torch_is_loaded(place: Path) -> None:
    import torch  # noqa: F401

    assert current_fingerprint(runtime__device="cpu") != current_fingerprint(runtime__device="mps")


def test_data_digests_equal_those_of_dvc(place: Path) -> None:
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    inputs = read_inputs("demo", yaml.safe_load(SHIPPED))
    tree = Tree()
    for name in ("b.txt", "inner/a.txt"):
        md5 = inputs.files[f"data/folder/{name}"].md5
        tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))  # type: ignore[arg-type]
    tree.digest()
    assert tree.hash_info is not None and tree.hash_info.value is not None
    assert data_digests(inputs) == {"data/folder": tree.hash_info.value.removesuffix(".dir")}


@pytest.mark.parametrize("change", ["Path('code.py').write_text('a = 2')", "Path('data/folder/new').write_text('')"])
def test_inputs_that_change_while_the_stage_runs_are_an_error(place: Path, change: str) -> None:
    done = execute(change)
    assert done.returncode == 1
    assert "changed while the stage ran" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_unlisted_params_may_change_while_the_stage_runs(place: Path) -> None:
    edit = "p = Path('params.yaml'); p.write_text(p.read_text().replace('{}', '{}'))"
    assert execute(edit.format("log_interval: 10", "log_interval: 11")).returncode == 0
    done = execute(edit.format("seed: 123", "seed: 124"))
    assert (done.returncode, done.stderr.split(" changed")[0]) == (1, "demo: seed")


# ---- lock and state folder -------------------------------------------------------------------------------------------


def test_lock_refuses_a_second_process_and_names_the_first(place: Path) -> None:
    first = begin("print('ready', flush=True)\ntime.sleep(60)")
    try:
        done = execute("print('never')")
        assert done.returncode == 1
        assert done.stdout == ""
        assert f"process {first.pid}" in done.stderr
    finally:
        first.kill()
        first.communicate()
    assert execute("print('now')").stdout == "now\n"


def test_surviving_worker_does_not_hold_the_lock(place: Path) -> None:
    first = begin("if os.fork() == 0:\n    time.sleep(60)\nprint('ready', flush=True)\ntime.sleep(60)")
    workers = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    done = execute("print('now')")
    assert [worker.is_running() for worker in workers] == [True]
    workers[0].kill()
    assert done.stdout == "now\n"


def test_state_survives_a_kill_and_is_removed_after_success(place: Path) -> None:
    killed = begin("(run.state_dir / 'step').write_text('5')\nprint('saved', flush=True)\ntime.sleep(60)")
    killed.kill()
    killed.communicate()
    look = "print(sorted(p.name for p in run.state_dir.iterdir() if p.name == 'step'))"
    other = SHIPPED.replace("seed: 123", "seed: 124")
    (place / "params.yaml").write_text(other)
    assert execute(look).stdout == "[]\n"
    (place / "params.yaml").write_text(SHIPPED)
    assert execute(look).stdout == "['step']\n"
    assert [path.name for path in (place / ".work/demo").iterdir()] == ["lock"]


def test_two_experiments_with_equal_inputs_do_not_share_a_state(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("params.yaml", "dvc.yaml", "code.py"):
        shutil.copy(name, copy)
    shutil.copytree("data", copy / "data")
    first = begin("print('ready', flush=True)\ntime.sleep(60)")
    try:
        with contextlib.chdir(copy):
            done = run_forked(stage("print(run.state_dir)"), DVC_ROOT=str(place))
    finally:
        first.kill()
        first.communicate()
    held = next(path.parent for path in (place / ".work/demo").glob("*/lock"))
    assert done.stdout.strip() == f"{held}-1"


def test_a_folder_that_another_experiment_made_anew_is_left_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits for the lock, and takes the folder's name in the moment of its removal."""
    folder, rmtree = place / ".work/demo/abc", shutil.rmtree

    def removed_late(path: Path) -> None:
        assert not (folder / "lock").exists(), "the lock goes with the folder"
        folder.mkdir()
        (folder / "lock").write_text("1")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", removed_late)
    for failure in (contextlib.nullcontext(), pytest.raises(ZeroDivisionError)):
        with failure, state_folder("demo", "abc"):
            if not isinstance(failure, contextlib.nullcontext):
                raise ZeroDivisionError
        assert [path.name for path in (place / ".work/demo").iterdir()] == ["abc"]
        assert (folder / "lock").read_text() == "1"
        rmtree(folder)


# ---- signals ---------------------------------------------------------------------------------------------------------

TRAINING = """
with run.graceful():
    print('ready', flush=True)
    while not run.stop_requested:
        time.sleep(0.01)
    (run.state_dir / 'saved').write_text('')
    {then}
print('never')
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_lets_a_training_save_a_checkpoint(place: Path, number: signal.Signals, status: int) -> None:
    process = begin(TRAINING.format(then="pass"))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, "")
    assert len(err.splitlines()) == 1
    assert list((place / ".work/demo").glob("*/saved"))


def test_a_second_signal_ends_at_once(place: Path) -> None:
    process = begin(TRAINING.format(then="print('saved', flush=True); time.sleep(60)"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_outside_of_a_training_a_signal_ends_at_once_and_cleans_up(place: Path) -> None:
    body = "try:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    Path('cleaned').touch()"
    process = begin(body)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (place / "cleaned").exists()


def test_signal_during_the_wait_for_the_delivery_is_success(place: Path) -> None:
    body = (
        "from stages.tracking.journal import Journal\n"
        "Journal.end = lambda *_: (print('waiting', flush=True), time.sleep(60))"
    )
    process = begin(body)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


# ---- errors and metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise InputError('x.txt: wrong')", "demo: x.txt: wrong"),
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'models/base')", "models/base: No space left"),
        ("raise PermissionError(errno.EACCES, 'Permission denied', 'reports/a')", "reports/a: Permission denied"),
        ("raise MemoryError", "demo: out of memory; a training with a smaller batch_size"),
        ("import torch; torch.zeros(10**14)", "demo: out of memory; a training with a smaller batch_size"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "demo: out of memory"),
    ],
)
def test_user_error_is_one_line(place: Path, body: str, message: str) -> None:
    done = execute(body)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_other_errors_keep_their_traceback(place: Path) -> None:
    done = execute("raise KeyError('bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'bug'" in done.stderr


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text("ab01 :-[]{}!?&*#|>%@'\"\n\t,.~<", max_size=60).map(str.encode) | st.binary(max_size=60))
def test_read_yaml_returns_a_mapping_or_raises_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    try:
        assert isinstance(read_yaml(tmp_path / "params.yaml"), dict)
    except InputError as error:
        assert str(error).isprintable() and str(error).startswith(f"{tmp_path}/params.yaml")


def test_a_missing_file_is_named(place: Path) -> None:
    shutil.rmtree("data/folder")
    with pytest.raises(InputError, match="data/folder: missing"):
        read_inputs("demo", yaml.safe_load(SHIPPED))
    Path("params.yaml").unlink()
    with pytest.raises(InputError, match=r"params.yaml: not found in .*run from the repository's root"):
        read_yaml(Path("params.yaml"))


def test_metrics_are_rounded_json_in_the_given_order(place: Path) -> None:
    done = execute("run.write_metrics({'val/loss': 1.23456789, 'test': {'n': 1234567, 'bad': float('nan')}})")
    assert done.returncode == 0, done.stderr
    text = (place / "reports/metrics/demo.json").read_text()
    assert text == json.dumps({"val/loss": 1.23457, "test": {"n": 1234567, "bad": None}}, indent=2) + "\n"
    assert [path.name for path in (place / "reports/metrics").iterdir()] == ["demo.json"]


@pytest.mark.usefixtures("place")
def test_curve_of_a_training_has_an_empty_cell_for_the_start() -> None:
    journal: Any = SimpleNamespace(clock=contextlib.nullcontext)
    run = Run("demo", parse_params(read_yaml(Path("params.yaml"))), Path(".work/demo"), journal)
    start = {"step": 0.0, "val/loss": 7.123456789, "lr": 1e-5}
    curve = [{"step": 2.0, "train/loss": 2.0000004, "lr": 0.5}]
    run.write_history([start, {"step": 10.0, "train/loss": 2.5, "val/loss": 2.0, "lr": 0.5}], curve)
    assert Path("reports/plots/demo_steps.csv").read_text() == "step,train/loss,lr\n2,2,0.5\n"
    lines = Path("reports/plots/demo.csv").read_text().splitlines()
    assert lines == ["step,train/loss,val/loss,lr", "0,,7.12346,1e-05", "10,2.5,2,0.5"]
    run.write_history([start], [])
    assert Path("reports/plots/demo_steps.csv").read_text() == "step,train/loss,lr\n", "no step was made"
    assert Path("reports/plots/demo.csv").read_text().splitlines() == ["step,val/loss,lr", "0,7.12346,1e-05"]


@pytest.mark.usefixtures("place")
def test_a_stage_ends_by_saying_which_ones_are_left() -> None:
    assert execute("pass").stderr.splitlines()[-1] == "demo: done, stage 1 of 2; next last"
