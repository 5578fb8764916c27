"""Whether the cluster had a GPU to spare when a request came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foreserve.models.placement import ReplicaId
from foreserve.models.specs import GpuId
from foreserve.runtime.drift_lives import Lives

Floats = NDArray[np.float64]


class Taken:
    """Which GPUs were taken when: at work on requests, or with a replica on the way that
    requests had called for."""

    def __init__(
        self,
        gpus: Sequence[GpuId],
        works: Mapping[ReplicaId, Iterable[tuple[float, float]]],
        lives: Lives,
    ) -> None:
        """``works``: by replica, from when until when it worked on each request."""
        self._gpus = gpus
        self._by_gpu: dict[GpuId, list[tuple[float, float, str]]] = {}
        """(from, until, the LLM that does not count it as taken, or "")."""
        for key, spans in works.items():
            rows = [(begin_s, end_s, "") for begin_s, end_s in spans]
            for gpu in key.gpus:
                self._by_gpu.setdefault(gpu, []).extend(rows)
        for life in lives.all():
            for stretch in life.stretches:
                called = stretch.phase == "LOADING" and stretch.cold
                if called or stretch.phase == "ACTIVATING":
                    row = (stretch.begin_s, stretch.end_s, life.id.llm)
                    for gpu in life.id.gpus:
                        self._by_gpu.setdefault(gpu, []).append(row)

    def full(self, llm: str, at_s: Floats) -> NDArray[np.bool_]:
        """At which of these moments each GPU was taken, as a request of ``llm`` sees it: a
        GPU that is being made ready for it is its own."""
        found = np.ones(len(at_s), np.bool_)
        for gpu in self._gpus:
            if not found.any():
                break
            rows = [row for row in self._by_gpu.get(gpu, ()) if row[2] != llm]
            begins = np.sort([row[0] for row in rows])
            ends = np.sort([row[1] if row[1] < math.inf else np.inf for row in rows])
            begun = np.searchsorted(begins, at_s, side="right")
            found &= begun > np.searchsorted(ends, at_s, side="right")
        return found
