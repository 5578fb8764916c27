"""Ranks that compute one LLM together, by ``torch.distributed``.

A communication group is made in advance for each set of GPUs, so taking an LLM into use
costs no rendezvous.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from foreserve.runtime.paged.layout import Part


def meet(path: Path, part: Part, backend: str = "gloo", within_s: float = 60.0) -> None:
    """Join the ranks that meet at the file ``path``, which must not be there before; once
    in a process. Blocks until all are there."""
    distributed.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=part.rank,
        world_size=part.size,
        timeout=timedelta(seconds=within_s),
    )


class Ranks:
    """This process's end of a group of all ranks that met: `decoder.Peers`."""

    def __init__(self) -> None:
        """All ranks make their groups in the same order."""
        self.part = Part(rank=distributed.get_rank(), size=distributed.get_world_size())
        self._group = distributed.new_group()

    def add(self, values: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(values, group=self._group)
        return values

    def join(self, values: torch.Tensor) -> torch.Tensor:
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.part.size)]
        distributed.all_gather(parts, values, group=self._group)
        return torch.cat(parts, dim=-1)


def part_ways() -> None:
    """End what `meet` began."""
    distributed.destroy_process_group()
