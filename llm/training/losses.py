"""Losses of the three trainings, and their exact means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.common import distributed
from llm.common.errors import InputError
from llm.data.batches import IGNORE_INDEX, Batch
from llm.data.shards import TokenShards
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT
from llm.model.loss import linear_cross_entropy

# A loss function returns the sum of the losses in nats and the weight that it sums to (the number of counted targets).
LossFunction = Callable[[Any, Batch], tuple[Tensor, Tensor]]


def next_token_loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross entropy over the counted targets. Ignored positions never reach the output layer."""
    targets = batch.targets.flatten()  # [B*T]
    counted = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # [N]
    hidden = model.hidden_states(
        batch.idx, cached_hidden=batch.cached_hidden, start_layer=batch.start_layer, segments=batch.segments
    )
    hidden = hidden.flatten(0, 1)  # [B*T, C]
    if len(counted) < len(targets):
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)  # [N, C], [N]
    return linear_cross_entropy(hidden, model.lm_head.weight, targets), torch.tensor(float(len(counted)))


def label_loss(model: GPTClassifier, batch: Batch, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of the labels, each weighted by its class."""
    logits = model(batch.idx, batch.lengths, batch.cached_hidden, batch.start_layer)  # [B, labels]
    return weighted_cross_entropy(logits, batch.targets, class_weights)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits.float(), labels, weight=class_weights, reduction="sum")
    weight = class_weights[labels].sum() if class_weights is not None else torch.tensor(float(len(logits)))
    return loss, weight


def mean_loss(model: nn.Module, loss_function: LossFunction, batches: Iterable[Batch]) -> float:
    """Return the exact mean in nats over all counted targets of all batches. Each rank computes some of them."""
    device = next(model.parameters()).device
    loss, weight = all_reduce_sums(2, (loss_function(model, batch.to(device)) for batch in batches_of_rank(batches)))
    return loss / weight


def lm_metrics(model: GPT, tokens: TokenShards, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean loss over windows of `tokens`, also in bits per byte of their text."""
    loss = mean_loss(model, next_token_loss, batches)
    return {"val/loss": loss, "val/bpb": tokens.bpb(loss)}


def label_metrics(
    model: GPTClassifier, batches: Iterable[Batch], class_weights: Tensor | None = None
) -> dict[str, float]:
    """Return the exact mean loss and the accuracy."""
    device = next(model.parameters()).device

    def sums(batch: Batch) -> tuple[Tensor, ...]:
        logits = model(batch.idx, batch.lengths, batch.cached_hidden, batch.start_layer)  # [B, labels]
        correct = (logits.argmax(dim=-1) == batch.targets).sum()
        return *weighted_cross_entropy(logits, batch.targets, class_weights), correct, torch.tensor(len(logits))

    loss, weight, correct, rows = all_reduce_sums(4, (sums(batch.to(device)) for batch in batches_of_rank(batches)))
    return {"val/loss": loss / weight, "val/accuracy": correct / rows}


def batches_of_rank(batches: Iterable[Batch]) -> Iterable[Batch]:
    return islice(batches, distributed.rank(), None, distributed.world_size())


def all_reduce_sums(n: int, sums: Iterable[tuple[Tensor, ...]]) -> list[float]:
    """Return `n` sums over all batches of all ranks. The second one is a weight and must not be zero."""
    totals = torch.zeros(n, dtype=torch.float64)
    for values in sums:
        totals += torch.tensor([value.item() for value in values], dtype=torch.float64)
    totals = distributed.all_reduce(totals)
    if not totals[1]:
        raise InputError("there is nothing to evaluate on: the validation split is empty; give more data to tokenize")
    found: list[float] = totals.tolist()
    return found
