"""Paired tests against scipy, tables and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from llm.evaluation import comparison
from llm.evaluation.comparison import (
    bootstrap,
    compare,
    grouped,
    holm,
    macro_f1,
    mcnemar,
    mean_metric,
    permutation,
    ratio_metric,
    smallest_visible,
)


def right_and_wrong(n: int, only_a: float, only_b: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two models' hits: both right in two thirds of the rest."""
    rest = 1 - only_a - only_b
    drawn = rng.choice(4, n, p=[only_a, only_b, rest * 2 / 3, rest / 3])
    return (drawn == 0) | (drawn == 2), (drawn == 1) | (drawn == 2)


def p_values(only_a: np.ndarray, discordant: np.ndarray) -> np.ndarray:
    """The exact test of many results at once."""
    return np.minimum(1, 2 * stats.binom.cdf(np.minimum(only_a, discordant - only_a), discordant, 0.5))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert p_values(np.array([3, 0, 9]), np.array([10, 6, 12])) == pytest.approx(
        [mcnemar(3, 7), mcnemar(0, 6), mcnemar(9, 3)]
    )
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 * 0.5**6)
    assert mcnemar(1, 8) == mcnemar(8, 1) == pytest.approx(2 * 10 * 0.5**9)


def test_false_alarms_come_at_the_stated_rate() -> None:
    rng = np.random.default_rng(1)
    n, trials = 2000, 1500
    discordant = rng.binomial(n, 0.25, trials)
    exact = np.mean(p_values(rng.binomial(discordant, 0.5), discordant) < 0.05)
    assert 0.035 < exact < 0.055  # the exact test is a little careful
    alarms = [
        permutation(*grouped(mean_metric("loss", rng.exponential(size=60), rng.exponential(size=60))), 200, rng) < 0.05
        for _ in range(800)
    ]
    assert 0.03 < np.mean(alarms) < 0.07


def test_bootstrap_intervals_cover() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        a = rng.exponential(size=100)
        b = a + rng.normal(0.3, 1, 100)
        low, high = np.quantile(bootstrap(*grouped(mean_metric("loss", a, b)), 400, rng), (0.025, 0.975))
        covered += low <= 0.3 <= high
    assert 0.89 < covered / 200 < 0.99


@pytest.mark.parametrize(("n", "discordant"), [(1000, 60), (300, 40), (100, 0), (50, 25)])
def test_smallest_visible_difference_agrees_with_simulation(n: int, discordant: int) -> None:
    difference = smallest_visible(n, discordant)
    share = max(discordant / n, difference)
    rng = np.random.default_rng(3)
    counts = rng.multinomial(n, [(share - difference) / 2, (share + difference) / 2, 1 - share], 2000)
    only_a, only_b = counts[:, 0], counts[:, 1]
    seen = np.mean((p_values(only_a, only_a + only_b) < 0.05) & (only_b > only_a))
    assert 0.76 < seen < 0.86


def test_a_tiny_test_set_sees_nothing() -> None:
    assert smallest_visible(5, 2) == 1.0
    assert smallest_visible(6, 0) < 1.0  # six to none is the first that counts


def test_holm_agrees_with_the_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_permutation_agrees_with_scipy() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(size=40)
    b = a + rng.normal(0.25, 1, 40)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(y) - np.mean(x), permutation_type="samples", n_resamples=4000, rng=rng
    ).pvalue
    assert permutation(*grouped(mean_metric("loss", a, b)), 4000, rng) == pytest.approx(expected, abs=0.025)


def test_macro_f1_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    actual, a, b = rng.integers(0, 3, (3, 80))
    metric = macro_f1(actual, a, b, 3)
    for summands, predicted in ((metric.a, a), (metric.b, b)):
        assert float(metric.value(summands.sum(axis=0))) == pytest.approx(f1_score(actual, predicted, average="macro"))


def test_verdicts_follow_the_corrected_p_value() -> None:
    rng = np.random.default_rng(6)
    a, b = right_and_wrong(1000, 0.02, 0.08, rng)
    same_a, same_b = right_and_wrong(1000, 0.04, 0.04, rng)
    bytes_ = np.full(1000, 10.0)
    nats = rng.exponential(10, 1000)
    found = compare(
        [
            mean_metric("accuracy", a, b),
            mean_metric("reversed", b, a),
            mean_metric("same", same_a, same_b),
            ratio_metric("bits per byte", nats, nats - 1, bytes_),
            mean_metric("equal", a, a),
        ],
        resamples=1000,
    )
    assert [f.verdict for f in found] == ["better", "worse", "not to be told apart", "better", "not to be told apart"]
    accuracy, _, same, bpb, equal = found
    assert (accuracy.only_a, accuracy.only_b) == (int((a > b).sum()), int((b > a).sum()))
    assert accuracy.p_holm >= accuracy.p_mcnemar == mcnemar(accuracy.only_a, accuracy.only_b)
    assert accuracy.low < accuracy.difference < accuracy.high
    assert accuracy.difference == pytest.approx(b.mean() - a.mean())
    assert same.p_holm > 0.05 and 0.01 < same.smallest < 0.06
    assert bpb.difference == pytest.approx(-0.1) and bpb.p_mcnemar is None
    assert (equal.difference, equal.p_holm, equal.low, equal.high) == (0, 1, 0, 0)


def test_the_same_seed_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    metrics = [mean_metric("loss", rng.normal(size=50), rng.normal(size=50))]
    assert compare(metrics, seed=1, resamples=300) == compare(metrics, seed=1, resamples=300)
    assert compare(metrics, seed=1, resamples=300) != compare(metrics, seed=2, resamples=300)
    monkeypatch.setattr(comparison, "CELLS", 100)  # many examples: fewer resamples
    assert compare(metrics, resamples=5000) == compare(metrics, resamples=comparison.FEWEST_RESAMPLES)


def test_equal_examples_are_counted_once_without_a_change() -> None:
    rng = np.random.default_rng(8)
    a, b = right_and_wrong(500, 0.05, 0.1, rng)
    metric, counts = grouped(mean_metric("accuracy", a, b))
    assert len(counts) == 4 and counts.sum() == 500
    spread = bootstrap(metric, counts, 4000, rng)
    difference = b.astype(float) - a
    assert spread.mean() == pytest.approx(difference.mean(), abs=0.002)
    assert spread.std() == pytest.approx(difference.std() / np.sqrt(500), rel=0.06)
    assert permutation(metric, counts, 4000, rng) == pytest.approx(
        mcnemar(int((a > b).sum()), int((b > a).sum())), abs=0.02
    )
