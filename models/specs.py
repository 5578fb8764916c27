"""What an LLM, a GPU type, a node and a cluster ARE: static facts, no behaviour in time.

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

TP_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes a plan may use; TP never crosses a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe(Record):
    """Mixture-of-experts feed-forward part of an LLM.

    ``dense_layers`` of the first layers keep a dense feed-forward of the LLM's
    ``intermediate`` width; each other layer routes a token to ``experts_per_token`` of
    ``experts`` experts of width ``expert_intermediate``, plus ``shared_experts`` that
    every token uses.
    """

    experts: int
    experts_per_token: int
    expert_intermediate: int
    shared_experts: int = 0
    dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla(Record):
    """Multi-head latent attention: one latent per token instead of K and V per head."""

    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Record):
    """Static facts of one LLM, under the names of a Hugging Face ``config.json``."""

    name: str
    hub_id: str
    """Where the weights are published, e.g. ``meta-llama/Llama-3.1-8B-Instruct``."""
    params: int
    """Parameters in the checkpoint, as published."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_context_tokens: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    bytes_per_param: float = 2.0
    kv_bytes_per_value: int = 2
    moe: Moe | None = None
    mla: Mla | None = None
    tp: tuple[int, ...] = TP_SIZES
    """TP sizes the engine accepts: each divides ``heads``."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field name -> where its value comes from; ``default`` covers the rest."""

    def __post_init__(self) -> None:
        bad = [k for k in self.tp if k not in TP_SIZES or self.heads % k]
        if not self.tp or bad:
            raise InvalidInput(
                f"LLM {self.name!r}: tp {list(self.tp)} must be among {list(TP_SIZES)} "
                f"and divide its {self.heads} attention heads"
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole checkpoint in the serving precision."""
        return round(self.params * self.bytes_per_param)

    def weight_bytes_per_gpu(self, tp: int) -> int:
        """Bytes of one tensor-parallel shard (an even split)."""
        return -(-self.weight_bytes // tp)

    def kv_bytes_per_token_per_gpu(self, tp: int) -> int:
        """KV-cache bytes one token takes on each of ``tp`` GPUs.

        GQA splits the KV heads over the GPUs and repeats a head where there are fewer
        heads than GPUs; MLA keeps its latent whole on every GPU.
        """
        if self.mla is not None:
            values = self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        else:
            values = 2 * max(1, self.kv_heads // tp) * self.head_dim
        return self.layers * values * self.kv_bytes_per_value

    @property
    def active_params(self) -> int:
        """Parameters one token is multiplied with (differs from `params` for MoE)."""
        if self.moe is None:
            return self.params
        idle = self.moe.experts - self.moe.experts_per_token
        per_expert = 3 * self.hidden * self.moe.expert_intermediate
        return self.params - (self.layers - self.moe.dense_layers) * idle * per_expert

    def params_from_shape(self) -> int:
        """Count the parameters from the shape; the catalogue's test of `params`."""
        h, m = self.hidden, self.moe
        if self.mla is not None:
            a = self.mla
            q_dim = self.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
            q = (
                h * q_dim
                if a.q_lora_rank is None
                else h * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * q_dim
            )
            kv = h * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
            kv += a.kv_lora_rank * self.heads * (a.qk_nope_head_dim + a.v_head_dim)
            attention = q + kv + self.heads * a.v_head_dim * h
        else:
            q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
            attention = 2 * h * q_dim + 2 * h * kv_dim
            attention += (q_dim + 2 * kv_dim) * self.qkv_bias
            attention += 2 * self.head_dim * self.qk_norm
        dense = 3 * h * self.intermediate
        if m is None:
            feed_forward = self.layers * dense
        else:
            expert = 3 * h * m.expert_intermediate
            routed = (m.experts + m.shared_experts) * expert + m.experts * h
            feed_forward = m.dense_layers * dense
            feed_forward += (self.layers - m.dense_layers) * routed
        embeddings = self.vocab * h * (1 if self.tied_embeddings else 2)
        return embeddings + h + self.layers * (attention + 2 * h) + feed_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType(Record):
    """One kind of GPU: what it holds, how fast it is, what it costs."""

    name: str
    memory_bytes: int
    hbm_bytes_per_s: float
    bf16_flop_per_s: float
    """Dense tensor-core peak (no sparsity)."""
    gpu_link_bytes_per_s: float
    """Between GPUs of one node, per GPU and direction."""
    host_link_bytes_per_s: float
    """Host memory to GPU, per GPU and direction."""
    price_usd_per_h: float
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
    domain: str = "default"
    """Failure domain."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise InvalidInput(f"node {self.name!r}: a name without '/' is needed")
        if not 1 <= self.gpus <= 16:
            raise InvalidInput(f"node {self.name!r}: gpus={self.gpus}, expected 1..16")
        if self.host_ram_bytes <= 0 or self.storage_bytes_per_s <= 0:
            raise InvalidInput(
                f"node {self.name!r}: host_ram and storage_bytes_per_s must be positive"
            )

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
    usable_fraction: float = 0.9
    """Share of a GPU's memory that weights and KV may use; the rest is the reserve for
    context, graphs and fragmentation."""

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
