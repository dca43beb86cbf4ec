"""Fixtures of the tests of stages."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from stages.tracking import mlflow_client, registry


@pytest.fixture(scope="session", autouse=True)
def _requirements_are_found_once() -> Iterator[None]:
    """Look but once for all that the code of a registered model imports: it does not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "requirements", functools.cache(registry.requirements))
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_TRACKING", "off")
    return tmp_path


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of MLflow's database as the first connection to it leaves it, one for all workers of xdist."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home = shared / "home"
    home.mkdir(exist_ok=True)
    with FileLock(shared / "home.lock"), pytest.MonkeyPatch.context() as patch:
        if (home / "made").exists():
            return home / "mlflow.db"
        patch.setenv("DVC_ROOT", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        mlflow_client.set_environment()
        mlflow_client.connect()
        (home / "made").touch()
    return home / "mlflow.db"


@pytest.fixture
def tracked(place: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with a database of its own, to which `Delivery()` delivers."""
    shutil.copy(database, place / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return place
