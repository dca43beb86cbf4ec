"""Solutions of chapter 6."""

from __future__ import annotations

import torch
from torch import Tensor


def last_real(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the hidden states [B, C] of the last real tokens of [B, T, C]."""
    return hidden[torch.arange(len(hidden)), lengths - 1]


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy."""
    z, p = 1.959964, correct / total
    middle = p + z * z / (2 * total)
    half = z * (p * (1 - p) / total + z * z / (4 * total**2)) ** 0.5
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def leaks(train: list[str], test: list[str]) -> int:
    """Return how many test texts equal a training text after lower case and without spaces."""
    keys = {"".join(text.lower().split()) for text in train}
    return sum("".join(text.lower().split()) in keys for text in test)
