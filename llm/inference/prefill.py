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
    """What a model has computed for the prompt that it read last; the next is read from where it differs.

    For calls one after another whose prompts begin alike, as in a chat with a system prompt.
    """

    tokens: list[int] = field(default_factory=list)
    keys: Tensor | None = None  # [layers, K, tokens, D]
    values: Tensor | None = None


def new_kv_cache(model: GPT, rows: int, capacity: int) -> KVCache:
    return KVCache(model.config, rows, capacity, model.tok_emb.weight.device, model.tok_emb.weight.dtype)


def prefill(
    model: GPT, contexts: Sequence[Sequence[int]], prefix: PrefixCache | None, capacity: int = 0
) -> tuple[Tensor, KVCache, list[int]]:
    """Reads prompts [B], aligned at their ends; the last hidden states [B, C], the cache, and each row's padding [B].

    What all of them have in common with the prefix is taken from there; then the first of them is the prefix.
    """
    width = max(map(len, contexts))
    pads = [width - len(context) for context in contexts]
    cache = new_kv_cache(model, len(contexts), max(width, capacity))
    if prefix is not None and prefix.keys is not None and prefix.values is not None:
        cache.length = min(common_prefix_length(prefix.tokens, context[:-1]) for context in contexts)
        for row, pad in enumerate(pads):
            part = slice(0, max(0, cache.length - pad))
            cache.write(row, pad, prefix.keys[:, :, part], prefix.values[:, :, part])
    padded = [[0] * pad + list(context) for pad, context in zip(pads, contexts, strict=True)]
    idx = torch.tensor(padded, device=model.tok_emb.weight.device)[:, cache.length :]  # [B, T]
    hidden = model.hidden_states(idx, cache, pad_tensor(pads, idx))[:, -1]  # [B, C]
    if prefix is not None:
        prefix.tokens = list(contexts[0])
        prefix.keys, prefix.values = (part.clone() for part in cache.slice(0, pads[0], width))
    return hidden, cache, pads


def common_prefix_length(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    different = (i for i, (token, other) in enumerate(zip(tokens, others, strict=False)) if token != other)
    return next(different, min(len(tokens), len(others)))


def pad_tensor(pads: Sequence[int], like: Tensor) -> Tensor | None:
    """As a model takes the padding of rows; without any it needs no mask."""
    return torch.tensor(pads, device=like.device) if any(pads) else None
