"""Registered models away from the repository: `mlflow models serve`, the Containerfile, and our own server."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

import llm
from llm.cli.serve import resolve
from tests.serving.conftest import QUESTION

pytestmark = pytest.mark.slow  # registering three models takes MLflow some ten seconds
ROOT = Path(__file__).resolve().parents[2]
KINDS = {"base": "base", "instruct": "instruct", "classifier": "spam"}  # the folders of the fixture `place`
SECONDS = 120  # that a server may need to start on a busy machine


class Registry(NamedTuple):
    """A store with a registered model of each kind, alias champion."""

    uri: str
    home: Path  # where no code of ours is


@pytest.fixture(scope="module")
def registry(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    from mlflow import MlflowClient

    from stages.tracking.registry import Origin, register

    home = tmp_path_factory.mktemp("away")
    uri = f"sqlite:///{home}/mlflow.db"
    client = MlflowClient(uri, uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        experiment = client.create_experiment("e", artifact_location=str(home / "artifacts"))
        for kind, folder in KINDS.items():
            version = register(client, experiment, f"llm-{kind}", place / folder, ROOT / "llm", Origin(run_id=None))
            client.set_registered_model_alias(f"llm-{kind}", "champion", version.version)
    return Registry(uri, home)


def clean_environment(registry: Registry) -> dict[str, str]:
    """The environment of a machine without this repository, but for the installed packages."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_RUN_ID", "DVC_ROOT")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "MLFLOW_TRACKING_URI": registry.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, where: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run a server until the block ends; yield the address of its models."""
    log = where / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=where, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def started(url: str) -> bool:
    try:
        return requests.get(f"{url}/ping", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    for _ in range(2 * SECONDS):
        if started(url):
            return
        time.sleep(0.5)
    raise AssertionError("it did not start")


def ask(url: str, body: dict[str, Any]) -> Any:
    answer = requests.post(f"{url}/invocations", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_all_kinds_answer_through_mlflow_away_from_the_repository(registry: Registry, place: Path) -> None:
    urls = {}
    with ExitStack() as stack:
        for kind in KINDS:
            port = free_port()
            command = ["mlflow", "models", "serve", "-m", f"models:/llm-{kind}@champion", "--env-manager", "local"]
            command += ["--port", str(port)]
            urls[kind] = stack.enter_context(running(command, port, registry.home, clean_environment(registry)))
        for url in urls.values():
            wait_for(url)
        texts = ["the cat sat on", "you have won"]
        params = {"max_new_tokens": 8}
        base = llm.load(place / "base", device="cpu")
        found = ask(urls["base"], {"inputs": texts, "params": params})["predictions"]
        assert [each["text"] for each in found] == base.generate_batch(texts, max_new_tokens=8)
        expected = llm.load(place / "instruct", device="cpu").chat(QUESTION, max_new_tokens=8)
        chat = ask(urls["instruct"], {"messages": QUESTION, "max_tokens": 8})
        assert chat["object"] == "chat.completion" and chat["choices"][0]["message"]["content"] == expected
        rows = llm.load(place / "spam", device="cpu").classify(texts)
        labels = ask(urls["classifier"], {"dataframe_split": {"columns": ["text"], "data": [[text] for text in texts]}})
        assert [each["label"] for each in labels["predictions"]] == [max(row, key=row.__getitem__) for row in rows]


def test_nothing_in_a_registered_model_is_pickled(registry: Registry) -> None:
    files = [path for path in (registry.home / "artifacts").rglob("*") if path.is_file()]
    assert len({path.suffix for path in files} & {".safetensors", ".py", ".json"}) == 3
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin", ".cloudpickle")]
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80" and path.suffix != ".safetensors"]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, lines joined."""
    lines = (ROOT / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    found = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, rest in found]


def test_the_commands_of_the_containerfile_serve_a_model(registry: Registry, place: Path) -> None:
    """Each instruction is carried out in a folder, in its order, as a container engine would."""
    app = registry.home / "container"
    [fetch] = re.findall(r"^#   (mlflow .*)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    context = registry.home / "context"
    context.mkdir()
    environment = clean_environment(registry)
    subprocess.run(
        shlex.split(fetch.replace("candidate", "champion")),
        cwd=context,
        env=environment,
        check=True,
        capture_output=True,
    )
    command: list[str] = []
    for name, rest in instructions():
        if name == "WORKDIR":
            app.mkdir()
        elif name == "COPY":
            source, target = rest.split()
            shutil.copytree(context / source, app / target)
        elif name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif name == "RUN":
            done = subprocess.run(rest, shell=True, cwd=app, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and "Successfully installed" not in done.stdout, (
                "requirements are those of here"
            )
        elif name == "CMD":
            command = json.loads(rest)
        else:
            assert name in ("FROM", "EXPOSE")
    port = free_port()
    command = [str(port) if word == "8080" else "127.0.0.1" if word == "0.0.0.0" else word for word in command]
    with running(command, port, app, environment) as url:
        wait_for(url)
        expected = llm.load(place / "instruct", device="cpu").chat(QUESTION, max_new_tokens=6)
        chat = ask(url, {"messages": QUESTION, "max_tokens": 6})
        assert chat["choices"][0]["message"]["content"] == expected


def test_our_server_takes_a_registered_model(registry: Registry, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    from llm.serving.models import Loading, Models

    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(registry.uri)
    try:
        models = Models(Loading("cpu"), resolve)
        models.add("models:/llm-instruct@champion")
        models.add("chosen=models:/llm-base@champion")
        assert set(models.served) == {"llm-instruct", "chosen"}
        answer = models.get("llm-instruct").model.chat(QUESTION, max_new_tokens=6)
        assert answer == llm.load(place / "instruct", device="cpu").chat(QUESTION, max_new_tokens=6)
        models.close()
        with pytest.raises(llm.InputError, match=r"models:/llm-gone@champion: not in the registry"):
            Models(Loading("cpu"), resolve).add("models:/llm-gone@champion")
    finally:
        mlflow.set_tracking_uri(before)
