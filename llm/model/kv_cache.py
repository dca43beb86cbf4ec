"""The key-value cache of a GPT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.config import GPTConfig


class KVCache:
    """Keys and values of all layers, allocated once for `max_length` tokens a row; the first `length` are in use.

    A batch may have fewer rows than the cache: it uses the first ones.
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
        """Append a layer's keys and values [B, K, T, D]; return all of that layer's [B, K, S, D] as views."""
        rows, end = keys.shape[0], self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} were asked for")
        self.keys[layer, :rows, :, self.length : end] = keys
        self.values[layer, :rows, :, self.length : end] = values
        return self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]

    def slice(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return a row's keys and values from `start` to `end` as views, 2 x [layers, K, end - start, D]."""
        return self.keys[:, row, :, start:end], self.values[:, row, :, start:end]

    def write(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [layers, K, n, D] into a row, from `start` on."""
        end = start + keys.shape[2]
        self.keys[:, row, :, start:end] = keys
        self.values[:, row, :, start:end] = values

    def reorder(self, rows: Sequence[int]) -> None:
        """Move the given rows to the front, in that order."""
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        if moved:
            to, source = map(list, zip(*moved, strict=True))
            self.keys[:, to, :, : self.length] = self.keys[:, source, :, : self.length]
            self.values[:, to, :, : self.length] = self.values[:, source, :, : self.length]

    def shift(self, n: int) -> None:
        """Move all rows by n positions to the right; a negative n moves left and drops the first -n positions."""
        kept = slice(max(0, -n), self.length)
        self.length += n
        self.keys[..., max(0, n) : self.length, :] = self.keys[..., kept, :].clone()
        self.values[..., max(0, n) : self.length, :] = self.values[..., kept, :].clone()
