"""Linear layers in fp32 with their weights in the order of a kernel of our own: faster for the few rows of decoding.

oneDNN reorders plain weights in each product, up to a third of the time for a few rows.

Shapes: N rows, I in_features, O out_features in blocks of 16; a dot stands for any leading ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.inference.kernels.build import BLOCK
from llm.inference.prefill import use_prompt_kernels
from llm.model.gpt import GPT
from llm.model.linear import replace_linears


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, equal up to rounding. Needs `load_kernels`.

    A row's result does not depend on the other rows.
    """

    weight: Tensor  # [O / 16, I, 16] fp32

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        padded = F.pad(layer.weight.detach(), (0, 0, 0, -layer.out_features % BLOCK))  # with outputs of weight 0
        self.register_buffer("weight", padded.view(-1, BLOCK, layer.in_features).transpose(1, 2).contiguous())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()  # [N, I]
        y = torch.ops.textmill.float_product(rows, self.weight)[:, : self.out_features]  # [N, O]
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def to_packed(model: GPT) -> None:
    """Pack all linear layers in fp32 on a CPU, in place, and use the kernels for prompts. Needs `load_kernels`.

    A tied head takes the memory of a second embedding.
    """

    def packs(layer: nn.Linear) -> bool:
        return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32

    replace_linears(model, lambda layer: PackedLinear(layer) if packs(layer) else layer)
    use_prompt_kernels(model)
