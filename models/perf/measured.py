"""The measured cost model: composed kernels plus what an engine adds to them.

A decode step takes ``kernels * kernel_factor + layers * layer_s + step_s``; prompt tokens
add their kernels times ``prefill_factor``. Launches, normalisation, scheduling and HTTP
are in no kernel table, so they are fitted (`calibrate`), never on the deployments that
the model is judged by.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.perf.compose import Composer
from foreserve.models.perf.kernels import (
    Answer,
    Bools,
    Floats,
    Kernels,
    Peaks,
    kernels,
)
from foreserve.models.perf.timing import Estimate
from foreserve.models.record import Record
from foreserve.models.specs import GpuType


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections(Record):
    """What an engine adds to its kernels.

    The defaults are typical of a tuned engine with CUDA graphs and stand where nothing
    was measured.
    """

    kernel_factor: float = 1.0
    """On the kernels of a decode step."""
    prefill_factor: float = 1.0
    """On the kernels that prompt tokens add."""
    layer_s: float = 3e-6
    """Normalisation, rotary embedding, activation and launches, per layer."""
    step_s: float = 0.5e-3
    """Scheduling, sampling and input preparation, per iteration."""
    request_s: float = 15e-3
    """HTTP, tokenisation and the way to the scheduler, per request."""
    admission_steps: float = 0.0
    """Decode steps until a request is seen or its first token sent (polling, batches of
    streamed tokens)."""
    ttft_interval: tuple[float, float] = (0.4, 2.5)
    tpot_interval: tuple[float, float] = (0.7, 1.4)
    """Factors between which 9 of 10 measurements lie."""
    source: str = "typical"


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredTiming:
    """`Timing` of one LLM on ``tp`` GPUs, of which ``ep`` share out the experts."""

    llm: ModelSpec
    gpu: GpuType
    tp: int
    ep: int = 1
    engine: str = "vllm"
    corrections: Corrections = Corrections()
    communicates: bool = True
    """False leaves the all-reduce out, as profiles of single layers do."""

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
            gpu=_own_or_borrowed(found, Peaks.of(self.gpu)),
        )

    @property
    def source(self) -> str:
        return self.composer.kernels.name

    def prefill(
        self, tokens: ArrayLike, *, past: ArrayLike = 0, prompts: ArrayLike = 1
    ) -> Estimate:
        parts = self.composer.parts(chunk=tokens, past=past, prompts=prompts)
        total, outside = self._sum(parts)
        return self._estimate(total * self.corrections.prefill_factor, outside)

    def decode(self, batch: ArrayLike, context: ArrayLike) -> Estimate:
        total, outside = self._sum(self.composer.parts(decodes=batch, context=context))
        return self._estimate(total * self.corrections.kernel_factor, outside)

    def mixed(
        self,
        batch: ArrayLike,
        context: ArrayLike,
        tokens: ArrayLike,
        *,
        past: ArrayLike = 0,
        prompts: ArrayLike = 1,
    ) -> Estimate:
        parts = self.composer.parts(
            decodes=batch, context=context, chunk=tokens, past=past, prompts=prompts
        )
        total, outside = self._sum(parts)
        alone, _ = self._sum(self.composer.parts(decodes=batch, context=context))
        c = self.corrections
        added = np.maximum(total - alone, 0.0) * c.prefill_factor
        return self._estimate(alone * c.kernel_factor + added, outside)

    def _sum(self, parts: dict[str, Answer]) -> tuple[Floats, Bools]:
        if not self.communicates:
            parts.pop("all-reduce", None)
        answers = list(parts.values())
        seconds = np.sum([answer.seconds for answer in answers], axis=0)
        outside = np.logical_or.reduce([answer.extrapolated for answer in answers])
        return seconds, outside

    def _estimate(self, seconds: Floats, outside: Bools) -> Estimate:
        c = self.corrections
        if self.composer.gpu is not self.composer.kernels.peaks:
            outside = np.ones_like(outside)
        seconds = seconds + self.llm.layers * c.layer_s + c.step_s
        return Estimate.within(seconds, c.tpot_interval, outside, self.source)


def _own_or_borrowed(tables: Kernels, asked: Peaks) -> Peaks:
    """The tables' peaks if they are this GPU's (data sheets differ by a few percent)."""
    pairs = zip(astuple(tables.peaks), astuple(asked), strict=True)
    own = all(abs(there / here - 1) < 0.06 for there, here in pairs)
    return tables.peaks if own else asked
