"""Exact losses and their means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.data.batches import IGNORE_INDEX, batches_by_length, collate_labels, collate_pairs
from llm.data.examples import Example, pack
from llm.model.gpt import GPT
from llm.training.losses import label_loss, label_metrics, mean_loss, next_token_loss
from tests.helpers import FORMS, gpt_config, randomize
from tests.training.tiny import (
    new_classifier,
    new_gpt,
    plain_losses,
    ragged_examples,
    random_batch,
)


def test_next_token_loss_is_the_sum_over_counted_targets() -> None:
    model = randomize(new_gpt())
    assert isinstance(model, GPT)
    for batch in (random_batch(0), collate_pairs(ragged_examples(), range(8))):
        with torch.no_grad():
            loss, count = next_token_loss(model, batch)
            expected = plain_losses(model(batch.idx), batch.targets)
        assert count.item() == len(expected) == (batch.targets != IGNORE_INDEX).sum()
        assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-6)


def test_label_loss_with_class_weights_is_the_weighted_mean() -> None:
    classifier = new_classifier()
    randomize(classifier)
    batch = collate_labels(ragged_examples(), range(8))
    class_weights = torch.tensor([0.5, 2.0, 3.5])
    assert batch.lengths is not None
    with torch.no_grad():
        losses = plain_losses(classifier(batch.idx, batch.lengths), batch.targets)
        loss, count = label_loss(classifier, batch)
        weighted, weight = label_loss(classifier, batch, class_weights)
    assert count.item() == 8
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-6)
    w = class_weights[batch.targets].double()
    assert (weighted / weight).item() == pytest.approx(
        (w * torch.stack(losses)).sum().item() / w.sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_mean_loss_does_not_depend_on_how_examples_are_batched(batch_size: int) -> None:
    model, examples = randomize(new_gpt()), ragged_examples()
    assert isinstance(model, GPT)
    with torch.no_grad():
        alone = [collate_pairs(examples, [row]) for row in range(8)]
        losses = [loss for batch in alone for loss in plain_losses(model(batch.idx), batch.targets)]
        found = mean_loss(model, next_token_loss, batches_by_length(examples, collate_pairs, batch_size))
    assert found == pytest.approx(sum(losses).item() / len(losses), rel=1e-6)


def test_an_empty_validation_split_is_named() -> None:
    with pytest.raises(InputError, match="validation split is empty"):
        mean_loss(new_gpt(), next_token_loss, [])


def test_accuracy_counts_the_likeliest_labels() -> None:
    classifier, examples = new_classifier(), ragged_examples()
    randomize(classifier)
    with torch.no_grad():
        right = [
            classifier(torch.tensor([example.ids]), torch.tensor([len(example.ids)])).argmax().item() == example.label
            for example in examples
        ]
        found = label_metrics(classifier, batches_by_length(examples, collate_labels, 3))
        assert found["val/accuracy"] == sum(right) / 8
        loss = mean_loss(classifier, label_loss, batches_by_length(examples, collate_labels, 8))
        assert found["val/loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_packed_conversations_have_the_losses_and_gradients_of_single_ones(form: str) -> None:
    """Attention and positions are kept apart, in every form of the model."""
    model = GPT(gpt_config(**FORMS[form])).double()
    randomize(model)
    generator = torch.Generator().manual_seed(3)
    examples = [
        Example(torch.randint(0, 61, (n,), generator=generator).tolist(), start, 0, gaps)
        for n, start, gaps in ((5, 1, ()), (9, 2, ((4, 6),)), (4, 0, ()), (8, 3, ()), (3, 1, ()))
    ]
    packed = pack(examples, 16)
    assert len(packed) == 2

    def step(rows: list[Example]) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        loss, weight = next_token_loss(model, collate_pairs(rows, range(len(rows))))
        (loss / weight).backward()
        return (loss / weight).item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (loss, gradients), (expected, expected_gradients) = step(packed), step(examples)
    assert loss == pytest.approx(expected, abs=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
