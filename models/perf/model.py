"""`PerfModel` from measurements: kernels where there are tables, else the roofline."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreserve.models.cost import IterationTime, Roofline
from foreserve.models.llm import ModelSpec
from foreserve.models.loading import load_times
from foreserve.models.perf.compact import compact
from foreserve.models.perf.kernels import kernels
from foreserve.models.perf.measured import Corrections, MeasuredTiming
from foreserve.models.perf.shipped import shipped
from foreserve.models.specs import GpuType


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The cost model that plans rest on.

    ``corrections`` by engine, of the user's own, take the place of the shipped ones.
    """

    engine: str = "vllm"
    corrections: tuple[tuple[str, Corrections], ...] = ()
    fallback: Roofline = field(default_factory=Roofline)

    def timing(
        self, llm: ModelSpec, gpu: GpuType, tp: int, *, ep: int = 1
    ) -> MeasuredTiming | None:
        """Iteration times in full; None where this GPU has no kernel tables."""
        if gpu.kernels is None or kernels(gpu.kernels, "vllm") is None:
            return None
        own = dict(self.corrections).get(self.engine)
        return MeasuredTiming(
            llm=llm,
            gpu=gpu,
            tp=tp,
            ep=ep,
            engine=self.engine,
            corrections=own or shipped(llm, self.engine),
        )

    def iteration(self, llm: ModelSpec, gpu: GpuType, tp: int) -> IterationTime:
        timing = self.timing(llm, gpu, tp)
        return compact(timing) if timing else self.fallback.iteration(llm, gpu, tp)

    def load_s(
        self,
        llm: ModelSpec,
        gpu: GpuType,
        tp: int,
        storage_bytes_per_s: float | None = None,
    ) -> float:
        return load_times(llm, gpu, tp, storage_bytes_per_s=storage_bytes_per_s).total_s

    def activate_s(self, llm: ModelSpec, gpu: GpuType, tp: int) -> float:
        return self.fallback.activate_s(llm, gpu, tp)
