"""Connection to MLflow: addresses of every kind, and a checkout that was moved or copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from stages.tracking import mlflow_client
from stages.tracking.mlflow_client import tracking_uri

ODD = "a %41 50% b?c#d"  # a folder's name that means something else in an address


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sqlite:///{root}/mlflow.db"),
        ("sqlite:///own.db", "sqlite:///{root}/own.db"),
        ("sqlite:///own.db?timeout=5", "sqlite:///{root}/own.db?timeout=5"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("mlruns", "file://{root}/mlruns"),
        ("./a b", "file://{root}/a%20b"),
        ("file:mlruns", "file://{root}/mlruns"),
        ("file:/tmp/x", "file:///tmp/x"),
        ("file:///tmp/x", "file:///tmp/x"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("databricks", "databricks"),
    ],
)
def test_tracking_uri_is_absolute_and_quoted(
    given: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / ODD
    root.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri() == expected.format(root=root.as_uri().removeprefix("file://"))


def log_file(place: Path) -> str:
    """Connect, log a file to a new run and return the run's id."""
    client, experiment = mlflow_client.connect()
    run = client.create_run(experiment).info.run_id
    (place / "note.txt").write_text("a note")
    client.log_artifact(run, str(place / "note.txt"))
    return str(run)


def test_moved_and_copied_checkouts_keep_their_artifacts(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, moved = tmp_path / ODD, tmp_path / "moved"
    first.mkdir()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    shutil.copy(database, first / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(first))
    old = log_file(first)
    assert (first / "mlruns" / old / "artifacts/note.txt").exists()
    first.rename(moved)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which MLflow itself has set
    new = log_file(moved)
    client = MlflowClient(tracking_uri())
    assert not first.exists()
    for run in (old, new):
        assert (moved / "mlruns" / run / "artifacts/note.txt").exists()
        assert [file.path for file in client.list_artifacts(run)] == ["note.txt"]


def test_experiment_is_described_and_alone(tracked: Path) -> None:
    """Kind and description are set, what a person has written stays, and MLflow's own experiment is gone."""
    client, experiment = mlflow_client.connect()
    found = client.search_experiments()
    assert [each.name for each in found] == ["llm"]
    assert found[0].tags["mlflow.experimentKind"] == "custom_model_development"
    assert "headline figures" in found[0].tags["mlflow.note.content"]
    client.set_experiment_tag(experiment, "mlflow.note.content", "ours")
    client, _ = mlflow_client.connect()
    assert client.get_experiment(experiment).tags["mlflow.note.content"] == "ours"


def test_default_experiment_in_use_stays(tracked: Path) -> None:
    client = MlflowClient(tracking_uri())
    client.restore_experiment("0")
    run = client.create_run("0").info.run_id
    client.delete_run(run)
    mlflow_client.connect()
    assert client.get_experiment("0").lifecycle_stage == "active", "somebody's run is in its bin"


@pytest.mark.parametrize("uri", ["folder of runs", "file:folder"])
def test_folders_are_stores_too(uri: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = log_file(place)
    folder = place / uri.removeprefix("file:")
    assert [path.name for path in folder.rglob(f"{run}/artifacts/*")] == ["note.txt"]
