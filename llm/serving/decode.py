"""One decode step of many requests, each with a KV cache of its own.

Linear layers multiply all rows at once. Attention runs row by row over each row's own cache. A row thus needs no
padding, and its attention never depends on the other rows.

Shapes: B requests, M rows of the products (B and dummy rows), C emb_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.inference.prefill import new_kv_cache
from llm.model.gpt import GPT, TransformerBlock
from llm.model.kv_cache import KVCache

TRIALS = 3  # random inputs of the check for row invariance


@torch.inference_mode()
def decode_rows(model: GPT, tokens: Sequence[int], caches: Sequence[KVCache], rows: int = 0) -> Tensor:
    """Return the logits [B, V] behind the next token of each cache [1 row]; the caches grow by it.

    With `rows` the products have that many rows, the rest of them dummies.
    """
    device = model.tok_emb.weight.device
    dummies = max(0, rows - len(caches))
    positions = torch.tensor([[cache.length] for cache in caches] + [[0]] * dummies, device=device)  # [M, 1]
    idx = torch.tensor([[token] for token in tokens] + [[0]] * dummies, device=device)  # [M, 1]
    angles = [model.cos_sin(kind, positions) for kind in model.kinds]
    x = model.embed(idx, positions)  # [M, 1, C]
    for block, kind in zip(model.blocks, model.kind_of_layer, strict=True):
        assert isinstance(block, TransformerBlock)
        window = model.kinds[kind].window
        q, k, v = block.project_qkv(x, angles[kind])  # [M, H, 1, D], 2 x [M, K, 1, D]
        y = [
            block.attn.attend(q[row, None], k[row, None], v[row, None], _window_mask(model, cache, window), cache)
            for row, cache in enumerate(caches)
        ]  # B x [1, 1, H * D]
        if dummies:
            y.append(y[0].new_zeros(dummies, 1, y[0].shape[-1]))
        x = block.finish(x, torch.cat(y))
    for cache in caches:
        cache.length += 1
    logits: Tensor = model.lm_head(model.final_norm(x)[:, 0])  # [M, V]
    return logits[: len(caches)]


def _window_mask(model: GPT, cache: KVCache, window: int | None) -> Tensor | None:
    """Return the mask [1, 1, 1, S] of a sliding window that is shorter than the cache; else None."""
    n_keys = cache.length + 1
    if window is None or n_keys <= window:
        return None
    return model.mask(torch.arange(n_keys - 1, n_keys, device=model.tok_emb.weight.device), n_keys, None, window)


def invariant_rows(model: GPT, most: int) -> list[int]:
    """Return numbers of rows, ascending, whose products give every row equal bits wherever it stands.

    Kernels sum in an order that depends on the number of rows, and some on the row too. This is tried out: powers of
    two up to the first that holds `most` rows, against the largest. With [1] alone, rows must be decoded one by one.
    """
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    largest = sizes[-1]
    equal = set(sizes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        tokens = torch.randint(model.config.vocab_size, (largest,), generator=generator).tolist()
        lengths = torch.randint(min(16, model.config.context_length), (largest,), generator=generator).tolist()
        caches = [_random_cache(model, length, generator) for length in lengths]
        expected = _decode(model, tokens, caches, list(range(largest)), largest)
        for size in sizes:
            for shift in (0, 1, size // 2 + 1):  # other neighbours, another row
                order = [(row * 5 + shift) % largest for row in range(size)] if largest > 1 else [0]
                if not torch.equal(_decode(model, tokens, caches, order, size), expected[order]):
                    equal.discard(size)
    return sorted(equal) if largest in equal else [1]


def _decode(model: GPT, tokens: list[int], caches: list[KVCache], order: list[int], rows: int) -> Tensor:
    """Return the logits of some of the rows, in that order; the caches stay as they are."""
    logits = decode_rows(model, [tokens[row] for row in order], [caches[row] for row in order], rows)
    for row in set(order):
        caches[row].length -= 1
    return logits


def _random_cache(model: GPT, length: int, generator: torch.Generator) -> KVCache:
    cache = new_kv_cache(model, 1, length + 1)
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    cache.length = length
    return cache
