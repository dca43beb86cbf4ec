"""Measure what a model recites: passages of its training text, continued greedily, against held-out ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llm.common.errors import InputError
from llm.data.shards import TokenShards
from llm.inference.generate import generate
from llm.model.gpt import GPT

PASSAGE = 50  # tokens that are shown, and as many that should follow


class Memorised(NamedTuple):
    """The number of passages that a model continues verbatim."""

    passages: int
    verbatim: int  # continued over all of `PASSAGE` tokens
    mean_tokens: float  # that are the right ones, up to the first wrong one
    longest: list[int]  # tokens: the longest continuation that is verbatim


def memorised(model: GPT, shards: TokenShards, passages: int, seed: int) -> Memorised:
    """Continue passages drawn at random from a split, all in one batch; equal text is told by its tokens."""
    room = shards.n_tokens - 2 * PASSAGE
    if room < 1 or model.config.context_length < 2 * PASSAGE:
        raise InputError(f"memorisation needs {2 * PASSAGE} tokens of text and of context; leave it out")
    starts = np.random.default_rng(seed).choice(room, size=min(passages, room), replace=False)
    texts = [shards.read(int(start), 2 * PASSAGE).tolist() for start in starts]
    said = generate(model, [text[:PASSAGE] for text in texts], max_new_tokens=PASSAGE)
    right = []
    for text, tokens in zip(texts, said, strict=True):
        same = [a == b for a, b in zip(text[PASSAGE:], tokens, strict=True)]
        right.append(same.index(False) if False in same else len(same))
    best = int(np.argmax(right))
    longest = texts[best][PASSAGE : PASSAGE + right[best]]
    return Memorised(len(texts), sum(n == PASSAGE for n in right), float(np.mean(right)), longest)
