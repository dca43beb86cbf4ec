"""Temperature and decision of a classifier, from its val part."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from llm.checkpoint.folder import CheckpointConfig
from llm.common.errors import InputError
from llm.config import ClassifyParams, DecisionParams
from llm.training.calibration import (
    calibrated,
    cheapest_threshold,
    choose_decision,
    fit_temperature,
    precise_threshold,
)
from tests.helpers import gpt_config
from tests.test_architecture import shipped_params


def rule(**changes: object) -> DecisionParams:
    values = {"rule": "none", "label": None, "false_alarm_cost": 1.0, "miss_cost": 1.0, "precision": 0.9}
    return DecisionParams.model_validate(values | changes)


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_temperature_of_sampled_labels_is_found(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / true).softmax(dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(true, rel=0.1)


def test_temperature_stays_sane_without_a_mistake() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]] * 20, dtype=torch.float64)
    labels = torch.tensor([0, 1] * 20)
    temperature = fit_temperature(logits, labels)
    assert 0.2 < temperature < 1
    assert (logits / temperature).softmax(dim=1).max() < 0.995


SCORES = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
HITS = np.array([0, 0, 1, 0, 1, 0, 1, 1], dtype=bool)


@pytest.mark.parametrize(("false_alarm", "miss"), [(1.0, 1.0), (5.0, 1.0), (1.0, 9.0), (100.0, 1.0)])
def test_no_threshold_costs_less(false_alarm: float, miss: float) -> None:
    def cost(threshold: float) -> float:
        said = threshold <= SCORES
        return false_alarm * (said & ~HITS).sum() + miss * (~said & HITS).sum()

    found = cheapest_threshold(SCORES, HITS, false_alarm, miss)
    assert cost(found) == min(cost(t) for t in np.linspace(0, 1, 101))


def test_equally_cheap_thresholds_give_the_one_of_perfect_probabilities() -> None:
    scores, hits = np.array([0.01, 0.99]), np.array([False, True])
    assert cheapest_threshold(scores, hits, 9.0, 1.0) == pytest.approx(0.9)
    assert cheapest_threshold(scores, hits, 1.0, 1.0) == pytest.approx(0.5)


def test_precision_keeps_as_many_as_it_can(caplog: pytest.LogCaptureFixture) -> None:
    threshold = precise_threshold(SCORES, HITS, 0.75)
    said = threshold <= SCORES
    assert HITS[said].mean() >= 0.75 and said.sum() == 4
    assert (precise_threshold(SCORES, HITS, 1.0) <= SCORES).sum() == 2
    with caplog.at_level(logging.WARNING, logger="llm"):
        threshold = precise_threshold(SCORES, ~HITS, 0.99)
    assert (~HITS)[threshold <= SCORES].mean() == pytest.approx(0.5)
    assert "no threshold reaches 0.99 on val (expected at most 0.5)" in caplog.text


def test_decision_names_its_label() -> None:
    probabilities = np.column_stack((1 - SCORES, SCORES))
    assert choose_decision(probabilities, HITS.astype(int), ["ham", "spam"], rule()) is None
    found = choose_decision(probabilities, HITS.astype(int), ["ham", "spam"], rule(rule="cost"))
    assert found is not None and found.label == "spam"
    found = choose_decision(probabilities, HITS.astype(int), ["ham", "spam"], rule(rule="precision", label="ham"))
    assert found is not None and found.label == "ham" and math.isclose(found.threshold, 0.75)
    with pytest.raises(InputError, match="label: no label 'eggs'"):
        choose_decision(probabilities, HITS.astype(int), ["ham", "spam"], rule(rule="cost", label="eggs"))


def test_shipped_params_store_a_temperature_alone() -> None:
    values = shipped_params()
    params = ClassifyParams.model_validate(values["training"] | values["finetune_classify"])
    config = CheckpointConfig(kind="classifier", gpt=gpt_config(), labels=["a", "b"], max_length=8)
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]], dtype=torch.float64)
    found = calibrated(config, logits, torch.tensor([0, 1, 1]), params)
    assert found.temperature is not None and found.temperature > 1
    assert found.model_copy(update={"temperature": None}) == config
    assert calibrated(config, logits, torch.tensor([0, 1, 1]), params.model_copy(update={"calibrate": False})) == config
