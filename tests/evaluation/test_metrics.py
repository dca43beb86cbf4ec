"""Labels and answers against scikit-learn, formulas and known values."""

from __future__ import annotations

import numpy as np
import pytest

from llm.evaluation.metrics import (
    answer_report,
    by_task,
    classification_report,
    fold,
    label_roc,
    numbers,
    roc_points,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(20, 20).high == 1.0 and wilson(20, 20).low < 1.0
    assert wilson(0, 0) == (0.0, 0.0, 1.0)


def test_two_labels_are_scored_for_the_last_one() -> None:
    actual = np.array([0, 0, 0, 0, 1, 1])
    spam = np.array([0.1, 0.2, 0.3, 0.8, 0.7, 0.4])
    report = classification_report(actual, np.column_stack([1 - spam, spam]), ["ham", "spam"])
    assert report.confusion.tolist() == [[3, 1], [1, 1]]
    assert report.accuracy.value == pytest.approx(4 / 6)
    assert (report.precision, report.recall, report.f1) == (0.5, 0.5, 0.5)
    assert report.per_label["ham"] == (0.75, 0.75, 0.75, 4)
    assert report.roc_auc == pytest.approx(6 / 8)  # of 8 pairs of ham and spam, 6 in the right order
    x, y = roc_points(actual, np.column_stack([1 - spam, spam]))
    assert np.trapezoid(y, x) == pytest.approx(6 / 8)


def test_more_labels_are_averaged() -> None:
    actual = np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.eye(3)[[0, 0, 1, 2, 2, 2]]
    report = classification_report(actual, probabilities, ["a", "b", "c"])
    assert report.recall == pytest.approx((1 + 0.5 + 1) / 3)
    assert report.precision == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert report.roc_auc == pytest.approx((1 + 0.75 + 0.875) / 3)
    assert report.label_auc == pytest.approx({"a": 1, "b": 0.75, "c": 0.875})
    x, y = roc_points(actual, probabilities)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(report.roc_auc)


@pytest.mark.parametrize("digits", [1, 9])  # with and without ties
@pytest.mark.parametrize("n_labels", [2, 3, 7])
def test_area_under_the_curve_is_the_reported_one(n_labels: int, digits: int) -> None:
    rng = np.random.default_rng(n_labels)
    actual = np.append(np.arange(n_labels), rng.choice(n_labels, 90, p=rng.dirichlet(np.ones(n_labels))))
    probabilities = (rng.random((len(actual), n_labels)) + np.eye(n_labels)[actual] * 0.5).round(digits)
    report = classification_report(actual, probabilities, [f"label {k}" for k in range(n_labels)])
    x, y = roc_points(actual, probabilities)
    assert np.trapezoid(y, x) == pytest.approx(report.roc_auc, abs=1e-12)
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= -1e-12).all()
    if n_labels > 2:
        assert report.roc_auc == pytest.approx(np.mean(list(report.label_auc.values())))
        for k, area in enumerate(report.label_auc.values()):
            x, y = label_roc(actual, probabilities, k)
            assert np.trapezoid(y, x) == pytest.approx(area, abs=1e-12)


def test_a_label_without_a_row_leaves_the_auc_open() -> None:
    report = classification_report(np.array([0, 0]), np.array([[0.9, 0.1], [0.2, 0.8]]), ["ham", "spam"])
    assert report.roc_auc is None
    assert "roc_auc" not in numbers(report)
    assert report.confusion.shape == (2, 2)


def test_answers() -> None:
    report = answer_report(["The plural is  hens.\n", "a red horse", ""], ["The plural is hens.", "a red cow", "yes"])
    assert report.exact_match.value == pytest.approx(1 / 3)
    assert report.rouge_l == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert 0 < report.chrf < 100
    assert answer_report(["same"], ["same"]).chrf == pytest.approx(100)
    assert answer_report([], []).rows == 0


def test_rouge_counts_words_of_any_script() -> None:
    assert answer_report(["красный дом"], ["красный дом"]).rouge_l == pytest.approx(1.0)
    assert answer_report(["gr\u00fcn"], ["gr"]).rouge_l == 0.0


def test_fold_keeps_case_and_punctuation() -> None:
    assert fold(" a \n b\t") == "a b"
    assert fold("A.") != fold("a")


def test_by_task() -> None:
    reports = by_task(["1", "2", "x"], ["1", "2", "3"], ["sum", "sum", "count"])
    assert [(task, r.rows, r.exact_match.value) for task, r in reports.items()] == [("count", 1, 0.0), ("sum", 2, 1.0)]
    assert by_task(["1"], ["1"], [""]) == {}
