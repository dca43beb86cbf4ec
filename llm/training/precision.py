"""Precision of matrix products, and memory reuse."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

from llm.common.device import has_bf16_units, is_fast_in_bf16
from llm.common.errors import InputError
from llm.config import TrainParams


def autocast(device: torch.device, params: TrainParams) -> contextlib.AbstractContextManager[Any]:
    """Return bf16 autocast where `uses_bf16_autocast` says so; weights and all else stay fp32.

    Also sets, for the whole process, whether a GPU computes fp32 products as TF32 (10 bits of mantissa, not 23).
    """
    bf16 = uses_bf16_autocast(device, params)
    torch.set_float32_matmul_precision("high" if params.precision == "tf32" else "highest")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def uses_bf16_autocast(device: torch.device, params: TrainParams) -> bool:
    """Return whether products are computed in bf16.

    A device without units for it would take a hundred times as long: there it is an error.
    """
    precision = params.resolve_precision(is_fast_in_bf16(device.type))
    if (precision == "bf16" and not has_bf16_units(device.type)) or (precision == "tf32" and device.type != "cuda"):
        raise InputError(
            f"training.precision: {precision} was asked for, but this {device.type} device has no units for it; "
            "use auto or fp32"
        )
    return precision == "bf16"


def base_dtype(device: torch.device, params: TrainParams) -> torch.dtype | None:
    """Return the dtype to load a base in: None (as stored) under bf16 autocast, else fp32."""
    return None if uses_bf16_autocast(device, params) else torch.float32


def tune_malloc() -> None:
    """Let glibc keep freed memory for the next step, instead of returning it to the system page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block becomes a mapping of its own, which would be returned
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: as much free heap stays
