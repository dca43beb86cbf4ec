"""Your solutions of the exercises of chapter 5."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [N, V] and targets [N]."""
    raise NotImplementedError


def top_k(logits: Tensor, k: int) -> Tensor:
    """Return the logits [V] with all but the k largest at minus infinity."""
    raise NotImplementedError


def temperature_entropy(logits: Tensor, temperature: float) -> float:
    """Return the entropy in nats of the distribution that a temperature makes of logits [V]."""
    raise NotImplementedError
