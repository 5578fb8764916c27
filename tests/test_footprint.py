"""Memory of an engine process: by hand, by property, and beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreserve.models import catalog
from foreserve.models.footprint import (
    GENERATIONS,
    GIB,
    EngineMemory,
    Footprint,
    activation_bytes,
    checks,
    footprint,
    loaded_bytes,
    reported_bytes,
)
from foreserve.models.llm import ModelSpec, Moe

OLD, NEW, NEWEST = (0, 11), (0, 19), (0, 21)


def tiny(**changes: object) -> ModelSpec:
    """One layer, hidden 4, feed-forward 8, 2 heads of 2, vocabulary of 1000."""
    shape: dict[str, object] = {
        "name": "tiny",
        "hub_id": "test/tiny",
        "params": 8_208,
        "layers": 1,
        "hidden": 4,
        "intermediate": 8,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 2,
        "vocab": 1000,
        "max_context_tokens": 128,
    }
    return ModelSpec(**{**shape, **changes})  # type: ignore[arg-type]


def test_kv_is_what_the_share_leaves() -> None:
    """Llama-3.1-8B on an H100 of 79.19 GiB at 0.95: 75.23 less weights 14.96, activation
    1.89 and 0.25 beside PyTorch is 58.14 GiB; at 128 KiB a token 476,2xx tokens."""
    llm, gpu = catalog.llm("llama-3.1-8b"), catalog.gpu("h100")
    engine = EngineMemory(utilization=0.95, max_num_seqs=1024, vllm=NEW)
    found = footprint(llm, gpu, 1, engine)
    parts = {row.kind: row.num_bytes / GIB for row in found.rows}
    assert parts["kv"] == pytest.approx(75.23 - 14.96 - 1.89 - 0.25, abs=0.01)
    assert found.kv_tokens == found.num_bytes("kv") // (2 * 8 * 128 * 2 * 32 * 16) * 16
    assert found.pinned_bytes == llm.weight_bytes


def test_sampler_peak_by_hand() -> None:
    """10 sequences x 1000 entries at 14.5 bytes, 2 tokens of 4 values at 2 bytes, and
    0.05 GiB; 38 bytes before vLLM 0.17, which sorted."""
    engine = EngineMemory(max_num_seqs=10, max_batched_tokens=2, vllm=NEW)
    fixed = 2 * 4 * 2 + int(0.05 * GIB)
    assert activation_bytes(tiny(), 1, engine) == 145_000 + fixed
    assert activation_bytes(tiny(), 2, engine) == 145_000 + fixed
    before = replace(engine, vllm=OLD)
    assert activation_bytes(tiny(), 1, before) == 380_000 + fixed


def test_forward_peak_by_hand() -> None:
    """With 1000 tokens and a vocabulary of 1 the forward pass is the peak: per token 3.5
    x 4 + 3 x 8 values of two bytes; TP 2 halves the feed-forward's; without a gate there
    are two results, not three."""
    engine = EngineMemory(max_num_seqs=1, max_batched_tokens=1000)
    small, fixed = tiny(vocab=1, params=200), int(0.05 * GIB)
    assert activation_bytes(small, 1, engine) == 1000 * 2 * (14 + 24) + fixed
    assert activation_bytes(small, 2, engine) == 1000 * 2 * (14 + 12) + fixed
    plain = replace(small, gated=False)
    assert activation_bytes(plain, 1, engine) == 1000 * 2 * (14 + 16) + fixed


def test_experts_workspace_stays_since_0_17() -> None:
    """2 of 4 experts of width 6 for 100 tokens: buffers of max(6, 4) and max(12, 4)
    values, 100 x 2 x 18 x 2 = 7,200 bytes, on top of the sampler's peak or, before, only
    where that is less. MXFP4 kernels bring their own."""
    moe = Moe(experts=4, experts_per_token=2, expert_intermediate=6)
    llm = tiny(moe=moe, params=8_400)
    engine = EngineMemory(max_num_seqs=10, max_batched_tokens=100)
    dense = activation_bytes(tiny(), 1, engine)
    assert activation_bytes(llm, 1, engine) == dense + 7_200
    old = replace(engine, vllm=OLD)
    assert activation_bytes(llm, 1, old) == activation_bytes(tiny(), 1, old)
    own = replace(llm, moe=replace(moe, dtype="mxfp4"))
    assert activation_bytes(own, 1, engine) == dense


def test_mxfp4_experts_are_padded() -> None:
    """Width 2880 is held as 3072 (12 x 256) by one GPU, 1440 as 1536 by each of two:
    a fifteenth more of the experts' bytes; bf16 experts are not padded."""
    llm = catalog.llm("gpt-oss-20b")
    experts = next(p for p in llm.weight_parts() if p.name == "experts").num_bytes
    for tp in (1, 2):
        extra = loaded_bytes(llm, tp) - llm.weight_bytes_per_gpu(tp)
        assert extra == pytest.approx(experts / tp / 15, abs=1)
    mixtral = catalog.llm("mixtral-8x7b")
    assert loaded_bytes(mixtral, 2) == mixtral.weight_bytes_per_gpu(2)


