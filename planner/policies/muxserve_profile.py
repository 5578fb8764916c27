"""What MuxServe's planner knows of LLMs: their sizes, and iteration times as profiled.

By share of the streaming multiprocessors (SMs) that prompts or decodes may use; times of
the table are those of the next profiled cell, as the published planner reads them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

INPUT_TOKENS, OUTPUT_TOKENS = 161, 337
"""Means that the formula has for every LLM."""
LENGTHS = (32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the planner knows of an LLM of one size."""

    weight_gb: float
    layers: int
    hidden: int
    base_gpus: int
    scale: int
    decode_overhead_s: float
    """Added to a step for each sequence of its batch."""
    prefill_sm: int
    """Percent of the SMs that its prompts get."""

    @property
    def kv_gib_per_token(self) -> float:
        """Of the whole LLM."""
        return self.layers * self.hidden * 4 / 2**30


SIZES: Mapping[str, Size] = {
    name: Size(
        weight_gb=weight,
        layers=layers,
        hidden=hidden,
        base_gpus=base,
        scale=scale,
        decode_overhead_s=overhead / 1e3,
        prefill_sm=sm,
    )
    for name, weight, layers, hidden, base, scale, overhead, sm in (
        ("llama-7b", 14, 32, 4096, 1, 1, 0.10, 80),
        ("llama-13b", 26, 40, 5120, 1, 2, 0.08, 90),
        ("llama-30b", 60, 60, 6656, 2, 4, 0.07, 100),
        ("llama-65b", 130, 80, 8192, 4, 8, 0.07, 100),
    )
}


Row = tuple[str, int, int, int, int, float, float]
"""LLM size, TP, percent of SMs, batch, length, prefill ms, decode ms (-1: did not run)."""


class SmProfile:
    """Measured iteration times by LLM size, TP, share of SMs, batch and length."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._cells = {row[:5]: (row[5] / 1e3, row[6] / 1e3) for row in rows}
        self._batches = sorted({key[3] for key in self._cells})
        self.tps = {
            size: sorted({key[1] for key in self._cells if key[0] == size})
            for size in {key[0] for key in self._cells}
        }
        self._prefill: dict[tuple[str, int, int], float] = {}
        self._decode: dict[tuple[str, int, int, int], float] = {}

    def cell(
        self, size: str, tp: int, sm: int, batch: int, length: int
    ) -> tuple[float, float]:
        """(prefill, decode) seconds; negative where it did not run."""
        return self._cells.get((size, tp, sm, batch, length), (-1.0, -1.0))

    def most_decodes(self, size: str, tp: int, sm: int) -> int:
        """Largest batch that decoded at all."""
        return max(
            batch
            for batch in self._batches
            if any(self.cell(size, tp, sm, batch, at)[1] > 0 for at in LENGTHS)
        )

    def prefill_s(self, size: str, tp: int, batch: float) -> float:
        """A batch of mean prompts on all SMs: the next profiled batch and length, or the
        longest length that ran."""
        key = size, tp, self._next(batch)
        if key not in self._prefill:
            longer = [at for at in LENGTHS if at > INPUT_TOKENS]
            shorter = [at for at in reversed(LENGTHS) if at <= INPUT_TOKENS]
            times = (
                self.cell(size, tp, 100, key[2], at)[0] for at in (*longer, *shorter)
            )
            self._prefill[key] = next((t for t in times if t > 0), math.inf)
        return self._prefill[key]

    def decode_s(self, size: str, tp: int, sm: int, batch: float) -> float:
        """A decode step: mean of the running means over the lengths that ran."""
        key = size, tp, sm, self._next(batch)
        if key not in self._decode:
            ran = [self.cell(size, tp, sm, key[3], at)[1] for at in LENGTHS]
            times = [time for time in ran if time > 0]
            means = [sum(times[:n]) / n for n in range(1, len(times) + 1)]
            self._decode[key] = sum(means) / len(means) if means else math.inf
        return self._decode[key] + SIZES[size].decode_overhead_s * batch

    def _next(self, batch: float) -> int:
        return self._batches[
            min(bisect_left(self._batches, batch), len(self._batches) - 1)
        ]
