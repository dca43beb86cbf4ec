"""Intervals: how often 95 % ones cover the truth, also near 100 % and with 50 examples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from llm.evaluation.intervals import (
    bootstrap_interval,
    clustered_share,
    clusters_of,
    design_effect,
    f1_intervals,
)
from llm.evaluation.metrics import share_interval, wilson


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_intervals_of_shares_cover_in_95_of_100_cases(n: int) -> None:
    """Exact coverage, summed over the binomial distribution, for shares up to 99.9 %."""
    intervals = [share_interval(x, n) for x in range(n + 1)]
    low, high = (np.array(end) for end in zip(*((i.low, i.high) for i in intervals), strict=True))
    for shares in (np.linspace(0.02, 0.98, 49), np.linspace(0.9, 0.999, 50), np.linspace(0.001, 0.1, 50)):
        coverage = [binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum() for p in shares]
        assert 0.93 <= np.mean(coverage) <= 0.97
        assert min(coverage) > 0.915


def test_wilson_alone_covers_too_seldom_near_the_ends() -> None:
    n, p, coverage = 50, 0.9972, {}
    for interval in (wilson, share_interval):
        hit = np.array([i.low <= p <= i.high for i in (interval(x, n) for x in range(n + 1))])
        coverage[interval] = binom.pmf(np.arange(n + 1), n, p)[hit].sum()
    assert coverage[wilson] < 0.88 and coverage[share_interval] > 0.95
    assert share_interval(50, 50) == wilson(50, 50) and share_interval(900, 1000) == wilson(900, 1000)
    assert share_interval(0, 0) == (0.0, 0.0, 1.0)


def test_dependent_examples_widen_the_interval_of_a_share() -> None:
    rng = np.random.default_rng(0)
    covered, plain, share = 0, 0, 0.9
    for _ in range(400):
        groups = np.repeat(np.arange(150), rng.integers(1, 6, 150))
        together = rng.random(150) < 0.7
        hits = np.where(together[groups], (rng.random(150) < share)[groups], rng.random(len(groups)) < share)
        found = clustered_share(hits.astype(float), groups)
        covered += found.low <= share <= found.high
        alone = share_interval(hits.sum(), len(hits))
        plain += alone.low <= share <= alone.high
    assert 0.93 <= covered / 400 <= 0.97
    assert plain / 400 < 0.85


def test_independent_examples_keep_their_interval() -> None:
    hits = np.array([1.0] * 90 + [0.0] * 10)
    assert design_effect(hits, np.arange(100)) == 1.0
    assert clustered_share(hits, np.arange(100)) == share_interval(90, 100)
    assert design_effect(hits, np.zeros(100, dtype=np.int64)) == 100, "all of one cluster count as one"
    assert design_effect(np.ones(100), np.repeat(np.arange(50), 2)) == 2, "no mistake tells how they depend"


@pytest.mark.parametrize(("n", "error"), [(50, 0.1), (200, 0.02)])
def test_interval_of_macro_f1_covers_with_rare_labels(n: int, error: float) -> None:
    rng = np.random.default_rng(1)
    cells = np.full((3, 3), error / 2)
    np.fill_diagonal(cells, 1 - error)
    cells *= np.array([[0.6], [0.3], [0.1]])
    _, truth = f1_intervals((cells * 10**9).round().astype(np.int64))
    found = [f1_intervals(rng.multinomial(n, cells.ravel()).reshape(3, 3))[1] for _ in range(300)]
    assert 0.92 <= np.mean([i.low <= truth.value <= i.high for i in found]) <= 0.98


def test_f1_of_labels_has_wilsons_ends() -> None:
    labels, mean = f1_intervals(np.array([[40, 10], [5, 45]]))
    share = share_interval(40, 55)
    assert labels[0].value == pytest.approx(2 * 40 / (50 + 45))
    assert labels[0].low == pytest.approx(2 * share.low / (1 + share.low))
    assert mean.value == pytest.approx((labels[0].value + labels[1].value) / 2)
    assert mean.low < mean.value < mean.high
    perfect = f1_intervals(np.diag([30, 20]))[1]
    assert perfect.high == 1.0 and 0.85 < perfect.low < 0.97, "no mistake seen is no proof of none"


def test_bootstrap_draws_whole_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.evaluation.intervals.RESAMPLES", 400)
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(120):
        groups = np.repeat(np.arange(60), 5)
        values = 0.5 + rng.normal(0, 1, 60)[groups] + rng.normal(0, 0.2, 300)
        pairs = np.column_stack((values, np.ones(300)))
        found = bootstrap_interval(pairs, groups, lambda s: s[..., 0] / s[..., 1], seed)
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / 120 <= 0.99
    alone = bootstrap_interval(pairs, np.arange(300), lambda s: s[..., 0] / s[..., 1])
    assert found.high - found.low > 1.8 * (alone.high - alone.low)


def test_almost_equal_texts_share_a_cluster() -> None:
    texts = [
        "Call now to win the big prize today 0123",
        "call NOW  to win the big prize today 0123",
        "Call now to win the big prize today 0124",
        "See you at six",
        "",
        "The baker sold bread at the harbour",
    ]
    found = clusters_of(texts)
    assert found[0] == found[1] == found[2]
    assert len(set(found.tolist())) == 4
    assert len(set(clusters_of(["", " "]).tolist())) == 1
