"""Your solutions of the exercises of appendix D."""

from __future__ import annotations

from torch import Tensor

BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.95, 1e-8, 0.1


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Return the factor of a linear warmup, then a cosine down to `floor`."""
    raise NotImplementedError


def clip(gradient: Tensor, limit: float) -> Tensor:
    """Return the gradient scaled to a norm of at most `limit`."""
    raise NotImplementedError


def adamw_step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight and both means after step `t` (from 1), with the constants above."""
    raise NotImplementedError
