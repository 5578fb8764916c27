"""The memory of one engine process on each of its GPUs, row by row.

vLLM reserves a share (``utilization``) of the memory that the driver reports, measures
what weights, a forward pass of the largest batch and NCCL take of it, and gives the rest
to the KV cache. What it held before it began to measure (the CUDA context) and, before
vLLM 0.21, CUDA graphs come on top, outside that share. Each row says where its number
comes from and how far it may be off; `checks` compares them with published measurements.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Literal, NamedTuple

from foreserve.models.llm import ModelSpec
from foreserve.models.record import Record
from foreserve.models.specs import GpuType

GIB = 2**30
BLOCK_TOKENS = 16

RowKind = Literal["weights", "activation", "kv", "runtime", "nccl", "context", "graphs"]

REPORTED_GIB: Mapping[str, float] = {
    "a100-40gb": 39.49,
    "a100-80gb": 79.25,
    "a10g": 22.06,
    "b200": 178.35,
    "h100": 79.19,
    "h200": 139.80,
    "l4": 22.03,
    "l40s": 44.42,
    "rtx-4090": 23.52,
    "rtx-pro-6000": 94.97,
}
"""What CUDA reports in engine logs and out-of-memory messages; 0.3 % between hosts."""
REPORTED_SHARE = 0.99
"""Of the nominal memory, for any other GPU: 0.98 to 0.994 in the table above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What changed between vLLM versions; fitted as catalog/memory_checks.csv says."""

    since: tuple[int, int]
    sampler_bytes: float
    """Per sequence and vocabulary entry at the sampler's peak: logits in two types, and
    up to 0.16 sorted values with their indices, probabilities and their sums."""
    keeps_workspace: bool
    """The workspace of fused experts stays allocated beside the sampler's tensors."""
    runtime_gib: float
    """What a process allocates beside PyTorch after its start, on one GPU."""
    nccl_gib: Mapping[int, float]
    """What talking to other GPUs adds to it, by TP; 8 GPUs were not measured."""
    graphs_inside: bool


