"""Linear layers with 8-bit weights: by kernels of our own where a C++ compiler is at hand, else by PyTorch's."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.inference.grouped import GroupedLinear
from llm.inference.kernels.build import load_kernels
from llm.inference.prefill import use_prompt_kernels
from llm.model.gpt import GPT
from llm.model.linear import linear, replace_linears

FEW_INT8_ROWS = 64  # up to this many, PyTorch's int8 kernel is faster

log = logging.getLogger("llm")


class Int8Linear(nn.Module):
    """A linear layer for inference with weights quantized to int8, and a scale for each output.

    PyTorch's kernel for a few rows rounds inputs and outputs to bf16.
    """

    weight: Tensor  # [O, I] int8, from -127 to 127
    scale: Tensor  # [O] bf16

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()  # [O, I]
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()  # [O]
        self.register_buffer("weight", (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [N, I]
        aligned = rows.shape[1] % 32 == 0  # otherwise the kernel reads out of bounds, and crashes
        if aligned and x.device.type == "cpu" and 0 < len(rows) <= FEW_INT8_ROWS:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)  # [N, O]
        else:
            y = linear(rows, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias


def to_int8(model: GPT) -> None:
    """Quantize all linear layers, in place; embeddings stay, as a token reads one row of them.

    Decoding a token reads all weights once: a quarter of the bytes.
    """
    if model.tok_emb.weight.device.type == "cpu":
        try:
            load_kernels()
        except InputError as error:
            log.info("8 bits by PyTorch's kernel, which is slower: %s", error)
        else:
            replace_linears(model, lambda layer: GroupedLinear(layer, 8))
            use_prompt_kernels(model)
            return
    replace_linears(model, Int8Linear)
