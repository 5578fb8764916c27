"""The compiled core of one engine: who runs in which iteration.

Plain functions over `layout.State`, compiled by numba on first use (and kept on disk for
the next process). The rules are in `engine`; a reference that takes every iteration and
every token in turn is in the tests.

Between events an engine works in stretches: iterations that are alike, whose times have a
closed form (`pace`). Its KV cache is in `blocks`.
"""

from __future__ import annotations

import math

import numpy as np

from foreserve.runtime.simulated.blocks import (
    blocks_of,
    blocks_of_steps,
    found_tokens,
    need_of_step,
    prefix_of,
    register,
    release,
    steps_with,
    take_back,
    unused_blocks,
)
from foreserve.runtime.simulated.layout import FINISHED, NONE, State, compiled
from foreserve.runtime.simulated.pace import (
    iterations_until,
    note_gap,
    note_gaps,
    stretch_s,
)

# --- jobs that decode, by their ends ----------------------------------------------------


@compiled
def _sooner(s: State, a: int, b: int) -> bool:
    x, y = s.jobs[a], s.jobs[b]
    return x.end < y.end or (x.end == y.end and x.joined < y.joined)


@compiled
def _sift(s: State, e: int, slot: int, i: int, count: int) -> None:
    """Put ``slot`` into the hole at ``i`` of the heap of ``e``, or where it belongs."""
    ends, jobs = s.ends[e], s.jobs
    while i > 0 and _sooner(s, slot, ends[(i - 1) // 2]):
        ends[i] = ends[(i - 1) // 2]
        jobs[ends[i]].place = i
        i = (i - 1) // 2
    while True:
        child = 2 * i + 1
        if child >= count:
            break
        if child + 1 < count and _sooner(s, ends[child + 1], ends[child]):
            child += 1
        if not _sooner(s, ends[child], slot):
            break
        ends[i] = ends[child]
        jobs[ends[i]].place = i
        i = child
    ends[i] = slot
    jobs[slot].place = i


# --- running jobs -----------------------------------------------------------------------


@compiled
def _needs_at(s: State, e: int, slot: int) -> int:
    job = s.jobs[slot]
    return (job.begun - job.computed) % s.engines[e].block


@compiled
def _decode(s: State, e: int, slot: int) -> None:
    """Its prompt is done, and blocks for it are booked: a token a step from now on."""
    engine, job = s.engines[e], s.jobs[slot]
    engine.joins += 1
    job.begun, job.joined = engine.step, engine.joins
    job.next, job.previous = NONE, engine.decoding_last
    if engine.decoding_last == NONE:
        engine.decoding_first = slot
    else:
        s.jobs[engine.decoding_last].next = slot
    engine.decoding_last = slot
    engine.context += job.computed + 1
    s.phase[e, _needs_at(s, e, slot)] += 1
    job.end = engine.step + job.output - job.given
    engine.decoding += 1
    _sift(s, e, slot, engine.decoding - 1, engine.decoding)


@compiled
def _leave(s: State, e: int, slot: int) -> None:
    """It decodes no more: its blocks are free."""
    engine, job = s.engines[e], s.jobs[slot]
    if job.previous == NONE:
        engine.decoding_first = job.next
    else:
        s.jobs[job.previous].next = job.next
    if job.next == NONE:
        engine.decoding_last = job.previous
    else:
        s.jobs[job.next].previous = job.previous
    engine.decoding -= 1
    last = s.ends[e, engine.decoding]
    if last != slot:
        _sift(s, e, last, job.place, engine.decoding)
    s.phase[e, _needs_at(s, e, slot)] -= 1
    job.computed += engine.step - job.begun
    engine.context -= job.computed + 1
    release(s, e, slot, False)


@compiled
def _wait_first(s: State, e: int, slot: int) -> None:
    """Put the job at the head of the engine's waiting ones."""
    engine, job = s.engines[e], s.jobs[slot]
    job.next = engine.waiting_first
    engine.waiting_first = slot
    if engine.waiting_last == NONE:
        engine.waiting_last = slot
    engine.waiting += 1


@compiled
def _preempt(s: State, e: int) -> None:
    """The one that joined last gives its blocks back and waits again."""
    engine = s.engines[e]
    lost_from = engine.taken + engine.free
    if engine.prompt != NONE:
        slot = engine.prompt
        engine.prompt = NONE
        release(s, e, slot, False)
    else:
        slot = engine.decoding_last
        s.jobs[slot].given += engine.step - s.jobs[slot].begun
        # Not now: prompts may have been computed since.
        s.jobs[slot].last_s = max(s.jobs[slot].last_s, engine.last_s)
        _leave(s, e, slot)
    job = s.jobs[slot]
    job.cached, job.lost_from, job.computed = job.computed, lost_from, 0
    job.preemptions += 1
    engine.preemptions += 1
    _wait_first(s, e, slot)


@compiled
def _make_room(s: State, e: int) -> None:
    """Preempt until the next step of those that decode has its blocks."""
    engine = s.engines[e]
    while engine.decoding and s.phase[e, engine.step % engine.block] > engine.free:
        if not take_back(s, e):
            _preempt(s, e)


# --- stretches --------------------------------------------------------------------------


@compiled
def _fill(s: State, e: int, before: int) -> None:
    """Plan the chunks of one iteration; nobody joins if there were more preemptions
    than ``before``."""
    engine = s.engines[e]
    # Steps take their blocks when the stretch ends; chunks take theirs here.
    step_blocks = need_of_step(s, e)
    budget = engine.max_tokens - (engine.decoding if engine.mixes else 0)
    engine.resumed = NONE
    if engine.prompt != NONE:
        slot = engine.prompt
        job = s.jobs[slot]
        take = min(job.input + job.given - job.computed, budget)
        need = blocks_of(job.computed + take, engine.block) - blocks_of(
            job.computed, engine.block
        )
        if need > engine.free - step_blocks:
            take_back(s, e)
        if need > engine.free - step_blocks:
            _preempt(s, e)
        else:
            s.chunk_job[e, 0], s.chunk_end[e, 0] = slot, job.computed + take
            engine.chunks = 1
            engine.prompt, engine.resumed = NONE, slot
            engine.free -= need
            engine.taken += need
            budget -= take
    running = engine.decoding + engine.chunks
    while (
        engine.waiting
        and budget > 0
        and running < engine.max_seqs
        and engine.preemptions == before
    ):
        slot = engine.waiting_first
        job = s.jobs[slot]
        known, found = job.input + job.given, found_tokens(s, e, slot)
        take = min(known - found, budget)
        need = blocks_of(found + take, engine.block)
        least = blocks_of(known, engine.block) if engine.whole else need
        held, used = 0, 0
        if engine.unit:
            held = found // (engine.unit * engine.block)
            used = held * engine.unit - unused_blocks(s, e, slot, held)
            need -= used
            least -= used
        if least > engine.free - step_blocks:
            take_back(s, e)
        if least > engine.free - step_blocks:
            break
        engine.waiting_first = job.next
        if engine.waiting_first == NONE:
            engine.waiting_last = NONE
        engine.waiting -= 1
        job.computed = found
        s.chunk_job[e, engine.chunks], s.chunk_end[e, engine.chunks] = (
            slot,
            found + take,
        )
        engine.chunks += 1
        engine.free -= need
        engine.taken += need - (blocks_of(found, engine.block) - used)
        for k in range(held):
            s.prefix_users[e, prefix_of(s, slot, k)] += 1
        job.held = held
        if held and job.preemptions == 0:
            s.found_tokens[engine.llm] += found
        budget -= take
        running += 1


@compiled
def _begin(s: State, e: int, now_s: float) -> None:
    """Plan the next stretch from ``now_s``."""
    engine = s.engines[e]
    engine.start_s = now_s
    before = engine.preemptions
    if engine.mixes:
        _make_room(s, e)
    _fill(s, e, before)
    if engine.chunks == 0 and not engine.mixes:
        _make_room(s, e)
    if engine.chunks or (engine.decoding and engine.preemptions != before):
        # Whoever was preempted may join again in the next iteration.
        engine.count = 1
        engine.steps = 1 if engine.mixes or engine.chunks == 0 else 0
    elif engine.decoding:
        to_end = s.jobs[s.ends[e, 0]].end - engine.step
        engine.count = steps_with(s, e, engine.free, to_end)
        engine.steps = engine.count
    else:
        engine.count = engine.steps = 0
        engine.next_s = np.inf
        return
    engine.next_s = now_s + stretch_s(s, e, engine.count)


@compiled
def _undo(s: State, e: int) -> None:
    """Take back the stretch that was planned and of which nothing has passed."""
    engine = s.engines[e]
    for i in range(engine.chunks - 1, -1, -1):
        slot = s.chunk_job[e, i]
        job = s.jobs[slot]
        more = blocks_of(s.chunk_end[e, i], engine.block) - blocks_of(
            job.computed, engine.block
        )
        engine.free += more
        engine.taken -= more
        if slot == engine.resumed:
            engine.prompt = slot
        else:
            if job.held and job.preemptions == 0:
                s.found_tokens[engine.llm] -= job.computed
            release(s, e, slot, True)
            job.computed = 0
            _wait_first(s, e, slot)
    engine.chunks = 0


@compiled
def rebase(s: State, e: int, now_s: float) -> None:
    """Book the iterations of the stretch that are over at ``now_s``; the rest of the
    stretch is the iteration under way. For whoever changes the engine's speed or memory:
    `place_engine` is up to the caller."""
    engine = s.engines[e]
    if engine.count <= 1:
        return
    over = iterations_until(s, e, now_s) - 1
    if over > 0:
        over_s = stretch_s(s, e, over)
        note_gaps(s, e, over, over_s)
        need = blocks_of_steps(s, e, over)
        engine.free -= need
        engine.taken += need
        engine.context += engine.decoding * over
        engine.step += over
        engine.start_s += over_s
    engine.count = engine.steps = 1
    engine.next_s = engine.start_s + stretch_s(s, e, 1)


@compiled
def lend(s: State, e: int, blocks: int) -> None:
    """Set ``blocks`` aside, on top of those lent before; after `rebase`."""
    engine = s.engines[e]
    engine.free -= blocks
    engine.lent += blocks


@compiled
def used_at(s: State, e: int, now_s: float) -> int:
    """Blocks in use by the end of the iteration under way at ``now_s``."""
    engine = s.engines[e]
    used = engine.blocks - engine.free - engine.lent
    if engine.decoding and engine.steps:
        count = engine.count
        if count > 1:
            count = iterations_until(s, e, now_s)
        used += blocks_of_steps(s, e, count)
    return used


@compiled
def advance(s: State, e: int) -> None:
    """Take the engine to its ``next_s``, end those that end there, plan what follows."""
    engine = s.engines[e]
    now_s, batch = engine.next_s, engine.decoding
    if batch and engine.steps:
        note_gaps(s, e, engine.steps, now_s - engine.start_s)
        need = blocks_of_steps(s, e, engine.steps)
        engine.free -= need
        engine.taken += need
    elif batch:
        engine.paused = True
    engine.step += engine.steps
    engine.context += batch * engine.steps
    while engine.decoding and s.jobs[s.ends[e, 0]].end <= engine.step:
        slot = s.ends[e, 0]
        s.jobs[slot].given = s.jobs[slot].output
        _leave(s, e, slot)
        _finish(s, e, slot, now_s)
    for i in range(engine.chunks):
        slot = s.chunk_job[e, i]
        job = s.jobs[slot]
        job.computed = s.chunk_end[e, i]
        if job.computed < job.input + job.given:
            engine.prompt = slot
            continue
        job.given += 1
        register(s, e, slot)
        if math.isnan(job.first_s):
            job.first_s = now_s
        else:
            note_gap(s, engine.llm, now_s - job.last_s, 1)
        job.last_s = now_s
        if job.given == job.output:
            release(s, e, slot, False)
            _finish(s, e, slot, now_s)
        else:
            _decode(s, e, slot)
    engine.chunks = 0
    _begin(s, e, now_s)


@compiled
def submit(s: State, e: int, slot: int, now_s: float) -> None:
    """Give the engine a job that it can hold. ``now_s`` is not after its ``next_s``."""
    engine, job = s.engines[e], s.jobs[slot]
    engine.in_flight += 1
    if engine.lane != NONE:
        s.lane_load[engine.llm, engine.lane] += 1
    job.next = NONE
    if engine.waiting_last == NONE:
        engine.waiting_first = slot
    else:
        s.jobs[engine.waiting_last].next = slot
    engine.waiting_last = slot
    engine.waiting += 1
    if engine.next_s == np.inf or now_s == engine.start_s:
        _undo(s, e)
        _begin(s, e, now_s)
    elif (
        engine.count > 1
        and engine.waiting == 1
        and engine.decoding + (engine.prompt != NONE) < engine.max_seqs
    ):
        engine.count = engine.steps = iterations_until(s, e, now_s)
        engine.next_s = engine.start_s + stretch_s(s, e, engine.count)


# --- jobs that come and go ---------------------------------------------------------------


@compiled
def new_job(s: State, request: int) -> int:
    """A job for ``request``; one is free."""
    top = s.top[0]
    slot = top.free_job
    job = s.jobs[slot]
    top.free_job = job.next
    job.request, job.llm = request, s.llm[request]
    job.input, job.output = s.input_tokens[request], s.output_tokens[request]
    job.preemptions = 0
    restart(s, slot)
    return slot


@compiled
def restart(s: State, slot: int) -> None:
    """Forget all progress: the KV cache it had is lost."""
    job = s.jobs[slot]
    job.given = job.computed = job.cached = job.held = job.doubles = 0
    job.first_s = job.last_s = np.nan
    job.next = NONE


@compiled
def record(
    s: State,
    request: int,
    result: int,
    where: int,
    first_s: float,
    preemptions: int,
    now_s: float,
) -> None:
    """Write down what came of a request."""
    top = s.top[0]
    s.first_s[request], s.end_s[request] = first_s, now_s
    s.result[request], s.where[request] = result, where
    s.preempted[request] = preemptions
    s.order[top.ended] = request
    top.ended += 1
    if top.ended == len(s.arrival_s):
        top.woken = True


@compiled
def free(s: State, slot: int) -> None:
    """The job is over, or somebody else works on its request now."""
    top = s.top[0]
    s.jobs[slot].next = top.free_job
    top.free_job = slot


@compiled
def end(s: State, slot: int, result: int, where: int, now_s: float) -> None:
    job = s.jobs[slot]
    record(s, job.request, result, where, job.first_s, job.preemptions, now_s)
    free(s, slot)


@compiled
def _finish(s: State, e: int, slot: int, now_s: float) -> None:
    engine = s.engines[e]
    engine.in_flight -= 1
    if engine.lane != NONE:
        s.lane_load[engine.llm, engine.lane] -= 1
    end(s, slot, FINISHED, engine.life, now_s)
