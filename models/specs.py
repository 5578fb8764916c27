"""What a GPU type, a node and a cluster ARE: static facts, no behaviour in time.

Everything here is immutable and validated on construction: a `ClusterSpec` that exists is
a usable one. Sizes are bytes, rates are per second, prices are US dollars per hour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.models.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType(Record):
    """One kind of GPU: what it holds, how fast it is, what it costs."""

    name: str
    memory_bytes: int
    hbm_bytes_per_s: float
    bf16_flop_per_s: float
    """Dense tensor-core peak (no sparsity)."""
    fp8_flop_per_s: float | None = None
    """Dense FP8 peak; None where the GPU multiplies in no such type."""
    fp4_flop_per_s: float | None = None
    gpu_link_bytes_per_s: float
    """Between GPUs of one node, per GPU and direction."""
    host_link_bytes_per_s: float
    """Host memory to GPU, per GPU and direction."""
    price_usd_per_h: float
    kernels: str | None = None
    """Name of the measured kernel tables of this GPU, e.g. ``h100_sxm``."""
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo(Record):
    """Latency targets of one LLM's requests (99th percentile)."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0):
            raise InvalidInput("SLO: ttft_s and tpot_s must be positive")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GpuId:
    """Logical GPU ``index`` of node ``node``; written ``n0/3``."""

    node: str
    index: int
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # GPUs are dictionary keys everywhere; hashing the strings each time is slow.
        object.__setattr__(self, "_hash", hash((self.node, self.index)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes of strings differ between processes, so a copy computes its own.
        return (GpuId.parse, (str(self),))

    def __str__(self) -> str:
        return f"{self.node}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> GpuId:
        node, slash, index = text.rpartition("/")
        if not (node and slash and index.isascii() and index.isdigit()):
            raise InvalidInput(f"GPU {text!r}: expected NODE/INDEX, e.g. n0/3")
        return cls(node=node, index=int(index))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """In files a GPU is the string ``n0/3`` (pydantic is loaded by the codec only)."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            cls.parse,
            core_schema.str_schema(),
            serialization=core_schema.to_string_ser_schema(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Record):
    """One server: equal GPUs on one fast fabric, and the host memory behind them."""

    name: str
    gpu: str
    """Name of the `GpuType`."""
    gpus: int
    host_ram_bytes: int
    storage_bytes_per_s: float = 3.0e9
    """Checkpoint storage to host memory, for the whole node."""
    host_link_bytes_per_s: float | None = None
    """Host memory to all GPUs together, where they share a switch; None: no limit beside
    each GPU's own link."""
    domain: str = "default"
    """Failure domain: what fails together; "default": each node by itself."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise InvalidInput(f"node {self.name!r}: a name without '/' is needed")
        if not 1 <= self.gpus <= 16:
            raise InvalidInput(f"node {self.name!r}: gpus={self.gpus}, expected 1..16")
        if self.host_ram_bytes <= 0 or self.storage_bytes_per_s <= 0:
            raise InvalidInput(
                f"node {self.name!r}: host_ram and storage_bytes_per_s must be positive"
            )
        if self.host_link_bytes_per_s is not None and self.host_link_bytes_per_s <= 0:
            raise InvalidInput(f"node {self.name!r}: host_link must be positive")

    def gpu_ids(self) -> tuple[GpuId, ...]:
        return tuple(GpuId(node=self.name, index=i) for i in range(self.gpus))

    def blocks(self, tp: int) -> tuple[tuple[GpuId, ...], ...]:
        """Aligned blocks of ``tp`` GPUs: any two of a node are nested or disjoint (C2)."""
        ids = self.gpu_ids()
        return tuple(ids[i : i + tp] for i in range(0, self.gpus - tp + 1, tp))


@dataclass(frozen=True, kw_only=True)
class ClusterSpec(Record):
    """All nodes of the cluster and the GPU types they are made of."""

    nodes: tuple[Node, ...]
    gpu_types: tuple[GpuType, ...]
    usable_fraction: float = 0.95
    """Share of a GPU's memory that replicas may use; the rest is for fragmentation and
    for errors of the memory model."""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InvalidInput("cluster: at least one node is needed")
        known = {gpu.name for gpu in self.gpu_types}
        seen: set[str] = set()
        for node in self.nodes:
            if node.gpu not in known:
                raise InvalidInput(f"node {node.name!r}: unknown GPU type {node.gpu!r}")
            if node.name in seen:
                raise InvalidInput(
                    f"duplicate GPU {node.name}/0: two nodes are called {node.name!r}"
                )
            seen.add(node.name)
        if not 0 < self.usable_fraction <= 1:
            raise InvalidInput("cluster: usable_fraction must be in (0, 1]")

    @cached_property
    def node_by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def type_by_name(self) -> Mapping[str, GpuType]:
        return {gpu.name: gpu for gpu in self.gpu_types}

    @cached_property
    def gpus(self) -> tuple[GpuId, ...]:
        return tuple(g for node in self.nodes for g in node.gpu_ids())

    @cached_property
    def domain_of(self) -> Mapping[str, str]:
        """What is lost together with each node: its failure domain, or itself where it
        has none of its own."""
        return {
            n.name: n.name if n.domain == "default" else n.domain for n in self.nodes
        }

    def type_of(self, gpu: GpuId) -> GpuType:
        return self.type_by_name[self.node_by_name[gpu.node].gpu]

    def has(self, gpu: GpuId) -> bool:
        node = self.node_by_name.get(gpu.node)
        return node is not None and 0 <= gpu.index < node.gpus

    def usable_bytes(self, gpu: GpuId) -> int:
        return int(self.type_of(gpu).memory_bytes * self.usable_fraction)

    def blocks(self, tp: int, gpu_type: str) -> Iterator[tuple[GpuId, ...]]:
        """Aligned blocks of ``tp`` GPUs of one type, in node order."""
        for node in self.nodes:
            if node.gpu == gpu_type:
                yield from node.blocks(tp)
