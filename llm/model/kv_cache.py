"""The key-value cache of a GPT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.config import GPTConfig


class KVCache:
    """Keys and values of all layers, allocated once for `max_length` tokens a row; `length` tokens are filled.

    A call may have fewer rows than the cache: they are its first ones.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # [layers, B, K, max_length, D]
        self.values = torch.zeros_like(self.keys)
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's [B, K, T, D] behind what it holds; returns all of it, [B, K, S, D], without a copy."""
        rows, end = keys.shape[0], self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} were asked for")
        self.keys[layer, :rows, :, self.length : end] = keys
        self.values[layer, :rows, :, self.length : end] = values
        return self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]

    def slice(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What a row holds from one position to another: 2 x [layers, K, end - start, D], without a copy."""
        return self.keys[:, row, :, start:end], self.values[:, row, :, start:end]

    def write(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Copies a part [layers, K, n, D] into a row."""
        end = start + keys.shape[2]
        self.keys[:, row, :, start:end] = keys
        self.values[:, row, :, start:end] = values

    def reorder(self, rows: Sequence[int]) -> None:
        """Makes the given rows the first ones, in that order."""
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            to, of = map(list, zip(*moved, strict=True))
            self.keys[:, to, :, : self.length] = self.keys[:, of, :, : self.length]
            self.values[:, to, :, : self.length] = self.values[:, of, :, : self.length]

    def shift(self, n: int) -> None:
        """Moves all that it holds by n positions, to the left where n is negative: what leaves is forgotten."""
        kept = slice(max(0, -n), self.length)
        self.length += n
        self.keys[..., max(0, n) : self.length, :] = self.keys[..., kept, :].clone()
        self.values[..., max(0, n) : self.length, :] = self.values[..., kept, :].clone()
