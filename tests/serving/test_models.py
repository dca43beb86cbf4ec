"""Models of a server: with kernels of our own, with a compiled step, or with neither."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llm
from llm.common.errors import InputError
from llm.inference.grouped import GroupedLinear
from llm.inference.int8 import Int8Linear
from llm.inference.packed import PackedLinear
from llm.inference.rows import Step
from llm.serving.models import CLASSIFIER, Loading, Models
from tests.serving.conftest import Client, finish

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels need g++")


def answer(models: Models, prompt: list[int]) -> list[int]:
    """Return the answer of a model's engine, whose thread has ended."""
    engine = models.engines["base"]
    models.close()
    engine._closed = False
    client = Client(prompt, 12)
    finish(engine, client)
    return client.answer


def parts(models: Models, kind: type[nn.Module]) -> list[nn.Module]:
    return [part for part in models.get("base").model.gpt.modules() if isinstance(part, kind)]


@needs_compiler
def test_a_model_is_served_by_our_kernels(place: Path) -> None:
    models = Models(Loading("cpu"))
    models.add(str(place / "base"))
    assert parts(models, PackedLinear) and not parts(models, nn.Linear)
    models.close()


def test_without_a_compiler_pytorch_serves(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise InputError("no C++ compiler was found")

    monkeypatch.setattr("llm.serving.models.load_kernels", fails)
    monkeypatch.setattr("llm.inference.rows.has_row_kernels", lambda model: False)
    models = Models(Loading("cpu"))
    with caplog.at_level("INFO", "llm"):
        models.add(str(place / "base"))
    assert "serving without kernels of our own, which is slower: no C++ compiler was found" in caplog.messages
    assert not parts(models, PackedLinear)
    expected = llm.load(place / "base", device="cpu")
    assert answer(models, [1, 2, 3]) == llm.inference.generate.generate(expected.gpt, [[1, 2, 3]], max_new_tokens=12)[0]
    with pytest.raises(InputError, match=r"^base: cannot be compiled: no C\+\+ compiler was found$"):
        Models(Loading("cpu", compiled=True)).add(str(place / "base"))


def test_an_int8_cache_reaches_the_engine(place: Path) -> None:
    models = Models(Loading("cpu", int8_cache=True))
    models.add(str(place / "base"))
    expected = llm.load(place / "base", device="cpu", int8_cache=True)
    caches: list[torch.dtype] = []
    models.engines["base"].prefixes.save = lambda tokens, cache: caches.append(cache.keys.dtype)  # type: ignore[method-assign]
    assert answer(models, [1, 2, 3]) == llm.inference.generate.generate(expected.gpt, [[1, 2, 3]], max_new_tokens=12)[0]
    assert set(caches) == {torch.int8}


def test_roundings_are_of_language_models(place: Path) -> None:
    """A classifier beside a rounded model is served as it is."""
    models = Models(Loading("cpu", int8=True, int8_cache=True))
    models.add(str(place / "base"))
    models.add(str(place / "spam"), CLASSIFIER)
    assert parts(models, GroupedLinear) or parts(models, Int8Linear)
    assert models.get("spam").model.checkpoint.model.state_dict().keys() == (
        llm.load(place / "spam", device="cpu").checkpoint.model.state_dict().keys()
    )
    models.close()


@needs_compiler
def test_a_compiled_step_decodes_for_the_engine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def step(gpt: Any) -> Step:
        made.append(gpt)
        return lambda idx, positions, table: calls.append(len(idx)) or gpt(idx)[:, 0]  # type: ignore[func-returns-value]

    calls: list[int] = []
    monkeypatch.setattr("llm.serving.models.CompiledRows", step)
    models = Models(Loading("cpu", compiled=True))
    models.add(str(place / "base"))
    answer(models, [1, 2, 3])
    assert len(made) == 1 and len(calls) >= 11, "all tokens but the prompt's"


@needs_compiler
@pytest.mark.slow
def test_a_compiled_server_gives_the_same_greedy_text(place: Path) -> None:
    models, plain = Models(Loading("cpu", compiled=True)), Models(Loading("cpu"))
    for each in (models, plain):
        each.add(str(place / "base"))
    for prompt in ([1, 2, 3], [7]):
        assert answer(models, prompt) == answer(plain, prompt)
