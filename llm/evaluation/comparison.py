"""Paired comparison of two models on the same examples: exact tests, intervals, and a verdict in words.

Shapes: N examples, S summands of a metric, R resamples. A difference is B minus A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.evaluation.metrics import Interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Verdict = Literal["better", "worse", "not to be told apart"]

ALPHA = 0.05  # false alarms of all metrics together
POWER = 0.8  # of the smallest difference that a test set can see
RESAMPLES = 10_000
FEWEST_RESAMPLES = 1000  # where there are many examples
CELLS = 20_000_000  # drawn for one metric, resamples times examples
CHUNK_CELLS = 2_000_000  # drawn at once


class Metric(NamedTuple):
    """A metric of both models: a function of sums over the examples.

    The accuracy's summands are the hits and the examples, its value is their ratio. The F1 of a label is a function of
    its hits, its predictions and its occurrences.
    """

    name: str
    a: Floats  # [N, S]
    b: Floats
    value: Callable[[Floats], Floats]  # sums [..., S] to values [...]
    higher_is_better: bool = True
    binary: bool = False  # each example is right or wrong: McNemar's test is exact


class MetricComparison(NamedTuple):
    """The result of one metric. The interval is of the difference, from a paired bootstrap."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int | None  # examples that A alone has right
    only_b: int | None
    p_mcnemar: float | None
    p_permutation: float
    p_holm: float  # of the exact test where there is one, corrected for the number of metrics
    smallest: float  # the difference that this test set would have seen in 4 of 5 cases
    verdict: Verdict  # on B


def mean_metric(name: str, a: Sequence[float], b: Sequence[float], *, higher_is_better: bool = True) -> Metric:
    """Return the metric that is the mean of the examples' scores, a share where all are 0 or 1."""
    scores_a, scores_b = (np.column_stack((np.asarray(x, dtype=np.float64), np.ones(len(x)))) for x in (a, b))
    binary = bool(np.isin((scores_a[:, 0], scores_b[:, 0]), (0, 1)).all())
    return Metric(name, scores_a, scores_b, ratio, higher_is_better, binary)


def ratio_metric(name: str, a: Floats, b: Floats, weights: Floats) -> Metric:
    """Return a loss that is a ratio of sums, such as bits per byte: lower is better."""
    return Metric(name, np.column_stack((a, weights)), np.column_stack((b, weights)), ratio, False)


def macro_f1(actual: Ints, a: Ints, b: Ints, n_labels: int) -> Metric:
    """Return the mean of the labels' F1; a label that is neither there nor predicted counts 0."""
    labels = np.arange(n_labels)

    def summands(predicted: Ints) -> Floats:
        says, is_it = predicted[:, None] == labels, actual[:, None] == labels
        return np.concatenate((says & is_it, says, is_it), axis=1).astype(np.float64)

    def value(sums: Floats) -> Floats:
        hits, says, is_it = np.split(sums, 3, axis=-1)
        return np.asarray((2 * hits / np.maximum(says + is_it, 1)).mean(axis=-1))

    return Metric("macro F1", summands(a), summands(b), value)


