"""A request to the engine: a prompt, how its answer is chosen, and the state of its decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llm.inference.sampling import GREEDY, Sampling, apply_repetition_penalty, sample
from llm.model.kv_cache import KVCache
from llm.serving.text_stream import Piece, TextStream, TokenInfo


class Constraint(Protocol):
    """A grammar that follows the tokens of an answer."""

    def mask(self, logits: Tensor) -> Tensor:
        """Return the logits [V] with -inf for tokens that cannot come next."""

    def accept(self, token: int) -> bool:
        """Advance by a token; return whether the answer is complete."""


@dataclass(frozen=True)
class Choice:
    """Options for choosing tokens beyond `Sampling`; the penalties count the answer's own tokens, as OpenAI's do."""

    sampling: Sampling = GREEDY
    seed: int = 0
    presence_penalty: float = 0.0  # subtracted from the logit of a token that occurred
    frequency_penalty: float = 0.0  # subtracted for each time that it occurred
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # the number of likeliest tokens to report; None: no log probabilities

    @property
    def plain(self) -> bool:
        """Tell whether the likeliest token is taken as it is, with nothing else to report."""
        penalties = self.presence_penalty or self.frequency_penalty or self.sampling.repetition_penalty != 1
        return not (self.sampling.temperature or penalties or self.logit_bias or self.logprobs is not None)


@dataclass(eq=False)
class Generation:
    """A request and the state of its decoding. `emit` receives the pieces of the answer, from the engine's thread."""

    prompt: list[int]
    max_new_tokens: int
    emit: Callable[[Piece], None]
    choice: Choice = field(default_factory=Choice)
    stop_ids: frozenset[int] = frozenset()
    stop_texts: Sequence[str] = ()
    constraint: Constraint | None = None
    deadline: float = float("inf")  # of `time.monotonic`
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    answer: list[int] = field(default_factory=list)
    cache: KVCache | None = None
    counts: Tensor | None = None  # [V], of the answer's tokens; None without a penalty that needs it
    seen: Tensor | None = None  # [V] bool, tokens of the prompt and the answer

    def start(self, cache: KVCache, vocab_size: int) -> None:
        """Prepare for decoding with a KV cache of its own."""
        self.cache = cache
        device = cache.keys.device
        self.generator = torch.Generator(device).manual_seed(self.choice.seed)
        self.text = TextStream(self.stop_texts)
        if self.choice.presence_penalty or self.choice.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        if self.choice.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[self.prompt] = True

    @property
    def capacity(self) -> int:
        """Return the number of tokens that its KV cache has to hold."""
        return len(self.prompt) + self.max_new_tokens

    def choose(self, logits: Tensor) -> TokenInfo:
        """Return the next token from the model's logits [V]."""
        choice, adjusted = self.choice, logits
        if self.counts is not None:
            adjusted = adjusted - self.counts * choice.frequency_penalty - (self.counts > 0) * choice.presence_penalty
        if self.seen is not None:
            adjusted = apply_repetition_penalty(adjusted, self.seen, choice.sampling.repetition_penalty)
        if choice.logit_bias:
            ids = torch.tensor(list(choice.logit_bias), device=logits.device)
            bias = torch.tensor(list(choice.logit_bias.values()), device=logits.device, dtype=logits.dtype)
            adjusted = adjusted.index_add(0, ids, bias)
        if self.constraint is not None:
            adjusted = self.constraint.mask(adjusted)
        token = int(sample(adjusted[None], choice.sampling, [self.generator]))
        if choice.logprobs is None:
            return TokenInfo(token, 0.0)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(choice.logprobs, len(logprobs)))
        return TokenInfo(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def add(self, info: TokenInfo, data: bytes) -> Piece:
        """Add a token and its bytes to the answer; return the piece of text that became certain."""
        self.answer.append(info.token)
        if self.counts is not None:
            self.counts[info.token] += 1
        if self.seen is not None:
            self.seen[info.token] = True
        return self.text.push(info, data)
