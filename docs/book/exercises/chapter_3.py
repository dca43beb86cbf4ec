"""Your solutions of the exercises of chapter 3."""

from __future__ import annotations

from torch import Tensor


def causal_weights(scores: Tensor) -> Tensor:
    """Return attention weights [..., T, T] of scores, none of a later token."""
    raise NotImplementedError


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal attention of q, k, v [B, H, T, D]."""
    raise NotImplementedError


def cache_bytes(n_layers: int, n_kv_heads: int, head_dim: int, tokens: int, bytes_per_number: int) -> int:
    """Return the memory of the keys and values of a text."""
    raise NotImplementedError
