"""Learning-rate schedules."""

from __future__ import annotations

import math

from llm.config import TrainParams


def lr_factor(step: int, params: TrainParams) -> float:
    """Return the learning rate of `step` (from 0) as a fraction of its peak: linear warmup, then the schedule.

    `wsd` (warmup, stable, decay; Hu et al. 2024, Hägele et al. 2024) stays at the peak until the last `decay_steps` and
    falls linearly in them: what comes before depends on neither `max_steps` nor `decay_steps`.
    """
    if step < params.warmup_steps:
        return (step + 1) / params.warmup_steps
    progress = (step - params.warmup_steps) / max(1, params.max_steps - params.warmup_steps)  # 0 to 1
    if params.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    elif params.schedule == "linear":
        remaining = 1 - progress
    elif params.schedule == "wsd":
        remaining = min(1.0, (params.max_steps - step) / params.decay_steps)
    else:
        remaining = 1.0
    return params.min_lr_ratio + (1 - params.min_lr_ratio) * remaining
