"""Best activation of WARM replicas once a scenario is known: the recourse of (O2).

Exact and solver-free. An activation takes its whole GPU set, so no two chosen replicas
share a GPU; an LLM gains nothing beyond its need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foreserve.models.specs import GpuId

Spare = tuple[str, tuple[GpuId, ...], int]
"""(llm, gpus, instances it counts for) of a WARM replica that may be activated."""


def covered_value(
    spare: Sequence[Spare],
    value: Mapping[str, float],
    needs: Sequence[Mapping[str, int]],
) -> list[float]:
    """Largest value of instances covered, for each scenario's ``needs``.

    ``value[llm]`` is what one covered instance is worth. Dynamic programme over the GPUs
    in order: at each GPU either start a replica whose first GPU it is, or leave it. The
    state is (GPU, GPUs already taken, needs left); needs are clipped to what later GPUs
    can still cover, so LLMs whose need cannot run out never multiply states.
    """
    names = sorted({llm for llm, _, _ in spare if value[llm] > 0})
    column = {name: i for i, name in enumerate(names)}
    gpus = sorted({gpu for llm, block, _ in spare if llm in column for gpu in block})
    position = {gpu: i for i, gpu in enumerate(gpus)}
    starting: list[list[tuple[int, int, int]]] = [[] for _ in gpus]
    for llm, block, units in spare:
        if llm in column:
            mask = sum(1 << position[gpu] for gpu in block)
            starting[min(position[g] for g in block)].append((column[llm], mask, units))
    left = [[0] * len(names) for _ in range(len(gpus) + 1)]
    for i in reversed(range(len(gpus))):
        left[i] = list(left[i + 1])
        for llm_index, _, units in starting[i]:
            left[i][llm_index] += units
    worth = [value[name] for name in names]
    known: dict[tuple[int, int, tuple[int, ...]], float] = {}

    def best(i: int, taken: int, need: tuple[int, ...]) -> float:
        need = tuple(map(min, need, left[i]))
        if i == len(gpus) or not any(need):
            return 0.0
        key = (i, taken, need)
        if key in known:
            return known[key]
        result, may_leave = 0.0, True
        if not taken >> i & 1:
            for llm_index, mask, units in starting[i]:
                used = min(units, need[llm_index])
                if not used or mask & taken:
                    continue
                # Leaving a GPU idle is never better than a one-GPU replica on it that
                # counts for one: any later use of that LLM can be swapped to here.
                may_leave = may_leave and not (mask == 1 << i and units == 1)
                rest = list(need)
                rest[llm_index] -= used
                gain = worth[llm_index] * used
                result = max(result, gain + best(i + 1, taken | mask, tuple(rest)))
        if may_leave:
            result = max(result, best(i + 1, taken, need))
        known[key] = result
        return result

    return [best(0, 0, tuple(need.get(n, 0) for n in names)) for need in needs]
