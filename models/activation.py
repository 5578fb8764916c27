"""A good activation of WARM replicas where the best one takes too long to find.

For (O2) of large placements. What it finds can be carried out, so that a cost computed
from it is never too low; it may be too high. Each scenario starts from the replicas that
are worth most per GPU; then replicas with unmet need take the GPUs of others for as long
as that pays, when those find idle GPUs elsewhere, or push out a third one, or are worth
less. Last come chains of any length over single GPUs, each taken over from the one before,
to an idle GPU or to a replica worth less: where all replicas are on one GPU and count for
one, no activation is better after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Group = tuple[str, tuple[int, ...], int]
"""(llm, numbers of its GPUs, instances it counts for) of one WARM replica."""
NEARLY = 1e-12
WIDE = 200
"""GPUs that a chain looks at, with more than `DEEP` replicas."""
DEEP = 1_000
"""Up to so many replicas, those that are pushed out push out others in turn."""


class Activation:
    """The activation of one scenario, improved in place."""

    def __init__(
        self,
        groups: Sequence[Group],
        on: Sequence[Sequence[int]],
        of: Mapping[str, Sequence[int]],
        value: Mapping[str, float],
        need: Mapping[str, int],
    ) -> None:
        """``on[gpu]`` and ``of[llm]`` list replicas by their numbers in ``groups``."""
        self.groups, self.on, self.of, self.value = groups, on, of, value
        self.unmet = {llm: need.get(llm, 0) for llm in of}
        self.running = [-1] * len(on)
        self._switched: list[tuple[int, bool]] = []
        self._order = sorted(
            (r for llm in of if self.unmet[llm] > 0 for r in of[llm]),
            key=lambda r: -value[groups[r][0]] * groups[r][2] / len(groups[r][1]),
        )

    def covered(self, rounds: int = 8) -> Mapping[str, int]:
        """Instances covered of each LLM, after improvement."""
        start = dict(self.unmet)
        depth = 2 if len(self._order) <= DEEP else 1
        for llm in sorted(self.of, key=lambda name: -self.value[name]):
            self._use_idle(llm)
        for _ in range(rounds):
            gained = 0.0
            for r in self._order:
                self._switched.clear()
                gained += self._want(r, depth)
            if gained <= NEARLY:
                break
        wide = len(self.on) if len(self._order) <= DEEP else WIDE
        for llm in sorted(self.of, key=lambda name: -self.value[name]):
            while self.unmet[llm] > 0 and self._chain(llm, wide):
                pass
        return {llm: n - max(0, self.unmet[llm]) for llm, n in start.items()}

    def _switch(self, r: int, on: bool) -> float:
        """Activate or stop a replica; what that is worth."""
        llm, gpus, units = self.groups[r]
        self._switched.append((r, on))
        for gpu in gpus:
            self.running[gpu] = r if on else -1
        before = self.unmet[llm]
        self.unmet[llm] = after = before - units if on else before + units
        return self.value[llm] * (max(0, before) - max(0, after))

    def _use_idle(self, llm: str) -> float:
        total, running = 0.0, self.running
        if self.unmet[llm] > 0:
            for r in self.of[llm]:
                gpus = self.groups[r][1]
                if running[gpus[0]] < 0 and all(running[gpu] < 0 for gpu in gpus):
                    total += self._switch(r, True)
                    if self.unmet[llm] <= 0:
                        break
        return total

    def _fill(self, gpus: Sequence[int]) -> float:
        """Use GPUs that are idle now."""
        total = 0.0
        for gpu in gpus:
            if self.running[gpu] < 0:
                for r in sorted(self.on[gpu], key=self._worth, reverse=True):
                    free = all(self.running[g] < 0 for g in self.groups[r][1])
                    if free and self.unmet[self.groups[r][0]] > 0:
                        total += self._switch(r, True)
                        break
        return total

    def _chain(self, llm: str, wide: int) -> bool:
        """One more replica of an LLM by a chain over at most ``wide`` single GPUs; False
        if that does not pay."""
        came: dict[int, tuple[int, int]] = {}
        """GPU -> (replica that would take it, GPU that one would leave, or -1)."""
        queue, seen = [(llm, -1)], {llm}
        last, least = -1, self.value[llm]
        for name, left in queue:
            for r in self.of[name]:
                gpus = self.groups[r][1]
                gpu = gpus[0]
                if len(gpus) > 1 or gpu in came or self.running[gpu] == r:
                    continue
                q = self.running[gpu]
                if q >= 0 and len(self.groups[q][1]) > 1:
                    continue
                came[gpu] = r, left
                other = "" if q < 0 else self.groups[q][0]
                lost = 0.0 if q < 0 or self.unmet[other] < 0 else self.value[other]
                if lost < least - NEARLY:
                    last, least = gpu, lost
                if other and other not in seen:
                    seen.add(other)
                    queue.append((other, gpu))
            if least <= 0 or len(came) > wide:
                break
        if last < 0:
            return False
        self._switched.clear()
        total, gpu = 0.0, last
        while gpu >= 0:
            r, left = came[gpu]
            if self.running[gpu] >= 0:
                total += self._switch(self.running[gpu], False)
            total += self._switch(r, True)
            gpu = left
        if total > NEARLY:
            return True
        for r, on in reversed(self._switched):
            self._switch(r, not on)
        self._switched.clear()
        return False

    def _worth(self, r: int) -> float:
        llm, gpus, units = self.groups[r]
        return self.value[llm] * min(units, max(0, self.unmet[llm])) / len(gpus)

    def _want(self, r: int, depth: int) -> float:
        """Activate a replica if that pays; what it is worth."""
        llm, gpus, _ = self.groups[r]
        if self.unmet[llm] <= 0 or self.running[gpus[0]] == r or self.value[llm] <= 0:
            return 0.0
        mark = len(self._switched)
        total = self._displace(r, depth)
        if total > NEARLY:
            return total
        for other, on in reversed(self._switched[mark:]):
            self._switch(other, not on)
        del self._switched[mark:]
        return 0.0

    def _displace(self, r: int, depth: int) -> float:
        gpus = self.groups[r][1]
        others = sorted({q for gpu in gpus if (q := self.running[gpu]) >= 0})
        total = sum(self._switch(q, False) for q in others)
        total += self._switch(r, True)
        for q in others:
            llm = self.groups[q][0]
            total += self._use_idle(llm)
            if self.unmet[llm] > 0 and depth > 1:
                for other in self.of[llm]:
                    theirs = self.groups[other][1]
                    if self.unmet[llm] > 0 and not any(g in gpus for g in theirs):
                        total += self._want(other, depth - 1)
            if len(self.groups[q][1]) > len(gpus):
                total += self._fill(self.groups[q][1])
        return total
