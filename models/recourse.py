"""Best activation of WARM replicas once a scenario is known: the recourse of (O2).

Solver-free. An activation takes its whole GPU set, so no two chosen replicas share a GPU;
an LLM gains nothing beyond its need. Exact as far as `STATES` go; beyond, a good activation
stands in for the best (`models.activation`), so that a plan is never praised for more than
it can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foreserve.models.activation import Activation
from foreserve.models.specs import GpuId

Spare = tuple[str, tuple[GpuId, ...], int]
"""(llm, gpus, instances it counts for) of a WARM replica that may be activated."""

STATES = 20_000
"""States of the dynamic programme, over all scenarios; half a second's work."""
DEPTH = 300
"""GPUs it may go over: it calls itself once for each."""


def covered_value(
    spare: Sequence[Spare],
    value: Mapping[str, float],
    needs: Sequence[Mapping[str, int]],
) -> list[float]:
    """Largest value of instances covered, for each scenario's ``needs``.

    ``value[llm]`` is what one covered instance is worth.
    """
    search = _Search(spare, value)
    return [_value(search, value, need)[0] for need in needs]


def covered_at_most(
    spare: Sequence[Spare],
    value: Mapping[str, float],
    needs: Sequence[Mapping[str, int]],
) -> list[float]:
    """As `covered_value`, but what cannot be surpassed where that is not exact."""
    search = _Search(spare, value)
    units: dict[str, int] = {}
    for llm, _, count in spare:
        units[llm] = units.get(llm, 0) + count
    found = []
    for need in needs:
        total, exact = _value(search, value, need)
        if not exact:
            total = sum(
                value[llm] * min(count, units.get(llm, 0))
                for llm, count in need.items()
            )
        found.append(total)
    return found


def _value(
    search: _Search, value: Mapping[str, float], need: Mapping[str, int]
) -> tuple[float, bool]:
    """The value covered, and whether it is the largest."""
    try:
        return search.best(0, 0, search.of(need)), True
    except _TooMany:
        covered = search.activation(value, need).covered()
        return sum(value[llm] * count for llm, count in covered.items()), False


def covered_instances(
    spare: Sequence[Spare],
    value: Mapping[str, float],
    needs: Sequence[Mapping[str, int]],
) -> list[Mapping[str, int]]:
    """Instances covered of each LLM by one activation that reaches `covered_value`."""
    search = _Search(spare, value)
    found = []
    for need in needs:
        try:
            found.append(search.covered(search.of(need)))
        except _TooMany:
            found.append(search.activation(value, need).covered())
    return found


class _TooMany(Exception):
    """More states than the dynamic programme may have."""


class _Search:
    """Dynamic programme over the GPUs in order: at each GPU either start a replica whose
    first GPU it is, or leave it. The state is (GPU, GPUs already taken, needs left); needs
    are clipped to what later GPUs can still cover, so LLMs whose need cannot run out never
    multiply states.
    """

    def __init__(self, spare: Sequence[Spare], value: Mapping[str, float]) -> None:
        self.spare = [s for s in spare if value[s[0]] > 0]
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
        if len(self.known) >= STATES or len(self.starting) > DEPTH:
            raise _TooMany
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

    def activation(
        self, value: Mapping[str, float], need: Mapping[str, int]
    ) -> Activation:
        """A good activation, where the best one is too far."""
        gpus = sorted({gpu for _, block, _ in self.spare for gpu in block})
        position = {gpu: i for i, gpu in enumerate(gpus)}
        groups = [
            (llm, tuple(position[gpu] for gpu in block), units)
            for llm, block, units in self.spare
        ]
        on: list[list[int]] = [[] for _ in gpus]
        of: dict[str, list[int]] = {name: [] for name in self.names}
        for r, (llm, block, _) in enumerate(groups):
            of[llm].append(r)
            for gpu in block:
                on[gpu].append(r)
        return Activation(groups, on, of, value, need)

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
