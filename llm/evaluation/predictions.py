"""Predictions of one model on a test set: read from rows, aligned with another's, turned into metrics."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from llm.common.errors import InputError
from llm.evaluation.comparison import Metric, macro_f1, mean_metric, ratio_metric
from llm.evaluation.metrics import exact_matches, fold, rouge_l_scores

Kind = Literal["messages", "instructions", "text"]
Key = tuple[str, ...]

IDENTITY = ("id", "text", "instruction", "input", "question", "messages")  # columns that tell one example from another
EXPECTED = {"given_label": "messages", "label": "messages", "expected": "instructions", "output": "instructions"}
PREDICTED = ("predicted", "prediction", "answers", "answer")
SHOWN = 60  # characters of an example in a message


class Predictions(NamedTuple):
    """Results on N examples. Labels and answers are `predicted`; a base model has the `nats` and `sizes` of texts."""

    kind: Kind
    name: str  # for messages: the file or folder, and the model in it
    keys: list[Key]
    expected: list[str]
    predicted: list[str]
    nats: list[float] | None = None  # messages: of the expected label; text: of the whole
    sizes: list[int] | None = None  # text: bytes


class Difference(NamedTuple):
    """An example that the two models do not answer alike."""

    example: Key
    expected: str
    a: str
    b: str


def from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], name: str, model: str | None) -> Predictions:
    """Return the predictions in the rows of a file, each with its place for messages.

    The rows are those of `reports/predictions`, of `classify`, or any with an example, an expected and a predicted
    value. Where a row has those of several models, `model` names one; the default is gpt.
    """
    keys: list[Key] = []
    expected, predicted, nats, kinds = [], [], [], set()
    for where, row in rows:
        truth, said = _columns(row, where)
        kinds.add(EXPECTED[truth])
        keys.append(tuple(str(row[column]) for column in IDENTITY if row.get(column) is not None))
        if not keys[-1]:
            raise InputError(f"{where}: no example (expected one of {', '.join(IDENTITY)}, got {', '.join(row)})")
        expected.append(str(row[truth]))
        predicted.append(_of_model(row[said], model, where))
        nats.append(_nats(row, expected[-1], model))
    if not keys:
        raise InputError(f"{name}: no prediction in it (expected at least one); name another file")
    if len(kinds) > 1:
        raise InputError(f"{name}: holds labels and answers; give each its own file")
    found: Kind = "messages" if kinds == {"messages"} else "instructions"
    losses = [loss for loss in nats if loss is not None]
    return Predictions(found, name, keys, expected, predicted, losses if len(losses) == len(nats) else None)


def _columns(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return the names of the columns with the expected and the predicted value."""
    said = next((column for column in PREDICTED if column in row), None)
    truth = next((column for column in EXPECTED if column in row), None)
    if said is None and truth == "given_label" and "label" in row:  # of `classify`
        said = "label"
    if said is None or truth is None:
        raise InputError(
            f"{where}: no prediction with its truth (expected one of {', '.join(EXPECTED)} and one of "
            f"{', '.join(PREDICTED)}, got {', '.join(row)}); name a file of reports/predictions, or of "
            "`classify` on rows with a label"
        )
    return truth, said


def _of_model(value: Any, model: str | None, where: str) -> str:
    if not isinstance(value, dict):
        if model is not None:
            raise InputError(f"{where}: predictions of one model, without names; leave :{model} out")
        return str(value)
    name = model or "gpt"
    if name not in value:
        raise InputError(f"{where}: no model {name!r} (found {', '.join(value)}); write PATH:MODEL")
    return str(value[name])


def _nats(row: Mapping[str, Any], expected: str, model: str | None) -> float | None:
    """Return the loss of the expected label where the row has its probability; probabilities are of gpt alone."""
    probabilities = row.get("probabilities")
    p = probabilities.get(expected) if isinstance(probabilities, dict) and model in (None, "gpt") else None
    return -math.log(max(p, 1e-6)) if isinstance(p, int | float) else None  # rounded to six digits


