"""Paired tests on real trainings: pairs that differ in the seed alone, and a model beside itself before its training.

More pairs, with their figures: `LLM_TEST_SEED_PAIRS=20 pytest -m slow -s tests/evaluation/test_seed_pairs.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from llm.checkpoint.folder import Checkpoint
from llm.data.examples import Message
from llm.evaluation.comparison import ALPHA, MetricComparison, compare, mcnemar
from llm.evaluation.predict import label
from llm.evaluation.predictions import Predictions, paired_metrics
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from tests.trainings import new_base, sample_messages, train_tokenizer, trained

pytestmark = pytest.mark.slow
PAIRS = int(os.environ.get("LLM_TEST_SEED_PAIRS", "2"))
TRIALS = 2000


@pytest.fixture(scope="module")
def data() -> dict[str, list[Message]]:
    return sample_messages()


@pytest.fixture(scope="module")
def pairs(data: dict[str, list[Message]]) -> list[tuple[Predictions, Predictions]]:
    """Trainings of one base whose head and order of messages come from the seed."""
    base = new_base(train_tokenizer(data["train"]), seed=0)
    found = [predicted(trained(base, data, seed=seed), data, f"seed {seed}") for seed in range(1, 2 * PAIRS + 1)]
    return list(zip(found[::2], found[1::2], strict=True))


def predicted(checkpoint: Checkpoint, data: dict[str, list[Message]], name: str) -> Predictions:
    return label(checkpoint, name, [(message.text, message.label) for message in data["test"]])


def compared(pairs: list[tuple[Predictions, Predictions]]) -> Iterator[list[MetricComparison]]:
    for a, b in pairs:
        yield compare(paired_metrics(a, b))


def test_another_seed_is_seldom_another_model(pairs: list[tuple[Predictions, Predictions]]) -> None:
    results = list(compared(pairs))
    for found in results:
        accuracy = found[0]
        print(
            f"{accuracy.a:.3f} {accuracy.b:.3f} alone {accuracy.only_a}:{accuracy.only_b} p {accuracy.p_mcnemar:.3f} "
            f"smallest {accuracy.smallest:.4f} " + ", ".join(f"{each.metric}: {each.verdict}" for each in found)
        )
    apart = [sum(each[i].verdict != "not to be told apart" for each in results) for i in range(3)]
    print(f"told apart of {len(results)} by accuracy, macro F1, loss: {apart}")
    assert apart[0] <= max(1, 0.15 * len(results))
    assert all(each.a > 0.8 and each.b > 0.8 for (each, *_) in results)


def test_a_training_is_better_than_none(
    pairs: list[tuple[Predictions, Predictions]], data: dict[str, list[Message]]
) -> None:
    base = new_base(train_tokenizer(data["train"]), seed=0)
    assert isinstance(base.model, GPT)
    config = base.config.model_copy(update={"kind": "classifier", "labels": ["ham", "spam"], "max_length": 48})
    before = predicted(base._replace(model=GPTClassifier(base.model, 2), config=config), data, "before")
    assert [each.verdict for each in compare(paired_metrics(before, pairs[0][0]))] == ["better"] * 3


def test_smallest_visible_difference_agrees_with_a_simulation(
    pairs: list[tuple[Predictions, Predictions]], data: dict[str, list[Message]]
) -> None:
    n = len(data["test"])
    for found in compared(pairs[:3]):
        accuracy, level = found[0], ALPHA / len(found)
        assert accuracy.only_a is not None and accuracy.only_b is not None
        simulated = simulate(n, (accuracy.only_a + accuracy.only_b) / n, level)
        print(f"smallest visible {accuracy.smallest:.4f}, simulated {simulated:.4f}")
        assert accuracy.smallest == pytest.approx(simulated, rel=0.2)


def simulate(n: int, discordant: float, level: float) -> float:
    """Return the difference that McNemar's test finds, with its sign, in 4 of 5 drawn test sets."""
    rng, known = np.random.default_rng(0), {}

    def power(difference: float) -> float:
        share = max(discordant, difference)
        shares = [(share - difference) / 2, (share + difference) / 2]
        drawn = rng.multinomial(n, [*shares, 1 - sum(shares)], size=TRIALS)[:, :2]
        hits = 0
        for a, b in drawn.tolist():
            if (a, b) not in known:
                known[a, b] = mcnemar(a, b) < level
            hits += b > a and known[a, b]
        return hits / TRIALS

    steps = np.arange(0.002, 0.2, 0.001)
    return float(next(step for step in steps if power(float(step)) >= 0.8))
