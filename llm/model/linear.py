"""Linear layers, `x @ weight.T + bias`: on a CPU by oneDNN, compiled for a single row, packed for a few, or of 8 bits.

PyTorch hands such products in fp32 to the BLAS that it was built with, most often MKL. For the few rows of decoding
that uses a single core, so that half of the memory's bandwidth lies idle, and on other makers' processors it trails in
training too (docs/experiments.md has figures). oneDNN is inside of PyTorch as well, which uses it for bf16 and in what
it compiles. It adds in another order: a whole text without gradients is left to the BLAS, so that the logits of open
weights are, thirty layers deep, those that others compute.

Shapes: I in_features, O out_features; a dot stands for any leading ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEW_ROWS = 16  # up to which the time goes into reading the weights


class Linear(nn.Linear):
    """As `nn.Linear`, up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[., I] times weight [O, I], plus bias [O]: [., O]; differentiable in all three. Up to rounding `F.linear`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and _has_onednn(x, weight):
        y: Tensor = _Linear.apply(x, weight, bias)
        return y
    if _is_compiled_row(x):
        y = _row_product(x, weight)
        return y if bias is None else y + bias
    return product(x, weight, bias) if x.numel() <= FEW_ROWS * x.shape[-1] else F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without gradients, by oneDNN however many rows there are."""
    if not _has_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _has_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def _is_compiled_row(x: Tensor) -> bool:
    """Whether PyTorch's compiler is reading this for a single row on a CPU, without gradients."""
    one = torch.compiler.is_compiling() and x.numel() == x.shape[-1]
    return one and x.device.type == "cpu" and not torch.is_grad_enabled()


def _row_product(x: Tensor, weight: Tensor) -> Tensor:
    """[1, I], with any number of ones before it, times weight [O, I]: [1, O].

    Of a sum the compiler makes a loop that all cores share and that reads as fast as memory gives, of a product a call
    of the BLAS.
    """
    row = x.contiguous().as_strided(x.shape[-1:], (1,))  # [I]; so it is computed before that loop, not in it for each O
    return (weight.to(x.dtype) * row).sum(-1).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [N, O]
        return (
            product(grad, weight.T) if wants_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None,  # oneDNN is no faster on turned matrices
            rows.sum(0) if wants_bias else None,
        )


# ---- for inference alone ---------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A layer whose weights lie in the order in which oneDNN reads them; else it turns them around in each product.

    For a few rows that takes up to a third of the time. There is no way back to plain weights.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), FEW_ROWS)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def to_packed(model: nn.Module) -> None:
    """Replaces all linear layers that oneDNN computes, in place: decoding of batches gets faster, up to rounding.

    A tied head takes the memory of a second embedding.
    """
    _replace(model, lambda layer: PackedLinear(layer) if _has_onednn(layer.weight, layer.weight) else layer)


def _replace(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, replacement(child))
