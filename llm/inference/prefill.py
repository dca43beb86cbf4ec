"""Prefill of prompts, and the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache


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
