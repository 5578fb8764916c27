"""Bytes that are still free on each GPU: asked before anything is held."""

from __future__ import annotations

from collections.abc import Iterable

from foreserve.models.errors import ForeserveError
from foreserve.models.observed import HOLDS_KV, Observed, Phase
from foreserve.models.problem import Fleet, ReplicaOption, held_bytes
from foreserve.models.specs import GpuId


class OverCommitted(ForeserveError):
    """More was asked of a GPU's memory than is free: a fault in our own code."""


def phase_bytes(option: ReplicaOption, phase: Phase | None) -> int:
    """Bytes per GPU that a replica holds in ``phase``: (C1) for every moment."""
    if phase is None:
        return 0
    extra = option.load_extra_bytes if phase == "LOADING" else 0
    return held_bytes(option, "ACTIVE" if phase in HOLDS_KV else "WARM") + extra


class Ledger:
    """Free usable bytes by GPU. Mutable, for one owner."""

    def __init__(self, fleet: Fleet) -> None:
        cluster = fleet.cluster
        self._usable_bytes = {gpu: cluster.usable_bytes(gpu) for gpu in cluster.gpus}
        self.free_bytes = dict(self._usable_bytes)

    @classmethod
    def of(cls, fleet: Fleet, observed: Observed) -> Ledger:
        """What is free beside everything ``observed``, each in its phase, or can be lent
        by it."""
        ledger = cls(fleet)
        for replica in observed.replicas:
            option = fleet.option_of(replica.llm, replica.gpus)
            held = phase_bytes(option, replica.phase) - replica.spare_bytes
            ledger.book(replica.gpus, held)
        ledger.shut(observed.lost_gpus)
        return ledger

    def shut(self, gpus: Iterable[GpuId]) -> None:
        """These GPUs have nothing free until they are opened again."""
        for gpu in gpus:
            self.free_bytes[gpu] -= self._usable_bytes[gpu]

    def open(self, gpus: Iterable[GpuId]) -> None:
        """Undo `shut`."""
        for gpu in gpus:
            self.free_bytes[gpu] += self._usable_bytes[gpu]

    def can_hold(self, gpus: Iterable[GpuId], num_bytes: int) -> bool:
        """Whether each of ``gpus`` has ``num_bytes`` free (or none are asked for)."""
        return num_bytes <= 0 or all(self.free_bytes[g] >= num_bytes for g in gpus)

    def hold(self, gpus: tuple[GpuId, ...], num_bytes: int) -> None:
        """Take ``num_bytes`` on each of ``gpus`` (give back if negative)."""
        if not self.can_hold(gpus, num_bytes):
            least = min(gpus, key=self.free_bytes.__getitem__)
            raise OverCommitted(
                f"GPU {least}: {num_bytes} bytes asked, "
                f"{self.free_bytes[least]} are free"
            )
        self.book(gpus, num_bytes)

    def book(self, gpus: Iterable[GpuId], num_bytes: int) -> None:
        """As `hold`, without the check: for reservations, which may exceed what is."""
        for gpu in gpus:
            self.free_bytes[gpu] -= num_bytes
