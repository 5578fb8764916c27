"""LLMs from a config.json: every family's shape, weight types, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models import catalog
from foreserve.models.errors import InvalidInput
from foreserve.models.huggingface import from_config
from foreserve.models.llm import ModelSpec, Window

FOLDER = Path(__file__).parent / "configs"
"""The keys that matter of published files; ``_name_or_path`` says whose."""
CONFIGS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
}
KNOWN = sorted(set(CONFIGS) & {llm.name for llm in catalog.llms()})
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
"""Llama-3.1-8B: 8,030,261,248 parameters."""


def derived(name: str) -> ModelSpec:
    return from_config(CONFIGS[name], name=name)


@pytest.mark.parametrize("name", KNOWN)
def test_the_catalogue_follows_from_config_json(name: str) -> None:
    """Each entry whose config.json is here equals what is derived from it.

    Only who says so, the weights' address and a narrower choice of TP sizes may differ.
    """
    entry, llm = catalog.llm(name), derived(name)
    assert set(entry.tp) <= set(llm.tp)
    same = replace(llm, hub_id=entry.hub_id, sources=entry.sources, tp=entry.tp)
    assert same == entry


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("bloom-176b", 176_247_271_424),
        ("falcon-7b", 6_921_720_704),
        ("gemma-2-9b", 9_241_705_984),
        ("gpt-neox-20b", 20_554_567_680),
        ("gpt-oss-120b", 116_829_156_672),
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt2", 124_439_808),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-small-24b", 23_572_403_200),
        ("mpt-7b", 6_649_286_656),
        ("opt-13b", 12_853_473_280),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("qwen3-next-80b", 79_674_391_296),
        ("starcoder", 15_517_456_384),
    ],
)
def test_parameters_are_the_published_ones(name: str, params: int) -> None:
    """Biases, norms and learned positions of each family add up to the checkpoint's."""
    assert derived(name).params == params


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-r1", 671),
        ("gemma-3-27b", 27.016),
        ("glm-5", 744),
        ("kimi-k2.5", 1026),
        ("minimax-m2.5", 229),
        ("opt-66b", 65.7),
        ("qwen3.5-397b-a17b", 397),
    ],
)
def test_parameters_agree_with_what_is_advertised(name: str, billions: float) -> None:
    """Where only a rounded number is published: within 0.3 % of it."""
    assert derived(name).params / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize(
    ("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)]
)
def test_checkpoints_are_as_large_as_published(name: str, gib: float) -> None:
    """MXFP4 experts beside 16-bit attention: the model card's checkpoint sizes."""
    assert round(derived(name).weight_bytes / 2**30, 1) == gib


def test_windows_and_linear_layers() -> None:
    """Every second layer of gpt-oss, five of six of Gemma 3 (62 = 6 x 10 + 2), half of
    Gemma 2's 42, and three of four of Qwen3.5's 60; Qwen2's window is switched off."""
    assert derived("gpt-oss-120b").window == Window(tokens=128, layers=18)
    assert derived("gemma-3-27b").window == Window(tokens=1024, layers=52)
    assert derived("gemma-2-9b").window == Window(tokens=4096, layers=21)
    assert derived("qwen2.5-7b").window is None
    linear = derived("qwen3.5-397b-a17b").linear
    assert linear is not None
    assert linear.layers == 45
    assert (
        derived("qwen3.5-397b-a17b").kv_bytes_per_token_per_gpu(2) == 15 * 2 * 256 * 2
    )
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 4096}
    assert from_config(mistral, name="x").window == Window(tokens=4096, layers=32)
    without = {k: v for k, v in CONFIGS["gpt-oss-20b"].items() if k != "layer_types"}
    assert from_config(without, name="gpt-oss-20b") == derived("gpt-oss-20b")


