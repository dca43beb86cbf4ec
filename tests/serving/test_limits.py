"""Limits of the server, odd requests, the end of a server and the swap of a model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from llm.cli.main import main
from llm.inference.generate import generate
from llm.serving.engine import Limits
from llm.serving.middleware import Gate
from tests.helpers import tiny_tokenizer
from tests.serving.conftest import QUESTION, Running, wait_until

ROOT = Path(__file__).resolve().parents[2]
KEY = "the-key"


@pytest.fixture(scope="module")
def guarded(place: Path) -> Iterator[Running]:
    gate = Gate(KEY, max_body=20_000, body_seconds=0.3)
    running = Running(place, gate, Limits(batch_size=1, queue=1, chunk=32), max_tokens=250)
    yield running
    running.stop()


def test_the_api_key_guards_all_but_health_and_the_page(guarded: Running) -> None:
    assert guarded.client(api_key=KEY).models.list().data
    for wrong in ("other", KEY + "x", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError, match="API key"):
            guarded.client(api_key=wrong).models.list()
    paths = {"/v1/models": 401, "/metrics": 401, "/health": 200, "/ready": 200, "/openapi.json": 200}
    assert {path: requests.get(guarded.url + path).status_code for path in paths} == paths
    for path in ("/tokenize", "/admin/reload", "/v1/classify", "/v1/inspect", "/v1/embeddings"):
        assert requests.post(guarded.url + path, json={}).status_code == 401


def test_a_full_queue_says_when_to_come_back(guarded: Running) -> None:
    client = guarded.client(api_key=KEY)
    options: Any = {"model": "base", "prompt": "the cat", "temperature": 0, "stream": True}
    running = client.completions.create(**options, max_tokens=240)
    next(iter(running))
    waiting = threading.Thread(
        target=lambda: client.completions.create(**options | {"stream": False}, max_tokens=1), daemon=True
    )
    engine = guarded.models.engines["base"]
    held = hold(engine)
    waiting.start()
    wait_until(lambda: len(engine.waiting) == 1)
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(**options, max_tokens=1)
    assert int(raised.value.response.headers["retry-after"]) >= 1
    held.set()
    running.close()
    waiting.join(10)
    assert not waiting.is_alive()


def hold(engine: Any) -> threading.Event:
    """Stop an engine between two steps until the event is set."""
    event, step = threading.Event(), engine.step

    def held() -> None:
        event.wait(10)
        engine.step = step
        step()

    engine.step = held
    return event


def post(server: Running, body: bytes | str, path: str = "/v1/chat/completions", **headers: str) -> requests.Response:
    kind = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    return requests.post(server.url + path, data=body, headers=kind | headers, timeout=20)


NASTY = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"model": "instruct", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    b'{"model": "instruct", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "instruct", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
    b'{"model": "instruct", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"model": "instruct", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    b'{"model": "instruct", "messages": [{"role": "user", "content": "a"}], "seed": 1' + b"0" * 5000 + b"}",
    b'{"model": "instruct", "messages": [{"role": "user", "content": "a"}], "stop": [' + b'"a",' * 20 + b'"a"]}',
    b'{"model": "instruct", "messages": ' + b"[" * 9000 + b"]" * 9000 + b"}",
]


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/classify", "/tokenize", "/v1/inspect", "/admin/reload")


@pytest.mark.parametrize("body", NASTY, ids=lambda body: ascii(body[:60]))
def test_bodies_that_make_no_sense_are_the_clients_error(guarded: Running, body: bytes) -> None:
    for path in PATHS:
        answer = post(guarded, body, path)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert answer.json()["error"]["message"]


def test_surrogates_and_odd_texts_are_refused_or_answered(guarded: Running) -> None:
    for text in ("\\u0000", "\\ud83d\\ude00", "\\u202e", "<|im_end|>"):
        body = f'{{"model": "instruct", "max_tokens": 2, "messages": [{{"role": "user", "content": "{text}"}}]}}'
        assert post(guarded, body).status_code == 200
    for values in ({"stop": "\ud800"}, {"response_format": {"type": "choice", "choices": ["\ud800"]}}):
        request = {"model": "instruct", "max_tokens": 2, "messages": QUESTION} | values
        assert post(guarded, json.dumps(request)).status_code == 400
    for path, field in (("/tokenize", "text"), ("/v1/classify", "input"), ("/v1/inspect", "text")):
        assert post(guarded, json.dumps({"model": "base", field: "\ud800"}), path).status_code == 400
    request = {"model": "base", "prompt": "\ud800", "echo": True, "max_tokens": 2}
    assert post(guarded, json.dumps(request), "/v1/completions").status_code == 400


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_are_refused_without_being_kept(guarded: Running, declared: bool) -> None:
    body = b" " * 3_000_000
    answer = post(guarded, body if declared else iter([body[:100_000]] * 30))  # type: ignore[arg-type]
    assert answer.status_code == 413 and "too large" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_given_up(guarded: Running) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
        head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 10\r\n\r\n{{"
        connection.sendall(head.encode())
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_many_headers_and_broken_requests_are_refused(guarded: Running) -> None:
    many = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 20) for i in range(10_000))
    for request in (
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + many + b"\r\n",
        b"\xff\xff\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
            connection.settimeout(10)
            try:
                connection.sendall(request)
                answer = connection.recv(1000)
            except ConnectionError:
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert requests.get(f"{guarded.url}/health").status_code == 200


def test_a_request_out_of_time_ends_with_what_there_is(place: Path) -> None:
    running = Running(place, max_seconds=0.05, max_tokens=250)
    try:
        found = running.client().completions.create(model="base", prompt="the cat", max_tokens=240, temperature=0)
        assert found.choices[0].finish_reason == "length" and found.usage is not None
        assert found.usage.completion_tokens <= 240
        client = running.client()
        client.models.list()
        held = hold(running.models.engines["base"])
        threading.Timer(0.5, held.set).start()
        with pytest.raises(openai.RateLimitError, match="longer than"):
            client.completions.create(model="base", prompt="a", max_tokens=2)
    finally:
        running.stop()


def test_cors_is_off_unless_an_origin_is_named(place: Path, guarded: Running) -> None:
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    asked = requests.options(f"{guarded.url}/v1/models", headers=headers)
    assert "access-control-allow-origin" not in asked.headers
    running = Running(place, Gate(KEY), origins=["https://example.org"])
    try:
        asked = requests.options(f"{running.url}/v1/models", headers=headers)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://example.org"
        other = requests.options(f"{running.url}/v1/models", headers=headers | {"origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
    finally:
        running.stop()


SWAPS = """
import sys, time
from pathlib import Path
import psutil
from llm.bench.models import Shape
from llm.bench.serving import write_model
from llm.serving.models import Models, Loading