_SINCE_17 = Generation(
    since=(0, 17),
    sampler_bytes=14.5,
    keeps_workspace=True,
    runtime_gib=0.25,
    nccl_gib={1: 0.0, 2: 1.82, 4: 1.88, 8: 1.88},
    graphs_inside=False,
)
GENERATIONS = (
    Generation(
        since=(0, 0),
        sampler_bytes=38.0,
        keeps_workspace=False,
        runtime_gib=0.13,
        nccl_gib={1: 0.0, 2: 0.42, 4: 0.42, 8: 0.42},
        graphs_inside=False,
    ),
    _SINCE_17,
    # By its log: "CUDA graph memory profiling is enabled (default since v0.21.0)".
    replace(_SINCE_17, since=(0, 21), graphs_inside=True),
)
OTHER_ACTIVATION_GIB = 0.05
FORWARD_HIDDEN = 3.5
"""Copies of the residual stream at the peak of a forward pass, beside three
intermediate results of the feed-forward."""
MXFP4_PADDING = 256
"""The experts' width on each GPU is rounded up to this for MXFP4 kernels."""
CONTEXT_GIB = {1: 0.51, 2: 1.55}
"""Used at start, alone and with TP (both 2 and 4 GPUs)."""
GRAPHS_GIB = (0.41, 0.0156)
"""CUDA graphs: constant, and per layer (51 batch sizes, two modes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory(Record):
    """Engine settings that memory depends on.

    vLLM's own defaults for an API server are 1024 sequences and 8192 tokens on GPUs of
    70 GiB and more (A100 excepted), 256 and 2048 on others.
    """

    utilization: float = 0.9
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    cuda_graphs: bool = True
    vllm: tuple[int, int] = (0, 19)
    """Version, as (major, minor)."""

    @property
    def generation(self) -> Generation:
        return max(
            (g for g in GENERATIONS if g.since <= self.vllm), key=lambda g: g.since
        )


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
    """Host memory of the whole replica that level-1 sleep keeps pinned, and may keep
    after it woke (vLLM issue 16663). Each rank's part lies on its GPU's NUMA node."""
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
    """Memory of each of the ``tp`` ranks that serve ``llm``, as vLLM books it.

    KV is what the share leaves, so its interval is the sum of the others' errors.
    """
    engine = engine or EngineMemory()
    now = engine.generation
    reported = reported_bytes(gpu)
    weights = loaded_bytes(llm, tp)
    runtime = int(now.runtime_gib * GIB)
    nccl = int(now.nccl_gib[tp] * GIB)
    context = int(CONTEXT_GIB[min(tp, 2)] * GIB)
    constant, each = GRAPHS_GIB
    graphs = int((constant + each * llm.layers) * GIB) if engine.cuda_graphs else 0
    logs = "vLLM's logs on H100"
    taken = (
        _row("weights", weights, 0.01, "shape of the LLM and its weight types"),
        _row(
            "activation",
            activation_bytes(llm, tp, engine),
            0.06,
            f"shapes at the peak of vLLM's profiling run; constants from {logs}",
        ),
        _row("nccl", nccl, 0.1 if tp < 8 else 0.3, logs),
        _row("runtime", runtime, 0.9, logs),
        _row("graphs", graphs, 0.4, logs, inside=now.graphs_inside),
        _row("context", context, 0.2, logs, inside=False),
    )
    inside = [row for row in taken if row.inside]
    share = int(reported * engine.utilization)
    kv = max(0, share - sum(row.num_bytes for row in inside))
    error = sum(row.num_bytes - row.low_bytes for row in inside)
    kv_row = FootprintRow(
        kind="kv",
        num_bytes=kv,
        low_bytes=max(0, kv - error),
        high_bytes=kv + error if kv else 0,
        source="what the engine's share leaves",
    )
    per_token = llm.kv_bytes_per_token_per_gpu(tp)
    blocks = int(kv // (per_token * BLOCK_TOKENS)) if per_token else 0
    residue = runtime + nccl + graphs + context
    return Footprint(
        reported_bytes=reported,
        rows=(*taken[:4], kv_row, *taken[4:]),
        kv_tokens=blocks * BLOCK_TOKENS,
        pinned_bytes=weights * tp,
        # Reported: 0.76 to 3.2 GiB on one GPU, 2.4 to 4.8 with TP (see the data file).
        residue_bytes=(int(residue * 0.45), residue, int(residue * 1.95)),
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
    known = REPORTED_GIB.get(gpu.name)
    return int(known * GIB if known else gpu.memory_bytes * REPORTED_SHARE)


def loaded_bytes(llm: ModelSpec, tp: int) -> int:
    """One rank's weights as the engine holds them: the shard, and kernels' padding."""
    shard = llm.weight_bytes_per_gpu(tp)
    moe = llm.moe
    if moe is None or moe.dtype != "mxfp4":
        return shard
    width = moe.expert_intermediate / tp
    padded = -(-width // MXFP4_PADDING) * MXFP4_PADDING
    experts = sum(p.num_bytes for p in llm.weight_parts() if p.name == "experts")
    return shard + round(experts / tp * (padded / width - 1))


def activation_bytes(llm: ModelSpec, tp: int, engine: EngineMemory) -> int:
    """Peak of the profiling run: the sampler's, or the forward pass's if it is larger.

    Every rank samples from the whole vocabulary while the hidden states of the batch are
    still there. The forward pass holds the residual stream `FORWARD_HIDDEN` times and
    the feed-forward's gate, up and their product, in two bytes. Fused experts work in
    two buffers, each as wide as the wider of what goes in and out of a matrix.
    """
    now, tokens = engine.generation, engine.max_batched_tokens
    sampler = engine.max_num_seqs * llm.vocab * now.sampler_bytes
    sampler += tokens * llm.hidden * 2
    wide = (3 if llm.gated else 2) * llm.intermediate / tp
    workspace = 0.0
    if (moe := llm.moe) is not None:
        wide = wide if moe.dense_layers else 0.0
        width = moe.expert_intermediate / tp
        buffers = max(width, llm.hidden) + max(2 * width, llm.hidden)
        # MXFP4 kernels bring their own, which no log shows.
        if moe.dtype != "mxfp4":
            workspace = tokens * moe.experts_per_token * buffers * 2
    forward = tokens * 2 * (FORWARD_HIDDEN * llm.hidden + wide)
    if now.keeps_workspace:
        peak = max(sampler, forward) + workspace
    else:
        peak = max(sampler, forward, tokens * 2 * 2 * llm.hidden + workspace)
    return int(peak + OTHER_ACTIVATION_GIB * GIB)


class Check(NamedTuple):
    """One published number beside ours."""

    what: str
    part: str
    predicted: float
    measured: float
    unit: str
    role: str
    """``fitted``: a constant was taken from it; ``checked``: none was, though the form
    of the rows was chosen with all of them in view; ``outside``: the engine did something
    that this file does not describe, as the source says."""
    source: str
    covered: bool
    """The measured value lies in our interval."""

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
        tp, part, measured = int(row["tp"]), row["part"], float(row["value"])
        if row["engine"] == "distserve":
            predicted = float(_distserve_tokens(llm, tp))
            low, high = 0.95 * predicted, 1.05 * predicted
        else:
            major, _, minor = row["engine"].removeprefix("vllm-").partition(".")
            engine = EngineMemory(
                utilization=float(row["utilization"]),
                max_num_seqs=int(row["max_num_seqs"]),
                max_batched_tokens=int(row["max_batched_tokens"]),
                vllm=(int(major), int(minor)),
            )
            found = footprint(llm, gpu, tp, engine)
            low, predicted, high = _interval(found, part)
        yield Check(
            what=f"{row['llm']} {llm.weight_dtype}, {tp} x {row['gpu']}, {row['engine']}",
            part=part,
            predicted=predicted,
            measured=measured,
            unit="tokens" if part == "kv_tokens" else "GiB per GPU",
            role=row["role"],
            source=row["source"],
            covered=low <= measured <= high,
        )


def _interval(found: Footprint, part: str) -> tuple[float, float, float]:
    """Low, value and high of a part in its unit; ``beside`` is runtime and NCCL."""
    kinds = {"kv_tokens": ("kv",), "beside": ("runtime", "nccl")}.get(part, (part,))
    rows = [row for row in found.rows if row.kind in kinds]
    value = sum(row.num_bytes for row in rows)
    unit = found.kv_tokens / value if part == "kv_tokens" else 1 / GIB
    low = sum(row.low_bytes for row in rows) * unit
    return low, value * unit, sum(row.high_bytes for row in rows) * unit


DISTSERVE_GIB = 74.41
"""Weights and KV of another engine on an A100-80GB: fitted to OPT-13B at TP 1."""


def _distserve_tokens(llm: ModelSpec, tp: int) -> int:
    """KV capacity where an engine gives a fixed amount to weights and KV together."""
    free = DISTSERVE_GIB * GIB - llm.weight_bytes_per_gpu(tp)
    per_block = llm.kv_bytes_per_token_per_gpu(tp) * BLOCK_TOKENS
    return int(free // per_block) * BLOCK_TOKENS
