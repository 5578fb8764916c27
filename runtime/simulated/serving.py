"""All that works on requests in the simulated cluster: routing, engines, queues.

A replica that has its GPUs to itself works in a compiled engine (`Engines`), LLMs on shared
GPUs in a group's (`Groups`). Requests are routed as they come; those that no replica can
take wait in one queue per LLM, first come first served, and move when a slot frees or a
replica begins to serve. Nothing polls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from foreserve.models.gaps import gap_bin
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.models.serving import ServingRules
from foreserve.models.specs import GpuId
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.journal import Recorder, RequestEnds, RequestTable, Served
from foreserve.runtime.router import NEVER, choose
from foreserve.runtime.simulated import by_hand, core, flow
from foreserve.runtime.simulated.engine import EngineLimits, Engines
from foreserve.runtime.simulated.groups import Group, Groups, Member
from foreserve.runtime.simulated.layout import FINISHED, NONE, UNFINISHED, Columns
from foreserve.runtime.simulated.shared import SharedJob
from foreserve.traces.trace import Trace


class Serving:
    """Mutable, for one owner: the backend, which moves replicas and passes the time."""

    def __init__(
        self,
        fleet: Fleet,
        trace: Trace,
        clock: VirtualClock,
        journal: Recorder,
        first_request: int,
        emptied: Callable[[ReplicaId], None],
        revoked: Callable[[ReplicaId], None],
    ) -> None:
        """``emptied`` is called for a replica that takes no requests and has none left,
        ``revoked`` for one that has taken back the memory it lent."""
        self.rules, self.clock, self.journal = fleet.serving, clock, journal
        self._emptied, self._revoked = emptied, revoked
        self._llms = {llm.name: index for index, llm in enumerate(fleet.llms)}
        columns, piece = _columns(trace, self._llms, self.rules)
        self._limits = EngineLimits(
            max_num_batched_tokens=self.rules.max_num_batched_tokens,
            max_num_seqs=self.rules.max_num_seqs,
            prefix_tokens=piece,
        )
        self.engines = Engines(len(fleet.llms), columns, clock.now_s())
        slowest = min(gpu.host_link_bytes_per_s for gpu in fleet.cluster.gpu_types)
        self._groups = Groups(self.rules, slowest)
        self._engine: dict[ReplicaId, int] = {}
        self._of_engine: dict[int, tuple[ReplicaId, ReplicaOption]] = {}
        state = self.engines.state
        self._watched: frozenset[GpuId] = frozenset()
        self._left_s: dict[int, float] = {}
        """By LLM: when a replica of it last ceased to take requests."""
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

    # --- what there is -------------------------------------------------------------------

    @property
    def arrived(self) -> int:
        return int(self.engines.top["arrived"])

    @property
    def ended(self) -> int:
        return int(self.engines.top["ended"])

    def waiting(self) -> dict[str, int]:
        """Requests by LLM that nobody has taken; LLMs without any are absent."""
        queue = self.engines.state.queue.tolist()
        return {llm: queue[index] for llm, index in self._llms.items() if queue[index]}

    def unserved_since_s(self) -> dict[str, float]:
        """Of LLMs for which requests wait while no replica takes any: since when."""
        state = self.engines.state
        return {
            llm: max(
                float(state.arrival_s[state.jobs[state.queue_first[index]]["request"]]),
                self._left_s.get(index, -math.inf),
            )
            for llm, index in self._llms.items()
            if state.queue[index] and not self._takers(index)
        }

    def in_flight(self, key: ReplicaId) -> int:
        """Requests that the replica works on; 0 if it does not serve."""
        if key in self._engine:
            return int(self.engines.row(self._engine[key])["in_flight"])
        member = self._groups.member(key)
        return member.in_flight if member else 0

    def idle_since_s(self, key: ReplicaId) -> float:
        """Since when a serving replica has had no request; it has none."""
        if key in self._engine:
            return float(self.engines.row(self._engine[key])["idle_since_s"])
        member = self._groups.member(key)
        return member.idle_since_s if member else math.nan

    # --- replicas ------------------------------------------------------------------------

    def open(self, key: ReplicaId, option: ReplicaOption, speed: float) -> None:
        """The replica serves from now on: alone, or with those that serve on its GPUs."""
        llm = self._llms[key.llm]
        self._lives.append(key)
        life = len(self._lives) - 1
        alone = [other for other in self._engine if other.gpus == key.gpus]
        if alone or self._groups.on(key.gpus):
            for other in alone:
                self._share(other)
            self._join(key, llm, life, option)
            self.set_speed(key, speed)
        else:
            self._engine[key] = e = self.engines.open(
                llm,
                key,
                option.time,
                option.kv_bytes // option.kv_token_bytes,
                self._limits,
                cap=option.concurrency,
                life=life,
                speed=speed,
            )
            self._of_engine[e] = key, option
            self.engines.row(e)["watched"] = not self._watched.isdisjoint(key.gpus)
        self.serve_queue(llm)

    def _share(self, key: ReplicaId) -> None:
        """What served alone goes on in a group, with the KV cache that it has."""
        e = self._engine.pop(key)
        _, option = self._of_engine.pop(e)
        row = self.engines.row(e)
        llm, life, takes = int(row["llm"]), int(row["life"]), row["lane"] != NONE
        jobs = self.engines.take_out(e)
        self.engines.close(e)
        member = self._join(key, llm, life, option)
        member.takes = bool(takes)
        for job in reversed(jobs):
            # Pages hold fewer tokens than blocks do.
            if job.input_tokens + job.output_tokens - 1 <= member.room_tokens:
                self._groups.adopt(member, job, self.clock.now_s())
            else:
                self._put_back(job.request)
        self._schedule(key)

    def _join(
        self, key: ReplicaId, llm: int, life: int, option: ReplicaOption
    ) -> Member:
        now_s, state = self.clock.now_s(), self.engines.state
        member = self._groups.join(key, llm, life, option, now_s)
        group = self._groups.on(key.gpus)
        assert group is not None
        group.engine.gaps = partial(self._note_gaps, group)
        state.foreign[llm] = True
        self._schedule(key)
        return member

    def watch(self, gpus: frozenset[GpuId]) -> None:
        """Have the controller look again when a replica falls idle on one of them."""
        self._watched = gpus
        for key, e in self._engine.items():
            self.engines.row(e)["watched"] = not gpus.isdisjoint(key.gpus)

    def withdraw(self, key: ReplicaId) -> None:
        """The replica takes no more requests."""
        self._left_s[self._llms[key.llm]] = self.clock.now_s()
        if key in self._engine:
            self.engines.withdraw(self._engine[key])
        elif member := self._groups.member(key):
            member.takes = False

    def close(self, key: ReplicaId) -> None:
        """The replica serves no more. What it had goes back to the head of its LLM's queue
        to start anew: what was streamed of it is lost."""
        if self._takes(key):
            self._left_s[self._llms[key.llm]] = self.clock.now_s()
        if key in self._engine:
            e = self._engine.pop(key)
            del self._of_engine[e]
            self.engines.close(e)
        elif member := self._groups.member(key):
            jobs = self._groups.leave(member, self.clock.now_s())
            for request in sorted((job.request for job in jobs), reverse=True):
                self._put_back(request)
            there = any(True for _ in self._groups.members(member.llm))
            self.engines.state.foreign[member.llm] = there
            self._schedule(key)

    def _takes(self, key: ReplicaId) -> bool:
        if key in self._engine:
            return bool(self.engines.row(self._engine[key])["lane"] != NONE)
        member = self._groups.member(key)
        return member is not None and member.takes

    def set_speed(self, key: ReplicaId, factor: float) -> None:
        """From its next iteration on, iterations take ``factor`` times the cost model's;
        for all of a group, if it is in one."""
        if key in self._engine:
            self.engines.set_speed(self._engine[key], factor)
        elif group := self._groups.on(key.gpus):
            group.engine.set_speed(factor, self.clock.now_s())
            self._schedule(key)

    # --- lending -------------------------------------------------------------------------

    def spare_bytes(self, key: ReplicaId) -> int:
        """KV memory on each of its GPUs that the replica lends, or could lend now."""
        if not self.rules.lending or key not in self._engine:
            return 0
        e = self._engine[key]
        blocks = self.engines.spare_blocks(e, self._of_engine[e][1].concurrency)
        return blocks * self._block_bytes(e)

    def lend(self, key: ReplicaId, num_bytes: int) -> int:
        """Have the replica do without at least ``num_bytes`` more on each of its GPUs; how
        many. Not more than `spare_bytes` allows."""
        e = self._engine[key]
        block_bytes = self._block_bytes(e)
        blocks = -(-num_bytes // block_bytes)
        return self.engines.lend(e, blocks) * block_bytes

    def _block_bytes(self, e: int) -> int:
        return self._of_engine[e][1].kv_token_bytes * self._limits.block_tokens

    # --- time ----------------------------------------------------------------------------

    def run(self, until_s: float) -> float:
        """Let requests come, be worked on by compiled engines and end, up to and including
        ``until_s``; a `Stream`'s."""
        if self.engines.run(until_s):
            return float(self.engines.top["now_s"])
        return math.inf

    def handle(self) -> bool:
        """Do what they stopped for; whether the controller should look."""
        top = self.engines.top
        if top["foreign"] != NONE:
            request = int(top["foreign"])
            top["foreign"] = NONE
            self._arrive(request)
        if top["emptied"] != NONE:
            e = int(top["emptied"])
            top["emptied"] = NONE
            self._emptied(self._of_engine[e][0])
        if top["revoked"]:
            top["revoked"] = False
            for e in list(self._of_engine):
                if self.engines.row(e)["revoked"]:
                    self.engines.row(e)["revoked"] = False
                    self._revoked(self._of_engine[e][0])
        woken = bool(top["woken"])
        top["woken"] = False
        return woken

    def _schedule(self, key: ReplicaId) -> None:
        """Have the group of these GPUs go on when its next event is due."""
        group = self._groups.on(key.gpus)
        if group is None:
            return
        next_s = group.engine.next_s
        if next_s < math.inf and next_s != group.scheduled_s:
            group.scheduled_s = next_s
            self.clock.schedule(next_s, partial(self._advance, key, group))

    def _advance(self, key: ReplicaId, group: Group) -> None:
        now_s = self.clock.now_s()
        if self._groups.on(key.gpus) is not group or group.engine.next_s != now_s:
            return  # plans have changed since
        ended = group.engine.advance()
        group.scheduled_s = math.nan
        for job in ended:
            member = group.members[job.service]
            member.in_flight -= 1
            self._record(job, FINISHED, member.life)
        self._schedule(key)
        for member in {
            job.service: group.members[job.service] for job in ended
        }.values():
            if member.takes:
                self.serve_queue(member.llm)
            if not member.in_flight:
                member.idle_since_s = now_s
                if not member.takes:
                    self._emptied(member.id)
                elif not self._watched.isdisjoint(key.gpus):
                    self.clock.wake()
        if self.engines.top["woken"]:
            self.engines.top["woken"] = False
            self.clock.wake()

    def _record(self, job: SharedJob, result: int, life: int) -> None:
        first_s = math.nan if job.first_token_s is None else job.first_token_s
        core.record(
            self.engines.state,
            job.request,
            result,
            life,
            first_s,
            job.preemptions,
            self.clock.now_s(),
        )

    def _note_gaps(self, group: Group, service: int, gap_s: float, count: int) -> None:
        state, llm = self.engines.state, group.members[service].llm
        state.gaps_s[llm] += count * gap_s
        state.gaps[llm, gap_bin(gap_s)] += count

    # --- requests ------------------------------------------------------------------------

    def _arrive(self, request: int) -> None:
        engines = self.engines
        slot = engines.new_job(request)
        llm = int(engines.state.jobs[slot]["llm"])
        if engines.state.queue[llm] or not self._send(llm, slot):
            flow.enqueue(engines.state, slot, False)
            waiting = int(engines.state.queue[llm])
            if waiting & (waiting - 1) == 0:
                self.clock.wake()

    def _put_back(self, request: int) -> None:
        """At the head of its LLM's queue, to start anew."""
        flow.enqueue(self.engines.state, self.engines.new_job(request), True)

    def serve(self, llm: str) -> None:
        """Send what waits for the LLM to replicas that take it."""
        self.serve_queue(self._llms[llm])

    def serve_queue(self, llm: int) -> None:
        """Send what waits for the LLM to replicas that take it."""
        if not self.engines.state.foreign[llm]:
            self.engines.serve_queue(llm)
            return
        while (head := by_hand.head(self.engines.state, llm)) is not None:
            if not self._send(llm, head[0]):
                return
            flow.pop(self.engines.state, llm, head[1])

    def _send(self, llm: int, slot: int) -> bool:
        """Give the job to a replica, or fail it if none could ever hold it."""
        engines, now_s = self.engines, self.clock.now_s()
        takers = self._takers(llm)
        if not takers:
            return False
        job = engines.state.jobs[slot]
        given, asked = int(job["input"]), int(job["output"])
        found = choose(
            [in_flight for _, in_flight, _, _, _ in takers],
            [cap for _, _, cap, _, _ in takers],
            [room for _, _, _, room, _ in takers],
            given + asked - 1,
        )
        if found == NEVER:
            by_hand.fail(engines.state, slot)
            return True
        if found == NONE:
            return False
        key, *_, where = takers[found]
        if isinstance(where, int):
            by_hand.submit(engines.state, where, slot)
            return True
        request = int(job["request"])
        core.free(engines.state, slot)
        where.in_flight += 1
        group = self._groups.on(key.gpus)
        assert group is not None
        group.engine.submit(
            SharedJob(
                request=request,
                service=where.service,
                arrival_s=float(engines.state.arrival_s[request]),
                input_tokens=given,
                output_tokens=asked,
            ),
            now_s,
        )
        self._schedule(key)
        return True

    def _takers(self, llm: int) -> list[tuple[ReplicaId, int, int, int, int | Member]]:
        """Who takes requests for the LLM: (id, in flight, cap, tokens it can hold, engine
        or member), by id."""
        found: list[tuple[ReplicaId, int, int, int, int | Member]] = []
        for e in by_hand.lane(self.engines.state, llm):
            row, (key, option) = self.engines.row(e), self._of_engine[e]
            room = int(row["blocks"] * row["block"])
            found.append((key, int(row["in_flight"]), option.concurrency, room, e))
        for member in self._groups.members(llm):
            if not member.takes:
                continue
            cap, room = member.option.concurrency, member.room_tokens
            found.append((member.id, member.in_flight, cap, room, member))
        return sorted(found, key=lambda taker: taker[0])

    # --- the journal ---------------------------------------------------------------------

    def tell(self) -> None:
        """Write down the requests that have ended since the last time."""
        if (ended := self.ended) > self._told:
            rows = self.engines.state.order[self._told : ended]
            self._told = ended
            self.journal.record(RequestEnds(table=self._table, rows=rows))

    def stop(self) -> None:
        """End the run: book every request that is still here as unfinished, and write
        down what is known beside single requests."""
        now_s, state = self.clock.now_s(), self.engines.state
        self.engines.give_up(now_s)
        for group in self._groups:
            for job in group.engine.jobs():
                self._record(job, UNFINISHED, group.members[job.service].life)
        self.tell()
        count = len(self._llms)
        preempted = np.bincount(state.llm, state.preempted, count)
        for llm, index in self._llms.items():
            found = np.flatnonzero(state.gaps[index]).tolist()
            served = Served(
                at_s=now_s,
                llm=llm,
                gaps=tuple((k, int(state.gaps[index, k])) for k in found),
                gaps_s=float(state.gaps_s[index]),
                preemptions=int(preempted[index]),
                found_tokens=int(state.found_tokens[index]),
            )
            if served.gaps or served.preemptions or served.found_tokens:
                self.journal.record(served)


def _columns(
    trace: Trace, llms: dict[str, int], rules: ServingRules
) -> tuple[Columns, int]:
    """The trace as the engines take it, and how long the pieces of prompts are that they
    compare; 0 where they do not."""
    own = np.array([llms.get(name, NONE) for name in trace.llms], np.int32)
    columns = Columns(
        trace.arrival_s, own[trace.llm], trace.input_tokens, trace.output_tokens
    )
    prefixes = trace.prefixes if rules.prefix_caching else None
    if prefixes is None or prefixes.block_tokens % EngineLimits().block_tokens:
        return columns, 0
    prefixes = prefixes.dense()
    columns = columns._replace(prefix_starts=prefixes.starts, prefix_ids=prefixes.ids)
    return columns, prefixes.block_tokens
