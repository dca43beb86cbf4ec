"""Solutions of chapter 5."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [N, V] and targets [N]."""
    return (logits.logsumexp(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)).mean()


def top_k(logits: Tensor, k: int) -> Tensor:
    """Return the logits [V] with all but the k largest at minus infinity."""
    kept = logits.topk(k)
    return torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)


def temperature_entropy(logits: Tensor, temperature: float) -> float:
    """Return the entropy in nats of the distribution that a temperature makes of logits [V]."""
    log_probabilities = (logits / temperature).log_softmax(-1)
    return float(-(log_probabilities.exp() * log_probabilities).sum())
