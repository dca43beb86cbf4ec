"""95 % intervals of what is no plain share, and of examples that depend on each other.

Examples of one cluster (one document, equal or almost equal texts) count as one draw.
Shapes: N examples, G clusters, S summands of a metric, R resamples, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llm.evaluation.metrics import Interval, share_interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]  # sums [..., S] to values [...]

RESAMPLES = 2000
DRAWS = 400
CELLS_AT_ONCE = 2_000_000  # resamples times clusters
FEWEST_MISTAKES = 5  # from which the dependence of mistakes is estimated; below, a cluster counts as one example
ALIKE = 0.9  # cosine of TF-IDF of characters from which two texts are almost equal
ROWS_AT_ONCE = 512


def clusters_of(texts: Sequence[str]) -> Ints:
    """Return a cluster's number for each text: equal and almost equal ones share it, also by way of others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    unique, places = np.unique([" ".join(text.casefold().split()) for text in texts], return_inverse=True)
    try:
        x = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit_transform(unique)
    except ValueError:  # no text holds a character
        return np.asarray(places, dtype=np.int64)
    rows, columns = [], []
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        alike = (x[start : start + ROWS_AT_ONCE] @ x.T).tocoo()
        near = alike.data >= ALIKE
        rows.append(alike.row[near] + start)
        columns.append(alike.col[near])
    i, j = np.concatenate(rows), np.concatenate(columns)
    _, groups = connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(len(unique), len(unique))))
    return np.asarray(groups[places], dtype=np.int64)


def cluster_sums(summands: Floats, clusters: Ints) -> Floats:
    """Return the sums [G, S] over each cluster's examples [N, S]."""
    _, groups = np.unique(clusters, return_inverse=True)
    sums = np.zeros((int(groups.max(initial=-1)) + 1, summands.shape[1]))
    np.add.at(sums, groups, summands)
    return sums


def design_effect(hits: Floats, clusters: Ints) -> float:
    """Return how many times larger the variance of a share is than with independent examples, at least 1."""
    sizes_hits = cluster_sums(np.column_stack((np.ones(len(hits)), hits)), clusters)
    n_clusters, n = len(sizes_hits), len(hits)
    if n_clusters in (0, 1, n):
        return max(1.0, float(n)) if n_clusters == 1 else 1.0
    successes = hits.sum()
    if min(successes, n - successes) < FEWEST_MISTAKES:
        return float((sizes_hits[:, 0] ** 2).sum() / n)
    p = successes / n
    residuals = sizes_hits[:, 1] - p * sizes_hits[:, 0]
    return max(1.0, float((residuals**2).sum() * n_clusters / (n_clusters - 1) / (n * p * (1 - p))))


def clustered_share(hits: Floats, clusters: Ints) -> Interval:
    """Return a share with Wilson's interval for as many independent examples as tell as much."""
    effect = design_effect(hits, clusters)
    return share_interval(float(hits.sum()) / effect, len(hits) / effect)


def resample(sums: Floats, statistic: Statistic, seed: int) -> Floats:
    """Return a statistic of resamples of the clusters: [R]."""
    n = len(sums)
    random = np.random.default_rng(seed)
    size = max(1, CELLS_AT_ONCE // n)
    parts = []
    for start in range(0, RESAMPLES, size):
        drawn = random.multinomial(n, np.full(n, 1 / n), size=min(size, RESAMPLES - start))
        parts.append(np.asarray(statistic(drawn.astype(np.float64) @ sums)))
    return np.concatenate(parts)


def bootstrap_interval(summands: Floats, clusters: Ints, statistic: Statistic, seed: int = 0) -> Interval:
    """Return a function of sums over examples [N, S] with its interval, from a bootstrap of whole clusters.

    The levels are corrected for bias and skewness (BCa, Efron 1987) and for few clusters (Hesterberg 2015).
    """
    from scipy.stats import norm, t

    sums = cluster_sums(summands, clusters)
    total, n = sums.sum(axis=0), len(sums)
    value = float(statistic(total))
    found = resample(sums, statistic, seed) if n > 1 else np.array([value])
    if np.ptp(found) == 0:
        return Interval(value, value, value)
    shift = norm.ppf(np.clip((np.sum(found < value) + np.sum(found == value) / 2) / len(found), 1e-4, 1 - 1e-4))
    without = np.asarray(statistic(total - sums))  # jackknife
    away = without.mean() - without
    skew = (away**3).sum() / (6 * max((away**2).sum() ** 1.5, 1e-300))
    z = shift + np.array((-1, 1)) * t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))
    low, high = (float(q) for q in np.quantile(found, norm.cdf(shift + z / (1 - skew * z))))
    return Interval(value, min(low, value), max(high, value))


def f1_intervals(confusion: Ints) -> tuple[list[Interval], Interval]:
    """Return each label's F1 and their mean, with intervals, from a confusion matrix [K actual, K predicted].

    F1 = 2J / (1 + J) of the share J = TP / (TP + FP + FN), whose interval is Wilson's. The mean's interval joins those
    of the labels by their correlation (Zou and Donner 2008), also where no mistake was seen.
    """
    counts = confusion.astype(np.float64)
    hits = np.diagonal(counts)
    seen = counts.sum(axis=0) + counts.sum(axis=1) - hits
    shares = [share_interval(float(h), float(n)) for h, n in zip(hits, seen, strict=True)]
    f1 = [Interval(*(2 * j / (1 + j) for j in share)) for share in shares]
    value, low, high = (np.array(part) for part in zip(*f1, strict=True))
    together, n_labels = _correlation(counts), len(f1)
    below, above = (math.sqrt(max(0.0, d @ together @ d)) / n_labels for d in (value - low, high - value))
    mean = float(value.mean())
    return f1, Interval(mean, max(0.0, mean - below), min(1.0, mean + above))


def _correlation(counts: Floats) -> Floats:
    """Return the correlation of the labels' F1 over draws of the cells, with half a hit and half a mistake more."""
    n_labels = len(counts)
    if n_labels == 1:
        return np.eye(1)
    mistakes = (1 - np.eye(n_labels)) / (2 * n_labels * (n_labels - 1))
    shape = counts + mistakes + np.eye(n_labels) / (2 * n_labels)
    cells = np.random.default_rng(0).standard_gamma(shape, size=(DRAWS, n_labels, n_labels))
    sums = cells.sum(axis=1) + cells.sum(axis=2)
    return np.nan_to_num(np.corrcoef(2 * np.diagonal(cells, axis1=1, axis2=2) / sums, rowvar=False))
