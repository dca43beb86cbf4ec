"""Solutions of appendix E."""

from __future__ import annotations

from torch import Tensor


def lora_parameters(out_features: int, in_features: int, rank: int) -> int:
    """Return the numbers of an adapter."""
    return rank * (out_features + in_features)


def merge(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return the merged matrix; the rank is in the shape of `a`."""
    return weight + alpha / a.shape[0] * b @ a


def is_mergeable(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Tell whether the shapes of an adapter fit a matrix."""
    return a.shape[0] == b.shape[1] and tuple(weight.shape) == (b.shape[0], a.shape[1])
