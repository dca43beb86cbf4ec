"""Text from a model: how the next token is chosen, and rows continued with a key-value cache, many at a time or ahead
of a draft.

Shapes: B rows being continued, T tokens of this call, C emb_dim, K n_kv_heads, D head_dim, V vocab_size.

A row may grow longer than the context. When it does, the model reads on from the last half of the context: one prefill
of half a context every half context, where dropping one token at a time would cost a prefill for each new token. A
prompt that is longer than the context is read from its last `context_length` tokens.
"""

from __future__ import annotations

import codecs
import contextlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.func import functional_call

from llm.config import InputError
from llm.model.gpt import GPT, KVCache, TransformerBlock
from llm.model.linear import PackedLinear
from llm.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; the fields are applied in this order.

    `temperature` 0 is greedy: the most likely token after the repetition penalty, and the filters play no part. Each
    filter sees the distribution that the one before it left, and always leaves at least one token.
    """

    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens that occurred (CTRL, 2019)
    temperature: float = 0.0  # divides all logits
    top_k: int | None = None  # keeps the k most likely tokens
    top_p: float | None = None  # keeps the fewest most likely tokens that reach this probability (Holtzman et al. 2020)
    min_p: float | None = None  # keeps tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024)

    def __post_init__(self) -> None:
        """Raises `InputError` for a value outside its range; NaN is outside of all of them."""
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise InputError(f"repetition_penalty must be above 0 (1: off), found {self.repetition_penalty}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature must be 0 (greedy) or more, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be 1 or more, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be between 0 and 1, found {self.min_p}")


GREEDY = Sampling()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with the tokens of `seen` [B, V] (bool) made less likely; a penalty below 1 makes them likelier."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] with -inf for the tokens that top-k, then top-p, then min-p exclude."""
    if sampling.top_k is not None:
        values, ids = logits.topk(min(sampling.top_k, logits.shape[-1]))  # [B, k]
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities, ids = logits.softmax(-1).sort(descending=True, stable=True)  # [B, V], most likely first
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens reach without this one
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        smallest = sampling.min_p * probabilities.amax(-1, keepdim=True)  # [B, 1]
        logits = logits.masked_fill(probabilities < smallest, -torch.inf)
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] that tokens are drawn from; a greedy choice is one that is certain."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # largest 0: no overflow when it is tiny
    return filter_logits(scaled, sampling).softmax(-1)


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id for each row of logits [B, V], drawn with the row's own generator: [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    rows = zip(probabilities(logits, sampling), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


