"""One engine iteration of any LLM, composed from measured kernels.

An iteration works on ``decodes`` sequences, each with ``context`` tokens, and on
``prompts`` chunks of ``chunk`` prompt tokens, each after ``past`` tokens that are in the
cache already (an earlier chunk or a shared prefix). A layer is its projections (GEMM),
attention, feed-forward (GEMM or fused MoE) and two all-reduces; after the last one comes
the vocabulary head. What the tables lack is scaled from the nearest measurement by the
ratio of the two rooflines and flagged as extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.llm import BYTES_PER_WEIGHT, ModelSpec, WeightDtype
from foreserve.models.perf.kernels import Answer, Floats, Kernels, Peaks, Table

_FALLBACK: dict[WeightDtype, tuple[WeightDtype, ...]] = {
    "bf16": ("bf16",),
    "fp8": ("fp8", "fp8_block", "bf16"),
    "fp8_block": ("fp8_block", "fp8", "bf16"),
    "int4": ("int4", "bf16"),
    "nvfp4": ("nvfp4", "fp8", "fp8_block", "bf16"),
    "mxfp4": ("mxfp4", "int4", "bf16"),
}
"""Precisions to look for, nearest first."""

_DEEPSEEK = (7168, 1536)
"""Hidden size and query rank of the LLM whose latent attention was measured."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Composer:
    """Kernel times of one (LLM, GPU, TP) for vectors of iterations."""

    llm: ModelSpec
    tp: int
    ep: int
    """GPUs that the experts are spread over; the other ``tp / ep`` split each expert."""
    kernels: Kernels
    gpu: Peaks
    """Peaks of the GPU asked for; those of the tables unless they are borrowed."""

    def parts(
        self,
        *,
        decodes: ArrayLike = 0,
        context: ArrayLike = 0,
        chunk: ArrayLike = 0,
        past: ArrayLike = 0,
        prompts: ArrayLike = 0,
    ) -> dict[str, Answer]:
        """Seconds by part, over all layers; arguments broadcast to one shape."""
        arrays = [
            np.asarray(x, dtype=np.float64)
            for x in (decodes, context, chunk, past, prompts)
        ]
        b, c, p, s, n = np.broadcast_arrays(*arrays)
        llm = self.llm
        tokens = np.maximum(b + n * p, 1e-9)
        dense_layers = llm.layers if llm.moe is None else llm.moe.dense_layers
        moe_layers = llm.layers - dense_layers
        parts = {"attention": self._attention(b, c, p, s, n)}
        parts["projections"] = self._projections(tokens)
        if dense_layers:
            parts["feed-forward"] = self._feed_forward(tokens, llm.intermediate).times(
                dense_layers
            )
        if moe_layers:
            parts["experts"] = self._experts(tokens).times(moe_layers)
        if self.tp > 1:
            parts["all-reduce"] = self._all_reduce(tokens).times(2 * llm.layers)
        rows = np.maximum(b + n, 1)
        parts["head"] = self._gemm("bf16", rows, llm.vocab / self.tp, llm.hidden)
        return parts

    # ------------------------------------------------------------- attention

    def _attention(
        self, b: Floats, c: Floats, p: Floats, s: Floats, n: Floats
    ) -> Answer:
        llm = self.llm
        linear = llm.linear.layers if llm.linear else 0
        windowed = llm.window.layers if llm.window else 0
        full = llm.layers - linear - windowed
        total = Answer(np.zeros_like(b), np.zeros_like(b, dtype=bool))
        if full:
            total = total + self._softmax(b, c, p, s, n, None).times(full)
        if windowed and llm.window:
            layer = self._softmax(b, c, p, s, n, llm.window.tokens)
            total = total + layer.times(windowed)
        if linear:
            total = total + self._delta_net(b, p, n).times(linear)
        return total

    def _softmax(
        self,
        b: Floats,
        c: Floats,
        p: Floats,
        s: Floats,
        n: Floats,
        window: int | None,
    ) -> Answer:
        """Attention of one layer; a latent-attention layer with its projections."""
        zero = Answer(np.zeros_like(b), np.zeros_like(b, dtype=bool))
        decode = self._latent if self.llm.mla else self._heads
        total = zero
        if (b > 0).any():
            answer = decode("generation", np.maximum(b, 1), np.maximum(c, 1), window)
            total = total + _where(b > 0, answer)
        if (n * p > 0).any():
            whole = decode("context", np.maximum(n, 1), np.maximum(p + s, 1), window)
            if (s > 0).any():
                # A chunk attends to everything before it: the whole prompt's triangle
                # less the cached one, and no less than a fresh chunk of its length.
                before = decode("context", np.maximum(n, 1), np.maximum(s, 1), window)
                fresh = decode("context", np.maximum(n, 1), np.maximum(p, 1), window)
                rest = np.maximum(whole.seconds - before.seconds, fresh.seconds)
                seconds = np.where(s > 0, rest, whole.seconds)
                whole = Answer(seconds, whole.extrapolated)
            total = total + _where(n * p > 0, whole)
        return total

    def _heads(
        self, phase: str, batch: Floats, length: Floats, window: int | None
    ) -> Answer:
        llm = self.llm
        heads = max(1, llm.heads // self.tp)
        kv = max(1, llm.kv_heads // self.tp)
        cache = "fp8" if llm.kv_bytes_per_value == 1 else "bf16"
        dims = sorted(
            {
                int(name.split(".")[1])
                for name in self.kernels.tables
                if name.startswith(phase + ".")
            },
            key=lambda dim: abs(np.log(dim / llm.head_dim)),
        )
        dim = dims[0]
        names = [
            f"{phase}.{dim}.{w}.{kind}"
            for w in (window or 0, 0)
            for kind in (cache, "bf16")
        ]
        found = self.kernels.find(*names)
        assert found is not None, "every set of tables has plain attention"
        table, exact = found
        if window and not (exact or names.index(_name(self.kernels, table)) < 2):
            length = np.minimum(length, window)
        row, near_heads, near_kv = _nearest_heads(table, heads, kv)
        answer = table.at(row, batch, length)
        values, near = (heads * llm.head_dim, near_heads * dim)
        kv_values, near_values = (kv * llm.head_dim, near_kv * dim)
        if (values, kv_values) != (near, near_values):
            exact = False
        asked = self._attention_roof(self.gpu, phase, batch, length, values, kv_values)
        had = self._attention_roof(
            self.kernels.peaks, phase, batch, length, near, near_values
        )
        return _scaled(answer, asked / had, exact)

    def _attention_roof(
        self,
        peaks: Peaks,
        phase: str,
        batch: Floats,
        length: Floats,
        values: float,
        kv_values: float,
    ) -> Floats:
        cached = batch * length * kv_values * 2 * self.llm.kv_bytes_per_value
        if phase == "generation":
            return peaks.roof_s("bf16", 4 * batch * length * values, cached)
        flop = 2 * batch * length**2 * values
        return peaks.roof_s("bf16", flop, cached + 4 * batch * length * values)

    def _latent(
        self, phase: str, batch: Floats, length: Floats, window: int | None
    ) -> Answer:
        """Latent attention with its projections, as one measured module."""
        llm, mla = self.llm, self.llm.mla
        assert mla is not None
        heads = max(1, llm.heads // self.tp)
        dtype = llm.weight_dtype
        cache = "fp8" if llm.kv_bytes_per_value == 1 else "bf16"
        tokens = batch * (length if phase == "context" else 1)
        index = self._index(phase, batch, length, tokens)
        if mla.index_topk is not None and phase == "generation":
            length = np.minimum(length, mla.index_topk)
        names = [
            f"mla_{phase}.{kind}.{kv}"
            for kind in _FALLBACK[dtype]
            for kv in (cache, "bf16")
        ]
        found = self.kernels.find(*names)
        if found is not None:
            table, exact = found
            row, near, _ = _nearest_heads(table, heads, heads)
            shape = (llm.hidden, mla.q_lora_rank or 0)
            asked = self._latent_roof(
                self.gpu, phase, batch, length, tokens, heads, shape
            )
            had = self._latent_roof(
                self.kernels.peaks, phase, batch, length, tokens, near, _DEEPSEEK
            )
            exact = exact and near == heads and shape == _DEEPSEEK
            return _scaled(table.at(row, batch, length), asked / had, exact) + index
        core = self.kernels.find(f"{phase}_latent.{cache}", f"{phase}_latent.bf16")
        assert core is not None, "every set of tables has latent attention"
        row, near, _ = _nearest_heads(core[0], heads, heads)
        answer = core[0].at(row, batch, length)
        for n, k in self._latent_gemms(heads, llm.hidden, mla.q_lora_rank or 0):
            answer = answer + self._gemm(dtype, tokens, n, k)
        return answer + index

    def _index(
        self, phase: str, batch: Floats, length: Floats, tokens: Floats
    ) -> Answer:
        """The indexer of sparse attention: its projections, scores and selection."""
        mla = self.llm.mla
        zero = Answer(np.zeros_like(batch), np.zeros_like(batch, dtype=bool))
        if mla is None or mla.index_topk is None:
            return zero
        width, rank = mla.index_heads * mla.index_head_dim, mla.q_lora_rank
        answer = self._gemm(
            self.llm.weight_dtype, tokens, width, rank or self.llm.hidden
        )
        answer = answer + self._gemm(
            "bf16", tokens, mla.index_head_dim, self.llm.hidden
        )
        pairs = batch * length * (1 if phase == "generation" else length / 2)
        # Scores in FP8, then read three times in float32 to select; no table has them.
        moved = batch * length * mla.index_head_dim + 12 * pairs
        scores = self.gpu.roof_s("fp8", 2 * pairs * width, moved) / 0.5
        return answer + Answer(scores, np.ones_like(zero.extrapolated))

    def _latent_gemms(
        self, heads: int, hidden: int, q_rank: int
    ) -> list[tuple[float, float]]:
        mla = self.llm.mla
        assert mla is not None
        q = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim
        shapes = (
            [(q, q_rank), (q_rank + latent, hidden)]
            if q_rank
            else [(q + latent, hidden)]
        )
        up = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return [*shapes, (up, mla.kv_lora_rank), (hidden, heads * mla.v_head_dim)]

    def _latent_roof(
        self,
        peaks: Peaks,
        phase: str,
        batch: Floats,
        length: Floats,
        tokens: Floats,
        heads: int,
        shape: tuple[int, int],
    ) -> Floats:
        mla, dtype = self.llm.mla, self.llm.weight_dtype
        assert mla is not None
        weights = sum(n * k for n, k in self._latent_gemms(heads, *shape))
        linear = peaks.roof_s(
            dtype, 2 * tokens * weights, weights * BYTES_PER_WEIGHT[dtype]
        )
        if phase == "generation":
            latent = mla.kv_lora_rank + mla.qk_rope_head_dim
            flop = 2 * batch * length * heads * (latent + mla.kv_lora_rank)
            core = peaks.roof_s("bf16", flop, batch * length * latent * 2)
        else:
            dims = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
            core = peaks.roof_s("bf16", batch * length**2 * heads * dims, 0)
        return linear + core

    def _delta_net(self, b: Floats, p: Floats, n: Floats) -> Answer:
        """A gated delta-net layer: no table, so its roofline at usual efficiencies."""
        linear = self.llm.linear
        assert linear is not None
        heads = max(1, linear.value_heads // self.tp)
        state = heads * linear.key_head_dim * linear.value_head_dim
        tokens = b + n * p
        moved = (b + n) * state * 4 * 2 + tokens * heads * linear.value_head_dim * 12
        seconds = self.gpu.roof_s("bf16", 8 * tokens * state / 0.3, moved / 0.6)
        return Answer(seconds, np.ones_like(b, dtype=bool))

    # ------------------------------------------------------------- linear layers

    def _projections(self, tokens: Floats) -> Answer:
        """Query, key, value and output matrices of all layers that are not latent."""
        llm, tp = self.llm, self.tp
        linear = llm.linear
        zero = Answer(np.zeros_like(tokens), np.zeros_like(tokens, dtype=bool))
        total, dtype = zero, llm.weight_dtype
        plain = llm.layers - (linear.layers if linear else 0)
        if llm.mla is None:
            q = llm.heads * llm.head_dim / tp
            kv = max(1, llm.kv_heads // tp) * llm.head_dim
            width = q * (2 if llm.attention_gate else 1) + 2 * kv
            layer = self._gemm(dtype, tokens, width, llm.hidden)
            layer = layer + self._gemm(dtype, tokens, llm.hidden, q)
            total = total + layer.times(plain)
        if linear is not None:
            keys = linear.key_heads * linear.key_head_dim / tp
            values = linear.value_heads * linear.value_head_dim / tp
            layer = self._gemm(dtype, tokens, 2 * keys + 2 * values, llm.hidden)
            layer = layer + self._gemm(dtype, tokens, llm.hidden, values)
            total = total + layer.times(linear.layers)
        return total

    def _feed_forward(self, tokens: Floats, width: float) -> Answer:
        llm, tp = self.llm, self.tp
        wide = width / tp * (2 if llm.gated else 1)
        dtype = llm.weight_dtype
        return self._gemm(dtype, tokens, wide, llm.hidden) + self._gemm(
            dtype, tokens, llm.hidden, width / tp
        )

    def _experts(self, tokens: Floats) -> Answer:
        """Router, routed experts and shared experts of one layer."""
        llm, moe = self.llm, self.llm.moe
        assert moe is not None
        dtype = moe.dtype or llm.weight_dtype
        total = self._gemm("bf16", tokens, moe.experts, llm.hidden)
        if moe.shared_experts:
            width = moe.shared_experts * moe.expert_intermediate
            total = total + self._feed_forward(tokens, width)
        moe_tp = max(1, self.tp // self.ep)
        asked = (
            llm.hidden,
            moe.expert_intermediate,
            moe.experts_per_token,
            moe.experts,
            moe_tp,
            self.ep,
        )
        found = self._moe_table(dtype, asked)
        if found is None:
            seconds = self._moe_roof(self.gpu, dtype, tokens, asked) / 0.5
            return total + Answer(seconds, np.ones_like(tokens, dtype=bool))
        table, kind, row, exact = found
        near = table.shapes[row].tolist()
        roof = self._moe_roof(self.gpu, dtype, tokens, asked)
        had = self._moe_roof(self.kernels.peaks, kind, tokens, near)
        return total + _scaled(table.at(row, tokens), roof / had, exact)

    def _moe_table(
        self, dtype: WeightDtype, shape: tuple[int, ...]
    ) -> tuple[Table, WeightDtype, int, bool] | None:
        """Table, its precision, row, and whether shape and precision are those asked.

        The same shape with weights of the same width beats the same precision with
        another shape; else the nearest shape of the nearest precision.
        """
        tables = [
            (kind, self.kernels.tables[f"moe.{kind}.skewed"])
            for kind in _FALLBACK[dtype]
            if f"moe.{kind}.skewed" in self.kernels.tables
        ]
        for kind, table in tables:
            row = table.row(shape)
            width = BYTES_PER_WEIGHT[kind] / BYTES_PER_WEIGHT[dtype]
            if row is not None and abs(width - 1) < 0.1:
                return table, kind, row, kind == dtype
        if not tables:
            return None
        kind, table = tables[0]
        log = np.log(table.shapes) - np.log(np.asarray(shape))
        return table, kind, int(np.abs(log).sum(axis=1).argmin()), False

    def _moe_roof(
        self,
        peaks: Peaks,
        dtype: WeightDtype,
        tokens: Floats,
        shape: list[int] | tuple[int, ...],
    ) -> Floats:
        hidden, inter, topk, experts, tp, ep = shape
        weights = (3 if self.llm.gated else 2) * hidden * inter / tp
        here = experts / ep
        touched = here * (1 - (1 - topk / experts) ** tokens)
        flop = 2 * tokens * topk / ep * weights
        moved = touched * weights * BYTES_PER_WEIGHT[dtype] + tokens * hidden * 4
        return peaks.roof_s(dtype, flop, moved)

    def _gemm(self, dtype: WeightDtype, m: Floats, n: float, k: float) -> Answer:
        found = self.kernels.find(*(f"gemm.{kind}" for kind in _FALLBACK[dtype]))
        assert found is not None, "every set of tables has a bf16 GEMM"
        table, exact = found
        kind = cast("WeightDtype", _name(self.kernels, table).split(".")[1])
        # Beyond the grid (vocabularies) columns are computed side by side.
        pieces = int(np.ceil(n / np.exp(table.axes[1][-1]) - 1e-9))
        answer = table.at(0, m, n / pieces, k).times(pieces)
        asked = self._gemm_roof(self.gpu, dtype, m, n, k)
        had = self._gemm_roof(self.kernels.peaks, kind, m, n, k)
        return _scaled(answer, asked / had, exact)

    def _gemm_roof(
        self, peaks: Peaks, dtype: WeightDtype, m: Floats, n: float, k: float
    ) -> Floats:
        moved = n * k * BYTES_PER_WEIGHT[dtype] + 2 * m * (n + k)
        return peaks.roof_s(dtype, 2 * m * n * k, moved)

    def _all_reduce(self, tokens: Floats) -> Answer:
        table = self.kernels.tables["all_reduce"]
        row = table.row([self.tp])
        exact = row is not None
        if row is None:
            row = int(np.abs(np.log(table.shapes[:, 0] / self.tp)).argmin())
        answer = table.at(row, tokens * self.llm.hidden)
        ratio = self.kernels.peaks.link_bytes_per_s / self.gpu.link_bytes_per_s
        # Only the part that grows with the message follows the link's bandwidth.
        least = table.at(row, 1.0).seconds
        seconds = least + (answer.seconds - least) * ratio
        borrowed = answer.extrapolated | (not exact) | (ratio != 1)
        return Answer(seconds, borrowed)


def _name(kernels: Kernels, table: Table) -> str:
    return next(name for name, other in kernels.tables.items() if other is table)


def _nearest_heads(table: Table, heads: int, kv: int) -> tuple[int, int, int]:
    """Row with the nearest head counts (cached keys weigh more), and its counts."""
    heads_log = np.log(table.shapes[:, 0] / heads)
    last = table.shapes[:, -1]
    row = int((np.abs(heads_log) + 2 * np.abs(np.log(last / kv))).argmin())
    return row, int(table.shapes[row, 0]), int(last[row])


def _scaled(answer: Answer, ratio: Floats, exact: bool) -> Answer:
    flags = answer.extrapolated if exact else np.ones_like(answer.extrapolated)
    return Answer(answer.seconds * ratio, flags)


def _where(condition: np.ndarray, answer: Answer) -> Answer:
    return Answer(
        np.where(condition, answer.seconds, 0.0), answer.extrapolated & condition
    )
