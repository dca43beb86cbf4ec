"""The device that a model runs on. Torch is imported late: stages ask for the kind without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm.common.errors import InputError

if TYPE_CHECKING:
    import torch


def device_kind(name: str) -> str:
    """Return cuda, mps or cpu; `auto` is CUDA, else Apple's MPS, else the CPU."""
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_device(name: str) -> torch.device:
    """Return the device of that kind; raise `InputError` where this machine has none."""
    import torch

    kind = device_kind(name)
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device: cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("runtime.device: mps was asked for, but torch sees no Apple GPU; use auto or cpu")
    return torch.device(kind)
