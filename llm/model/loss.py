"""Cross entropy of an output layer in chunks, without storing all logits.

With a vocabulary of 50,000 the logits, their softmax and their gradient take more memory than the rest of a small
model, and moving them takes longer than the products. Here they exist for a chunk of positions at a time, and the
chunk's gradient is computed with them (on GPUs: Wijmans et al. 2024, Hsu et al. 2024).

Shapes: N positions, n positions of a chunk, C emb_dim, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model.linear import product

CHUNK_LOGITS = {"cpu": 4_000_000, "cuda": 200_000_000}  # logits of a chunk: 16 and 800 MB in fp32
MULTIPLE = {"cuda": 64}  # V is padded to one: GPUs multiply such matrices faster (nanoGPT pads its vocabulary)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy in nats of `hidden @ weight.T` [N, V] against `targets` [N].

    Equals `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")` up to rounding, with gradients of both.
    Products are in autocast's dtype where it is on, losses in fp32.
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
            exps = logits.sub_(largest).exp_()  # in place
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
        """Return the gradients of the forward pass without a copy; a second call fails."""
        (grad,) = grads
        for held in ctx.gradients:
            if held is not None:
                held.mul_(grad)
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        return grad_hidden, grad_weight, None
