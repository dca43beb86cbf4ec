"""AdamW, and Muon for matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm.common import distributed
from llm.config import TrainParams
from llm.model.linear import matrix_products

# The first iterations of Muon, whose polynomials are multiplied before the matrix. Each makes rounding errors of X X^T
# up to twelve times as large: in bf16 those of five iterations outgrow the update, and sooner where X was iterated.
MULTIPLIED = 3


def make_optimizers(model: nn.Module, params: TrainParams) -> list[torch.optim.Optimizer]:
    """Return an AdamW, and with `optimizer: muon` also a Muon for the matrices inside the blocks.

    An adapter's factors A and B stay with AdamW. Muon changes a matrix by a fixed size in every direction, but the
    effect of an adapter is that of the product B A, whose size depends on both factors.

    Only matrices have weight decay, not biases and norm weights (as in nanoGPT). Each group keeps its peak learning
    rate as `peak_lr`; `set_lr` scales it.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden: list[nn.Parameter] = []
    if params.optimizer == "muon":
        hidden = [p for name, p in trainable if p.ndim == 2 and "blocks." in name and not name.endswith((".A", ".B"))]
    taken = {id(p) for p in hidden}
    decayed = [p for _, p in trainable if p.ndim >= 2 and id(p) not in taken]
    others = [p for _, p in trainable if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": params.weight_decay, "peak_lr": params.lr},
        {"params": others, "weight_decay": 0.0, "peak_lr": params.lr},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=params.lr, betas=(params.beta1, params.beta2), fused=True))
    if hidden:
        settings = params.muon_lr, params.weight_decay, params.muon_momentum, params.muon_iterations
        optimizers.append(Muon([{"params": hidden, "peak_lr": params.muon_lr}], *settings))
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of each group to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices (Jordan et al. 2024, github.com/KellerJordan/Muon).

    `torch.optim.Muon` iterates in bf16, two orders of magnitude slower than fp32 on CPUs without bf16 units. Here the
    iteration has the dtype of autocast, or else of the gradient. Matrices of one shape are stacked, and sharded over
    the ranks.
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float, iterations: int
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.iterations = iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, parameters in same_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])  # [n, rows, columns]
                updates = distributed.sharded_map(partial(orthogonalize, iterations=self.iterations), updates)
                # A wide matrix's orthogonal update is as strong as a square one's; a tall one's has to be scaled up.
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        """Return the Nesterov momentum: the running mean of the gradients, one step ahead."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p.grad)
        state["mean"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["mean"], momentum)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Bring all singular values of [n, rows, columns] near 1 by a quintic Newton-Schulz iteration.

    After three iterations singular values from 0.02 of the norm on are between about 0.7 and 1.2; each further one
    takes in those down to a third of that.

    All polynomials of X X^T commute. For a matrix at least twice as long as wide the first are therefore multiplied
    with each other, which are small, and with the matrix last.
    """
    device = matrices.device.type
    x = matrices.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # [n, r, s], r the shorter side
    at_once = min(iterations, MULTIPLIED) if x.shape[2] >= 2 * x.shape[1] else 0
    if at_once:
        x = _iterate(x, at_once)
    for _ in range(iterations - at_once):
        x = _iterate(x, 1)
    return x.mT if tall else x


def _iterate(x: Tensor, iterations: int) -> Tensor:
    """Return the matrices [n, r, s] after some iterations, whose polynomials are multiplied before them."""
    gram = matrix_products(x, x.mT)  # [n, r, r]
    factor = polynomial = _polynomial(gram)
    for _ in range(iterations - 1):
        gram = matrix_products(matrix_products(polynomial, gram), polynomial)
        polynomial = _polynomial(gram)
        factor = matrix_products(polynomial, factor)
    return matrix_products(factor, x)


def _polynomial(gram: Tensor) -> Tensor:
    """Return the factor [n, r, r] of an iteration; its coefficients maximise the slope at zero."""
    a, b, c = 3.4445, -4.7750, 2.0315
    result = b * gram + c * matrix_products(gram, gram)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result
