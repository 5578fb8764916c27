"""Shapes of LLMs: weights and KV cache by part, in every weight type."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foreserve.models import catalog
from foreserve.models.errors import InvalidInput
from foreserve.models.llm import LinearAttention, Mla, ModelSpec, Moe, Window

GIB = 2**30

TINY = ModelSpec(
    name="tiny",
    hub_id="example/tiny",
    params=2 * 50 * 8 + 5 * 8 + 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16),
    layers=2,
    hidden=8,
    intermediate=16,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=50,
    max_context_tokens=64,
)
"""Two layers: 64 + 64 (q, o) + 32 + 32 (k, v) + 3 x 128 (feed-forward) weights each."""


def test_the_shape_counts_itself() -> None:
    """An LLM small enough to count by hand; without the gate, a third of the feed-forward
    goes; with an output gate, the queries double."""
    assert TINY.params_from_shape() == TINY.params
    assert replace(TINY, gated=False).params_from_shape() == TINY.params - 2 * 128
    assert (
        replace(TINY, attention_gate=True).params_from_shape() == TINY.params + 2 * 64
    )


def test_tp_sizes_follow_from_the_heads() -> None:
    """4 heads and 2 KV heads split 1, 2 and 4 ways; 3 KV heads 1 way only, unless MLA.

    With 3 KV heads, TP 2 neither divides them nor is a multiple of them. A state of 2
    value heads of linear attention caps TP at 2.
    """
    assert TINY.tp == (1, 2, 4)
    assert replace(TINY, heads=12, kv_heads=3, tp=()).tp == (1,)
    mla = Mla(kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2)
    assert replace(TINY, heads=12, kv_heads=3, mla=mla, tp=()).tp == (1, 2, 4)
    linear = LinearAttention(
        layers=1,
        key_heads=2,
        value_heads=2,
        key_head_dim=4,
        value_head_dim=4,
        conv_width=4,
    )
    assert replace(TINY, linear=linear, tp=()).tp == (1, 2)
    with pytest.raises(InvalidInput, match="6 KV heads"):
        replace(TINY, heads=12, kv_heads=6, tp=(4,))
    with pytest.raises(InvalidInput, match="exceed its 2"):
        replace(TINY, window=Window(tokens=4, layers=3))


@pytest.mark.parametrize(
    ("name", "dtype", "tp", "gib"),
    [
        ("llama-3.1-8b", "bf16", 1, 14.99),
        ("qwen3-32b", "bf16", 1, 61.03),
        ("qwen3-32b", "bf16", 2, 30.59),
        ("llama-3.1-70b", "fp8", 2, 33.88),
    ],
)
def test_weights_are_those_an_engine_reports(
    name: str, dtype: str, tp: int, gib: float
) -> None:
    """Weights per GPU that vLLM reported on H100, within 1 %."""
    llm = catalog.llm(name)
    llm = llm if dtype == "bf16" else llm.quantised("fp8")
    assert llm.weight_bytes_per_gpu(tp) / GIB == pytest.approx(gib, rel=0.01)


def test_quantised_weights_keep_wide_what_engines_keep_wide() -> None:
    """Only the 2 x 576 linear weights shrink: 1 byte, 1/2 + scales, and so on."""
    linears = 2 * (2 * 64 + 2 * 32 + 3 * 128)
    wide = 2 * (TINY.params - linears)
    assert TINY.weight_bytes == wide + 2 * linears
    assert TINY.quantised("fp8").weight_bytes == wide + linears
    assert TINY.quantised("int4").weight_bytes == wide + linears * 0.5625
    assert TINY.quantised("nvfp4").weight_bytes == wide + linears * 0.5625
    assert TINY.quantised("mxfp4").weight_bytes == wide + linears * 0.53125
    assert TINY.quantised("mxfp4").name == "tiny-mxfp4"


def test_experts_may_have_their_own_type() -> None:
    """Only the routed experts take half a byte; idle ones are not active bytes.

    Per layer 4 experts of 3 x 8 x 4 = 96 weights, of which a token uses one.
    """
    moe = Moe(experts=4, experts_per_token=1, expert_intermediate=4, dtype="mxfp4")
    bare = replace(TINY, moe=replace(moe, dtype=None))
    llm = replace(TINY, moe=moe, params=bare.params_from_shape())
    experts = 2 * 4 * 96
    assert llm.weight_bytes == 2 * llm.params - 2 * experts + experts * 0.53125
    assert llm.active_params == llm.params - 2 * 3 * 96
    idle_bytes = round(2 * 3 * 96 * 0.53125)
    assert llm.active_weight_bytes == llm.weight_bytes - idle_bytes


def test_what_cannot_be_split_is_whole_on_every_gpu() -> None:
    """Norms (5 x 8) are on each of 2 GPUs; at TP 4 also the 2 KV heads come twice.

    Their 2 x 2 x 8 x 4 = 128 weights go two ways and not four.
    """
    assert TINY.weight_bytes_per_gpu(1) == TINY.weight_bytes
    assert TINY.weight_bytes_per_gpu(2) == TINY.weight_bytes // 2 + 40
    copies = 2 * 40 * 3 // 4 + 2 * 128 // 4
    assert TINY.weight_bytes_per_gpu(4) == TINY.weight_bytes // 4 + copies


def test_a_window_and_a_state_do_not_grow() -> None:
    """KV of a windowed layer ends with the window; linear attention has a fixed state.

    A KV layer is 2 x 2 heads x 2 x 2 B = 16 B per token. A state is 2 x 4 x 4 values of
    4 B, and 3 inputs of 2 x 8 + 8 channels of 2 B.
    """
    windowed = replace(TINY, window=Window(tokens=10, layers=1))
    assert TINY.kv_bytes_per_token_per_gpu(1) == 32
    assert TINY.kv_bytes_fixed_per_sequence_per_gpu(1) == 0
    assert windowed.kv_bytes_per_token_per_gpu(1) == 16
    assert windowed.kv_bytes_fixed_per_sequence_per_gpu(1) == 160
    assert windowed.kv_bytes_fixed_per_sequence_per_gpu(2) == 80
    linear = LinearAttention(
        layers=1,
        key_heads=2,
        value_heads=2,
        key_head_dim=4,
        value_head_dim=4,
        conv_width=4,
    )
    recurrent = replace(TINY, linear=linear, tp=())
    assert recurrent.kv_bytes_per_token_per_gpu(1) == 16
    assert recurrent.kv_bytes_fixed_per_sequence_per_gpu(1) == 128 + 3 * 24 * 2


def test_sparse_attention_keeps_its_index_keys() -> None:
    """DeepSeek-V3.2's indexer adds 128 FP8 values and one float32 scale per token."""
    dense = catalog.llm("deepseek-v3")
    assert dense.mla is not None
    mla = replace(dense.mla, index_topk=2048, index_heads=64, index_head_dim=128)
    sparse = replace(dense, mla=mla)
    grown = sparse.kv_bytes_per_token_per_gpu(8) - dense.kv_bytes_per_token_per_gpu(8)
    assert grown == 61 * 132
    added = sparse.params_from_shape() - dense.params_from_shape()
    assert added == 61 * (1536 * 64 * 128 + 7168 * (128 + 64) + 2 * 128)
