"""Drift of a model's inputs: two samples of texts, tested against the hypothesis that both are of one source.

All tests but the last exchange texts between the samples at random, so a text's tokens stay together. The last one
trains a classifier to tell the samples apart on half of the texts and tests it on the other half (Lopez-Paz and
Oquab 2017). Holm's correction holds the false alarms of all tests together below `alpha`.

Shapes: N texts of both samples, V tokens, K labels, R permutations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.evaluation.comparison import holm

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ALPHA = 0.01  # false alarms of all tests together
PERMUTATIONS = 2000
MAX_TEXTS = 2000  # of a sample; a larger one is drawn from
FEWEST = 10  # texts of a sample
MAX_TOKENS = 512  # the most frequent ones
SHOWN_TOKENS = 5


class Sample(NamedTuple):
    """Texts as a model reads them. `labels` and `confidence` are a model's, where there is one."""

    texts: list[str]
    tokens: list[list[str]]
    single_bytes: list[float]  # share of a text's bytes that are tokens of their own
    labels: list[str] | None = None
    confidence: list[float] | None = None


class TestResult(NamedTuple):
    """The result of one test."""

    name: str
    reference: float
    new: float
    p: float
    p_holm: float
    drift: bool
    detail: str = ""


def detect_drift(
    reference: Sample, new: Sample, *, alpha: float = ALPHA, permutations: int = PERMUTATIONS, seed: int = 0
) -> list[TestResult]:
    """Test two samples by all that they have."""
    is_new = np.repeat([False, True], [len(reference.texts), len(new.texts)])  # [N]
    random = np.random.default_rng(seed)
    exchanged = np.array([random.permutation(is_new) for _ in range(permutations)])  # [R, N]
    tokens = [*reference.tokens, *new.tokens]
    counts, names = token_counts(tokens)
    found = [
        distribution_test("tokens", counts, is_new, exchanged, names),
        shape_test("length", np.array([float(len(each)) for each in tokens]), is_new, exchanged),
        shape_test("single bytes", np.array([*reference.single_bytes, *new.single_bytes]), is_new, exchanged),
    ]
    if reference.labels is not None and new.labels is not None:
        said = np.array([*reference.labels, *new.labels])
        labels = sorted(set(said.tolist()))
        one_hot = (said[:, None] == np.array(labels)).astype(np.float64)
        found.append(distribution_test("labels", one_hot, is_new, exchanged, labels))
    if reference.confidence is not None and new.confidence is not None:
        found.append(shape_test("confidence", np.array([*reference.confidence, *new.confidence]), is_new, exchanged))
    found.append(classifier_test(counts, is_new, random))
    adjusted = holm([test.p for test in found])
    return [test._replace(p_holm=p, drift=p < alpha) for test, p in zip(found, adjusted, strict=True)]


def draw(texts: Sequence[str], most: int = MAX_TEXTS, seed: int = 0) -> list[str]:
    """Return at most so many of the texts, drawn at random, in their order."""
    if len(texts) <= most:
        return list(texts)
    chosen = np.sort(np.random.default_rng(seed).choice(len(texts), most, replace=False))
    return [texts[i] for i in chosen]


def token_counts(tokens: Sequence[Sequence[str]]) -> tuple[Floats, list[str]]:
    """Return how often each text has each of the most frequent tokens [N, V], and their names."""
    occurrences = Counter(token for each in tokens for token in each)
    names = [token for token, _ in occurrences.most_common(MAX_TOKENS)]
    place = {token: k for k, token in enumerate(names)}
    counts = np.zeros((len(tokens), len(names)))
    for i, each in enumerate(tokens):
        for token, count in Counter(each).items():
            if token in place:
                counts[i, place[token]] = count
    return counts, names


def distribution_test(name: str, counts: Floats, is_new: Bools, exchanged: Bools, names: Sequence[str]) -> TestResult:
    """Test the shares of tokens or labels by the chi-squared distance of the two samples."""
    total = counts.sum(axis=0)  # [V]

    def distances(sides: Bools) -> Floats:
        """Return the distance for each assignment [R, N]: [R]."""
        sums = sides.astype(np.float64) @ counts  # [R, V] of the new sample
        b = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1)
        rest = total - sums
        a = rest / np.maximum(rest.sum(axis=1, keepdims=True), 1)
        return np.asarray(((a - b) ** 2 / np.maximum(total / max(total.sum(), 1), 1e-12)).sum(axis=1))

    found = float(distances(is_new[None])[0])
    p = permutation_p(found, np.concatenate([distances(part) for part in np.array_split(exchanged, 8)]))
    shares = [counts[side].sum(axis=0) / max(counts[side].sum(), 1) for side in (~is_new, is_new)]
    change = shares[1] - shares[0]
    most = np.argsort(-np.abs(change))[:SHOWN_TOKENS]
    detail = ", ".join(f"{names[k]!r} {100 * change[k]:+.1f} points" for k in most if change[k])
    top = int(most[0]) if len(most) else 0
    before, now = (float(share[top]) if len(share) else 0.0 for share in shares)
    return TestResult(name, before, now, p, p, False, detail)


def shape_test(name: str, values: Floats, is_new: Bools, exchanged: Bools) -> TestResult:
    """Test a number of each text by the largest distance of the two distributions (Kolmogorov and Smirnov)."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) > 0, True))  # the last of equal values
    n_new, n_old = int(is_new.sum()), int((~is_new).sum())

    def distances(sides: Bools) -> Floats:
        new = sides[:, order]  # [R, N]
        gap = np.cumsum(new, axis=1)[:, ends] / n_new - np.cumsum(~new, axis=1)[:, ends] / n_old
        return np.asarray(np.abs(gap).max(axis=1))

    p = permutation_p(
        float(distances(is_new[None])[0]), np.concatenate([distances(part) for part in np.array_split(exchanged, 8)])
    )
    before, now = (float(np.median(values[side])) for side in (~is_new, is_new))
    return TestResult(name, before, now, p, p, False, "medians")


def permutation_p(found: float, distances: Floats) -> float:
    return (1 + int((distances >= found - 1e-12).sum())) / (1 + len(distances))


def classifier_test(counts: Floats, is_new: Bools, random: np.random.Generator) -> TestResult:
    """Test whether a logistic regression tells unseen texts of the two samples apart: area under the ROC curve."""
    from scipy.stats import mannwhitneyu
    from sklearn.linear_model import LogisticRegression

    order = random.permutation(len(is_new))
    half = np.zeros(len(is_new), dtype=bool)
    for side in (is_new, ~is_new):  # half of each sample
        members = order[side[order]]
        half[members[: len(members) // 2]] = True
    features = np.log1p(counts)
    model = LogisticRegression(max_iter=200, class_weight="balanced").fit(features[half], is_new[half])
    scores = model.decision_function(features[~half])
    new, old = scores[is_new[~half]], scores[~is_new[~half]]
    statistic, p = mannwhitneyu(new, old, alternative="greater")
    area = float(statistic) / (len(new) * len(old))
    return TestResult("two-sample classifier", 0.5, area, float(p), float(p), False, "area under the ROC curve")
