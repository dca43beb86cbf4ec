"""Compiled decoding of a single row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.func import functional_call

from llm.common.errors import InputError
from llm.inference.prefill import new_kv_cache
from llm.inference.request import eval_mode
from llm.model.gpt import GPT, TransformerBlock
from llm.model.kv_cache import KVCache
from llm.model.linear import PackedLinear


def compile_step(model: GPT) -> None:
    """Makes the step of a single row one call, in place: the same up to rounding, and much faster.

    On a CPU by PyTorch's compiler, up to half a minute, less the next time, as PyTorch keeps what it has made; on a
    CUDA device by capturing a graph for each cache. Batches and prompts run as before. From then on the model must keep
    its layers, their dtype and their device, as looking for changes would take time at each step. Raises `InputError`
    where it cannot be done; then the model is as before.
    """
    plain = model.forward
    step = _graphed_step(model) if model.tok_emb.weight.device.type == "cuda" else _compiled_step(model)

    def forward(idx: Tensor, cache: KVCache | None = None, pad: Tensor | None = None) -> Tensor:
        places = 0 if cache is None else min(cache.max_length, model.config.context_length)
        # No length that changes is 1 to the compiler; where no place is left the plain step says so.
        if idx.numel() != 1 or torch.is_grad_enabled() or cache is None or not 1 <= cache.length < places:
            return plain(idx, cache, pad)
        logits = step(idx, cache, idx.new_zeros(1) if pad is None else pad)
        cache.length += 1
        return logits

    model.forward = forward  # type: ignore[method-assign]


def _compiled_step(model: GPT) -> Callable[[Tensor, KVCache, Tensor], Tensor]:
    first = model.blocks[0]
    assert isinstance(first, TransformerBlock)
    block, weights = _BlockOfRow(first), _stacked(model.blocks)
    compiled = _compiled(_logits_of_row)

    def step(idx: Tensor, cache: KVCache, pad: Tensor) -> Tensor:
        keys, values = cache.slice(0, 0, cache.length + 1)  # [layers, K, S, D]
        if warming:
            torch._dynamo.mark_dynamic(keys, 2)
            torch._dynamo.mark_dynamic(values, 2)
        logits: Tensor = compiled(model, block, weights, idx, pad, keys, values)
        return logits

    warming = True  # the lengths of the first call are no constants
    try:
        with torch.inference_mode(), eval_mode(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* `functools.lru_cache`")  # is passed over: `rotary_frequencies` may be
            cache = new_kv_cache(model, 2, 5)  # of two rows: in that of one, layers lie as far apart as it is long
            cache.length = 2
            idx = torch.zeros(1, 1, dtype=torch.long, device=model.tok_emb.weight.device)
            step(idx, cache, idx.new_zeros(1))
    except RuntimeError as error:  # of the compiler's many classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the step could not be compiled, for which a C++ compiler is needed: {reason}") from error
    warming = False
    return step


def _compiled(function: Any) -> Any:
    """What was made is kept by the function's code: a copy of that, as it would be taken for other models too.

    Nothing checks that it is called with what it was made for: that takes time at each step.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp_wrapper": True}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _stacked(blocks: nn.ModuleList) -> dict[str, Tensor]:
    """Each weight of all blocks in one tensor [layers, ...], of which the blocks' own are parts from then on."""
    if any(isinstance(part, PackedLinear) for part in blocks.modules()):
        raise InputError("the step of a packed model cannot be compiled: its weights are in oneDNN's own order")
    states = [dict(block.state_dict(keep_vars=True)) for block in blocks]
    weights = {}
    for name in states[0]:
        weights[name] = torch.stack([state[name].detach() for state in states])
        for state, part in zip(states, weights[name], strict=True):
            state[name].data = part
    return weights


