"""A model's layers over a text, one by one: residual streams and attention.

Shapes: T tokens, C emb_dim, H n_heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm.model.gpt import GPT, TransformerBlock


class Layer(NamedTuple):
    """Residual stream [T, C] after a block, and the attention [H, T, T] of its heads."""

    stream: Tensor
    attention: Tensor


@torch.inference_mode()
def run_layers(gpt: GPT, ids: Sequence[int]) -> Iterator[Layer]:
    """Yield the embedding, without attention, and then each block."""
    idx = torch.tensor([ids], device=gpt.tok_emb.weight.device)  # [1, T]
    positions = torch.arange(len(ids), device=idx.device)
    inputs = [(gpt.cos_sin(kind, positions), gpt.mask(positions, len(ids), None, kind.window)) for kind in gpt.kinds]
    x = gpt.embed(idx, positions)
    yield Layer(x[0], torch.empty(0))
    for number, block in enumerate(gpt.blocks):
        assert isinstance(block, TransformerBlock)
        cos_sin, mask = inputs[gpt.kind_of_layer[number]]
        q, k, v = block.project_qkv(x, cos_sin)
        keys = k[0].repeat_interleave(q.shape[1] // k.shape[1], dim=0)  # [H, T, D]: a group of queries shares one
        scores = q[0].float() @ keys.float().mT / math.sqrt(q.shape[-1])  # [H, T, T]
        x = block.finish(x, block.attn.attend(q, k, v, mask, None))
        yield Layer(x[0], scores.masked_fill(~mask[0, 0], -torch.inf).softmax(-1))
