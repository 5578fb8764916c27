"""The weight types a checkpoint's ``quantization_config`` speaks of.

Reads what the common tools write: FP8 (per tensor, channel or block), compressed-tensors,
ModelOpt, MXFP4, AWQ and GPTQ. A type that no engine model here knows is refused, never
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.models.llm import WeightDtype

METHODS: Mapping[str, WeightDtype] = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "fp8_pb_wo": "fp8_block",
    "fp8_pc_pt": "fp8",
    "fp8_per_channel_per_token": "fp8",
    "nvfp4": "nvfp4",
    "nvfp4_awq": "nvfp4",
    "w4a16_nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "w4a16_awq": "int4",
}
"""``quant_method`` or ModelOpt's ``quant_algo``, in lower case."""

BY_BITS = ("awq", "gptq", "auto-round", "auto_round", "intel/auto-round", "awq_marlin")
GROUPED = ("compressed-tensors", "modelopt", "")
HINT = (
    "known: bf16, fp8 (per tensor or block), int4 (awq, gptq, compressed-tensors), "
    "nvfp4, mxfp4"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTypes:
    """Types of all linear weights, of the routed experts, and of the KV cache."""

    linears: WeightDtype = "bf16"
    experts: WeightDtype | None = None
    """None: as the other linears."""
    kv_bytes_per_value: int = 2


def weight_types(config: Mapping[str, Any] | None, *, experts: bool) -> WeightTypes:
    """What ``quantization_config`` says; ``experts``: whether the LLM has any.

    Where a mixture of experts keeps its attention in 16 bits, only its routed experts
    count as quantised (its dense layers and shared experts, a few percent of the weights,
    are taken as 16 bits too). Faults name the field inside ``quantization_config``.
    """
    if not config:
        return WeightTypes()
    # ModelOpt's own file, hf_quant_config.json, nests what config.json has flat.
    inner = config.get("quantization")
    config = {**config, **inner} if isinstance(inner, Mapping) else config
    dtype = _dtype(config)
    kv = 1 if _has_fp8_cache(config) else 2
    if not _keeps_attention(config):
        return WeightTypes(linears=dtype, kv_bytes_per_value=kv)
    if not experts:
        raise InvalidInput(
            "attention in 16 bits beside a quantised dense feed-forward is not supported",
            field=_ignore_field(config),
        )
    return WeightTypes(experts=dtype, kv_bytes_per_value=kv)


def _dtype(config: Mapping[str, Any]) -> WeightDtype:
    method = str(config.get("quant_method") or "").lower()
    algorithm = str(config.get("quant_algo") or "").lower()
    if algorithm:
        dtype = METHODS.get(algorithm)
        if dtype is None:
            raise InvalidInput(
                f"weights in {algorithm!r} are not supported",
                field="quant_algo",
                hint=HINT,
            )
    elif method in METHODS:
        dtype = METHODS[method]
    elif method in BY_BITS:
        bits = config.get("bits", config.get("w_bit"))
        dtype = "int4" if bits == 4 else None
        if dtype is None:
            raise InvalidInput(
                f"{method} weights of {bits} bits are not supported",
                field="bits",
                hint=HINT,
            )
    elif method in GROUPED and config.get("config_groups"):
        dtype = _of_groups(config["config_groups"])
    else:
        raise InvalidInput(
            f"weights in {method!r} are not supported", field="quant_method", hint=HINT
        )
    return "fp8_block" if dtype == "fp8" and config.get("weight_block_size") else dtype


def _of_groups(groups: object) -> WeightDtype:
    """The one weight type of compressed-tensors' ``config_groups``."""
    listed = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [g.get("weights") if isinstance(g, Mapping) else None for g in listed]
    found = {_of_group(w) if isinstance(w, Mapping) else None for w in weights}
    if len(found) != 1 or None in found:
        raise InvalidInput(
            "the weight types of its groups are unknown or differ",
            field="config_groups",
            hint=HINT,
        )
    dtype = found.pop()
    assert dtype is not None
    return dtype


def _of_group(weights: Mapping[str, Any]) -> WeightDtype | None:
    match (weights.get("type"), weights.get("num_bits"), weights.get("group_size")):
        case ("float", 8, _):
            blocks = weights.get("strategy") == "block" or weights.get(
                "block_structure"
            )
            return "fp8_block" if blocks else "fp8"
        case ("float", 4, 32):
            return "mxfp4"
        case ("float", 4, _):
            return "nvfp4"
        case ("int", 4, _):
            return "int4"
        case _:
            return None


def _ignore_field(config: Mapping[str, Any]) -> str:
    fields = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
    return next((name for name in fields if config.get(name)), fields[0])


def _keeps_attention(config: Mapping[str, Any]) -> bool:
    """Whether whole attention blocks are left out (not only norms or an indexer)."""
    left_out = config.get(_ignore_field(config))
    if not isinstance(left_out, list):
        return False
    return any(
        re.search(r"(self_attn|attention)[.*]*$", str(name)) for name in left_out
    )


def _has_fp8_cache(config: Mapping[str, Any]) -> bool:
    scheme = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        return scheme.get("num_bits") == 8
    return str(scheme or "").lower() == "fp8"
