"""Labels that are probably wrong in the data, by confident learning (Northcutt, Jiang and Chuang 2021).

Shapes: N messages, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.examples import Message

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FOLDS = 3
STRENGTH = 1.0  # inverse regularisation of the logistic regression
MOST_MESSAGES = 50_000  # that are searched, the first ones


class Suspect(NamedTuple):
    """A message whose label is probably wrong."""

    split: str
    text: str
    given: str
    suggested: str
    probability: float  # of the suggested label, out of sample


class LabelErrors(NamedTuple):
    searched: int
    suspects: list[Suspect]  # the most suspect first


def find_label_errors(splits: Mapping[str, Sequence[Message]], labels: Sequence[str]) -> LabelErrors:
    """Search all splits by a classical method that never saw the message that it judges."""
    rows = [(split, message) for split, messages in splits.items() for message in messages][:MOST_MESSAGES]
    given = np.array([labels.index(message.label) for _, message in rows])
    probabilities = out_of_sample([message.text for _, message in rows], given, len(labels))
    if probabilities is None:
        return LabelErrors(0, [])
    found = []
    for i, k in suspects(given, probabilities):
        split, message = rows[i]
        found.append(Suspect(split, message.text, message.label, labels[k], float(probabilities[i, k])))
    return LabelErrors(len(rows), found)


def out_of_sample(texts: Sequence[str], given: Ints, n_labels: int) -> Floats | None:
    """Return cross-validated probabilities [N, K]; None where too few messages have two labels.

    Equal texts stand in one fold, else a copy with the same wrong label would confirm it.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    counts = np.bincount(given, minlength=n_labels)
    if np.count_nonzero(counts >= FOLDS) < 2:
        return None
    _, groups = np.unique(texts, return_inverse=True)
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    try:
        x = words.fit_transform(texts)
    except ValueError:  # no word occurs twice
        return None
    probabilities = np.zeros((len(texts), n_labels))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for known, unseen in folds.split(x, np.where(counts[given] >= FOLDS, given, -1), groups):
        if len(np.unique(given[known])) < 2:
            return None
        model = LogisticRegression(C=STRENGTH, max_iter=200, tol=1e-3).fit(x[known], given[known])
        probabilities[np.ix_(unseen, model.classes_)] = model.predict_proba(x[unseen])
    return probabilities


def suspects(given: Ints, probabilities: Floats) -> list[tuple[int, int]]:
    """Return the numbers of suspect messages and of their suggested labels, the largest margin first.

    A label is confident where its probability reaches its mean over the messages that carry it. The counts of confident
    labels, by the given one, tell how many messages of each pair of labels are wrong: so many are suspect, those with
    the largest margin.
    """
    n_labels = probabilities.shape[1]
    numbers = np.arange(n_labels)
    carriers = [probabilities[given == k, k] for k in numbers]
    limits = np.array([values.mean() if len(values) else np.inf for values in carriers])
    confident = np.where(probabilities >= limits, probabilities, -1.0)
    best, is_confident = confident.argmax(axis=1), confident.max(axis=1) >= 0
    found = []
    for k in numbers:
        here = np.flatnonzero(given == k)
        counts = np.bincount(best[here][is_confident[here]], minlength=n_labels)
        for other in numbers[(numbers != k) & (counts > 0)]:
            wrong = round(len(here) * counts[other] / counts.sum())
            margins = probabilities[here, other] - probabilities[here, k]
            order = np.argsort(-margins, kind="stable")[:wrong]
            found += [(float(margins[i]), int(here[i]), int(other)) for i in order if margins[i] > 0]
    largest: dict[int, tuple[float, int]] = {}
    for margin, i, other in sorted(found, reverse=True):
        largest.setdefault(i, (margin, other))
    return [(i, other) for i, (_, other) in largest.items()]
