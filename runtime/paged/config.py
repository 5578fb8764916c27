"""What a decoder is made of, read from Hugging Face's ``config.json``.

One record describes all families: each family's code fixes a few things that its file does
not say (`_TRAITS`), the file says the rest. Files of transformers 4 (``rope_theta``,
``rope_scaling``) and 5 (``rope_parameters``) are both read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any, Literal

from foreserve.models.errors import InvalidInput

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions of one kind of layers."""

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    """Of ``llama3``: wave lengths above ``original_tokens / low`` are stretched in full,
    those below ``original_tokens / high`` not at all."""
    original_tokens: int = 0
    fast: float = 32.0
    slow: float = 1.0
    """Of ``yarn``: turns within ``original_tokens`` that bound what is stretched."""
    truncate: bool = True
    attention: float = 1.0
    """Factor of sines and cosines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A feed-forward of which each token takes a few."""

    count: int
    per_token: int
    inner: int
    normalise: bool
    """The chosen ones' shares add up to 1."""
    prefix: str
    """Where they are in a layer's names."""
    names: tuple[str, str, str]
    """Of the gate, up and down projections of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One LLM's decoder. Sizes are those of the whole LLM, not of a shard."""

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    activation: Activation
    context_tokens: int
    ropes: tuple[Rope, ...]
    """One per kind of layers."""
    rope_of: tuple[int, ...]
    """Per layer: index into ``ropes``."""
    windows: tuple[int | None, ...]
    """Per layer: how far back a token sees, itself included; None: to the beginning."""
    attention_scale: float
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    """Added to the weights of norms."""
    sandwich: bool = False
    """Norms also behind attention and feed-forward, before they are added."""
    embedding_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    experts: Experts | None = None
    end_tokens: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    """What the checkpoint says it is stored in."""

    def kv_token_bytes(self, itemsize: int, tp: int = 1) -> int:
        """KV cache of one token on each of ``tp`` GPUs."""
        return 2 * self.layers * max(1, self.kv_heads // tp) * self.head_dim * itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traits:
    """What a family's code fixes; the defaults are Llama's."""

    qkv_bias: bool | None = None
    """None: as ``attention_bias`` says."""
    out_bias: bool | None = None
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich: bool = False
    scaled_embedding: bool = False
    tied: bool = False
    window: Literal["never", "stated", "asked", "pattern"] = "never"
    """``stated``: as ``sliding_window`` says; ``asked``: if ``use_sliding_window``;
    ``pattern``: by layer."""
    period: int = 0
    """Of a ``pattern``: every so many layers one sees everything."""
    experts: tuple[str, tuple[str, str, str]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {
    "norm_offset": 1.0,
    "scaled_embedding": True,
    "tied": True,
}
_GATED = ("gate_proj", "up_proj", "down_proj")
_TRAITS: Mapping[str, _Traits] = {
    "llama": _Traits(),
    "mistral": _Traits(qkv_bias=False, out_bias=False, window="stated"),
    "mixtral": _Traits(
        qkv_bias=False,
        out_bias=False,
        window="stated",
        experts=("block_sparse_moe", ("w1", "w3", "w2")),
    ),
    "qwen2": _Traits(qkv_bias=True, out_bias=False, window="asked"),
    "qwen3": _Traits(qk_norm=True, window="asked"),
    "qwen3_moe": _Traits(qk_norm=True, window="asked", experts=("mlp", _GATED)),
    "gemma": _Traits(**_GEMMA),
    "gemma2": _Traits(
        **_GEMMA,
        sandwich=True,
        window="pattern",
        period=2,
        defaults={
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    ),
    "gemma3_text": _Traits(
        **_GEMMA,
        sandwich=True,
        qk_norm=True,
        window="pattern",
        period=6,
        defaults={
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
        },
    ),
}
FAMILIES = tuple(_TRAITS)
"""The ``model_type`` values that there is a decoder for."""


def read_config(folder: Path) -> DecoderConfig:
    """The decoder of the checkpoint in ``folder``; raises `InvalidInput` if it is of a
    family, or has a trait, that there is no decoder for."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"no config.json: {error}", file=str(path)) from error
    ends = raw.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        ends = json.loads(generation.read_text()).get("eos_token_id", ends)
    try:
        return parse(raw.get("text_config", raw), ends)
    except KeyError as error:
        raise InvalidInput(f"{error} is missing", file=str(path)) from error
    except InvalidInput as error:
        raise InvalidInput(str(error), file=str(path)) from error


def parse(raw: Mapping[str, Any], end_tokens: Any = None) -> DecoderConfig:
    """`read_config` of the file's contents."""
    family = raw.get("model_type", "")
    if family not in _TRAITS:
        raise InvalidInput(
            f"model_type {family!r}: there is no decoder for it",
            hint=f"expected one of {', '.join(_TRAITS)}",
        )
    traits = _TRAITS[family]
    raw = {**traits.defaults, **{k: v for k, v in raw.items() if v is not None}}
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    layers = raw["num_hidden_layers"]
    head_dim = raw.get("head_dim") or hidden // heads
    word = raw.get("hidden_activation") or raw.get("hidden_act", "silu")
    if family.startswith("gemma"):
        word = "gelu_pytorch_tanh"
    if word not in ACTIVATIONS:
        raise InvalidInput(f"hidden_act {word!r}: expected {', '.join(ACTIVATIONS)}")
    biased = bool(raw.get("attention_bias", False))
    kinds = _kinds(raw, traits, layers)
    ropes, rope_of = _ropes(raw, kinds)
    scalar = raw.get("query_pre_attn_scalar", head_dim) if traits.sandwich else head_dim
    ends = raw.get("eos_token_id") if end_tokens is None else end_tokens
    return DecoderConfig(
        family=family,
        vocabulary=raw["vocab_size"],
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads", heads),
        head_dim=head_dim,
        inner=raw["intermediate_size"],
        eps=raw.get("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[word],
        context_tokens=raw.get("max_position_embeddings", 4096),
        ropes=ropes,
        rope_of=rope_of,
        windows=tuple(raw["sliding_window"] if near else None for near in kinds),
        attention_scale=scalar**-0.5,
        tied=bool(raw.get("tie_word_embeddings", traits.tied)),
        qkv_bias=biased if traits.qkv_bias is None else traits.qkv_bias,
        out_bias=biased if traits.out_bias is None else traits.out_bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=traits.qk_norm,
        norm_offset=traits.norm_offset,
        sandwich=traits.sandwich,
        embedding_scale=hidden**0.5 if traits.scaled_embedding else 1.0,
        attention_cap=raw.get("attn_logit_softcapping"),
        logit_cap=raw.get("final_logit_softcapping"),
        experts=_experts(raw, traits),
        end_tokens=tuple(
            ends if isinstance(ends, list) else [] if ends is None else [ends]
        ),
        dtype=raw.get("dtype") or raw.get("torch_dtype", "bfloat16"),
    )


def _kinds(raw: Mapping[str, Any], traits: _Traits, layers: int) -> list[bool]:
    """Per layer: whether it sees no further than a window."""
    if "sliding_window" not in raw or traits.window == "never":
        return [False] * layers
    if traits.window == "asked" and not raw.get("use_sliding_window", False):
        return [False] * layers
    if "layer_types" in raw:
        return [kind == "sliding_attention" for kind in raw["layer_types"]]
    if traits.window == "pattern":
        period = raw.get("sliding_window_pattern", traits.period)
        return [bool((layer + 1) % period) for layer in range(layers)]
    if traits.window == "asked":
        # The first ``max_window_layers`` see everything.
        return [layer >= raw.get("max_window_layers", 28) for layer in range(layers)]
    return [True] * layers


def _ropes(
    raw: Mapping[str, Any], kinds: list[bool]
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    stated = raw.get("rope_parameters") or {}
    if "full_attention" in stated:
        far, near = stated["full_attention"], stated["sliding_attention"]
    else:
        far = {
            "rope_theta": raw.get("rope_theta", 10000.0),
            **(raw.get("rope_scaling") or {}),
            **stated,
        }
        near = far
        if raw["model_type"] == "gemma3_text":
            near = {"rope_theta": raw.get("rope_local_base_freq", 10000.0)}
    return (
        (_rope(far, raw), _rope(near, raw)),
        tuple(int(is_near) for is_near in kinds),
    )


def _rope(stated: Mapping[str, Any], raw: Mapping[str, Any]) -> Rope:
    if stated.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
        raise InvalidInput("partial_rotary_factor: only whole heads are turned")
    kind = stated.get("rope_type", stated.get("type", "default"))
    theta = float(stated.get("rope_theta", raw.get("rope_theta", 10000.0)))
    factor = float(stated.get("factor", 1.0))
    original = int(
        stated.get("original_max_position_embeddings")
        or raw.get("max_position_embeddings", 4096)
    )
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(kind="linear", theta=theta, factor=factor)
    if kind == "llama3":
        return Rope(
            kind="llama3",
            theta=theta,
            factor=factor,
            low=float(stated["low_freq_factor"]),
            high=float(stated["high_freq_factor"]),
            original_tokens=original,
        )
    if kind == "yarn":
        return Rope(
            kind="yarn",
            theta=theta,
            factor=factor,
            original_tokens=original,
            fast=float(stated.get("beta_fast") or 32.0),
            slow=float(stated.get("beta_slow") or 1.0),
            truncate=bool(stated.get("truncate", True)),
            attention=_yarn_attention(stated, factor),
        )
    raise InvalidInput(
        f"rope_type {kind!r}: expected default, linear, llama3 or yarn",
    )


def _yarn_attention(stated: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature: 0.1 ln(factor) + 1, unless the file says otherwise."""

    def scale(weight: float) -> float:
        return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0

    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        return scale(stated["mscale"]) / scale(stated["mscale_all_dim"])
    return scale(1.0)


def _experts(raw: Mapping[str, Any], traits: _Traits) -> Experts | None:
    if traits.experts is None:
        return None
    prefix, names = traits.experts
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise InvalidInput("mixed layers with and without experts have no decoder")
    return Experts(
        count=raw.get("num_local_experts") or raw["num_experts"],
        per_token=raw["num_experts_per_tok"],
        inner=raw.get("moe_intermediate_size", raw["intermediate_size"]),
        normalise=bool(raw.get("norm_topk_prob", prefix == "block_sparse_moe")),
        prefix=prefix,
        names=names,
    )
