"""The catalogue: its files load, state their sources and agree with published figures."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from foreserve.models import catalog
from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.specs import GpuType

LLAMA_3_8B = """
name = "llama"
hub_id = "meta-llama/Llama-3.1-8B"
params = 8_030_261_248
layers = 32
hidden = 4096
intermediate = 14336
heads = 32
kv_heads = 8
head_dim = 128
vocab = 128256
max_context_tokens = 131072
"""

CONFIGS = {path.stem for path in (Path(__file__).parent / "configs").glob("*.json")}
"""Entries whose ``config.json`` is at hand."""

each_llm = pytest.mark.parametrize("llm", catalog.llms(), ids=lambda llm: llm.name)
each_gpu = pytest.mark.parametrize("gpu", catalog.gpus(), ids=lambda gpu: gpu.name)


def numeric_fields(spec: ModelSpec | GpuType) -> set[str]:
    """Fields of ``spec`` that hold numbers: all but names, flags and the sources."""
    plain = {f.name: getattr(spec, f.name) for f in fields(spec)}
    return {
        name
        for name, value in plain.items()
        if name != "sources" and value is not None and not isinstance(value, str | bool)
    }


def test_catalogue_holds_the_promised_llms_and_gpus() -> None:
    """The LLMs and GPU types the examples name are there, sorted, and found by name."""
    llms = [llm.name for llm in catalog.llms()]
    gpus = [gpu.name for gpu in catalog.gpus()]
    assert llms == sorted(llms)
    assert gpus == sorted(gpus)
    assert {
        *("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b"),
        *("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "qwen3-8b"),
        *("qwen3-32b", "qwen3-30b-a3b", "mistral-7b-v0.3", "mixtral-8x7b"),
        *("deepseek-v2-lite", "deepseek-v3", "deepseek-r1", "kimi-k2.5", "glm-5"),
        *("minimax-m2.5", "qwen3.5-397b-a17b", "qwen3-235b-a22b", "gpt-oss-120b"),
        *("llama-7b", "llama-13b", "llama-30b", "llama-65b", "bloom-176b", "opt-66b"),
    } <= set(llms)
    assert {"a100-80gb", "h100", "h200", "b200", "l40s", "a10g"} <= set(gpus)
    assert {"rtx-pro-6000", "rtx-4090", "b300", "a100-40gb"} <= set(gpus)
    assert catalog.llm("qwen3-8b").name == "qwen3-8b"
    assert catalog.gpu("h200").name == "h200"


@each_llm
def test_every_number_of_an_llm_has_a_source(llm: ModelSpec) -> None:
    """A number is covered by its own source or by `default`, and no source is stray."""
    assert numeric_fields(llm) <= set(llm.sources) or "default" in llm.sources
    assert set(llm.sources) <= {"default"} | {f.name for f in fields(llm)}
    assert all(text.strip() for text in llm.sources.values())
    # config.json knows neither of these, so `default` must not stand in for it.
    assert {"params", "weight_dtype", "kv_bytes_per_value", "tp"} <= set(llm.sources)


@each_gpu
def test_every_number_of_a_gpu_has_its_own_source(gpu: GpuType) -> None:
    """GPU numbers come from different places: each names its own, and is positive."""
    # Whose kernels it borrows is a statement with a source too.
    assert numeric_fields(gpu) == set(gpu.sources) - {"kernels"}
    assert all(text.strip() for text in gpu.sources.values())
    assert all(getattr(gpu, name) > 0 for name in numeric_fields(gpu))


@each_llm
def test_published_parameters_follow_from_the_shape(llm: ModelSpec) -> None:
    """The shape gives the published count exactly, so no field of it is mistyped.

    What it leaves out is known: DeepSeek's 58 x 256 router biases here; the biases and
    positions of the entries that test_huggingface.py derives are counted there.
    """
    if llm.name in CONFIGS:
        assert 0 <= llm.params - llm.params_from_shape() <= llm.params / 1000
    else:
        biases = 58 * 256 if llm.name == "deepseek-v3" else 0
        assert llm.params - llm.params_from_shape() == biases


@each_llm
def test_tp_sizes_split_the_kv_heads_too(llm: ModelSpec) -> None:
    """An engine splits KV heads evenly or repeats each equally often, at each size."""
    assert all(llm.kv_heads % tp == 0 or tp % llm.kv_heads == 0 for tp in llm.tp)


@each_llm
def test_an_llm_is_written_as_it_was_read(llm: ModelSpec) -> None:
    """TOML out and in again is the same LLM, its optional parts and sources included."""
    assert catalog.parse(ModelSpec, catalog.to_toml(llm), "x.toml") == llm


@each_gpu
def test_a_gpu_is_written_as_it_was_read(gpu: GpuType) -> None:
    """The same of GPU types, whose numbers are floats."""
    assert catalog.parse(GpuType, catalog.to_toml(gpu), "x.toml") == gpu


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_llama_parameters_are_the_published_ones(name: str, params: int) -> None:
    """The well-known counts, independent of the files; 16-bit weights take two bytes."""
    assert catalog.llm(name).params == params
    assert catalog.llm(name).weight_bytes == 2 * params


def test_kv_bytes_per_token() -> None:
    """KV bytes of one token, by hand.

    Llama-3.1-8B, TP 1: 32 layers x 2 x 8 heads x 128 x 2 B = 131,072 B. Llama-2-70B over
    TP 4: 4 x 80 layers x 2 x 2 heads x 128 x 2 B = 0.3125 MiB. Qwen2.5-1.5B at TP 4
    repeats its 2 KV heads: 28 x 2 x 1 x 128 x 2 B on each GPU, as at TP 2. MLA keeps
    512 + 64 values per layer on every GPU: 27 and 61 layers of 1,152 B.
    """
    kv = {llm.name: llm.kv_bytes_per_token_per_gpu for llm in catalog.llms()}
    assert kv["llama-3.1-8b"](1) == 131_072
    assert 4 * kv["llama-2-70b"](4) == 0.3125 * 2**20
    assert kv["qwen2.5-1.5b"](4) == kv["qwen2.5-1.5b"](2) == 14_336
    assert kv["deepseek-v2-lite"](1) == kv["deepseek-v2-lite"](8) == 31_104
    assert kv["deepseek-v3"](8) == 70_272


def test_weight_bytes() -> None:
    """Llama-2-7B is 13.5 GB in 16 bits; DeepSeek-V3 in FP8 blocks is a sum.

    DeepSeek-V3: 2 x 129280 x 7168 embedding values, 58 x 256 x 7168 router values, norms
    (123 x 7168 + 61 x 2048) and 14,848 biases take 2 bytes, the rest 1 + 4/16384.
    """
    assert catalog.llm("llama-2-7b").weight_bytes == 13_476_831_232
    deepseek = catalog.llm("deepseek-v3")
    wide = 2 * 129280 * 7168 + 58 * 256 * 7168 + 123 * 7168 + 61 * 2048 + 14_848
    narrow = deepseek.params - wide
    assert deepseek.weight_bytes == round(2 * wide + narrow * (1 + 4 / 16384))


@pytest.mark.parametrize(
    ("name", "active"),
    [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9), ("deepseek-v3", 37e9)],
)
def test_active_parameters_are_the_advertised_ones(name: str, active: float) -> None:
    """The model cards say 12.9 B, 3.3 B and 37 B active; a dense LLM uses them all."""
    assert catalog.llm(name).active_params == pytest.approx(active, rel=0.02)
    assert catalog.llm("qwen3-8b").active_params == catalog.llm("qwen3-8b").params


def test_unknown_name_gives_a_hint() -> None:
    """A near miss is answered with the name meant, a wild guess with the whole list."""
    with pytest.raises(InvalidInput, match="unknown LLM 'llama-3-8b'") as near:
        catalog.llm("llama-3-8b")
    assert near.value.hint == "did you mean 'llama-3.1-8b'?"
    with pytest.raises(InvalidInput, match="unknown GPU type 'zzz'") as far:
        catalog.gpu("zzz")
    assert far.value.hint is not None
    assert all(gpu.name in far.value.hint for gpu in catalog.gpus())


def test_a_sound_file_parses() -> None:
    """The base of the faulty files below is sound: each fault there is the only one."""
    llm = catalog.parse(ModelSpec, LLAMA_3_8B, "llama.toml")
    assert llm.params_from_shape() == llm.params


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (LLAMA_3_8B + "leyers = 1", "leyers", "unknown key"),
        (LLAMA_3_8B + "[moe]\nexpert = 8", "moe.expert", "unknown key"),
        (LLAMA_3_8B.replace("layers = 32", ""), "layers", "required key is missing"),
        (LLAMA_3_8B.replace("= 32\n", '= "32"\n', 1), "layers", "got '32'"),
        (LLAMA_3_8B.replace("= 32\n", "= 2024-01-01\n", 1), "layers", "2024-01-01"),
        (LLAMA_3_8B + "tp = [3]", None, r"tp \[3\] must be among"),
        (LLAMA_3_8B + "layers = 1", None, "not valid TOML"),
    ],
)
def test_a_faulty_file_is_named_with_its_field(
    text: str, field: str | None, message: str
) -> None:
    """Misspelt, missing, mistyped or senseless values: the error says where."""
    with pytest.raises(InvalidInput, match=message) as caught:
        catalog.parse(ModelSpec, text, "llama.toml")
    assert caught.value.file == "llama.toml"
    assert caught.value.field == field


def test_a_file_is_called_like_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry under another file name is refused; files that are not TOML are not read.

    The entry is called ``llama``, so ``llama.toml`` loads and ``lama.toml`` does not.
    """
    monkeypatch.setattr(catalog, "files", lambda package: tmp_path)
    (tmp_path / "llms").mkdir()
    (tmp_path / "llms" / "README.md").write_text("not TOML")
    (tmp_path / "llms" / "llama.toml").write_text(LLAMA_3_8B)
    assert [llm.name for llm in catalog.llms.__wrapped__()] == ["llama"]
    (tmp_path / "llms" / "llama.toml").rename(tmp_path / "llms" / "lama.toml")
    with pytest.raises(InvalidInput, match="must be the name of the file") as caught:
        catalog.llms.__wrapped__()
    assert caught.value.file == str(tmp_path / "llms" / "lama.toml")
