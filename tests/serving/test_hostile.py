"""The server as a process under hostile clients, and under schemathesis: no error of its own, bounded memory."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")

ROOT = Path(__file__).resolve().parents[2]
MB = 2**20


class Process:
    """A server in a process of its own, with all that it wrote to stderr."""

    def __init__(self, place: Path, *options: str) -> None:
        models = [str(place / "base"), str(place / "instruct"), "--classifier", str(place / "spam")]
        command = [sys.executable, "-m", "llm", "serve", *models, "--port", "0", "--device", "cpu", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        self.url = f"http://127.0.0.1:{self.port}"
        self.reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self.reader.start()

    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def send(self, *parts: bytes) -> bytes:
        """Send bytes as they are; return what comes back before the end of the connection or of some seconds."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.settimeout(20)
            answer = b""
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part)
            with contextlib.suppress(ConnectionError, TimeoutError):
                while piece := connection.recv(65536):
                    answer += piece
                    if b"\r\n\r\n" in answer:
                        break
            return answer


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Process]:
    running = Process(place, "--max-tokens", "4")
    yield running
    running.process.terminate()
    assert running.process.wait(30) == 0
    running.reader.join()
    assert "Traceback" not in "".join(running.log)


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, "Host: localhost", "Connection: close", *headers, "", ""]).encode("latin-1")


BODY = b'{"model": "instruct", "messages": [{"role": "user", "content": "%s"}], "max_tokens": 2}'
JSON = "Content-Type: application/json"
POST = "POST /v1/chat/completions HTTP/1.1"
BROKEN: dict[str, Callable[[], bytes]] = {
    "body": lambda: head(POST, JSON, f"Content-Length: {len(BODY) - 2 + 4}") + BODY % b"\xff\xfe\x80\xc3",
    "a key": lambda: head(POST, JSON, "Content-Length: 7") + b'{"\xff":1}',
    "path": lambda: head("GET /v1/models/\xff\xfe HTTP/1.1"),
    "escaped path": lambda: head("GET /v1/models/%ff%fe%00 HTTP/1.1"),
    "query": lambda: head("GET /health?\xff=%ff HTTP/1.1"),
    "header": lambda: head("GET /health HTTP/1.1", "X-Name: \xff\xfe"),
    "type": lambda: head(POST, "Content-Type: \xff", f"Content-Length: {len(BODY)}") + BODY,
    "key": lambda: head("GET /v1/models HTTP/1.1", "Authorization: Bearer \xff\xfe"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_broken_utf8_is_the_clients_error(server: Process, name: str) -> None:
    answer = server.send(BROKEN[name]())
    assert re.match(rb"HTTP/1\.1 [24]\d\d", answer), answer


@pytest.mark.slow
def test_large_bodies_many_headers_and_slow_clients_take_no_memory(server: Process) -> None:
    assert requests.get(f"{server.url}/health").status_code == 200
    before = server.memory()
    zeros = b" " * MB
    for declared in (True, False):
        size = f"Content-Length: {100 * MB}" if declared else "Transfer-Encoding: chunked"
        chunks = [zeros if declared else b"%x\r\n%s\r\n" % (MB, zeros)] * 100
        answer = server.send(head(POST, JSON, size), *chunks, b"" if declared else b"0\r\n\r\n")
        assert answer == b"" or answer.startswith(b"HTTP/1.1 413"), answer
    many = [f"X-{i}: {'a' * 20}" for i in range(10_000)]
    answer = server.send(head("GET /health HTTP/1.1", *many))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    answer = server.send(head("GET /health HTTP/1.1", f"X: {'a' * 10 * MB}"))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    nested = b"[" * (2 * MB)
    assert server.send(head(POST, JSON, f"Content-Length: {len(nested)}") + nested).startswith(b"HTTP/1.1 400")
    with contextlib.ExitStack() as stack:
        for i in range(100):  # which send a byte and wait, in the head or in the body
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall(b"G" if i % 2 else head(POST, JSON, "Content-Length: 1000") + b"{")
        answer = requests.post(f"{server.url}/tokenize", json={"model": "base", "text": "the cat"}, timeout=20)
        assert answer.status_code == 200, "others are answered meanwhile"
    assert requests.get(f"{server.url}/health").status_code == 200
    assert server.memory() - before < 64 * MB


# ---- schemathesis ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_request_of_schemathesis_is_the_servers_error(server: Process) -> None:
    description = requests.get(f"{server.url}/openapi.json").json()
    for body in description["components"]["schemas"].values():
        if "model" in body.get("properties", {}):
            body["properties"]["model"] = {"enum": ["base", "instruct", "spam"]}  # others get 404 and no further
    schema = schemathesis.openapi.from_dict(description)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 10
    found: Counter[int] = Counter()
    for operation in operations:

        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def never_fails(case: Any) -> None:
            response = case.call(base_url=server.url, timeout=60)
            assert response.status_code < 500, (case, response.text)
            assert "Traceback" not in response.text and "server_error" not in response.text
            found[response.status_code // 100] += 1

        never_fails()
    assert found[2] > 20 and found[4] > 20
