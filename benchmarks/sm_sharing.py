"""LLMs that run beside each other on one mesh, each with a share of the SMs.

MuxServe's ADBS as far as it is described: the SMs are ten units of 10 %, of which two may
be shared by two jobs; each LLM has a process for prompts and one for decodes, both of fixed
shares, and launches an iteration at a time. Prompts are tried first, LLMs in turn; if one
could run but for units and none does, decodes are held back. A quota of KV memory per LLM
moves every 8 s by `runtime.turns.rebalance`. Iterations beside each other do not slow each
other down beyond their shares.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from foreserve.models.cost import IterationTime
from foreserve.runtime.turns import rebalance

UNITS, OVERLOAD, TOKENS, QUOTA_EVERY_S = 10, 2, 2048, 8.0


@dataclass(slots=True, eq=False)
class Job:
    """One request of one LLM."""

    llm: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    given: int = 0
    first_s: float = math.nan
    end_s: float = math.nan

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.given


@dataclass(slots=True, eq=False)
class Lane:
    """One LLM of a mesh: its two processes and its requests."""

    prompt_time: IterationTime
    decode_time: IterationTime
    prompt_units: int
    decode_units: int
    kv_gib: float
    """Per token."""
    mean_tokens: float
    """Of a request, prompt and output."""
    batch: int
    """Most requests at a time."""
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    prompts: list[Job] = field(default_factory=list)
    """In the iteration under way; so are ``decodes``."""
    decodes: list[Job] = field(default_factory=list)

    @property
    def held_gib(self) -> float:
        jobs = (*self.running, *self.prompts)
        return self.kv_gib * sum(job.tokens for job in jobs)


class MuxMesh:
    """Serves the LLMs of one mesh."""

    def __init__(self, lanes: Sequence[Lane], kv_gib: float) -> None:
        self.lanes, self.kv_gib = lanes, kv_gib
        self._quotas: dict[int, float] = {}
        self._events: list[tuple[float, int, int, bool]] = []
        """Heap of (end, number, lane, whether prompts) of the iterations under way."""
        self._now_s = 0.0
        self._busy = self._launched = self._turn = 0

    def serve(self, arrivals: Sequence[Job]) -> None:
        """Fill in when each request has its first token and its end; ``Job.llm`` is the
        index of a lane."""
        inflow = Counter(job.llm for job in arrivals)
        flows = {i: inflow[i] * lane.kv_gib for i, lane in enumerate(self.lanes)}
        total = sum(flows.values())
        self._quotas = {i: self.kv_gib * flow / total for i, flow in flows.items()}
        coming, moves_s = deque(arrivals), QUOTA_EVERY_S
        while coming or self._events:
            if coming and (
                not self._events or coming[0].arrival_s <= self._events[0][0]
            ):
                self._now_s = coming[0].arrival_s
                self.lanes[coming[0].llm].waiting.append(coming.popleft())
            else:
                self._end()
            if self._now_s >= moves_s:
                moves_s = (self._now_s // QUOTA_EVERY_S + 1) * QUOTA_EVERY_S
                self._move_quotas()
            self._start()

    def _end(self) -> None:
        self._now_s, _, i, prompts = heapq.heappop(self._events)
        lane = self.lanes[i]
        if prompts:
            batch, lane.prompts = lane.prompts, []
            lane.running += batch
            self._busy -= lane.prompt_units
        else:
            batch, lane.decodes = lane.decodes, []
            self._busy -= lane.decode_units
        for job in batch:
            job.given += 1
            if math.isnan(job.first_s):
                job.first_s = self._now_s
            if job.given == job.output_tokens:
                job.end_s = self._now_s
        lane.running = [job for job in lane.running if math.isnan(job.end_s)]

    def _move_quotas(self) -> None:
        self._quotas = rebalance(
            self._quotas,
            {i: lane.held_gib for i, lane in enumerate(self.lanes)},
            {i for i, lane in enumerate(self.lanes) if lane.waiting},
            least={
                i: lane.kv_gib * lane.mean_tokens for i, lane in enumerate(self.lanes)
            },
        )

    def _start(self) -> None:
        """Launch what may run."""
        self._turn += 1
        held_back = any([self._try_prompts(i) for i in self._in_turn()])
        if held_back and not any(lane.prompts for lane in self.lanes):
            return
        for i in self._in_turn():
            lane = self.lanes[i]
            if lane.running and not lane.decodes and self._units(lane.decode_units):
                self._make_room(lane)
                lane.decodes = list(lane.running)
                context = sum(job.tokens for job in lane.decodes)
                seconds = lane.decode_time.decode_s(len(lane.decodes), context)
                self._launch(i, seconds, prompts=False)

    def _in_turn(self) -> Iterator[int]:
        return ((self._turn + k) % len(self.lanes) for k in range(len(self.lanes)))

    def _units(self, units: int) -> bool:
        return self._busy + units <= UNITS + OVERLOAD

    def _try_prompts(self, i: int) -> bool:
        """Whether they could run but for units."""
        lane, budget = self.lanes[i], TOKENS
        if lane.prompts or not self._admits(i):
            return False
        if not self._units(lane.prompt_units):
            return True
        while self._admits(i):
            if lane.prompts and lane.waiting[0].tokens > budget:
                break
            budget -= lane.waiting[0].tokens
            lane.prompts.append(lane.waiting.popleft())
        sizes = [job.tokens for job in lane.prompts]
        squares = sum(size**2 for size in sizes)
        self._launch(i, lane.prompt_time.prefill_s(sum(sizes), squares), prompts=True)
        return False

    def _admits(self, i: int) -> bool:
        """Whether the next one waiting finds memory, quota and a place."""
        lane = self.lanes[i]
        if not lane.waiting or len(lane.running) + len(lane.prompts) >= lane.batch:
            return False
        own_gib, need_gib = lane.held_gib, (lane.waiting[0].tokens + 1) * lane.kv_gib
        if own_gib and own_gib + need_gib > self._quotas[i]:
            return False
        return sum(each.held_gib for each in self.lanes) + need_gib <= self.kv_gib

    def _make_room(self, lane: Lane) -> None:
        """Out of blocks, the last requests go back to the queue, to be computed again."""
        spare_gib = self.kv_gib - sum(each.held_gib for each in self.lanes)
        while len(lane.running) > 1 and len(lane.running) * lane.kv_gib > spare_gib:
            last = lane.running.pop()
            spare_gib += last.tokens * lane.kv_gib
            lane.waiting.appendleft(last)

    def _launch(self, i: int, seconds: float, *, prompts: bool) -> None:
        lane = self.lanes[i]
        self._launched += 1
        self._busy += lane.prompt_units if prompts else lane.decode_units
        event = (self._now_s + seconds, self._launched, i, prompts)
        heapq.heappush(self._events, event)
