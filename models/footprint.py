"""The memory of one engine process on each of its GPUs, row by row.

vLLM reserves a share (``utilization``) of the memory that the driver reports, measures
what weights, a forward pass of the largest batch and NCCL take of it, and gives the rest
to the KV cache. CUDA context and CUDA graphs come on top, outside that share. Each row
says where its number comes from and how far it may be off; `checks` compares them with
published measurements.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, NamedTuple

from foreserve.models.llm import ModelSpec
from foreserve.models.record import Record
from foreserve.models.specs import GpuType

GIB = 2**30
BLOCK_TOKENS = 16

RowKind = Literal["weights", "activation", "kv", "runtime", "nccl", "context", "graphs"]

REPORTED_SHARE = 79.22 / 80
"""Of the nominal memory; an H100 of 80 GiB reports 79.22 (vLLM pull request 12126)."""
SAMPLER_BYTES = 4.76 * GIB / (1024 * 128256)
"""Per sequence and vocabulary entry at the peak: logits in two types, sorted values and
indices, probabilities: 39 bytes, fitted on one engine log (catalog/memory_checks.csv)."""
RUNTIME_BYTES = int(0.16 * GIB)
"""What a process allocates beside PyTorch (vLLM pull request 12126, H100, TP 1)."""
NCCL_BYTES = {1: 0, 2: 358_612_992, 4: 411_041_792, 8: 411_041_792}
"""Communication buffers by TP size: aiconfigurator systems/h100_sxm.yaml, nccl_mem."""
CONTEXT_BYTES = int(0.5 * GIB)
GRAPH_BYTES_PER_LAYER = 12 * 2**20
"""CUDA graphs of vLLM's default 67 batch sizes: 0.3 to 1 GiB for 32 to 80 layers."""
SLEEP_RESIDUE_BYTES = (int(2.4 * GIB), int(2.8 * GIB), int(3.2 * GIB))
"""Least, middle, most that a sleeping engine keeps on each GPU (ls1intum/edutelligence
issue 786)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory(Record):
    """Engine settings that memory depends on; vLLM's defaults for an API server."""

    utilization: float = 0.9
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    cuda_graphs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class FootprintRow:
    """``num_bytes`` on one GPU, between ``low_bytes`` and ``high_bytes``."""

    kind: RowKind
    num_bytes: int
    low_bytes: int
    high_bytes: int
    source: str
    inside: bool = True
    """Counted in the engine's share of the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Rows of each TP rank (all ranks hold alike), and what follows from them."""

    reported_bytes: int
    """What the driver reports; all rows and ``free_bytes`` sum to it."""
    rows: tuple[FootprintRow, ...]
    kv_tokens: int
    """In whole blocks; 0 where the LLM does not fit."""
    pinned_bytes: int
    """Host memory of the whole replica that level-1 sleep keeps pinned."""
    residue_bytes: tuple[int, int, int]
    """On each GPU while asleep: least, middle, most."""

    def num_bytes(self, kind: RowKind) -> int:
        return sum(row.num_bytes for row in self.rows if row.kind == kind)

    @property
    def held_bytes(self) -> int:
        """All the process takes of a GPU."""
        return sum(row.num_bytes for row in self.rows)

    @property
    def free_bytes(self) -> int:
        """Left to neighbours; negative where context and graphs exceed the GPU."""
        return self.reported_bytes - self.held_bytes


