"""What a run came to, counted from its events, live or from a journal file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.models.faults import Fault
from foreserve.models.gaps import GAP_BINS
from foreserve.models.observed import Phase
from foreserve.models.outcome import Effort, Outcome, Residency, Run
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.runtime.journal import (
    Decision,
    Ended,
    Event,
    Faulted,
    PhaseChange,
    Recorder,
    RequestEnd,
    RequestEnds,
    RequestTable,
    Served,
    Started,
)
from foreserve.runtime.measures import RequestLog, Requests, services

Floats = NDArray[np.float64]

BY_ACTIVITY: tuple[Phase, ...] = ("ACTIVE", "DRAINING", "ACTIVATING", "LOADING", "WARM")
"""A GPU counts each instant under the first of these that a replica on it is in."""

COUNTS = tuple(field.name for field in fields(Effort) if field.name != "gpu_hours")


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
        self._faults: list[Fault] = []
        self._restarted = 0
        self._log = RequestLog([llm.name for llm in fleet.llms])
        self._table: RequestTable | None = None
        """Where requests come as `RequestEnds`: read at the end."""
        self._gaps = np.zeros((len(fleet.llms), GAP_BINS), np.int64)
        self._gaps_s = np.zeros(len(fleet.llms))
        self._counts = {llm.name: Counter[str]() for llm in fleet.llms}
        """By LLM and name of `COUNTS`."""
        self._unused: dict[ReplicaId, int] = {}
        """Weight bytes of replicas that were loaded and have not been worked with."""

    def record(self, event: Event | RequestEnds) -> None:
        if self.journal is not None:
            self.journal.record(event)
        match event:
            case RequestEnds(table=table):
                self._table = table
                if self._unused:
                    for key in event.worked_on():
                        self._unused.pop(key, None)
            case RequestEnd():
                self._log.add(event)
                if self._unused and event.gpus is not None:
                    self._unused.pop(ReplicaId(llm=event.llm, gpus=event.gpus), None)
            case Served(llm=llm):
                index = [x.name for x in self.fleet.llms].index(llm)
                self._gaps_s[index] += event.gaps_s
                for which, number in event.gaps:
                    self._gaps[index, which] += number
                self._counts[llm]["preemptions"] += event.preemptions
                self._counts[llm]["found_tokens"] += event.found_tokens
            case PhaseChange():
                self._change(event)
            case Faulted():
                self._faults.append(event.fault)
                self._restarted += event.requests
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
        counts = self._counts[key.llm]
        if event.phase == "LOADING":
            option = self.fleet.option_of(key.llm, key.gpus)
            weights = (option.resident_bytes - option.residue_bytes) * len(key.gpus)
            counts["loads"] += 1
            counts["storage_loads"] += event.from_storage
            counts["loaded_bytes"] += option.resident_bytes * len(key.gpus)
            counts["moved_bytes"] += weights
            self._unused[key] = weights
        elif event.phase == "ACTIVATING":
            counts["activations"] += 1
            counts["cold_starts" if key in self._cold else "warm_starts"] += 1
        elif event.phase is None:
            unused = self._unused.pop(key, 0)
            counts["wasted_bytes"] += 0 if event.lost and not event.revoked else unused
            counts["revoked"] += event.revoked
            if key in self._wanted:
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

    def _effort(self, llm: str, gpu_s: float) -> Effort:
        unused = sum(size for key, size in self._unused.items() if key.llm == llm)
        counts = self._counts[llm] | Counter(unused_bytes=unused)
        return Effort(gpu_hours=gpu_s / 3600, **{name: counts[name] for name in COUNTS})

    def requests(self) -> Requests:
        """All that have ended, in the order of their numbers."""
        if self._table is None:
            return self._log.requests()
        return Requests.of(self._table)

    def run(self, load_bin_s: float = 300.0) -> Run:
        """The run, once its last event has been recorded."""
        started = self._started
        if started is None or self._ended_s is None:
            raise InvalidInput(
                "journal: no whole run, its first or last line is missing"
            )
        start_s, end_s = started.start_s, started.end_s
        llms = tuple(llm.name for llm in self.fleet.llms)
        requests = self.requests()
        total, by_llm = services(
            self.fleet,
            requests,
            gaps=self._gaps,
            gaps_s=self._gaps_s,
            span_s=end_s - start_s,
            ended_s=self._ended_s,
        )
        residency = tuple(
            sorted(self._residency, key=lambda r: (r.gpus, r.start_s, r.llm))
        )
        seconds, llm_s = occupied(residency, start_s, end_s)
        hours: dict[str, float] = {
            phase: sum(row[phase] for row in seconds.values()) / 3600
            for phase in BY_ACTIVITY
        }
        cost_usd = sum(
            self.fleet.cluster.type_of(gpu).price_usd_per_h * sum(row.values()) / 3600
            for gpu, row in seconds.items()
        )
        effort = {name: self._effort(name, llm_s.get(name, 0.0)) for name in llms}
        outcome = Outcome(
            policy=started.policy,
            start_s=start_s,
            end_s=end_s,
            total=total,
            by_llm=by_llm,
            gpu_hours={**hours, "total": sum(hours.values())},
            cost_usd=cost_usd,
            effort=effort,
            faults=len(self._faults),
            restarted=self._restarted,
            **{name: sum(getattr(e, name) for e in effort.values()) for name in COUNTS},
        )
        bins = len(bin_starts(start_s, end_s, load_bin_s))
        mean = np.zeros((len(llms), bins))
        peak = np.zeros((len(llms), bins))
        for i in range(len(llms)):
            own = requests.llm == i
            mean[i], peak[i] = loads(
                requests.arrival_s[own],
                requests.left_s[own],
                start_s,
                end_s,
                load_bin_s,
            )
        return Run(
            outcome=outcome,
            residency=residency,
            llms=llms,
            llm=requests.llm,
            arrival_s=requests.arrival_s,
            first_token_s=requests.first_token_s,
            finish_s=requests.finish_s,
            left_s=requests.left_s,
            output_tokens=requests.output_tokens,
            load_bin_s=load_bin_s,
            mean_load=mean,
            peak_load=peak,
            itl=self._gaps,
            itl_s=self._gaps_s,
            faults=tuple(self._faults),
        )


def gpu_seconds(
    residency: Sequence[Residency], start_s: float, end_s: float
) -> Mapping[GpuId, Mapping[Phase, float]]:
    """Seconds of [start_s, end_s) by GPU and its most active phase."""
    return occupied(residency, start_s, end_s)[0]


def occupied(
    residency: Sequence[Residency], start_s: float, end_s: float
) -> tuple[Mapping[GpuId, Mapping[Phase, float]], Mapping[str, float]]:
    """`gpu_seconds`, and the same seconds by LLM: each GPU's go to the LLMs that are in
    its most active phase, in equal parts."""
    edges: dict[GpuId, list[_Edge]] = {}
    for stretch in residency:
        begin_s, stop_s = max(stretch.start_s, start_s), min(stretch.end_s, end_s)
        rank, llm = BY_ACTIVITY.index(stretch.phase), stretch.llm
        for gpu in stretch.gpus if begin_s < stop_s else ():
            edges.setdefault(gpu, []).extend(
                [(begin_s, rank, 1, llm), (stop_s, rank, -1, llm)]
            )
    llm_s: dict[str, float] = {}
    return {
        gpu: _sweep(sorted(rows), llm_s) for gpu, rows in sorted(edges.items())
    }, llm_s


_Edge = tuple[float, int, int, str]
"""(when, index of the phase, 1 begins or -1 ends, LLM)."""


def _sweep(edges: Iterable[_Edge], llm_s: dict[str, float]) -> Mapping[Phase, float]:
    """Seconds of one GPU by phase; adds them to ``llm_s``."""
    seconds = dict.fromkeys(BY_ACTIVITY, 0.0)
    held: list[Counter[str]] = [Counter() for _ in BY_ACTIVITY]
    since_s = 0.0
    for at_s, rank, change, llm in edges:
        for phase, there in zip(BY_ACTIVITY, held, strict=True):
            if there:
                seconds[phase] += at_s - since_s
                for name in there:
                    llm_s[name] = llm_s.get(name, 0.0) + (at_s - since_s) / len(there)
                break
        held[rank][llm] += change
        if not held[rank][llm]:
            del held[rank][llm]
        since_s = at_s
    return seconds


def bin_starts(start_s: float, end_s: float, bin_s: float) -> Floats:
    """Where bins of ``bin_s`` begin; rounding leaves no empty one at the end."""
    bins = max(1, int(np.ceil((end_s - start_s) / bin_s - 1e-9)))
    return start_s + bin_s * np.arange(bins, dtype=np.float64)


def loads(
    arrival_s: Floats, left_s: Floats, start_s: float, end_s: float, bin_s: float
) -> tuple[Floats, Floats]:
    """[bin] mean and maximum of the number of requests in the system, bins of ``bin_s``
    from ``start_s``; the last may be shorter. One that leaves as another comes makes
    room for it."""
    starts_s = bin_starts(start_s, end_s, bin_s)
    bins = len(starts_s)
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
