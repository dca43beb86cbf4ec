"""Solutions of chapter 1."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """Return the perplexity that belongs to a mean loss in nats per token."""
    return math.exp(loss)


def uniform_loss(vocab_size: int) -> float:
    """Return the loss of a model that gives all tokens the same probability."""
    return math.log(vocab_size)


def bits_per_character(loss: float, n_tokens: int, n_characters: int) -> float:
    """Return a loss in nats per token as bits per character."""
    return loss / math.log(2) * n_tokens / n_characters
