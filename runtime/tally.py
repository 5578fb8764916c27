"""What a run came to, counted from its events, live or from a journal file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Phase
from foreserve.models.outcome import Latency, Outcome, Residency, Run, Service
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.runtime.journal import (
    Decision,
    Ended,
    Event,
    PhaseChange,
    Recorder,
    RequestEnd,
    Started,
)

Floats = NDArray[np.float64]

BY_ACTIVITY: tuple[Phase, ...] = ("ACTIVE", "DRAINING", "ACTIVATING", "LOADING", "WARM")
"""A GPU counts each instant under the first of these that a replica on it is in."""

QUANTILES = (0.5, 0.9, 0.95, 0.99)


class Tally:
    """A `Recorder` that adds up events and passes them on to ``journal``."""

    def __init__(self, fleet: Fleet, journal: Recorder | None = None) -> None:
        self.fleet, self.journal = fleet, journal
        self._started: Started | None = None
        self._ended_s: float | None = None
        self._phases: dict[ReplicaId, tuple[Phase, float]] = {}
        self._wanted: frozenset[ReplicaId] = frozenset()
        self._cold: set[ReplicaId] = set()
        """Replicas wanted ACTIVE whose weights were not there when that was so."""
        self._residency: list[Residency] = []
        self._requests: list[RequestEnd] = []
        self._loads = self._loaded_bytes = 0
        self._warm_starts = self._cold_starts = 0

    def record(self, event: Event) -> None:
        if self.journal is not None:
            self.journal.record(event)
        match event:
            case RequestEnd():
                self._requests.append(event)
            case PhaseChange():
                self._change(event)
            case Decision(desired=desired) if desired is not None:
                active = (r.id for r in desired.replicas if r.state == "ACTIVE")
                self._wanted = frozenset(active)
                self._cold &= self._wanted
                self._cold |= {key for key in self._wanted if not self._is_there(key)}
            case Started():
                self._started = event
                for replica in event.initial.replicas:
                    self._phases[replica.id] = (replica.state, event.at_s)
            case Ended():
                for key in list(self._phases):
                    self._close(key, event.at_s)
                self._ended_s = event.at_s

    def _is_there(self, key: ReplicaId) -> bool:
        return key in self._phases and self._phases[key][0] != "LOADING"

    def _change(self, event: PhaseChange) -> None:
        key = ReplicaId(llm=event.llm, gpus=event.gpus)
        self._close(key, event.at_s)
        if event.phase is not None:
            self._phases[key] = (event.phase, event.at_s)
        if event.phase == "LOADING":
            option = self.fleet.option_of(key.llm, key.gpus)
            self._loads += 1
            self._loaded_bytes += option.resident_bytes * len(key.gpus)
        elif event.phase == "ACTIVATING":
            self._cold_starts += key in self._cold
            self._warm_starts += key not in self._cold
        elif event.phase is None and key in self._wanted:
            self._cold.add(key)

    def _close(self, key: ReplicaId, at_s: float) -> None:
        if key not in self._phases:
            return
        phase, since_s = self._phases.pop(key)
        if at_s > since_s:
            stretch = Residency(
                llm=key.llm, gpus=key.gpus, phase=phase, start_s=since_s, end_s=at_s
            )
            self._residency.append(stretch)

    def run(self, load_bin_s: float = 300.0) -> Run:
        """The run, once its last event has been recorded."""
        started = self._started
        if started is None or self._ended_s is None:
            raise InvalidInput(
                "journal: no whole run, its first or last line is missing"
            )
        start_s, end_s = started.start_s, started.end_s
        requests = sorted(self._requests, key=lambda r: r.request)
        llms = tuple(llm.name for llm in self.fleet.llms)
        index = {name: i for i, name in enumerate(llms)}
        llm = np.array([index[r.llm] for r in requests], dtype=np.int32)
        arrival_s = np.array([r.arrival_s for r in requests], dtype=np.float64)
        left_s = np.array([r.at_s for r in requests], dtype=np.float64)
        first_s = np.array(
            [np.nan if r.first_token_s is None else r.first_token_s for r in requests]
        )
        finished = np.array([r.result == "finished" for r in requests], dtype=bool)
        finish_s = np.where(finished, left_s, np.nan)
        tokens = np.array(
            [(r.input_tokens, r.output_tokens) for r in requests], dtype=np.int64
        ).reshape(-1, 2)
        delays = _delays(arrival_s, first_s, finish_s, tokens[:, 1], self._ended_s)
        slo = np.array([(x.slo.ttft_s, x.slo.tpot_s) for x in self.fleet.llms])[llm]
        kept = finished & (delays[0] <= slo[:, 0]) & ~(delays[1] > slo[:, 1])

        def service(which: NDArray[np.bool_]) -> Service:
            ttft, tpot, e2e = (_latency(row[which]) for row in delays)
            done = which & finished
            return Service(
                requests=int(which.sum()),
                finished=int(done.sum()),
                ttft=ttft,
                tpot=tpot,
                e2e=e2e,
                slo_attainment=float(kept[which].mean()) if which.any() else 1.0,
                input_tokens=int(tokens[done, 0].sum()),
                output_tokens=int(tokens[done, 1].sum()),
            )

        residency = tuple(
            sorted(self._residency, key=lambda r: (r.gpus, r.start_s, r.llm))
        )
        seconds = gpu_seconds(residency, start_s, end_s)
        hours: dict[str, float] = {
            phase: sum(row[phase] for row in seconds.values()) / 3600
            for phase in BY_ACTIVITY
        }
        cost_usd = sum(
            self.fleet.cluster.type_of(gpu).price_usd_per_h * sum(row.values()) / 3600
            for gpu, row in seconds.items()
        )
        outcome = Outcome(
            policy=started.policy,
            start_s=start_s,
            end_s=end_s,
            total=service(np.ones(len(requests), dtype=bool)),
            by_llm={name: service(llm == i) for i, name in enumerate(llms)},
            gpu_hours={**hours, "total": sum(hours.values())},
            cost_usd=cost_usd,
            loads=self._loads,
            loaded_bytes=self._loaded_bytes,
            activations=self._warm_starts + self._cold_starts,
            warm_starts=self._warm_starts,
            cold_starts=self._cold_starts,
        )
        bins = max(1, int(np.ceil((end_s - start_s) / load_bin_s)))
        mean = np.zeros((len(llms), bins))
        peak = np.zeros((len(llms), bins))
        for i in range(len(llms)):
            mean[i], peak[i] = loads(
                arrival_s[llm == i], left_s[llm == i], start_s, end_s, load_bin_s
            )
        return Run(
            outcome=outcome,
            residency=residency,
            llms=llms,
            llm=llm,
            arrival_s=arrival_s,
            first_token_s=first_s,
            finish_s=finish_s,
            load_bin_s=load_bin_s,
            mean_load=mean,
            peak_load=peak,
        )


def _delays(
    arrival_s: Floats,
    first_token_s: Floats,
    finish_s: Floats,
    output_tokens: NDArray[np.int64],
    ended_s: float,
) -> tuple[Floats, Floats, Floats]:
    """[request] TTFT, TPOT, E2E. What never came counts until ``ended_s`` (`Latency`);
    TPOT is NaN for requests of one token and for unfinished ones."""
    waited_s = ended_s - arrival_s
    ttft_s = np.where(np.isnan(first_token_s), waited_s, first_token_s - arrival_s)
    e2e_s = np.where(np.isnan(finish_s), waited_s, finish_s - arrival_s)
    gaps = np.where(output_tokens > 1, output_tokens - 1, np.nan)
    return ttft_s, (finish_s - first_token_s) / gaps, e2e_s


def _latency(delay_s: Floats) -> Latency:
    known = delay_s[~np.isnan(delay_s)]
    if not known.size:
        return Latency(count=0, mean_s=0, p50_s=0, p90_s=0, p95_s=0, p99_s=0)
    p50, p90, p95, p99 = (float(q) for q in np.quantile(known, QUANTILES))
    return Latency(
        count=known.size,
        mean_s=float(known.mean()),
        p50_s=p50,
        p90_s=p90,
        p95_s=p95,
        p99_s=p99,
    )


def gpu_seconds(
    residency: Sequence[Residency], start_s: float, end_s: float
) -> Mapping[GpuId, Mapping[Phase, float]]:
    """Seconds of [start_s, end_s) by GPU and its most active phase."""
    edges: dict[GpuId, list[tuple[float, int, int]]] = {}
    for stretch in residency:
        begin_s, stop_s = max(stretch.start_s, start_s), min(stretch.end_s, end_s)
        rank = BY_ACTIVITY.index(stretch.phase)
        for gpu in stretch.gpus if begin_s < stop_s else ():
            edges.setdefault(gpu, []).extend([(begin_s, rank, 1), (stop_s, rank, -1)])
    return {gpu: _sweep(sorted(rows)) for gpu, rows in sorted(edges.items())}


def _sweep(edges: Iterable[tuple[float, int, int]]) -> Mapping[Phase, float]:
    seconds = dict.fromkeys(BY_ACTIVITY, 0.0)
    held = [0] * len(BY_ACTIVITY)
    since_s = 0.0
    for at_s, rank, change in edges:
        top = next(
            (phase for phase, n in zip(BY_ACTIVITY, held, strict=True) if n), None
        )
        if top is not None:
            seconds[top] += at_s - since_s
        held[rank] += change
        since_s = at_s
    return seconds


def loads(
    arrival_s: Floats, left_s: Floats, start_s: float, end_s: float, bin_s: float
) -> tuple[Floats, Floats]:
    """[bin] mean and maximum of the number of requests in the system, bins of ``bin_s``
    from ``start_s``; the last may be shorter. One that leaves as another comes makes
    room for it."""
    bins = max(1, int(np.ceil((end_s - start_s) / bin_s)))
    starts_s = start_s + bin_s * np.arange(bins)
    at_s = np.concatenate([left_s, arrival_s, starts_s])
    change = np.repeat([-1, 1, 0], [len(left_s), len(arrival_s), bins])
    order = np.argsort(at_s, kind="stable")
    at_s, level = at_s[order], np.cumsum(change[order])
    inside = (at_s >= start_s) & (at_s < end_s)
    next_s = np.minimum(np.append(at_s[1:], np.inf), end_s)
    number = np.searchsorted(starts_s, at_s[inside], side="right") - 1
    weight = (level * (next_s - at_s))[inside]
    length_s = np.minimum(starts_s + bin_s, end_s) - starts_s
    mean = np.bincount(number, weights=weight, minlength=bins) / length_s
    peak = np.zeros(bins)
    np.maximum.at(peak, number, level[inside].astype(np.float64))
    return mean, peak
