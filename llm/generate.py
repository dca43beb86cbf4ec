"""Text from a model: how the next token is chosen, and batches of rows continued with a key-value cache.

Shapes: B rows still being continued, T tokens of this call, C emb_dim, V vocab_size.

A row may grow longer than the context. When it does, the model reads on from the last half of the context: one prefill
of half a context every half context, where dropping one token at a time would cost a prefill for each new token. A
prompt that is longer than the context is read from its last `context_length` tokens.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.config import InputError
from llm.model import GPT, KVCache
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


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id for each row of logits [B, V], drawn with the row's own generator: [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # largest 0: no overflow when it is tiny
    probabilities = filter_logits(scaled, sampling).softmax(-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """The new tokens of each prompt, up to `max_new_tokens` and ending before the first token of `stop`.

    Row i samples with seed + i and from its own logits only, so its text does not depend on the rows beside it.
    Raises `InputError` for an empty prompt, and for a `max_new_tokens` or a seed out of range.

    >>> prompts = [tokenizer.encode("Once"), tokenizer.encode("It was late")]  # doctest: +SKIP
    >>> generate(model, prompts, max_new_tokens=3, stop={tokenizer.eot})  # doctest: +SKIP
    [[310, 257, 640], [287, 262]]
    """
    _check(prompts, max_new_tokens, seed)
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token in _new_tokens(model, prompts, max_new_tokens, sampling, seed, frozenset(stop)):
        answers[row].append(token)
    return answers


def stream(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """The same tokens as `generate(model, [prompt], ...)[0]`, each as soon as it is known; errors come at the call."""
    _check([prompt], max_new_tokens, seed)
    return (token for _, token in _new_tokens(model, [prompt], max_new_tokens, sampling, seed, frozenset(stop)))


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, in pieces of whole characters: a character may be spread over several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


@dataclass
class _Row:
    """A prompt that is being continued."""

    number: int  # of the prompt in the call
    context: list[int]  # what the model reads: the prompt and what was added, or the last part of it
    generator: torch.Generator


@torch.inference_mode()
def _new_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: frozenset[int],
) -> Iterator[tuple[int, int]]:
    """Each new token with the number of its prompt, step by step; rows that are finished leave the batch."""
    weight = model.tok_emb.weight
    context_length = model.config.context_length
    rows = [
        _Row(number, list(prompt[-context_length:]), torch.Generator(weight.device).manual_seed(seed + number))
        for number, prompt in enumerate(prompts)
    ]
    longest = max((len(row.context) for row in rows), default=0)
    capacity = min(context_length, longest + max_new_tokens)
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=weight.device)  # [B, V]
    for position, row in enumerate(rows):
        seen[position, row.context] = True
    cache: KVCache | None = None

    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens if rows else 0):
            if cache is None or cache.length == capacity:
                for row in rows:
                    if len(row.context) > context_length:
                        row.context = row.context[-((context_length + 1) // 2) :]
                idx, pad = _right_align([row.context for row in rows], weight.device)  # [B, T], [B] or None
                cache = KVCache(model.config, len(rows), capacity, weight.device, weight.dtype)
            else:
                idx = torch.tensor([row.context[-1:] for row in rows], device=weight.device)  # [B, 1]
            hidden = model.hidden(idx, cache, pad)[:, -1]  # [B, C]: only the last position needs the large output layer
            logits = model.lm_head(hidden).float()  # [B, V]
            if sampling.repetition_penalty != 1:
                logits = penalise(logits, seen, sampling.repetition_penalty)
            tokens = sample(logits, sampling, [row.generator for row in rows])  # [B]
            seen.scatter_(1, tokens[:, None], True)

            ids = tokens.tolist()
            going = [position for position, token in enumerate(ids) if token not in stop]
            for position in going:
                rows[position].context.append(ids[position])
                yield rows[position].number, ids[position]
            if not going:
                return
            if len(going) < len(rows):
                rows = [rows[position] for position in going]
                kept = torch.tensor(going, device=weight.device)
                cache.keep(kept)
                seen = seen[kept]
                pad = pad[kept] if pad is not None else None
    finally:
        model.train(was_training)


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> None:
    """Raises `InputError` for what no row can be made of."""
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be 0 or more, found {max_new_tokens}")
    if not 0 <= seed < 2**63 - len(prompts):
        raise InputError(f"seed must be between 0 and 2^63, found {seed}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            which = f"prompt {number + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise InputError(f"{which} is empty; give at least one token to continue")


def _right_align(contexts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of different lengths as [B, T] padded at the left, and the padding of each: [B], None if there is none."""
    width = max(map(len, contexts))
    idx = torch.tensor([[0] * (width - len(context)) + context for context in contexts], device=device)  # [B, T]
    pad = torch.tensor([width - len(context) for context in contexts], device=device)  # [B]
    return idx, pad if min(map(len, contexts)) < width else None
