"""The header of a stored tensor, whatever the format of its file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class StoredTensor(NamedTuple):
    """Place and form of a tensor in a file of weights."""

    path: Path
    shape: tuple[int, ...]  # outermost dimension first
    dtype: str  # the format's own name: F32, BF16, Q8_0
    name: str = ""  # in a safetensors file, which finds a tensor by it
    start: int = 0  # byte in a GGUF file
    n_bytes: int = 0
