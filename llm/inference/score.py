"""Bits per byte of a text under a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llm.common.errors import InputError
from llm.data.shards import TokenShards, bits_per_byte
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


MAX_TOKENS = 2**15  # of a batch of windows


def score_tokens(model: GPT, idx: Tensor | TokenShards, batch_size: int = 16, max_tokens: int | None = None) -> Score:
    """Score token ids [N], or the first `max_tokens` of them, each once; see `token_nats`."""
    nats = token_nats(model, idx, batch_size, max_tokens)
    return Score(float(nats.sum()), len(nats))


@torch.inference_mode()
def token_nats(
    model: GPT, idx: Tensor | TokenShards, batch_size: int = 16, max_tokens: int | None = None
) -> NDArray[np.float64]:
    """Return the loss of each token but the first in nats: [N - 1].

    The first token has no context and is not scored. A text longer than the context is read in windows of the full
    context that overlap by half: after the first window, each token is predicted from at least half a context.
    """
    T = model.config.context_length
    if T < 2:
        raise InputError("a model with a context_length of 1 predicts nothing from a text; scoring needs 2 or more")
    total = len(idx) if isinstance(idx, Tensor) else idx.n_tokens
    n_tokens = min(total, max_tokens or total)
    spans = window_spans(n_tokens, T)
    rows = max(1, min(batch_size, MAX_TOKENS // T))
    nats = [np.zeros(0)]
    with eval_mode(model):
        for i in range(0, len(spans), rows):
            windows = []
            for start, first in spans[i : i + rows]:
                n = min(T, n_tokens - start)
                window = idx[start : start + n] if isinstance(idx, Tensor) else torch.as_tensor(idx.read(start, n))
                windows.append((window, first - start))
            nats.append(_score_windows(model, windows))
    return np.concatenate(nats)


def window_spans(n_tokens: int, context_length: int) -> list[tuple[int, int]]:
    """Return the start of each window over a text, and the first token that it scores."""
    spans = [(0, 1)] if n_tokens > 1 else []
    while spans and spans[-1][0] + context_length < n_tokens:
        spans.append((spans[-1][0] + context_length // 2, spans[-1][0] + context_length))
    return spans


def _score_windows(model: GPT, windows: list[tuple[Tensor, int]]) -> NDArray[np.float64]:
    """Return the losses in nats of windows, each from its first scored token on."""
    idx = torch.zeros(len(windows), len(windows[0][0]), dtype=torch.long)  # [B, T]; only the last window may be shorter
    scored = torch.zeros_like(idx, dtype=torch.bool)  # [B, T]
    for b, (window, first) in enumerate(windows):
        idx[b, : len(window)] = window
        scored[b, first : len(window)] = True
    idx, scored = (t.to(model.tok_emb.weight.device) for t in (idx, scored))
    hidden = model.hidden_states(idx[:, :-1])[scored[:, 1:]]  # [N, C]
    targets = idx[scored]  # [N]
    rows = max(1, 2**24 // model.config.vocab_size)  # logits of at most 64 MB at a time
    nats = []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        nats.append(F.cross_entropy(model.lm_head(h).float(), t, reduction="none").cpu().double().numpy())
    return np.concatenate(nats)


class Continuation(NamedTuple):
    """The negative log likelihood of a continuation, in nats; `greedy` where each token is the likeliest one."""

    nats: float
    tokens: int
    greedy: bool


@torch.inference_mode()
def score_continuations(
    model: GPT, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 32
) -> list[Continuation]:
    """Score each continuation behind its context, both as tokens.

    Where both are longer than the model's context, the beginning of theirs is left out. Raises `InputError` for an
    empty context and for a continuation that is longer than the model's context.
    """
    T, device = model.config.context_length, model.tok_emb.weight.device
    for number, (context, continuation) in enumerate(pairs):
        if not context or len(continuation) > T:
            raise InputError(
                f"continuation {number}: expected a context and at most {T} tokens behind it, the model's context, got "
                f"{len(context)} and {len(continuation)}"
            )
    rows = [[*context, *continuation][-T - 1 :] for context, continuation in pairs]
    found = [Continuation(0.0, 0, True)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(rows[i]))
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            idx = torch.zeros(len(chosen), len(rows[chosen[-1]]), dtype=torch.long)  # [B, T], padded on the right
            scored = torch.zeros_like(idx, dtype=torch.bool)
            for b, i in enumerate(chosen):
                idx[b, : len(rows[i])] = torch.tensor(rows[i])
                scored[b, len(rows[i]) - len(pairs[i][1]) : len(rows[i])] = True
            idx, scored = idx.to(device), scored.to(device)
            logits = model.lm_head(model.hidden_states(idx[:, :-1])[scored[:, 1:]]).float()  # [N, V]
            nats = F.cross_entropy(logits, idx[scored], reduction="none").double().cpu()
            right = (logits.argmax(dim=-1) == idx[scored]).cpu()
            sizes = [len(pairs[i][1]) for i in chosen]
            for i, loss, hits in zip(chosen, nats.split(sizes), right.split(sizes), strict=True):
                found[i] = Continuation(float(loss.sum()), len(pairs[i][1]), bool(hits.all()))
    return found
