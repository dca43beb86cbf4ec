"""Fixtures of all tests: a clean environment, few threads and no network beyond this machine."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from llm.common.log import setup_logging

ROOT = Path(__file__).resolve().parent.parent

# Before torch and mlflow are imported. One thread for each worker of pytest-xdist; two when there is only one process.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker has the environment of the process that started it, which has two
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", DVC_NO_ANALYTICS="true")
for name in [n for n in os.environ if n.startswith(("MLFLOW_TRACKING", "MLFLOW_RUN", "MLFLOW_EXPERIMENT", "DVC_EXP"))]:
    del os.environ[name]
if "LLM_DATA_MIRROR" in os.environ:  # only for tests that ask for it, in every worker
    os.environ["LLM_TEST_MIRROR"] = os.environ["LLM_DATA_MIRROR"]
for name in ("LLM_DATA_MIRROR", "LLM_LOG_LEVEL", "DVC_ROOT", "DVC_STAGE"):
    os.environ.pop(name, None)

# The files that take longest, which begin first: the workers of pytest-xdist then end together.
LONGEST = (
    "tests/test_pipeline.py",
    "tests/convert/test_hf.py",
    "tests/bench/test_bench.py",
    "tests/test_examples.py",
    "tests/test_private_data.py",
    "tests/stages/test_release.py",
    "tests/stages/test_registry.py",
    "tests/tokenizer/test_hf.py",
    "tests/tokenizer/test_added.py",
    "tests/tokenizer/test_sentencepiece.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist's own order: by the number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


# The same examples every time and no time limits: a test passes or fails by what it tests.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


# Modules and fixtures make millions of objects that stay, and every full collection looks at them all.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """Leave out the wait for the disk of each written file; its place among the other steps has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    """Give back the threads that a test took: more than one in each worker wait for each other."""
    yield
    if "torch" in sys.modules:
        torch, threads = sys.modules["torch"], int(os.environ["OMP_NUM_THREADS"])
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_mlflow_store() -> Iterator[None]:
    """Forget the store that MLflow, or a test, has written into the environment of this process."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to other machines are refused, as they would be without a network."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"tests use no network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def _messages_on_stderr() -> None:
    """Show messages of progress as the commands do, whatever an earlier test has set."""
    setup_logging()


@pytest.fixture
def mirror() -> Path:
    """The folder with the real data sets."""
    if not os.environ.get("LLM_TEST_MIRROR"):
        pytest.skip("the real data sets are not here: set LLM_TEST_MIRROR to a folder that holds them")
    return ROOT / os.environ["LLM_TEST_MIRROR"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    if os.environ.get("LLM_TEST_SMOLLM2"):
        return ROOT / os.environ["LLM_TEST_SMOLLM2"]
    script = ROOT.parent / "shared" / "get-smollm2"
    if not script.is_file():
        pytest.skip(f"SmolLM2 is not here: set LLM_TEST_SMOLLM2 to its .gguf file, or have {script}")
    got = subprocess.run([script], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"SmolLM2 could not be fetched: {got.stderr.strip().splitlines()[-1:]}")
    return Path(got.stdout.strip())
