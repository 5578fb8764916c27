"""What one spare GPU may hold and run: the most valuable pattern for given prices.

A pattern of a spare GPU is a set of items (its parts of replicas) that fit it together, at
most one per LLM, and for each scenario which one of them it runs, if any. It is worth

    sum over scenarios of the dearest item's value there - sum over items of their cost.

Two limits on that, of which `best_set`, a depth-first search, takes the lower. The worth is
submodular in the set: what further items can add is at most a fractional knapsack of what
each would add alone. And for any shades t_s >= 0 the dearest value of a scenario is at most
t_s and the sum over items of what they have above it: sum of t and a knapsack of the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foreserve.solvers.anneal import compiled

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DEEP = 24
"""Most items in a pattern that is searched; `best_set` is told of more by its limit."""
NEAR = 1e-4
"""Relative difference of limit and worth at which the search is content."""
FIRST, NEXT = 300, 12
"""Steps in which shades are lowered at the root, and at a node."""


@compiled
def knapsack(gain: Floats, weight: Ints, items: Ints, left: int, used: Floats) -> float:
    """Value of the fractional knapsack of ``items`` with a gain; ``used``: how much of
    each."""
    density = np.empty(len(items))
    for q in range(len(items)):
        i = items[q]
        used[i] = 0.0
        density[q] = -gain[i] / weight[i]
    total = 0.0
    for q in np.argsort(density):
        i = items[q]
        if left <= 0 or gain[i] <= 0:
            break
        used[i] = min(1.0, left / weight[i])
        total += gain[i] * used[i]
        left -= weight[i]
    return total


@compiled
def shaded(
    value: Floats,
    cost: Floats,
    weight: Ints,
    items: Ints,
    left: int,
    cover: Floats,
    shade: Floats,
    enough: float,
    rounds: int,
    best_shade: Floats,
) -> float:
    """A limit on what ``items`` add to ``cover``: the least over some shades, which are
    lowered or raised by where the knapsack has too little or too much (subgradients), from
    ``shade`` on, until it is ``enough``. The best shade goes to ``best_shade``."""
    count, scenarios = value.shape
    gain, used = np.empty(count), np.empty(count)
    now = np.maximum(shade, cover)
    slope = np.empty(scenarios)
    least, step = np.inf, 1.0
    for _ in range(rounds + 1):
        base = 0.0
        for s in range(scenarios):
            base += now[s] - cover[s]
        for i in items:
            gain[i] = -cost[i]
            for s in range(scenarios):
                gain[i] += max(0.0, value[i, s] - now[s])
        limit = base + knapsack(gain, weight, items, left, used)
        if limit < least - 1e-12:
            least = limit
            best_shade[:] = now
        else:
            step *= 0.85
        if least <= enough:
            break
        slope[:] = 1.0
        for i in items:
            if used[i] > 0:
                for s in range(scenarios):
                    if value[i, s] > now[s]:
                        slope[s] -= used[i]
        length = 0.0
        for s in range(scenarios):
            if now[s] <= cover[s] and slope[s] > 0:
                slope[s] = 0.0
            length += slope[s] * slope[s]
        if length < 1e-12:
            break
        size = step * max(limit - enough, 0.02 * limit) / length
        for s in range(scenarios):
            now[s] = max(cover[s], now[s] - size * slope[s])
    return least


@compiled
def best_set(
    value: Floats, cost: Floats, weight: Ints, llm: Ints, room: int, most: int
) -> tuple[float, float, Ints]:
    """(limit, worth, items) of the best pattern: ``value[item, scenario]``, ``cost`` and
    ``weight`` (> 0) by item. No pattern is worth more than the limit, which is the worth
    (all but `NEAR`) unless ``most`` steps did not end the search."""
    count, scenarios = value.shape
    cover = np.zeros((DEEP + 1, scenarios))
    shade = np.zeros((DEEP + 1, scenarios))
    ahead = np.zeros((DEEP + 1, count), np.int64)
    gain = np.zeros((DEEP + 1, count))
    reach = np.zeros((DEEP + 1, count))
    size = np.zeros(DEEP + 1, np.int64)
    at = np.zeros(DEEP + 1, np.int64)
    left = np.zeros(DEEP + 1, np.int64)
    worth = np.zeros(DEEP + 1)
    path = np.zeros(DEEP + 1, np.int64)
    best, found = 0.0, path[:0].copy()
    left[0], size[0] = room, count
    ahead[0] = np.arange(count)
    depth, steps, fresh, limit = 0, 0, True, 0.0
    while True:
        if fresh:
            # What each item would add here, the densest first, and a limit for each tail.
            fresh, steps, n = False, steps + 1, 0
            density = np.empty(size[depth])
            for q in range(size[depth]):
                i = ahead[depth, q]
                if weight[i] > left[depth]:
                    continue
                more = -cost[i]
                for s in range(scenarios):
                    more += max(0.0, value[i, s] - cover[depth, s])
                if more > 1e-12:
                    gain[depth, n], ahead[depth, n] = more, i
                    density[n] = -more / weight[i]
                    n += 1
            order = np.argsort(density[:n])
            ahead[depth, :n] = ahead[depth, :n][order]
            gain[depth, :n] = gain[depth, :n][order]
            size[depth], at[depth] = n, 0
            for q in range(n):
                rest, total = left[depth], 0.0
                for k in range(q, n):
                    w = weight[ahead[depth, k]]
                    total += gain[depth, k] * min(1.0, rest / w)
                    rest -= w
                    if rest <= 0:
                        break
                reach[depth, q] = total
            if n and worth[depth] + reach[depth, 0] > best * (1 + NEAR) + 1e-9:
                enough = best * (1 + NEAR) - worth[depth]
                above = shade[max(0, depth - 1)]
                bound = shaded(
                    value,
                    cost,
                    weight,
                    ahead[depth, :n],
                    left[depth],
                    cover[depth],
                    above,
                    enough,
                    FIRST if depth == 0 else NEXT,
                    shade[depth],
                )
                for q in range(n):
                    reach[depth, q] = min(reach[depth, q], bound)
        q = at[depth]
        enough = best * (1 + NEAR) + 1e-9
        done = q == size[depth] or worth[depth] + reach[depth, q] <= enough
        done = done or depth == DEEP or steps >= most
        if done:
            if q < size[depth]:
                limit = max(limit, worth[depth] + reach[depth, q])
            if depth == 0:
                return max(limit, best), best, found
            depth -= 1
            continue
        at[depth] += 1
        i = ahead[depth, q]
        path[depth] = i
        for s in range(scenarios):
            cover[depth + 1, s] = max(cover[depth, s], value[i, s])
        worth[depth + 1] = worth[depth] + gain[depth, q]
        left[depth + 1] = left[depth] - weight[i]
        if worth[depth + 1] > best:
            best, found = worth[depth + 1], path[: depth + 1].copy()
        n = 0
        for k in range(q + 1, size[depth]):
            if llm[ahead[depth, k]] != llm[i]:
                ahead[depth + 1, n] = ahead[depth, k]
                n += 1
        depth += 1
        size[depth], fresh = n, True


@compiled
def good_sets(
    value: Floats, cost: Floats, weight: Ints, llm: Ints, room: int, firsts: Ints
) -> NDArray[np.int8]:
    """[first, item]: for each of ``firsts`` a pattern with it, filled up by density."""
    count, scenarios = value.shape
    sets = np.zeros((len(firsts), count), np.int8)
    cover = np.zeros(scenarios)
    for first in range(len(firsts)):
        if weight[firsts[first]] > room:
            continue
        cover[:] = 0.0
        left, i = room, firsts[first]
        while i >= 0:
            sets[first, i] = 1
            left -= weight[i]
            for s in range(scenarios):
                cover[s] = max(cover[s], value[i, s])
            i, most = -1, 1e-12
            for k in range(count):
                if weight[k] > left:
                    continue
                more = -cost[k]
                for s in range(scenarios):
                    more += max(0.0, value[k, s] - cover[s])
                if more <= most * weight[k]:
                    continue
                alone = True
                for o in range(count):
                    if sets[first, o] and llm[o] == llm[k]:
                        alone = False
                        break
                if alone:
                    i, most = k, more / weight[k]
    return sets
