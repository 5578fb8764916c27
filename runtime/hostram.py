"""Weights in the host memory of one node: who is there, and who has to go. The one rule of
the simulator and of live nodes."""

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
    for which those go that nobody copies from, the least recently used first. What is to be
    kept goes only for what is to be kept as well, and last. Mutable.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.keep: frozenset[str] = frozenset()
        """LLMs whose weights are to stay; those that nobody names here go first."""
        self._weights: dict[str, _Weights] = {}
        """The least recently used first."""

    @property
    def pinned(self) -> dict[str, int]:
        """Bytes of each LLM whose weights are here as a whole."""
        return {llm: w.num_bytes for llm, w in self._weights.items() if w.whole}

    @property
    def held(self) -> dict[str, int]:
        """Bytes of each LLM that is here or has its room reserved."""
        return {llm: w.num_bytes for llm, w in self._weights.items() if w.num_bytes}

    @property
    def reserved(self) -> dict[str, int]:
        """Bytes of each LLM that is here or on its way; 0 if it streams through."""
        return {llm: w.num_bytes for llm, w in self._weights.items()}

    @property
    def held_bytes(self) -> int:
        """Of all of them."""
        return sum(weights.num_bytes for weights in self._weights.values())

    def books(self, llm: str) -> bool:
        """Whether it is among them."""
        return llm in self._weights and self._weights[llm].num_bytes > 0

    def open(self, llm: str, num_bytes: int) -> bool:
        """A load begins. True: it copies from here; False: it reads storage."""
        weights = self._weights.pop(llm, None)
        if weights is None:
            room = self._make_room(llm, num_bytes)
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

    def _make_room(self, llm: str, num_bytes: int) -> bool:
        free = self.num_bytes - self.held_bytes
        leaving: list[str] = []
        # Sorting keeps the order of use among equals.
        for other in sorted(self._weights, key=self.keep.__contains__):
            if free >= num_bytes:
                break
            weights = self._weights[other]
            if not weights.readers and (other not in self.keep or llm in self.keep):
                leaving.append(other)
                free += weights.num_bytes
        if free < num_bytes:
            return False
        for other in leaving:
            del self._weights[other]
        return True
