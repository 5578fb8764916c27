"""Make a fleet's trace out of records, by a recipe, with exactly as many requests as asked.

All LLMs live on one clock: second ``t`` of the trace plays second ``start + phase +
compress * t`` of an LLM's source. The history plays the time before 0 by the same rules,
so nothing in it was recorded after the trace.

- Requests: fewer than recorded are drawn without replacement; of more, each is repeated
  equally often (but for one), a copy at a random moment before the next request.
- Counts per window: scaled by one constant, rounded by chance without bias.
- ``cv``: arrivals anew, Gamma gaps of this CV on a clock that runs as fast as the record
  did in each window (of 5 minutes, for requests); lengths stay in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.traces.arrivals import Cells, bent, cells_of, in_span, scattered
from foreserve.traces.rates import Rates
from foreserve.traces.recipe import Group, HistoryPart, LlmPart, Recipe, wanted
from foreserve.traces.sources import Source, begun, group_of, series_of
from foreserve.traces.synth import parse_tokens
from foreserve.traces.trace import Demand, Floats, Ints, Trace, bin_demand, merge

TRACE, HISTORY, BURST = range(3)
"""What a random stream is for: each LLM has its own of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmCount:
    """What was asked of one LLM, and what was made."""

    llm: str
    source: str
    group: Group | None
    recorded: float
    """Requests of its source in the time that it plays."""
    asked: int
    """By the recipe, inserted ones included."""
    made: int
    unknown_s: float
    """Time of the source without a record, taken to be like the window before it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Composed:
    """A trace, what it was made of, and the demand before it."""

    trace: Trace
    counts: tuple[LlmCount, ...]
    history: Demand | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Record:
    """A stretch of a source in single requests, in order of arrival."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints


