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

    ``value[llm]`` is what one covered instance is worth.
    """
    search = _Search(spare, value)
    return [search.best(0, 0, search.of(need)) for need in needs]


def covered_instances(
    spare: Sequence[Spare],
    value: Mapping[str, float],
    needs: Sequence[Mapping[str, int]],
) -> list[Mapping[str, int]]:
    """Instances covered of each LLM by one activation that reaches `covered_value`."""
    search = _Search(spare, value)
    return [search.covered(search.of(need)) for need in needs]


class _Search:
    """Dynamic programme over the GPUs in order: at each GPU either start a replica whose
    first GPU it is, or leave it. The state is (GPU, GPUs already taken, needs left); needs
    are clipped to what later GPUs can still cover, so LLMs whose need cannot run out never
    multiply states.
    """

    def __init__(self, spare: Sequence[Spare], value: Mapping[str, float]) -> None:
        self.names = sorted({llm for llm, _, _ in spare if value[llm] > 0})
        column = {name: i for i, name in enumerate(self.names)}
        gpus = sorted(
            {gpu for llm, block, _ in spare if llm in column for gpu in block}
        )
        position = {gpu: i for i, gpu in enumerate(gpus)}
        self.starting: list[list[tuple[int, int, int]]] = [[] for _ in gpus]
        for llm, block, units in spare:
            if llm in column:
                mask = sum(1 << position[gpu] for gpu in block)
                first = min(position[gpu] for gpu in block)
                self.starting[first].append((column[llm], mask, units))
        self.left = [[0] * len(self.names) for _ in range(len(gpus) + 1)]
        for i in reversed(range(len(gpus))):
            self.left[i] = list(self.left[i + 1])
            for llm_index, _, units in self.starting[i]:
                self.left[i][llm_index] += units
        self.worth = [value[name] for name in self.names]
        self.known: dict[tuple[int, int, tuple[int, ...]], float] = {}

    def of(self, need: Mapping[str, int]) -> tuple[int, ...]:
        """The needs of a scenario in the order of ``names``."""
        return tuple(need.get(name, 0) for name in self.names)

    def best(self, i: int, taken: int, need: tuple[int, ...]) -> float:
        """Largest value from GPU ``i`` on."""
        need = tuple(map(min, need, self.left[i]))
        if i == len(self.starting) or not any(need):
            return 0.0
        key = (i, taken, need)
        if key in self.known:
            return self.known[key]
        result, may_leave = 0.0, True
        if not taken >> i & 1:
            for llm_index, mask, units in self.starting[i]:
                used = min(units, need[llm_index])
                if not used or mask & taken:
                    continue
                # Leaving a GPU idle is never better than a one-GPU replica on it that
                # counts for one: any later use of that LLM can be swapped to here.
                may_leave = may_leave and not (mask == 1 << i and units == 1)
                rest = list(need)
                rest[llm_index] -= used
                gain = self.worth[llm_index] * used
                result = max(result, gain + self.best(i + 1, taken | mask, tuple(rest)))
        if may_leave:
            result = max(result, self.best(i + 1, taken, need))
        self.known[key] = result
        return result

    def covered(self, need: tuple[int, ...]) -> Mapping[str, int]:
        """Walk one best way and count what it covers."""
        found, taken = dict.fromkeys(self.names, 0), 0
        for i in range(len(self.starting)):
            need = tuple(map(min, need, self.left[i]))
            target = self.best(i, taken, need)
            for llm_index, mask, units in self.starting[i]:
                used = min(units, need[llm_index])
                if not used or mask & taken or taken >> i & 1:
                    continue
                rest = list(need)
                rest[llm_index] -= used
                later = self.best(i + 1, taken | mask, tuple(rest))
                if self.worth[llm_index] * used + later >= target:
                    found[self.names[llm_index]] += used
                    taken, need = taken | mask, tuple(rest)
                    break
        return found
