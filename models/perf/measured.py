"""The measured cost model: composed kernels plus what an engine adds to them.

An iteration takes ``kernels * kernel_factor + layers * layer_s + step_s``: launches,
normalisation and sampling are not in the kernel tables, so they are fitted, one set of
three numbers for each engine, on deployments that are never those it is judged by
(`data/corrections.json`, written by `plan perf calibrate` and benchmarks/fit_corrections.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.perf.compose import Composer
from foreserve.models.perf.kernels import Answer, Peaks, kernels
from foreserve.models.perf.timing import Estimate
from foreserve.models.record import Record
from foreserve.models.specs import GpuType

@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections(Record):
    """What an engine adds to its kernels."""

    kernel_factor: float = 1.0
    prefill_factor: float = 1.0
    layer_s: float = 0.0
    step_s: float = 0.0
    request_s: float = 0.0
    interval: tuple[float, float] = (0.8, 1.25)
    source: str = "uncorrected"


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredTiming:
    """`Timing` of one LLM on ``tp`` GPUs, of which ``ep`` share out the experts."""

    llm: ModelSpec
    gpu: GpuType
    tp: int
    ep: int = 1
    engine: str = "vllm"
    corrections: Corrections = Corrections()

    @cached_property
    def composer(self) -> Composer:
        name = self.gpu.kernels or ""
        found = kernels(name, self.engine) or kernels(name, "vllm")
        if found is None:
            raise InvalidInput(f"GPU type {self.gpu.name!r} has no kernel tables")
        return Composer(
            llm=self.llm,
            tp=self.tp,
            ep=self.ep,
            kernels=found,
            gpu=Peaks.of(self.gpu),
        )

    @property
    def source(self) -> str:
        return self.composer.kernels.name

    def prefill(
        self, tokens: ArrayLike, *, past: ArrayLike = 0, prompts: ArrayLike = 1
    ) -> Estimate:
        return self._estimate(
            self.composer.parts(chunk=tokens, past=past, prompts=prompts)
        )

    def decode(self, batch: ArrayLike, context: ArrayLike) -> Estimate:
        return self._estimate(self.composer.parts(decodes=batch, context=context))

    def mixed(
        self,
        batch: ArrayLike,
        context: ArrayLike,
        tokens: ArrayLike,
        *,
        past: ArrayLike = 0,
    ) -> Estimate:
        return self._estimate(
            self.composer.parts(
                decodes=batch, context=context, chunk=tokens, past=past, prompts=1
            )
        )

    def _estimate(self, parts: dict[str, Answer]) -> Estimate:
        c = self.corrections
        total = sum(part.seconds for part in parts.values())
        seconds = total * c.kernel_factor + self.llm.layers * c.layer_s + c.step_s
        outside = np.logical_or.reduce([part.extrapolated for part in parts.values()])
        return Estimate.within(seconds, c.interval, outside, self.source)