def compose(
    recipe: Recipe,
    sources: Mapping[str, Source],
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Composed:
    """Carry out a recipe. Each LLM draws from random streams of its own (seed, place in
    the list), so that a change to one leaves the others as they are.

    `InvalidInput` names the recipe's field; ``progress(done, total)`` counts LLMs.
    """
    parts, past, counts = [], [], []
    for index, (llm, asked) in enumerate(zip(recipe.llms, wanted(recipe), strict=True)):
        try:
            player = _Player(recipe, llm, index, sources)
            part, recorded, unknown_s = player.play(TRACE, 0.0, recipe.span, asked)
            scale = len(part) / recorded if recorded else 1.0
            if recipe.history:
                past.append(player.past(recipe.history, scale))
            part = merge([part, *player.bursts(part)])
        except InvalidInput as error:
            where = f"llms.{index}" + (f".{error.field}" if error.field else "")
            raise InvalidInput(
                error.message,
                field=where,
                hint=error.hint,
                file=error.file,
                line=error.line,
            ) from None
        inserted = sum(b.requests for b in recipe.insert if b.llm == llm.name)
        counts.append(
            LlmCount(
                llm=llm.name,
                source=llm.source,
                group=llm.group,
                recorded=recorded,
                asked=inserted + (round(recorded) if asked is None else asked),
                made=len(part),
                unknown_s=unknown_s,
            )
        )
        parts.append(part)
        progress(index + 1, len(recipe.llms))
    return Composed(
        trace=merge(parts),
        counts=tuple(counts),
        history=_demand(recipe, past) if recipe.history else None,
    )


class _Player:
    """One LLM of a recipe, played by its source."""

    def __init__(
        self, recipe: Recipe, llm: LlmPart, index: int, sources: Mapping[str, Source]
    ) -> None:
        self.recipe, self.llm, self.index, self.sources = recipe, llm, index, sources
        source = sources[llm.source]
        self.played: Trace | Rates
        if source.trace is not None:
            self.played = group_of(source.trace, llm.group)
            # Requests do not say when a record ends: with the minute of the last one.
            self.begin_s, self.length_s = 0.0, (source.trace.span_s // 60 + 1) * 60
        elif source.rates is not None:
            self.played = series_of(source.rates, llm.group)
            self.begin_s = source.rates.start_s
            self.length_s = source.rates.num_windows * source.rates.window_s
        else:
            raise InvalidInput(
                f"{llm.source!r} holds lengths, not requests", field="source"
            )

    def rng(self, purpose: int) -> np.random.Generator:
        """The stream of random numbers for one purpose."""
        return np.random.default_rng([self.recipe.seed, self.index, purpose])

    def play(
        self, purpose: int, start_s: float, span_s: float, asked: int | None
    ) -> tuple[Trace, float, float]:
        """``span_s`` seconds from ``start_s``: (requests, recorded number, unknown time).

        ``asked`` requests; None: as many as recorded.
        """
        rng, llm = self.rng(purpose), self.llm
        if isinstance(self.played, Trace):
            record = self._record(self.played, start_s, span_s)
            recorded, unknown_s = float(len(record.arrival_s)), 0.0
            count = len(record.arrival_s) if asked is None else asked
            _check_recorded(recorded, count)
            record = _resampled(record, count, span_s, rng)
            arrival_s = record.arrival_s
            if llm.cv is not None:
                arrival_s = bent(cells_of(arrival_s, span_s), count, llm.cv, rng)
            lengths = record.input_tokens, record.output_tokens
            if llm.lengths is not None:
                lengths = self._lengths(arrival_s, start_s, rng)
        else:
            cells = self._cells(self.played, start_s, span_s)
            recorded, unknown_s = float(cells.requests.sum()), cells.unknown_s
            count = round(recorded) if asked is None else asked
            _check_recorded(recorded, count)
            arrival_s = (
                scattered(cells, count, rng)
                if llm.cv is None
                else bent(cells, count, llm.cv, rng)
            )
            lengths = self._lengths(arrival_s, start_s, rng)
        return self._part(arrival_s, *lengths, span_s), recorded, unknown_s

    def past(self, history: HistoryPart, scale: float) -> Trace:
        """The time before the trace, ``scale`` requests for each one recorded."""
        start_s, end = -history.span, self._second(self.recipe.span)
        if self.llm.wrap and (self._second(start_s) < 0 or end > self.length_s):
            raise InvalidInput(
                "the history reaches over the source's end: it would be the trace's future",
                field="wrap",
                hint="a shorter span or history, another phase, or no history",
            )
        if isinstance(self.played, Trace):
            record = self._record(self.played, start_s, history.span)
            recorded = float(len(record.arrival_s))
        else:
            cells = self._cells(self.played, start_s, history.span)
            recorded = float(cells.requests.sum())
        return self.play(HISTORY, start_s, history.span, round(recorded * scale))[0]

    def bursts(self, part: Trace) -> Iterator[Trace]:
        """The recipe's extra requests of this LLM; lengths as those of ``part``."""
        rng = self.rng(BURST)
        for burst in self.recipe.insert:
            if burst.llm != self.llm.name:
                continue
            if not len(part):
                raise InvalidInput(
                    "no requests to take an inserted burst's lengths from"
                )
            arrival_s = np.sort(burst.at + rng.random(burst.requests) * burst.duration)
            rows = rng.integers(len(part), size=burst.requests)
            yield self._part(
                arrival_s,
                part.input_tokens[rows],
                part.output_tokens[rows],
                self.recipe.span,
            )

    def _second(self, time_s: float) -> float:
        """Seconds since the record's begin that are played at ``time_s`` of the trace."""
        llm = self.llm
        return self.recipe.start + llm.phase + llm.compress * time_s - self.begin_s

    def _turns(
        self, start_s: float, span_s: float
    ) -> Iterator[tuple[float, float, float]]:
        """(begin, end, offset) on the source's clock: the stretches that are played, and
        what to add for the time on a clock that does not begin again."""
        begin, end = self._second(start_s), self._second(start_s + span_s)
        if (begin < -1e-6 or end > self.length_s + 1e-6) and not self.llm.wrap:
            played, recorded = (
                f"from {self.begin_s + since:.10g} s to {self.begin_s + until:.10g} s"
                for since, until in ((begin, end), (0.0, self.length_s))
            )
            raise InvalidInput(
                f"{self.llm.name!r} plays its source {played}, "
                f"but the record goes {recorded}",
                field="phase" if self.llm.phase else "source",
                hint="another start or span, or `wrap: true` to begin again",
            )
        if not self.llm.wrap:
            begin, end = max(begin, 0.0), min(end, self.length_s)
        for turn in range(int(begin // self.length_s), int(end // self.length_s) + 1):
            offset = turn * self.length_s
            low, high = max(begin - offset, 0.0), min(end - offset, self.length_s)
            if high > low:
                yield low, high, offset

    def _record(self, trace: Trace, start_s: float, span_s: float) -> _Record:
        origin = self._second(start_s)
        times, inputs, outputs = [], [], []
        for low, high, offset in self._turns(start_s, span_s):
            piece = trace.between(low, high)
            times.append((piece.arrival_s + offset - origin) / self.llm.compress)
            inputs.append(piece.input_tokens)
            outputs.append(piece.output_tokens)
        return _Record(
            arrival_s=np.concatenate(times),
            input_tokens=np.concatenate(inputs),
            output_tokens=np.concatenate(outputs),
        )

    def _cells(self, rates: Rates, start_s: float, span_s: float) -> Cells:
        width, origin = rates.window_s, self._second(start_s)
        known = np.isfinite(rates.counts[0])
        # The last known window: between it and the next one would know the future.
        latest = np.maximum.accumulate(np.where(known, np.arange(len(known)), -1))
        filled = rates.counts[0][np.where(latest < 0, known.argmax(), latest)]
        cv = np.ones(rates.num_windows) if rates.cv is None else rates.cv[0]
        edges, windows = [origin], []
        for low, high, offset in self._turns(start_s, span_s):
            inner = np.arange(int(low // width) + 1, int(np.ceil(high / width)))
            windows += [int(low // width), *inner.tolist()]
            edges += [*(inner * width + offset).tolist(), high + offset]
        edges_s = (np.array(edges) - origin) / self.llm.compress
        seconds = np.diff(edges_s) * self.llm.compress
        return Cells(
            edges_s=edges_s,
            requests=filled[windows] * seconds / width,
            cv=np.where(np.isnan(cv), 1.0, cv)[windows],
            unknown_s=float(seconds[~known[windows]].sum()),
        )

    def _lengths(
        self, arrival_s: Floats, start_s: float, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Lengths for requests of a source that has none, or of others' than its own."""
        part, llm = self.llm.lengths, self.llm
        if part and part.input_tokens is not None and part.output_tokens is not None:
            stated = (parse_tokens(part.input_tokens), parse_tokens(part.output_tokens))
            inputs, outputs = (tokens.draw(len(arrival_s), rng) for tokens in stated)
            return inputs, outputs
        name, group = (part.source, part.group) if part else (llm.source, llm.group)
        source = self.sources[name or llm.source]
        if source.trace is not None:
            others = group_of(source.trace, group, "lengths.group")
            rows = rng.integers(len(others), size=len(arrival_s))
            return others.input_tokens[rows], others.output_tokens[rows]
        if source.lengths is None:
            raise InvalidInput(
                f"{llm.name!r} needs lengths: its source has counts alone",
                hint="give lengths: {source: ...}, or its input_tokens and output_tokens",
            )
        known = source.lengths
        group = llm.group if group is None else group
        key = next(iter(known)) if group is None and len(known) == 1 else str(group)
        if key not in known:
            raise InvalidInput(
                "whose lengths?" if group is None else f"no lengths of {key!r}",
                field="lengths.group" if part else "group",
                hint=did_you_mean(key, list(known)),
            )
        found = known[key]
        if start_s < 0:
            found = begun(found, self.begin_s + self._second(0.0))
        played_s = (self._second(start_s) + arrival_s * llm.compress) % self.length_s
        return found.draw(self.begin_s + played_s, rng)

    def _part(
        self, arrival_s: Floats, inputs: Ints, outputs: Ints, span_s: float
    ) -> Trace:
        """Requests of this LLM, clamped to its limits."""
        least, most = self.llm.min_output, self.llm.max_input
        return Trace(
            arrival_s=in_span(arrival_s, span_s),
            llm=np.zeros(len(arrival_s), dtype=np.int32),
            llms=(self.llm.name,),
            input_tokens=inputs if most is None else np.minimum(inputs, np.int32(most)),
            output_tokens=(
                outputs if least is None else np.maximum(outputs, np.int32(least))
            ),
        )


def _check_recorded(recorded: float, count: int) -> None:
    if count and not recorded:
        raise InvalidInput(
            f"{count} requests are asked for, but the source has none in this time"
        )


def _resampled(
    record: _Record, count: int, span_s: float, rng: np.random.Generator
) -> _Record:
    """``count`` requests out of those recorded; unchanged if as many."""
    times, number = record.arrival_s, len(record.arrival_s)
    if count == number or not number:
        return record
    times_each, rest = divmod(count, number)
    chosen = rng.choice(number, rest, replace=False)
    rows = np.sort(np.concatenate([np.repeat(np.arange(number), times_each), chosen]))
    copies = np.diff(rows, prepend=-1) == 0
    until = np.append(times[1:], span_s)
    at_s = times[rows]
    at_s[copies] += rng.random(int(copies.sum())) * (until - times)[rows[copies]]
    order = np.argsort(at_s, kind="stable")
    return _Record(
        arrival_s=at_s[order],
        input_tokens=record.input_tokens[rows][order],
        output_tokens=record.output_tokens[rows][order],
    )


def _demand(recipe: Recipe, past: list[Trace]) -> Demand:
    """The history's demand, on the recipe's clock: it ends where the trace starts."""
    history = recipe.history
    assert history is not None
    trace = merge(past)
    prefill, decode = (
        np.array([getattr(llm, key) for llm in recipe.llms], dtype=np.float64)
        for key in ("prefill", "decode")
    )
    prefill = np.where(np.isnan(prefill), history.prefill, prefill)[trace.llm]
    decode = np.where(np.isnan(decode), history.decode, decode)[trace.llm]
    busy_s: NDArray[np.float64] = prefill + trace.output_tokens * decode
    demand = bin_demand(trace, epoch_s=history.epoch, busy_s=busy_s, end_s=history.span)
    return replace(demand, start_s=recipe.start - history.span)
