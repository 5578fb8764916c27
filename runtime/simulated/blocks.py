"""The KV cache of an engine, compiled: blocks that steps need, prefixes that are shared.

A block is free, lent, or in use. Free ones are taken in the order in which they became
free; what was in one can be found again until then. The count of blocks ``taken`` is the
clock of this.
"""

from __future__ import annotations

from foreserve.runtime.simulated.layout import State, compiled


@compiled
def blocks_of(tokens: int, block: int) -> int:
    return (tokens + block - 1) // block


@compiled
def need_of_step(s: State, e: int) -> int:
    """Blocks that the next step takes, if prompts leave it its place."""
    engine = s.engines[e]
    if not engine.mixes:
        return 0
    return s.phase[e, engine.step % engine.block]


@compiled
def blocks_of_steps(s: State, e: int, count: int) -> int:
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
def steps_with(s: State, e: int, blocks: int, most: int) -> int:
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
def take_back(s: State, e: int) -> bool:
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
def prefix_of(s: State, slot: int, k: int) -> int:
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
    taken = engine.taken + need_of_step(s, e)
    most = (job.input + job.given - 1) // (engine.unit * engine.block)
    most = min(most, _prefixes(s, e, slot))
    for k in range(most):
        prefix = prefix_of(s, slot, k)
        if s.prefix_users[e, prefix] == 0 and s.prefix_lost[e, prefix] < taken:
            return k
    return most


@compiled
def found_tokens(s: State, e: int, slot: int) -> int:
    """Tokens of a waiting job that are still in its old blocks."""
    engine, job = s.engines[e], s.jobs[slot]
    if engine.unit:
        return _prefixes_there(s, e, slot) * engine.unit * engine.block
    if not engine.caches or job.cached == 0:
        return 0
    # This iteration's steps take theirs first.
    lost = max(0, engine.taken + need_of_step(s, e) - job.lost_from)
    kept = blocks_of(job.cached, engine.block) - lost
    full = job.cached // engine.block
    return max(0, min(full, kept)) * engine.block


@compiled
def unused_blocks(s: State, e: int, slot: int, count: int) -> int:
    """Blocks of the job's first ``count`` prefixes that are free, though not forgotten."""
    found = 0
    for k in range(count):
        if s.prefix_users[e, prefix_of(s, slot, k)] == 0:
            found += s.engines[e].unit
    return found


@compiled
def register(s: State, e: int, slot: int) -> None:
    """The job's prompt is computed: others may use its prefixes from now on."""
    job = s.jobs[slot]
    for k in range(job.held, _prefixes(s, e, slot)):
        prefix = prefix_of(s, slot, k)
        job.doubles += s.prefix_users[e, prefix] > 0
        s.prefix_users[e, prefix] += 1
        job.held += 1


@compiled
def _own_blocks(s: State, e: int, slot: int) -> int:
    """Blocks that the job shares with nobody, whether others may use them or not."""
    engine, job = s.engines[e], s.jobs[slot]
    shared = (job.held - job.doubles) * engine.unit
    return blocks_of(job.computed, engine.block) - shared


@compiled
def release(s: State, e: int, slot: int, forget: bool) -> None:
    """Free the job's blocks, the last ones first; ``forget``: as if it had never used the
    prefixes it found."""
    engine, job = s.engines[e], s.jobs[slot]
    engine.free += _own_blocks(s, e, slot)
    for k in range(job.held - 1, -1, -1):
        prefix = prefix_of(s, slot, k)
        s.prefix_users[e, prefix] -= 1
        if s.prefix_users[e, prefix] == 0:
            if not forget:
                s.prefix_lost[e, prefix] = engine.taken + engine.free
            engine.free += engine.unit
    job.held = job.doubles = 0
