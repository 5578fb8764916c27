"""What of the simulated cluster is broken at the moment."""

from __future__ import annotations

import math

from foreserve.models.faults import Fault
from foreserve.models.placement import ReplicaId
from foreserve.models.specs import ClusterSpec, GpuId


class Health:
    """The faults in force. Mutable; its owner tells it when each begins and ends.

    Faults may overlap: a GPU is back when the last one that took it has ended, and
    factors of one node multiply.
    """

    def __init__(self, cluster: ClusterSpec) -> None:
        self._cluster = cluster
        self._faults: list[Fault] = []
        self.lost_gpus: frozenset[GpuId] = frozenset()

    def begin(self, fault: Fault) -> None:
        if fault.kind != "replica-crash":
            self._faults.append(fault)
        self._look()

    def end(self, fault: Fault) -> None:
        """Nothing happens if it has ended already."""
        self._faults = [other for other in self._faults if other is not fault]
        self._look()

    def factor(self, node: str) -> float:
        """How many times as long everything takes on ``node``."""
        return math.prod(
            fault.factor
            for fault in self._faults
            if fault.factor is not None and fault.where.node == node
        )

    def load_fails(self, replica: ReplicaId) -> bool:
        """Whether the load of ``replica``, which ends now, ends in nothing. A fault that
        lasts for no time is over with it."""
        for fault in self._faults:
            if fault.kind == "load-failure" and fault.where.hits(replica):
                if fault.until_s is None:
                    self.end(fault)
                return True
        return False

    def _look(self) -> None:
        lost = [f.where for f in self._faults if f.kind in ("gpu-loss", "node-loss")]
        self.lost_gpus = frozenset(
            gpu
            for where in lost
            for gpu in self._cluster.node_by_name[where.node].gpu_ids()
            if where.index in (None, gpu.index)
        )
