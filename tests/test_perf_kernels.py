"""Kernel tables: reading them, composing iterations of them, and saying where they end."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models import catalog
from foreserve.models.cost import IterationTime, Roofline
from foreserve.models.perf import kernels as kernel_tables
from foreserve.models.perf.compact import compact, decode_many
from foreserve.models.perf.kernels import FILLED, Table, encode_ms, kernels
from foreserve.models.perf.measured import Corrections, MeasuredTiming
from foreserve.models.perf.model import Measured
from foreserve.models.perf.tables import covered, second_opinions

SHARED = Path(__file__).parents[2] / "shared" / "data"
PURE = Corrections(layer_s=0.0, step_s=0.0, request_s=0.0)


def grid(log_s: list[list[float]], filled: list[list[bool]] | None = None) -> Table:
    """One shape over sizes 1, 10, 100 by 1, 10."""
    values = np.array([log_s], dtype=np.float32)
    return Table(
        shapes=np.array([[4]], dtype=np.int32),
        axes=(np.log([1.0, 10.0, 100.0]), np.log([1.0, 10.0])),
        log_s=values,
        filled=np.array([filled]) if filled else np.zeros(values.shape, dtype=bool),
    )


def timing(llm: str, gpu: str, tp: int = 1, **changes: object) -> MeasuredTiming:
    spec = replace(catalog.llm(llm), **changes)
    return MeasuredTiming(llm=spec, gpu=catalog.gpu(gpu), tp=tp, corrections=PURE)


def test_a_table_is_linear_between_logarithms():
    """exp(0), exp(2), exp(4) at 1, 10, 100: halfway in log space is exp(1)."""
    answer = grid([[0, 0], [2, 2], [4, 4]]).at(0, [1, 10, np.sqrt(10)], 1)
    assert answer.seconds == pytest.approx(np.exp([0, 2, 1]), rel=1e-6)
    assert not answer.extrapolated.any()


def test_beyond_a_table_the_last_slope_goes_on_and_says_so():
    """Twice as far in log space gets twice the rise; below the first size, no less."""
    answer = grid([[0, 0], [2, 2], [4, 4]]).at(0, [1000, 0.1], 1)
    assert answer.seconds == pytest.approx(np.exp([6, 0]), rel=1e-6)
    assert answer.extrapolated.all()


def test_a_cell_that_was_filled_in_is_flagged():
    """Only answers that lean on it."""
    filled = [[False, False], [False, False], [True, True]]
    answer = grid([[0, 0], [2, 2], [4, 4]], filled).at(0, [5, 50], 1)
    assert answer.extrapolated.tolist() == [False, True]


def test_stored_latencies_keep_three_digits():
    """0.5 us to 1000 s survive the 15 bits within 0.05 %, and leave the mark free."""
    ms = np.array([5e-4, 0.0123, 1.0, 77.7, 1e6])
    code = encode_ms(np.log(ms))
    assert not (code & FILLED).any()
    low, steps = kernel_tables._LOW_LOG_MS, kernel_tables._STEPS_PER_E
    assert np.exp(code / steps + low) == pytest.approx(ms, rel=5e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("gpu", ["h100_sxm", "a100_sxm", "b200_sxm"])
def test_shipped_tables_are_the_measurements(gpu):
    """Fifty random GEMMs of the source come back within the rounding."""
    table = pd.read_csv(SHARED / "aiconfigurator_ops" / gpu / "vllm_gemm.csv.gz")
    if "gemm_dtype" in table:
        table = table[table["gemm_dtype"] == "bfloat16"]
    rows = table.sample(50, random_state=1)
    found = kernels(gpu, "vllm")
    assert found is not None
    answer = found.tables["gemm.bf16"].at(0, rows["m"], rows["n"], rows["k"])
    assert answer.seconds == pytest.approx(rows["latency_ms"] / 1e3, rel=2e-3)
    assert not answer.extrapolated.any()


def test_what_ships_is_small():
    """All measured performance together stays under 15 MB."""
    folder = Path(kernel_tables.__file__).parent / "data"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15e6


def test_a_dense_step_is_the_sum_of_its_kernels():
    """Mistral 7B on an H100: 32 layers of two projections, two feed-forward GEMMs and
    attention, and the head; each looked up by hand."""
    llm = catalog.llm("mistral-7b-v0.3")
    tables = kernels("h100_sxm", "vllm").tables
    gemm = tables["gemm.bf16"]

    def s(n: float, k: float) -> float:
        return float(gemm.at(0, 16, n, k).seconds)

    attention = tables["generation.128.0.bf16"]
    layer = s(6144, 4096) + s(4096, 4096) + s(2 * 14336, 4096) + s(4096, 14336)
    layer += float(attention.at(attention.row([32, 8]), 16, 1024).seconds)
    whole = llm.layers * layer + s(llm.vocab, 4096)
    assert timing(llm.name, "h100").decode(16, 1024).seconds == pytest.approx(whole)


def test_corrections_add_up():
    """Kernels x 1.1, 80 layers x 2 us, 1 ms: on a decode step; prefill has its own."""
    pure = timing("llama-3.1-70b", "h100", 4)
    known = Corrections(
        kernel_factor=1.1, prefill_factor=1.3, layer_s=2e-6, step_s=1e-3
    )
    ours = replace(pure, corrections=known)
    fixed = 80 * 2e-6 + 1e-3
    step, prompt = pure.decode(8, 500).seconds, pure.prefill(2000).seconds
    assert ours.decode(8, 500).seconds == pytest.approx(1.1 * step + fixed)
    assert ours.prefill(2000).seconds == pytest.approx(1.3 * prompt + fixed)


def test_a_cached_prefix_saves_time_but_not_its_attention():
    """Half of 8192 tokens cached: more than a fresh 4096, less than all 8192."""
    t = timing("llama-3.1-8b", "h100")
    half = float(t.prefill(4096, past=4096).seconds)
    assert float(t.prefill(4096).seconds) < half < float(t.prefill(8192).seconds)


def test_prompts_beside_decodes_cost_less_than_alone():
    """The weights are read once for both."""
    t = timing("llama-3.1-8b", "h100")
    together = float(t.mixed(32, 1000, 512).seconds)
    assert together < float(t.decode(32, 1000).seconds + t.prefill(512).seconds)
    assert together > float(t.decode(32, 1000).seconds)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([llm.name for llm in catalog.llms()]),
    gpu=st.sampled_from([gpu.name for gpu in catalog.gpus() if gpu.kernels]),
    batch=st.integers(1, 512),
    context=st.integers(1, 60_000),
)
def test_every_llm_has_a_time_on_every_gpu(name, gpu, batch, context):
    """Any shape of the catalogue at any size: finite, positive, and longer for a batch
    sixteen times as large; but for kernels that are slow when small (FP8 experts of vLLM
    on B200 were measured at 1.4 times, with one sequence)."""
    llm = catalog.llm(name)
    t = timing(name, gpu, llm.tp[-1])
    step = t.decode([batch, 16 * batch], context).seconds
    assert np.isfinite(step).all()
    assert 0 < step[0] <= step[1] * 1.45
    prompt = t.prefill([context, 4 * context]).seconds
    assert 0 < prompt[0] <= prompt[1] * 1.45


def test_no_time_is_beyond_reason():
    """All LLMs on all GPUs with tables, at their largest TP: within a factor of 30 of the
    roofline (which knows no communication: eight L40S reduce 1 GB/s), however far a table
    is extrapolated."""
    for llm, gpu in itertools.product(catalog.llms(), catalog.gpus()):
        if not gpu.kernels:
            continue
        tp = llm.tp[-1]
        t, roof = timing(llm.name, gpu.name, tp), Roofline().iteration(llm, gpu, tp)
        step = t.decode([1, 32, 256], 1024).seconds
        prompt = t.prefill([128, 8192]).seconds
        ratios = [
            *(step / [roof.decode_s(b, b * 1024) for b in (1, 32, 256)]),
            *(prompt / [roof.prefill_s(p, p * p) for p in (128, 8192)]),
        ]
        assert all(1 / 30 < ratio < 30 for ratio in ratios), (
            llm.name,
            gpu.name,
            ratios,
        )


@pytest.mark.parametrize(
    ("llm", "gpu", "tp", "flagged"),
    [
        ("llama-3.1-8b", "h100", 1, False),
        ("llama-3.1-8b", "b300", 1, True),  # borrows the B200's tables
        ("deepseek-v3", "h200", 8, False),
        ("deepseek-v2-lite", "h100", 1, True),  # latents of another size
        ("qwen3.5-397b-a17b", "h200", 8, True),  # delta-net layers have no table
        ("bloom-176b", "a100-80gb", 8, True),  # 14 heads a GPU were not measured
    ],
)
def test_what_was_not_measured_is_never_silent(llm, gpu, tp, flagged):
    """Borrowed GPUs, other shapes, missing kernels: the answer carries the flag."""
    assert bool(timing(llm, gpu, tp).decode(16, 1024).extrapolated) is flagged


def test_a_missing_precision_is_borrowed_and_flagged():
    """An A100 has no FP8 units: bf16 GEMMs at half the bytes, marked."""
    step = timing("llama-3.1-8b", "a100-80gb", weight_dtype="fp8").decode(1, 512)
    whole = timing("llama-3.1-8b", "a100-80gb").decode(1, 512)
    assert bool(step.extrapolated)
    assert 0.45 < float(step.seconds / whole.seconds) < 0.8


def test_compact_form_is_close_to_the_tables():
    """Dense, GQA, MoE and MLA: the median over batches and lengths within 5 %."""
    for llm, gpu, tp in (
        ("llama-3.1-8b", "h100", 1),
        ("llama-3.1-70b", "a100-80gb", 4),
        ("qwen3-30b-a3b", "h100", 1),
        ("deepseek-v3", "h200", 8),
    ):
        made = compact(timing(llm, gpu, tp))
        assert made.fit_error < 0.05, llm
        assert made.relative_error >= made.fit_error


def test_compact_coefficients_evaluate_alike_one_by_one_and_together():
    """[replica, batch] at once equals the scalar formula of each."""
    perf = Measured()
    pairs = [("llama-3.1-8b", "h100"), ("mixtral-8x7b", "a100-80gb")]
    times = [
        perf.iteration(catalog.llm(llm), catalog.gpu(gpu), catalog.llm(llm).tp[-1])
        for llm, gpu in pairs
    ]
    batch = np.array([1.0, 7.0, 64.0])
    found = decode_many(times, batch, 900 * batch)
    for i, time in enumerate(times):
        alone = [time.decode_s(b, 900 * b) for b in batch.tolist()]
        assert found[i] == pytest.approx(alone)


def test_experts_saturate():
    """Half of all experts each: one token reads half, two three quarters."""
    time = IterationTime(
        prefill_base_s=0.0,
        prefill_s_per_token=0.0,
        prefill_s_per_token2=0.0,
        prefill_floor_s=0.5,
        decode_base_s=1.0,
        decode_s_per_seq=0.0,
        decode_s_per_context_token=0.0,
        decode_experts_s=8.0,
        expert_share=0.5,
        relative_error=0.1,
        source="test",
    )
    assert time.decode_s(1, 0) == pytest.approx(1 + 4)
    assert time.decode_s(2, 0) == pytest.approx(1 + 6)
    assert time.prefill_s(1, 1) == 0.5


def test_a_gpu_without_tables_falls_back_to_its_roofline():
    """Wide error, and the source says so."""
    bare = replace(catalog.gpu("l4"), kernels=None)
    time = Measured().iteration(catalog.llm("llama-3.1-8b"), bare, 1)
    assert time.source == "roofline"
    assert time.relative_error == 0.4


def test_second_opinions_are_the_published_points():
    """Splitwise, Llama-2-70B, TP 4, A100: 127 ms for 512 tokens; off the grid, flagged."""
    (found,) = second_opinions("llama-2-70b", "a100-80gb", 4)
    assert found.source == "splitwise"
    prompt = found.prefill([512, 512 * 64])
    assert prompt.seconds[0] == pytest.approx(0.127, abs=0.001)
    assert prompt.extrapolated.tolist() == [False, True]
    assert second_opinions("llama-2-70b", "l4", 4) == ()
    sources = {name.partition("/")[0] for name in covered()}
    assert sources == {"splitwise", "sageserve", "muxserve", "llmservingsim"}
