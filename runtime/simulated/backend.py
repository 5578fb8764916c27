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
from foreserve.models.faults import Fault, check_faults
from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.journal import (
    Faulted,
    Gaps,
    PhaseChange,
    Recorder,
    RequestEnds,
    RequestTable,
)
from foreserve.runtime.ledger import Ledger, phase_bytes
from foreserve.runtime.simulated.engine import EngineLimits, Engines
from foreserve.runtime.simulated.faults import Health
from foreserve.runtime.simulated.layout import NONE, Columns
from foreserve.runtime.simulated.loads import Loads
from foreserve.runtime.states import check_action, check_move
from foreserve.traces.trace import Trace


@dataclass(slots=True, eq=False)
class _Replica:
    """One life of a replica, from its load until it is gone."""

    id: ReplicaId
    option: ReplicaOption
    phase: Phase
    noise: float
    """By which the times of its load are multiplied."""
    story: list[tuple[float, Phase | None]] = field(default_factory=list)
    engine: int | None = None
    """Its number while it holds KV."""
    factor: float = 1.0
    """By which its iterations take longer now."""


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
        faults: Sequence[Fault] = (),
        limits: EngineLimits | None = None,
        watch: Callable[[float], None] | None = None,
        watch_every_s: float = math.inf,
    ) -> None:
        """All requests of ``trace`` will come; the first is number ``first_request``.

        ``watch`` is told the time every ``watch_every_s``. All times of a load are
        multiplied by ``exp(load_noise * N)`` with standard normal N.
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
        self.loads = Loads(fleet, clock.now_s())
        self._timers: dict[str, float] = {}
        """By node: for when its links' next event is scheduled."""
        self.health = Health(fleet.cluster)
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
        check_faults(faults, fleet)
        for fault in faults:
            self._plan(fault)

    # --- Backend -----------------------------------------------------------------------

    def observe(self) -> Observed:
        self._tell()
        queue = self.engines.state.queue.tolist()
        return Observed(
            now_s=self.clock.now_s(),
            replicas=tuple(self._observed(r) for r in self._replicas.values()),
            waiting={llm: queue[i] for llm, i in self._llms.items() if queue[i]},
            lost_gpus=self.health.lost_gpus,
        )

    def _observed(self, replica: _Replica) -> ObservedReplica:
        in_flight, idle_since_s = self._in_flight(replica), None
        if replica.phase == "ACTIVE" and not in_flight:
            assert replica.engine is not None
            idle_since_s = float(self.engines.row(replica.engine)["idle_since_s"])
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
                if not self._in_flight(replica):
                    self._move(replica, "WARM")

    def lose(self, key: ReplicaId) -> None:
        """The replica vanishes. Its requests go back to the head of the queue and start
        anew elsewhere: what was streamed of them is lost."""
        self._lose([self._replicas[key]])

    def _lose(self, replicas: Sequence[_Replica]) -> None:
        for replica in replicas:
            self._move(replica, None, lost=True)
        # Only now, so that none is sent to one that is about to vanish.
        for llm in dict.fromkeys(replica.id.llm for replica in replicas):
            self.engines.serve_queue(self._llms[llm])

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
            self._hurry()
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
        replica = _Replica(id=key, option=option, phase=phase, noise=noise)
        replica.story.append((self.clock.now_s(), phase))
        self._replicas[key] = replica
        if phase == "ACTIVE":
            self._serve(replica)
        return replica

    def _move(
        self,
        replica: _Replica,
        after: Phase | None,
        *,
        lost: bool = False,
        ended: bool = False,
    ) -> None:
        """Change phase: checked against the table and the ledger, written down.
        ``ended``: its load has left the links already."""
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
        self._note(replica, after, lost=lost)
        if before == "LOADING" and after is None and not ended:
            self.loads.cancel(key, now_s)
        self._couple(key.gpus[0].node)

    def _note(
        self,
        replica: _Replica,
        phase: Phase | None,
        *,
        lost: bool = False,
        from_storage: bool = False,
    ) -> None:
        self._tell()
        self.journal.record(
            PhaseChange(
                at_s=self.clock.now_s(),
                llm=replica.id.llm,
                gpus=replica.id.gpus,
                phase=phase,
                lost=lost,
                from_storage=from_storage,
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
        replica.factor = 1.0
        self._couple(replica.id.gpus[0].node)
        self.engines.serve_queue(self._llms[replica.id.llm])

    def _in_flight(self, replica: _Replica) -> int:
        if replica.engine is None:
            return 0
        return int(self.engines.row(replica.engine)["in_flight"])

    # --- loads, and what they and serving do to each other ------------------------------

    def _load(self, key: ReplicaId) -> None:
        replica = self._put(key, "LOADING")
        now_s = self.clock.now_s()
        stored = self.loads.begin(key, replica.option, now_s, replica.noise)
        self._note(replica, "LOADING", from_storage=stored)
        self._couple(key.gpus[0].node)

    def _hurry(self) -> None:
        """Requests have begun to wait: some loads may be urgent now."""
        for node in dict.fromkeys(key.gpus[0].node for key in self.loads.under_way):
            self._couple(node)

    def _couple(self, node: str) -> None:
        """Something has changed on ``node``: let its loads and its engines go as fast
        beside each other as they may, and look again when a load ends."""
        now_s, next_s = self.clock.now_s(), self.loads.by_node[node].links.next_s
        if next_s < math.inf:
            queue = self.engines.state.queue
            waited = [llm for llm, i in self._llms.items() if queue[i]]
            serving = [
                replica.id.gpus
                for replica in self._by_engine.values()
                if replica.id.gpus[0].node == node
            ]
            next_s = self.loads.settle(node, waited, serving, now_s)
        self._pace(node)
        if next_s < math.inf and next_s != self._timers.get(node):
            self._timers[node] = next_s
            self.clock.schedule(next_s, partial(self._links, node))

    def _pace(self, node: str) -> None:
        """Set how fast the engines of ``node`` are."""
        beside = 1.0 + self.loads.rules.slowdown_beside_loading
        factor = self.health.factor(node)
        copying = self.loads.by_node[node].links.copying if beside > 1.0 else ()
        for replica in self._by_engine.values():
            gpus = replica.id.gpus
            if gpus[0].node != node or replica.engine is None:
                continue
            wanted = factor if set(gpus).isdisjoint(copying) else factor * beside
            if wanted != replica.factor:
                replica.factor = wanted
                self.engines.set_speed(replica.engine, wanted)

    def _links(self, node: str) -> None:
        """A load of ``node`` may have ended, or its process may be there."""
        now_s = self.clock.now_s()
        if self.loads.by_node[node].links.next_s != now_s:
            return  # plans have changed since
        self._timers.pop(node, None)
        for key in self.loads.advance(node, now_s):
            failed = self.health.load_fails(key)
            replica = self._replicas[key]
            self._move(replica, None if failed else "WARM", lost=failed, ended=True)
        self._couple(node)

    # --- faults --------------------------------------------------------------------------

    def _plan(self, fault: Fault) -> None:
        """Have the fault begin, and end, when it does."""
        now_s, until_s = self.clock.now_s(), fault.until_s
        over_s = fault.at if fault.kind == "replica-crash" else until_s
        if over_s is not None and over_s <= now_s:
            return
        self.clock.schedule(max(now_s, fault.at), partial(self._begin, fault))
        if until_s is not None:
            self.clock.schedule(until_s, partial(self._recover, fault))

    def _begin(self, fault: Fault) -> None:
        where, takes = fault.where, fault.kind not in ("slow-node", "load-failure")
        hit = [r for r in self._replicas.values() if takes and where.hits(r.id)]
        self._tell()
        self.journal.record(
            Faulted(
                at_s=self.clock.now_s(),
                kind=fault.kind,
                target=fault.target,
                until_s=fault.until_s,
                factor=fault.factor,
                replicas=len(hit),
                requests=sum(map(self._in_flight, hit)),
            )
        )
        self._lose(hit)
        before = self.health.lost_gpus
        self.health.begin(fault)
        self._ledger.shut(self.health.lost_gpus - before)
        if fault.kind == "node-loss":
            self.loads.restart(where.node, self.clock.now_s())
        self._changed(where.node)

    def _recover(self, fault: Fault) -> None:
        before = self.health.lost_gpus
        self.health.end(fault)
        self._ledger.open(before - self.health.lost_gpus)
        if fault.kind == "node-loss":
            self.loads.restart(fault.where.node, self.clock.now_s())
        self._changed(fault.where.node)

    def _changed(self, node: str) -> None:
        """The health of ``node`` has."""
        links = self.loads.by_node[node].links
        links.set_factor(self.health.factor(node), self.clock.now_s())
        self._couple(node)
        self.clock.wake()
