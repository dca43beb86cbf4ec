"""Prefill of prompts, and the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model.gpt import GPT, CausalSelfAttention
from llm.model.kv_cache import KVCache
from llm.model.linear import Linear


@dataclass
class PrefixCache:
    """Keys and values of the previous prompt: the next prompt is read from its first different token.

    For prompts one after another with a common beginning, such as a chat with a system prompt.
    """

    tokens: list[int] = field(default_factory=list)
    keys: Tensor | None = None  # [layers, K, tokens, E], as they are stored
    values: Tensor | None = None


def new_kv_cache(model: GPT, rows: int, capacity: int) -> KVCache:
    weight = model.tok_emb.weight
    return KVCache(model.config, rows, capacity, weight.device, weight.dtype, model.int8_cache)


def use_prompt_kernels(model: GPT) -> None:
    """Let a model read prompts faster on a CPU in fp32, equal up to rounding. Needs `load_kernels`.

    Attention is by a kernel of our own. Layers with plain weights multiply by oneDNN, which on some processors is
    twice as fast as the BLAS (see `llm.model.linear`).
    """
    for part in model.modules():
        if isinstance(part, CausalSelfAttention):
            part.prompt_kernel = _attend_prompt
        elif isinstance(part, Linear):
            part.prefers_onednn = True


def _attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.dtype != torch.float32 or q.device.type != "cpu":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    causal = torch.empty(0, dtype=torch.bool)
    output: Tensor = torch.ops.textmill.attend_prompt(q, k, v, causal if mask is None else mask.contiguous())
    return output


def prefill(
    model: GPT, contexts: Sequence[Sequence[int]], prefix: PrefixCache | None, capacity: int = 0
) -> tuple[Tensor, KVCache, list[int]]:
    """Read left-padded prompts [B]; return their last hidden states [B, C], the KV cache and the padding [B].

    The prefix that all prompts share with the prefix cache comes from there. The first prompt then replaces it.
    """
    width = max(map(len, contexts))
    pads = [width - len(context) for context in contexts]
    cache = new_kv_cache(model, len(contexts), max(width, capacity))
    if prefix is not None and prefix.keys is not None and prefix.values is not None:
        cache.length = min(common_prefix_length(prefix.tokens, context[:-1]) for context in contexts)
        for row, pad in enumerate(pads):
            shared = slice(0, max(0, cache.length - pad))
            cache.write(row, pad, prefix.keys[:, :, shared], prefix.values[:, :, shared])
    padded = [[0] * pad + list(context) for pad, context in zip(pads, contexts, strict=True)]
    idx = torch.tensor(padded, device=model.tok_emb.weight.device)[:, cache.length :]  # [B, T]
    hidden = model.hidden_states(idx, cache, pad_tensor(pads, idx))[:, -1]  # [B, C]
    if prefix is not None:
        keys, values = (part.clone() for part in cache.slice(0, pads[0], width))
        prefix.tokens, prefix.keys, prefix.values = list(contexts[0]), keys, values  # together, also where Ctrl-C comes
    return hidden, cache, pads


def common_prefix_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of tokens that two sequences begin with in common."""
    different = (i for i, (token, other) in enumerate(zip(tokens, others, strict=False)) if token != other)
    return next(different, min(len(tokens), len(others)))


def pad_tensor(pads: Sequence[int], like: Tensor) -> Tensor | None:
    """Return the padding [B] for a model, or None where there is none, so that it needs no mask."""
    return torch.tensor(pads, device=like.device) if any(pads) else None
