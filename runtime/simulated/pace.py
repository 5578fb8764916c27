"""How long the iterations of a stretch take, compiled, and the gaps that users see."""

from __future__ import annotations

import math

from foreserve.models.gaps import gap_bin, gap_edge_s
from foreserve.runtime.simulated.layout import NONE, State, compiled

_gap_bin = compiled(gap_bin)
_gap_edge_s = compiled(gap_edge_s)


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
def stretch_s(s: State, e: int, count: int) -> float:
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
def iterations_until(s: State, e: int, now_s: float) -> int:
    """Iterations of the stretch (decoding only) until the first end at or after
    ``now_s``: the root of the quadratic in `stretch_s`, rounded up."""
    engine = s.engines[e]
    square = engine.decode_s_per_context_token * engine.decoding / 2
    linear = _decode_s(s, e, float(engine.decoding), float(engine.context)) - square
    passed_s = now_s - engine.start_s
    root = linear + math.sqrt(linear**2 + 4 * square * passed_s)
    count = min(engine.count, math.ceil(2 * passed_s / root))
    # Rounding may be off by one either way; the ends themselves decide.
    while count > 1 and engine.start_s + stretch_s(s, e, count - 1) >= now_s:
        count -= 1
    while engine.start_s + stretch_s(s, e, count) < now_s:
        count += 1
    return count


@compiled
def note_gap(s: State, llm: int, gap_s: float, count: int) -> None:
    """Count ``count`` gaps of ``gap_s`` between tokens."""
    s.gaps_s[llm] += count * gap_s
    s.gaps[llm, _gap_bin(gap_s)] += count


@compiled
def note_gaps(s: State, e: int, steps: int, seconds: float) -> None:
    """Count the gaps between tokens in the first ``steps`` of the stretch, which take
    ``seconds``: of each decoding job one a step, growing evenly with the context."""
    engine = s.engines[e]
    llm, batch = engine.llm, engine.decoding
    s.gaps_s[llm] += batch * seconds
    first_s = stretch_s(s, e, 1)
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
    last_s = seconds - stretch_s(s, e, steps - 1)
    low, high = _gap_bin(first_s), _gap_bin(last_s)
    counted = 0
    for k in range(low, high):
        upto = math.floor(left * (_gap_edge_s(k + 1) - first_s) / (last_s - first_s))
        upto = min(left, max(counted, upto))
        s.gaps[llm, k] += batch * (upto - counted)
        counted = upto
    s.gaps[llm, high] += batch * (left - counted)
