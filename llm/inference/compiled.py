"""Compiled decoding: by PyTorch's compiler on a CPU, also of several rows; as a CUDA graph on a GPU.

Shapes: M rows, S tokens in the cache with the new one, H n_heads, K n_kv_heads, G = H / K, D head_dim, V vocab_size;
E numbers of a stored key or value (see `KVCache`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.func import functional_call

from llm.config import GPTConfig
from llm.inference.aot import compile_ahead
from llm.inference.prefill import new_kv_cache
from llm.inference.request import eval_mode
from llm.inference.rows import (
    attend_rows,
    cache_table,
    has_row_kernels,
    layer_windows,
    next_tokens_table,
    shared_cache_table,
)
from llm.model.gpt import GPT, TransformerBlock
from llm.model.kv_cache import KVCache, round_to_int8

FEW_TOKENS = 16  # next tokens of a row, as speculative decoding verifies, up to which all are computed as rows


class CompiledDecoder:
    """A GPT with a compiled decode step, which `generate` and `stream` take in place of the GPT.

    The next token of a row is computed in one call, on a CPU with `load_kernels` those of a batch too, and a few tokens
    of a row that a draft proposed: equal up to rounding, and much faster. Prefill runs the model itself. Compiling
    takes up to half a minute on a CPU; the code is kept for the next start (`compile_ahead`). For several rows or
    tokens it is compiled when they first come. On a CUDA device a graph is captured for each KV cache. The model must
    then keep its layers, their dtype and their device, as nothing checks for changes. Raises `InputError` where the
    model cannot be compiled.
    """

    def __init__(self, gpt: GPT) -> None:
        self.gpt = gpt
        on_cpu = _KernelStep if has_row_kernels(gpt) else _CompiledStep
        self._decode: Any = (_CudaGraphStep if gpt.tok_emb.weight.device.type == "cuda" else on_cpu)(gpt)
        self._decode_rows: CompiledRows | None = None  # compiled for the first batch

    def __call__(self, idx: Tensor, cache: KVCache | None = None, pad: Tensor | None = None) -> Tensor:
        """Return the logits [B, T, V], as `GPT.forward` does."""
        B, T = idx.shape
        room = 0 if cache is None else min(cache.max_length, self.gpt.config.context_length)
        # The compiler takes a length of 1 for a constant. Too many tokens are an error that the model raises.
        fits = cache is not None and 1 <= cache.length <= room - T and cache.int8 == self.gpt.int8_cache
        if torch.is_grad_enabled() or cache is None or not fits:
            return self.gpt(idx, cache, pad)
        if B > 1 or T > 1:
            return self._decode_several(idx, cache, pad)
        whole = cache.length + 1 == cache.max_length  # has other strides than its first tokens: refused
        if whole and isinstance(self._decode, _CompiledStep):
            return self.gpt(idx, cache, pad)
        logits = self._decode(idx, cache, idx.new_zeros(1) if pad is None else pad)
        cache.length += 1
        return logits

    def _decode_several(self, idx: Tensor, cache: KVCache, pad: Tensor | None) -> Tensor:
        """Return the logits of the next token of each row, [B, 1, V], or of a few next tokens of one, [1, T, V]."""
        B, T = idx.shape
        if not _has_fast_rows(self.gpt) or (B > 1 and T > 1) or T > FEW_TOKENS:
            return self.gpt(idx, cache, pad)
        if self._decode_rows is None:
            self._decode_rows = CompiledRows(self.gpt, self._decode.weights)
        pads = idx.new_zeros(B) if pad is None else pad
        positions = cache.length + torch.arange(T) - pads[:, None]  # [B, T], of which one is 1
        table = shared_cache_table(cache, pads.tolist()) if T == 1 else next_tokens_table(cache, T, int(pads[0]))
        logits = self._decode_rows(idx.view(-1, 1), positions.view(-1, 1), table)
        cache.length += T
        return logits.view(B, T, -1)


def _has_fast_rows(model: GPT) -> bool:
    """Tell whether a compiled step of several rows is faster than the model: not with plain weights.

    Compiled code multiplies these by the BLAS, the model by oneDNN (see `llm.model.linear`).
    """
    first = model.blocks[0]
    assert isinstance(first, TransformerBlock)
    return has_row_kernels(model) and not isinstance(first.attn.out_proj, nn.Linear)


# ---- CPU: one compiled loop over the blocks --------------------------------------------------------------------------


class _Step:
    """A decode step as compiled code, which is given the model's weights with each call."""

    def __init__(
        self,
        model: GPT,
        step: partial[Tensor],
        weights: dict[str, Tensor],
        inputs: list[Tensor],
        dynamic: list[dict[int, str]],
    ) -> None:
        """Compile `step(model, weights of all blocks, *inputs)`, whose inputs have dynamic dimensions by name."""
        own = {name: part for name, part in _parameters_and_buffers(model).items() if not name.startswith("blocks.")}
        self.weights_of_blocks = weights
        self.weights = [*own.values(), *weights.values()]

        def run(tensors: list[Tensor]) -> Tensor:
            given = iter(tensors)
            own_now = {f"model.{name}": next(given) for name in own}
            weights_now = {name: next(given) for name in weights}
            result: Tensor = functional_call(_WithModel(model, step), own_now, (weights_now, *given))
            return result

        about = f"{step.func.__name__} {model.config.model_dump_json()} {model.int8_cache} {list(own)} {list(weights)}"
        with torch.inference_mode(), eval_mode(model):
            for kind in model.kinds:  # rotary_frequencies caches its result, which in tracing would have no values
                model.cos_sin(kind, torch.zeros(1, dtype=torch.long))
        with eval_mode(model):
            unchanging: list[dict[int, str]] = [{} for _ in self.weights]
            self.code = compile_ahead(run, [*self.weights, *inputs], [*unchanging, *dynamic], about)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.code([*self.weights, *inputs])


