"""Ranks that compute one LLM together, by ``torch.distributed``.

A communication group is made when an LLM is loaded, so taking it into use costs no
rendezvous. Any processes may form one, and be in several: none is of one size for its life.
What GPUs add up goes through host memory.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed

from foreserve.runtime.paged.layout import Part

WITHIN_S = 60.0
"""What a rank waits for the others, in meeting and in each sum."""


def meeting(host: str) -> distributed.TCPStore:
    """Where ranks meet, in the first one's process; keep it until all have."""
    return distributed.TCPStore(
        host, 0, is_master=True, wait_for_workers=False, timeout=_WITHIN
    )


class Ranks:
    """This process's end of a group: `decoder.Peers`."""

    def __init__(self, part: Part, host: str, store: distributed.Store) -> None:
        """Blocks until all ranks are there; ``host``: an address of this machine."""
        self.part = part
        options = distributed.ProcessGroupGloo._Options()
        options._timeout = _WITHIN
        options._devices = [
            distributed.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)
        ]
        self._group = distributed.ProcessGroupGloo(store, part.rank, part.size, options)

    @classmethod
    def join_at(cls, part: Part, host: str, port: int) -> Ranks:
        """With the others at the first one's `meeting`."""
        store = distributed.TCPStore(host, port, is_master=False, timeout=_WITHIN)
        return cls(part, host, store)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        here = values.cpu()  # Itself, where that is where it is.
        self._group.allreduce([here]).wait()
        return here.to(values.device)

    def join(self, values: torch.Tensor) -> torch.Tensor:
        here = values.contiguous().cpu()
        parts = [torch.empty_like(here) for _ in range(self.part.size)]
        self._group.allgather([parts], [here]).wait()
        return torch.cat(parts, dim=-1).to(values.device)


_WITHIN = timedelta(seconds=WITHIN_S)