def align(a: Predictions, b: Predictions) -> Predictions:
    """Return `b` in the order of `a`; raise `InputError` unless both are of the same examples with the same truth."""
    if a.kind != b.kind:
        raise InputError(f"{a.name} has predictions of {a.kind}, {b.name} of {b.kind}; compare what is alike")
    _check_same(a, b)
    places: dict[tuple[Key, str], list[int]] = defaultdict(list)
    for i, example in enumerate(zip(b.keys, b.expected, strict=True)):
        places[example].append(i)
    order = [places[example].pop(0) for example in zip(a.keys, a.expected, strict=True)]
    return b._replace(
        keys=[b.keys[i] for i in order],
        expected=[b.expected[i] for i in order],
        predicted=[b.predicted[i] for i in order],
        nats=None if b.nats is None else [b.nats[i] for i in order],
        sizes=None if b.sizes is None else [b.sizes[i] for i in order],
    )


def _check_same(a: Predictions, b: Predictions) -> None:
    examples_a, examples_b = Counter(a.keys), Counter(b.keys)
    for one, other, here, there in ((a, b, examples_a, examples_b), (b, a, examples_b, examples_a)):
        if lacking := here - there:
            raise InputError(
                f"not the same examples: {one.name} has {len(one.keys):,}, {other.name} {len(other.keys):,}; "
                f"{lacking.total():,} of {one.name} are not in {other.name}, the first is "
                f"{_short(next(iter(lacking)))!r}; evaluate both on one test set"
            )
    pairs_a, pairs_b = (Counter(zip(x.keys, x.expected, strict=True)) for x in (a, b))
    if differing := pairs_a - pairs_b:
        key, truth = next(iter(differing))
        other_truth = next((t for (k, t) in pairs_b - pairs_a if k == key), "")
        raise InputError(
            f"not the same truth for {differing.total():,} examples: {_short(key)!r} is {truth[:SHOWN]!r} in {a.name}, "
            f"{other_truth[:SHOWN]!r} in {b.name}; evaluate both on one test set"
        )


def _short(key: Key) -> str:
    text = " | ".join(key)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def paired_metrics(a: Predictions, b: Predictions) -> list[Metric]:
    """Return the metrics of aligned predictions, the one that decides first."""
    if a.kind == "text":
        assert a.nats is not None and b.nats is not None and a.sizes is not None
        bits_a, bits_b = (np.array(x) / math.log(2) for x in (a.nats, b.nats))
        return [ratio_metric("bits per byte", bits_a, bits_b, np.array(a.sizes, dtype=np.float64))]
    if a.kind == "instructions":
        exact = [[float(right) for right in exact_matches(x.predicted, x.expected)] for x in (a, b)]
        rouge = [rouge_l_scores(x.predicted, x.expected) for x in (a, b)]
        return [mean_metric("exact match", *exact), mean_metric("ROUGE-L", *rouge)]
    right = [[float(s == e) for s, e in zip(x.predicted, x.expected, strict=True)] for x in (a, b)]
    labels = sorted({*a.expected, *a.predicted, *b.predicted})
    actual, said_a, said_b = (_numbers(x, labels) for x in (a.expected, a.predicted, b.predicted))
    metrics = [mean_metric("accuracy", *right), macro_f1(actual, said_a, said_b, len(labels))]
    if a.nats is not None and b.nats is not None:
        metrics.append(mean_metric("loss", a.nats, b.nats, higher_is_better=False))
    return metrics


def _numbers(values: Sequence[str], labels: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    number = {label: k for k, label in enumerate(labels)}
    return np.array([number[value] for value in values])


def differences(a: Predictions, b: Predictions) -> list[Difference]:
    """Return the examples that aligned predictions answer otherwise; of texts the greatest differences in bits."""
    if a.kind != "text":
        return [
            Difference(key, truth, said_a, said_b)
            for key, truth, said_a, said_b in zip(a.keys, a.expected, a.predicted, b.predicted, strict=True)
            if fold(said_a) != fold(said_b)
        ]
    assert a.nats is not None and b.nats is not None
    bits = [(x / math.log(2), y / math.log(2)) for x, y in zip(a.nats, b.nats, strict=True)]
    order = sorted(range(len(bits)), key=lambda i: -abs(bits[i][1] - bits[i][0]))
    return [
        Difference(a.keys[i], "", f"{bits[i][0]:.1f} bits", f"{bits[i][1]:.1f} bits")
        for i in order
        if bits[i][0] != bits[i][1]
    ]
