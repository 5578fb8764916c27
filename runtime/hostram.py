"""Weights in the pinned host memory of one node: who is there, and who has to go."""

from __future__ import annotations

from dataclasses import dataclass

from foreserve.runtime.ledger import OverCommitted


@dataclass(slots=True, eq=False)
class _Weights:
    num_bytes: int
    """0: there was no room, they stream through."""
    readers: int = 0
    """Loads that copy from here, or fill it."""
    whole: bool = False


class HostRam:
    """One copy of each LLM's weights at most, whichever replicas are made of it.

    The first load of an LLM reads storage and leaves the weights here if there is room,
    for which those go that nobody copies from, the least recently used first. Mutable.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._weights: dict[str, _Weights] = {}
        """The least recently used first."""

    @property
    def pinned(self) -> dict[str, int]:
        """Bytes of each LLM whose weights are here as a whole."""
        return {llm: w.num_bytes for llm, w in self._weights.items() if w.whole}

    @property
    def held_bytes(self) -> int:
        """What is here or has its room reserved."""
        return sum(weights.num_bytes for weights in self._weights.values())

    def open(self, llm: str, num_bytes: int) -> bool:
        """A load begins. True: it copies from here; False: it reads storage."""
        weights = self._weights.pop(llm, None)
        if weights is None:
            room = self._make_room(num_bytes)
            weights = _Weights(num_bytes if room else 0)
        self._weights[llm] = weights
        weights.readers += 1
        if self.held_bytes > self.num_bytes:
            raise OverCommitted(
                f"{self.held_bytes} bytes pinned, host memory has {self.num_bytes}"
            )
        return weights.whole

    def close(self, llm: str, *, done: bool) -> None:
        """A load that began ends; ``done``: it had moved everything."""
        weights = self._weights[llm]
        weights.readers -= 1
        weights.whole |= done and weights.num_bytes > 0
        if not (weights.readers or weights.whole):
            del self._weights[llm]

    def clear(self) -> None:
        """The node has lost its memory; no load is open."""
        self._weights.clear()

    def _make_room(self, num_bytes: int) -> bool:
        free = self.num_bytes - self.held_bytes
        leaving = []
        for llm, weights in self._weights.items():
            if free >= num_bytes:
                break
            if not weights.readers:
                leaving.append(llm)
                free += weights.num_bytes
        if free < num_bytes:
            return False
        for llm in leaving:
            del self._weights[llm]
        return True