def ratio(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


def compare(metrics: Sequence[Metric], seed: int = 0, resamples: int = RESAMPLES) -> list[MetricComparison]:
    """Compare two models by each metric, with Holm's correction for their number."""
    alone = [_compare_one(metric, len(metrics), seed, resamples) for metric in metrics]
    raw = [found.p_permutation if found.p_mcnemar is None else found.p_mcnemar for found in alone]
    results = []
    for metric, found, p in zip(metrics, alone, holm(raw), strict=True):
        verdict: Verdict = "not to be told apart"
        if p < ALPHA and found.difference:
            verdict = "better" if (found.difference > 0) == metric.higher_is_better else "worse"
        results.append(found._replace(p_holm=p, verdict=verdict))
    return results


def _compare_one(metric: Metric, n_metrics: int, seed: int, resamples: int) -> MetricComparison:
    n = len(metric.a)
    metric, counts = grouped(metric)
    count = min(resamples, max(FEWEST_RESAMPLES, CELLS // len(counts)))
    a, b = (float(metric.value(counts @ x)) for x in (metric.a, metric.b))
    differences = bootstrap(metric, counts, count, np.random.default_rng([seed, 0]))
    low, high = (float(x) for x in np.quantile(differences, (0.025, 0.975)))
    only_a = only_b = p = None
    if metric.binary:
        hits_a, hits_b = metric.a[:, 0], metric.b[:, 0]
        only_a, only_b = int(counts[hits_a > hits_b].sum()), int(counts[hits_b > hits_a].sum())
        p = mcnemar(only_a, only_b)
        smallest = smallest_visible(n, only_a + only_b, ALPHA / n_metrics)
    else:
        smallest = (_z(1 - ALPHA / n_metrics / 2) + _z(POWER)) * float(differences.std())
    return MetricComparison(
        metric=metric.name,
        a=a,
        b=b,
        difference=b - a,
        low=low,
        high=high,
        only_a=only_a,
        only_b=only_b,
        p_mcnemar=p,
        p_permutation=permutation(metric, counts, count, np.random.default_rng([seed, 1])),
        p_holm=math.nan,
        smallest=smallest,
        verdict="not to be told apart",
    )


def grouped(metric: Metric) -> tuple[Metric, Ints]:
    """Return the metric with its different examples alone, and how often each of them occurs."""
    both, counts = np.unique(np.hstack((metric.a, metric.b)), axis=0, return_counts=True)
    a, b = np.hsplit(both, 2)
    return metric._replace(a=a, b=b), counts


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value: under no difference the examples that one alone has right are coin tosses."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def bootstrap(metric: Metric, counts: Ints, resamples: int, random: np.random.Generator) -> Floats:
    """Return the differences of resamples of the examples, drawn for both models alike: [R]."""
    n = int(counts.sum())
    parts = []
    for size in _chunks(resamples, len(counts)):
        drawn = random.multinomial(n, counts / n, size=size).astype(np.float64)  # [R, N]: how often each
        parts.append(metric.value(drawn @ metric.b) - metric.value(drawn @ metric.a))
    return np.concatenate(parts)


def permutation(metric: Metric, counts: Ints, resamples: int, random: np.random.Generator) -> float:
    """Return the two-sided p-value of random exchanges of the two models' results on single examples."""
    sums_a, sums_b, change = counts @ metric.a, counts @ metric.b, metric.b - metric.a
    found = abs(float(metric.value(sums_b) - metric.value(sums_a)))
    as_large = 0
    for size in _chunks(resamples, len(counts)):
        exchanged = random.binomial(counts, 0.5, size=(size, len(counts)))  # [R, N]: of how many
        a = sums_a + exchanged @ change
        differences = np.abs(metric.value(sums_a + sums_b - a) - metric.value(a))
        as_large += int((differences >= found - 1e-12).sum())
    return (1 + as_large) / (1 + resamples)


def _chunks(count: int, n: int) -> list[int]:
    size = max(1, CHUNK_CELLS // n)
    return [min(size, count - start) for start in range(0, count, size)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979): the chance of any false alarm stays below the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def smallest_visible(n: int, discordant: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the difference of two shares that McNemar's exact test sees with probability `power`.

    As many of the `n` examples as in `discordant` are taken to be right for one model alone, more where the difference
    needs it. 1 where even the largest difference stays unseen.
    """
    low, high = 0.0, 1.0
    if _mcnemar_power(n, discordant / n, 1.0, alpha) < power:
        return 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        if _mcnemar_power(n, discordant / n, middle, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def _mcnemar_power(n: int, discordant: float, difference: float, alpha: float) -> float:
    """Return the chance that the exact test finds a difference with its sign, however many examples differ."""
    from scipy.stats import binom

    share = max(discordant, difference)
    d = np.arange(int(binom.ppf(1e-9, n, share)), int(binom.ppf(1 - 1e-9, n, share)) + 1)
    critical = binom.ppf(alpha / 2, d, 0.5)  # at most this many are right for the worse model alone
    critical = np.where(2 * binom.cdf(critical, d, 0.5) < alpha, critical, critical - 1)
    favours_worse = (share - difference) / (2 * share)
    return float((binom.pmf(d, n, share) * binom.cdf(critical, d, favours_worse)).sum())


def _z(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def paired_share(wins: int, losses: int, n: int) -> Interval:
    """Return the share of wins among `n` pairs, a tie counting half, with Tango's 95 % score interval (1998).

    It holds for few pairs and for shares near 0 and 1.
    """
    if n == 0:
        return Interval(0.5, 0.0, 1.0)
    z = _z(1 - ALPHA / 2)

    def score(difference: float) -> float:
        """Return the distance of the found difference from a supposed one, in standard errors."""
        b = -wins - losses + (2 * n - wins + losses) * difference
        c = -losses * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (wins - losses - n * difference) / math.sqrt(max(variance, 1e-12))

    def end(target: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(60):  # the score falls with the difference
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return low

    value = (wins - losses) / n
    return Interval(*((1 + x) / 2 for x in (value, min(value, end(z)), max(value, end(-z)))))
