"""Metrics of classifiers and of answers, with 95 % intervals. Shapes: N rows of a test set, K labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


FEW = 3  # successes or failures


class Interval(NamedTuple):
    """A share of successes and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: float) -> Interval:
    """Return Wilson's 95 % score interval (1927), sound for few trials and for shares near 0 and 1."""
    if n == 0:
        return Interval(0.0, 0.0, 1.0)
    z = 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, min(p, max(0.0, centre - margin)), max(p, min(1.0, centre + margin)))


def share_interval(successes: float, n: float) -> Interval:
    """Return a share with Wilson's interval, its end next to 0 or 1 from a Poisson count where few cases are there.

    Wilson's own end is too near there: 95 % become 84 (Brown, Cai and DasGupta 2001, section 4.1.1).
    """
    from scipy.stats import chi2

    share = wilson(successes, n)
    low, high = (float(chi2.ppf(0.05, 2 * k)) / (2 * n) if 0 < k <= FEW else None for k in (successes, n - successes))
    return Interval(share.value, share.low if low is None else low, share.high if high is None else 1 - high)


class LabelScores(NamedTuple):
    precision: float
    recall: float
    f1: float
    rows: int


class ClassificationReport(NamedTuple):
    """`precision`, `recall` and `f1` are of the positive label, the last one, where there are two, else macro means.

    `roc_auc` is None where it is not defined: a label without a row. With more than two labels it is the macro mean of
    `label_auc`, one label against the rest.
    """

    rows: int
    accuracy: Interval
    precision: float
    recall: float
    f1: float
    roc_auc: float | None
    per_label: dict[str, LabelScores]
    confusion: Ints  # [K actual, K predicted]
    label_auc: dict[str, float]  # of each label that some rows have and some have not


def classification_report(actual: Ints, probabilities: Floats, labels: Sequence[str]) -> ClassificationReport:
    """Score probabilities [N, K] against the actual label numbers [N]; the prediction is the likeliest label."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = list(range(len(labels)))
    predicted = probabilities.argmax(axis=1)  # [N]
    precision, recall, f1, rows = precision_recall_fscore_support(actual, predicted, labels=numbers, zero_division=0.0)
    per_label = {
        label: LabelScores(float(precision[k]), float(recall[k]), float(f1[k]), int(rows[k]))
        for k, label in enumerate(labels)
    }
    binary = len(labels) == 2
    areas = {
        label: area
        for k, label in enumerate(labels)
        if (area := _roc_auc(actual == k, probabilities[:, k])) is not None
    }
    precision_, recall_, f1_ = (float(x[-1] if binary else x.mean()) for x in (precision, recall, f1))
    return ClassificationReport(
        rows=len(actual),
        accuracy=share_interval(int((actual == predicted).sum()), len(actual)),
        precision=precision_,
        recall=recall_,
        f1=f1_,
        roc_auc=_mean_auc(areas, labels),
        per_label=per_label,
        confusion=confusion_matrix(actual, predicted, labels=numbers),
        label_auc=areas,
    )


def _roc_auc(hits: Bools, scores: Floats) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(hits, scores)) if 0 < hits.sum() < len(hits) else None


def _mean_auc(areas: Mapping[str, float], labels: Sequence[str]) -> float | None:
    if len(areas) < len(labels):
        return None
    return areas[labels[-1]] if len(labels) == 2 else float(np.mean([areas[label] for label in labels]))


Curve = tuple[Floats, Floats]  # the rates of false and of true positives


def roc_points(actual: Ints, probabilities: Floats) -> Curve:
    """Return the ROC curve of the last label of two, else the macro mean of the labels' curves.

    The area under it is the report's `roc_auc`.
    """
    n_labels = probabilities.shape[1]
    if n_labels == 2:
        return label_roc(actual, probabilities, 1)
    return _mean_curve([label_roc(actual, probabilities, k) for k in range(n_labels)])


def label_roc(actual: Ints, probabilities: Floats, label: int) -> Curve:
    """Return the ROC curve of one label against the rest."""
    from sklearn.metrics import roc_curve

    false_positives, true_positives, _ = roc_curve(actual == label, probabilities[:, label])
    return false_positives, true_positives


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean true positive rate at each false positive rate; each step of a curve stays a step."""
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    low, high = np.zeros(len(grid)), np.zeros(len(grid))  # before and after the step at each point of the grid
    for x, y in curves:
        between = np.interp(grid, x, y)
        first, last = np.searchsorted(x, grid), np.searchsorted(x, grid, side="right") - 1
        low += np.where(x[np.minimum(first, len(x) - 1)] == grid, y[np.minimum(first, len(x) - 1)], between)
        high += np.where(x[last] == grid, y[last], between)
    return np.repeat(grid, 2), np.column_stack((low, high)).ravel() / len(curves)


class AnswerReport(NamedTuple):
    """Overlap of answers with the expected ones: exact match as a share, ROUGE-L (F, 0 to 1), chrF (0 to 100)."""

    rows: int
    exact_match: Interval
    rouge_l: float
    chrf: float


def fold(text: str) -> str:
    """Collapse white space, as exact match does before it compares."""
    return " ".join(text.split())


def exact_matches(answers: Iterable[str], expected: Iterable[str]) -> list[bool]:
    """Return whether each answer is the expected one, up to white space."""
    return [fold(answer) == fold(right) for answer, right in zip(answers, expected, strict=True)]


def answer_report(answers: Sequence[str], expected: Sequence[str]) -> AnswerReport:
    """Compute exact match, ROUGE-L (rouge-score; words of any script) and corpus chrF (sacrebleu) of answers."""
    from sacrebleu.metrics.chrf import CHRF

    if not answers:
        return AnswerReport(0, wilson(0, 0), 0.0, 0.0)
    return AnswerReport(
        rows=len(answers),
        exact_match=share_interval(sum(exact_matches(answers, expected)), len(answers)),
        rouge_l=float(np.mean(rouge_l_scores(answers, expected))),
        chrf=float(CHRF().corpus_score(list(answers), [list(expected)]).score),
    )


def rouge_l_scores(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """Return the ROUGE-L of each answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [scorer.score(e, a)["rougeL"].fmeasure for a, e in zip(answers, expected, strict=True)]


class _Words:
    """A tokenizer for any script; rouge-score's own drops everything but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def by_task(answers: Sequence[str], expected: Sequence[str], tasks: Sequence[str]) -> dict[str, AnswerReport]:
    """Return one report for each task, sorted by name; empty where the source names no tasks."""
    rows: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        rows.setdefault(task, []).append(i)
    if set(rows) <= {""}:
        return {}
    return {
        task: answer_report([answers[i] for i in rows[task]], [expected[i] for i in rows[task]])
        for task in sorted(rows)
    }


def numbers(report: ClassificationReport | AnswerReport) -> dict[str, Any]:
    """Flatten a report for a metrics file."""
    if isinstance(report, AnswerReport):
        return {**_flat("exact_match", report.exact_match), "rouge_l": report.rouge_l, "chrf": report.chrf}
    values = _flat("accuracy", report.accuracy)
    values |= {"precision": report.precision, "recall": report.recall, "f1": report.f1}
    return values | ({} if report.roc_auc is None else {"roc_auc": report.roc_auc})


def _flat(name: str, share: Interval) -> dict[str, float]:
    return {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
