"""Your solutions of the exercises of chapter 6."""

from __future__ import annotations

from torch import Tensor


def last_real(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the hidden states [B, C] of the last real tokens of [B, T, C]."""
    raise NotImplementedError


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy."""
    raise NotImplementedError


def leaks(train: list[str], test: list[str]) -> int:
    """Return how many test texts equal a training text after lower case and without spaces."""
    raise NotImplementedError
