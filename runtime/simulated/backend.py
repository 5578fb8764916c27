"""The simulated cluster: replicas, links, queues and engines on a virtual clock.

Requests are routed as they come; those that no replica can take wait in one queue per
LLM, first come first served, and move when a slot frees or a replica becomes ACTIVE.
Nothing polls. The ledger is checked at every change, so over-commitment raises.

All that concerns single requests is the `Engines`' and compiled; here are the replicas'
lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.journal import (
    Gaps,
    PhaseChange,
    Recorder,
    RequestEnds,
    RequestTable,
)
from foreserve.runtime.ledger import Ledger, phase_bytes
from foreserve.runtime.simulated.engine import EngineLimits, Engines
from foreserve.runtime.simulated.layout import NONE, Columns
from foreserve.runtime.states import check_action, check_move
from foreserve.traces.trace import Trace


@dataclass(slots=True, eq=False)
class _Replica:
    """One life of a replica, from its load until it is gone."""

    id: ReplicaId
    option: ReplicaOption
    phase: Phase
    load_s: float
    """With its noise; the time in the queue for the link comes on top."""
    story: list[tuple[float, Phase | None]] = field(default_factory=list)
    engine: int | None = None
    """Its number while it holds KV."""
    on_link: bool = False


class SimulatedBackend:
    """A `Backend` that lives on a `VirtualClock`. Starts with ``initial`` in place."""

    def __init__(
        self,
        fleet: Fleet,
        trace: Trace,
        clock: VirtualClock,
        rng: np.random.Generator,
        journal: Recorder,
        *,
        first_request: int = 0,
        load_noise: float = 0.1,
        initial: Placement | None = None,
        limits: EngineLimits | None = None,
        watch: Callable[[float], None] | None = None,
        watch_every_s: float = math.inf,
    ) -> None:
        """All requests of ``trace`` will come; the first is number ``first_request``.

        ``watch`` is told the time every ``watch_every_s``. A load takes
        ``option.load_s * exp(load_noise * N)`` with standard normal N.
        """
        unknown = {trace.llms[i] for i in np.unique(trace.llm)} - {*fleet.llm_by_name}
        if unknown:
            raise InvalidInput(f"trace: the fleet does not serve {min(unknown)!r}")
        self.fleet, self.clock, self.journal = fleet, clock, journal
        self.limits = limits or EngineLimits()
        self._watch, self._watch_every_s = watch, watch_every_s
        self._watch_s = clock.now_s() + watch_every_s
        self._rng, self._load_noise = rng, load_noise
        self._ledger = Ledger(fleet)
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._by_engine: dict[int, _Replica] = {}
        self._llms = {llm.name: index for index, llm in enumerate(fleet.llms)}
        self._loads: list[_Replica] = []
        self._busy_links: set[GpuId] = set()
        own = np.array([self._llms.get(name, -1) for name in trace.llms], np.int32)
        self.engines = Engines(
            len(fleet.llms),
            Columns(
                trace.arrival_s, own[trace.llm], trace.input_tokens, trace.output_tokens
            ),
            clock.now_s(),
        )
        state = self.engines.state
        self._told = 0
        """Requests whose end the journal knows."""
        self._lives: list[ReplicaId] = []
        self._table = RequestTable(
            llms=tuple(self._llms),
            first_request=first_request,
            arrival_s=state.arrival_s,
            llm=state.llm,
            input_tokens=state.input_tokens,
            output_tokens=state.output_tokens,
            first_token_s=state.first_s,
            end_s=state.end_s,
            result=state.result,
            where=state.where,
            replicas=self._lives,
        )
        clock.stream = self
        for replica in (initial or Placement()).replicas:
            self._put(replica.id, replica.state)

    # --- Backend -----------------------------------------------------------------------

    def observe(self) -> Observed:
        self._tell()
        queue = self.engines.state.queue.tolist()
        return Observed(
            now_s=self.clock.now_s(),
            replicas=tuple(self._observed(r) for r in self._replicas.values()),
            waiting={llm: queue[i] for llm, i in self._llms.items() if queue[i]},
        )

    def _observed(self, replica: _Replica) -> ObservedReplica:
        in_flight, idle_since_s = 0, None
        if replica.engine is not None:
            row = self.engines.row(replica.engine)
            in_flight = int(row["in_flight"])
            if replica.phase == "ACTIVE" and not in_flight:
                idle_since_s = float(row["idle_since_s"])
        return ObservedReplica(
            llm=replica.id.llm,
            gpus=replica.id.gpus,
            phase=replica.phase,
            in_flight=in_flight,
            idle_since_s=idle_since_s,
        )

    def apply(self, actions: Sequence[Action]) -> None:
        for action in actions:
            key = action.replica
            replica = self._replicas.get(key)
            phase, story = (replica.phase, replica.story) if replica else (None, [])
            after = check_action(action.kind, key, phase, story)
            if replica is None:
                self._load(key)
            else:
                self._move(replica, after)
            if after == "ACTIVATING" and replica:
                ready_s = self.clock.now_s() + replica.option.activate_s
                self.clock.schedule(ready_s, partial(self._activated, replica))
            elif after == "DRAINING" and replica and replica.engine is not None:
                self.engines.withdraw(replica.engine)
                if not self.engines.row(replica.engine)["in_flight"]:
                    self._move(replica, "WARM")

    def lose(self, key: ReplicaId) -> None:
        """The replica vanishes. Its requests go back to the head of the queue and start
        anew elsewhere: what was streamed of them is lost."""
        self._move(self._replicas[key], None, lost=True)
        self.engines.serve_queue(self._llms[key.llm])

    # --- Stream ------------------------------------------------------------------------

    def run(self, until_s: float) -> float:
        """Let requests come, be worked on and end, up to and including ``until_s``."""
        while True:
            if self.engines.run(min(until_s, self._watch_s)):
                return float(self.engines.top["now_s"])
            if self._watch is None or self._watch_s > until_s:
                return math.inf
            self._watch(self._watch_s)
            self._watch_s += self._watch_every_s

    def handle(self) -> None:
        """Do what the engines stopped for."""
        top = self.engines.top
        if top["woken"]:
            top["woken"] = False
            self.clock.wake()
        if top["emptied"] != NONE:
            replica = self._by_engine[int(top["emptied"])]
            top["emptied"] = NONE
            self._move(replica, "WARM")

    # --- requests ----------------------------------------------------------------------

    @property
    def arrived(self) -> int:
        return int(self.engines.top["arrived"])

    @property
    def ended(self) -> int:
        return int(self.engines.top["ended"])

    @property
    def in_system(self) -> int:
        """Requests that have come and not ended."""
        return self.arrived - self.ended

    def stop(self) -> None:
        """End the run: book every request that is still here as unfinished, and write
        down what the tokens' gaps were."""
        self.engines.give_up(self.clock.now_s())
        self._tell()
        for llm, index in self._llms.items():
            counts = self.engines.state.gaps[index]
            if counts.any():
                self.journal.record(
                    Gaps(
                        at_s=self.clock.now_s(),
                        llm=llm,
                        seconds=float(self.engines.state.gaps_s[index]),
                        counts=tuple(
                            (i, int(counts[i])) for i in np.flatnonzero(counts).tolist()
                        ),
                    )
                )

    def _tell(self) -> None:
        """Write down the requests that have ended since the last time."""
        if (ended := self.ended) > self._told:
            rows = self.engines.state.order[self._told : ended]
            self._told = ended
            self.journal.record(RequestEnds(table=self._table, rows=rows))

    # --- replicas ----------------------------------------------------------------------

    def _put(self, key: ReplicaId, phase: Phase) -> _Replica:
        """A new replica in ``phase``: from a load, or in place from the start."""
        option = self.fleet.option_of(key.llm, key.gpus)
        self._ledger.hold(key.gpus, phase_bytes(option, phase))
        noise = math.exp(self._load_noise * self._rng.standard_normal())
        replica = _Replica(
            id=key, option=option, phase=phase, load_s=option.load_s * noise
        )
        replica.story.append((self.clock.now_s(), phase))
        self._replicas[key] = replica
        if phase == "ACTIVE":
            self._serve(replica)
        return replica

    def _move(
        self, replica: _Replica, after: Phase | None, *, lost: bool = False
    ) -> None:
        """Change phase: checked against the table and the ledger, written down."""
        key, before, now_s = replica.id, replica.phase, self.clock.now_s()
        check_move(key, before, after, replica.story)
        grown = phase_bytes(replica.option, after) - phase_bytes(replica.option, before)
        self._ledger.hold(key.gpus, grown)
        replica.story.append((now_s, after))
        if after is None:
            del self._replicas[key]
        else:
            replica.phase = after
        if after in (None, "WARM") and replica.engine is not None:
            self._tell()
            del self._by_engine[replica.engine]
            self.engines.close(replica.engine)
            replica.engine = None
        self._note(replica, after, lost)
        if before == "LOADING":
            self._leave_link(replica)

    def _note(self, replica: _Replica, phase: Phase | None, lost: bool = False) -> None:
        self._tell()
        self.journal.record(
            PhaseChange(
                at_s=self.clock.now_s(),
                llm=replica.id.llm,
                gpus=replica.id.gpus,
                phase=phase,
                lost=lost,
            )
        )
        self.clock.wake()

    def _activated(self, replica: _Replica) -> None:
        if self._replicas.get(replica.id) is replica:
            self._move(replica, "ACTIVE")
            self._serve(replica)

    def _serve(self, replica: _Replica) -> None:
        option = replica.option
        self._lives.append(replica.id)
        replica.engine = self.engines.open(
            self._llms[replica.id.llm],
            replica.id,
            option.time,
            option.kv_bytes // option.kv_token_bytes,
            self.limits,
            cap=option.concurrency,
            life=len(self._lives) - 1,
        )
        self._by_engine[replica.engine] = replica
        self.engines.serve_queue(self._llms[replica.id.llm])

    # --- loads: one at a time on each GPU's link, in the order they were asked for -----

    def _load(self, key: ReplicaId) -> None:
        replica = self._put(key, "LOADING")
        self._note(replica, "LOADING")
        self._loads.append(replica)
        self._start_loads()

    def _start_loads(self) -> None:
        taken = set(self._busy_links)
        for replica in [r for r in self._loads if not r.on_link]:
            if taken.isdisjoint(replica.id.gpus):
                replica.on_link = True
                self._busy_links.update(replica.id.gpus)
                ready_s = self.clock.now_s() + replica.load_s
                self.clock.schedule(ready_s, partial(self._loaded, replica))
            taken.update(replica.id.gpus)

    def _loaded(self, replica: _Replica) -> None:
        if self._replicas.get(replica.id) is replica:
            self._move(replica, "WARM")

    def _leave_link(self, replica: _Replica) -> None:
        self._loads.remove(replica)
        if replica.on_link:
            self._busy_links.difference_update(replica.id.gpus)
        self._start_loads()