@dataclass
class Prefix:
    """What a model has computed for the prompt that it read last; the next is read from where it differs.

    For calls one after another whose prompts begin alike, as in a chat with a system prompt.
    """

    tokens: list[int] = field(default_factory=list)
    keys: Tensor | None = None  # [layers, K, tokens, D]
    values: Tensor | None = None


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    batch_size: int | None = None,
    prefix: Prefix | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to `max_new_tokens` and ending before the first token of `stop`.

    `max_new_tokens` is one number or one for each prompt. `batch_size` rows are continued at a time, all if it is None;
    where one ends the next prompt takes its place. What the prompts begin with in common is read once. Row i samples
    with seed + i and from its own logits only, so its text does not depend on the rows beside it. Raises `InputError`
    for an empty prompt and for numbers out of range.

    >>> prompts = [tokenizer.encode("Once"), tokenizer.encode("It was late")]  # doctest: +SKIP
    >>> generate(model, prompts, max_new_tokens=3, stop={tokenizer.eot})  # doctest: +SKIP
    [[310, 257, 640], [287, 262]]
    """
    rows = _rows(model, prompts, max_new_tokens, sampling, seed)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, found {batch_size}")
    if prefix is None and len(rows) > 1:
        prefix = Prefix()
    answers: list[list[int]] = [[] for _ in prompts]
    for number, token in _batched(model, rows, sampling, frozenset(stop), batch_size or len(rows), prefix):
        answers[number].append(token)
    return answers


def stream(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
    prefix: Prefix | None = None,
    draft: GPT | None = None,
) -> Iterator[int]:
    """The same tokens as `generate(model, [prompt], ...)[0]`, each as soon as it is known; errors come at the call.

    A `draft`, a smaller model of the same vocabulary, guesses tokens ahead, which the model then reads at once
    (Leviathan et al. 2023): greedy text stays the same up to rounding, sampled text is another from the same
    distribution.
    """
    rows = _rows(model, [prompt], max_new_tokens, sampling, seed)
    if draft is None:
        return (token for _, token in _batched(model, rows, sampling, frozenset(stop), 1, prefix))
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(f"the draft has {draft.config.vocab_size} tokens, the model {model.config.vocab_size}")
    if draft.config.context_length < (needed := min(model.config.context_length, len(prompt) + max_new_tokens)):
        raise InputError(f"the draft reads {draft.config.context_length} tokens, and {needed} are needed")
    return _drafted(model, draft, rows[0], sampling, frozenset(stop), prefix)


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
        keys, values = cache.part(0, 0, cache.length + 1)  # [layers, K, S, D]
        if warming:
            torch._dynamo.mark_dynamic(keys, 2)
            torch._dynamo.mark_dynamic(values, 2)
        logits: Tensor = compiled(model, block, weights, idx, pad, keys, values)
        return logits

    warming = True  # the lengths of the first call are no constants
    try:
        with torch.inference_mode(), _evaluating(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* `functools.lru_cache`")  # is passed over: `rotary_frequencies` may be
            cache = _cache(model, 2, 5)  # of two rows: in that of one, layers lie as far apart as it is long
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
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, seen: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        q, k, v = self.block.before(x, angles)  # [1, H, 1, D], 2 x [1, K, 1, D]
        keys[:, -1:], values[:, -1:] = k[0], v[0]
        return self.block.after(x, _attend_row(q, keys, values, seen))


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
    angles = model.angles(positions)

    def is_left(layer: Tensor, _: Tensor) -> Tensor:
        return layer < layers

    def next_block(layer: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        i = int(layer.item())
        torch._check(i >= 0)
        torch._check(i < layers)
        own = {f"block.{name}": stacked[i] for name, stacked in weights.items()}
        return layer + 1, functional_call(block, own, (x, angles, seen, keys[i], values[i]))

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
    angles, x = model.angles(positions), model.embed(idx, positions)
    for block, keys, values in zip(model.blocks, *cache.part(0, 0, cache.max_length), strict=True):
        assert isinstance(block, TransformerBlock)
        q, k, v = block.before(x, angles)  # [1, H, 1, D], 2 x [1, K, 1, D]
        keys.index_copy_(1, position, k[0])
        values.index_copy_(1, position, v[0])
        y = F.scaled_dot_product_attention(q, keys[None], values[None], attn_mask=mask, enable_gqa=True)
        x = block.after(x, y.transpose(1, 2).reshape(1, 1, -1))
    logits: Tensor = model.lm_head(model.final_norm(x))
    return logits


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, in pieces of whole characters: a character may be spread over several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Row:
    """A prompt that is being continued."""

    number: int  # of the prompt in the call
    context: list[int]  # what the model reads: the prompt and what was added, or the last part of it
    left: int  # how many tokens may still be added
    generator: torch.Generator
    seen: Tensor | None  # [V] bool, the tokens that occurred, where a repetition penalty asks for them

    def add(self, token: int) -> None:
        self.context.append(token)
        self.left -= 1
        if self.seen is not None:
            self.seen[token] = True

    def cut(self, context_length: int) -> bool:
        """Keeps the last half of a context that has grown too long; returns whether it had."""
        if len(self.context) <= context_length:
            return False
        self.context = self.context[-((context_length + 1) // 2) :]
        return True


def _rows(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], sampling: Sampling, seed: int
) -> list[_Row]:
    """Raises `InputError` for what no row can be made of."""
    wanted = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(wanted) != len(prompts):
        raise InputError(f"max_new_tokens: expected a number for each of {len(prompts)} prompts, found {len(wanted)}")
    if (least := min(wanted, default=0)) < 0:
        raise InputError(f"max_new_tokens must be 0 or more, found {least}")
    if not 0 <= seed < 2**63 - len(prompts):
        raise InputError(f"seed must be between 0 and 2^63, found {seed}")
    device = model.tok_emb.weight.device
    rows = []
    for number, (prompt, left) in enumerate(zip(prompts, wanted, strict=True)):
        if not prompt:
            which = f"prompt {number + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise InputError(f"{which} is empty; give at least one token to continue")
        context = list(prompt[-model.config.context_length :])
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
            seen[context] = True
        rows.append(_Row(number, context, left, torch.Generator(device).manual_seed(seed + number), seen))
    return rows


@contextlib.contextmanager
def _evaluating(*models: GPT) -> Iterator[None]:
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _cache(model: GPT, rows: int, capacity: int) -> KVCache:
    return KVCache(model.config, rows, capacity, model.tok_emb.weight.device, model.tok_emb.weight.dtype)


def _read(
    model: GPT, contexts: Sequence[Sequence[int]], prefix: Prefix | None, capacity: int = 0
) -> tuple[Tensor, KVCache, list[int]]:
    """Reads prompts [B], aligned at their ends; the last hidden states [B, C], the cache, and each row's padding [B].

    What all of them have in common with the prefix is taken from there; then the first of them is the prefix.
    """
    width = max(map(len, contexts))
    pads = [width - len(context) for context in contexts]
    cache = _cache(model, len(contexts), max(width, capacity))
    if prefix is not None and prefix.keys is not None and prefix.values is not None:
        cache.length = min(_common(prefix.tokens, context[:-1]) for context in contexts)
        for row, pad in enumerate(pads):
            part = slice(0, max(0, cache.length - pad))
            cache.put(row, pad, prefix.keys[:, :, part], prefix.values[:, :, part])
    padded = [[0] * pad + list(context) for pad, context in zip(pads, contexts, strict=True)]
    idx = torch.tensor(padded, device=model.tok_emb.weight.device)[:, cache.length :]  # [B, T]
    hidden = model.hidden(idx, cache, _tensor(pads, idx))[:, -1]  # [B, C]
    if prefix is not None:
        prefix.tokens = list(contexts[0])
        prefix.keys, prefix.values = (part.clone() for part in cache.part(0, pads[0], width))
    return hidden, cache, pads


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    different = (i for i, (token, other) in enumerate(zip(tokens, others, strict=False)) if token != other)
    return next(different, min(len(tokens), len(others)))


def _tensor(pads: Sequence[int], like: Tensor) -> Tensor | None:
    """As a model takes the padding of rows; without any it needs no mask."""
    return torch.tensor(pads, device=like.device) if any(pads) else None


# ---- many rows at a time ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def _batched(
    model: GPT, rows: list[_Row], sampling: Sampling, stop: frozenset[int], batch_size: int, prefix: Prefix | None
) -> Iterator[tuple[int, int]]:
    """Each new token with the number of its prompt, step by step.

    All rows of the cache end at the same column, and row i begins at column `pads[i]`.
    """
    waiting = deque(row for row in rows if row.left > 0)
    if not waiting:
        return
    context_length = model.config.context_length
    longest = max(len(row.context) for row in waiting) + max(row.left for row in waiting)
    cache = _cache(model, min(batch_size, len(waiting)), min(context_length, longest))
    active: list[_Row] = []
    pads: list[int] = []
    with _evaluating(model):
        if prefix is not None and len(waiting) > 1:
            first = waiting[0].context
            if common := min(_common(first, row.context) for row in waiting):
                _read(model, [first[:common]], prefix)
        while waiting or any(row.left > 0 for row in active):
            # A row that outgrew its context enters again with the last half of it, at other positions.
            entering = [row for row in active if row.left > 0 and row.cut(context_length)]
            known = None if entering else prefix
            staying = [i for i, row in enumerate(active) if row.left > 0 and row not in entering]
            while waiting and len(staying) + len(entering) < batch_size:
                entering.append(waiting.popleft())
            if len(staying) < len(active):
                staying = _close_ranks(staying)
                cache.keep(staying)
                active, pads = [active[i] for i in staying], [pads[i] for i in staying]

            if not active:
                cache.length = 0
            elif cache.length == cache.max_length:  # then no row begins at column 0: it would have been cut, or ended
                pads = _shifted(cache, pads, -min(pads))
            idx = torch.tensor([row.context[-1:] for row in active], device=model.tok_emb.weight.device)  # [B, 1]
            if not entering:
                logits = model(idx, cache, _tensor(pads, idx))[:, -1]  # [B, V]
            else:
                hidden = [model.hidden(idx, cache, _tensor(pads, idx))[:, -1]] if active else []  # [B, C]
                last, read, new_pads = _read(model, [row.context for row in entering], known)
                logits = model.lm_head(torch.cat([*hidden, last]))  # the output layer is large: last positions only
                pads = _shifted(cache, pads, max(0, read.length - cache.length))
                for i, pad in enumerate(new_pads):
                    begin = cache.length - read.length + pad
                    cache.put(len(active), begin, *read.part(i, pad, read.length))
                    active.append(entering[i])
                    pads.append(begin)

            logits = logits.float()
            if sampling.repetition_penalty != 1:
                seen = torch.stack([row.seen for row in active if row.seen is not None])  # [B, V]
                logits = penalise(logits, seen, sampling.repetition_penalty)
            tokens = sample(logits, sampling, [row.generator for row in active]).tolist()
            for row, token in zip(active, tokens, strict=True):
                if token in stop:
                    row.left = 0
                else:
                    row.add(token)
                    yield row.number, token


def _close_ranks(kept: list[int]) -> list[int]:
    """The kept rows with as few as possible of them at another place than before: the last ones fill the gaps."""
    movers = [row for row in kept if row >= len(kept)]
    stayers = set(kept)
    return [row if row in stayers else movers.pop() for row in range(len(kept))]


def _shifted(cache: KVCache, pads: list[int], columns: int) -> list[int]:
    """Moves what the cache holds to the right, to the left where `columns` is negative; returns the new padding."""
    if columns:
        cache.shift(columns)
    return [pad + columns for pad in pads]


# ---- one row and a draft ---------------------------------------------------------------------------------------------

GUESSES = 4  # tokens that a draft proposes before the model reads them


@torch.inference_mode()
def _drafted(
    model: GPT, draft: GPT, row: _Row, sampling: Sampling, stop: frozenset[int], prefix: Prefix | None
) -> Iterator[int]:
    """The draft guesses from its distribution q; the model accepts a guess with probability p / q of its own p.

    In place of the first guess that it does not accept it draws from what p has more than q, so that each token has
    distribution p.
    """
    capacity = min(model.config.context_length, len(row.context) + row.left)

    def distributions(of: GPT, cache: KVCache, tokens: list[int], n: int) -> Tensor:
        """Logits [n, V] at the last n of the tokens; the cache holds some of the others."""
        idx = torch.tensor([tokens[cache.length :]], device=of.tok_emb.weight.device)  # [1, T]
        logits = of(idx, cache)[0] if len(idx[0]) == n else of.lm_head(of.hidden(idx, cache)[0, -n:])
        return logits.float()

    def chances(logits: Tensor, seen: Tensor | None) -> Tensor:
        """The distribution [V] that logits [V] give."""
        if seen is not None:
            logits = penalise(logits, seen, sampling.repetition_penalty)
        return probabilities(logits[None], sampling)[0]

    def draw(weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=row.generator))

    with _evaluating(model, draft):
        caches = [_read(each, [row.context], kept, capacity)[1] for each, kept in ((model, prefix), (draft, None))]
        while row.left > 0:
            read = 0 if row.cut(model.config.context_length) else len(row.context) - 1
            for cache in caches:
                cache.length = min(cache.length, read)
            guesses: list[int] = []
            q: list[Tensor] = []
            seen = None if row.seen is None else row.seen.clone()
            for _ in range(min(GUESSES, row.left - 1, capacity - len(row.context))):
                logits = distributions(draft, caches[1], row.context + guesses, 1)
                q.append(chances(logits[0], seen))  # [V]
                guesses.append(draw(q[-1]))
                if seen is not None:
                    seen[guesses[-1]] = True
            all_logits = distributions(model, caches[0], row.context + guesses, len(guesses) + 1)  # [guesses + 1, V]
            for i, logits in enumerate(all_logits):
                p = chances(logits, row.seen)  # [V]
                accepted = False
                if i < len(guesses):
                    guess = guesses[i]
                    chance = torch.rand((), device=p.device, generator=row.generator)
                    accepted = bool(chance * q[i][guess] < p[guess])
                    if not accepted and (rest := (p - q[i]).clamp(min=0)).any():  # none is left where they are equal
                        p = rest
                token = guesses[i] if accepted else draw(p)
                if token in stop:
                    return
                row.add(token)
                yield token
                if not accepted:
                    break
