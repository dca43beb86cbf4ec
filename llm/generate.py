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
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import InputError
from llm.model import GPT, KVCache, TransformerBlock
from llm.tokenizer import Tokenizer


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
    """Has PyTorch's compiler make the step of a single row, in place: the same up to rounding, on a CPU much faster.

    Batches and prompts run as before. From then on the model must keep its layers, their dtype and their device, as
    looking for changes would take a tenth of each step. Takes up to half a minute, less the next time, as PyTorch keeps
    what it has made. Raises `InputError` where it cannot be done.
    """
    warming = True  # the lengths of the first call are no constants
    blocks_of_row, head = (_compiled(function) for function in (_blocks_of_row, type(model.lm_head).forward))
    plain_through, plain_head = model.through, model.lm_head.forward

    def alone(x: Tensor) -> bool:
        return x.numel() == x.shape[-1] and not torch.is_grad_enabled()

    def through(blocks: Sequence[Any], x: Tensor, angles: Any, mask: Tensor | None, cache: KVCache | None) -> Any:
        # No length that changes is 0 or 1 to the compiler; in a full cache there is no place.
        if not alone(x) or cache is None or not 2 <= cache.length < cache.max_length:
            return plain_through(blocks, x, angles, mask, cache)
        keys, values = (part.unbind() for part in cache.part(0, 0, cache.max_length))  # layers x [K, max_length, D]
        seen = x.new_ones(cache.length, dtype=torch.bool) if mask is None else mask.flatten()[:-1]  # [S]
        if warming:
            for part in (*keys, *values):
                torch._dynamo.mark_dynamic(part, 1)
            torch._dynamo.mark_dynamic(seen, 0)
        x, k, v = blocks_of_row(blocks, x, angles, seen, keys, values)
        cache.put(0, cache.length, k, v)
        return x

    def lm_head(x: Tensor) -> Any:
        return head(model.lm_head, x) if alone(x) else plain_head(x)

    model.through, model.lm_head.forward = through, lm_head  # type: ignore[method-assign]
    try:
        list(stream(model, [0, 0, 0], max_new_tokens=2))
    except RuntimeError as error:  # of the compiler's many classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"the step could not be compiled, for which a C++ compiler is needed: {reason}") from error
    warming = False


def _compiled(function: Any) -> Any:
    """What was made is kept by the function's code: a copy of that, as it would be taken for other models' layers too.

    Nothing checks that they are the ones for which it was made.
    """
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options: dict[str, Any] = {"guard_filter_fn": skip, "size_asserts": False}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _blocks_of_row(
    blocks: Sequence[TransformerBlock],
    x: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    seen: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What is behind the blocks, [1, 1, C], and each one's new key and value, 2 x [layers, K, 1, D].

    `keys` and `values` are each layer's cached ones, [K, max_length, D], of which the first S are filled and those that
    are True in `seen` [S] may be looked at.
    """
    new: list[tuple[Tensor, Tensor]] = []
    for block, some_keys, some_values in zip(blocks, keys, values, strict=True):
        x, k, v = _block_of_row(block, x, angles, seen, some_keys, some_values)
        new.append((k, v))
    return x, torch.cat([k for k, _ in new]), torch.cat([v for _, v in new])


@torch.compiler.nested_compile_region  # compiled once for all blocks
def _block_of_row(
    block: TransformerBlock,
    x: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    seen: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.before(x, angles)  # [1, H, 1, D], 2 x [1, K, 1, D]
    return block.after(x, _attend_row(q, k[0], v[0], seen, keys, values)), k, v


def _attend_row(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query [1, H, 1, D] to the cached keys that are `seen` and to its own [K, 1, D]: [1, 1, H * D].

    As sums, of which PyTorch's compiler makes loops in the same call as all else.
    """
    (K, _, D), S = keys.shape, len(seen)
    q = (q * D**-0.5).view(K, -1, 1, D)  # [K, G, 1, D], with G queries to a key
    old = (q * keys[:, None, :S]).sum(-1).masked_fill(~seen, -torch.inf)  # [K, G, S]
    new = (q[:, :, 0] * k).sum(-1, keepdim=True)  # [K, G, 1]
    largest = torch.maximum(old.amax(-1, keepdim=True), new)
    old, new = (old - largest).exp(), (new - largest).exp()
    y = (old[..., None] * values[:, None, :S]).sum(2) + new * v  # [K, G, D]
    return (y / (old.sum(-1, keepdim=True) + new)).view(1, 1, -1)


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

            hidden: list[Tensor] = []
            if not active:
                cache.length = 0
            else:
                if cache.length == cache.max_length:  # then no row begins at column 0: it would have been cut, or ended
                    pads = _shifted(cache, pads, -min(pads))
                idx = torch.tensor([row.context[-1:] for row in active], device=model.tok_emb.weight.device)  # [B, 1]
                hidden.append(model.hidden(idx, cache, _tensor(pads, idx))[:, -1])  # [B, C]
            if entering:
                last, read, new_pads = _read(model, [row.context for row in entering], known)
                hidden.append(last)
                pads = _shifted(cache, pads, max(0, read.length - cache.length))
                for i, pad in enumerate(new_pads):
                    begin = cache.length - read.length + pad
                    cache.put(len(active), begin, *read.part(i, pad, read.length))
                    active.append(entering[i])
                    pads.append(begin)

            logits = model.lm_head(torch.cat(hidden)).float()  # [B, V]: only last positions need the large output layer
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
        return of.lm_head(of.hidden(idx, cache)[0, -n:]).float()

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