QUANTISED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        "nvfp4",
    ),
    ({"quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
    ({"quant_method": "awq", "bits": 4}, "int4"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4"),
    ({"quant_method": "mxfp4"}, "mxfp4"),
]


def grouped(**weights: object) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *QUANTISED,
        (grouped(type="float", num_bits=8, strategy="channel"), "fp8"),
        (grouped(type="float", num_bits=8, strategy="block"), "fp8_block"),
        (grouped(type="float", num_bits=4, group_size=16), "nvfp4"),
        (grouped(type="float", num_bits=4, group_size=32), "mxfp4"),
        (grouped(type="int", num_bits=4, group_size=32), "int4"),
    ],
)
def test_weight_types(config: dict[str, Any], dtype: str) -> None:
    """What each tool writes; the shape, and so the parameters, stay the same."""
    llm = from_config({**LLAMA, "quantization_config": config}, name="x")
    assert llm.weight_dtype == dtype
    assert llm.params == 8_030_261_248


def test_types_of_experts_and_cache() -> None:
    """Kimi-K2.5 keeps attention in 16 bits; ModelOpt may ask for an FP8 KV cache.

    Leaving out norms, routers or an indexer's projections is no such exception.
    """
    kimi = derived("kimi-k2.5")
    assert kimi.moe is not None
    assert (kimi.weight_dtype, kimi.moe.dtype) == ("bf16", "int4")
    cached = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    llm = from_config({**LLAMA, "quantization_config": cached}, name="x")
    assert llm.kv_bytes_per_value == 1
    narrow = {
        **cached,
        "ignore": ["model.layers.0.self_attn.q_norm", "model.layers.0.mlp.gate"],
    }
    llm = from_config({**LLAMA, "quantization_config": narrow}, name="x")
    assert llm.weight_dtype == "fp8"


def test_an_unknown_family_is_read_as_llama_and_says_so() -> None:
    """The shape is taken at its word; the source names the assumption."""
    llm = from_config({**LLAMA, "model_type": "novel"}, name="x")
    assert llm.params == 8_030_261_248
    assert "'novel' read as Llama-like" in llm.sources["default"]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"hidden_size": None}, "hidden_size", "required key is missing"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers", "got '32'"),
        ({"vocab_size": 0}, "vocab_size", "positive"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder", "encoder-decoder"),
        ({"model_type": "mamba2"}, "model_type", "not supported"),
        ({"architectures": ["BertForMaskedLM"]}, "architectures", "does not generate"),
        ({"layer_types": ["mamba"] * 32}, "layer_types", "'mamba' layers"),
        ({"layer_types": ["full_attention"]}, "layer_types", "1 layers listed"),
        ({"compress_ratios": [4]}, "compress_ratios", "compressed"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config.quant_method",
            "'bitsandbytes'",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            "quantization_config.bits",
            "3 bits",
        ),
        (
            {
                "quantization_config": {
                    "quant_algo": "FP8",
                    "ignore": ["re:.*self_attn.*"],
                }
            },
            "quantization_config.ignore",
            "16 bits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], field: str, message: str
) -> None:
    """One line with the file, the field and what is wrong; nothing is guessed."""
    with pytest.raises(InvalidInput, match=message) as caught:
        from_config({**LLAMA, **change}, name="x", file="config.json")
    assert (caught.value.file, caught.value.field) == ("config.json", field)


JUNK = st.sampled_from([None, 0, -1, 3, 2.5, "x", True, [], [1], {}, {"a": {"b": 1}}])


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data(), junk=JUNK)
def test_any_broken_config_is_an_input_error(
    name: str, data: st.DataObject, junk: object
) -> None:
    """A published config with one value replaced by junk: an LLM or `InvalidInput`."""
    config = json.loads(json.dumps(CONFIGS[name]))
    inner = config.get("text_config", config)
    inner[data.draw(st.sampled_from(sorted(inner)))] = junk
    try:
        llm = from_config(config, name=name)
    except InvalidInput:
        return
    assert llm.weight_bytes > 0
