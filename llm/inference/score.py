"""Bits per byte of a text under a model."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.common.errors import InputError
from llm.model.gpt import GPT


class Score(NamedTuple):
    """What a text cost a model: the negative log likelihood of its scored tokens, in nats."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bpb(self, n_bytes: int) -> float:
        """Comparable across tokenizers: `n_bytes` is the length of the text in UTF-8."""
        return self.nats / math.log(2) / max(n_bytes, 1)


MAX_TOKENS = 2**15  # of the windows that are scored together: a long context leaves room for few of them


class TokenSource(Protocol):
    """Token ids that need not fit into memory, such as `llm.data.shards.TokenShards`."""

    n_tokens: int

    def read(self, start: int, length: int) -> Tensor: ...


class _Memory:
    def __init__(self, idx: Tensor) -> None:
        self.idx, self.n_tokens = idx, len(idx)

    def read(self, start: int, length: int) -> Tensor:
        return self.idx[start : start + length]


@torch.inference_mode()
def score_tokens(model: GPT, idx: Tensor | TokenSource, batch_size: int = 16, max_tokens: int | None = None) -> Score:
    """Scores token ids [N], or the first `max_tokens` of them, each once.

    No token is put in front, so the first one has nothing that predicts it and is left unscored. A text longer than
    the context is read in windows of the full context that overlap by half: every token behind the first window is
    predicted from at least half a context.
    """
    tokens = _Memory(idx) if isinstance(idx, Tensor) else idx
    T = model.config.context_length
    if T < 2:
        raise InputError("a model with a context_length of 1 predicts nothing from a text; scoring needs 2 or more")
    n_tokens = min(tokens.n_tokens, max_tokens or tokens.n_tokens)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    try:
        # Window by window: where it starts, and the first token that it scores.
        windows = [(0, 1)] if n_tokens > 1 else []
        while windows and windows[-1][0] + T < n_tokens:
            windows.append((windows[-1][0] + T // 2, windows[-1][0] + T))
        rows = max(1, min(batch_size, MAX_TOKENS // T))
        for i in range(0, len(windows), rows):
            nats += _score_windows(model, tokens, windows[i : i + rows], n_tokens, device)
    finally:
        model.train(was_training)
    return Score(nats, max(n_tokens - 1, 0))


def _score_windows(
    model: GPT, tokens: TokenSource, windows: list[tuple[int, int]], n_tokens: int, device: torch.device
) -> float:
    T = min(model.config.context_length, n_tokens - windows[0][0])
    idx = torch.zeros(len(windows), T, dtype=torch.long)  # [B, T]; nothing reads the padding behind a short last window
    counted = torch.zeros(len(windows), T, dtype=torch.bool)  # [B, T]: the tokens that this window scores
    for b, (start, first) in enumerate(windows):
        window = tokens.read(start, min(T, n_tokens - start))
        idx[b, : len(window)] = window
        counted[b, first - start : len(window)] = True
    idx, counted = idx.to(device), counted.to(device)
    hidden = model.hidden_states(idx[:, :-1])[counted[:, 1:]]  # [scored, C]
    targets = idx[counted]  # [scored]
    rows = max(1, 2**24 // model.config.vocab_size)  # logits of at most 64 MB at a time
    nats = 0.0
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        nats += F.cross_entropy(model.lm_head(h).float(), t, reduction="none").cpu().double().sum().item()
    return nats
