"""Bits per byte of a text under a model."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llm.common.errors import InputError
from llm.data.shards import bits_per_byte
from llm.inference.request import eval_mode
from llm.model.gpt import GPT


class Score(NamedTuple):
    """The negative log likelihood of a text's scored tokens, in nats."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Return the nats per scored token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bpb(self, n_bytes: int) -> float:
        """Return the bits per byte of a text of `n_bytes` in UTF-8, comparable across tokenizers."""
        return bits_per_byte(self.nats, n_bytes)


MAX_TOKENS = 2**15  # of the windows of a batch


class TokenSource(Protocol):
    """Token ids that need not fit into memory, such as `llm.data.shards.TokenShards`."""

    n_tokens: int

    def read(self, start: int, length: int) -> Tensor | NDArray[np.int64]: ...


class _InMemory:
    def __init__(self, idx: Tensor) -> None:
        self.idx, self.n_tokens = idx, len(idx)

    def read(self, start: int, length: int) -> Tensor:
        return self.idx[start : start + length]


@torch.inference_mode()
def score_tokens(model: GPT, idx: Tensor | TokenSource, batch_size: int = 16, max_tokens: int | None = None) -> Score:
    """Score token ids [N], or the first `max_tokens` of them, each once.

    The first token has no context and is not scored. A text longer than the context is read in windows of the full
    context that overlap by half: after the first window, each token is predicted from at least half a context.
    """
    tokens = _InMemory(idx) if isinstance(idx, Tensor) else idx
    T = model.config.context_length
    if T < 2:
        raise InputError("a model with a context_length of 1 predicts nothing from a text; scoring needs 2 or more")
    n_tokens = min(tokens.n_tokens, max_tokens or tokens.n_tokens)
    device = next(model.parameters()).device
    windows = [(0, 1)] if n_tokens > 1 else []  # the start of each, and the first token that it scores
    while windows and windows[-1][0] + T < n_tokens:
        windows.append((windows[-1][0] + T // 2, windows[-1][0] + T))
    rows = max(1, min(batch_size, MAX_TOKENS // T))
    nats = 0.0
    with eval_mode(model):
        for i in range(0, len(windows), rows):
            nats += _score_windows(model, tokens, windows[i : i + rows], n_tokens, device)
    return Score(nats, max(n_tokens - 1, 0))


def _score_windows(
    model: GPT, tokens: TokenSource, windows: list[tuple[int, int]], n_tokens: int, device: torch.device
) -> float:
    T = min(model.config.context_length, n_tokens - windows[0][0])
    idx = torch.zeros(len(windows), T, dtype=torch.long)  # [B, T]; a short last window is right-padded
    scored = torch.zeros(len(windows), T, dtype=torch.bool)  # [B, T]
    for b, (start, first) in enumerate(windows):
        window = torch.as_tensor(tokens.read(start, min(T, n_tokens - start)))
        idx[b, : len(window)] = window
        scored[b, first - start : len(window)] = True
    idx, scored = idx.to(device), scored.to(device)
    hidden = model.hidden_states(idx[:, :-1])[scored[:, 1:]]  # [N, C]
    targets = idx[scored]  # [N]
    rows = max(1, 2**24 // model.config.vocab_size)  # logits of at most 64 MB at a time
    nats = 0.0
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        nats += F.cross_entropy(model.lm_head(h).float(), t, reduction="none").cpu().double().sum().item()
    return nats
