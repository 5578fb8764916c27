"""A run over time: load, delays, throughput and GPUs in bins, for each LLM and for all.

Work and memory are those of a few sorts of the requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Run
from foreserve.models.quantiles import grouped_quantiles
from foreserve.runtime.tally import BY_ACTIVITY, bin_starts, loads

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ALL = "*"
"""Stands for all LLMs together."""
COUNTS = ("arrivals", "finished", "failed")
MAX_ROWS = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """What happened in each bin of a run's span; what came after it is not in here.

    A row per bin and LLM, `ALL` last, bins in order: ``start_s``, ``end_s``, ``llm``, and
    the columns:

    - ``arrivals``, ``finished``, ``failed``: requests that came, that were answered in
      full, and that were given up without.
    - ``in_system_mean``, ``in_system_max``: requests waiting and running.
    - ``waiting_mean``: of them, those without a first token.
    - ``ttft_p50_s``, ``ttft_p99_s``: of requests that *arrived* in the bin; one that never
      got a first token counts with its time until the end of the run. NaN where none came.
    - ``output_tokens_per_s``: of requests that were answered in full (some time), spread
      evenly from their first token to their last.
    - ``gpus_active``, ...: GPUs on which the LLM had a replica in this phase, mean; a GPU
      that several LLMs hold counts for each.
    """

    start_s: Floats
    end_s: Floats
    llm: tuple[str, ...]
    """Names by number, `ALL` last."""
    columns: Mapping[str, NDArray[Any]]
    """By name, each [llm, bin]; integers where it counts requests."""

    def table(self) -> dict[str, NDArray[Any]]:
        """The rows in columns of equal length, for a file."""
        llms, bins = len(self.llm), len(self.start_s)
        names = np.array(self.llm, dtype=object)
        return {
            "start_s": np.repeat(self.start_s, llms),
            "end_s": np.repeat(self.end_s, llms),
            "llm": np.tile(names, bins),
            **{name: values.T.ravel() for name, values in self.columns.items()},
        }


def series(run: Run, bin_s: float | None = None) -> Series:
    """``run`` in bins of ``bin_s`` (`Run.load_bin_s` if None); the last may be shorter."""
    start_s, end_s = run.outcome.start_s, run.outcome.end_s
    bin_s = min(run.load_bin_s if bin_s is None else bin_s, end_s - start_s)
    rows = (len(run.llms) + 1) * (end_s - start_s) / bin_s if bin_s > 0 else math.nan
    if not rows <= MAX_ROWS:
        raise InvalidInput(
            f"bins of {bin_s:g} s would be {rows:.2g} rows, more than {MAX_ROWS:,}",
            field="bin",
        )
    starts_s = bin_starts(start_s, end_s, bin_s)
    ends_s = np.append(starts_s[1:], end_s)
    cells = _Cells(run, starts_s, ends_s)
    done = ~np.isnan(run.finish_s)
    first_s = np.where(np.isnan(run.first_token_s), run.left_s, run.first_token_s)
    in_system = cells.levels(run.left_s, bin_s)
    found = {
        "arrivals": cells.count(run.arrival_s),
        "finished": cells.count(run.finish_s, where=done),
        "failed": cells.count(run.left_s, where=~done),
        "in_system_mean": in_system[0],
        "in_system_max": in_system[1].astype(np.int64),
        "waiting_mean": cells.levels(first_s, bin_s)[0],
        **dict(zip(("ttft_p50_s", "ttft_p99_s"), cells.ttft((0.5, 0.99)), strict=True)),
        "output_tokens_per_s": cells.tokens() / (ends_s - starts_s),
        **cells.gpus(),
    }
    return Series(start_s=starts_s, end_s=ends_s, llm=(*run.llms, ALL), columns=found)


class _Cells:
    """The requests of a run by LLM and bin. Results are [llm, bin], all together last."""

    def __init__(self, run: Run, starts_s: Floats, ends_s: Floats) -> None:
        self.run, self.starts_s, self.ends_s = run, starts_s, ends_s
        self.bins, self.llms = len(starts_s), len(run.llms)

    def bin_of(self, at_s: Floats) -> Ints:
        """-1 before the span, and the number of bins from its end on."""
        found = np.searchsorted(self.starts_s, at_s, side="right") - 1
        found[~(at_s < self.ends_s[-1])] = self.bins
        return found

    def sums(self, number: Ints, weights: Floats | None = None) -> NDArray[Any]:
        """Of ``weights`` (else the count) of the requests, by the bin of each; those
        outside of the span are left out."""
        inside = (number >= 0) & (number < self.bins)
        cell = self.run.llm[inside].astype(np.int64) * self.bins + number[inside]
        found = np.bincount(
            cell,
            weights=None if weights is None else weights[inside],
            minlength=self.llms * self.bins,
        ).reshape(self.llms, self.bins)
        return _with_all(found)

    def count(self, at_s: Floats, where: NDArray[np.bool_] | None = None) -> Ints:
        number = self.bin_of(at_s)
        if where is not None:
            number[~where] = self.bins
        return self.sums(number)

    def levels(self, until_s: Floats, bin_s: float) -> tuple[Floats, Floats]:
        """Mean and maximum of the requests that have come and not reached ``until_s``."""
        run = self.run
        span_s = float(self.starts_s[0]), float(self.ends_s[-1])
        found = [
            loads(run.arrival_s[own], until_s[own], *span_s, bin_s)
            for own in (*(run.llm == index for index in range(self.llms)), slice(None))
        ]
        mean, peak = (np.array(part) for part in zip(*found, strict=True))
        return mean, peak

    def ttft(self, quantiles: tuple[float, ...]) -> NDArray[np.float64]:
        """[quantile, llm, bin]."""
        number = self.bin_of(self.run.arrival_s)
        inside = (number >= 0) & (number < self.bins)
        delay_s, llm = self.run.ttft_s[inside], self.run.llm[inside]
        number = number[inside]
        cells = self.llms * self.bins
        own = grouped_quantiles(
            delay_s, llm.astype(np.int64) * self.bins + number, cells, quantiles
        )
        every = grouped_quantiles(delay_s, number, self.bins, quantiles)
        shape = len(quantiles), self.llms, self.bins
        return np.concatenate([own.reshape(shape), every[:, np.newaxis]], axis=1)

    def tokens(self) -> Floats:
        """Output tokens in each bin: one at the first token, the others evenly from there
        to the last."""
        run = self.run
        last_s = np.where(np.isnan(run.first_token_s), np.nan, run.finish_s)
        done = ~np.isnan(last_s)
        begun, ended = self.bin_of(run.first_token_s), self.bin_of(last_s)
        begun[~done] = ended[~done] = self.bins
        span_s = last_s - run.first_token_s
        even = done & (span_s > 0)
        rate = np.zeros(len(span_s))
        rate[even] = (run.output_tokens[even] - 1) / span_s[even]
        # A rate holds from the first token on, to the end of its bin and in all later
        # ones, and is taken back in the same way at the last token.
        edges_s = np.append(self.ends_s, np.nan)
        at_once = np.where(even, 1.0, run.output_tokens)
        found: Floats = self.sums(begun, at_once).astype(np.float64)
        found += self.sums(begun, rate * (edges_s[begun] - run.first_token_s))
        found -= self.sums(ended, rate * (edges_s[ended] - last_s))
        held = np.cumsum(self.sums(begun, rate) - self.sums(ended, rate), axis=1)
        found[:, 1:] += held[:, :-1] * (self.ends_s - self.starts_s)[1:]
        return np.maximum(found, 0.0)

    def gpus(self) -> Mapping[str, Floats]:
        """GPUs by phase, mean."""
        length_s = self.ends_s - self.starts_s
        index = {name: number for number, name in enumerate(self.run.llms)}
        found = {phase: np.zeros((self.llms, self.bins)) for phase in BY_ACTIVITY}
        for stretch in self.run.residency:
            if stretch.llm not in index:
                continue
            begin_s = max(stretch.start_s, float(self.starts_s[0]))
            stop_s = min(stretch.end_s, float(self.ends_s[-1]))
            if begin_s >= stop_s:
                continue
            low, high = np.searchsorted(self.starts_s, (begin_s, stop_s))
            low = max(0, low - int(low == self.bins or self.starts_s[low] > begin_s))
            part = slice(low, high)
            overlap_s = np.minimum(self.ends_s[part], stop_s)
            overlap_s -= np.maximum(self.starts_s[part], begin_s)
            found[stretch.phase][index[stretch.llm], part] += (
                len(stretch.gpus) * overlap_s / length_s[part]
            )
        return {f"gpus_{p.lower()}": _with_all(rows) for p, rows in found.items()}


def _with_all(rows: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([rows, rows.sum(axis=0, keepdims=True)])
