"""The device that a model runs on. Torch is imported late: stages ask for the kind without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm.common.errors import InputError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
X86_BF16 = ("avx512_bf16", "amx_bf16")


def device_kind(name: str) -> str:
    """Return cuda, mps or cpu; `auto` is CUDA, else Apple's MPS, else the CPU."""
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bf16_units(kind: str, *names: str) -> bool:
    """Return whether a kind of device computes bf16 products: CUDA, or a CPU with AVX512_BF16, AMX or ARM's units.

    With `names` of a CPU's units, these alone count.
    """
    import torch

    if kind != "cpu":
        return kind == "cuda"
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in names or (*X86_BF16, "bf16"))


def is_fast_in_bf16(kind: str) -> bool:
    """Return whether training in bf16 is known to be faster: on CUDA and on x86 with units for it."""
    return has_bf16_units(kind, *X86_BF16)


def pick_device(name: str) -> torch.device:
    """Return the device of that kind; raise `InputError` where this machine has none."""
    import torch

    kind = device_kind(name)
    usable = {"auto": True, "cpu": True}
    usable |= {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(kind):
        expected = ", ".join(each for each in usable if usable[each])
        raise InputError(
            f"device: not available here (expected {expected}, got {kind}); change --device or runtime.device"
        )
    return torch.device(kind)
