"""Measured kernel times: tables with a grid over sizes, read in log space.

Source: kernel latencies of `ai-dynamo/aiconfigurator` (Apache-2.0), laid out by
`benchmarks/build_kernels.py`. Every lookup says whether its answer lies inside what was
measured; outside, the last two measured points are continued as a power law and the
answer is flagged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foreserve.models.specs import GpuType

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FILLED = np.uint16(1 << 15)
"""Marks a stored cell that was not measured."""
_LOW_LOG_MS, _STEPS_PER_E = -9.0, 1300.0
"""15 bits hold 0.12 microseconds to 10 000 seconds in steps of 0.08 %."""


def encode_ms(log_ms: Floats) -> NDArray[np.uint16]:
    """Natural logarithms of milliseconds as 15-bit numbers; the builder's half."""
    code = np.round((log_ms - _LOW_LOG_MS) * _STEPS_PER_E)
    return np.clip(code, 0, FILLED - 1).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds of one call, and where the answer lies outside the measurements."""

    seconds: Floats
    extrapolated: Bools

    def __add__(self, other: Answer) -> Answer:
        return Answer(
            self.seconds + other.seconds, self.extrapolated | other.extrapolated
        )

    def times(self, factor: float) -> Answer:
        return Answer(self.seconds * factor, self.extrapolated)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One kernel: a row for each shape, a grid over the sizes that vary at run time."""

    shapes: NDArray[np.int32]
    """[shapes, columns of a shape]"""
    axes: tuple[Floats, ...]
    """Natural logarithms of the grid's sizes, ascending."""
    log_s: NDArray[np.float32]
    """[shapes, *grid]"""
    filled: Bools

    def row(self, shape: Sequence[int]) -> int | None:
        """Index of exactly this shape; None if it was not measured."""
        found = np.flatnonzero((self.shapes == np.asarray(shape)).all(axis=1))
        return int(found[0]) if len(found) else None

    def at(self, row: int, *sizes: ArrayLike) -> Answer:
        """Multilinear in log space; ``sizes`` broadcast against each other."""
        places = [
            _place(axis, np.asarray(size, dtype=np.float64))
            for axis, size in zip(self.axes, sizes, strict=True)
        ]
        shape = np.broadcast_shapes(*(place[0].shape for place in places))
        log_s, outside = np.zeros(shape), np.zeros(shape, dtype=bool)
        for _, _, beyond in places:
            outside = outside | beyond
        for corner in range(1 << len(places)):
            weight: Floats = np.ones(shape)
            index: list[NDArray[np.intp]] = []
            for bit, (low, share, _) in enumerate(places):
                up = corner >> bit & 1
                weight = weight * (share if up else 1 - share)
                index.append(low + up)
            at = tuple(index)
            log_s = log_s + weight * self.log_s[row][at]
            outside = outside | (self.filled[row][at] & (np.abs(weight) > 0.01))
        return Answer(np.exp(log_s), outside)


def _place(axis: Floats, size: Floats) -> tuple[NDArray[np.intp], Floats, Bools]:
    """Lower grid cell, share of the way to the next (beyond 1 outside), outside?"""
    log = np.log(np.maximum(size, 1e-9))
    low = np.clip(np.searchsorted(axis, log, side="right") - 1, 0, len(axis) - 2)
    share = (log - axis[low]) / (axis[low + 1] - axis[low])
    below = share < 0
    # A kernel does not get faster than its smallest measured size.
    return low, np.where(below, 0.0, share), below | (log > axis[-1] + 0.02)


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a GPU could do at best, per second."""

    bf16_flop_per_s: float
    fp8_flop_per_s: float
    fp4_flop_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float

    @classmethod
    def of(cls, gpu: GpuType) -> Peaks:
        fp8 = gpu.fp8_flop_per_s or gpu.bf16_flop_per_s
        return cls(
            gpu.bf16_flop_per_s,
            fp8,
            gpu.fp4_flop_per_s or fp8,
            gpu.hbm_bytes_per_s,
            gpu.gpu_link_bytes_per_s,
        )

    def roof_s(self, dtype: str, flop: ArrayLike, moved_bytes: ArrayLike) -> Floats:
        """Least seconds of a kernel: the busier of its two resources."""
        rate = {
            "fp8": self.fp8_flop_per_s,
            "fp8_block": self.fp8_flop_per_s,
            "nvfp4": self.fp4_flop_per_s,
        }.get(dtype, self.bf16_flop_per_s)
        compute_s = np.asarray(flop, dtype=np.float64) / rate
        return np.maximum(compute_s, np.asarray(moved_bytes) / self.hbm_bytes_per_s)


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """All tables of one GPU and engine."""

    name: str
    """``GPU/ENGINE VERSION`` of the measurements."""
    peaks: Peaks
    """Of the GPU that was measured."""
    tables: dict[str, Table]

    def find(self, *names: str) -> tuple[Table, bool] | None:
        """First of the tables ``names`` there is; True if it is the first choice."""
        for name in names:
            if name in self.tables:
                return self.tables[name], name == names[0]
        return None


@cache
def kernels(gpu: str, backend: str) -> Kernels | None:
    """Tables of ``gpu`` (as `GpuType.kernels`) for ``backend``; None if not measured."""
    path = files("foreserve.models.perf").joinpath(f"data/{gpu}_{backend}.npz")
    if not path.is_file():
        return None
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        versions = dict(
            part.split("=") for part in str(arrays["versions"]).split(";") if part
        )
        found = tables(arrays)
        peaks = Peaks(*(float(peak) for peak in arrays["peaks"]))
    return Kernels(f"{gpu}/{backend} {versions.get('gemm', '')}", peaks, found)


def tables(arrays: Mapping[str, object]) -> dict[str, Table]:
    """All tables of an npz file, by name."""
    names = [key.removesuffix("/values") for key in arrays if key.endswith("/values")]
    return {name: _table(arrays.__getitem__, name) for name in names}


def _table(read: Callable[[str], object], name: str) -> Table:
    code = cast("NDArray[np.uint16]", read(f"{name}/values"))
    log_ms = (code & ~FILLED).astype(np.float32) / _STEPS_PER_E + _LOW_LOG_MS
    axes: list[Floats] = []
    while len(axes) < code.ndim - 1:
        tick = cast("NDArray[np.int32]", read(f"{name}/axis{len(axes)}"))
        axes.append(np.log(np.maximum(tick, 1).astype(np.float64)))
    return Table(
        shapes=cast("NDArray[np.int32]", read(f"{name}/shapes")),
        axes=tuple(axes),
        log_s=(log_ms - np.float32(np.log(1e3))).astype(np.float32),
        filled=(code & FILLED) > 0,
    )
