"""Sampling: from logits to the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import InputError
from llm.tokenizer.chat_source import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token from the logits; the fields apply in this order.

    A `temperature` of 0 is greedy: the most likely token after the repetition penalty, without filters. Each filter
    sees the distribution that the previous one left, and keeps at least one token.
    """

    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens that occurred (CTRL, 2019)
    temperature: float = 0.0  # divides all logits
    top_k: int | None = None  # keeps the k most likely tokens
    top_p: float | None = None  # keeps the fewest most likely tokens that reach this probability (Holtzman et al. 2020)
    min_p: float | None = None  # keeps tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024)

    def __post_init__(self) -> None:
        """Raise `InputError` for a value out of range; NaN always is."""
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


def sampling_of(settings: GenerationConfig) -> Sampling:
    """Return the choice of tokens that a model's generation settings state.

    They are greedy where `do_sample` is false, and where neither it nor any filter is stated.
    """
    stated = any(value is not None for value in (settings.temperature, settings.top_k, settings.top_p, settings.min_p))
    penalty = 1.0 if settings.repetition_penalty is None else settings.repetition_penalty
    if settings.do_sample is False or not (settings.do_sample or stated):
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        repetition_penalty=penalty,
        temperature=1.0 if settings.temperature is None else settings.temperature,
        top_k=settings.top_k or None,  # 0: off
        top_p=settings.top_p,
        min_p=settings.min_p,
    )


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` [B, V] (bool) less likely in the logits [B, V], or likelier by a penalty below 1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set the logits [B, V] to -inf for the tokens that top-k, then top-p, then min-p exclude."""
    if sampling.top_k is not None:
        values, ids = logits.topk(min(sampling.top_k, logits.shape[-1]))  # [B, k]
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities, ids = logits.softmax(-1).sort(descending=True, stable=True)  # [B, V], most likely first
        before = probabilities.cumsum(-1) - probabilities  # the sum of the likelier tokens
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        smallest = sampling.min_p * probabilities.amax(-1, keepdim=True)  # [B, 1]
        logits = logits.masked_fill(probabilities < smallest, -torch.inf)
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution [B, V] that tokens are drawn from; a greedy choice has probability 1."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # largest 0: no overflow when it is tiny
    return filter_logits(scaled, sampling).softmax(-1)


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Sample token ids [B] from logits [B, V], each row with its own generator."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    rows = zip(probabilities(logits, sampling), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
