"""Details of the finetuned classifier: figures of each label, mistakes, slices, curves.

Shapes: N messages, K labels.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.evaluation.classifier.calibration import CalibrationResult
from llm.evaluation.classifier.label_errors import LabelErrors
from llm.evaluation.classifier.learning_curve import CurvePoint
from llm.evaluation.classifier.robustness import Change
from llm.evaluation.intervals import clustered_share, f1_intervals
from llm.evaluation.metrics import ClassificationReport, Curve, Interval, share_interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LENGTH_GROUPS = 4
MISTAKES = 10
MOST_VALUES = 12  # of a column
FEWEST_ROWS = 5  # of a slice that is shown


class LabelDetails(NamedTuple):
    precision: Interval
    recall: Interval
    f1: Interval
    average_precision: float | None  # None for a label that no message or every message has


class Mistake(NamedTuple):
    text: str
    actual: str
    predicted: str
    probability: float  # of the predicted label


class Slice(NamedTuple):
    """Accuracy of a part of the messages."""

    kind: str
    name: str
    rows: int
    gpt: Interval
    classical: Interval  # of the best classical method


class ClassifierDetails(NamedTuple):
    clusters: int  # of equal or almost equal messages
    accuracy: Interval  # with almost equal messages as one
    macro_f1: Interval
    average_precision: float | None  # of the last of two labels, else the mean
    labels: dict[str, LabelDetails]
    precision_recall: dict[str, Curve]  # recall, precision
    calibration: CalibrationResult
    mistakes: list[Mistake]  # the most confident first
    slices: list[Slice]
    label_errors: LabelErrors
    learning_curve: list[CurvePoint]
    robustness: list[Change]


def label_details(
    report: ClassificationReport, actual: Ints, probabilities: Floats, labels: Sequence[str]
) -> tuple[dict[str, LabelDetails], dict[str, Curve], Interval]:
    """Return each label's figures with intervals, its precision-recall curve, and the macro F1."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    f1, macro = f1_intervals(report.confusion)
    details, curves = {}, {}
    for k, label in enumerate(labels):
        hits, area = int(report.confusion[k, k]), None
        if 0 < report.confusion[k].sum() < report.rows:
            area = float(average_precision_score(actual == k, probabilities[:, k]))
            precision, recall, _ = precision_recall_curve(actual == k, probabilities[:, k])
            curves[label] = recall, precision
        details[label] = LabelDetails(
            precision=share_interval(hits, int(report.confusion[:, k].sum())),
            recall=share_interval(hits, int(report.confusion[k].sum())),
            f1=f1[k],
            average_precision=area,
        )
    return details, curves, macro


def mean_precision(details: dict[str, LabelDetails]) -> float | None:
    """Return the average precision of the last of two labels, else the mean over the labels."""
    areas = [each.average_precision for each in details.values()]
    if any(area is None for area in areas):
        return None
    known = [area for area in areas if area is not None]
    return known[-1] if len(known) == 2 else float(np.mean(known))


def confident_mistakes(
    texts: Sequence[str], actual: Ints, probabilities: Floats, labels: Sequence[str]
) -> list[Mistake]:
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != actual)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return [Mistake(texts[i], labels[actual[i]], labels[predicted[i]], float(confidence[i])) for i in order]


def slices(
    texts: Sequence[str],
    right: Floats,
    classical: Floats,
    clusters: Ints,
    columns: Sequence[Mapping[str, str]] = (),
) -> list[Slice]:
    """Return the accuracy by length, by script and by each of the messages' own `columns`, where two groups are there.

    Of a column the most frequent values are shown.
    """
    lengths = np.array([len(text) for text in texts])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_GROUPS + 1)[1:]).round().astype(np.int64))
    groups = np.searchsorted(edges, lengths)
    starts = [0, *(int(edge) + 1 for edge in edges[:-1])]
    names = [f"{start}-{edge} characters" for start, edge in zip(starts, edges, strict=True)]
    by_length = [names[group] for group in groups]
    kinds = {"length": (names, by_length)}
    by_script = [script(text) for text in texts]
    kinds["script"] = ([name for name, _ in Counter(by_script).most_common()], by_script)
    for column in columns[0] if columns else ():
        values = [each.get(column) or "(empty)" for each in columns]
        kinds[column] = ([name for name, _ in Counter(values).most_common(MOST_VALUES)], values)
    found = []
    for kind, (order, members) in kinds.items():
        of = np.array(members)
        shown = [name for name in order if (of == name).sum() >= FEWEST_ROWS]
        for name in shown if len(shown) > 1 else []:
            here = of == name
            shares = (clustered_share(hits[here], clusters[here]) for hits in (right, classical))
            found.append(Slice(kind, name, int(here.sum()), *shares))
    return found


def script(text: str) -> str:
    """Return the script of most letters of a text, such as latin, by their Unicode names; none without a letter.

    >>> script("2 × été"), script("жщ"), script("42")
    ('latin', 'cyrillic', 'none')
    """
    scripts = Counter(unicodedata.name(c, "other").split()[0].lower() for c in text if c.isalpha())
    return scripts.most_common(1)[0][0] if scripts else "none"
