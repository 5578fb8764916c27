"""Second opinions: iteration times that others published for one LLM, GPU and TP size.

Whole iterations as they were measured or summed up, behind the same protocol as the
composed kernels (`Timing`), read in log space; sizes outside a table and cells that were
filled between its measurements are flagged. Sources and licences: ``data/README.md``;
laid out by `benchmarks/build_tables.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.perf.kernels import Table, tables
from foreserve.models.perf.timing import Estimate

REPEATS = (0.9, 1.1)
"""Spread of repeated measurements of one point; not the error on another machine."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableTiming:
    """`Timing` of a published table: prompts whole, no cached prefix, no mixed steps."""

    source: str
    prompts: Table
    """[1, prompts, tokens of each]"""
    steps: Table
    """[1, sequences, context of each]"""

    def prefill(
        self, tokens: ArrayLike, *, past: ArrayLike = 0, prompts: ArrayLike = 1
    ) -> Estimate:
        """A cached prefix is left out of the time, and the answer flagged for it."""
        answer = self.prompts.at(0, prompts, tokens)
        cached = np.broadcast_to(np.asarray(past) > 0, answer.seconds.shape)
        return Estimate.within(
            answer.seconds, REPEATS, answer.extrapolated | cached, self.source
        )

    def decode(self, batch: ArrayLike, context: ArrayLike) -> Estimate:
        answer = self.steps.at(0, batch, context)
        return Estimate.within(
            answer.seconds, REPEATS, answer.extrapolated, self.source
        )

    def mixed(
        self,
        batch: ArrayLike,
        context: ArrayLike,
        tokens: ArrayLike,
        *,
        past: ArrayLike = 0,
        prompts: ArrayLike = 1,
    ) -> Estimate:
        """The two one after the other: nobody measured them together."""
        step = self.decode(batch, context).seconds
        prompt = self.prefill(tokens, past=past, prompts=prompts)
        return Estimate.within(step + prompt.seconds, REPEATS, True, self.source)


def second_opinions(llm: str, gpu: str, tp: int) -> tuple[TableTiming, ...]:
    """What others measured of exactly this LLM, GPU type and TP size."""
    return tuple(
        TableTiming(
            source=name.partition("/")[0],
            prompts=_opinions()[f"{name}/prefill"],
            steps=_opinions()[f"{name}/decode"],
        )
        for name in covered()
        if name.partition("/")[2] == f"{llm}/{gpu}/{tp}"
    )


def covered() -> Sequence[str]:
    """``source/llm/gpu/tp`` of every table."""
    names = [name.rpartition("/")[0] for name in _opinions()]
    return tuple(dict.fromkeys(sorted(names)))


@cache
def _opinions() -> dict[str, Table]:
    path = files("foreserve.models.perf").joinpath("data/opinions.npz")
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return tables(arrays)
