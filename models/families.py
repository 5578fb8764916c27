"""What the code of a ``model_type`` fixes and its ``config.json`` does not say.

One row per family; the defaults are Llama's, which most families follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the code of one ``model_type`` fixes; the defaults are Llama's."""

    gated: bool = True
    tied: bool = False
    """Embeddings tied where ``tie_word_embeddings`` is not written."""
    qkv_bias: bool | None = None
    """None: as ``attention_bias`` says."""
    biases: bool = False
    """Biases in the output projection and the feed-forward."""
    norm_biases: bool = False
    norms: int = 2
    """Norms of width ``hidden`` per layer."""
    qk_norm: Literal["head", "width"] | None = None
    """Norms of q and k over each head, or over all heads together."""
    extra_norms: int = 0
    """Further norms of width ``hidden`` outside the layers, or -1 for one fewer."""
    positions: int | None = None
    """Learned positions: the context and this many more; None: none are learned."""
    attention_gate: bool = False
    routing_bias: bool = False
    """The router has a bias per expert."""
    window_period: int | None = None
    """Every so many layers one attends to everything, the others to a window."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that published files of the family leave out."""


_QWEN_NEXT = Family(qk_norm="head", attention_gate=True)
_CLASSIC = Family(gated=False, tied=True, qkv_bias=True, biases=True, norm_biases=True)
_GEMMA = Family(tied=True)
_ROUTED = Family(routing_bias=True)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mistral3": Family(),
    "mixtral": Family(),
    "granite": Family(),
    "smollm3": Family(),
    "seed_oss": Family(),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_text": _QWEN_NEXT,
    "qwen3_5_moe_text": _QWEN_NEXT,
    "qwen3_vl_text": Family(qk_norm="head"),
    "qwen3_vl_moe_text": Family(qk_norm="head"),
    "deepseek_v2": Family(),
    "deepseek_v3": _ROUTED,
    "deepseek_v32": _ROUTED,
    "kimi_k2": _ROUTED,
    "kimi_k25": _ROUTED,
    "glm_moe_dsa": _ROUTED,
    "glm4_moe_lite": _ROUTED,
    "glm4_moe": replace(_ROUTED, defaults={"attention_bias": True}),
    "glm4": Family(norms=4),
    "minimax_m2": replace(_ROUTED, qk_norm="width"),
    "gpt_oss": Family(window_period=2),
    "llama4_text": Family(),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4, window_period=2),
    "gemma3_text": replace(
        _GEMMA,
        norms=4,
        qk_norm="head",
        window_period=6,
        defaults={
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
        },
    ),
    "cohere": Family(tied=True, norms=1),
    "cohere2": Family(tied=True, norms=1, window_period=4),
    "olmo": Family(norms=0, extra_norms=-1),
    "olmo2": Family(qk_norm="width"),
    "olmo3": Family(qk_norm="width", window_period=4),
    "opt": replace(_CLASSIC, positions=2),
    "gpt2": replace(_CLASSIC, positions=0),
    "gpt_bigcode": replace(_CLASSIC, positions=0),
    "gpt_neox": replace(_CLASSIC, tied=False),
    "starcoder2": _CLASSIC,
    # A norm with its bias follows the embeddings.
    "bloom": replace(_CLASSIC, extra_norms=1, defaults={"seq_length": 2048}),
    "mpt": Family(gated=False, tied=True, qkv_bias=False, positions=0),
    "falcon": Family(
        gated=False,
        tied=True,
        qkv_bias=False,
        norm_biases=True,
        defaults={"max_position_embeddings": 2048},
    ),
}