class _BlockOfRow(nn.Module):
    """A block in the step of a single row. It has the first one's layers; weights are given with each call."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, seen: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        q, k, v = self.block.project_qkv(x, cos_sin)  # [1, H, 1, D], 2 x [1, K, 1, D]
        keys[:, -1:], values[:, -1:] = k[0], v[0]
        return self.block.finish(x, _attend_row(q, keys, values, seen))


def _logits_of_row(
    model: GPT, block: _BlockOfRow, weights: dict[str, Tensor], idx: Tensor, pad: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Logits [1, 1, V] after a row's next token [1, 1]; the first `pad` [1] tokens of the row are none.

    `keys` and `values` [layers, K, S, D] are what the cache holds, with a place for this token's at the end. The blocks
    are a loop: the compiler makes one, and no Python runs between them.
    """
    layers, _, S, _ = keys.shape
    positions = torch.arange(S - 1, S, device=idx.device)  # [1]
    seen = model.mask(positions, S, pad).flatten()  # [S]
    positions = (positions - pad)[None]  # [1, 1]
    cos_sin = model.cos_sin(positions)

    def is_left(layer: Tensor, _: Tensor) -> Tensor:
        return layer < layers

    def next_block(layer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        i = int(layer.item())
        torch._check(i >= 0)
        torch._check(i < layers)
        own = {f"block.{name}": stacked[i] for name, stacked in weights.items()}
        return layer + 1, functional_call(block, own, (x, cos_sin, seen, keys[i], values[i]))

    first = torch.zeros((), dtype=torch.long, device=idx.device)
    _, x = while_loop(is_left, next_block, (first, model.embed(idx, positions)))
    logits: Tensor = model.lm_head(model.final_norm(x))
    return logits


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Attention of one query [1, H, 1, D] to keys and values [K, S, D], to those that are `seen` [S]: [1, 1, H * D].

    As sums, of which PyTorch's compiler makes loops in the same call as all else.
    """
    K, _, D = keys.shape
    q = (q * D**-0.5).view(K, -1, 1, D)  # [K, G, 1, D], with G queries to a key
    weights = (q * keys[:, None]).sum(-1).masked_fill(~seen, -torch.inf).softmax(-1)  # [K, G, S]
    return (weights[..., None] * values[:, None]).sum(2).view(1, 1, -1)


def _graphed_step(model: GPT) -> Callable[[Tensor, KVCache, Tensor], Tensor]:
    """The kernels of a step are started by one call, which a CPU can do fast enough for a GPU.

    A graph's memory is always the same, so that each cache has its own; the last one's is kept.
    """
    cache_of_graph: KVCache | None = None
    replay: Callable[[], Tensor]
    device = model.tok_emb.weight.device
    own_idx = torch.zeros(1, 1, dtype=torch.long, device=device)
    own_pad, position = own_idx.new_zeros(1), own_idx.new_zeros(1)

    def step(idx: Tensor, cache: KVCache, pad: Tensor) -> Tensor:
        nonlocal cache_of_graph, replay
        own_idx.copy_(idx)
        own_pad.copy_(pad)
        position.fill_(cache.length)
        if cache is not cache_of_graph:
            replay = _captured(lambda: _logits_at(model, own_idx, own_pad, position, cache))
            cache_of_graph = cache
        return replay().clone()

    return step


def _captured(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that does the same work again as a CUDA graph, on the same memory, its result included."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):  # libraries that are called for the first time may do what no graph can hold
        work()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _logits_at(model: GPT, idx: Tensor, pad: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Logits [1, 1, V] after a row's next token [1, 1] at `position` [1]; the first `pad` [1] tokens of it are none.

    All that changes from step to step is in tensors. So attention reads the whole cache, with a mask.
    """
    mask = model.mask(position, cache.max_length, pad)  # [1, 1, 1, max_length]
    positions = (position - pad)[None]  # [1, 1]
    cos_sin, x = model.cos_sin(positions), model.embed(idx, positions)
    for block, keys, values in zip(model.blocks, *cache.slice(0, 0, cache.max_length), strict=True):
        assert isinstance(block, TransformerBlock)
        q, k, v = block.project_qkv(x, cos_sin)  # [1, H, 1, D], 2 x [1, K, 1, D]
        keys.index_copy_(1, position, k[0])
        values.index_copy_(1, position, v[0])
        y = F.scaled_dot_product_attention(q, keys[None], values[None], attn_mask=mask, enable_gqa=True)
        x = block.finish(x, y.transpose(1, 2).reshape(1, 1, -1))
    logits: Tensor = model.lm_head(model.final_norm(x))
    return logits
