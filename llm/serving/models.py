"""Models of a server, by name: engines of language models, and classifiers. Each can be swapped while it answers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm.api import GPT_KINDS, Model, load
from llm.common.errors import InputError
from llm.inference.compiled import CompiledRows
from llm.inference.kernels.build import load_kernels
from llm.inference.packed import to_packed
from llm.serving.engine import Engine, Limits
from llm.serving.errors import ApiError
from llm.serving.metrics import Metrics

log = logging.getLogger("llm")
CLASSIFIER = ("classifier",)


@dataclass
class Served:
    """A loaded model, with an engine where it generates text."""

    name: str
    source: str
    model: Model
    engine: Engine | None
    created: int = field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = field(default_factory=threading.Lock)  # for what runs outside the engine

    def close(self, wait: bool = True) -> None:
        if self.engine is not None:
            self.engine.close(wait)


@dataclass
class Loading:
    """Options for loading models, and the limits of their engines. Classifiers keep their weights as they are."""

    device: str = "auto"
    int8: bool = False
    int4: bool = False
    int8_cache: bool = False
    compiled: bool = False
    limits: Limits = field(default_factory=Limits)


class Models:
    """The models of a server. `resolve` turns a source into a folder, such as a registry's URI."""

    def __init__(self, loading: Loading, resolve: Callable[[str], Path] = Path) -> None:
        """Make an empty collection with metrics of its own."""
        self.loading, self.resolve, self.metrics = loading, resolve, Metrics()
        self.served: dict[str, Served] = {}
        self.retire_seconds = 30.0  # that a swapped model still takes the requests being prepared for it
        self._reloading = threading.Lock()

    def add(self, source: str, kinds: Sequence[str] = GPT_KINDS) -> None:
        """Load a model from DIR or NAME=DIR, of one of these kinds."""
        name, _, folder = source.rpartition("=")
        name = name or Path(folder).resolve().name
        if folder.startswith("models:/"):
            name = name if "=" in source else folder.removeprefix("models:/").partition("@")[0].partition("/")[0]
        if name in self.served:
            raise InputError(f"{source}: two models are called {name}; name one by NAME={folder}")
        self.served[name] = self._load(name, folder, kinds)

    def _load(self, name: str, source: str, kinds: Sequence[str]) -> Served:
        loading = self.loading
        options = (
            {} if kinds == CLASSIFIER else {name: getattr(loading, name) for name in ("int8", "int4", "int8_cache")}
        )
        model = load(self.resolve(source), device=loading.device, **options)
        model.require(*kinds)
        engine = None
        if model.kind in GPT_KINDS:
            engine = self._start(name, model)
        return Served(name, source, model, engine)

    def _start(self, name: str, model: Model) -> Engine:
        """Start the engine of a language model, on a CPU with kernels of our own where a C++ compiler is at hand."""
        gpt, step, compiled = model.gpt, None, self.loading.compiled
        if compiled and gpt.tok_emb.weight.device.type != "cpu":
            raise InputError(f"{name}: the step of many rows is compiled on a CPU only; leave --compile out")
        if gpt.tok_emb.weight.device.type == "cpu":
            try:
                load_kernels()
                to_packed(gpt)
            except InputError as error:
                if compiled:
                    raise InputError(f"{name}: cannot be compiled: {error}") from None
                log.info("serving without kernels of our own, which is slower: %s", error)
        if compiled:
            log.info("compiling the step of a token")
            step = CompiledRows(gpt)
        engine = Engine(gpt, model.checkpoint.tokenizer, self.loading.limits, step, self.metrics.observer(name))
        engine.start()
        return engine

    def get(self, name: str, *kinds: str) -> Served:
        """Return a model by its name; raise `ApiError` for an unknown one and for one of another kind."""
        served = self.served.get(name)
        if served is None:
            known = ", ".join(sorted(self.served))
            raise ApiError(404, f"model: no such model (expected {known})", code="model_not_found", param="model")
        if kinds and served.model.kind not in kinds:
            expected = " or ".join(kinds)
            message = f"model: wrong kind of model (expected {expected}, got {served.model.kind})"
            raise ApiError(400, message, code="wrong_model_kind", param="model")
        return served

    def reload(self, name: str | None = None) -> list[str]:
        """Load one model or all again from where they came from, and swap them; requests at hand end on the old ones.

        A model that cannot be loaded raises `InputError`, and stays as it was.
        """
        with self._reloading:
            names = [name] if name is not None else list(self.served)
            for each in names:
                old = self.get(each)
                kinds = CLASSIFIER if old.engine is None else GPT_KINDS
                self.served[each] = self._load(each, old.source, kinds)
                retirement = threading.Timer(self.retire_seconds, _retire, args=[[old]])
                retirement.daemon = True
                retirement.start()
            return names

    @property
    def engines(self) -> dict[str, Engine]:
        return {name: served.engine for name, served in list(self.served.items()) if served.engine is not None}

    def close(self) -> None:
        """End all engines when they have answered what they hold."""
        for served in list(self.served.values()):
            served.close()


def _retire(held: list[Served]) -> None:
    """Close the only model of a list when it has answered what it holds, and give its memory back to the system."""
    held.pop().close()
    gc.collect()  # answers and their model are in cycles
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else every swap leaves the size of a model behind
