"""What an LLM IS, as far as memory and time depend on it: its shape and its weight types.

Everything follows from the shape: parameters, bytes of weights and of KV cache on each
GPU of a tensor-parallel group. Sizes are bytes, KV is counted per token or per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from foreserve.models.errors import InvalidInput
from foreserve.models.record import Record

TP_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes a plan may use; TP never crosses a node."""

WeightDtype = Literal["bf16", "fp8", "fp8_block", "int4", "nvfp4", "mxfp4"]

BYTES_PER_WEIGHT: Mapping[WeightDtype, float] = {
    "bf16": 2.0,  # and float16
    "fp8": 1.0,  # one scale per tensor or output channel: below 0.1 %
    "fp8_block": 1 + 4 / (128 * 128),  # a float32 scale per 128 x 128 block
    "int4": 0.5
    + 2 / 32,  # a bf16 scale per group of 32, as Kimi-K2's checkpoints state
    "nvfp4": 0.5 + 1 / 16,  # an FP8 scale per group of 16
    "mxfp4": 0.5 + 1 / 32,  # an 8-bit exponent per group of 32 (OCP MX specification)
}
"""Bytes of one weight of a linear layer, its share of the scales included.

AWQ and GPTQ checkpoints count as ``int4``; their usual groups of 128 take 4.0 % less.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe(Record):
    """Mixture-of-experts feed-forward part of an LLM.

    ``dense_layers`` of the layers keep a dense feed-forward of the LLM's
    ``intermediate`` width; each other layer routes a token to ``experts_per_token`` of
    ``experts`` experts of width ``expert_intermediate``, plus ``shared_experts`` that
    every token uses.
    """

    experts: int
    experts_per_token: int
    expert_intermediate: int
    shared_experts: int = 0
    dense_layers: int = 0
    dtype: WeightDtype | None = None
    """Type of the routed experts' weights, where it differs from the other linears'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla(Record):
    """Multi-head latent attention: one latent per token instead of K and V per head.

    With ``index_topk`` (DeepSeek-V3.2, GLM-5) a small indexer of ``index_heads`` heads of
    ``index_head_dim`` picks the ``index_topk`` tokens that a query attends to.
    """

    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_topk: int | None = None
    index_heads: int = 0
    index_head_dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(Record):
    """``layers`` of the layers attend to the last ``tokens`` tokens only."""

    tokens: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention(Record):
    """Gated delta-net in place of attention in ``layers`` of the layers (Qwen3-Next).

    A sequence keeps a state of fixed size there: per value head a matrix of
    ``key_head_dim`` x ``value_head_dim``, and the last inputs of a short convolution.
    """

    layers: int
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int
    state_bytes_per_value: int = 4
    """The matrices are float32 (``mamba_ssm_dtype``); the convolution's inputs bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPart:
    """Weights of one kind: how many, how stored, and how far TP can split them."""

    name: str
    params: int
    dtype: WeightDtype
    max_split: float = math.inf
    """GPUs beyond this number hold copies: 1 is whole on every GPU."""

    @property
    def num_bytes(self) -> float:
        return self.params * BYTES_PER_WEIGHT[self.dtype]


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
    gated: bool = True
    """The feed-forward has a gate matrix beside up and down (SwiGLU, GeGLU)."""
    attention_gate: bool = False
    """An output gate beside each query head, which doubles the query projection."""
    weight_dtype: WeightDtype = "bf16"
    """Type of the linear layers; embeddings, head, norms and routers take two bytes."""
    kv_bytes_per_value: int = 2
    moe: Moe | None = None
    mla: Mla | None = None
    window: Window | None = None
    linear: LinearAttention | None = None
    tp: tuple[int, ...] = ()
    """TP sizes the engine accepts: each divides ``heads``, and divides ``kv_heads`` or
    is a multiple of them. Empty means all that do."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field name -> where its value comes from; ``default`` covers the rest."""

    def __post_init__(self) -> None:
        if self.layers_of_attention < 0:
            raise InvalidInput(
                f"LLM {self.name!r}: window and linear layers exceed its {self.layers}"
            )
        if not self.tp:
            fitting = tuple(k for k in TP_SIZES if self._splits_over(k))
            object.__setattr__(self, "tp", fitting)
        bad = [k for k in self.tp if k not in TP_SIZES or not self._splits_over(k)]
        if bad:
            raise InvalidInput(
                f"LLM {self.name!r}: tp {list(self.tp)} must be among {list(TP_SIZES)}, "
                f"divide its {self.heads} attention heads, and divide or be a multiple "
                f"of its {self.kv_heads} KV heads"
            )

    def _splits_over(self, tp: int) -> bool:
        # MLA has no KV heads: each GPU keeps the latent whole.
        kv = self.mla is not None or self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        linear = self.linear is None or self.linear.key_heads % tp == 0
        return self.heads % tp == 0 and kv and linear

    def quantised(self, dtype: WeightDtype) -> ModelSpec:
        """The same LLM with all linear weights in ``dtype``, called ``<name>-<dtype>``."""
        moe = None if self.moe is None else replace(self.moe, dtype=None)
        return replace(self, name=f"{self.name}-{dtype}", weight_dtype=dtype, moe=moe)

    @property
    def layers_of_attention(self) -> int:
        """Layers whose attention sees the whole context."""
        windowed = 0 if self.window is None else self.window.layers
        return (
            self.layers - windowed - (0 if self.linear is None else self.linear.layers)
        )

    def weight_parts(self) -> tuple[WeightPart, ...]:
        """The weights by kind, counted from the shape; ``other`` makes up for the rest.

        ``other`` is what `params` holds beyond the matrices (biases, learned positions).
        """
        known = tuple(self._parts_of_shape())
        rest = self.params - sum(part.params for part in known)
        return (*known, WeightPart(name="other", params=rest, dtype="bf16"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole checkpoint as it is served."""
        return round(sum(part.num_bytes for part in self.weight_parts()))

    def weight_bytes_per_gpu(self, tp: int) -> int:
        """Bytes of one tensor-parallel shard.

        An even split, plus the copies of what cannot be split that far: norms, routers,
        MLA's projections into the latent, and KV heads where there are fewer than GPUs.
        """
        copied = sum(
            part.num_bytes * (1 / part.max_split - 1 / tp)
            for part in self.weight_parts()
            if part.max_split < tp
        )
        return -(-self.weight_bytes // tp) + round(copied)

    def kv_bytes_per_token_per_gpu(self, tp: int) -> int:
        """KV-cache bytes each further token of a long sequence takes on each GPU.

        GQA splits the KV heads over the GPUs and repeats a head where there are fewer
        heads than GPUs; MLA keeps its latent whole on every GPU, and so its indexer's
        keys (FP8 with a float32 scale per 128 values). Layers of a window or of linear
        attention do not grow: `kv_bytes_fixed_per_sequence_per_gpu`.
        """
        return self.layers_of_attention * self._kv_bytes_per_layer(tp)

    def kv_bytes_fixed_per_sequence_per_gpu(self, tp: int) -> int:
        """Bytes one sequence keeps on each of ``tp`` GPUs, whatever its length.

        The full windows (a sequence shorter than the window holds less) and the states
        of linear attention, whose heads are split over the GPUs.
        """
        fixed = 0
        if (w := self.window) is not None:
            fixed += w.layers * w.tokens * self._kv_bytes_per_layer(tp)
        if (a := self.linear) is not None:
            matrix = a.value_heads * a.key_head_dim * a.value_head_dim
            inputs = self._linear_channels(a) * (a.conv_width - 1)
            state = matrix * a.state_bytes_per_value + inputs * 2
            fixed += a.layers * -(-state // tp)
        return fixed

    def _kv_bytes_per_layer(self, tp: int) -> int:
        if (a := self.mla) is not None:
            latent = (a.kv_lora_rank + a.qk_rope_head_dim) * self.kv_bytes_per_value
            scales = -(-a.index_head_dim // 128) * 4
            return latent + (a.index_head_dim + scales if a.index_topk else 0)
        heads = max(1, self.kv_heads // tp)
        return 2 * heads * self.head_dim * self.kv_bytes_per_value

    @property
    def active_params(self) -> int:
        """Parameters one token is multiplied with (differs from `params` for MoE)."""
        return self.params - self._idle_expert_params()

    @property
    def active_weight_bytes(self) -> int:
        """Bytes of the parameters one token is multiplied with."""
        if self.moe is None:
            return self.weight_bytes
        dtype = self.moe.dtype or self.weight_dtype
        idle_bytes = self._idle_expert_params() * BYTES_PER_WEIGHT[dtype]
        return self.weight_bytes - round(idle_bytes)

    def _idle_expert_params(self) -> int:
        if (m := self.moe) is None:
            return 0
        idle = m.experts - m.experts_per_token
        return (self.layers - m.dense_layers) * idle * self._ffn(m.expert_intermediate)

    def params_from_shape(self) -> int:
        """Parameters counted from the shape: all but biases and learned positions."""
        return sum(part.params for part in self._parts_of_shape())

    def _ffn(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    @staticmethod
    def _linear_channels(a: LinearAttention) -> int:
        return 2 * a.key_heads * a.key_head_dim + a.value_heads * a.value_head_dim

    def _parts_of_shape(self) -> Iterator[WeightPart]:
        h, dtype = self.hidden, self.weight_dtype
        embeddings = self.vocab * h * (1 if self.tied_embeddings else 2)
        yield WeightPart(name="embeddings", params=embeddings, dtype="bf16")
        yield WeightPart(
            name="norms", params=(2 * self.layers + 1) * h, dtype="bf16", max_split=1
        )
        attending = self.layers - (0 if self.linear is None else self.linear.layers)
        parts = self._mla_parts() if self.mla is not None else self._gqa_parts()
        for part in parts:
            yield replace(part, params=attending * part.params)
        if self.linear is not None:
            for part in self._linear_parts(self.linear):
                yield replace(part, params=self.linear.layers * part.params)
        dense_layers = self.layers if self.moe is None else self.moe.dense_layers
        dense = dense_layers * self._ffn(self.intermediate)
        yield WeightPart(name="feed_forward", params=dense, dtype=dtype)
        if (m := self.moe) is not None:
            routed_layers = self.layers - m.dense_layers
            expert = routed_layers * self._ffn(m.expert_intermediate)
            router = routed_layers * m.experts * h
            yield WeightPart(name="router", params=router, dtype="bf16", max_split=1)
            shared = m.shared_experts * expert
            yield WeightPart(name="shared_experts", params=shared, dtype=dtype)
            experts = m.experts * expert
            yield WeightPart(name="experts", params=experts, dtype=m.dtype or dtype)

    def _gqa_parts(self) -> Iterator[WeightPart]:
        """One layer of multi-head or grouped-query attention."""
        h, d, dtype = self.hidden, self.head_dim, self.weight_dtype
        q_dim, kv_dim = self.heads * d, self.kv_heads * d
        queries = (3 if self.attention_gate else 2) * h * q_dim
        yield WeightPart(name="queries", params=queries, dtype=dtype)
        yield WeightPart(
            name="keys_values",
            params=2 * h * kv_dim,
            dtype=dtype,
            max_split=self.kv_heads,
        )
        small = (q_dim + 2 * kv_dim) * self.qkv_bias + 2 * d * self.qk_norm
        yield WeightPart(name="biases", params=small, dtype="bf16", max_split=1)

    def _mla_parts(self) -> Iterator[WeightPart]:
        """One layer of latent attention, with its indexer where it has one."""
        assert self.mla is not None
        a, h, dtype = self.mla, self.hidden, self.weight_dtype
        query_dim = self.heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        latent = h * (a.kv_lora_rank + a.qk_rope_head_dim)
        spread = a.kv_lora_rank * self.heads * (a.qk_nope_head_dim + a.v_head_dim)
        spread += self.heads * a.v_head_dim * h + (a.q_lora_rank or h) * query_dim
        norms = a.kv_lora_rank
        if a.q_lora_rank is not None:
            latent += h * a.q_lora_rank
            norms += a.q_lora_rank
        if a.index_topk is not None:
            latent += (a.q_lora_rank or h) * a.index_heads * a.index_head_dim
            latent += h * (a.index_head_dim + a.index_heads)
            norms += 2 * a.index_head_dim
        yield WeightPart(name="latents", params=latent, dtype=dtype, max_split=1)
        yield WeightPart(name="latent_norms", params=norms, dtype="bf16", max_split=1)
        yield WeightPart(name="heads", params=spread, dtype=dtype)

    def _linear_parts(self, a: LinearAttention) -> Iterator[WeightPart]:
        """One layer of gated delta-net: q, k, v and z, the gates, convolution, output."""
        values = a.value_heads * a.value_head_dim
        channels = self._linear_channels(a)
        matrices = self.hidden * (channels + 2 * values)
        small = 2 * self.hidden * a.value_heads + channels * a.conv_width
        small += 2 * a.value_heads + a.value_head_dim
        yield WeightPart(name="linear", params=matrices, dtype=self.weight_dtype)
        yield WeightPart(name="linear_gates", params=small, dtype="bf16")
