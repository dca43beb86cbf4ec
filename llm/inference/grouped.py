"""Linear layers with weights of 4 or 8 bits in groups, computed by kernels of our own or by the plain formula.

A group is 32 inputs of an output, with a scale of its own in half precision. A weight of 4 bits is step * q + minimum,
with q from 0 to 15: llama.cpp's Q4_1. One of 8 bits is step * q, with q from -127 to 127: its Q8_0.

Shapes: N rows, I in_features, G groups of 32 inputs, O out_features in blocks of 16; a dot stands for any leading ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.inference.importance import input_importance
from llm.inference.kernels.build import BLOCK
from llm.inference.prefill import use_prompt_kernels
from llm.model.gpt import GPT
from llm.model.linear import linear, replace_linears

Bits = Literal[4, 8]
GROUP = 32  # inputs that share a scale
ZERO = 128  # the byte of a weight of 8 bits that is zero
SMALLEST_STEP = 2.0**-14  # the smallest number that half precision holds to all its digits


# ---- rounding --------------------------------------------------------------------------------------------------------


def round_to_4_bits(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights [O, I]; return q [O, G, 32] from 0 to 15, and step and minimum [O, G, 2] in half precision.

    The error of a group is the sum of its squared errors, each times the importance of its input [I]. The search begins
    with the whole range of the group and with parts of it, and fits step and minimum to the rounded weights by least
    squares. The choice with the least error is kept.
    """
    n_out, n_in = weight.shape
    q = torch.empty(n_out, n_in // GROUP, GROUP, dtype=torch.uint8)
    pair = torch.empty(n_out, n_in // GROUP, 2, dtype=torch.float16)
    inputs = [tensor.detach().float().cpu().contiguous() for tensor in (weight, importance)]
    torch.ops.textmill.int4_round(*inputs, q, pair)
    return q, pair


def round_to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights [O, I]; return q + 128 [O, G, 32] from 1 to 255, and the step [O, G, 1] in half precision."""
    groups = weight.detach().float().cpu().unflatten(1, (-1, GROUP))  # [O, G, 32]
    step = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_STEP).half()  # [O, G, 1]
    q = (groups / step.float()).round().clamp(-127, 127)
    return (q + ZERO).to(torch.uint8), step


# ---- the layers ------------------------------------------------------------------------------------------------------


class GroupedLinear(nn.Module):
    """A linear layer for inference with weights of 4 or 8 bits in groups. Needs `load_kernels`.

    On a CPU the inputs are rounded to 8 bits as well, each group of a row with its own scale. A row's result does not
    depend on the other rows. Elsewhere, and in fp64, weights are dequantized for each product.
    """

    weight: Tensor  # uint8; 4 bits: [O / 16, I * 8], in a byte the weights of an output for inputs 4 apart
    #                 8 bits: [O / 16, I * 16]
    scale: Tensor  # fp16; 4 bits: [O / 16, G, 2, 16], steps and minima; 8 bits: [O / 16, G, 1, 16], steps

    def __init__(self, layer: nn.Linear, bits: Bits, importance: Tensor | None = None) -> None:
        """Round the weights of a layer; `importance` [I] of its inputs, for 4 bits, is the same for all without it."""
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, layer.in_features, layer.out_features
        self.spare_inputs = -layer.in_features % GROUP  # of weight 0, as spare outputs are
        padded = F.pad(layer.weight.detach(), (0, self.spare_inputs, 0, -layer.out_features % BLOCK))
        if bits == 4:
            weights = F.pad(torch.ones(layer.in_features) if importance is None else importance, (0, self.spare_inputs))
            rounded = round_to_4_bits(padded, weights.clamp(min=1e-6 * float(weights.amax()) or 1.0))
        else:
            rounded = round_to_8_bits(padded)
        weight, scale = pack(*rounded, bits)
        self.register_buffer("weight", weight.to(layer.weight.device))
        self.register_buffer("scale", scale.to(layer.weight.device))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x, [self])[0]

    def products(self, x: Tensor, layers: Sequence[GroupedLinear]) -> list[Tensor]:
        """Return the outputs of layers of this form for the same inputs, which are rounded once."""
        if x.device.type == "cpu" and x.dtype != torch.float64:
            rows = x.reshape(-1, self.in_features).float()  # [N, I]
            if self.spare_inputs:
                rows = F.pad(rows, (0, self.spare_inputs))
            product = torch.ops.textmill.int4_product if self.bits == 4 else torch.ops.textmill.int8_product
            y = product(rows.contiguous(), [layer.weight for layer in layers], [layer.scale for layer in layers])
            parts = y.split([len(layer.weight) * BLOCK for layer in layers], 1)  # each [N, O]
            sizes = [(*x.shape[:-1], layer.out_features) for layer in layers]
            ys = [part[:, : size[-1]].reshape(size).to(x.dtype) for part, size in zip(parts, sizes, strict=True)]
        else:
            ys = [linear(x, layer.dequantized().to(x.dtype)) for layer in layers]
        return [y if layer.bias is None else y + layer.bias for y, layer in zip(ys, layers, strict=True)]

    def dequantized(self) -> Tensor:
        """Return the weights [O, I] in fp32."""
        q, pair = unpack(self.weight, self.scale, self.bits)
        step = pair[..., :1].float()
        weight = q.float() * step + pair[..., 1:].float() if self.bits == 4 else (q.float() - ZERO) * step
        return weight.flatten(1)[: self.out_features, : self.in_features]


def pack(q: Tensor, pair: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return the kernel's layout of q [O, G, 32] and of steps, with minima or without, [O, G, 2 or 1]; 16 divides O."""
    blocks, G = q.shape[0] // BLOCK, q.shape[1]
    if bits == 4:
        parts = q.view(blocks, BLOCK, G * 4, 2, 4)  # four inputs of the low halves, four of the high
        fours = parts[..., 0, :] | parts[..., 1, :] << 4  # [O / 16, 16, G * 4, 4]
    else:
        fours = q.view(blocks, BLOCK, G * 8, 4)  # [O / 16, 16, G * 8, 4]
    weight = fours.transpose(1, 2).reshape(blocks, -1)  # [O / 16, I * 8 or I * 16]
    return weight, pair.view(blocks, BLOCK, G, -1).permute(0, 2, 3, 1).contiguous()


def unpack(weight: Tensor, scale: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return q [O, G, 32] uint8 and steps, with minima or without, [O, G, 2 or 1]: the inverse of `pack`."""
    blocks, G = scale.shape[:2]
    fours = weight.view(blocks, -1, BLOCK, 4).transpose(1, 2)  # [O / 16, 16, G * 4 or G * 8, 4]
    if bits == 4:
        fours = torch.stack([fours & 15, fours >> 4], dim=3)
    return fours.reshape(blocks * BLOCK, G, GROUP), scale.permute(0, 3, 1, 2).reshape(blocks * BLOCK, G, -1)


def to_int4(model: GPT) -> None:
    """Quantize all linear layers, in place; embeddings stay, as a token reads one row of them. Needs `load_kernels`.

    The rounding is calibrated on text that the model itself samples, which takes some seconds.
    """
    importance = input_importance(model)
    replace_linears(model, lambda layer: GroupedLinear(layer, 4, importance[layer]))
    use_prompt_kernels(model)
