"""Search over whole placements, one small change at a time, in machine code.

The state of one epoch is one array of integers (`Layout` says what is where); each write
is noted, so that a change that does not pay is taken back in as many steps as it took.
(O2) is never evaluated anew. Every scenario keeps an activation that is feasible: which
WARM replica, if any, each spare GPU runs, and how many instances each LLM has. A change of
the placement repairs the activations it touches: a replica with unmet need takes its GPUs
if they idle, or from others if those find another place or are worth less. So the cost
kept here is never below the referee's, whose activation is the best one.

WARM replicas never share a GPU with an ACTIVE one here: there they serve no scenario. Some
replicas are fixed: pins, and one that is none, which serves on every closed GPU for good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def compiled(function: Function) -> Function:
    """``function`` as machine code, kept on disk for the next process."""
    return cast(Function, numba.njit(cache=True, error_model="numpy")(function))


class Data(NamedTuple):
    """What does not change. j: option, m: LLM, g: GPU, n: node, s: scenario."""

    tp: Ints
    units: Ints
    resident: Ints
    """[j] bytes."""
    extra: Ints
    """[j] further bytes while ACTIVE."""
    load: Floats
    rate: Floats
    slow: Floats
    """[j] cost per request/s served (O3)."""
    llm: Ints
    """[j]"""
    first_option: Ints
    """[m], and one more: options of an LLM are neighbours, fastest first."""
    first_node: Ints
    """[j], and one more: into ``nodes``."""
    nodes: Ints
    """Nodes an option may be on."""
    node_gpu: Ints
    """[n] first GPU."""
    node_size: Ints
    usable: Ints
    """[g] bytes."""
    rent: Floats
    """[g]"""
    chance: Floats
    """[s]"""
    need: NDArray[np.int64]
    """[s, m]"""
    loss: Floats
    """[m] per missing instance."""
    lost: Floats
    """[m] per request/s unserved."""
    demand: Floats
    least: Ints
    """[m] ACTIVE replicas."""
    after: Ints
    """[m] ACTIVE replicas left after the loss of a domain (C9)."""
    spread: Ints
    """[m] which of the LLMs with such a row, -1 for most."""
    domain: Ints
    """[g]"""
    apart: NDArray[np.int8]
    """[m, m] 1 for LLMs that may not be on one GPU: with itself none may (C4)."""
    closed: NDArray[np.int8]
    """[g]"""
    most: Ints
    """[m] replicas."""
    before: NDArray[np.int8]
    """[j, g]: 1 if there was a WARM replica of j from GPU g on before, 2 if ACTIVE."""
    demote: float


class Layout(NamedTuple):
    """Where in the state what begins."""

    slots: int
    """Most replicas on a GPU."""
    each: int
    """Most WARM replicas of an LLM."""
    domains: int
    run: int
    """[s, g] replica that is activated there; -1 none, -2 ACTIVE there."""
    have: int
    """[s, m] instances, of ACTIVE and of activated replicas."""
    residents: int
    """[g] residents."""
    held: int
    """[g, slot] replicas."""
    free: int
    """[g] bytes."""
    option: int
    """[r]; -1 for numbers not in use."""
    start: int
    """[r] first GPU."""
    active: int
    """[r]"""
    fixed: int
    """[r] 1 for those that stay."""
    number: int
    """[m] replicas."""
    warms: int
    """[m] WARM ones."""
    own: int
    """[m, each] WARM ones."""
    serving: int
    """[j] ACTIVE replicas."""
    inside: int
    """[spread, domain] ACTIVE replicas."""
    unused: int
    """Stack of free numbers, its height first."""
    size: int


def layout(
    scenarios: int,
    gpus: int,
    llms: int,
    options: int,
    room: int,
    domains: int,
    spread: int,
    slots: int,
) -> Layout:
    """``room``: most replicas in all, ``slots``: on a GPU; ``spread``: LLMs with (C9)."""
    each = min(room, 512)
    sizes = (
        scenarios * gpus,
        scenarios * llms,
        gpus,
        gpus * slots,
        gpus,
        room,
        room,
        room,
        room,
        llms,
        llms,
        llms * each,
        options,
        spread * domains,
        room + 1,
    )
    at = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    return Layout(slots, each, domains, *at)


LOOK, TRY = 64, 12
"""WARM replicas of an LLM looked at for an idle one, and for one to make room for."""


@compiled
def empty(d: Data, at: Layout) -> Ints:
    """The state without replicas, but for number 0 on the closed GPUs."""
    st = np.zeros(at.size, np.int64)
    st[at.run : at.have] = -1
    st[at.free : at.option] = d.usable
    st[at.option : at.start] = -1
    room = at.start - at.option
    st[at.unused] = room - 1
    for i in range(room):
        st[at.unused + 1 + i] = room - 1 - i
    st[at.active], st[at.fixed] = 1, 1
    for g in range(len(d.rent)):
        if d.closed[g]:
            st[at.residents + g] = 1
            for s in range(len(d.chance)):
                st[at.run + s * len(d.rent) + g] = -2
    return st


@compiled
def put(st, jp, jv, i, value):  # type: ignore[no-untyped-def]
    """Write and note what was there; ``jp[0]`` is the number of notes."""
    n = jp[0]
    jp[n] = i
    jv[n] = st[i]
    jp[0] = n + 1
    st[i] = value


@compiled
def undo(st, jp, jv, mark):  # type: ignore[no-untyped-def]
    for n in range(jp[0] - 1, mark - 1, -1):
        st[jp[n]] = jv[n]
    jp[0] = mark


@compiled
def gain_have(d, at, st, jp, jv, s, m, change):  # type: ignore[no-untyped-def]
    """Change the instances of an LLM in a scenario; the change of cost."""
    i = at.have + s * len(d.loss) + m
    old = st[i]
    put(st, jp, jv, i, old + change)
    need = d.need[s, m]
    missing = max(0, need - old - change) - max(0, need - old)
    return d.chance[s] * d.loss[m] * missing


@compiled
def switch(d, at, st, jp, jv, s, r, on):  # type: ignore[no-untyped-def]
    """Activate or stop WARM replica r in a scenario; the change of cost."""
    j = st[at.option + r]
    g = st[at.start + r]
    base = at.run + s * len(d.rent)
    for i in range(g, g + d.tp[j]):
        put(st, jp, jv, base + i, r if on else -1)
    units = d.units[j] if on else -d.units[j]
    return gain_have(d, at, st, jp, jv, s, d.llm[j], units)


@compiled
def unmet(d, at, st, s, m):  # type: ignore[no-untyped-def]
    return d.need[s, m] - st[at.have + s * len(d.loss) + m]


@compiled
def use_idle(d, at, st, jp, jv, s, m):  # type: ignore[no-untyped-def]
    """Activate replicas of an LLM with unmet need on idle GPUs."""
    total = 0.0
    base = at.run + s * len(d.rent)
    count = st[at.warms + m]
    for i in range(min(count, LOOK)):
        if unmet(d, at, st, s, m) <= 0:
            break
        r = st[at.own + m * at.each + (i + jp[0]) % count]
        g = st[at.start + r]
        idle = True
        for k in range(g, g + d.tp[st[at.option + r]]):
            if st[base + k] != -1:
                idle = False
                break
        if idle:
            total += switch(d, at, st, jp, jv, s, r, True)
    return total


@compiled
def fill(d, at, st, jp, jv, s, g, size):  # type: ignore[no-untyped-def]
    """Activate what idle GPUs of a block hold, while it is needed: most valuable first."""
    total = 0.0
    base = at.run + s * len(d.rent)
    while True:
        best, worth = -1, 0.0
        for k in range(g, g + size):
            if st[base + k] != -1:
                continue
            for i in range(st[at.residents + k]):
                r = st[at.held + k * at.slots + i]
                j = st[at.option + r]
                m = d.llm[j]
                room = unmet(d, at, st, s, m)
                if room <= 0 or st[at.active + r]:
                    continue
                value = d.loss[m] * min(room, d.units[j]) / d.tp[j]
                if value <= worth:
                    continue
                idle = True
                first = st[at.start + r]
                for q in range(first, first + d.tp[j]):
                    if st[base + q] != -1:
                        idle = False
                        break
                if idle:
                    best, worth = r, value
        if best < 0:
            return total
        total += switch(d, at, st, jp, jv, s, best, True)


@compiled
def displace(d, at, st, jp, jv, s, r, moved):  # type: ignore[no-untyped-def]
    """Activate WARM replica r on GPUs that may be in use; those displaced fall back on
    idle GPUs. Writes their LLMs into ``moved``; the number of them and the change."""
    j = st[at.option + r]
    g = st[at.start + r]
    base = at.run + s * len(d.rent)
    total, n = 0.0, 0
    low, high = g, g + d.tp[j]
    for k in range(g, g + d.tp[j]):
        q = st[base + k]
        if q >= 0:
            first = st[at.start + q]
            low = min(low, first)
            high = max(high, first + d.tp[st[at.option + q]])
            moved[n] = d.llm[st[at.option + q]]
            n += 1
            total += switch(d, at, st, jp, jv, s, q, False)
    total += switch(d, at, st, jp, jv, s, r, True)
    for i in range(n):
        total += use_idle(d, at, st, jp, jv, s, moved[i])
    if n and high - low > d.tp[j]:
        total += fill(d, at, st, jp, jv, s, low, high - low)
    return n, total


@compiled
def want(d, at, st, jp, jv, s, r, moved):  # type: ignore[no-untyped-def]
    """Activate r if that pays, with at most two displacements in a row."""
    j = st[at.option + r]
    m = d.llm[j]
    if d.loss[m] <= 0 or unmet(d, at, st, s, m) <= 0:
        return 0.0
    g = st[at.start + r]
    if st[at.run + s * len(d.rent) + g] == r:
        return 0.0
    mark = jp[0]
    n, total = displace(d, at, st, jp, jv, s, r, moved[0])
    for i in range(n):
        lost = moved[0, i]
        if unmet(d, at, st, s, lost) <= 0:
            continue
        best, at_best = -1, -1e-12
        for k in range(st[at.warms + lost]):
            q = st[at.own + lost * at.each + k]
            first = st[at.start + q]
            if st[at.run + s * len(d.rent) + first] == q or (
                first < g + d.tp[j] and g < first + d.tp[st[at.option + q]]
            ):
                continue
            inner = jp[0]
            _, change = displace(d, at, st, jp, jv, s, q, moved[1])
            if change < at_best:
                best, at_best = q, change
            undo(st, jp, jv, inner)
            if k > TRY:
                break
        if best >= 0:
            _, change = displace(d, at, st, jp, jv, s, best, moved[1])
            total += change
    if total < -1e-12:
        return total
    undo(st, jp, jv, mark)
    return 0.0


@compiled
def demand_cost(d, at, st, m):  # type: ignore[no-untyped-def]
    """(O1) and (O3) of one LLM: its ACTIVE replicas filled, the fastest first."""
    left, total = d.demand[m], 0.0
    for j in range(d.first_option[m], d.first_option[m + 1]):
        if left <= 0 or d.slow[j] > d.lost[m]:
            break
        served = min(left, d.rate[j] * st[at.serving + j])
        total += served * d.slow[j]
        left -= served
    return total + left * d.lost[m]


@compiled
def left(d, at, st, m):  # type: ignore[no-untyped-def]
    """ACTIVE replicas of an LLM with (C9) after the worst loss of a domain."""
    total, worst = 0, 0
    base = at.inside + d.spread[m] * at.domains
    for i in range(base, base + at.domains):
        total += st[i]
        worst = max(worst, st[i])
    return total - worst


@compiled
def serving_of(d, at, st, m):  # type: ignore[no-untyped-def]
    """ACTIVE replicas of an LLM."""
    total = 0
    for j in range(d.first_option[m], d.first_option[m + 1]):
        total += st[at.serving + j]
    return total


@compiled
def obeys(d, at, st):  # type: ignore[no-untyped-def]
    """Whether no LLM has too few ACTIVE replicas (C9, C10); all else holds always."""
    for m in range(len(d.loss)):
        if serving_of(d, at, st, m) < d.least[m]:
            return False
        if d.after[m] and left(d, at, st, m) < d.after[m]:
            return False
    return True


@compiled
def count_domain(d, at, st, jp, jv, m, g, change):  # type: ignore[no-untyped-def]
    if d.after[m]:
        i = at.inside + d.spread[m] * at.domains + d.domain[g]
        put(st, jp, jv, i, st[i] + change)


@compiled
def hold(d, at, st, jp, jv, j, g, active):  # type: ignore[no-untyped-def]
    """A new replica of option j from GPU g on, which must fit; its number, and load and
    rent."""
    m = d.llm[j]
    height = st[at.unused]
    r = st[at.unused + height]
    put(st, jp, jv, at.unused, height - 1)
    put(st, jp, jv, at.option + r, j)
    put(st, jp, jv, at.start + r, g)
    put(st, jp, jv, at.active + r, active)
    put(st, jp, jv, at.fixed + r, 0)
    put(st, jp, jv, at.number + m, st[at.number + m] + 1)
    if not active:
        n = st[at.warms + m]
        put(st, jp, jv, at.own + m * at.each + n, r)
        put(st, jp, jv, at.warms + m, n + 1)
    num_bytes = d.resident[j] + d.extra[j] * active
    total = 0.0 if d.before[j, g] else d.load[j]
    for k in range(g, g + d.tp[j]):
        count = st[at.residents + k]
        if count == 0:
            total += d.rent[k]
        put(st, jp, jv, at.held + k * at.slots + count, r)
        put(st, jp, jv, at.residents + k, count + 1)
        put(st, jp, jv, at.free + k, st[at.free + k] - num_bytes)
    return r, total


@compiled
def release(d, at, st, jp, jv, r):  # type: ignore[no-untyped-def]
    """Take replica r away; the change of load and rent."""
    j = st[at.option + r]
    g = st[at.start + r]
    m = d.llm[j]
    num_bytes = d.resident[j] + d.extra[j] * st[at.active + r]
    total = 0.0 if d.before[j, g] else -d.load[j]
    for k in range(g, g + d.tp[j]):
        last = st[at.residents + k] - 1
        for i in range(last):
            if st[at.held + k * at.slots + i] == r:
                end = st[at.held + k * at.slots + last]
                put(st, jp, jv, at.held + k * at.slots + i, end)
                break
        put(st, jp, jv, at.residents + k, last)
        put(st, jp, jv, at.free + k, st[at.free + k] + num_bytes)
        if last == 0:
            total -= d.rent[k]
    put(st, jp, jv, at.number + m, st[at.number + m] - 1)
    if not st[at.active + r]:
        last = st[at.warms + m] - 1
        for i in range(last):
            if st[at.own + m * at.each + i] == r:
                end = st[at.own + m * at.each + last]
                put(st, jp, jv, at.own + m * at.each + i, end)
                break
        put(st, jp, jv, at.warms + m, last)
    put(st, jp, jv, at.option + r, -1)
    height = st[at.unused] + 1
    put(st, jp, jv, at.unused + height, r)
    put(st, jp, jv, at.unused, height)
    return total


@compiled
def add_warm(d, at, st, jp, jv, j, g, moved):  # type: ignore[no-untyped-def]
    r, total = hold(d, at, st, jp, jv, j, g, 0)
    for s in range(len(d.chance)):
        total += want(d, at, st, jp, jv, s, r, moved)
    return total


@compiled
def drop_warm(d, at, st, jp, jv, r, moved):  # type: ignore[no-untyped-def]
    j = st[at.option + r]
    g = st[at.start + r]
    m = d.llm[j]
    size = d.tp[j]
    total, count = 0.0, 0
    for s in range(len(d.chance)):
        if st[at.run + s * len(d.rent) + g] == r:
            total += switch(d, at, st, jp, jv, s, r, False)
            moved[2 + count // moved.shape[1], count % moved.shape[1]] = s
            count += 1
    total += release(d, at, st, jp, jv, r)
    for c in range(count):
        s = moved[2 + c // moved.shape[1], c % moved.shape[1]]
        total += use_idle(d, at, st, jp, jv, s, m)
        for i in range(st[at.warms + m]):
            if unmet(d, at, st, s, m) <= 0 or i > TRY:
                break
            q = st[at.own + m * at.each + i]
            total += want(d, at, st, jp, jv, s, q, moved)
        total += fill(d, at, st, jp, jv, s, g, size)
        for k in range(g, g + size):
            for i in range(st[at.residents + k]):
                q = st[at.held + k * at.slots + i]
                total += want(d, at, st, jp, jv, s, q, moved)
    return total


@compiled
def add_active(d, at, st, jp, jv, j, g):  # type: ignore[no-untyped-def]
    """A new ACTIVE replica on GPUs that hold nothing."""
    m = d.llm[j]
    total = -demand_cost(d, at, st, m)
    _, more = hold(d, at, st, jp, jv, j, g, 1)
    total += more
    put(st, jp, jv, at.serving + j, st[at.serving + j] + 1)
    count_domain(d, at, st, jp, jv, m, g, 1)
    total += demand_cost(d, at, st, m)
    if d.before[j, g] == 2:
        total -= d.demote
    for s in range(len(d.chance)):
        base = at.run + s * len(d.rent)
        for k in range(g, g + d.tp[j]):
            put(st, jp, jv, base + k, -2)
        total += gain_have(d, at, st, jp, jv, s, m, d.units[j])
        # Activations that are not needed any more leave their GPUs to others.
        for i in range(st[at.warms + m]):
            q = st[at.own + m * at.each + i]
            o = st[at.option + q]
            first = st[at.start + q]
            if st[base + first] == q and unmet(d, at, st, s, m) + d.units[o] <= 0:
                total += switch(d, at, st, jp, jv, s, q, False)
                total += fill(d, at, st, jp, jv, s, first, d.tp[o])
    return total


@compiled
def drop_active(d, at, st, jp, jv, r, moved):  # type: ignore[no-untyped-def]
    j = st[at.option + r]
    g = st[at.start + r]
    m = d.llm[j]
    total = -demand_cost(d, at, st, m)
    put(st, jp, jv, at.serving + j, st[at.serving + j] - 1)
    count_domain(d, at, st, jp, jv, m, g, -1)
    total += demand_cost(d, at, st, m)
    if d.before[j, g] == 2:
        total += d.demote
    total += release(d, at, st, jp, jv, r)
    for s in range(len(d.chance)):
        base = at.run + s * len(d.rent)
        for k in range(g, g + d.tp[j]):
            put(st, jp, jv, base + k, -1)
        total += gain_have(d, at, st, jp, jv, s, m, -d.units[j])
        total += use_idle(d, at, st, jp, jv, s, m)
        for i in range(st[at.warms + m]):
            if unmet(d, at, st, s, m) <= 0 or i > TRY:
                break
            q = st[at.own + m * at.each + i]
            total += want(d, at, st, jp, jv, s, q, moved)
    return total


@compiled
def room_for(d, at, st, j, g):  # type: ignore[no-untyped-def]
    """0: a WARM replica of j fits from GPU g on; 1: others must go; 2: it may not."""
    answer = 0
    for k in range(g, g + d.tp[j]):
        if st[at.residents + k] and st[at.active + st[at.held + k * at.slots]]:
            return 2
        fixed, num_bytes = 0, d.usable[k]
        for i in range(st[at.residents + k]):
            r = st[at.held + k * at.slots + i]
            o = st[at.option + r]
            if d.apart[d.llm[o], d.llm[j]]:
                return 2
            if st[at.fixed + r]:
                fixed += 1
                num_bytes -= d.resident[o]
        if num_bytes < d.resident[j] or fixed >= at.slots:
            return 2
        if st[at.free + k] < d.resident[j] or st[at.residents + k] >= at.slots:
            answer = 1
    return answer


@compiled
def taken(d, at, st, g, size):  # type: ignore[no-untyped-def]
    """Whether a GPU of a block serves, or holds what stays."""
    for k in range(g, g + size):
        for i in range(st[at.residents + k]):
            r = st[at.held + k * at.slots + i]
            if st[at.active + r] or st[at.fixed + r]:
                return True
    return False


@compiled
def draw(rng, n):  # type: ignore[no-untyped-def]
    """A number below n: xorshift64*, whose state is ``rng[0]``."""
    x = rng[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    rng[0] = x
    return np.int64(
        (x * np.uint64(2685821657736338717) >> np.uint64(33)) % np.uint64(n)
    )


@compiled
def block_for(d, rng, j):  # type: ignore[no-untyped-def]
    """First GPU of a random block that option j may be on."""
    first = d.first_node[j]
    n = d.nodes[first + draw(rng, d.first_node[j + 1] - first)]
    return d.node_gpu[n] + d.tp[j] * draw(rng, d.node_size[n] // d.tp[j])


@compiled
def clear(d, at, st, jp, jv, rng, j, g, active, moved, gone):  # type: ignore[no-untyped-def]
    """Drop WARM replicas until j fits (all of them for an ACTIVE one); their options are
    written into ``gone``. The number of them and the change of cost."""
    total, n = 0.0, 0
    for k in range(g, g + d.tp[j]):
        while st[at.residents + k] and (
            active
            or st[at.free + k] < d.resident[j]
            or st[at.residents + k] >= at.slots
        ):
            pick = draw(rng, st[at.residents + k])
            r = st[at.held + k * at.slots + pick]
            if st[at.fixed + r]:
                continue
            if n < len(gone):
                gone[n] = st[at.option + r]
            n += 1
            total += drop_warm(d, at, st, jp, jv, r, moved)
    return min(n, len(gone)), total


@compiled
def rehome(d, at, st, jp, jv, rng, n, moved, gone, tries):  # type: ignore[no-untyped-def]
    """Look for other places, where they fit and pay, for what was dropped."""
    total = 0.0
    for i in range(n):
        j = gone[i]
        m = d.llm[j]
        if st[at.number + m] >= d.most[m] or st[at.warms + m] >= at.each:
            continue
        for _ in range(tries):
            g = block_for(d, rng, j)
            if room_for(d, at, st, j, g) == 0:
                mark = jp[0]
                change = add_warm(d, at, st, jp, jv, j, g, moved)
                if change < 0:
                    total += change
                    break
                undo(st, jp, jv, mark)
    return total


@compiled
def promise(d, at, st, j, g):  # type: ignore[no-untyped-def]
    """Loss that a WARM replica of j would cover in scenarios in which its GPUs idle."""
    total = 0.0
    m = d.llm[j]
    gpus, llms = len(d.rent), len(d.loss)
    for s in range(len(d.chance)):
        missing = d.need[s, m] - st[at.have + s * llms + m]
        if missing <= 0:
            continue
        base = at.run + s * gpus
        idle = True
        for k in range(g, g + d.tp[j]):
            if st[base + k] != -1:
                idle = False
                break
        if idle:
            total += d.chance[s] * min(missing, d.units[j])
    return total * d.loss[m]


@compiled
def insert(d, at, st, jp, jv, rng, j, moved, gone, tries):  # type: ignore[no-untyped-def]
    """A WARM replica of j at a random place; others make room. 1e300 if there is none."""
    m = d.llm[j]
    full = st[at.number + m] >= d.most[m] or st[at.warms + m] >= at.each
    if full or st[at.unused] < 1:
        return 1e300
    place, most = -1, -1.0
    for _ in range(tries):
        g = block_for(d, rng, j)
        room = room_for(d, at, st, j, g)
        if room < 2:
            worth = promise(d, at, st, j, g)
            if room == 1:
                worth *= 0.5
            if worth > most:
                place, most = g, worth
    if place < 0:
        return 1e300
    n, total = clear(d, at, st, jp, jv, rng, j, place, False, moved, gone)
    total += add_warm(d, at, st, jp, jv, j, place, moved)
    return total + rehome(d, at, st, jp, jv, rng, n, moved, gone, tries)


@compiled
def insert_active(d, at, st, jp, jv, rng, j, moved, gone, tries):  # type: ignore[no-untyped-def]
    m = d.llm[j]
    if st[at.number + m] >= d.most[m] or st[at.unused] < 1:
        return 1e300
    place, fewest = -1, 1 << 30
    for _ in range(tries):
        g = block_for(d, rng, j)
        if d.resident[j] + d.extra[j] > d.usable[g]:
            continue
        if not taken(d, at, st, g, d.tp[j]):
            count = 0
            for k in range(g, g + d.tp[j]):
                count += st[at.residents + k]
            if count < fewest:
                place, fewest = g, count
    if place < 0:
        return 1e300
    n, total = clear(d, at, st, jp, jv, rng, j, place, True, moved, gone)
    total += add_active(d, at, st, jp, jv, j, place)
    return total + rehome(d, at, st, jp, jv, rng, n, moved, gone, tries)


ALL, WARM = 100, 85
"""Kinds of changes: all of them, or those of WARM replicas alone."""


@compiled
def wanted(d, at, st, rng):  # type: ignore[no-untyped-def]
    """A random LLM, rather one with unmet need in a random scenario."""
    llms = len(d.loss)
    if len(d.chance) and draw(rng, 4):
        s = draw(rng, len(d.chance))
        first = draw(rng, llms)
        for i in range(llms):
            m = (first + i) % llms
            if d.loss[m] > 0 and unmet(d, at, st, s, m) > 0:
                return m
    return draw(rng, llms)


@compiled
def step(d, at, st, jp, jv, rng, moved, gone, warm_of, kinds):  # type: ignore[no-untyped-def]
    """One random change; its cost (1e300: not possible). ``kinds``: `ALL` or `WARM`."""
    kind = draw(rng, kinds)
    room = at.start - at.option
    tries = 8
    if kind < 55:
        m = wanted(d, at, st, rng)
        if not warm_of[m]:
            return 1e300
        first = d.first_option[m]
        count = d.first_option[m + 1] - first
        if count == 0:
            return 1e300
        j = first + draw(rng, count)
        return insert(d, at, st, jp, jv, rng, j, moved, gone, tries)
    r = -1
    for _ in range(64):
        r = draw(rng, room)
        if st[at.option + r] >= 0:
            break
    if r < 0 or st[at.option + r] < 0 or st[at.fixed + r]:
        r = -1
    if kind < 85:
        if r < 0 or st[at.active + r]:
            return 1e300
        j = st[at.option + r]
        total = drop_warm(d, at, st, jp, jv, r, moved)
        if kind < 60:
            return total
        if kind < 72:
            m = d.llm[j]
            j = d.first_option[m] + draw(rng, d.first_option[m + 1] - d.first_option[m])
        return total + insert(d, at, st, jp, jv, rng, j, moved, gone, tries)
    if kind < 90:
        m = draw(rng, len(d.loss))
        count = d.first_option[m + 1] - d.first_option[m]
        if count == 0:
            return 1e300
        j = d.first_option[m] + draw(rng, count)
        return insert_active(d, at, st, jp, jv, rng, j, moved, gone, tries)
    if r < 0 or not st[at.active + r]:
        return 1e300
    j = st[at.option + r]
    m = d.llm[j]
    if kind < 93 and serving_of(d, at, st, m) <= d.least[m]:
        return 1e300
    total = drop_active(d, at, st, jp, jv, r, moved)
    if kind >= 93:
        if kind < 97:
            j = d.first_option[m] + draw(rng, d.first_option[m + 1] - d.first_option[m])
        total += insert_active(d, at, st, jp, jv, rng, j, moved, gone, tries)
    if d.after[m] and left(d, at, st, m) < d.after[m]:
        return 1e300
    return total


@compiled
def search(d, at, st, jp, jv, rng, moved, gone, warm_of, kinds, heat, moves):  # type: ignore[no-untyped-def]
    """``moves`` random changes; one that costs more stays with probability
    exp(-cost / heat). The change of cost in all."""
    total = 0.0
    for _ in range(moves):
        jp[0] = 1
        change = step(d, at, st, jp, jv, rng, moved, gone, warm_of, kinds)
        limit = 1e-9
        if heat > 0:
            limit = -heat * np.log((draw(rng, 1 << 30) + 1) / (1 << 30))
        if change <= limit:
            total += change
        else:
            undo(st, jp, jv, 1)
    return total


@compiled
def empty_block(d, at, st, j, n, b):  # type: ignore[no-untyped-def]
    """Whether the b-th block of a node is free for an ACTIVE replica of j."""
    g = d.node_gpu[n] + b * d.tp[j]
    for k in range(g, g + d.tp[j]):
        if st[at.residents + k]:
            return False
    return d.resident[j] + d.extra[j] <= d.usable[g]


@compiled
def apart_from_its_own(d, at, st, j):  # type: ignore[no-untyped-def]
    """First GPU of a block free for an ACTIVE replica of j, in the domain with the fewest
    of its LLM; -1 if there is none."""
    best, fewest = -1, 1 << 30
    base = at.inside + d.spread[d.llm[j]] * at.domains
    for i in range(d.first_node[j], d.first_node[j + 1]):
        n = d.nodes[i]
        here = st[base + d.domain[d.node_gpu[n]]]
        if here < fewest:
            for b in range(d.node_size[n] // d.tp[j]):
                if empty_block(d, at, st, j, n, b):
                    best, fewest = d.node_gpu[n] + b * d.tp[j], here
                    break
    return best


@compiled
def lay(d, at, st, jp, jv, j, count, active, skip, moved):  # type: ignore[no-untyped-def]
    """Up to ``count`` replicas of j on blocks with room (ACTIVE ones on empty blocks), from
    the ``skip``-th node on. How many, and the change of cost."""
    m, size = d.llm[j], d.tp[j]
    placed, total = 0, 0.0
    first, last = d.first_node[j], d.first_node[j + 1]
    if active and d.after[m]:
        while placed < count and st[at.number + m] < d.most[m] and st[at.unused] > 0:
            g = apart_from_its_own(d, at, st, j)
            if g < 0:
                break
            jp[0] = 1
            total += add_active(d, at, st, jp, jv, j, g)
            placed += 1
        return placed, total
    for i in range(last - first):
        n = d.nodes[first + (skip + i) % (last - first)]
        for b in range(d.node_size[n] // size):
            full = st[at.number + m] >= d.most[m] or st[at.unused] < 1
            if placed == count or full or st[at.warms + m] >= at.each:
                return placed, total
            g = d.node_gpu[n] + b * size
            if active and not empty_block(d, at, st, j, n, b):
                continue
            if not active and room_for(d, at, st, j, g) > 0:
                continue
            jp[0] = 1
            if active:
                total += add_active(d, at, st, jp, jv, j, g)
            else:
                total += add_warm(d, at, st, jp, jv, j, g, moved)
            placed += 1
    return placed, total


@compiled
def cover(d, at, st, jp, jv, moved, order):  # type: ignore[no-untyped-def]
    """ACTIVE replicas for LLMs in this order, each the one that saves most per GPU, up to
    the least number of each; then until the demand is served. The change of cost."""
    total = 0.0
    for floor in (True, False):
        for m in order:
            barred = np.zeros(d.first_option[m + 1] - d.first_option[m], np.bool_)
            while True:
                best, chosen = 1e300 if floor else 0.0, -1
                rate = 0.0
                now = demand_cost(d, at, st, m)
                for j in range(d.first_option[m], d.first_option[m + 1]):
                    rate += st[at.serving + j] * d.rate[j]
                    if barred[j - d.first_option[m]]:
                        continue
                    st[at.serving + j] += 1
                    change = demand_cost(d, at, st, m) - now + d.load[j]
                    st[at.serving + j] -= 1
                    if change / d.tp[j] < best:
                        best, chosen = change / d.tp[j], j
                enough = rate >= d.demand[m]
                if floor:
                    enough = serving_of(d, at, st, m) >= d.least[m]
                    if d.after[m]:
                        enough = enough and left(d, at, st, m) >= d.after[m]
                if chosen < 0 or enough:
                    break
                placed, change = lay(d, at, st, jp, jv, chosen, 1, True, 0, moved)
                total += change
                if placed == 0:
                    barred[chosen - d.first_option[m]] = True
    return total
