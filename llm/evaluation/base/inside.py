"""A base model's view of a held-out text: what each token costs it, and where a head looks.

Shapes: T tokens, H n_heads.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.checkpoint.folder import Checkpoint
from llm.data.shards import TokenShards
from llm.inference.layers import run_layers
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer

TEXT_TOKENS = 160  # of the text whose losses are shown
PASSAGE_TOKENS = (8, 22)  # of the sentences whose attention is shown: at least, at most


class Inside(NamedTuple):
    """Losses of the tokens of a text, in nats, and one head's attention [T, T] over its first sentences."""

    tokens: list[str]
    losses: list[float]  # the first is 0: nothing was read before it
    layer: int
    head: int
    attention: NDArray[np.float32]


def look_inside(folder: Checkpoint, corpus: Path) -> Inside | None:
    """Look into a base model over the first held-out document; None where it is too short."""
    model, tokenizer, _ = folder
    assert isinstance(model, GPT)
    ids = first_document(corpus, tokenizer, min(TEXT_TOKENS, model.config.context_length))
    if len(ids) < PASSAGE_TOKENS[0]:
        return None
    layers = list(run_layers(model, ids))
    with torch.inference_mode():
        logprobs = model.lm_head(model.final_norm(layers[-1].stream)).float().log_softmax(-1)
        losses = [-float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    pieces = token_texts(tokenizer, ids)
    length = passage_length(pieces)
    layer, head = farthest_head([each.attention[:, :length, :length] for each in layers[1:]])
    shown = layers[1 + layer].attention[head, :length, :length]
    return Inside(pieces, [0.0, *losses], layer, head, shown.cpu().numpy())


def first_document(corpus: Path, tokenizer: Tokenizer, length: int) -> list[int]:
    """Return the beginning of the first document of test, or of val where there is no test, without separators."""
    shards = [TokenShards(corpus, split) for split in ("test", "val")]
    held_out = next((each for each in shards if each.n_tokens > 1), None)
    ids = [] if held_out is None else held_out.read(0, min(held_out.n_tokens, length)).tolist()
    end = ids.index(tokenizer.eot) if tokenizer.eot in ids else len(ids)
    return list(ids[:end])


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return each token's text, with the characters that end in it: one may be spread over several tokens."""
    texts = [tokenizer.decode_bytes(ids[:n]).decode("utf-8", errors="ignore") for n in range(len(ids) + 1)]
    return [text[len(before) :] for before, text in pairwise(texts)]


def passage_length(pieces: list[str]) -> int:
    """Return the number of tokens of whole sentences, within bounds."""
    least, most = PASSAGE_TOKENS
    ends = [n for n, piece in enumerate(pieces[:most], 1) if n >= least and piece.strip().endswith((".", "!", "?"))]
    return max(ends, default=min(most, len(pieces)))


def farthest_head(attention: list[Tensor]) -> tuple[int, int]:
    """Return layer and head, of [H, T, T] each, with the most attention on tokens before the last but the first."""
    n = attention[0].shape[-1]
    far = torch.ones(n, n).tril(-2)
    far[:, 0] = 0
    shares = torch.stack([(each.cpu() * far).sum((-2, -1)) for each in attention])  # [layers, H]
    layer, head = divmod(int(shares.argmax()), shares.shape[1])
    return layer, head
