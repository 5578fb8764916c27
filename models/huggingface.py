"""From a Hugging Face ``config.json`` to a `ModelSpec`, for decoder-only transformers.

The keys of a ``config.json`` name the shape, but differ by family, and some facts (is the
feed-forward gated, which layers have biases) are written only in the family's code.
`FAMILIES` holds those facts; a family that is not listed is read as Llama-like. What does
not fit `ModelSpec` (encoder-decoders, state-space layers, attention whose shape changes
between layers) is refused with the field that says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from foreserve.models.errors import InvalidInput
from foreserve.models.families import FAMILIES, Family
from foreserve.models.llm import LinearAttention, Mla, ModelSpec, Moe, Window
from foreserve.models.quantisation import WeightTypes, weight_types

ONLY = "decoder-only transformers are supported"
OUTPUT_BIAS = ("gpt_oss", "llama")
"""Families in which ``attention_bias`` means the output projection too."""
REFUSED_TYPES = re.compile(r"mamba|rwkv|nemotron_h|jamba|bamba|^bert|^t5|^deepseek_v4")
REFUSED_ARCHITECTURES = re.compile(r"MaskedLM|Classification|QuestionAnswering|Encoder")
REFUSED_KEYS: Mapping[str, str] = {
    "ssm_cfg": "state-space layers",
    "hybrid_override_pattern": "state-space layers",
    "mamba_d_state": "state-space layers",
    "global_head_dim": "heads of different sizes",
    "hybrid_layer_pattern": "heads that differ between layers",
    "compress_ratios": "a compressed KV cache",
    "indexer_types": "an indexer shared between layers",
}
INHERITED = (
    *("tie_word_embeddings", "quantization_config", "compression_config"),
    *("architectures", "is_encoder_decoder", "_name_or_path"),
)
"""Keys a multimodal wrapper may hold for the LLM in its ``text_config``."""
WRAPPED = ("text_config", "llm_config", "language_config")


def from_config(
    config: Mapping[str, Any],
    *,
    name: str,
    hub_id: str | None = None,
    file: str | None = None,
) -> ModelSpec:
    """The LLM that ``config`` (a parsed ``config.json``) describes.

    Parameters are counted from the shape, biases and learned positions included; the
    vision part of a multimodal LLM and layers for speculative decoding are not. Raises
    `InvalidInput` with ``file`` and field where a key is missing or its value does not
    fit.
    """
    try:
        return _Reader(config).spec(name, hub_id or name)
    except InvalidInput as error:
        raise error.at(file=file) from None


class _Reader:
    """One config with its family: reads keys by any of their names, and checks them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        nested = next(
            (key for key in WRAPPED if isinstance(config.get(key), dict)), None
        )
        if nested is not None:
            outer = {k: config[k] for k in INHERITED if config.get(k) is not None}
            config = {**outer, **config[nested]}
        self.model_type = str(config.get("model_type", ""))
        self.family = FAMILIES.get(self.model_type, Family())
        self.config = {**self.family.defaults, **config}
        self._refuse_others()
        self.hidden = self.number("hidden_size", "n_embd", "d_model", "n_embed")
        self.layers = self.number("num_hidden_layers", "n_layer", "n_layers")
        self.heads = self.number("num_attention_heads", "n_head", "n_heads")

    def _refuse_others(self) -> None:
        config = self.config
        if config.get("is_encoder_decoder"):
            raise InvalidInput(
                "an encoder-decoder", field="is_encoder_decoder", hint=ONLY
            )
        if REFUSED_TYPES.search(self.model_type):
            raise InvalidInput(
                f"{self.model_type!r} is not supported", field="model_type", hint=ONLY
            )
        for name in config.get("architectures") or ():
            if REFUSED_ARCHITECTURES.search(str(name)):
                raise InvalidInput(
                    f"{name!r} does not generate text", field="architectures", hint=ONLY
                )
        for key, what in REFUSED_KEYS.items():
            if config.get(key):
                raise InvalidInput(f"{what}: not supported", field=key, hint=ONLY)

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that is there; a positive whole number."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise InvalidInput(
                    f"a positive whole number is expected, got {value!r}", field=name
                )
            return value
        if default is None:
            hint = "also known as " + ", ".join(names[1:]) if names[1:] else None
            raise InvalidInput("required key is missing", field=names[0], hint=hint)
        return default

    def count(self, name: str) -> int:
        """The whole number at ``name``; 0 where it is missing, null or 0."""
        return self.number(name) if self.config.get(name) else 0

    def listed(self, name: str) -> list[Any] | None:
        """The list at ``name``, if there is one."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, list):
            raise InvalidInput(f"a list is expected, got {value!r}", field=name)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)

    def spec(self, name: str, hub_id: str) -> ModelSpec:
        family, kv_heads = self.family, self._kv_heads()
        moe, mla, linear = self._moe(), self._mla(), self._linear()
        types = self._weight_types(moe)
        head_dim = self.number("head_dim", default=max(1, self.hidden // self.heads))
        if mla is not None:
            head_dim = mla.v_head_dim
        qkv_bias = family.qkv_bias
        if qkv_bias is None:
            qkv_bias = self.flag("attention_bias") or self.flag("qkv_bias")
        spec = ModelSpec(
            name=name,
            hub_id=hub_id,
            params=0,
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self._intermediate(),
            heads=self.heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=self.number("vocab_size"),
            max_context_tokens=self._context(),
            tied_embeddings=self.flag("tie_word_embeddings", family.tied),
            qkv_bias=qkv_bias and mla is None,
            qk_norm=self._qk_norm() == "head" and mla is None,
            gated=family.gated,
            attention_gate=self.flag("attn_output_gate", family.attention_gate),
            weight_dtype=types.linears,
            kv_bytes_per_value=types.kv_bytes_per_value,
            moe=None if moe is None else replace(moe, dtype=types.experts),
            mla=mla,
            window=self._window(),
            linear=linear,
            sources=self._sources(),
        )
        return replace(spec, params=spec.params_from_shape() + self._small(spec))

    def _sources(self) -> dict[str, str]:
        known = self.model_type in FAMILIES
        note = "" if known else f" (model_type {self.model_type!r} read as Llama-like)"
        return {
            "default": f"config.json{note}",
            "params": "counted from the shape in config.json",
            "weight_dtype": "quantization_config of config.json; 16 bits without one",
            "kv_bytes_per_value": "FP8 where quantization_config says so, else 16 bits",
            "tp": "TP divides the heads; it divides the KV heads or is a multiple of them",
        }

    def _kv_heads(self) -> int:
        if self.flag("multi_query") and not self.flag("new_decoder_architecture"):
            return 1
        nested = self.config.get("attn_config")
        inner = nested.get("kv_n_heads") if isinstance(nested, dict) else None
        return self.number(
            "num_key_value_heads",
            "num_kv_heads",
            "n_head_kv",
            default=inner or self.heads,
        )

    def _intermediate(self) -> int:
        if self.model_type == "llama4_text":
            return self.number("intermediate_size_mlp")
        ratio = self.config.get("expansion_ratio", self.config.get("ffn_hidden_size"))
        width = 4 * self.hidden
        if isinstance(ratio, int):
            width = ratio * self.hidden if ratio < 100 else ratio
        names = ("intermediate_size", "ffn_dim", "n_inner")
        # A gated width is never 4 x hidden by rule, but experts may be all there is.
        needed = self.family.gated and "moe_intermediate_size" not in self.config
        return self.number(*names, default=None if needed else width)

    def _context(self) -> int:
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        return self.number(*names)

    def _qk_norm(self) -> Literal["head", "width"] | None:
        default = self.family.qk_norm
        if not self.flag("use_qk_norm", default is not None):
            return None
        return default or "head"

    def _moe(self) -> Moe | None:
        names = ("n_routed_experts", "num_experts", "num_local_experts")
        experts = next((self.number(n) for n in names if self.config.get(n)), 1)
        if experts == 1:
            return None
        per_token = self.number("num_experts_per_tok", "experts_per_token")
        if per_token > experts:
            raise InvalidInput(
                f"{per_token} of {experts} experts", field="num_experts_per_tok"
            )
        width = self.number("moe_intermediate_size", "intermediate_size")
        shared = self.count("n_shared_experts") or self.count("num_shared_experts")
        for key in ("shared_expert_intermediate_size", "shared_intermediate_size"):
            if shared:
                break
            shared, rest = divmod(self.count(key), width)
            if rest:
                raise InvalidInput(
                    f"not a multiple of the experts' width {width}", field=key
                )
        if self.model_type == "llama4_text":
            shared = 1
        return Moe(
            experts=experts,
            experts_per_token=per_token,
            expert_intermediate=width,
            shared_experts=shared,
            dense_layers=self._dense_layers(),
        )

    def _dense_layers(self) -> int:
        """Layers without experts, by any of the ways in which families say it."""
        pattern = self.config.get("moe_layer_freq")
        if isinstance(pattern, list) and len(pattern) == self.layers:
            return self.layers - sum(map(bool, pattern))
        first = min(self.layers, self.count("first_k_dense_replace"))
        names = ("interleave_moe_layer_step", "moe_layer_freq", "decoder_sparse_step")
        period = max(self.count(name) for name in names) or 1
        if period == 1:
            listed = self.listed("mlp_only_layers") or ()
            return min(self.layers, first + len(listed))
        return self.layers - (self.layers - first) // period

    def _mla(self) -> Mla | None:
        if not self.config.get("kv_lora_rank"):
            return None
        sparse = bool(self.config.get("index_topk"))
        return Mla(
            q_lora_rank=self.number("q_lora_rank", default=0) or None,
            kv_lora_rank=self.number("kv_lora_rank"),
            qk_nope_head_dim=self.number("qk_nope_head_dim"),
            qk_rope_head_dim=self.number("qk_rope_head_dim"),
            v_head_dim=self.number("v_head_dim"),
            index_topk=self.number("index_topk") if sparse else None,
            index_heads=self.number("index_n_heads") if sparse else 0,
            index_head_dim=self.number("index_head_dim") if sparse else 0,
        )

    def _layer_types(self) -> list[str]:
        """What each layer attends with: full, a window, or linear attention."""
        types = self.listed("layer_types")
        if types is None:
            if "linear_num_value_heads" in self.config:
                return self._periodic("full_attention_interval", "linear_attention", 4)
            if self._window_tokens() is None:
                return ["full_attention"] * self.layers
            if "no_rope_layers" in self.config or self.model_type == "llama4_text":
                return self._periodic("no_rope_layer_interval", "chunked_attention", 4)
            period = self.family.window_period or 0
            names = ("sliding_window_pattern", "_sliding_window_pattern")
            key = next((n for n in names if n in self.config), names[0])
            return self._periodic(key, "sliding_attention", period)
        known = ("full", "sliding", "chunked", "linear")
        bad = [t for t in types if str(t).partition("_")[0] not in known]
        if bad or len(types) != self.layers:
            what = f"{bad[0]!r} layers" if bad else f"{len(types)} layers listed"
            raise InvalidInput(
                f"{what}: not supported with {self.layers} layers", field="layer_types"
            )
        return [str(t) for t in types]

    def _periodic(self, key: str, other: str, default: int) -> list[str]:
        """Every n-th layer is full attention (n of ``key``), the rest ``other``."""
        period = self.number(key, default=default)
        full = self.layers // period if period else 0
        return ["full_attention"] * full + [other] * (self.layers - full)

    def _window_tokens(self) -> int | None:
        if not self.flag("use_sliding_window", default=True):
            return None
        names = ("sliding_window", "attention_chunk_size")
        found = next((n for n in names if self.config.get(n)), None)
        if found is None:
            return None
        tokens = self.number(found)
        return tokens if tokens < self._context() else None

    def _window(self) -> Window | None:
        tokens, types = self._window_tokens(), self._layer_types()
        layers = sum(t.startswith(("sliding", "chunked")) for t in types)
        if "use_sliding_window" in self.config and "layer_types" not in self.config:
            # Qwen2: the first layers keep full attention.
            layers -= min(layers, self.number("max_window_layers", default=layers))
        if tokens is None or not layers:
            return None
        return Window(tokens=tokens, layers=layers)

    def _linear(self) -> LinearAttention | None:
        layers = sum(t.startswith("linear") for t in self._layer_types())
        if not layers:
            return None
        return LinearAttention(
            layers=layers,
            key_heads=self.number("linear_num_key_heads"),
            value_heads=self.number("linear_num_value_heads"),
            key_head_dim=self.number("linear_key_head_dim"),
            value_head_dim=self.number("linear_value_head_dim"),
            conv_width=self.number("linear_conv_kernel_dim"),
        )

    def _weight_types(self, moe: Moe | None) -> WeightTypes:
        names = ("quantization_config", "compression_config")
        name = next((n for n in names if self.config.get(n)), names[0])
        found = self.config.get(name)
        if found is not None and not isinstance(found, dict):
            raise InvalidInput("a mapping is expected", field=name)
        try:
            return weight_types(found, experts=moe is not None)
        except InvalidInput as error:
            raise InvalidInput(
                error.message,
                field=f"{name}.{error.field}",
                hint=error.hint,
            ) from None

    def _small(self, spec: ModelSpec) -> int:
        """Parameters beside the matrices: biases, learned positions, further norms."""
        family, h, layers = self.family, self.hidden, self.layers
        norms = (family.norms - 2) * layers + family.extra_norms
        if self.flag("new_decoder_architecture"):
            attending_norms = 2
        elif self.model_type == "falcon" and self.flag("parallel_attn", True):
            attending_norms, norms = 1, norms - layers
        else:
            attending_norms = family.norms
        small = norms * h
        if family.norm_biases:
            small += (attending_norms * layers + 1 + family.extra_norms) * h
        if self._qk_norm() == "width":
            small += layers * (spec.heads + spec.kv_heads) * spec.head_dim
        feed_forward = 0
        if family.biases or self.flag("mlp_bias"):
            ups = 2 if family.gated else 1
            feed_forward = ups * spec.intermediate + h
        outputs = family.biases or (spec.qkv_bias and self.model_type in OUTPUT_BIAS)
        small += layers * (feed_forward + h * outputs)
        if family.positions is not None and not self._alibi():
            small += (spec.max_context_tokens + family.positions) * h
        return small + self._small_of_experts(spec)

    def _alibi(self) -> bool:
        nested = self.config.get("attn_config")
        return self.flag("alibi") or bool(
            isinstance(nested, dict) and nested.get("alibi")
        )

    def _small_of_experts(self, spec: ModelSpec) -> int:
        if (m := spec.moe) is None:
            return 0
        routed = spec.layers - m.dense_layers
        small = 0
        if self.family.routing_bias:
            small += routed * m.experts
        if self.config.get("shared_expert_intermediate_size"):
            small += routed * spec.hidden  # the shared expert's own gate
        if self.model_type == "gpt_oss":
            expert = 2 * m.expert_intermediate + spec.hidden
            small += routed * m.experts * (1 + expert) + spec.layers * spec.heads
        return small
