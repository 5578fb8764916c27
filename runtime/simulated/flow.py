"""The compiled flow of requests: arrivals, routing, queues, and time itself.

Whatever happens once per request is here or in `core`; what happens once per decision
(phases, loads, faults) is the backend's, which calls `run` from one such event to the next.
All engines wait in one heap by the end of their stretch.
"""

from __future__ import annotations

import numpy as np

from foreserve.runtime.router import NEVER, choose
from foreserve.runtime.simulated.core import advance, end, new_job, submit
from foreserve.runtime.simulated.layout import FAILED, NONE, State, compiled

_choose = compiled(choose)


# --- the heap of engines --------------------------------------------------------------


@compiled
def _before(s: State, a: int, b: int) -> bool:
    a_s, b_s = s.engines[a].next_s, s.engines[b].next_s
    return a_s < b_s or (a_s == b_s and a < b)


@compiled
def place_engine(s: State, e: int) -> None:
    """Put ``e`` where its ``next_s`` belongs."""
    heap, place = s.heap, s.place
    i = place[e]
    while i > 0 and _before(s, e, heap[(i - 1) // 2]):
        heap[i] = heap[(i - 1) // 2]
        place[heap[i]] = i
        i = (i - 1) // 2
    count = s.top[0].engines
    while True:
        child = 2 * i + 1
        if child >= count:
            break
        if child + 1 < count and _before(s, heap[child + 1], heap[child]):
            child += 1
        if not _before(s, heap[child], e):
            break
        heap[i] = heap[child]
        place[heap[i]] = i
        i = child
    heap[i] = e
    place[e] = i


@compiled
def add_engine(s: State, e: int) -> None:
    top = s.top[0]
    s.heap[top.engines] = e
    s.place[e] = top.engines
    top.engines += 1
    place_engine(s, e)


@compiled
def remove_engine(s: State, e: int) -> None:
    top = s.top[0]
    top.engines -= 1
    last = s.heap[top.engines]
    if last != e:
        s.heap[s.place[e]] = last
        s.place[last] = s.place[e]
        place_engine(s, last)
    s.place[e] = NONE


# --- requests ---------------------------------------------------------------------------


@compiled
def _send(s: State, slot: int, now_s: float) -> bool:
    """Give the job to an engine, or fail it if none could ever hold it."""
    job = s.jobs[slot]
    llm = job.llm
    n = s.lanes[llm]
    if n == 0:
        return False
    # Its last token never gets into the KV cache.
    tokens = job.input + job.output - 1
    lane = _choose(
        s.lane_load[llm, :n], s.lane_cap[llm, :n], s.lane_room[llm, :n], tokens
    )
    if lane == NEVER and not s.foreign[llm]:
        end(s, slot, FAILED, NONE, now_s)
        return True
    if lane < 0:
        return False
    e = s.lane_engine[llm, lane]
    submit(s, e, slot, now_s)
    place_engine(s, e)
    return True


@compiled
def pop(s: State, llm: int, following: int) -> None:
    """The head of the queue has left it; ``following`` came after it."""
    s.queue_first[llm] = following
    if following == NONE:
        s.queue_last[llm] = NONE
    s.queue[llm] -= 1


@compiled
def drain_queue(s: State, llm: int, now_s: float) -> None:
    """Send what waits for ``llm``, first come first served, as long as someone takes it."""
    while s.queue[llm]:
        slot = s.queue_first[llm]
        following = s.jobs[slot].next
        if not _send(s, slot, now_s):
            return
        pop(s, llm, following)


@compiled
def enqueue(s: State, slot: int, first: bool) -> None:
    """Put the job at the head or the tail of its LLM's queue."""
    job = s.jobs[slot]
    llm = job.llm
    if first:
        job.next = s.queue_first[llm]
        s.queue_first[llm] = slot
        if s.queue_last[llm] == NONE:
            s.queue_last[llm] = slot
    else:
        job.next = NONE
        if s.queue_last[llm] == NONE:
            s.queue_first[llm] = slot
        else:
            s.jobs[s.queue_last[llm]].next = slot
        s.queue_last[llm] = slot
    s.queue[llm] += 1


@compiled
def _arrive(s: State, request: int, now_s: float) -> None:
    slot = new_job(s, request)
    llm = s.jobs[slot].llm
    if s.queue[llm] or not _send(s, slot, now_s):
        enqueue(s, slot, False)
        # A long queue wakes the controller each time it has doubled.
        if s.queue[llm] & (s.queue[llm] - 1) == 0:
            s.top[0].woken = True


# --- time -------------------------------------------------------------------------------


@compiled
def run(s: State, until_s: float) -> None:
    """Let everything happen up to and including ``until_s``; stop after an event at which
    the owner has something to do, and clear `TOP`'s reasons before the next call."""
    top = s.top[0]
    coming = len(s.arrival_s)
    while True:
        e = s.heap[0] if top.engines else NONE
        engine_s = s.engines[e].next_s if e != NONE else np.inf
        i = top.arrived
        arrival_s = s.arrival_s[i] if i < coming else np.inf
        now_s = min(engine_s, arrival_s)
        if now_s > until_s or now_s == np.inf:
            if until_s < np.inf:
                top.now_s = until_s
            return
        if arrival_s < engine_s:
            if top.free_job == NONE:
                top.full = True
                return
            top.now_s = now_s
            top.arrived += 1
            if s.foreign[s.llm[i]]:
                top.foreign = i
                return
            _arrive(s, i, now_s)
        else:
            top.now_s = now_s
            before = top.ended
            advance(s, e)
            place_engine(s, e)
            engine = s.engines[e]
            if top.ended > before:
                if engine.lane != NONE:
                    drain_queue(s, engine.llm, now_s)
                elif engine.in_flight & (engine.in_flight - 1) == 0:
                    # Half as many drain: it can lend more.
                    top.woken = True
            if engine.in_flight == 0:
                if engine.lane == NONE:
                    top.emptied = e
                else:
                    engine.idle_since_s = now_s
                    if engine.watched:
                        top.woken = True
        if top.woken or top.revoked or top.emptied != NONE:
            return
