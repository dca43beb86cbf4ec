"""One decode step of many requests, each with a KV cache of its own.

Linear layers multiply all rows at once. Each row attends to its own cache, by a kernel of our own where it is loaded. A
row thus needs no padding, and its attention never depends on the other rows.

Shapes: B requests, M rows of the products (B and dummy rows), C emb_dim, V vocab_size, H n_heads, K n_kv_heads,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm.inference.kernels.build import kernels_loaded
from llm.inference.prefill import new_kv_cache
from llm.model.gpt import GPT, CausalSelfAttention, TransformerBlock
from llm.model.kv_cache import KVCache

TRIALS = 3  # random inputs of the check for row invariance
Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # from idx and positions [M, 1] and a table [B, 6] to logits [M, V]
Attend = Callable[[CausalSelfAttention, Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def decode_rows(
    model: GPT, tokens: Sequence[int], caches: Sequence[KVCache], rows: int = 0, step: Step | None = None
) -> Tensor:
    """Return the logits [B, V] behind the next token of each cache [1 row]; the caches grow by it.

    With `rows` the products have that many rows, the rest of them dummies. `step` computes the same, compiled.
    """
    device = model.tok_emb.weight.device
    dummies = max(0, rows - len(caches))
    positions = torch.tensor([[cache.length] for cache in caches] + [[0]] * dummies, device=device)  # [M, 1]
    idx = torch.tensor([[token] for token in tokens] + [[0]] * dummies, device=device)  # [M, 1]
    if step is not None:
        logits = step(idx, positions, cache_table(caches))
    else:
        logits = _decode(model, idx, positions, caches)
    for cache in caches:
        cache.length += 1
    return logits[: len(caches)]


def _decode(model: GPT, idx: Tensor, positions: Tensor, caches: Sequence[KVCache]) -> Tensor:
    angles = [model.cos_sin(kind, positions) for kind in model.kinds]
    attend = _by_kernel(model, caches) if has_row_kernels(model) else _one_by_one(model, caches)
    x = model.embed(idx, positions)  # [M, 1, C]
    for block, kind in zip(model.blocks, model.kind_of_layer, strict=True):
        assert isinstance(block, TransformerBlock)
        x = block.finish(x, attend(block.attn, *block.project_qkv(x, angles[kind])))
    logits: Tensor = model.lm_head(model.final_norm(x)[:, 0])  # [M, V]
    return logits


# ---- attention: from q [M, H, 1, D], k and v [M, K, 1, D] to [M, 1, H * D], zero for dummies; k and v go to the caches


def has_row_kernels(model: GPT) -> bool:
    """Tell whether the kernels are loaded, and fit the model."""
    weight = model.tok_emb.weight
    return kernels_loaded() and weight.device.type == "cpu" and weight.dtype == torch.float32


def cache_table(caches: Sequence[KVCache]) -> Tensor:
    """Return where the kernel finds each cache [1 row], [B, 6]: see `Row` in kernels/attention.cpp."""
    return torch.tensor([_place(cache, 0, 0) for cache in caches])


def shared_cache_table(cache: KVCache, pads: Sequence[int]) -> Tensor:
    """Return the same of the first rows of a cache, whose left padding is given."""
    return torch.tensor([_place(cache, row, pad) for row, pad in enumerate(pads)])


def next_tokens_table(cache: KVCache, tokens: int, pad: int) -> Tensor:
    """Return the same of the next tokens of a cache's first row, each of them a row of the products."""
    return torch.tensor([_place(cache, 0, pad, ahead) for ahead in range(tokens)])


def _place(cache: KVCache, row: int, begin: int, ahead: int = 0) -> list[int]:
    end = cache.length + ahead
    if end >= cache.max_length:  # the kernel would write behind it
        raise ValueError(f"the cache holds {cache.max_length} tokens, {end + 1} were asked for")
    if not cache.int8 and cache.keys.dtype != torch.float32:
        raise ValueError(f"the kernel for attention takes a cache in fp32 or of 8 bits, not {cache.keys.dtype}")
    keys, values = cache.keys[0, row], cache.values[0, row]
    layer_stride, _, head_stride, *_ = (stride * keys.element_size() for stride in cache.keys.stride())
    return [keys.data_ptr(), values.data_ptr(), layer_stride, head_stride, begin, end]


def layer_windows(model: GPT) -> Tensor:
    """Return how many tokens each layer sees, or 0, [layers]."""
    return torch.tensor([model.kinds[kind].window or 0 for kind in model.kind_of_layer])


def attend_rows(q: Tensor, k: Tensor, v: Tensor, table: Tensor, windows: Tensor, layer: Tensor, int8: bool) -> Tensor:
    """Attend from all rows of a layer [] at once, with caches of 8 bits or in fp32."""
    q, k, v = (part.squeeze(2).contiguous() for part in (q, k, v))  # [M, H, D], 2 x [M, K, D]
    y: Tensor = torch.ops.textmill.attend_rows(q, k, v, table, windows, layer, int8)
    return y[:, None]


def _by_kernel(model: GPT, caches: Sequence[KVCache]) -> Attend:
    table, windows = cache_table(caches), layer_windows(model)
    layers = torch.arange(len(windows))
    return lambda attn, q, k, v: attend_rows(q, k, v, table, windows, layers[attn.layer], model.int8_cache)


def _one_by_one(model: GPT, caches: Sequence[KVCache]) -> Attend:
    """Attend by PyTorch, row by row."""

    def attend(attn: CausalSelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = model.kinds[model.kind_of_layer[attn.layer]].window
        y = q.new_zeros(q.shape[0], 1, q.shape[1] * q.shape[3])
        for row, cache in enumerate(caches):
            own = slice(row, row + 1)
            y[own] = attn.attend(q[own], k[own], v[own], _window_mask(model, cache, window), cache)
        return y

    return attend


def _window_mask(model: GPT, cache: KVCache, window: int | None) -> Tensor | None:
    """Return the mask [1, 1, 1, S] of a sliding window that is shorter than the cache; else None."""
    n_keys = cache.length + 1
    if window is None or n_keys <= window:
        return None
    return model.mask(torch.arange(n_keys - 1, n_keys, device=model.tok_emb.weight.device), n_keys, None, window)


# ---- equal bits whatever runs beside a row ---------------------------------------------------------------------------


def invariant_rows(model: GPT, most: int, step: Step | None = None) -> list[int]:
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
        expected = _logits(model, tokens, caches, list(range(largest)), largest, step)
        for size in sizes:
            for shift in (0, 1, size // 2 + 1):  # other neighbours, another row
                order = [(row * 5 + shift) % largest for row in range(size)] if largest > 1 else [0]
                if not torch.equal(_logits(model, tokens, caches, order, size, step), expected[order]):
                    equal.discard(size)
    return sorted(equal) if largest in equal else [1]


def _logits(
    model: GPT, tokens: list[int], caches: list[KVCache], order: list[int], rows: int, step: Step | None
) -> Tensor:
    """Return the logits of some of the rows, in that order; the caches stay as they are."""
    logits = decode_rows(model, [tokens[row] for row in order], [caches[row] for row in order], rows, step)
    for row in set(order):
        caches[row].length -= 1
    return logits


def _random_cache(model: GPT, length: int, generator: torch.Generator) -> KVCache:
    cache = new_kv_cache(model, 1, length + 1)
    for part in (cache.keys, cache.values):
        part.copy_(cache.encode(torch.randn(*part.shape[:-1], cache.head_dim, generator=generator)))
    cache.length = length
    return cache