def footprint(
    llm: ModelSpec, gpu: GpuType, tp: int, engine: EngineMemory | None = None
) -> Footprint:
    """Memory of each of the ``tp`` ranks that serve ``llm``, as vLLM books it."""
    engine = engine or EngineMemory()
    reported = reported_bytes(gpu)
    weights = llm.weight_bytes_per_gpu(tp)
    activation = activation_bytes(llm, tp, engine)
    nccl = NCCL_BYTES.get(tp, NCCL_BYTES[8])
    share = int(reported * engine.utilization)
    kv = max(0, share - weights - activation - nccl - RUNTIME_BYTES)
    graphs = llm.layers * GRAPH_BYTES_PER_LAYER if engine.cuda_graphs else 0
    rows = (
        _row("weights", weights, 0.01, "shape of the LLM and its weight types"),
        _row("activation", activation, 0.1, "peak of a profiling run, by formula"),
        _row("nccl", nccl, 0.4, "aiconfigurator: nccl_mem of its H100 system"),
        _row("runtime", RUNTIME_BYTES, 0.5, "vLLM's log on an H100"),
        _row("kv", kv, 0.05, "what the engine's share leaves"),
        _row("context", CONTEXT_BYTES, 0.5, "typical, not measured", inside=False),
        _row("graphs", graphs, 0.7, "typical, not measured", inside=False),
    )
    per_token = llm.kv_bytes_per_token_per_gpu(tp)
    blocks = int(kv // (per_token * BLOCK_TOKENS)) if per_token else 0
    return Footprint(
        reported_bytes=reported,
        rows=rows,
        kv_tokens=blocks * BLOCK_TOKENS,
        pinned_bytes=weights * tp,
        residue_bytes=SLEEP_RESIDUE_BYTES,
    )


def _row(
    kind: RowKind, num_bytes: int, error: float, source: str, *, inside: bool = True
) -> FootprintRow:
    return FootprintRow(
        kind=kind,
        num_bytes=num_bytes,
        low_bytes=int(num_bytes * (1 - error)),
        high_bytes=int(num_bytes * (1 + error)),
        source=source,
        inside=inside,
    )


def reported_bytes(gpu: GpuType) -> int:
    """What the driver reports of the nominal memory."""
    return int(gpu.memory_bytes * REPORTED_SHARE)


def activation_bytes(llm: ModelSpec, tp: int, engine: EngineMemory) -> int:
    """Peak of the profiling run: the sampler's, or the forward pass's if it is larger.

    Every rank samples from the whole vocabulary. The forward pass holds the residual
    stream twice and the widest of a layer's intermediate results, in two bytes.
    """
    sampler = engine.max_num_seqs * llm.vocab * SAMPLER_BYTES
    heads = (llm.heads + 2 * llm.kv_heads) * llm.head_dim / tp
    widest = max(2 * heads, (3 if llm.gated else 2) * llm.intermediate / tp)
    if (moe := llm.moe) is not None:
        routed = 3 * moe.expert_intermediate / tp + llm.hidden
        widest = max(widest, moe.experts_per_token * routed)
    forward = engine.max_batched_tokens * 2 * (2 * llm.hidden + widest)
    return int(max(sampler, forward))


class Check(NamedTuple):
    """One published number beside ours."""

    what: str
    part: str
    predicted: float
    measured: float
    unit: str
    role: str
    """``fitted`` if a constant above was taken from it, else ``checked``."""
    source: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def checks() -> Iterator[Check]:
    """Our rows beside the published measurements of ``catalog/memory_checks.csv``."""
    from foreserve.models import catalog

    file = files("foreserve.models.catalog").joinpath("memory_checks.csv")
    lines = [
        line
        for line in file.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    for row in csv.DictReader(lines):
        llm, gpu = catalog.llm(row["llm"]), catalog.gpu(row["gpu"])
        if row["dtype"] and row["dtype"] != llm.weight_dtype:
            llm = llm.quantised(row["dtype"])  # type: ignore[arg-type]
        engine = EngineMemory(
            utilization=float(row["utilization"]),
            max_num_seqs=int(row["max_num_seqs"]),
            max_batched_tokens=int(row["max_batched_tokens"]),
        )
        found = footprint(llm, gpu, int(row["tp"]), engine)
        tokens = row["part"] == "kv_tokens"
        kind: RowKind = row["part"]  # type: ignore[assignment]
        predicted = found.kv_tokens if tokens else found.num_bytes(kind) / GIB
        yield Check(
            what=f"{row['llm']} {llm.weight_dtype} on {row['tp']} x {row['gpu']}",
            part=row["part"],
            predicted=float(predicted),
            measured=float(row["value"]),
            unit="tokens" if tokens else "GiB per GPU",
            role=row["role"],
            source=row["source"],
        )