class _WithModel(nn.Module):
    """A step and its model, whose weights `functional_call` may replace."""

    def __init__(self, model: GPT, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, *inputs: Any) -> Tensor:
        return self.step(self.model, *inputs)


def _parameters_and_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return them by name, a shared one once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


class _CompiledStep:
    """The decode step of a single row, from the next token [1, 1] to logits [1, 1, V], as one compiled function."""

    def __init__(self, model: GPT) -> None:
        first = model.blocks[0]
        assert isinstance(first, TransformerBlock)
        self.weights = _stack_weights(model.blocks)
        self.places = torch.arange(model.config.context_length)
        # The compiler takes sizes and strides that are equal by chance for the same. It refuses inputs that share their
        # memory, as the parts of an int8 cache do.
        rows, tokens, max_length, *_ = _primes_apart(model.config)
        stored = _stored_parts(new_kv_cache(model, rows, max_length))
        parts = [torch.empty_strided(part.shape, part.stride(), dtype=part.dtype) for part in stored]
        idx = torch.zeros(1, 1, dtype=torch.long)
        dynamic = [{}, {}, {0: "tokens"}, *({1: "rows", 3: "max_length"} for _ in parts)]
        step = partial(_decode_one_token, _DecodeBlock(first))
        self.step = _Step(model, step, self.weights, [idx, idx.new_zeros(1), torch.arange(tokens), *parts], dynamic)

    def __call__(self, idx: Tensor, cache: KVCache, pad: Tensor) -> Tensor:
        return self.step(idx, pad, self.places[: cache.length + 1], *_stored_parts(cache))


class _KernelStep:
    """The decode step with the kernel for attention, which is faster than compiled sums the longer the cache is."""

    def __init__(self, model: GPT) -> None:
        self.step = _compile_rows(model, torch.zeros(1, 1, dtype=torch.long), 1, [{}, {}, {}])
        self.weights = self.step.weights_of_blocks

    def __call__(self, idx: Tensor, cache: KVCache, pad: Tensor) -> Tensor:
        table = shared_cache_table(cache, pad.tolist())
        return self.step(idx, (cache.length - pad)[None], table)[:, None]


