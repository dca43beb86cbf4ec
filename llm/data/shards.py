"""Token shards of the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.common.errors import InputError
from llm.common.files import parse_json


class TokenShards:
    """The tokens of one split of the corpus, memory-mapped from its shard files."""

    def __init__(self, folder: Path, split: str) -> None:
        path = folder / "meta.json"
        try:
            meta = parse_json(path.read_text())
            info = meta["splits"][split]
            self.n_tokens: int = info["tokens"]
            self.n_bytes: int = info["bytes"]  # of the text, without separator tokens
            self.shards = [np.memmap(folder / name, dtype=meta["dtype"], mode="r") for name in info["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no readable token shards of split {split} ({error!r}); run tokenize") from None
        self.starts: np.ndarray[Any, Any] = np.cumsum([0, *(len(shard) for shard in self.shards)])
        if self.starts[-1] != self.n_tokens:
            raise InputError(
                f"{path}: {split} should hold {self.n_tokens} tokens, found {self.starts[-1]}; run tokenize"
            )

    def read(self, start: int, length: int) -> Tensor:
        """Tokens [length] from position `start`, across shards, as int64."""
        pieces = []
        while length > 0:
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[i][start - self.starts[i] : start - self.starts[i] + length]
            pieces.append(torch.from_numpy(piece.astype(np.int64)))
            start, length = start + len(piece), length - len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
