"""Rotary positions: the frequencies of each kind, and turning by them."""

from __future__ import annotations

import math

import torch

from foreserve.runtime.paged.config import Rope


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per token, float32 ``[head_dim / 2]``."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _by_wave_length(rope, plain)
    if rope.kind == "yarn":
        return _by_turns(rope, plain, head_dim)
    return plain


def turns(
    positions: torch.Tensor, frequency: torch.Tensor, rope: Rope, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``positions [n]``, each ``[n, 1, head_dim]``."""
    angles = positions[:, None].float() * frequency
    both = torch.cat((angles, angles), dim=-1)[:, None]
    return (
        (both.cos() * rope.attention).to(dtype),
        (both.sin() * rope.attention).to(dtype),
    )


def turn(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> torch.Tensor:
    """``heads [n, heads, head_dim]``, each turned to its token's position: the two halves
    of a head are the two coordinates."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


def _by_wave_length(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3: long waves are stretched, short ones kept, those between blended."""
    seen = rope.original_tokens * plain / (2 * math.pi)
    kept = ((seen - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _by_turns(rope: Rope, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN: as Llama 3, with a ramp that is linear in the index of the frequency."""

    def index(turns: float) -> float:
        """Of the frequency that makes so many turns within the original context."""
        length = rope.original_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = index(rope.fast), index(rope.slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    steps = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - ((steps - low) / span).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain
