"""A prompt that is being continued."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.inference.sampling import Sampling
from llm.model.gpt import GPT


@dataclass(eq=False)
class Request:
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


def make_requests(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], sampling: Sampling, seed: int
) -> list[Request]:
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
        rows.append(Request(number, context, left, torch.Generator(device).manual_seed(seed + number), seen))
    return rows


@contextlib.contextmanager
def eval_mode(*models: GPT) -> Iterator[None]:
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
