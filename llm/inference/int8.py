"""Linear layers with 8-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm.model.linear import _is_compiled_row, _replace, _row_product, linear

FEW_INT8_ROWS = 64  # up to which PyTorch's product with weights of 8 bits is the faster one


class Int8Linear(nn.Module):
    """A layer for inference whose weights are whole numbers from -127 to 127, with a scale for each row [I] of them.

    A new token costs the reading of all weights once: a quarter of the bytes, about half of the time. For a few rows
    inputs and outputs are rounded to bf16, which that kernel of PyTorch asks for; a compiled single row is not.
    """

    weight: Tensor  # [O, I] int8
    scale: Tensor  # [O] bf16

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()  # [O, I]
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()  # [O]
        self.register_buffer("weight", (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if _is_compiled_row(x):
            y = _row_product(x, self.weight) * self.scale.to(x.dtype)
            return y if self.bias is None else y + self.bias
        rows = x.reshape(-1, x.shape[-1])  # [N, I]
        whole = rows.shape[1] % 32 == 0  # on others that kernel reads beyond the end, and crashes
        if whole and x.device.type == "cpu" and 0 < len(rows) <= FEW_INT8_ROWS:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)  # [N, O]
        else:
            y = linear(rows, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias


def to_int8(model: nn.Module) -> None:
    """Replaces all linear layers, in place; embeddings stay, as a token reads a single row of them."""
    _replace(model, Int8Linear)
