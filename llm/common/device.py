"""The device that a model runs on."""

from __future__ import annotations

import torch

from llm.common.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("runtime.device: mps was asked for, but torch sees no Apple GPU; use auto or cpu")
    return torch.device(name)
