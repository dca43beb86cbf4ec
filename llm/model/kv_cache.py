"""The key-value cache of a GPT, in the dtype of the model or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import GPTConfig

SCALE_BYTES = 4  # of a stored vector, behind its numbers
SMALLEST = 1e-30  # a vector without a larger number is stored as zero


class KVCache:
    """Keys and values of all layers, allocated once for `max_length` tokens a row; the first `length` are in use.

    A batch may have fewer rows than the cache: it uses the first ones. With `int8`, each key and each value of a head
    is rounded to 8 bits by a scale of its own, and read as it was stored. A token takes about a quarter of the memory.

    Shapes: E numbers of a stored vector, which are the D of a head, or with `int8` D bytes up to a multiple of 4 and an
    fp32 scale.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
    ) -> None:
        self.head_dim, self.dtype, self.int8 = config.head_dim, dtype, int8
        stored = -(-config.head_dim // 4) * 4 + SCALE_BYTES if int8 else config.head_dim
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_length, stored)
        self.keys = torch.zeros(
            shape, device=device, dtype=torch.int8 if int8 else dtype
        )  # [layers, B, K, max_length, E]
        self.values = torch.zeros_like(self.keys)
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values [B, K, T, D]; return all of that layer's [B, K, S, D] as views."""
        rows, end = keys.shape[0], self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} were asked for")
        self.keys[layer, :rows, :, self.length : end] = self.encode(keys)
        self.values[layer, :rows, :, self.length : end] = self.encode(values)
        return self.decode(self.keys[layer, :rows, :, :end]), self.decode(self.values[layer, :rows, :, :end])

    def encode(self, vectors: Tensor) -> Tensor:
        """Return keys or values [., D] as they are stored, [., E]."""
        if not self.int8:
            return vectors
        numbers, scale = round_to_int8(vectors)  # [., D], [., 1]
        spare = self.keys.shape[-1] - SCALE_BYTES - self.head_dim
        return torch.cat([F.pad(numbers, (0, spare)), scale.view(torch.int8)], -1)

    def decode(self, stored: Tensor) -> Tensor:
        """Return keys or values [., D] from what is stored, [., E]."""
        if not self.int8:
            return stored
        numbers, scale = self.split(stored)
        return (numbers * scale).to(self.dtype)

    def split(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers [., D] and scales [., 1] of a part of an int8 cache [., E], as views."""
        return stored[..., : self.head_dim], stored[..., -SCALE_BYTES:].view(torch.float32)

    def slice(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return a row's stored keys and values from `start` to `end` as views, 2 x [layers, K, end - start, E]."""
        return self.keys[:, row, :, start:end], self.values[:, row, :, start:end]

    def write(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write stored keys and values [layers, K, n, E] into a row, from `start` on."""
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


def round_to_int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors [., D] rounded to int8, and the fp32 scales [., 1] that give them back; a zero has 1."""
    vectors = vectors.float()
    largest = vectors.abs().amax(-1, keepdim=True)  # [., 1]
    scale = torch.where(largest > SMALLEST, largest / 127, 1.0)
    return (vectors / scale).round().to(torch.int8), scale