folder = Path("model")
write_model(Shape(layers=12, width=512, heads=8, vocab=5000, context=64, batch=1), folder)
size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
models, held = Models(Loading("cpu")), []
models.retire_seconds = 0
models.add(str(folder))
for _ in range(4):
    engine = models.served["model"].engine
    cycle = [models.served["model"]]
    cycle.append(cycle)  # as answers are in
    del cycle
    models.reload()
    engine._thread.join()
    time.sleep(0.3)
    held.append(psutil.Process().memory_info().rss)
print((max(held) - held[0]) / size, (held[-1] - held[0]) / size)
"""


@pytest.mark.slow
def test_swaps_leave_no_memory_behind(tmp_path: Path) -> None:
    """A process of its own, in which nothing else takes or frees memory; a model has 150 MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SWAPS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    most, last = map(float, done.stdout.split())
    assert most < 0.5 and last < 0.5, "in sizes of the model"


def test_reload_swaps_a_model_while_it_answers(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "models")
    running = Running(tmp_path / "models")
    try:
        client = running.client()
        options: Any = {"model": "base", "prompt": "the cat", "temperature": 0, "max_tokens": 200}
        before = client.completions.create(**options).choices[0].text
        stream = iter(client.completions.create(**options, stream=True))
        text = next(stream).choices[0].text
        shutil.rmtree(tmp_path / "models/base")
        old = running.models.engines["base"]
        failed = requests.post(f"{running.url}/admin/reload", json={"model": "base"})
        assert failed.status_code == 400 and running.models.engines["base"] is old
        shutil.copytree(place / "instruct", tmp_path / "models/base")
        running.models.retire_seconds = 0.2
        assert requests.post(f"{running.url}/admin/reload", json={"model": "base"}).json() == {"reloaded": ["base"]}
        assert running.models.engines["base"] is not old
        assert running.models.served["base"].model.kind == "instruct"
        assert text + "".join(chunk.choices[0].text for chunk in stream) == before
        assert client.completions.create(**options).choices[0].text
        wait_until(lambda: not old.running and old._thread is not None and not old._thread.is_alive())
        assert requests.post(f"{running.url}/admin/reload", json={"model": "gone"}).status_code == 404
        assert requests.post(f"{running.url}/admin/reload", data="{}").status_code in (400, 415), (
            "a foreign page's form"
        )
    finally:
        running.stop()


@pytest.mark.slow
def test_sigterm_finishes_what_runs(place: Path) -> None:
    command = [sys.executable, "-m", "llm", "serve", str(place / "base"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        client = openai.OpenAI(base_url=re.search(r"http\S+", line)[0] + "/v1", api_key="none", max_retries=0)  # type: ignore[index]
        options: Any = {"model": "base", "prompt": "the cat", "temperature": 0, "max_tokens": 200}
        stream = client.completions.create(**options, stream=True)
        text = next(iter(stream)).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
    from llm.api import load

    model = load(place / "base", device="cpu")
    ids = tiny_tokenizer().encode("the cat")
    assert text == tiny_tokenizer().decode(generate(model.gpt, [ids], max_new_tokens=200)[0])
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "not a model folder"),
        (["{place}/spam"], "wrong kind of model"),
        (["{place}/base", "--classifier", "{place}/instruct"], "wrong kind of model"),
        (["{place}/base", "{place}/base"], "two models are called base"),
    ],
)
def test_wrong_models_are_one_line(
    place: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", *(each.format(place=place) for each in arguments), "--device", "cpu", "--port", "0"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
