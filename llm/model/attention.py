"""Causal attention in bf16 on CPUs, where PyTorch's own makes its products at the speed of fp32.

Scores exist for a few queries at a time, with the keys that those may see: half of the square is never computed. What
the softmax was is computed again for the gradients, so that nothing of the square is kept.

Shapes: N rows times heads, T tokens, D head_dim, n queries at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 64  # at a time


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query's mean of the values up to its own position, weighted by softmax(q k^T / sqrt(D)).

    Queries, values and what is returned are [B, H, T, D], keys and values [B, K, T, D] with H a multiple of K. The same
    as `F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)`, up to rounding.
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1).reshape(B * H, T, D) for x in (k, v))  # [N, T, D]
    y: Tensor = _CausalAttention.apply((q / math.sqrt(D)).reshape(B * H, T, D), k, v)
    return y.view(B, H, T, D)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)  # [N, T, D]
        for some, seen in _parts(q.shape[1]):
            y[:, some] = _weights(q, k, some, seen) @ v[:, seen]
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad.float() * y.float()).sum(-1, keepdim=True)  # [N, T, 1] of the weights' gradients, by the weights
        for some, seen in _parts(q.shape[1]):
            weights = _weights(q, k, some, seen)  # [N, n, S]
            dv[:, seen].baddbmm_(weights.mT, grad[:, some])
            dscores = (grad[:, some] @ v[:, seen].mT).sub_(mean[:, some]).mul_(weights)  # [N, n, S]
            dq[:, some] = dscores @ k[:, seen]
            dk[:, seen].baddbmm_(dscores.mT, q[:, some])
        return dq, dk, dv


def _parts(tokens: int) -> list[tuple[slice, slice]]:
    """Some queries, and the keys that the last of them may see."""
    ends = [min(start + QUERIES, tokens) for start in range(0, tokens, QUERIES)]
    return [(slice(start, end), slice(end)) for start, end in zip(range(0, tokens, QUERIES), ends, strict=True)]


def _weights(q: Tensor, k: Tensor, some: slice, seen: slice) -> Tensor:
    """Softmax of the scores of some queries [N, n, D] with the keys that they may see [N, S, D]: [N, n, S]."""
    n = some.stop - some.start
    scores = q[:, some] @ k[:, seen].mT  # [N, n, S]
    scores[:, :, some] += torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return scores.softmax(-1)
