"""Accuracy on messages that were changed in ways that keep their label."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.examples import Message
from llm.evaluation.comparison import mcnemar
from llm.evaluation.metrics import Interval, share_interval

Floats = NDArray[np.float64]
Classify = Callable[[Sequence[str]], Floats]  # texts to probabilities [N, K]

TYPO_RATE = 0.1  # of the words with four letters or more
PADDING = 40  # spaces or line ends before and behind a text


class Change(NamedTuple):
    """Accuracy of both classifiers on changed messages."""

    name: str
    rows: int
    gpt: Interval
    classical: Interval
    only_gpt: int  # messages that it alone has right
    only_classical: int
    p: float  # of McNemar's exact test


def typos(text: str, rng: random.Random) -> str:
    """Swap two letters inside one in ten longer words."""

    def swapped(word: re.Match[str]) -> str:
        if rng.random() >= TYPO_RATE:
            return word[0]
        i = rng.randrange(1, len(word[0]) - 2)
        letters = word[0]
        return letters[:i] + letters[i + 1] + letters[i] + letters[i + 2 :]

    return re.sub(r"[^\W\d_]{4,}", swapped, text)


def changed(messages: Sequence[Message], train: Sequence[Message], labels: Sequence[str]) -> dict[str, list[str]]:
    """Return the changed texts by the name of the change.

    Of two labels the first is taken to be benign, such as ham: what it is appended to keeps its label.
    """
    rng = random.Random(0)
    texts = [message.text for message in messages]
    benign = [message.text for message in train if message.label == labels[0]]
    found = {
        "as it is": texts,
        "upper case": [text.upper() for text in texts],
        "lower case": [text.lower() for text in texts],
        "typos": [typos(text, rng) for text in texts],
        "padding": [" " * PADDING + text + "\n" * PADDING for text in texts],
    }
    if len(labels) == 2 and benign:
        found[f"{labels[0]} appended"] = [f"{text} {rng.choice(benign)}" for text in texts]
    return found


def evaluate_changes(
    messages: Sequence[Message], train: Sequence[Message], labels: Sequence[str], gpt: Classify, classical: Classify
) -> list[Change]:
    """Classify the changed messages by both classifiers."""
    variants = changed(messages, train, labels)
    every = [text for texts in variants.values() for text in texts]
    actual = np.array([labels.index(message.label) for message in messages])
    right = [
        (classify(every).argmax(axis=1).reshape(len(variants), len(messages)) == actual)
        for classify in (gpt, classical)
    ]
    changes = []
    for name, a, b in zip(variants, *right, strict=True):
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        gpt_share, classical_share = (share_interval(int(hits.sum()), len(messages)) for hits in (a, b))
        p = mcnemar(only_a, only_b)
        changes.append(Change(name, len(messages), gpt_share, classical_share, only_a, only_b, p))
    return changes
