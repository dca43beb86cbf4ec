"""Rendering of chat templates; one that came with a model is a foreign program and runs in its own process.

Jinja's sandbox keeps it from Python's objects, but ends neither `{{ 10**(10**10) }}` nor loops in loops. The process
does: each rendering may use some seconds and some memory, and fails when they are spent. The process stays for the next
rendering. This file is run by its path, so that PyTorch is not imported for it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of a processor; a template takes milliseconds
PATIENCE = 60.0  # seconds, for a machine with other things to do
MEMORY = 2**29  # bytes
LONGEST = 1_000_000  # characters that a template may add to what it is given


class RenderError(Exception):
    """A chat template that fails, or takes too much; the message is one line."""


# ---- in the process of the template ----------------------------------------------------------------------------------


class GenerationTag(Extension):
    """The tag `{% generation %}`, which marks a model's own words for transformers and changes no text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def render_chat(source: str, variables: Mapping[str, Any], clock: bool = True) -> str:
    """Return the text of a conversation, with the functions and filters that transformers has.

    Without `clock` a template does not learn the date, so that its text is the same every day.
    """
    return _compiled(source, clock)(**{"tools": None, "documents": None, **variables})


def render(source: str, question: str, names: Mapping[str, str]) -> str:
    """Return the prompt of one question, as transformers asks a chat template for it."""
    return render_chat(source, _question(question, names), clock=False)


def _question(question: str, names: Mapping[str, str]) -> dict[str, Any]:
    return {**names, "messages": [{"role": "user", "content": question}], "add_generation_prompt": True}


@lru_cache(maxsize=32)
def _compiled(source: str, clock: bool) -> Callable[..., str]:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    if clock:
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source).render


def _limit_seconds() -> None:
    """Allow this process some more seconds of a processor."""
    with contextlib.suppress(ImportError):  # Windows has none; there the patience ends it
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + SECONDS, hard))


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):
        import resource

        with contextlib.suppress(OSError, ValueError):  # macOS
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _reply(line: bytes) -> dict[str, str]:
    try:
        source, variables, clock = json.loads(line)
        text = render_chat(source, variables, clock)
        if len(text) > LONGEST + len(line):
            raise ValueError("longer than any prompt")
        return {"text": text}
    except Exception as error:  # a foreign program may raise anything
        words = " ".join(str(error).split())[:300]
        return {"error": words if isinstance(error, TemplateError) and words else f"{type(error).__name__}: {words}"}


def main() -> None:
    """Render each request of stdin, one a line, until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_seconds()
        print(json.dumps(_reply(line)), flush=True)


# ---- in the program that asks ----------------------------------------------------------------------------------------


class TemplateProcess:
    """A process that renders chat templates, started with the first and again after one that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, source: str, variables: Mapping[str, Any], clock: bool) -> str:
        """Return the text of a template; raise `RenderError` where it fails or takes too much."""
        request = json.dumps([source, dict(variables), clock]).encode() + b"\n"
        with self._lock:
            try:
                reply = self._ask(request)
            except BaseException:  # an interrupted request must not leave its reply to the next one
                self.stop()
                raise
        if "error" in reply:
            raise RenderError(reply["error"])
        return str(reply["text"])

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self.stop()
            return {"error": f"it takes more than {SECONDS} seconds or {MEMORY // 2**20} MB"}
        reply: dict[str, str] = json.loads(line)
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # forked: the process belongs to the parent
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def stop(self) -> None:
        """End the process, if one was started here."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


PROCESS = TemplateProcess()
atexit.register(PROCESS.stop)


def render_chat_untrusted(source: str, variables: Mapping[str, Any], clock: bool = True) -> str:
    """Return `render_chat` of a process of its own; raise `RenderError` where that fails or takes too much."""
    return PROCESS.render(source, variables, clock)


def render_untrusted(source: str, question: str, names: Mapping[str, str]) -> str | None:
    """Return `render` of a process of its own; None where the template fails or takes too much."""
    try:
        return PROCESS.render(source, _question(question, names), clock=False)
    except (RenderError, OSError, ValueError):
        return None


if __name__ == "__main__":
    main()
