"""Rotary positions (Su et al. 2021) and their scaling to longer contexts."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from llm.config import LayerKind


@lru_cache(maxsize=16)
def rotary_frequencies(kind: LayerKind, dim: int, device: torch.device) -> Tensor:
    """Return the rotation of each pair of `dim` numbers per position, [dim/2] in radians, fp32."""
    theta, scaling = kind.rope_theta, kind.rope_scaling
    if theta is None:
        return torch.zeros(dim // 2, device=device)
    frequencies = theta ** -(torch.arange(0, dim, 2, device=device).float() / dim)  # [dim/2]
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
        first, last = (dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (fast, slow))
        low, high = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        ramp = (torch.arange(dim // 2, device=device).float() - low) / max(high - low, 0.001)
        kept = 1 - ramp.clamp(0, 1)  # [dim/2]
        return kept * frequencies + (1 - kept) * stretched
    return stretched


def rotary_cos_sin(kind: LayerKind, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines at `positions` [T] or [B, T]: 2 x [T, dim/2] or [B, 1, T, dim/2], fp32."""
    angles = positions[..., None].float() * rotary_frequencies(kind, dim, positions.device)
    if positions.ndim == 2:
        angles = angles[:, None]  # [B, 1, T, dim/2]: the same for all heads
    scale = 1.0 if kind.rope_scaling is None else kind.rope_scaling.attention_factor or 1.0
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of [B, H, T, D] by the angle of its position, in fp32.

    With angles for fewer pairs, [T, R/2], the pairs are of the first R numbers, and the others stay.
    """
    D, R = x.shape[-1], 2 * cos.shape[-1]
    if R < D:
        return torch.cat((apply_rotary_emb(x[..., :R], cos, sin), x[..., R:]), dim=-1)
    first, second = x.float().chunk(2, dim=-1)  # 2 x [B, H, T, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
