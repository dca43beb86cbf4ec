"""Tiny models, batches and trainings of these tests."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.config import TrainParams
from llm.data.batches import IGNORE_INDEX, Batch
from llm.data.examples import Example
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.training.fit import FitResult, Objective, TrainingTask, fit, forward_backward
from llm.training.hooks import NoHooks
from llm.training.losses import mean_loss, next_token_loss
from tests.helpers import gpt_config, runtime_params


def random_batch(step: int, rows: int = 4, vocab_size: int = 61) -> Batch:
    windows = torch.randint(0, vocab_size, (rows, 9), generator=torch.Generator().manual_seed(step))
    return Batch(windows[:, :-1], windows[:, 1:], list(range(step * rows, (step + 1) * rows)))


def random_batches(step: int) -> list[Batch]:
    return [random_batch(step)]


def new_gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(gpt_config(**changes))


def new_classifier(**changes: Any) -> GPTClassifier:
    torch.manual_seed(0)
    return GPTClassifier(GPT(gpt_config(**changes)), 3)


class GivenHooks(NoHooks):
    """Hooks of which some are given: log, phase, should_stop, state_dir, stable_dir."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)


def train(
    model: nn.Module,
    params: TrainParams,
    *,
    loss: Any = next_token_loss,
    batches: Callable[[int], list[Batch]] = random_batches,
    val_batches: Callable[[], Iterable[Batch]] = lambda: [random_batch(1000), random_batch(1001, rows=3)],
    evaluate: Callable[[Iterable[Batch]], Mapping[str, float]] | None = None,
    sample: Callable[[], Iterable[str]] | None = None,
    title: str = "training",
    runtime: Any = None,
    **hooks: Any,
) -> FitResult:
    task = TrainingTask(
        loss_function=loss,
        batches=batches,
        val_batches=val_batches,
        evaluate=evaluate or (lambda batches: {"val/loss": mean_loss(model, loss, batches)}),
        sample=sample,
        title=title,
    )
    return fit(model, task, params, runtime or runtime_params(), GivenHooks(**hooks))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def plain_losses(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """-log softmax at each counted target, in float64, one position at a time."""
    logits = logits.double().flatten(0, -2)
    return [
        logits[i].logsumexp(0) - logits[i, target]
        for i, target in enumerate(targets.flatten().tolist())
        if target != IGNORE_INDEX
    ]


def ragged_examples() -> list[Example]:
    """Eight pairs with very different numbers of targets."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 0), (16, 12), (5, 1), (9, 0), (16, 2), (4, 2), (12, 10), (7, 5)]
    return [
        Example(torch.randint(0, 61, (length,), generator=generator).tolist(), counted, length % 3)
        for length, counted in shapes
    ]


def gradients_of_step(model: nn.Module, loss: Any, batches: list[Batch], grad_clip: float = 0.0) -> dict[str, Tensor]:
    """The gradients that a step uses; also that the loss and norm which it reports are theirs."""
    model = copy.deepcopy(model)
    _, norm = forward_backward(Objective(model, loss), batches, grad_clip, contextlib.nullcontext())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert total == pytest.approx(min(norm, grad_clip) if grad_clip else norm, rel=1e-5)
    return gradients
