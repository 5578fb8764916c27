"""Load and switch times by stage: storage to host to GPU, process start, wake, drain.

A loader streams: the next chunk is read while the last one is copied on, so the slower
stage sets the pace. The loaders' rates are measured (ServerlessLLM on an H100,
`catalog/loading.csv`); a node's own storage and link limit them. Loads that run at once
share the storage of their node, and the host link where GPUs hang on one switch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.record import Record
from foreserve.models.specs import GpuType

Loader = Literal["fast", "plain"]
"""fast: pinned host memory, direct I/O, parallel copies (ServerlessLLM's); plain:
safetensors as the engines read it by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRates(Record):
    """What a loader reaches."""

    storage_share: float
    """Of the storage's sequential rate where that is the limit (typical, not measured)."""
    storage_bytes_per_s: float
    """Its own limit for each GPU when it reads storage, however fast that is."""
    link_share: float
    """Of the host link's rate."""
    link_bytes_per_s: float
    """Its own limit when the weights are in host memory."""
    interval: tuple[float, float]
    """Factors on a time; wide enough for the middle nine tenths of all repeats seen."""
    source: str

    def readers_bytes_per_s(self, tp: int) -> float:
        """Of storage, at most: each rank has a reader of its own."""
        return self.storage_bytes_per_s * tp


LOADERS: dict[Loader, LoaderRates] = {
    # 65.5 GB in 3.23 s from NVMe of 29.4 GB/s, in 1.20 s over a link of 64 GB/s.
    "fast": LoaderRates(
        storage_share=0.95,
        storage_bytes_per_s=20.26e9,
        link_share=0.85,
        link_bytes_per_s=math.inf,
        interval=(0.8, 1.25),
        source="ServerlessLLM's loader, Qwen3-32B on an H100",
    ),
    # 20.0 s and 12.4 s: one thread that copies page by page, whatever the storage.
    "plain": LoaderRates(
        storage_share=0.95,
        storage_bytes_per_s=3.27e9,
        link_share=1.0,
        link_bytes_per_s=5.28e9,
        interval=(0.55, 1.25),
        source="safetensors, Qwen3-32B on an H100",
    ),
}
"""Rates are taken from Qwen3-32B alone; the 8B and the other 32B check them (`checks`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of getting ready, alone."""

    name: str
    seconds: float
    low_s: float
    high_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTimes:
    """Stages that overlap, and the time until the weights are resident (WARM)."""

    stages: tuple[Stage, ...]
    interval: tuple[float, float]

    @property
    def total_s(self) -> float:
        return max((stage.seconds for stage in self.stages), default=0.0)

    @property
    def low_s(self) -> float:
        return self.total_s * self.interval[0]

    @property
    def high_s(self) -> float:
        return self.total_s * self.interval[1]


HostCache = Literal["all", "lru", "none", "planned"]
"""Which weights are in pinned host memory. all: as the plan assumed, so that loads take
their option's time; lru: what was loaded last and has room; none: loads read storage;
planned: what the plan says (C6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRules(Record):
    """How loads are run, beside the rates of links and loaders."""

    host_cache: HostCache = "all"
    process_start_s: float = 0.0
    """Engine process of a load that finds none ready; no link is used meanwhile."""
    process_pool: int = 0
    """Ready processes that each node keeps; one that is taken is replaced at once, which
    takes ``process_start_s``."""
    share_beside_serving: float = 1.0
    """Share of its rate that a load gets while a replica serves on one of its GPUs. An
    assumption, like the next: no measurement of either is known to us."""
    slowdown_beside_loading: float = 0.0
    """By how much iterations take longer while weights are copied to one of their GPUs."""

    def __post_init__(self) -> None:
        if not 0 < self.share_beside_serving <= 1:
            raise InvalidInput("load_share_beside_serving must be in (0, 1]")
        if self.slowdown_beside_loading < 0:
            raise InvalidInput("slowdown_beside_loading must not be negative")
        if self.process_start_s < 0 or self.process_pool < 0:
            raise InvalidInput("process_start and process_pool must not be negative")


def shared(rate: float, users: int) -> float:
    """Each of ``users`` equal flows gets the same share of a link."""
    return rate / max(1, users)


def load_times(
    llm: ModelSpec,
    gpu: GpuType,
    tp: int,
    *,
    storage_bytes_per_s: float | None = None,
    loader: Loader = "fast",
    loads_at_once: int = 1,
    gpus_per_link: int = 1,
) -> LoadTimes:
    """Stages of loading ``llm`` onto ``tp`` GPUs of one node.

    From pinned host memory, or through it from storage of ``storage_bytes_per_s``.
    ``loads_at_once`` replicas load on the node together and share its storage;
    ``gpus_per_link`` of the loading GPUs hang on one host link.
    """
    known = LOADERS[loader]
    link = shared(gpu.host_link_bytes_per_s * known.link_share, gpus_per_link)
    copy_s = llm.weight_bytes_per_gpu(tp) / min(link, known.link_bytes_per_s)
    stages = [_stage("host to GPU", copy_s, known)]
    if storage_bytes_per_s is not None:
        rate = shared(storage_bytes_per_s * known.storage_share, loads_at_once)
        read_s = llm.weight_bytes / min(rate, known.readers_bytes_per_s(tp))
        stages.insert(0, _stage("storage to host", read_s, known))
    return LoadTimes(stages=tuple(stages), interval=known.interval)


def _stage(name: str, seconds: float, known: LoaderRates) -> Stage:
    low, high = known.interval
    return Stage(
        name=name,
        seconds=seconds,
        low_s=seconds * low,
        high_s=seconds * high,
        source=known.source,
    )


def switch_times(llm: ModelSpec, gpu: GpuType, tp: int) -> tuple[Stage, ...]:
    """What stands between resident weights and tokens, each a row of its own.

    The sleep and wake of vLLM were reported for an 8B; they scale with the bytes that
    move over the host link and keep their fixed part.
    """
    copy_s = llm.weight_bytes_per_gpu(tp) / (gpu.host_link_bytes_per_s * 0.85)
    report = "vLLM sleep mode, Qwen3-8B (quoted second-hand)"
    workers = "vllm-project/vllm issue 35409, a tiny LLM"
    fixed = "typical, not measured"
    rows = (
        (
            "warm to active",
            0.05,
            0.02,
            0.2,
            "own target: map pages, attach the process",
        ),
        ("active to warm", 0.05, 0.02, 0.2, "own target: unmap pages"),
        ("process start", 13.16 - 10.92, 1.0, 5.0, workers),
        ("engine start and graph capture", 10.92, 5.0, 60.0, workers),
        ("vLLM sleep, level 1", 10.3 + copy_s, 3.0, 12.0 + 2 * copy_s, report),
        ("vLLM wake, level 1", 1.9 + copy_s, 0.8 + copy_s, 4.0 + 2 * copy_s, report),
        ("vLLM sleep, level 2", 0.31, 0.1, 1.0, report),
        ("vLLM wake, level 2", 6.3 + copy_s, 3.0 + copy_s, 12.0 + 3 * copy_s, report),
        ("CUDA context", 0.3, 0.1, 1.0, fixed),
    )
    return tuple(
        Stage(name=name, seconds=value, low_s=low, high_s=high, source=source)
        for name, value, low, high, source in rows
    )


def drain_s(batch: float, mean_output_tokens: float, tpot_s: float) -> float:
    """Expected time until the last of ``batch`` running requests ends.

    Remaining lengths taken as exponential (an output length's residual, seen at a random
    moment, is nearly so): the largest of ``b`` has ``b``'s harmonic number times the mean.
    """
    if batch < 1:
        return batch * mean_output_tokens * tpot_s
    harmonic = math.log(batch) + 0.5772 + 1 / (2 * batch)
    return mean_output_tokens * tpot_s * harmonic


class LoadCheck(NamedTuple):
    """One measured median beside ours, and whether the interval covers the repeats."""

    what: str
    predicted_s: float
    measured_s: float
    covered: bool
    """The 5th to 95th percentile of the repeats lies in the interval."""
    role: str

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def checks() -> Iterator[LoadCheck]:
    """Our loading times beside all that were measured with these loaders."""
    from foreserve.models import catalog

    gpu = catalog.gpu("h100")
    for row in _measured():
        if row["testbed"] != "h100_2025":
            continue
        loader: Loader = "fast" if row["loader"] == "sllm" else "plain"
        known, size = LOADERS[loader], float(row["weight_bytes"])
        rate = min(gpu.host_link_bytes_per_s * known.link_share, known.link_bytes_per_s)
        if row["access"] == "random":
            storage = min(29.4e9 * known.storage_share, known.storage_bytes_per_s)
            rate = min(rate, storage)
        predicted, (low, high) = size / rate, known.interval
        covered = predicted * low <= float(row["p5"]) and float(row["p95"]) <= (
            predicted * high
        )
        yield LoadCheck(
            what=f"{row['model'].rpartition('/')[2]}, {loader}, {row['access']}",
            predicted_s=predicted,
            measured_s=float(row["p50"]),
            covered=covered,
            role="fitted" if row["model"] == "Qwen/Qwen3-32B" else "checked",
        )


@cache
def _measured() -> tuple[dict[str, str], ...]:
    file = files("foreserve.models.catalog").joinpath("loading.csv")
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(csv.DictReader(line for line in lines if not line.startswith("#")))
