"""Delivery to MLflow, which may be late, twice, down or hanging without a stage noticing."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from llm.checkpoint.folder import Checkpoint, CheckpointConfig, save_checkpoint
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from stages.tracking.delivery import Delivery, deliver_all, record_problem, undelivered_pipelines
from stages.tracking.journal import Journal, read_events
from stages.tracking.journal_reader import list_journals
from stages.tracking.mlflow_client import redact_urls
from stages.tracking.process import Process
from tests.conftest import ROOT
from tests.forks import run_forked
from tests.helpers import gpt_config
from tests.stages.test_journal import record


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, database: Path) -> str:
    """Return the URI of a database with one experiment."""
    copy = shutil.copy(database, tmp_path_factory.mktemp("store"))
    client = MlflowClient(f"sqlite:///{copy}")
    assert [e.name for e in client.search_experiments()] == ["llm"], "without an empty Default beside it"
    return f"sqlite:///{copy}"


@pytest.mark.slow
def test_processes_of_two_repositories_race_to_create_a_database(tmp_path: Path) -> None:
    """None of them fails."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    places = [tmp_path / "one", tmp_path / "other"]
    racing = [places[0], places[1], places[1]]
    for number, place in enumerate(racing):
        journal = Journal(place / ".work/runs" / f"pipeline-{number}" / "demo-1")
        journal.write(event="start", stage="demo", title="t", process=Process(1, 1, "elsewhere"), params={}, tags={})
        journal.end("FINISHED")
    processes = [command("stages.sync", place, LLM_TRACKING="on", MLFLOW_TRACKING_URI=uri) for place in racing]
    for process in processes:
        told = process.communicate(timeout=400)
        assert process.returncode == 0, told
    client = MlflowClient(uri)
    assert [e.name for e in client.search_experiments()] == ["llm"], "without an empty Default beside it"
    assert len(all_runs(uri)) == 6


@pytest.fixture
def delivery(store: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Delivery]:
    """Return a delivery to the store, into an experiment of this test alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", place.name)
    yield Delivery()


def command(module: str, cwd: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", module, *words], cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True
    )


def all_runs(uri: str, experiment: str = "llm") -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def snapshot(uri: str, experiment: str) -> dict[str, Any]:
    """Return the content of an experiment's runs in MLflow, by their tag `llm.run`."""
    client, content = MlflowClient(uri), {}
    for run in all_runs(uri, experiment):
        history = {
            key: [
                (point.step, point.timestamp, point.value) for point in client.get_metric_history(run.info.run_id, key)
            ]
            for key in run.data.metrics
        }
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        inputs = [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs]
        times = run.info.status, run.info.start_time, run.info.end_time
        content[run.data.tags["llm.run"]] = run.info.run_name, times, run.data.params, history, files, inputs
    return content


def logged_tables(uri: str, experiment: str) -> list[Any]:
    """Return the columns and rows of all runs' tables."""
    places = [Path(run.info.artifact_uri.removeprefix("file://")) for run in all_runs(uri, experiment)]
    files = [place / folder / "scores.json" for place in places for folder in ("predictions", "tables")]
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [(table["columns"], table["data"]) for table in tables]


def test_urls_lose_user_password_and_query() -> None:
    assert redact_urls("https://me:secret@host:5000/path?a@b") == "https://host:5000/path"
    assert redact_urls("is 'https://host/a?token=secret' up? see b") == "is 'https://host/a' up? see b"
    assert redact_urls("sqlite:////home/me@work/mlflow.db") == "sqlite:////home/me@work/mlflow.db"


# ---- delivery --------------------------------------------------------------------------------------------------------


