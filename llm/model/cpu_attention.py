"""Causal attention in bf16 on CPUs, where PyTorch's own multiplies at the speed of fp32.

Scores are computed for a block of queries at a time, against the keys up to its last query: half of the score matrix is
never computed. The backward pass recomputes the softmax, so that no score is stored.

Shapes: N batch times heads, T tokens, D head_dim, n queries of a block, S keys up to its end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SIZE = 64  # queries


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v with a causal mask, [B, H, T, D].

    Queries are [B, H, T, D], keys and values [B, K, T, D] with H a multiple of K. Equals
    `F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)` up to rounding.
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1).reshape(B * H, T, D) for x in (k, v))  # [N, T, D]
    y: Tensor = _CausalAttention.apply((q / math.sqrt(D)).reshape(B * H, T, D), k, v)
    return y.view(B, H, T, D)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)  # [N, T, D]
        for block, seen in _query_blocks(q.shape[1]):
            y[:, block] = _attention_weights(q, k, block, seen) @ v[:, seen]
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad.float() * y.float()).sum(-1, keepdim=True)  # [N, T, 1], of the weights' gradients
        for block, seen in _query_blocks(q.shape[1]):
            weights = _attention_weights(q, k, block, seen)  # [N, n, S]
            dv[:, seen].baddbmm_(weights.mT, grad[:, block])
            dscores = (grad[:, block] @ v[:, seen].mT).sub_(mean[:, block]).mul_(weights)  # [N, n, S]
            dq[:, block] = dscores @ k[:, seen]
            dk[:, seen].baddbmm_(dscores.mT, q[:, block])
        return dq, dk, dv


def _query_blocks(tokens: int) -> list[tuple[slice, slice]]:
    """Return the blocks of queries, each with the keys up to its end."""
    starts = range(0, tokens, BLOCK_SIZE)
    ends = [min(start + BLOCK_SIZE, tokens) for start in starts]
    return [(slice(start, end), slice(end)) for start, end in zip(starts, ends, strict=True)]


def _attention_weights(q: Tensor, k: Tensor, block: slice, seen: slice) -> Tensor:
    """Return the softmax [N, n, S] of the causal scores of a block of queries."""
    n = block.stop - block.start
    scores = q[:, block] @ k[:, seen].mT  # [N, n, S]
    scores[:, :, block] += torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return scores.softmax(-1)
