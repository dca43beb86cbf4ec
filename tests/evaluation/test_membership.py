"""Membership probe: the area under the curve with its interval, and a model that has seen its texts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from llm.checkpoint.folder import Checkpoint
from llm.common.errors import InputError
from llm.data.batches import batches_by_length, collate_pairs, example_batches
from llm.data.examples import Example
from llm.evaluation.base.membership import auc, membership, min_k, to_dict, to_markdown
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.training.fit import TrainingTask, fit
from llm.training.losses import mean_loss, next_token_loss
from tests.datasets import document
from tests.evaluation.models import make_folder
from tests.helpers import runtime_params, train_params

SEEN = [document(i, paragraphs=1)[:120] for i in range(24)]
UNSEEN = [document(1000 + i, paragraphs=1)[:120] for i in range(60)]


@pytest.fixture(scope="module")
def overfit() -> Checkpoint:
    """A model that was trained on SEEN alone, for many epochs."""
    tokenizer = Tokenizer.train(SEEN + UNSEEN, 280)
    folder = make_folder(tokenizer)
    model = folder.model
    assert isinstance(model, GPT)
    texts = [Example([tokenizer.eot, *tokenizer.encode(text)], 0, 0) for text in SEEN]
    task = TrainingTask(
        loss_function=next_token_loss,
        batches=example_batches(texts, collate_pairs, 8, 1, 0),
        val_batches=partial(batches_by_length, texts, collate_pairs, 8),
        evaluate=lambda batches: {"val/loss": mean_loss(model, next_token_loss, batches)},
    )
    params = train_params(max_steps=100, optimizer="muon", lr=0.01, muon_lr=0.02, eval_interval=100)
    fit(model, task, params, runtime_params())
    return folder._replace(model=model.eval())


def test_min_k_is_of_the_least_likely_tokens() -> None:
    nats = np.array([0.1, 5.0, 0.2, 3.0, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert min_k(nats, 0.2) == -4.0 and min_k(nats, 0.01) == -5.0 and min_k(nats, 1.0) == pytest.approx(-nats.mean())


def test_area_equals_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40).astype(float), rng.integers(0, 7, 25).astype(float)
    expected = roc_auc_score([1] * 40 + [0] * 25, np.concatenate((a, b)))
    assert auc(a, b).value == pytest.approx(expected) and auc(b, a).value == pytest.approx(1 - expected)
    assert auc(np.ones(9), np.zeros(30)) == (1.0, pytest.approx(1 - 3 / 9), 1.0)


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.5), (1.0, 0.7602), (2.0, 0.9214)])
def test_interval_covers_the_area(shift: float, truth: float) -> None:
    rng = np.random.default_rng(3)
    found = [auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 90)) for _ in range(600)]
    assert 0.93 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.97


def test_a_model_is_likelier_to_have_seen_its_training(overfit: Checkpoint) -> None:
    found = membership(overfit, SEEN, UNSEEN, 0.2, most=50, seed=0)
    assert (found.train, found.test, found.left_out) == (24, 50, 0)
    assert found.min_k.low > 0.5 and found.loss.low > 0.5
    text = "\n".join(to_markdown(found))
    assert "are likelier to the model than the held-out ones." in text and "least likely 20 % of the tokens" in text
    assert to_dict(found)["min_k"]["low"] == found.min_k.low


def test_a_model_that_saw_neither_side_does_not_tell_them_apart(overfit: Checkpoint) -> None:
    torch.manual_seed(0)
    found = membership(overfit, UNSEEN[:30], [*UNSEEN[30:], "short"], 0.2, most=50, seed=0)
    assert found.min_k.low < 0.5 < found.min_k.high and found.left_out == 1
    assert "no proof" in "\n".join(to_markdown(found))


def test_wrong_input(overfit: Checkpoint) -> None:
    with pytest.raises(InputError, match="min-k: 0 held-out texts have 10 tokens or more"):
        membership(overfit, SEEN, ["short"] * 50, 0.2, most=50, seed=0)
    classifier = make_folder(overfit.tokenizer, "classifier", ["a", "b"])
    with pytest.raises(InputError, match="expected base or instruct, got classifier"):
        membership(classifier, SEEN, UNSEEN, 0.2, most=50, seed=0)