class CompiledRows:
    """The decode step of several rows with a KV cache each, for `decode_rows`, as one compiled function.

    The kernels must be loaded and fit the model. Raises `InputError` where it cannot be compiled.
    """

    def __init__(self, model: GPT, weights: dict[str, Tensor] | None = None) -> None:
        """Compile the step; `weights` are the blocks' where another step has stacked them, so that both share them."""
        dynamic = [{0: "rows"}, {0: "rows"}, {0: "caches"}]
        self.step = _compile_rows(model, torch.zeros(3, 1, dtype=torch.long), 2, dynamic, weights)

    def __call__(self, idx: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """Return the logits [M, V] of the next tokens [M, 1], at positions [M, 1], of caches in a table [B, 6]."""
        spare = max(0, 2 - len(idx))  # the compiler takes a number of 1 for a constant
        if spare:
            idx, positions = (F.pad(part, (0, 0, 0, spare)) for part in (idx, positions))
        return self.step(idx, positions, table)[: len(idx) - spare]


def _compile_rows(
    model: GPT, idx: Tensor, caches: int, dynamic: list[dict[int, str]], weights: dict[str, Tensor] | None = None
) -> _Step:
    """Compile `_decode_rows`, given an example of next tokens and how many of them have a cache."""
    first = model.blocks[0]
    assert isinstance(first, TransformerBlock)
    step = partial(_decode_rows, _RowsBlock(first, layer_windows(model), model.int8_cache))
    table = cache_table([new_kv_cache(model, 1, 2) for _ in range(caches)])
    return _Step(model, step, weights or _stack_weights(model.blocks), [idx, torch.zeros_like(idx), table], dynamic)


def _stack_weights(blocks: nn.ModuleList) -> dict[str, Tensor]:
    """Stack each weight of all blocks in one tensor [layers, ...]; the blocks' own become views of it."""
    states = [dict(block.state_dict(keep_vars=True)) for block in blocks]
    weights = {}
    for name in states[0]:
        weights[name] = torch.stack([state[name].detach() for state in states])
        for state, part in zip(states, weights[name], strict=True):
            state[name].data = part
    return weights


def _primes_apart(config: GPTConfig) -> list[int]:
    """Return primes, ascending, that divide no size of a model."""
    sizes = [size for size in config.model_dump().values() if isinstance(size, int) and size > 1]
    primes = [p for p in range(11, 200) if all(p % d for d in range(2, p))]
    return [p for p in primes if all(size % p for size in sizes)]


def _stored_parts(cache: KVCache) -> list[Tensor]:
    """Return a cache's keys and values [layers, B, K, max_length, D]; of an int8 cache numbers, and scales [., 1]."""
    return [*cache.split(cache.keys), *cache.split(cache.values)] if cache.int8 else [cache.keys, cache.values]


class _DecodeBlock(nn.Module):
    """The first block's layers for a single row; the weights of any block are given with each call."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, seen: Tensor, parts: list[Tensor]) -> Tensor:
        """Return the block's output of x [1, 1, C]; `parts` are its keys and values [K, S, D] or what stores them."""
        q, k, v = self.block.project_qkv(x, cos_sin)  # [1, H, 1, D], 2 x [1, K, 1, D]
        half = len(parts) // 2
        y = _attend_one_query(q, _with_last(parts[:half], k[0]), _with_last(parts[half:], v[0]), seen)
        return self.block.finish(x, y)


def _with_last(stored: list[Tensor], vectors: Tensor) -> Tensor:
    """Store keys or values [K, 1, D] in the last place of a layer's; return all of them, [K, S, D]."""
    new = round_to_int8(vectors) if len(stored) == 2 else (vectors,)
    for part, new_part in zip(stored, new, strict=True):
        part[:, -1:] = new_part
    return (stored[0] * stored[1]).to(vectors.dtype) if len(stored) == 2 else stored[0]


def _decode_one_token(
    block: _DecodeBlock,
    model: GPT,
    weights: dict[str, Tensor],
    idx: Tensor,
    pad: Tensor,
    places: Tensor,
    *parts: Tensor,
) -> Tensor:
    """Return the logits [1, 1, V] of a row's next token [1, 1]; the first `pad` [1] tokens of the row are padding.

    `places` is arange(S), with S tokens of which the new one is the last: compiled code reads S from its size. `parts`
    are the first row of a whole cache.
    """
    S = places.shape[0]
    torch._check(parts[0].shape[3] >= S)
    parts_seen = tuple(part[:, 0, :, :S] for part in parts)  # each [layers, K, S, D or 1]
    positions = places[-1:]  # [1]
    seen = _by_layer(model, [model.mask(positions, S, pad, kind.window).flatten() for kind in model.kinds])  # each [S]
    positions = (positions - pad)[None]  # [1, 1]
    cos_sin = _angles_by_layer(model, positions)

    def run(own: dict[str, Tensor], x: Tensor, layer: Tensor, i: int) -> Tensor:
        y: Tensor = functional_call(block, own, (x, cos_sin(i), seen(i), [part[i] for part in parts_seen]))
        return y

    layers = parts[0].shape[0]
    return model.lm_head(model.final_norm(_run_blocks(weights, layers, run, model.embed(idx, positions))))


class _RowsBlock(nn.Module):
    """The first block's layers for several rows; the weights of any block are given with each call."""

    def __init__(self, block: TransformerBlock, windows: Tensor, int8_cache: bool) -> None:
        super().__init__()
        self.block, self.windows, self.int8_cache = block, windows, int8_cache

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, table: Tensor, layer: Tensor) -> Tensor:
        q, k, v = self.block.project_qkv(x, cos_sin)  # [M, H, 1, D], 2 x [M, K, 1, D]
        return self.block.finish(x, attend_rows(q, k, v, table, self.windows, layer, self.int8_cache))


def _decode_rows(
    block: _RowsBlock, model: GPT, weights: dict[str, Tensor], idx: Tensor, positions: Tensor, table: Tensor
) -> Tensor:
    """Return the logits [M, V] of the next tokens [M, 1] of rows whose caches stand in a table [B, 6]."""
    cos_sin = _angles_by_layer(model, positions)

    def run(own: dict[str, Tensor], x: Tensor, layer: Tensor, i: int) -> Tensor:
        y: Tensor = functional_call(block, own, (x, cos_sin(i), table, layer))
        return y

    x = _run_blocks(weights, len(block.windows), run, model.embed(idx, positions))
    return model.lm_head(model.final_norm(x)[:, 0])


