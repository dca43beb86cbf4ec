"""Learning curve: accuracy over the number of training messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm.data.examples import Message
from llm.evaluation.baselines import classical_classifiers
from llm.evaluation.metrics import Interval, share_interval

PARTS = (8, 4, 2)  # of the training messages: an eighth, a quarter, half


class CurvePoint(NamedTuple):
    """Accuracy of one classifier after training on so many messages."""

    classifier: str
    messages: int
    accuracy: Interval


def classical_curve(
    name: str, train: Sequence[Message], val: Sequence[Message], test: Sequence[Message], labels: Sequence[str]
) -> list[CurvePoint]:
    """Return the learning curve of a classical method below the whole training part; each part holds the smaller ones.

    The order of the messages is drawn once, whatever the seed of the trainings.
    """
    order = np.random.default_rng(0).permutation(len(train))
    points = []
    for part in PARTS:
        some = [train[i] for i in order[: len(train) // part]]
        if len({message.label for message in some}) < 2:
            continue
        found = classical_classifiers(some, val, [message.text for message in test], labels, {name})
        if name in found:
            right = sum(labels[k] == message.label for k, message in zip(found[name].argmax(axis=1), test, strict=True))
            points.append(CurvePoint(name, len(some), share_interval(right, len(test))))
    return points
