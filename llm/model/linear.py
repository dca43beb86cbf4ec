"""Linear layers, `x @ weight.T + bias`: on a CPU by oneDNN, or compiled for a single row.

PyTorch computes fp32 products with the BLAS that it was built with, usually MKL. For the few rows of decoding, MKL uses
one core and leaves half of the memory bandwidth idle. On processors of other makers it is slower in training too: it
leaves their AVX-512 unused (figures: docs/experiments.md). PyTorch contains oneDNN as well, and uses it for bf16 and in
compiled code. oneDNN sums in another order. Long inputs without gradients therefore use the BLAS: after thirty layers,
the logits of open weights still equal those of other implementations.

Shapes: I in_features, O out_features, N rows; a dot stands for any leading ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEW_ROWS = 16  # up to this many, the time is that of reading the weights
LARGE = 256  # from this size on, a matrix is worth a call of its own


class Linear(nn.Linear):
    """`nn.Linear` with the products of this module."""

    prefers_onednn = False  # for long inputs without gradients too

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.prefers_onednn)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, prefers_onednn: bool = False) -> Tensor:
    """Return `F.linear(x, weight, bias)` up to rounding: [., I] to [., O], differentiable in all three."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and _has_onednn(x, weight):
        y: Tensor = _Linear.apply(x, weight, bias)
        return y
    if is_compiled_row(x):
        y = row_product(x, weight)
        return y if bias is None else y + bias
    by_onednn = not torch.compiler.is_compiling() and (prefers_onednn or x.numel() <= FEW_ROWS * x.shape[-1])
    return product(x, weight, bias) if by_onednn else F.linear(x, weight, bias)


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return the outputs of several layers for the same inputs [., I]: at once where all are of a form that can."""
    products = getattr(layers[0], "products", None)
    if products is None or any(type(layer) is not type(layers[0]) for layer in layers):
        return [layer(x) for layer in layers]
    found: list[Tensor] = products(x, layers)
    return found


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` without gradients, by oneDNN for any number of rows."""
    if not _has_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def matrix_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products [n, r, c] of matrices [n, r, k] and [n, k, c] without gradients, by what is faster here."""
    if min(*a.shape[1:], b.shape[2]) < LARGE or not (_is_blas_slow() and _has_onednn(a, b)):
        return a @ b
    return torch.stack([product(x, y.mT) for x, y in zip(a, b, strict=True)])


@cache
def _is_blas_slow() -> bool:
    """Tell whether the BLAS is MKL on another maker's processor with AVX-512, where it has half of oneDNN's speed."""
    if not (torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
    """Return the gradient [O, I] of a weight, from that of the outputs [N, O] and the inputs [N, I]."""
    if not _is_blas_slow():
        return rows.T @ x  # oneDNN is no faster on transposed matrices
    return product(x.T, rows.T).T.contiguous() if rows.shape[1] > x.shape[1] else product(rows.T, x.T)


def _has_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def is_compiled_row(x: Tensor) -> bool:
    """Tell whether PyTorch's compiler is tracing a single row on a CPU, without gradients."""
    one = torch.compiler.is_compiling() and x.numel() == x.shape[-1]
    return one and x.device.type == "cpu" and not torch.is_grad_enabled()


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product [1, O] of a single row [1, I], with any leading ones, and weight [O, I].

    The compiler turns a sum into a loop that all cores share and that reads at the memory's speed. It turns a matrix
    product into a call of the BLAS.
    """
    row = x.contiguous().as_strided(x.shape[-1:], (1,))  # [I]; computed once before the loop, not in it for each O
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
            _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def replace_linears(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace all linear layers of a model, in place."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, replacement(child))