def _run_blocks(
    weights: dict[str, Tensor], layers: int, run: Callable[[dict[str, Tensor], Tensor, Tensor, int], Tensor], x: Tensor
) -> Tensor:
    """Run `run(weights of a layer, x, layer, its number)` for all layers on the residual stream x.

    It is a loop, so that the compiler compiles one block and no Python runs between them.
    """

    def is_left(layer: Tensor, _: Tensor) -> Tensor:
        return layer < layers

    def next_block(layer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        i = int(layer.item())
        torch._check(i >= 0)
        torch._check(i < layers)
        own = {f"block.{name}": stacked[i] for name, stacked in weights.items()}
        return layer + 1, run(own, x, layer, i)

    first = torch.zeros((), dtype=torch.long, device=x.device)
    x = while_loop(is_left, next_block, (first, x))[1]
    return x


def _by_layer(model: GPT, of_kinds: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Return a function from a layer to its part of what is given for each kind of layer."""
    if len(of_kinds) == 1:
        return lambda _: of_kinds[0]
    stacked = torch.stack([of_kinds[kind] for kind in model.kind_of_layer])  # [layers, ...]
    return lambda i: stacked[i]


def _angles_by_layer(model: GPT, positions: Tensor) -> Callable[[int], tuple[Tensor, Tensor] | None]:
    pairs = [pair for pair in (model.cos_sin(kind, positions) for kind in model.kinds) if pair is not None]
    if not pairs:  # positions are learned
        return lambda _: None
    cos, sin = (_by_layer(model, parts) for parts in zip(*pairs, strict=True))
    return lambda i: (cos(i), sin(i))


def _attend_one_query(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Return the attention output [1, 1, H * D] of one query [1, H, 1, D]; it sees `seen` [S] of the keys [K, S, D]."""
    K, _, D = keys.shape  # below are sums, not products of matrices: the compiler fuses them into loops
    q = (q * D**-0.5).view(K, -1, 1, D)  # [K, G, 1, D]
    weights = (q * keys[:, None]).sum(-1).masked_fill(~seen, -torch.inf).softmax(-1)  # [K, G, S]
    return (weights[..., None] * values[:, None]).sum(2).view(1, 1, -1)


# ---- GPU: a CUDA graph ----------------------------------------------------------------------------------------------


class _CudaGraphStep:
    """The decode step of a single row as a CUDA graph: one call launches all kernels.

    A graph has fixed addresses: it reads its own inputs, and each cache needs its own graph. The last one is kept.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.idx = torch.zeros(1, 1, dtype=torch.long, device=model.tok_emb.weight.device)
        self.pad, self.position = self.idx.new_zeros(1), self.idx.new_zeros(1)
        self.cache: KVCache | None = None
        self.replay: Callable[[], Tensor]

    def __call__(self, idx: Tensor, cache: KVCache, pad: Tensor) -> Tensor:
        self.idx.copy_(idx)
        self.pad.copy_(pad)
        self.position.fill_(cache.length)
        if cache is not self.cache:
            self.replay = _capture_graph(lambda: _decode_at(self.model, self.idx, self.pad, self.position, cache))
            self.cache = cache
        return self.replay().clone()


def _capture_graph(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture work as a CUDA graph; return a function that runs it again and returns the same tensor."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):  # the first call of a library may do what a graph cannot hold
        work()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _decode_at(model: GPT, idx: Tensor, pad: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Return the logits [1, 1, V] of a row's next token [1, 1] at `position` [1] behind `pad` [1] positions of padding.

    All that changes between steps is in tensors: attention reads the whole cache, with a mask.
    """
    masks = [model.mask(position, cache.max_length, pad, kind.window) for kind in model.kinds]  # [1, 1, 1, max_length]
    positions = (position - pad)[None]  # [1, 1]
    angles, x = [model.cos_sin(kind, positions) for kind in model.kinds], model.embed(idx, positions)
    caches = zip(*cache.slice(0, 0, cache.max_length), strict=True)
    for block, kind, (keys, values) in zip(model.blocks, model.kind_of_layer, caches, strict=True):
        assert isinstance(block, TransformerBlock)
        mask = masks[kind]
        q, k, v = block.project_qkv(x, angles[kind])  # [1, H, 1, D], 2 x [1, K, 1, D]
        keys.index_copy_(1, position, cache.encode(k[0]))
        values.index_copy_(1, position, cache.encode(v[0]))
        k, v = cache.decode(keys)[None], cache.decode(values)[None]  # 2 x [1, K, max_length, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = block.finish(x, y.transpose(1, 2).reshape(1, 1, -1))
    return model.lm_head(model.final_norm(x))
