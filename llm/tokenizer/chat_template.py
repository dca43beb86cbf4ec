"""Rendering of chat templates; one that came with a model is a foreign program and runs in its own process.

Jinja's sandbox keeps it from Python's objects, but ends neither `{{ 10**(10**10) }}` nor loops in loops. The process
does: it may use some seconds and some memory, and ends with nothing when they are spent. This file is run by its path,
so that PyTorch is not imported for it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache

from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of a processor; a template takes milliseconds
PATIENCE = 60.0  # seconds, for a machine with other things to do
MEMORY = 2**29  # bytes
LONGEST = 1_000_000  # characters of a prompt


def render(source: str, question: str, names: Mapping[str, str]) -> str:
    """Return the prompt of one question, as transformers asks a chat template for it."""
    messages = [{"role": "user", "content": question}]
    return _compiled(source)(messages=messages, add_generation_prompt=True, **names)


@lru_cache(maxsize=32)
def _compiled(source: str) -> Callable[..., str]:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source).render


def render_untrusted(source: str, question: str, names: Mapping[str, str]) -> str | None:
    """Return `render` of a process of its own; None where the template fails or takes too much."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps([source, question, dict(names)]).encode(),
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
        return str(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def main() -> None:
    with contextlib.suppress(ImportError):  # Windows has none; there the patience ends it
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with contextlib.suppress(OSError, ValueError):  # macOS
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    source, question, names = json.load(sys.stdin)
    text = render(source, question, names)
    if len(text) > LONGEST:
        raise ValueError("longer than any prompt")
    json.dump(text, sys.stdout)


if __name__ == "__main__":
    main()
