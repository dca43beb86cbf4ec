"""LoRA (Hu et al. 2021): low-rank adapters beside frozen linear layers, and their merge into the base weights.

Shapes: r rank, I in_features and O out_features of a linear layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.common.errors import InputError
from llm.config import LoRAParams
from llm.model.classifier import GPTClassifier
from llm.model.gpt import GPT


class LoRALinear(nn.Module):
    """A linear layer with an adapter: W x + b + alpha / rank * B A dropout(x).

    W and b are frozen in their dtype, A and B are trained in fp32. B starts at zero: a new adapter adds nothing.
    """

    def __init__(self, base: nn.Linear, params: LoRAParams) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = params.alpha / params.rank
        self.dropout = nn.Dropout(params.dropout)
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(params.rank, base.in_features, device=device, dtype=torch.float32))  # [r, I]
        self.B = nn.Parameter(torch.zeros(base.out_features, params.rank, device=device, dtype=torch.float32))  # [O, r]
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # nn.Linear's own; the paper gives no width for its Gaussian

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # [..., O]
        low = F.linear(self.dropout(x).to(self.A.dtype), self.A)  # [..., r]
        return y + (self.scale * F.linear(low, self.B)).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the base layer with B A added to its weight: summed in fp32, rounded once to the weight's dtype."""
        weight = self.base.weight
        weight.copy_(weight.float() + self.scale * (self.B @ self.A))
        return self.base


def add_lora(model: GPT | GPTClassifier, params: LoRAParams) -> None:
    """Replace the linear layers named in `targets` by `LoRALinear`, in every block, in place.

    Targets that the model does not have (gate_proj without swiglu) are ignored, so that one list fits all models.
    Raises `InputError` where none is left.
    """
    targets = list(dict.fromkeys(params.targets))
    places: list[tuple[nn.Module, str]] = [
        (part, name)
        for block in model.gpt.blocks
        for part in block.children()
        for name in targets
        if isinstance(getattr(part, name, None), nn.Linear)
    ]
    if "head" in targets:
        if not isinstance(model, GPTClassifier):
            raise InputError("lora.targets: head is that of a classifier, and this is none; leave it out")
        places.append((model, "head"))
    if not places:
        raise InputError(f"lora.targets: this model has no {' or '.join(targets)}; name other linear layers")
    for part, name in places:
        setattr(part, name, LoRALinear(getattr(part, name), params))


def merge_lora(model: nn.Module) -> None:
    """Replace every `LoRALinear` by its merged base layer, in place."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, LoRALinear):
                setattr(part, name, child.merged())
