"""The compiled core of one engine: iterations, blocks, preemption, stretches.

Plain functions over `layout.State`, compiled by numba on first use (and kept on disk for
the next process). The rules are in `engine`; a reference that takes every iteration and
every token in turn is in the tests.

Between events an engine works in stretches: iterations that are alike, whose times have a
closed form.
"""

from __future__ import annotations

import math

import numpy as np

from foreserve.models.gaps import gap_bin, gap_edge_s
from foreserve.runtime.simulated.layout import FINISHED, NONE, State, compiled

_gap_bin = compiled(gap_bin)
_gap_edge_s = compiled(gap_edge_s)


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


# --- blocks -----------------------------------------------------------------------------


@compiled
def _blocks(tokens: int, block: int) -> int:
    return (tokens + block - 1) // block


@compiled
def _need_of_step(s: State, e: int) -> int:
    """Blocks that the next step takes, if prompts leave it its place."""
    engine = s.engines[e]
    if not engine.mixes:
        return 0
    return s.phase[e, engine.step % engine.block]


@compiled
def _blocks_of_steps(s: State, e: int, count: int) -> int:
    """Blocks that the next ``count`` steps take."""
    engine = s.engines[e]
    block = engine.block
    found = (count // block) * engine.decoding
    at = engine.step % block
    for _ in range(count % block):
        found += s.phase[e, at]
        at = at + 1 if at + 1 < block else 0
    return found


@compiled
def _steps_with(s: State, e: int, blocks: int, most: int) -> int:
    """Most steps, up to ``most``, that take no more than ``blocks``; some job decodes."""
    engine = s.engines[e]
    rounds = blocks // engine.decoding
    steps = rounds * engine.block
    if steps >= most:
        return most
    left = blocks - rounds * engine.decoding
    at = engine.step % engine.block
    while steps < most and s.phase[e, at] <= left:
        left -= s.phase[e, at]
        steps += 1
        at = at + 1 if at + 1 < engine.block else 0
    return steps


@compiled
def _found(s: State, e: int, slot: int) -> int:
    """Tokens of a waiting job that are still in its old blocks."""
    engine, job = s.engines[e], s.jobs[slot]
    if engine.unit:
        return _prefixes_there(s, e, slot) * engine.unit * engine.block
    if not engine.caches or job.cached == 0:
        return 0
    # This iteration's steps take theirs first.
    lost = max(0, engine.taken + _need_of_step(s, e) - job.lost_from)
    kept = _blocks(job.cached, engine.block) - lost
    full = job.cached // engine.block
    return max(0, min(full, kept)) * engine.block


@compiled
def _take_back(s: State, e: int) -> bool:
    """Blocks are missed: those that were lent are free again. False if there are none."""
    engine = s.engines[e]
    if engine.lent == 0:
        return False
    engine.free += engine.lent
    engine.lent = 0
    engine.revoked = True
    s.top[0].revoked = True
    return True


# --- prefixes that requests share ---------------------------------------------------------


@compiled
def _prefix(s: State, slot: int, k: int) -> int:
    return s.prefix_ids[s.prefix_starts[s.jobs[slot].request] + k]


@compiled
def _prefixes(s: State, e: int, slot: int) -> int:
    """How many of its prefixes the job's prompt has in full."""
    engine, job = s.engines[e], s.jobs[slot]
    if engine.unit == 0:
        return 0
    listed = s.prefix_starts[job.request + 1] - s.prefix_starts[job.request]
    return min(listed, job.input // (engine.unit * engine.block))


@compiled
def _prefixes_there(s: State, e: int, slot: int) -> int:
    """How many of its prefixes a waiting job finds; its last token is always computed."""
    engine, job = s.engines[e], s.jobs[slot]
    taken = engine.taken + _need_of_step(s, e)
    most = (job.input + job.given - 1) // (engine.unit * engine.block)
    most = min(most, _prefixes(s, e, slot))
    for k in range(most):
        prefix = _prefix(s, slot, k)
        if s.prefix_users[e, prefix] == 0 and s.prefix_lost[e, prefix] < taken:
            return k
    return most


@compiled
def _unused_blocks(s: State, e: int, slot: int, count: int) -> int:
    """Blocks of the job's first ``count`` prefixes that are free, though not forgotten."""
    found = 0
    for k in range(count):
        if s.prefix_users[e, _prefix(s, slot, k)] == 0:
            found += s.engines[e].unit
    return found


@compiled
def _register(s: State, e: int, slot: int) -> None:
    """The job's prompt is computed: others may use its prefixes from now on."""
    job = s.jobs[slot]
    for k in range(job.held, _prefixes(s, e, slot)):
        prefix = _prefix(s, slot, k)
        job.doubles += s.prefix_users[e, prefix] > 0
        s.prefix_users[e, prefix] += 1
        job.held += 1


@compiled
def _own_blocks(s: State, e: int, slot: int) -> int:
    """Blocks that the job shares with nobody, whether others may use them or not."""
    engine, job = s.engines[e], s.jobs[slot]
    shared = (job.held - job.doubles) * engine.unit
    return _blocks(job.computed, engine.block) - shared


@compiled
def _release(s: State, e: int, slot: int, forget: bool) -> None:
    """Free the job's blocks, the last ones first; ``forget``: as if it had never used the
    prefixes it found."""
    engine, job = s.engines[e], s.jobs[slot]
    engine.free += _own_blocks(s, e, slot)
    for k in range(job.held - 1, -1, -1):
        prefix = _prefix(s, slot, k)
        s.prefix_users[e, prefix] -= 1
        if s.prefix_users[e, prefix] == 0:
            if not forget:
                s.prefix_lost[e, prefix] = engine.taken + engine.free
            engine.free += engine.unit
    job.held = job.doubles = 0


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
    _release(s, e, slot, False)


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
def _preempt(s: State, e: int, now_s: float) -> None:
    """The one that joined last gives its blocks back and waits again."""
    engine = s.engines[e]
    lost_from = engine.taken + engine.free
    if engine.prompt != NONE:
        slot = engine.prompt
        engine.prompt = NONE
        _release(s, e, slot, False)
    else:
        slot = engine.decoding_last
        s.jobs[slot].given += engine.step - s.jobs[slot].begun
        s.jobs[slot].last_s = now_s
        _leave(s, e, slot)
    job = s.jobs[slot]
    job.cached, job.lost_from, job.computed = job.computed, lost_from, 0
    job.preemptions += 1
    engine.preemptions += 1
    _wait_first(s, e, slot)


@compiled
def _make_room(s: State, e: int, now_s: float) -> None:
    """Preempt until the next step of those that decode has its blocks."""
    engine = s.engines[e]
    while engine.decoding and s.phase[e, engine.step % engine.block] > engine.free:
        if not _take_back(s, e):
            _preempt(s, e, now_s)


# --- stretches --------------------------------------------------------------------------


@compiled
def _decode_s(s: State, e: int, batch: float, context: float) -> float:
    """`IterationTime.decode_s`."""
    engine = s.engines[e]
    touched = 0.0
    if engine.expert_share:
        touched = 1.0 - (1.0 - engine.expert_share) ** batch
    return (
        engine.decode_base_s
        + engine.decode_s_per_seq * batch
        + engine.decode_s_per_context_token * context
        + engine.decode_experts_s * touched
    )


@compiled
def _stretch_s(s: State, e: int, count: int) -> float:
    """Seconds of the first ``count`` iterations of the stretch.

    Decoding ``b`` sequences adds ``b`` tokens of context per step, so ``count`` steps
    from ``c`` tokens see ``count * c + b * count * (count - 1) / 2`` in all.
    """
    engine = s.engines[e]
    seconds = 0.0
    steps = engine.steps > 0 and engine.decoding > 0
    if steps:
        batch = engine.decoding
        context = count * engine.context + batch * (count * (count - 1) // 2)
        seconds = count * _decode_s(s, e, float(batch), 0.0)
        seconds += engine.decode_s_per_context_token * context
    if engine.chunks:
        # Attention of the tokens from p to q of a prompt: q^2 - p^2 of its square.
        tokens, tokens2 = 0, 0
        for i in range(engine.chunks):
            begin = s.jobs[s.chunk_job[e, i]].computed
            end = s.chunk_end[e, i]
            tokens += end - begin
            tokens2 += end * end - begin * begin
        more_s = (
            engine.prefill_s_per_token * tokens + engine.prefill_s_per_token2 * tokens2
        )
        if not steps:
            # Beside decodes the weights are read anyway.
            more_s = max(engine.prefill_base_s + more_s, engine.prefill_floor_s)
        seconds += more_s
    return seconds


@compiled
def _iterations_until(s: State, e: int, now_s: float) -> int:
    """Iterations of the stretch (decoding only) until the first end at or after
    ``now_s``: the root of the quadratic in `_stretch_s`, rounded up."""
    engine = s.engines[e]
    square = engine.decode_s_per_context_token * engine.decoding / 2
    linear = _decode_s(s, e, float(engine.decoding), float(engine.context)) - square
    passed_s = now_s - engine.start_s
    root = linear + math.sqrt(linear**2 + 4 * square * passed_s)
    count = min(engine.count, math.ceil(2 * passed_s / root))
    # Rounding may be off by one either way; the ends themselves decide.
    while count > 1 and engine.start_s + _stretch_s(s, e, count - 1) >= now_s:
        count -= 1
    while engine.start_s + _stretch_s(s, e, count) < now_s:
        count += 1
    return count


@compiled
def _fill(s: State, e: int, before: int, now_s: float) -> None:
    """Plan the chunks of one iteration; nobody joins if there were more preemptions
    than ``before``."""
    engine = s.engines[e]
    # Steps take their blocks when the stretch ends; chunks take theirs here.
    need_of_step = _need_of_step(s, e)
    budget = engine.max_tokens - (engine.decoding if engine.mixes else 0)
    engine.resumed = NONE
    if engine.prompt != NONE:
        slot = engine.prompt
        job = s.jobs[slot]
        take = min(job.input + job.given - job.computed, budget)
        need = _blocks(job.computed + take, engine.block) - _blocks(
            job.computed, engine.block
        )
        if need > engine.free - need_of_step:
            _take_back(s, e)
        if need > engine.free - need_of_step:
            _preempt(s, e, now_s)
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
        known, found = job.input + job.given, _found(s, e, slot)
        take = min(known - found, budget)
        need = _blocks(found + take, engine.block)
        least = _blocks(known, engine.block) if engine.whole else need
        held, used = 0, 0
        if engine.unit:
            held = found // (engine.unit * engine.block)
            used = held * engine.unit - _unused_blocks(s, e, slot, held)
            need -= used
            least -= used
        if least > engine.free - need_of_step:
            _take_back(s, e)
        if least > engine.free - need_of_step:
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
        engine.taken += need - (_blocks(found, engine.block) - used)
        for k in range(held):
            s.prefix_users[e, _prefix(s, slot, k)] += 1
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
        _make_room(s, e, now_s)
    _fill(s, e, before, now_s)
    if engine.chunks == 0 and not engine.mixes:
        _make_room(s, e, now_s)
    if engine.chunks or (engine.decoding and engine.preemptions != before):
        # Whoever was preempted may join again in the next iteration.
        engine.count = 1
        engine.steps = 1 if engine.mixes or engine.chunks == 0 else 0
    elif engine.decoding:
        to_end = s.jobs[s.ends[e, 0]].end - engine.step
        engine.count = _steps_with(s, e, engine.free, to_end)
        engine.steps = engine.count
    else:
        engine.count = engine.steps = 0
        engine.next_s = np.inf
        return
    engine.next_s = now_s + _stretch_s(s, e, engine.count)


@compiled
def _undo(s: State, e: int) -> None:
    """Take back the stretch that was planned and of which nothing has passed."""
    engine = s.engines[e]
    for i in range(engine.chunks - 1, -1, -1):
        slot = s.chunk_job[e, i]
        job = s.jobs[slot]
        more = _blocks(s.chunk_end[e, i], engine.block) - _blocks(
            job.computed, engine.block
        )
        engine.free += more
        engine.taken -= more
        if slot == engine.resumed:
            engine.prompt = slot
        else:
            if job.held and job.preemptions == 0:
                s.found_tokens[engine.llm] -= job.computed
            _release(s, e, slot, True)
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
    over = _iterations_until(s, e, now_s) - 1
    if over > 0:
        over_s = _stretch_s(s, e, over)
        _note_gaps(s, e, over, over_s)
        need = _blocks_of_steps(s, e, over)
        engine.free -= need
        engine.taken += need
        engine.context += engine.decoding * over
        engine.step += over
        engine.start_s += over_s
    engine.count = engine.steps = 1
    engine.next_s = engine.start_s + _stretch_s(s, e, 1)


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
            count = _iterations_until(s, e, now_s)
        used += _blocks_of_steps(s, e, count)
    return used


@compiled
def _note_gaps(s: State, e: int, steps: int, seconds: float) -> None:
    """Count the gaps between tokens in the first ``steps`` of the stretch, which take
    ``seconds``: of each decoding job one a step, growing evenly with the context."""
    engine = s.engines[e]
    llm, batch = engine.llm, engine.decoding
    s.gaps_s[llm] += batch * seconds
    first_s = _stretch_s(s, e, 1)
    left = steps
    if engine.paused:
        engine.paused = False
        left -= 1
        slot = engine.decoding_first
        while slot != NONE:
            job = s.jobs[slot]
            pause_s = engine.start_s - max(job.last_s, engine.last_s)
            s.gaps_s[llm] += pause_s
            s.gaps[llm, _gap_bin(first_s + pause_s)] += 1
            slot = job.next
    engine.last_s = engine.start_s + seconds
    if left <= 1:
        s.gaps[llm, _gap_bin(seconds if steps == 1 else seconds - first_s)] += (
            left * batch
        )
        return
    last_s = seconds - _stretch_s(s, e, steps - 1)
    low, high = _gap_bin(first_s), _gap_bin(last_s)
    counted = 0
    for k in range(low, high):
        upto = math.floor(left * (_gap_edge_s(k + 1) - first_s) / (last_s - first_s))
        upto = min(left, max(counted, upto))
        s.gaps[llm, k] += batch * (upto - counted)
        counted = upto
    s.gaps[llm, high] += batch * (left - counted)


@compiled
def advance(s: State, e: int) -> None:
    """Take the engine to its ``next_s``, end those that end there, plan what follows."""
    engine = s.engines[e]
    now_s, batch = engine.next_s, engine.decoding
    if batch and engine.steps:
        _note_gaps(s, e, engine.steps, now_s - engine.start_s)
        need = _blocks_of_steps(s, e, engine.steps)
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
        _register(s, e, slot)
        if math.isnan(job.first_s):
            job.first_s = now_s
        else:
            gap_s = now_s - job.last_s
            s.gaps_s[engine.llm] += gap_s
            s.gaps[engine.llm, _gap_bin(gap_s)] += 1
        job.last_s = now_s
        if job.given == job.output:
            _release(s, e, slot, False)
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
        engine.count = engine.steps = _iterations_until(s, e, now_s)
        engine.next_s = engine.start_s + _stretch_s(s, e, engine.count)


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
def end(s: State, slot: int, result: int, where: int, now_s: float) -> None:
    top, job = s.top[0], s.jobs[slot]
    request = job.request
    s.first_s[request], s.end_s[request] = job.first_s, now_s
    s.result[request], s.where[request] = result, where
    s.preempted[request] = job.preemptions
    s.order[top.ended] = request
    top.ended += 1
    job.next = top.free_job
    top.free_job = slot
    if top.ended == len(s.arrival_s):
        top.woken = True


@compiled
def _finish(s: State, e: int, slot: int, now_s: float) -> None:
    engine = s.engines[e]
    engine.in_flight -= 1
    if engine.lane != NONE:
        s.lane_load[engine.llm, engine.lane] -= 1
    end(s, slot, FINISHED, engine.life, now_s)
