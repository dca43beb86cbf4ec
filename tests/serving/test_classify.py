"""Effects of words on a label."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llm.inference.classify import doubt
from llm.serving.classify import effects
from tests.helpers import tiny_tokenizer


def test_words_without_which_nothing_is_left_have_no_effect() -> None:
    asked: list[list[str]] = []

    def classify(texts: list[str]) -> list[dict[str, float]]:
        asked.append(texts)
        return [{"ham": 0.25} for _ in texts]

    model: Any = SimpleNamespace(classify=classify, doubt=lambda text: doubt(tiny_tokenizer(), text))
    assert [word["effect"] for word in effects(model, "cat \u200b", "ham", 0.75)] == [None, 0.5]
    assert [word["effect"] for word in effects(model, "cat", "ham", 0.75)] == [None]
    assert asked == [["cat "], []]
