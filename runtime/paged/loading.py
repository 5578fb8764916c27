"""A shard's weights as tensors over memory that somebody else filled and holds."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from foreserve.runtime.paged.layout import ITEM_BYTES, Layout

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def views(layout: Layout, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights by name, without a copy: ``memory`` (uint8) is where they are."""
    found = {}
    for name, weight in layout.weights.items():
        size = prod(weight.shape) * ITEM_BYTES[layout.dtype]
        there = memory[weight.offset_bytes : weight.offset_bytes + size]
        found[name] = there.view(DTYPES[layout.dtype]).view(weight.shape)
    return found


def tensor(span: object) -> torch.Tensor:
    """uint8, over memory that a pool shows (`memory.pool.Span`), without a copy."""
    if hasattr(span, "__cuda_array_interface__"):
        return torch.as_tensor(span, device="cuda")
    return torch.frombuffer(span, dtype=torch.uint8)