def test_a_delivery_with_nothing_new_reads_no_params(
    delivery: Delivery, place: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens every second beside a training."""
    journal = record("pretrain")
    delivery.deliver(journal.folder.parent)
    monkeypatch.setattr("stages.tracking.pipeline_run.read_values", MagicMock(side_effect=AssertionError))
    delivery.deliver(journal.folder.parent)
    journal.end("FINISHED")


def test_pipeline_is_a_parent_run_and_each_stage_a_child(delivery: Delivery, place: Path, store: str) -> None:
    first = record("pretrain", lr="x" * 7000)
    for step in (0, 10):
        first.metrics({"val/loss": 5 - step / 10, "val/bpb": 1.0}, step)
    delivery.deliver(first.folder.parent)
    runs = {run.info.run_name: run for run in all_runs(store, place.name)}
    assert {run.info.status for run in runs.values()} == {"RUNNING"}, "while a stage runs"
    first.summary({"epochs": 1.5})
    first.end("FINISHED")
    second = record("evaluate", model="y")
    second.summary({"base/bpb": 0.3, "base/tokens": 7, "classifier/accuracy": 0.9, "classifier_tfidf/accuracy": 0.8})
    second.end("FAILED")
    delivery.deliver(first.folder.parent)

    runs = {run.info.run_name: run for run in all_runs(store, place.name)}
    parent = runs.pop("run sample")
    assert set(runs) == {"pretrain", "evaluate"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert [runs[name].info.status for name in ("pretrain", "evaluate")] == ["FINISHED", "FAILED"]
    assert parent.info.status == "FAILED"
    assert parent.info.end_time == runs["evaluate"].info.end_time
    assert parent.data.params == {"seed": "123", "model.n_layers": "6", "lr": "x" * 6000, "model": "y"}
    headlines = {"Held out/bpb": 0.3, "Held out/accuracy": 0.9}
    assert parent.data.metrics == {"Val loss/pretrain": 4.0, **headlines}, "all others are on the stages' runs"
    curve = MlflowClient(store).get_metric_history(parent.info.run_id, "Val loss/pretrain")
    assert [(point.step, point.value) for point in curve] == [(0, 5.0), (10, 4.0)]
    assert runs["pretrain"].data.metrics["epochs"] == 1.5
    assert runs["pretrain"].data.metrics["train/loss"] == 3.0


def test_delivery_is_idempotent_in_any_order(delivery: Delivery, place: Path, store: str) -> None:
    pipelines = []
    for number in range(2):
        journal = record(steps=3000)  # more than one batch
        (place / "report.md").write_text("r")
        journal.artifact(place / "report.md")
        (place / "scores.csv").write_text("model,accuracy\nGPT,0.9\nxz,0.1\n")
        (place / "scores.jsonl").write_text('{"text": "a", "predicted": {"gpt": "ham"}}\n')
        for name in ("scores.csv", "scores.jsonl"):
            journal.table(place / name)
        journal.summary({"val/loss": 1.5})
        journal.end("FINISHED")
        pipelines.append(journal.folder.parent.rename(journal.folder.parent.with_name(f"pipeline-{number}")))
    shutil.copytree(place / ".work", place / "kept")
    for pipeline in pipelines:
        delivery.deliver(pipeline)
    before = snapshot(store, place.name)
    assert len(before) == 4
    child = next(value for name, value in before.items() if "pipeline-0/" in name)
    assert child[1][0] == "FINISHED"
    assert [step for step, _, _ in child[3]["train/loss"]] == list(range(0, 3000, 10))
    assert child[4:] == (["predictions", "report.md", "tables"], [("data/tokens", "0" * 32, "pretrain")])
    shown = logged_tables(store, place.name)
    tables = [(["text", "predicted.gpt"], [["a", "ham"]]), (["model", "accuracy"], [["GPT", 0.9], ["xz", 0.1]])]
    assert shown == tables * 4, "on each pipeline's run and on its stage's"
    for run in all_runs(store, place.name):  # by this tag the page of evaluations finds what it compares
        assert "tables/scores.json" in run.data.tags["mlflow.loggedArtifacts"]
    assert not (pipelines[0] / "files").exists()

    shutil.rmtree(place / ".work")  # as if nothing had been delivered
    (place / "kept").rename(place / ".work")
    again = Delivery()
    for pipeline in reversed(pipelines):
        again.deliver(pipeline)
        again.deliver(pipeline)
    assert snapshot(store, place.name) == before
    assert logged_tables(store, place.name) == shown, "no row is there twice"
    assert undelivered_pipelines() == []


def test_journal_of_a_killed_stage_ends_as_killed(delivery: Delivery, place: Path, store: str) -> None:
    def killed() -> None:
        journal = Journal.start("pretrain", {}, "sample")
        journal.metrics({"train/loss": 2.0}, 5)
        with (journal.folder / "events.jsonl").open("a") as file:
            file.write('{"time": 1, "ev')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(killed).returncode == -signal.SIGKILL
    [pipeline] = undelivered_pipelines()
    delivery.deliver(pipeline)
    runs = all_runs(store, place.name)
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    assert all(run.info.end_time >= run.info.start_time for run in runs)
    assert [run.data.metrics["train/loss"] for run in runs if run.info.run_name == "pretrain"] == [2.0]


def test_new_store_gets_everything_again(
    delivery: Delivery, place: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = record()
    delivery.deliver(journal.folder.parent)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"{place.name}-2")
    journal.end("FINISHED")
    Delivery().deliver(journal.folder.parent)
    [child] = [run for run in all_runs(store, f"{place.name}-2") if run.info.run_name == "pretrain"]
    assert child.data.metrics["train/loss"] == 3.0


STAGE = """
from pathlib import Path
from stages.runtime import run
from stages.tracking import journal as tracking

tracking.DELIVERY_TIMEOUT = 300  # until the delivery says what is wrong, on a slow machine too


def demo(run):
    for step in range(0, 50, 10):
        run.log({"train/loss": 5 - step / 10}, step)
    Path("out.txt").write_text("a result")
    run.write_metrics({"val/loss": 1.5})


run.main("demo", demo)
"""


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """A server that answers as the first part of the path says."""

    def do_GET(self) -> None:
        body = b"{}"
        match self.path.split("/")[1]:
            case "error":
                self.send_response(500)
            case "garbage":
                self.send_response(200)
                body = b"\xff<html>"
            case "dies":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
            case "slow":
                time.sleep(3)  # longer than the delivery waits
                self.send_response(503)
            case "forbidden":
                self.send_response(401)
            case "redirect":
                self.send_response(302)
                self.send_header("Location", self.path)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def bad_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield URIs of tracking servers and databases, by their fault."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "file").touch()
    with (
        socket.create_server(("127.0.0.1", 0)) as hanging,
        socket.create_server(("127.0.0.1", 0)) as closed,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer) as faulty,
    ):
        threading.Thread(target=faulty.serve_forever, daemon=True).start()
        ports = {"hangs": hanging.getsockname()[1], "refuses": closed.getsockname()[1]}
        closed.close()
        kinds = ("error", "garbage", "dies", "slow", "forbidden", "redirect")
        yield {
            **{kind: f"http://me:secret@127.0.0.1:{port}" for kind, port in ports.items()},
            **{kind: f"http://me:secret@127.0.0.1:{faulty.server_address[1]}/{kind}" for kind in kinds},
            "disk full": f"sqlite:///{folder}/mlflow.db",
            "no folder": f"sqlite:///{folder}/file/mlflow.db",
        }
        faulty.shutdown()


def small_files() -> None:
    """Limit the size of files: enough for a journal, not for a database."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


@pytest.mark.slow
def test_faulty_store_neither_disturbs_a_stage_nor_loses_events(
    place: Path, store: str, bad_stores: dict[str, str]
) -> None:
    variables = {"DVC_ROOT": str(place), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    stages = {}
    for kind, address in {"undisturbed": "", **bad_stores}.items():  # all at once, as experiments of a queue are
        folder = place / kind
        folder.mkdir()
        shutil.copy(ROOT / "params.yaml", folder)
        (folder / "dvc.yaml").write_text("stages: {demo: {cmd: python stage.py, deps: [stage.py], params: [seed]}}")
        (folder / "stage.py").write_text(STAGE)
        stages[kind] = subprocess.Popen(
            [sys.executable, "stage.py"],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "LLM_TRACKING": "on" if address else "off", "MLFLOW_TRACKING_URI": address}
            | variables,
            preexec_fn=small_files if kind == "disk full" else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for kind, stage in stages.items():
        out, err = stage.communicate(timeout=400)
        address = redact_urls(bad_stores.get(kind, ""))
        assert (stage.returncode, out) == (0, ""), f"{kind}: {err}"
        line = (
            f"tracking: MLflow at {address} (did not answer|failed: .*); the record is kept: python -m stages.sync .*\n"
        )
        said = err.replace("demo: no git repository here, so its run names no commit\n", "")
        assert re.fullmatch(line if address else "", said), f"{kind}: {err}"
        for name in ("out.txt", "reports/metrics/demo.json"):
            assert (place / kind / name).read_bytes() == (place / "undisturbed" / name).read_bytes()
    for pipeline in place.glob(".work/runs/*/"):
        wait_for_lock(pipeline)
        [journal] = list_journals(pipeline)
        events = [
            e
            for e in read_events(journal)
            if not {"system", "time"} & {key.split("/")[0] for key in e.get("values", {})}
        ]
        assert [e["event"] for e in events] == ["start", *["metrics"] * 5, "summary", "outputs", "end"]
    for path in place.rglob(".work/**/*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path

    known: list[dict[str, Any]] = []
    for _ in range(2):
        for path in place.glob(".work/runs/*/*/"):  # as if nothing had been delivered
            for name in ("delivered", "progress.json"):
                (path / name).unlink(missing_ok=True)
        later = command("stages.sync", place, MLFLOW_TRACKING_URI=store, MLFLOW_EXPERIMENT_NAME=place.name)
        assert later.communicate(timeout=400) == (f"{len(stages)} runs delivered to {store}\n", "")
        known.append(snapshot(store, place.name))
    assert known[0] == known[1]
    demos = [run for run in known[0].values() if run[0] == "demo"]
    assert (len(demos), len(known[0])) == (len(stages), 2 * len(stages))
    for _, times, _, history, *_ in demos:
        assert times[0] == "FINISHED"
        assert [(step, value) for step, _, value in history["train/loss"]] == [
            (s, 5 - s / 10) for s in range(0, 50, 10)
        ]


def wait_for_lock(pipeline: Path) -> None:
    """Wait until the delivery that the stage started has ended."""
    from llm.common.lock import locked

    with locked(pipeline / "lock", timeout=300) as holder:
        assert holder is None


def test_experiment_that_another_clone_creates_first_is_used(
    delivery: Delivery, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).create_experiment(place.name)
    first_look = MlflowClient.get_experiment_by_name

    def too_early(client: MlflowClient, name: str) -> None:
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", first_look)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)
    assert delivery.connection[1] == made


def dead_journal(place: Path, name: str) -> Journal:
    """Return the journal of a stage that was killed."""
    journal = Journal(place / ".work/runs" / name / "pretrain-1")
    gone = Process(2**22, 1, socket.gethostname())
    journal.write(event="start", stage="pretrain", title=name, process=gone._asdict(), params={}, tags={})
    return journal


def test_stage_delivers_itself_and_what_killed_ones_left(place: Path, store: str) -> None:
    dead = dead_journal(place, "died")
    variables = {"LLM_TRACKING": "on", "MLFLOW_TRACKING_URI": store, "MLFLOW_EXPERIMENT_NAME": place.name}
    (place / "stage.py").write_text(
        "from stages.tracking import journal as tracking; tracking.DELIVERY_TIMEOUT = 300\n"
        "j = tracking.Journal.start('pretrain', {'seed': 1}, 'sample')\n"
        "j.metrics({'train/loss': 2.0}, 5); j.end('FINISHED'); print((j.folder / 'delivered').exists())"
    )
    stage = command("stage", place, MLFLOW_RUN_ID="0" * 32, **variables)
    assert stage.communicate(timeout=400) == ("True\n", "")
    for _ in range(3000):  # what delivered it goes on with what was left
        if (dead.folder / "delivered").exists():
            break
        time.sleep(0.1)
    runs = sorted((run.info.run_name, run.info.status) for run in all_runs(store, place.name))
    assert runs == [("died", "KILLED"), ("pretrain", "FINISHED"), ("pretrain", "KILLED"), ("run sample", "FINISHED")]


def test_bad_journal_does_not_stop_the_delivery_of_others(
    delivery: Delivery, place: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = place / ".work/runs/1/pretrain-1/events.jsonl"
    empty.parent.mkdir(parents=True)
    empty.touch()  # a full disk refused the first line
    bad = dead_journal(place, "2")
    bad.write(event="artifact", name="lost.md")
    good = dead_journal(place, "3")
    assert deliver_all() == 1
    said = capsys.readouterr()
    assert said.out == f"1 runs delivered to {store}\n"
    assert re.search(r"^tracking: MLflow at sqlite:.* failed: .*lost.md", said.err, re.MULTILINE)
    assert [path.parent for path in place.glob(".work/runs/*/*/delivered")] == [good.folder]


def test_error_without_message_is_reported_by_its_name(place: Path) -> None:
    assert record_problem(place, TimeoutError()).endswith("failed: TimeoutError")


def test_error_is_one_line_of_whole_words(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    problem = record_problem(place, ValueError("an explanation " * 60 + "\nand more"))
    assert problem.endswith((" an ...", " explanation ...")) and "\n" not in problem
    assert capfd.readouterr() == ("", ""), "the traceback is in the log"
    assert "ValueError" in (place / "delivery.log").read_text()


# ---- models ----------------------------------------------------------------------------------------------------------


def make_models(place: Path) -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 50], 270)
    config = gpt_config(vocab_size=tokenizer.vocab_size, context_length=128)
    torch.manual_seed(0)
    gpt = GPT(config)
    labels = ["ham", "spam"]
    kinds = {
        "base": (gpt, CheckpointConfig(kind="base", gpt=config)),
        "instruct": (gpt, CheckpointConfig(kind="instruct", gpt=config, template="chatml")),
        "classifier": (
            GPTClassifier(gpt, 2),
            CheckpointConfig(kind="classifier", gpt=config, labels=labels, max_length=32),
        ),
    }
    for kind, (model, folder_config) in kinds.items():
        save_checkpoint(place / "models" / kind, Checkpoint(model, tokenizer, folder_config))


def test_registered_models_load_without_pickle_and_answer(delivery: Delivery, place: Path, store: str) -> None:
    make_models(place)
    journal = record("evaluate")
    for kind in ("base", "classifier", "instruct"):
        journal.register_model(f"llm-{kind}", place / "models" / kind)
    journal.end("FINISHED")
    delivery.deliver(journal.folder.parent)
    Delivery().deliver(journal.folder.parent)

    (place / "elsewhere/llm").mkdir(parents=True)
    (place / "elsewhere/llm/__init__.py").write_text("name = 'the other package'")

    code = """
import json, sys, llm, mlflow, pandas as pd
answers = {}
names = "llm-base", "llm-classifier", "llm-instruct"
loaded = {name: mlflow.pyfunc.load_model(f"models:/{name}@candidate") for name in names}
for name, model in loaded.items():
    answers[name] = model.predict(["the cat", "a mat on the mat"]), model.predict(pd.DataFrame({"text": ["the cat"]}))
params = {"max_new_tokens": 2, "temperature": 1.0, "seed": 3}
answers["short"] = loaded["llm-base"].predict(["the cat"], params=params)
answers["other"] = llm.name
own = [module for name, module in sys.modules.items() if name.startswith("textmill_")]
answers["code"] = [module.__file__ for module in own]
print(json.dumps(answers))
"""
    env = os.environ | {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    env |= {"PYTHONPATH": str(place / "elsewhere")}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["other"] == "the other package"
    assert answers["code"] and all("/code/textmill_" in file for file in answers["code"]), "the models' own copy"
    for name in ("llm-base", "llm-instruct"):
        assert [set(answer) for answer in answers[name][0]] == [{"text"}, {"text"}]
        assert answers[name][0][:1] == answers[name][1]
    assert len(answers["short"][0]["text"]) < len(answers["llm-base"][1][0]["text"])
    labelled = answers["llm-classifier"][0][0]
    assert labelled["label"] == max(labelled["probabilities"], key=labelled["probabilities"].get)
    assert sum(labelled["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    requirements = next((place / "mlruns").rglob("requirements.txt"))
    assert f"torch=={version('torch').partition('+')[0]}" in requirements.read_text().splitlines()
