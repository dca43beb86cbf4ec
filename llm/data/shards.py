"""Token shards of the corpus, read without torch, and bits per byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from llm.common.errors import InputError
from llm.common.files import read_json

Array = np.ndarray[Any, np.dtype[Any]]


def bits_per_byte(nats: float, n_bytes: int, n_tokens: int = 1) -> float:
    """Convert the nats of a text, or of each of its `n_tokens`, to bits per byte, comparable across tokenizers."""
    return nats / math.log(2) * n_tokens / max(n_bytes, 1)


class TokenShards:
    """The tokens of one split of the corpus, memory-mapped from its shard files."""

    def __init__(self, folder: Path, split: str) -> None:
        path = folder / "meta.json"
        meta = read_json(path, "run tokenize")
        try:
            info = meta["splits"][split]
            self.n_tokens: int = info["tokens"]
            self.n_bytes: int = info["bytes"]  # of the text, without separator tokens
            self.shards = [np.memmap(folder / name, dtype=meta["dtype"], mode="r") for name in info["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no readable token shards of split {split} ({error!r}); run tokenize") from None
        self.starts: Array = np.cumsum([0, *(len(shard) for shard in self.shards)])
        if self.starts[-1] != self.n_tokens:
            raise InputError(
                f"{path}: {split} should hold {self.n_tokens} tokens, found {self.starts[-1]}; run tokenize"
            )

    def bpb(self, loss: float) -> float:
        """Convert a mean loss in nats per token to bits per byte."""
        return bits_per_byte(loss, self.n_bytes, self.n_tokens)

    def read(self, start: int, length: int) -> Array:
        """Return the tokens [length] from position `start`, across shards, as int64."""
        pieces = [np.zeros(0, np.int64)]
        while length > 0:
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i][start - self.starts[i] : start - self.starts[i] + length]
            pieces.append(piece.astype(np.int64))
            start, length = start + len(piece), length - len(piece)
        return np.concatenate(pieces)
