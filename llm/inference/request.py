"""Requests: prompts and the state of their decoding, and the decoder that continues them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT
from llm.model.kv_cache import KVCache


class Decoder(Protocol):
    """A `GPT` or the `CompiledDecoder` of one, which maps token ids [B, T] to logits [B, T, V]."""

    @property
    def gpt(self) -> GPT: ...

    def __call__(self, idx: Tensor, cache: KVCache, pad: Tensor | None = None) -> Tensor: ...


@dataclass(eq=False)
class Request:
    """A prompt and the state of its decoding."""

    index: int  # of the prompt in the call
    context: list[int]  # tokens that the model reads: the prompt and the new ones, or the last part of both
    remaining: int  # tokens that may still be added
    generator: torch.Generator
    seen: Tensor | None  # [V] bool, the tokens that occurred; None without a repetition penalty

    def add(self, token: int) -> None:
        self.context.append(token)
        self.remaining -= 1
        if self.seen is not None:
            self.seen[token] = True

    def truncate(self, context_length: int) -> bool:
        """Cut a context that is longer than the model's to its last half; return whether it was."""
        if len(self.context) <= context_length:
            return False
        self.context = self.context[-((context_length + 1) // 2) :]
        return True


def make_requests(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], sampling: Sampling, seed: int
) -> list[Request]:
    """Return a request for each prompt; raise `InputError` for an empty prompt and for numbers out of range."""
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(limits) != len(prompts):
        raise InputError(f"max_new_tokens: expected a number for each of {len(prompts)} prompts, found {len(limits)}")
    if (least := min(limits, default=0)) < 0:
        raise InputError(f"max_new_tokens must be 0 or more, found {least}")
    if not 0 <= seed < 2**63 - len(prompts):
        raise InputError(f"seed must be between 0 and 2^63, found {seed}")
    device = model.tok_emb.weight.device
    requests = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            which = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise InputError(f"{which} is empty; give at least one token to continue")
        context = list(prompt[-model.config.context_length :])
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
            seen[context] = True
        requests.append(Request(index, context, limit, torch.Generator(device).manual_seed(seed + index), seen))
    return requests


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for a while."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
