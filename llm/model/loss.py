"""Cross entropy of an output layer without its logits ever being whole.

With a vocabulary of 50,000 the logits of a step, their softmax and their gradient take more memory than everything
else in a small model, and moving them takes more time than the products. Here they exist for a few rows at a time, and
each chunk's gradient is computed while its logits are at hand (Wijmans et al. 2024 and Hsu et al. 2024 do so on GPUs).

Shapes: N positions, n positions of a chunk, C emb_dim, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model.linear import product

CHUNK_LOGITS = {"cpu": 4_000_000, "cuda": 200_000_000}  # numbers in those of a chunk: 16 and 800 MB in fp32
MULTIPLE = {"cuda": 64}  # of which V shall be one: GPUs multiply such matrices faster (nanoGPT pads its vocabulary)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy in nats of `hidden @ weight.T` [N, V] against `targets` [N]; differentiable in both.

    The same as `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")`, up to rounding. Products are made in
    the dtype of autocast where it is on, the losses in fp32.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        loss = torch.zeros((), device=hidden.device)
        V, device = len(weight), hidden.device.type
        w = weight.to(hidden.dtype)  # [V, C]
        if padding := -V % MULTIPLE.get(device, 1):
            w = F.pad(w, (0, 0, 0, padding))  # [V + padding, C]
        rows = max(1, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // len(w))
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            h, t = hidden[chunk], targets[chunk, None]  # [n, C], [n, 1]
            logits = product(h, w).float()  # [n, V + padding]
            logits[:, V:] = -torch.inf
            largest = logits.amax(-1, keepdim=True)  # [n, 1]
            right = logits.gather(1, t) - largest  # [n, 1]
            exps = logits.sub_(largest).exp_()  # each takes the place of the one before it
            total = exps.sum(-1, keepdim=True)  # [n, 1]
            loss += (total.log() - right).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # The gradient of the logits is softmax minus one at the target.
            error = exps.div_(total)
            error.scatter_add_(1, t, torch.full_like(total, -1.0))
            error = error.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = product(error, w.T)
            if grad_weight is not None and weight.dtype == hidden.dtype:
                grad_weight.addmm_(error[:, :V].T, h)
            elif grad_weight is not None:
                grad_weight += error[:, :V].T @ h
        ctx.gradients = grad_hidden, grad_weight
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gives away the gradients that it holds, so that there is one copy of them: it works once."""
        (grad,) = grads
        for held in ctx.gradients:
            if held is not None:
                held.mul_(grad)
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        return grad_hidden, grad_weight, None
