"""Your solutions of the exercises of chapter 1."""

from __future__ import annotations


def perplexity(loss: float) -> float:
    """Return the perplexity that belongs to a mean loss in nats per token."""
    raise NotImplementedError


def uniform_loss(vocab_size: int) -> float:
    """Return the loss of a model that gives all tokens the same probability."""
    raise NotImplementedError


def bits_per_character(loss: float, n_tokens: int, n_characters: int) -> float:
    """Return a loss in nats per token as bits per character."""
    raise NotImplementedError
