"""Solutions of appendix D."""

from __future__ import annotations

import math

from torch import Tensor

BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.95, 1e-8, 0.1


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Return the factor of a linear warmup, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clip(gradient: Tensor, limit: float) -> Tensor:
    """Return the gradient scaled to a norm of at most `limit`."""
    norm = float(gradient.norm())
    return gradient * (limit / norm) if norm > limit else gradient


def adamw_step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight and both means after step `t` (from 1), with the constants above."""
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g.square()
    update = (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
    return w * (1 - lr * WEIGHT_DECAY) - lr * update, m, v
