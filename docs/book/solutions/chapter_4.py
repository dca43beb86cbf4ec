"""Solutions of chapter 4."""

from __future__ import annotations

from torch import Tensor


def count_block_parameters(emb_dim: int, ffn_dim: int) -> int:
    """Return the weights of one block in GPT-2's form, biases and norms included."""
    attention = 4 * (emb_dim * emb_dim + emb_dim)
    feed_forward = 2 * emb_dim * ffn_dim + ffn_dim + emb_dim
    return attention + feed_forward + 2 * 2 * emb_dim


def training_memory(parameters: int) -> int:
    """Return the bytes of weights, gradients and AdamW's two means, all in fp32."""
    return 4 * 4 * parameters


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return layernorm over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias
