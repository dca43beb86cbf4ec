"""Provenance of a run: what differs from the commit, and what stages that DVC skipped have left."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from llm.common.digests import path_md5
from stages.tracking import pipeline_run
from stages.tracking.delivery import Delivery
from stages.tracking.journal import Journal
from stages.tracking.journal_reader import start_event
from stages.tracking.mlflow_client import tracking_uri
from stages.tracking.provenance import git_tags, in_workspace

PARAMS: dict[str, Any] = {
    "seed": 1,
    "training": {"optimizer": "muon", "beta1": 0.9},
    "pretrain": {"lr": 0.1, "optimizer": "adamw"},
    "finetune_classify": {"lr": 0.2},
    "runtime": {"device": "auto"},
    "sources": {"sample": {"licence": "MIT"}},
}
STAGES = {
    "tokenize": {"params": ["seed"], "deps": ["data/raw", "stages/tokenize.py"], "outs": ["data/tokens"]},
    "pretrain": {
        "params": ["seed", "pretrain"],
        "deps": ["data/tokens/corpus", "llm/model"],
        "outs": ["models/base"],
        "plots": [{"reports/plots/pretrain.csv": {"cache": False}}],
    },
    "finetune-classify": {"params": ["seed"], "deps": ["models/base"], "outs": ["models/classifier"]},
    "evaluate": {"params": ["seed"], "deps": ["models/classifier"], "outs": [{"reports/report.md": {"cache": False}}]},
}
LOCK = {
    "tokenize": {
        "deps": [{"path": "data/raw", "md5": "1.dir"}, {"path": "stages/tokenize.py", "md5": "9"}],
        "outs": [{"path": "data/tokens", "md5": "2.dir"}],
    },
    "pretrain": {
        "deps": [{"path": "data/tokens/corpus", "md5": "3.dir"}],
        "outs": [{"path": "models/base", "md5": "4.dir"}],
    },
    "finetune-classify": {"outs": [{"path": "models/classifier", "md5": "5.dir"}]},
    "evaluate": {"outs": [{"path": "reports/report.md", "md5": "6"}]},
}


@pytest.fixture
def repository(place: Path) -> Path:
    """Return a committed repository with code, params, data and an output."""
    git("init", "-q")
    (place / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    (place / "dvc.lock").write_text(yaml.safe_dump({"stages": LOCK}))
    write_params(place)
    for name in ("llm/model/gpt.py", "stages/tokenize.py", "data/raw/a.txt", "reports/report.md", "README.md"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("as committed")
    (place / "reports/plots").mkdir()
    (place / "reports/plots/pretrain.csv").write_text("step,train/loss,val/loss\n0,3,3.5\n10,2,2.5\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    return place


def git(*words: str) -> None:
    person = ["-c", "user.name=tester", "-c", "user.email=tester@localhost"]
    subprocess.run(["git", *person, *words], check=True)


def write_params(place: Path, **changes: dict[str, Any]) -> None:
    values = {
        key: (value | changes.get(key, {}) if isinstance(value, dict) else value) for key, value in PARAMS.items()
    }
    (place / "params.yaml").write_text(yaml.safe_dump(values | {k: v for k, v in changes.items() if k not in values}))


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        ([], False),
        (["reports/report.md"], False),
        (["dvc.lock"], False),
        (["models/base/config.json", "data/tokens/a.bin", "notes.txt"], False),
        (["llm/model/__pycache__/gpt.pyc"], False),
        (["llm/model/gpt.py"], True),
        (["llm/model/new.py"], True),
        (["stages/tokenize.py"], True),
        (["data/raw/a.txt"], True),
        (["params.yaml"], True),
        (["dvc.yaml"], True),
    ],
)
def test_dirty_means_code_params_and_data(repository: Path, changed: list[str], dirty: bool) -> None:
    for name in changed:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        with (repository / name).open("a") as file:
            file.write("\n# changed\n")
    assert git_tags()["git.dirty"] == str(dirty).lower()


@pytest.mark.parametrize(
    ("changes", "experiment", "name"),
    [
        ({}, "", "COMMIT sample"),
        ({"pretrain": {"lr": 0.3}}, "", "COMMIT pretrain.lr=0.3"),
        ({"pretrain": {"lr": 0.3, "beta1": 0.5}}, "gooey-hoop", "gooey-hoop pretrain.beta1=0.5 pretrain.lr=0.3"),
        ({"sources": {"mine": {"licence": "private", "text": "x"}}}, "", "COMMIT sources.mine"),
        ({"pretrain": {f"key_{n:02}": n for n in range(30)}}, "", "COMMIT pretrain.key_00=0 .* and 25 more"),
    ],
)
def test_run_name_says_what_differs_from_the_commit(
    repository: Path, changes: dict[str, Any], experiment: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.setenv("DVC_EXP_NAME", experiment)
    write_params(repository, **changes)
    journal = Journal.start("pretrain", {}, "sample")
    start = start_event(journal.folder)
    commit = start["tags"]["mlflow.source.git.commit"][:7]
    found = pipeline_run.run_name(start, journal.folder)
    assert re.fullmatch(name.replace("COMMIT", commit), found) and len(found) <= 120
    journal.end("FINISHED")


def test_name_of_a_run_of_changed_code_says_so(repository: Path) -> None:
    (repository / "llm/model/gpt.py").write_text("other")
    journal = Journal.start("pretrain", {}, "sample")
    assert pipeline_run.run_name(start_event(journal.folder), journal.folder).endswith(" sample, edited")
    journal.end("FINISHED")


def test_copies_for_experiments_are_no_workspace(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_workspace()
    monkeypatch.setenv("DVC_ROOT", str(place))
    (place / ".dvc/tmp/exps/a").mkdir(parents=True)
    monkeypatch.chdir(place / ".dvc/tmp/exps/a")
    assert not in_workspace()


def test_pipeline_has_all_params_digests_and_curves_of_skipped_stages(repository: Path, tracked: Path) -> None:
    journal = Journal.start("finetune-classify", {"seed": 1}, "sample", environment={"torch": "2", "precision": "fp32"})
    journal.outputs({"models/classifier": "7"})
    journal.end("FINISHED")
    (repository / "dvc.lock").unlink()  # what was handed over counts
    Delivery().deliver(journal.folder.parent)
    runs = MlflowClient(tracking_uri()).search_runs(["1"])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    [stage] = [run for run in runs if run is not parent]
    assert parent.data.params == {
        "seed": "1",
        "pretrain.optimizer": "adamw",
        "pretrain.beta1": "0.9",
        "pretrain.lr": "0.1",
        "finetune_classify.optimizer": "muon",
        "finetune_classify.beta1": "0.9",
        "finetune_classify.lr": "0.2",
        "runtime.device": "auto",
        "environment.torch": "2",
        "environment.precision": "fp32",
    }
    digests = {key: value for key, value in parent.data.tags.items() if key.startswith("md5.")}
    assert digests == {
        "md5.data/raw": "1",
        "md5.data/tokens": "2",
        "md5.data/tokens/corpus": "3",
        "md5.models/base": "4",
        "md5.models/classifier": "7",
    }, "of this stage the new one, of the code none, of the stages behind it none"
    assert stage.data.tags["md5.models/classifier"] == "7"
    assert {(each.dataset.name, each.dataset.digest) for each in parent.inputs.dataset_inputs} == {
        ("data/raw", "1"),
        ("data/tokens", "2"),
    }
    assert parent.data.metrics == {"Val loss/pretrain": 2.5}
    curve = MlflowClient(tracking_uri()).get_metric_history(parent.info.run_id, "Val loss/pretrain")
    assert [(point.step, point.value) for point in curve] == [(0, 3.5), (10, 2.5)]


def test_end_of_a_pipeline_logs_what_dvc_lock_has_then(repository: Path, tracked: Path) -> None:
    journal = Journal.start("tokenize", {"seed": 1}, "sample")
    journal.end("FINISHED")
    delivery = Delivery()
    delivery.deliver(journal.folder.parent)
    delivery.finish(journal.folder.parent)
    [parent] = MlflowClient(tracking_uri()).search_runs(["1"], "tags.`md5.reports/report.md` = '6'")
    assert parent.data.tags["md5.models/classifier"] == "5", "skipped, as its inputs are the same"


def test_digests_of_files_and_folders_are_those_of_dvc(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.txt").write_text("c")
    (tmp_path / "a.txt").write_text("a")
    assert path_md5(tmp_path / "a.txt") == "0cc175b9c0f1b6a831c399e269772661"
    import hashlib
    import json

    entries = [
        {"md5": "0cc175b9c0f1b6a831c399e269772661", "relpath": "a.txt"},
        {"md5": "4a8a08f09d37b73795649038408b5f33", "relpath": "b/c.txt"},
    ]
    assert path_md5(tmp_path) == hashlib.md5(json.dumps(entries).encode()).hexdigest()
    assert path_md5(tmp_path / "missing") is None
