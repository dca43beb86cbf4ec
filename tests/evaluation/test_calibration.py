"""Calibration error, selective accuracy and decisions on held-out messages."""

from __future__ import annotations

import numpy as np
import pytest

from llm.checkpoint.folder import CheckpointConfig, Decision
from llm.evaluation.classifier.calibration import (
    bin_numbers,
    calibration_error,
    evaluate_calibration,
    metrics,
    selective_accuracy,
    softmax,
)
from tests.helpers import gpt_config


def draw(rng: np.random.Generator, n: int, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences and their true accuracies, equal for a slope of 1."""
    confidence = 0.5 + 0.4999 * rng.beta(2, 1, n)
    return confidence, 1 / (1 + np.exp(-slope * np.log(confidence / (1 - confidence))))


@pytest.mark.parametrize("slope", [1.0, 0.6])
def test_interval_of_the_calibration_error_covers(monkeypatch: pytest.MonkeyPatch, slope: float) -> None:
    monkeypatch.setattr("llm.evaluation.intervals.RESAMPLES", 200)
    rng = np.random.default_rng(0)
    confidence, accuracy = draw(rng, 400_000, slope)
    gaps = np.bincount(bin_numbers(confidence), confidence - accuracy)
    truth = 0.0 if slope == 1 else np.abs(gaps).sum() / len(confidence)
    covered = 0
    for _ in range(40):
        confidence, accuracy = draw(rng, 300, slope)
        right = (rng.random(300) < accuracy).astype(float)
        found = calibration_error(confidence, right, np.arange(300))
        covered += found.low <= truth <= found.high
    assert covered >= 35


def test_calibration_error_is_the_mean_gap_of_bins() -> None:
    confidence = np.array([0.9] * 10 + [0.6] * 10)
    right = np.array([1.0] * 5 + [0.0] * 5 + [1.0] * 8 + [0.0] * 2)
    assert calibration_error(confidence, right, np.arange(20)).value == pytest.approx((0.4 + 0.2) / 2)


def test_coverage_leaves_out_the_least_confident() -> None:
    confidence = np.linspace(0.5, 0.99, 100)
    right = (confidence > 0.59).astype(float)
    coverages, (x, y) = selective_accuracy(confidence, right)
    assert [c.coverage for c in coverages] == [1.0, 0.95, 0.9, 0.8, 0.5]
    assert coverages[0].accuracy.value == right.mean() and coverages[3].accuracy.value == 1.0
    assert (x[-1], y[-1]) == (1.0, right.mean()) and y[0] == 1.0
    assert coverages[4].confidence == confidence[50]


def test_temperature_and_decision_of_the_folder_are_measured() -> None:
    rng = np.random.default_rng(3)
    true = np.column_stack((np.zeros(600), rng.normal(0, 2, 600)))
    actual = (rng.random(600) < softmax(true)[:, 1]).astype(np.int64)
    config = CheckpointConfig(
        kind="classifier",
        gpt=gpt_config(),
        labels=["ham", "spam"],
        max_length=8,
        temperature=3.0,
        decision=Decision(label="spam", threshold=0.9),
        unsure_below=0.7,
    )
    result = evaluate_calibration(config, 3 * true, actual, np.arange(600))
    assert result.before.low > result.ece.high and result.ece.low == 0.0
    assert sum(each.rows for each in result.bins) == 600
    decided = result.decided
    assert decided is not None and decided.precision is not None and decided.recall is not None
    spam = softmax(true)[:, 1]
    said = spam >= 0.9
    assert decided.precision.value == pytest.approx(actual[said].mean())
    assert decided.recall.value == pytest.approx(said[actual == 1].mean())
    assert decided.answered.value == pytest.approx((said | (spam <= 0.3)).mean())
    assert metrics(result)["decided_precision"] == decided.precision.value
    plain = config.model_copy(update={"decision": None, "unsure_below": None, "temperature": None})
    assert evaluate_calibration(plain, true, actual, np.arange(600)).decided is None
