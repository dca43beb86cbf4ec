"""Solutions of chapter 3."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_weights(scores: Tensor) -> Tensor:
    """Return attention weights [..., T, T] of scores, none of a later token."""
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal attention of q, k, v [B, H, T, D]."""
    return causal_weights(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5) @ v


def cache_bytes(n_layers: int, n_kv_heads: int, head_dim: int, tokens: int, bytes_per_number: int) -> int:
    """Return the memory of the keys and values of a text."""
    return 2 * n_layers * n_kv_heads * head_dim * tokens * bytes_per_number
