"""The simulated cluster: replicas, links, queues and engines on a virtual clock.

Requests are routed as they come; those that no replica can take wait in one queue per
LLM, first come first served, and move when a slot frees or a replica becomes ACTIVE.
Nothing polls. The ledger is checked at every change, so over-commitment raises.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.journal import PhaseChange, Recorder, RequestEnd
from foreserve.runtime.ledger import Ledger, phase_bytes
from foreserve.runtime.router import choose
from foreserve.runtime.simulated.engine import Engine, Job
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
    engine: Engine | None = None
    in_flight: int = 0
    idle_since_s: float | None = None
    on_link: bool = False
    scheduled_s: float = math.nan
    """When the engine's latest event is due."""


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
        on_arrival: Callable[[float], None] | None = None,
    ) -> None:
        """All requests of ``trace`` will come; the first is number ``first_request``.

        A load takes ``option.load_s * exp(load_noise * N)`` with standard normal N.
        ``on_arrival`` is told the time of each arrival.
        """
        unknown = {trace.llms[i] for i in np.unique(trace.llm)} - {*fleet.llm_by_name}
        if unknown:
            raise InvalidInput(f"trace: the fleet does not serve {min(unknown)!r}")
        self.fleet, self.clock, self.journal = fleet, clock, journal
        self.arrived = self.ended = 0
        self._rng, self._load_noise = rng, load_noise
        self._on_arrival = on_arrival
        self._ledger = Ledger(fleet)
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._caps: dict[ReplicaId, int] = {}
        self._of_llm: dict[str, list[_Replica]] = {n: [] for n in fleet.llm_by_name}
        self._queues: dict[str, deque[Job]] = {n: deque() for n in fleet.llm_by_name}
        self._loads: list[_Replica] = []
        self._busy_links: set[GpuId] = set()
        self._left = len(trace)
        self._arrivals = _jobs(trace, first_request)
        for replica in (initial or Placement()).replicas:
            self._put(replica.id, replica.state)
        self._await_arrival()

    # --- Backend -----------------------------------------------------------------------

    def observe(self) -> Observed:
        return Observed(
            now_s=self.clock.now_s(),
            replicas=tuple(
                ObservedReplica(
                    llm=replica.id.llm,
                    gpus=replica.id.gpus,
                    phase=replica.phase,
                    in_flight=replica.in_flight,
                    idle_since_s=replica.idle_since_s,
                )
                for replica in self._replicas.values()
            ),
            waiting={llm: len(queue) for llm, queue in self._queues.items() if queue},
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
            elif after == "DRAINING" and replica and not replica.in_flight:
                self._move(replica, "WARM")

    def lose(self, key: ReplicaId) -> None:
        """The replica vanishes. Its requests go back to the head of the queue and start
        anew elsewhere: what was streamed of them is lost."""
        replica = self._replicas[key]
        jobs = list(replica.engine.jobs()) if replica.engine else []
        for job in sorted(jobs, key=lambda job: job.request, reverse=True):
            job.restart()
            self._queues[key.llm].appendleft(job)
        self._move(replica, None, lost=True)
        self._drain_queue(key.llm)

    # --- requests ----------------------------------------------------------------------

    @property
    def in_system(self) -> int:
        """Requests that have come and not ended."""
        return self.arrived - self.ended

    def stop(self) -> None:
        """End the run: book every request that is still here as unfinished."""
        for queue in self._queues.values():
            for job in queue:
                self._end(job, "unfinished", None)
        for replica in self._replicas.values():
            for job in replica.engine.jobs() if replica.engine else ():
                self._end(job, "unfinished", replica.id)

    def _await_arrival(self) -> None:
        job = next(self._arrivals, None)
        if job is not None:
            self.clock.schedule(job.arrival_s, partial(self._arrive, job))

    def _arrive(self, job: Job) -> None:
        self._await_arrival()
        self.arrived += 1
        self._left -= 1
        queue = self._queues[job.llm]
        if queue or not self._send(job):
            queue.append(job)
            # A long queue wakes the controller each time it has doubled.
            if len(queue) & (len(queue) - 1) == 0:
                self.clock.wake()
        if self._on_arrival:
            self._on_arrival(job.arrival_s)

    def _send(self, job: Job) -> bool:
        """Give ``job`` to a replica, or fail it if none could ever hold it."""
        active = [r for r in self._of_llm[job.llm] if r.phase == "ACTIVE"]
        able = [r for r in active if r.engine and r.engine.can_hold(job)]
        if active and not able:
            reason = (
                f"{job.kv_tokens} tokens exceed the KV cache of every ACTIVE replica"
            )
            self._end(job, "failed", None, reason)
            return True
        key = choose(able, self._caps)
        if key is None:
            return False
        replica = self._replicas[key]
        assert replica.engine is not None
        replica.in_flight += 1
        replica.idle_since_s = None
        replica.engine.submit(job, self.clock.now_s())
        self._schedule(replica, replica.engine)
        return True

    def _drain_queue(self, llm: str) -> None:
        queue = self._queues[llm]
        while queue and self._send(queue[0]):
            queue.popleft()

    def _schedule(self, replica: _Replica, engine: Engine) -> None:
        if engine.next_s < math.inf and engine.next_s != replica.scheduled_s:
            replica.scheduled_s = engine.next_s
            self.clock.schedule(engine.next_s, partial(self._advance, replica, engine))

    def _advance(self, replica: _Replica, engine: Engine) -> None:
        now_s = self.clock.now_s()
        if replica.engine is not engine or engine.next_s != now_s:
            return  # the replica is lost, or its plans have changed since
        ended = engine.advance()
        replica.scheduled_s = math.nan
        for job in ended:
            replica.in_flight -= 1
            self._end(job, "finished", replica.id)
        if ended and replica.phase == "ACTIVE":
            self._drain_queue(replica.id.llm)
        self._schedule(replica, engine)
        if not replica.in_flight:
            if replica.phase == "DRAINING":
                self._move(replica, "WARM")
            else:
                replica.idle_since_s = now_s

    def _end(
        self,
        job: Job,
        result: Literal["finished", "failed", "unfinished"],
        where: ReplicaId | None,
        reason: str | None = None,
    ) -> None:
        self.ended += 1
        self.journal.record(
            RequestEnd(
                at_s=self.clock.now_s(),
                request=job.request,
                llm=job.llm,
                arrival_s=job.arrival_s,
                input_tokens=job.input_tokens,
                output_tokens=job.output_tokens,
                result=result,
                first_token_s=job.first_token_s,
                gpus=where.gpus if where else None,
                reason=reason,
            )
        )
        if not self._left and not self.in_system:
            self.clock.wake()

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
        self._caps[key] = option.concurrency
        self._of_llm[key.llm].append(replica)
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
            self._of_llm[key.llm].remove(replica)
        else:
            replica.phase = after
        if after in (None, "WARM"):
            replica.engine = replica.idle_since_s = None
        elif after == "DRAINING":
            replica.idle_since_s = None
        self._note(replica, after, lost)
        if before == "LOADING":
            self._leave_link(replica)

    def _note(self, replica: _Replica, phase: Phase | None, lost: bool = False) -> None:
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
        kv_tokens = option.kv_bytes // option.kv_token_bytes
        replica.engine = Engine(option.time, kv_tokens)
        replica.idle_since_s = self.clock.now_s()
        self._drain_queue(replica.id.llm)

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


def _jobs(trace: Trace, first_request: int) -> Iterator[Job]:
    """The requests one by one, so that the clock holds only the next arrival."""
    columns = (trace.arrival_s, trace.llm, trace.input_tokens, trace.output_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for request, (arrival_s, llm, input_tokens, output_tokens) in enumerate(
        rows, first_request
    ):
        yield Job(
            request=request,
            llm=trace.llms[llm],
            arrival_s=arrival_s,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
