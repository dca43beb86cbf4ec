"""Classification for the server, with the words that moved a label's probability."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llm.api import Model
from llm.common.errors import InputError
from llm.inference.classify import NO_TEXT

MAX_WORDS = 256  # of a text that is explained: each is a text more to classify


def classify(model: Model, texts: Sequence[str], explain: bool) -> list[dict[str, Any]]:
    """Return label and probabilities of texts, and for `explain` the effect of each word."""
    rows = model.classify(texts)
    found: list[dict[str, Any]] = []
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        label = max(row, key=row.__getitem__)
        found.append({"index": index, "label": model.decide(row), "probabilities": row})
        if explain:
            found[-1]["words"] = effects(model, text, label, row[label])
    return found


def effects(model: Model, text: str, label: str, probability: float) -> list[dict[str, Any]]:
    """Return each word of a text with its effect: how much lower the label's probability is without the word.

    The effect of a word without which nothing to label is left is None.
    """
    words = list(re.finditer(r"\S+", text))
    if len(words) > MAX_WORDS:
        raise InputError(f"input: {len(words)} words (expected at most {MAX_WORDS} to explain); send a shorter text")
    without = [text[: word.start()] + text[word.end() :] for word in words]
    changes: list[float | None] = [None] * len(words)
    left = [i for i, rest in enumerate(without) if model.doubt(rest) != NO_TEXT]
    for i, row in zip(left, model.classify([without[i] for i in left]), strict=True):
        changes[i] = probability - row[label]
    return [
        {"text": word[0], "start": word.start(), "end": word.end(), "effect": change}
        for word, change in zip(words, changes, strict=True)
    ]
