"""Calibration of a classifier on held-out messages, and its accuracy where it may say that it does not know.

Shapes: N messages, K labels, R resamples. Confidence is the probability of the likeliest label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.checkpoint.folder import CheckpointConfig, Decision
from llm.evaluation.intervals import cluster_sums, clustered_share, resample
from llm.evaluation.metrics import Interval, share_interval
from llm.inference.classify import UNSURE, decide

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15  # of equal width over the confidence
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.5)
CALIBRATED = 0.95  # quantile of the error of perfect probabilities; an error below it tells of no miscalibration
CURVE_POINTS = 200


class Bin(NamedTuple):
    """The messages of one bin: mean confidence, and the share of right labels."""

    confidence: float
    accuracy: Interval
    rows: int


class Coverage(NamedTuple):
    """Accuracy on the share of the messages with the highest confidence."""

    coverage: float
    accuracy: Interval
    confidence: float  # the lowest of them


class Decided(NamedTuple):
    """Results of the stored decision: precision and recall of its label, and labels that were given at all."""

    rule: Decision | None
    unsure_below: float
    precision: Interval | None  # None without a threshold
    recall: Interval | None
    answered: Interval
    accuracy: Interval  # of the answered


class CalibrationResult(NamedTuple):
    temperature: float
    before: Interval  # expected calibration error without the temperature
    ece: Interval
    bins: list[Bin]
    coverages: list[Coverage]
    curve: tuple[Floats, Floats]  # coverage, accuracy
    decided: Decided | None  # None for the likeliest label


def evaluate_calibration(config: CheckpointConfig, logits: Floats, actual: Ints, clusters: Ints) -> CalibrationResult:
    """Return a classifier's calibration from its logits [N, K], before and after its temperature."""
    temperature = config.temperature or 1.0
    probabilities = softmax(logits / temperature)
    confidence, right = probabilities.max(axis=1), (probabilities.argmax(axis=1) == actual).astype(np.float64)
    has_rule = config.decision is not None or config.unsure_below is not None
    coverages, curve = selective_accuracy(confidence, right)
    return CalibrationResult(
        temperature=temperature,
        before=calibration_error(softmax(logits).max(axis=1), right, clusters),
        ece=calibration_error(confidence, right, clusters),
        bins=reliability(confidence, right),
        coverages=coverages,
        curve=curve,
        decided=evaluate_decision(config, probabilities, actual, clusters) if has_rule else None,
    )


def softmax(logits: Floats) -> Floats:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def bin_numbers(confidence: Floats) -> Ints:
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def calibration_error(confidence: Floats, right: Floats, clusters: Ints) -> Interval:
    """Return the expected calibration error, the mean gap of confidence and accuracy over bins, with its interval.

    The error is biased upwards, and that of resamples twice. The interval's low end takes twice the bias of the
    resamples away, its high end once. It begins at 0 where perfect probabilities would show such an error too.
    """
    n = len(confidence)
    gaps = np.zeros((n, BINS))
    bins = bin_numbers(confidence)
    gaps[np.arange(n), bins] = confidence - right
    value = float(np.abs(gaps.sum(axis=0)).sum()) / n
    sums = cluster_sums(np.column_stack((gaps, np.ones(n))), clusters)
    found = resample(sums, lambda s: np.abs(s[..., :BINS]).sum(axis=-1) / s[..., BINS], seed=0)
    bias = float(found.mean()) - value
    low, high = (float(q) for q in np.quantile(found, (0.025, 0.975)))
    random = np.random.default_rng(1)
    perfect = np.zeros(len(found))
    for k in range(0, len(found), 100):  # messages of one cluster are right or wrong together
        luck = random.random((100, int(clusters.max()) + 1))[:, clusters]
        each = confidence - (luck < confidence)
        perfect[k : k + 100] = sum(np.abs(each[:, bins == b].sum(axis=1)) for b in np.unique(bins)) / n
    low = 0.0 if value <= np.quantile(perfect, CALIBRATED) else max(0.0, low - 2 * bias)
    return Interval(value, min(low, value), max(high - bias, value))


def reliability(confidence: Floats, right: Floats) -> list[Bin]:
    """Return the bins that hold a message, by ascending confidence."""
    bins = bin_numbers(confidence)
    return [
        Bin(float(confidence[here].mean()), share_interval(float(right[here].sum()), int(here.sum())), int(here.sum()))
        for b in np.unique(bins)
        if (here := bins == b).any()
    ]


def selective_accuracy(confidence: Floats, right: Floats) -> tuple[list[Coverage], tuple[Floats, Floats]]:
    """Return the accuracy at a few coverages, and its curve over all: the least confident are left out first."""
    order = np.argsort(-confidence, kind="stable")
    hits, n = right[order].cumsum(), len(right)
    counts = [max(1, round(share * n)) for share in COVERAGES]
    shown = [
        Coverage(count / n, share_interval(float(hits[count - 1]), count), float(confidence[order[count - 1]]))
        for count in counts
    ]
    points = np.unique(np.linspace(1, n, min(n, CURVE_POINTS)).round().astype(np.int64))
    return shown, (points / n, hits[points - 1] / points)


def evaluate_decision(config: CheckpointConfig, probabilities: Floats, actual: Ints, clusters: Ints) -> Decided:
    """Return the results of the stored decision, as `classify` and the server apply it."""
    labels = config.labels or []
    decided = [decide(config, dict(zip(labels, row, strict=True))) for row in probabilities.tolist()]
    said = np.array([-1 if label == UNSURE else labels.index(label) for label in decided])
    answered = said >= 0
    precision = recall = None
    if config.decision is not None:
        k = labels.index(config.decision.label)
        precision = _share(said == k, actual == k, clusters)
        recall = _share(actual == k, said == k, clusters)
    return Decided(
        rule=config.decision,
        unsure_below=config.unsure_below or 0.0,
        precision=precision,
        recall=recall,
        answered=clustered_share(answered.astype(np.float64), clusters),
        accuracy=_share(answered, said == actual, clusters),
    )


def _share(among: NDArray[np.bool_], hits: NDArray[np.bool_], clusters: Ints) -> Interval:
    return clustered_share(hits[among].astype(np.float64), clusters[among])


def metrics(result: CalibrationResult) -> dict[str, float]:
    """Return the figures for a metrics file."""
    before = {
        "ece_before": result.before.value,
        "ece_before_low": result.before.low,
        "ece_before_high": result.before.high,
    }
    values = {"temperature": result.temperature, **before}
    values |= {"ece": result.ece.value, "ece_low": result.ece.low, "ece_high": result.ece.high}
    values |= {f"accuracy_at_{100 * c:.0f}": r.accuracy.value for c, r in zip(COVERAGES, result.coverages, strict=True)}
    if (decided := result.decided) is not None:
        shares: Sequence[tuple[str, Interval | None]] = [
            ("decided_precision", decided.precision),
            ("decided_recall", decided.recall),
            ("answered", decided.answered),
            ("answered_accuracy", decided.accuracy),
        ]
        values |= {name: share.value for name, share in shares if share is not None}
    return values
