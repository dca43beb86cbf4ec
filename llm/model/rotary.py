"""Rotary positions (Su et al. 2021) and their scaling to longer contexts."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from llm.config import GPTConfig


@lru_cache(maxsize=16)
def rotary_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Return the rotation of each pair per position, [D/2] in radians, fp32."""
    D, scaling = config.head_dim, config.rope_scaling
    frequencies = config.rope_theta ** -(torch.arange(0, D, 2, device=device).float() / D)  # [D/2]
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "llama3":
        assert scaling.original_context_length and scaling.low_freq_factor and scaling.high_freq_factor
        turns = scaling.original_context_length * frequencies / (2 * math.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: high frequency, unscaled
        return kept * frequencies + (1 - kept) * stretched
    if scaling.kind == "yarn":
        original, fast, slow = scaling.original_context_length, scaling.beta_fast, scaling.beta_slow
        assert original and fast and slow
        # The pairs with that many turns within the original context; frequencies between them are blended.
        first, last = (
            D * math.log(original / (n * 2 * math.pi)) / (2 * math.log(config.rope_theta)) for n in (fast, slow)
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), D - 1)
        ramp = (torch.arange(D // 2, device=device).float() - low) / max(high - low, 0.001)
        kept = 1 - ramp.clamp(0, 1)  # [D/2]
        return kept * frequencies + (1 - kept) * stretched
    return stretched


def rotary_cos_sin(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines at `positions` [T] or [B, T]: 2 x [T, D/2] or [B, 1, T, D/2], fp32."""
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)
    if positions.ndim == 2:
        angles = angles[:, None]  # [B, 1, T, D/2]: the same for all heads
    scale = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor or 1.0
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of [B, H, T, D] by the angle of its position, in fp32."""
    first, second = x.float().chunk(2, dim=-1)  # 2 x [B, H, T, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
