"""The dtype of matrix products."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

from llm.common.errors import InputError
from llm.config import RuntimeParams


def precision(device: torch.device, runtime: RuntimeParams) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bf16 where `uses_bf16_autocast` says so, with weights and all else in fp32.

    Whether a GPU may make those in fp32 as TF32, with 10 bits of mantissa in place of 23, is a setting of the process.
    """
    torch.set_float32_matmul_precision("high" if runtime.precision == "tf32" else "highest")
    return (
        torch.autocast(device.type, torch.bfloat16) if uses_bf16_autocast(device, runtime) else contextlib.nullcontext()
    )


def uses_bf16_autocast(device: torch.device, runtime: RuntimeParams) -> bool:
    """Whether products are made in bf16: on CUDA if nothing else is said, on a CPU where it is asked for.

    A CPU without units for them would take a hundred times as long: there it is refused.
    """
    if runtime.precision == "auto":
        return device.type == "cuda"
    has_units = device.type == "cuda" or (runtime.precision == "bf16" and device.type == "cpu" and has_bf16_units())
    if runtime.precision in ("bf16", "tf32") and not has_units:
        raise InputError(
            f"runtime.precision: {runtime.precision} was asked for, but this {device.type} device has no units for it; "
            "use auto or fp32"
        )
    return runtime.precision == "bf16"


def has_bf16_units() -> bool:
    """Of this CPU: x86's AVX512 or AMX, or ARM's."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def base_dtype(device: torch.device, runtime: RuntimeParams) -> torch.dtype | None:
    """Return the dtype to load a base in: None (as stored) under bf16 autocast, else fp32."""
    return None if uses_bf16_autocast(device, runtime) else torch.float32


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, which would have to be given it again page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which would go back to the system
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: as much free heap stays
