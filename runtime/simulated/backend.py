"""The simulated cluster: the lives of replicas, on a virtual clock.

Requests and the engines that work on them are `Serving`'s, loads are `Loads`'. Here are
phases, memory, faults, and what all of these do to each other. The ledger is checked at
every change, so over-commitment raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.models.faults import Fault, check_faults
from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.journal import Faulted, PhaseChange, Recorder
from foreserve.runtime.ledger import Ledger, phase_bytes
from foreserve.runtime.live.patience import Failures, Patience
from foreserve.runtime.simulated.faults import Health
from foreserve.runtime.simulated.loads import Loads
from foreserve.runtime.simulated.serving import Serving
from foreserve.runtime.states import check_action, check_move
from foreserve.traces.trace import Trace

SERVING: frozenset[Phase] = frozenset({"ACTIVE", "DRAINING"})


@dataclass(slots=True, eq=False)
class _Replica:
    """One life of a replica, from its load until it is gone."""

    id: ReplicaId
    option: ReplicaOption
    phase: Phase
    noise: float
    """By which the times of its load are multiplied."""
    story: list[tuple[float, Phase | None]] = field(default_factory=list)
    held_bytes: int = 0
    """On each of its GPUs: less than its phase's while it lends KV memory."""
    borrowers: list[ReplicaId] = field(default_factory=list)
    """Whose weights are in memory that it has lent."""
    factor: float = 1.0
    """By which its iterations take longer now."""
    served_since_s: float | None = None
    """When it became ACTIVE last."""


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
        self._watch, self._watch_every_s = watch, watch_every_s
        self._watch_s = clock.now_s() + watch_every_s
        self._rng, self._load_noise = rng, load_noise
        self._ledger = Ledger(fleet)
        self._replicas: dict[ReplicaId, _Replica] = {}
        self.loads = Loads(fleet, clock.now_s())
        self._timers: dict[str, float] = {}
        """By node: for when its links' next event is scheduled."""
        self.health = Health(fleet.cluster)
        self._failures = Failures(Patience(), clock.now_s)
        """Of loads: as agents do, they wait longer each time."""
        self.serving = Serving(
            fleet, trace, clock, journal, first_request, self._emptied, self._revoked
        )
        clock.stream = self
        for replica in (initial or Placement()).replicas:
            self._put(replica.id, replica.state)
        check_faults(faults, fleet)
        for fault in faults:
            self._plan(fault)

    # --- Backend -----------------------------------------------------------------------

    def observe(self) -> Observed:
        self.serving.tell()
        return Observed(
            now_s=self.clock.now_s(),
            replicas=tuple(self._observed(r) for r in self._replicas.values()),
            waiting=self.serving.waiting(),
            unserved_since_s=self.serving.unserved_since_s(),
            lost_gpus=self.health.lost_gpus,
            busy=frozenset(t.id for t in self._failures.told() if t.retry_in_s > 0),
        )

    def _observed(self, replica: _Replica) -> ObservedReplica:
        key, in_flight, idle_since_s, spare_bytes = replica.id, 0, None, 0
        if replica.phase in SERVING:
            in_flight = self.serving.in_flight(key)
            if replica.phase == "DRAINING":
                spare_bytes = self.serving.spare_bytes(key)
            elif not in_flight:
                idle_since_s = self.serving.idle_since_s(key)
        return ObservedReplica(
            llm=key.llm,
            gpus=key.gpus,
            phase=replica.phase,
            in_flight=in_flight,
            idle_since_s=idle_since_s,
            served_since_s=replica.served_since_s,
            spare_bytes=spare_bytes,
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
            elif after == "DRAINING" and replica:
                self.serving.withdraw(key)
                if not self.serving.in_flight(key):
                    self._emptied(key)

    def watch(self, gpus: frozenset[GpuId]) -> None:
        self.serving.watch(gpus)

    def lose(self, key: ReplicaId) -> None:
        """The replica vanishes. Its requests go back to the head of the queue and start
        anew elsewhere: what was streamed of them is lost."""
        self._lose([self._replicas[key]])

    def _lose(self, replicas: Sequence[_Replica]) -> None:
        for replica in replicas:
            self._move(replica, None, lost=True)
        # Only now, so that none is sent to one that is about to vanish.
        for llm in dict.fromkeys(replica.id.llm for replica in replicas):
            self.serving.serve(llm)

    # --- Stream ------------------------------------------------------------------------

    def run(self, until_s: float) -> float:
        """Let requests come, be worked on and end, up to and including ``until_s``."""
        while True:
            at_s = self.serving.run(min(until_s, self._watch_s))
            if at_s < math.inf or self._watch is None or self._watch_s > until_s:
                return at_s
            self._watch(self._watch_s)
            self._watch_s += self._watch_every_s

    def handle(self) -> None:
        """Do what the engines stopped for."""
        if self.serving.handle():
            self.clock.wake()
            self._hurry()

    # --- requests ----------------------------------------------------------------------

    @property
    def in_system(self) -> int:
        """Requests that have come and not ended."""
        return self.serving.arrived - self.serving.ended

    def stop(self) -> None:
        """End the run: book every request that is still here as unfinished."""
        self.serving.stop()

    # --- replicas ----------------------------------------------------------------------

    def _put(self, key: ReplicaId, phase: Phase) -> _Replica:
        """A new replica in ``phase``: from a load, or in place from the start."""
        option = self.fleet.option_of(key.llm, key.gpus)
        noise = math.exp(self._load_noise * self._rng.standard_normal())
        replica = _Replica(id=key, option=option, phase=phase, noise=noise)
        self._hold(replica, phase_bytes(option, phase))
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
        revoked: bool = False,
        ended: bool = False,
    ) -> None:
        """Change phase: checked against the table and the ledger, written down.
        ``ended``: its load has left the links already."""
        key, before, now_s = replica.id, replica.phase, self.clock.now_s()
        check_move(key, before, after, replica.story)
        self._hold(replica, phase_bytes(replica.option, after))
        replica.story.append((now_s, after))
        if after is None:
            del self._replicas[key]
        else:
            replica.phase = after
        if after in (None, "WARM") and before in SERVING:
            replica.borrowers.clear()
            self.serving.tell()
            self.serving.close(key)
        self._note(replica, after, lost=lost, revoked=revoked)
        if before == "LOADING" and after is None and not ended:
            self.loads.cancel(key, now_s)
        self._couple(key.gpus[0].node)

    def _note(
        self,
        replica: _Replica,
        phase: Phase | None,
        *,
        lost: bool = False,
        revoked: bool = False,
        from_storage: bool = False,
    ) -> None:
        self.serving.tell()
        self.journal.record(
            PhaseChange(
                at_s=self.clock.now_s(),
                llm=replica.id.llm,
                gpus=replica.id.gpus,
                phase=phase,
                lost=lost,
                revoked=revoked,
                from_storage=from_storage,
            )
        )
        if phase not in ("LOADING", "ACTIVATING"):
            # What was asked for and has only begun makes nothing else possible.
            self.clock.wake()

    def _activated(self, replica: _Replica) -> None:
        if self._replicas.get(replica.id) is replica:
            self._move(replica, "ACTIVE")
            self._serve(replica)

    def _serve(self, replica: _Replica) -> None:
        replica.served_since_s = self.clock.now_s()
        replica.factor = self.health.factor(replica.id.gpus[0].node)
        self.serving.open(replica.id, replica.option, replica.factor)
        self._couple(replica.id.gpus[0].node)

    def _emptied(self, key: ReplicaId) -> None:
        """A replica that drains has nothing left."""
        replica = self._replicas[key]
        demote_s = replica.option.demote_s
        if demote_s:
            until_s = self.clock.now_s() + demote_s
            self.clock.schedule(until_s, partial(self._demoted, replica))
        else:
            self._demoted(replica)

    def _demoted(self, replica: _Replica) -> None:
        if self._replicas.get(replica.id) is replica:
            self._move(replica, "WARM")

    # --- memory ------------------------------------------------------------------------

    def _hold(self, replica: _Replica, num_bytes: int) -> None:
        """Have the replica hold so much on each of its GPUs from now on."""
        self._ledger.hold(replica.id.gpus, num_bytes - replica.held_bytes)
        replica.held_bytes = num_bytes

    def _borrow(self, key: ReplicaId) -> None:
        """Let replicas that drain lend what a load of ``key`` lacks."""
        option = self.fleet.option_of(key.llm, key.gpus)
        need = phase_bytes(option, "LOADING")
        for lender in self._replicas.values():
            both = set(lender.id.gpus).intersection(key.gpus)
            if lender.phase != "DRAINING" or not both:
                continue
            missing = need - min(self._ledger.free_bytes[gpu] for gpu in both)
            if missing > 0:
                lent = self.serving.lend(lender.id, missing)
                self._hold(lender, lender.held_bytes - lent)
            # Blocks are lent whole and on all its GPUs: others take what is left over.
            if lender.held_bytes < phase_bytes(lender.option, lender.phase):
                lender.borrowers.append(key)

    def _revoked(self, key: ReplicaId) -> None:
        """The replica needs the memory that it had lent: whoever came last goes, until
        the rest has room."""
        lender = self._replicas[key]
        grown = phase_bytes(lender.option, lender.phase) - lender.held_bytes
        self._ledger.book(key.gpus, grown)
        lender.held_bytes += grown
        while min(self._ledger.free_bytes[gpu] for gpu in key.gpus) < 0:
            borrower = self._replicas.get(lender.borrowers.pop())
            if borrower is not None and borrower.phase in ("LOADING", "WARM"):
                self._move(borrower, None, lost=True, revoked=True)
        lender.borrowers.clear()

    # --- loads, and what they and serving do to each other ------------------------------

    def _load(self, key: ReplicaId) -> None:
        self._borrow(key)
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
            serving = [replica.id.gpus for replica in self._serving(node)]
            next_s = self.loads.settle(node, self.serving.waiting(), serving, now_s)
        self._pace(node)
        if next_s < math.inf and next_s != self._timers.get(node):
            self._timers[node] = next_s
            self.clock.schedule(next_s, partial(self._links, node))

    def _pace(self, node: str) -> None:
        """Set how fast the engines of ``node`` are."""
        beside = 1.0 + self.loads.rules.slowdown_beside_loading
        factor = self.health.factor(node)
        copying = self.loads.by_node[node].links.copying if beside > 1.0 else ()
        for replica in self._serving(node):
            alone = set(replica.id.gpus).isdisjoint(copying)
            wanted = factor if alone else factor * beside
            if wanted != replica.factor:
                replica.factor = wanted
                self.serving.set_speed(replica.id, wanted)

    def _serving(self, node: str) -> Iterator[_Replica]:
        for replica in self._replicas.values():
            if replica.phase in SERVING and replica.id.gpus[0].node == node:
                yield replica

    def _links(self, node: str) -> None:
        """A load of ``node`` may have ended, or its process may be there."""
        now_s = self.clock.now_s()
        if self.loads.by_node[node].links.next_s != now_s:
            return  # plans have changed since
        self._timers.pop(node, None)
        for key in self.loads.advance(node, now_s):
            failed = self.health.load_fails(key)
            replica = self._replicas[key]
            if failed:
                # Not given up: nobody is there who would forgive it.
                self._failures.note(key, "a fault", ever=True)
                again_s = max(
                    t.retry_in_s for t in self._failures.told() if t.id == key
                )
                self.clock.schedule(now_s + again_s, self.clock.wake)
            else:
                self._failures.forget(key)
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
        self.serving.tell()
        self.journal.record(
            Faulted(
                at_s=self.clock.now_s(),
                kind=fault.kind,
                target=fault.target,
                until_s=fault.until_s,
                factor=fault.factor,
                replicas=len(hit),
                requests=sum(self.serving.in_flight(r.id) for r in hit),
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