def test_graphs_count_inside_the_share_since_0_21() -> None:
    """The same graphs, taken from KV in 0.21 and from what is left beside the engine
    before; without graphs there are none."""
    llm, gpu = catalog.llm("llama-3.1-8b"), catalog.gpu("h100")
    before = footprint(llm, gpu, 1, EngineMemory(vllm=NEW))
    after = footprint(llm, gpu, 1, EngineMemory(vllm=NEWEST))
    graphs = before.num_bytes("graphs")
    assert graphs == after.num_bytes("graphs") > 0
    assert before.num_bytes("kv") - after.num_bytes("kv") == graphs
    assert after.free_bytes - before.free_bytes == graphs
    eager = footprint(llm, gpu, 1, EngineMemory(cuda_graphs=False, vllm=NEWEST))
    assert eager.num_bytes("graphs") == 0
    assert eager.num_bytes("kv") == before.num_bytes("kv")


def test_a_version_falls_into_its_generation() -> None:
    """A version between two listed ones behaves as the older; 1.0 as the newest."""
    assert EngineMemory(vllm=(0, 6)).generation is GENERATIONS[0]
    assert EngineMemory(vllm=(0, 18)).generation is GENERATIONS[1]
    assert EngineMemory(vllm=(1, 0)).generation is GENERATIONS[-1]


def test_what_does_not_fit_has_no_kv() -> None:
    """Llama-3.3-70B in FP8 on one H100: 67.7 GiB of weights leave nothing (the engine
    reported -1.44 GiB and ended)."""
    llm = catalog.llm("llama-3.1-70b").quantised("fp8")
    engine = EngineMemory(max_num_seqs=1024, vllm=OLD)
    found = footprint(llm, catalog.gpu("h100"), 1, engine)
    assert found.num_bytes("kv") == found.kv_tokens == 0


def test_memory_of_an_unlisted_gpu() -> None:
    """A GPU that is not in the table reports 99 % of its nominal memory."""
    gpu = catalog.gpu("h100")
    assert reported_bytes(gpu) == int(79.19 * GIB)
    other = replace(gpu, name="other", memory_bytes=1000)
    assert reported_bytes(other) == 990


LLMS = ("llama-3.1-8b", "qwen3-32b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b")
engines = st.builds(
    EngineMemory,
    utilization=st.floats(0.5, 0.98),
    max_num_seqs=st.integers(1, 2048),
    max_batched_tokens=st.integers(1, 32768),
    cuda_graphs=st.booleans(),
    vllm=st.sampled_from([OLD, NEW, NEWEST]),
)


def found_for(name: str, tp: int, engine: EngineMemory) -> Footprint:
    return footprint(catalog.llm(name), catalog.gpu("h100"), tp, engine)


@given(st.sampled_from(LLMS), st.sampled_from([1, 2, 4, 8]), engines)
def test_rows_sum_to_the_card(name: str, tp: int, engine: EngineMemory) -> None:
    """All rows and what is free make up what the driver reports; where there is a KV
    cache, the rows inside make up exactly the share; each lies in its interval."""
    found = found_for(name, tp, engine)
    assert sum(r.num_bytes for r in found.rows) + found.free_bytes == reported_bytes(
        catalog.gpu("h100")
    )
    for row in found.rows:
        assert 0 <= row.low_bytes <= row.num_bytes <= row.high_bytes, row.kind
    inside = sum(row.num_bytes for row in found.rows if row.inside)
    share = int(found.reported_bytes * engine.utilization)
    assert inside == share if found.num_bytes("kv") else inside >= share
    low, middle, high = found.residue_bytes
    assert 0 < low < middle < high


@given(st.sampled_from(LLMS), st.sampled_from([1, 2, 4]), engines)
def test_more_tokens_or_sequences_never_leave_more_kv(
    name: str, tp: int, engine: EngineMemory
) -> None:
    """KV shrinks as the batch of the profiling run grows, in either direction."""
    kv = found_for(name, tp, engine).num_bytes("kv")
    more = replace(engine, max_batched_tokens=2 * engine.max_batched_tokens)
    assert found_for(name, tp, more).num_bytes("kv") <= kv
    more = replace(engine, max_num_seqs=2 * engine.max_num_seqs)
    assert found_for(name, tp, more).num_bytes("kv") <= kv


@given(st.sampled_from(LLMS), engines)
def test_more_gpus_never_hold_more_weights_each(
    name: str, engine: EngineMemory
) -> None:
    """Doubling TP shrinks each rank's weights but not below half, and never its
    activation's rise."""
    for tp in (1, 2, 4):
        one, two = found_for(name, tp, engine), found_for(name, 2 * tp, engine)
        weights = one.num_bytes("weights")
        assert weights / 2 <= two.num_bytes("weights") + 1 <= weights + 1
        assert two.num_bytes("activation") <= one.num_bytes("activation")


def test_published_measurements() -> None:
    """Every part of the quoted engine logs within 5 % and in its interval, no constant
    taken from it; the CUDA graphs' pool, which varies, in its interval."""
    rows = [check for check in checks() if check.role == "checked"]
    assert len(rows) >= 60
    for row in rows:
        assert row.covered, row
        assert abs(row.error) <= (0.2 if row.part == "graphs" else 0.05), row


def test_what_the_rows_do_not_describe_is_listed() -> None:
    """Multimodal variants are shown with their error and not counted as checked."""
    outside = [check for check in checks() if check.role == "outside"]
    assert {check.what.split()[0] for check in outside} == {
        "gemma-3-27b",
        "mistral-small-24b",
    }
