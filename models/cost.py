"""What serving costs in time: iterations, loading, switching.

`PerfModel` is the seam: give it an LLM, a GPU type and a TP size and it answers with the
few coefficients (`IterationTime`) that solver and simulator work with, each answer with
its source and its error. `perf.model.Measured` answers from measurements; `Roofline`,
hardware peaks times stated efficiencies, stands in where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from foreserve.models.llm import ModelSpec
from foreserve.models.record import Record
from foreserve.models.specs import GpuType


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTime(Record):
    """Time of one engine iteration in a few coefficients; the form of solver and simulator.

    A prefill of prompts of lengths ``x`` takes ``prefill_base_s + prefill_s_per_token *
    sum(x) + prefill_s_per_token2 * sum(x^2)``, and at least ``prefill_floor_s`` (the
    weights are read however short the prompt). A decode step of ``b`` sequences with
    ``c`` context tokens in all takes ``decode_base_s + decode_s_per_seq * b +
    decode_s_per_context_token * c`` (the functional form of DistServe's fits), plus
    ``decode_experts_s`` times the share of the experts that ``b`` tokens touch, each
    touching ``expert_share`` of them.

    `perf.compact.decode_many` evaluates many of these at once.
    """

    prefill_base_s: float
    prefill_s_per_token: float
    prefill_s_per_token2: float
    decode_base_s: float
    decode_s_per_seq: float
    decode_s_per_context_token: float
    relative_error: float
    """Half width of the interval around every answer, as a share of it."""
    source: str
    prefill_floor_s: float = 0.0
    decode_experts_s: float = 0.0
    expert_share: float = 0.0
    fit_error: float = 0.0
    """Median relative difference between these coefficients and what they stand for."""
    extrapolated: bool = False
    """Some of it lies outside what was measured."""

    def prefill_s(self, tokens: float, tokens2: float) -> float:
        """Seconds to prefill ``tokens`` prompt tokens, ``tokens2`` their squares' sum."""
        seconds = self.prefill_base_s + self.chunk_s(tokens, tokens2)
        return seconds if seconds > self.prefill_floor_s else self.prefill_floor_s

    def chunk_s(self, tokens: float, tokens2: float) -> float:
        """Seconds that prompt tokens add to an iteration that decodes anyway."""
        return self.prefill_s_per_token * tokens + self.prefill_s_per_token2 * tokens2

    def decode_s(self, batch: float, context_tokens: float) -> float:
        """Seconds of one decode step of ``batch`` sequences."""
        touched = 1 - (1 - self.expert_share) ** batch if self.expert_share else 0.0
        return (
            self.decode_base_s
            + self.decode_s_per_seq * batch
            + self.decode_s_per_context_token * context_tokens
            + self.decode_experts_s * touched
        )

    def times(self, factor: float) -> IterationTime:
        """The same with everything taking ``factor`` times as long."""
        seconds = {
            name: getattr(self, name) * factor
            for name in (
                "prefill_base_s",
                "prefill_s_per_token",
                "prefill_s_per_token2",
                "prefill_floor_s",
                "decode_base_s",
                "decode_s_per_seq",
                "decode_s_per_context_token",
                "decode_experts_s",
            )
        }
        return replace(self, **seconds)

    def isolated_s(self, input_tokens: float, output_tokens: float) -> float:
        """Execution time of one request alone on the replica (``e_mk``)."""
        steps = max(0.0, output_tokens - 1)
        context = input_tokens + output_tokens / 2
        return self.prefill_s(input_tokens, input_tokens**2) + steps * self.decode_s(
            1, context
        )


class PerfModel(Protocol):
    """Answers how long things take; every answer knows its source and error."""

    def iteration(self, llm: ModelSpec, gpu: GpuType, tp: int) -> IterationTime:
        """Iteration times of ``llm`` on ``tp`` GPUs of one node."""
        ...

    def load_s(
        self,
        llm: ModelSpec,
        gpu: GpuType,
        tp: int,
        storage_bytes_per_s: float | None = None,
    ) -> float:
        """Seconds until the weights are resident (WARM), nothing else on the links.

        From pinned host memory, or through it from storage where a rate is given.
        """
        ...

    def activate_s(self, llm: ModelSpec, gpu: GpuType, tp: int) -> float:
        """Seconds from WARM to ACTIVE."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Hardware peaks times stated efficiencies: the model of last resort.

    Iteration times are the larger resource's time plus overheads; the constants below
    are typical of tuned engines, not fitted to any one measurement, hence the wide error.
    """

    compute_efficiency: float = 0.55
    """Share of the dense bf16 peak that a long prefill reaches."""
    memory_efficiency: float = 0.80
    """Share of the HBM bandwidth that a decode step reaches."""
    step_overhead_s: float = 0.0004
    """Scheduling, sampling and launch per iteration (CUDA graphs assumed)."""
    all_reduce_s: float = 8e-6
    """Latency of one small all-reduce inside a node; two per layer."""
    typical_batch: int = 16
    """Decode batch at which the share of touched experts of an MoE is taken."""
    host_link_efficiency: float = 0.85
    """Share of the host link that a fast loader reaches from pinned memory
    (ServerlessLLM's cached loads on H100: 54 of 64 GB/s)."""
    warm_to_active_s: float = 0.05
    """Map the KV pages, switch the process group, attach the engine process."""
    relative_error: float = 0.4
    """80 % of 246 measured bf16 deployments on H100 have their TPOT within 38 % of this
    model's, half of them within 20 % (benchmarks/roofline_error.py)."""

    def iteration(self, llm: ModelSpec, gpu: GpuType, tp: int) -> IterationTime:
        flop_per_s = gpu.bf16_flop_per_s * self.compute_efficiency
        bytes_per_s = gpu.hbm_bytes_per_s * self.memory_efficiency
        overhead = self.step_overhead_s
        exchange_s_per_token = 0.0
        if tp > 1:
            overhead += 2 * llm.layers * self.all_reduce_s
            exchanged = 2 * llm.layers * llm.hidden * 2 * 2 * (tp - 1) / tp
            exchange_s_per_token = exchanged / gpu.gpu_link_bytes_per_s
        token_s = 2 * llm.active_params / (tp * flop_per_s) + exchange_s_per_token
        # Causal attention multiplies each query with half of the prompt, for Q·K and P·V.
        head_values = llm.heads * llm.head_dim / tp
        return IterationTime(
            prefill_base_s=overhead
            + self._touched_bytes(llm, llm.vocab) / tp / bytes_per_s,
            prefill_s_per_token=token_s,
            prefill_s_per_token2=2 * llm.layers * head_values / flop_per_s,
            decode_base_s=overhead
            + self._touched_bytes(llm, self.typical_batch) / tp / bytes_per_s,
            decode_s_per_seq=token_s,
            decode_s_per_context_token=llm.kv_bytes_per_token_per_gpu(tp) / bytes_per_s,
            relative_error=self.relative_error,
            source="roofline",
        )

    def _touched_bytes(self, llm: ModelSpec, tokens: int) -> float:
        """Expected weight bytes an iteration of ``tokens`` tokens reads."""
        if llm.moe is None:
            return llm.weight_bytes
        always = llm.active_weight_bytes
        one = llm.moe.experts_per_token / llm.moe.experts
        routed = llm.weight_bytes - always
        # `always` holds one token's experts; the rest is touched as tokens spread out.
        return always + routed * (1 - (1 - one) ** (tokens - 1))

    def load_s(
        self,
        llm: ModelSpec,
        gpu: GpuType,
        tp: int,
        storage_bytes_per_s: float | None = None,
    ) -> float:
        link = gpu.host_link_bytes_per_s * self.host_link_efficiency
        host_s = llm.weight_bytes_per_gpu(tp) / link
        if storage_bytes_per_s is None:
            return host_s
        # The stages overlap, so the slower one sets the pace.
        return max(host_s, llm.weight_bytes / storage_bytes_per_s)

    def activate_s(self, llm: ModelSpec, gpu: GpuType, tp: int) -> float:
        return self.warm_to_active_s
