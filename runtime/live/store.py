"""Weights in the host memory of a live node: what is there, and what a load costs from it.

Who is there and who has to go is `HostRam`'s rule, as in the simulator; how long a load
takes, from host memory or from storage, is `transfer`'s. Room is booked before anything is
read, and each change is a line of the agent's log.

Where an LLM has files here, they are really brought in: read into the page cache and, where
the kernel lets us, locked there (`pages`). Else, as with simulated engines, the books are
all there is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.hostram import HostRam
from foreserve.runtime.links import transfer
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.messages import HostRow
from foreserve.runtime.live.pages import Cancelled, Held, available_bytes

SPARE_SHARE = 0.1
"""Of the machine's available memory, left alone when files are brought in."""
LOOK_S = 10.0
"""Between looks at how much of the files is in memory."""

Files = Callable[[str], Sequence[Path]]
"""Of an LLM: those of its weights, none where it has none here."""


@dataclass(slots=True, eq=False)
class _Copy:
    held: Held
    reading: threading.Lock = field(default_factory=threading.Lock)
    read: bool = False
    resident_bytes: int | None = None


class HostStore:
    """Host memory of ``node``. Its calls are made with the agent's lock, but for `fill` and
    `look`, which take their time."""

    def __init__(
        self,
        fleet: Fleet,
        node: str,
        log: IntentLog,
        now_s: Callable[[], float],
        files: Files = lambda llm: (),
    ) -> None:
        self._fleet, self._node = fleet, fleet.cluster.node_by_name[node]
        self._log, self._now_s, self._files = log, now_s, files
        self._ram = HostRam(self._node.host_ram_bytes)
        self._copies: dict[str, _Copy] = {}
        self._readers: dict[str, int] = {}
        self._tried: set[str] = set()
        """What there was no room for ahead of its first load."""
        self._looked_s = now_s()
        self.cached = fleet.loading.host_cache != "none"
        """False: no load is to find anything here."""

    @property
    def capacity_bytes(self) -> int:
        return self._ram.num_bytes

    def keep(self, llms: Collection[str]) -> None:
        """What the plan wants here: others go first."""
        self._ram.keep = frozenset(llms)

    def missing(self) -> list[str]:
        """Of what the plan wants here, what could be brought in and is not, nor tried."""
        wanted = sorted(self._ram.keep) if self.cached else []
        return [
            llm
            for llm in wanted
            if not self._ram.books(llm) and llm not in self._tried and self._files(llm)
        ]

    def load_s(self, option: ReplicaOption, gpus: tuple[GpuId, ...]) -> float:
        """How long a load takes alone that begins now."""
        cache = self._fleet.loading.host_cache
        if cache == "all":
            return option.load_s
        gpu = self._fleet.cluster.type_by_name[self._node.gpu]
        pinned = self.cached and option.llm in self._ram.pinned
        moved = transfer(
            option, gpus, self._node, gpu, self._fleet.loading, pinned=pinned
        )
        return option.start_s + moved.alone_s

    def begin(self, llm: str, num_bytes: int) -> None:
        """A load begins, of weights of so many bytes by the plan: book room for them if
        they are not here and there is any. Those that had to go have gone when this
        returns."""
        if not self.cached:
            return
        before = self._ram.pinned
        if llm not in before and (paths := self._files(llm)):
            held = Held(paths)
            num_bytes = held.num_bytes
            if self._machine_has(num_bytes):
                self._copies.setdefault(llm, _Copy(held))
            else:
                num_bytes = self.capacity_bytes + 1  # streams through
        self._ram.open(llm, num_bytes)
        self._readers[llm] = self._readers.get(llm, 0) + 1
        for gone in before.keys() - self._ram.pinned.keys():
            self._drop(gone, "drop")
        self._note(llm, "load")

    def fill(self, llm: str, stopped: Callable[[], bool]) -> None:
        """Bring its files in, if room is booked for them; without the agent's lock. Gives
        up when ``stopped`` says so, or if they cannot be read."""
        copy = self._copies.get(llm)
        if copy is None or not self._ram.books(llm):
            return
        with copy.reading:
            if copy.read:
                return
            try:
                copy.held.read(stopped)
            except (Cancelled, OSError):
                return
            copy.held.lock()
            copy.read = True
            copy.resident_bytes = copy.held.resident_bytes()

    def end(self, llm: str, *, done: bool) -> None:
        """A load that began has ended; ``done``: its weights have all been read."""
        if not self.cached:
            return
        copy = self._copies.get(llm)
        self._readers[llm] -= 1
        # Read, it is here, also if the engine has failed that was to have it.
        here = copy.read if copy is not None else done
        self._ram.close(llm, done=here)
        if not self._ram.books(llm) and not self._readers[llm]:
            self._drop(llm, "end")
        else:
            self._note(llm, "end")

    def bring(
        self, lock: AbstractContextManager[object], busy: Callable[[], bool]
    ) -> None:
        """Bring in what is `missing`, one LLM after the other, while nobody is ``busy``;
        returns when somebody is, or nothing is missing. Without the agent's lock."""
        while not busy():
            with lock:
                if not (missing := self.missing()):
                    return
                llm = missing[0]
                self.begin(llm, 0)
                if not self._ram.books(llm):
                    self._tried.add(llm)
            self.fill(llm, busy)
            with lock:
                self.end(llm, done=True)

    def look(self) -> bool:
        """See how much of the files is still in memory, from time to time; whether that
        has changed. Without the agent's lock."""
        if self._now_s() - self._looked_s < LOOK_S:
            return False
        self._looked_s = self._now_s()
        changed = False
        for copy in list(self._copies.values()):
            seen = copy.held.resident_bytes() if copy.read else None
            changed |= seen != copy.resident_bytes
            copy.resident_bytes = seen
        return changed

    def rows(self) -> tuple[HostRow, ...]:
        whole = self._ram.pinned
        return tuple(
            HostRow(
                llm=llm,
                held_bytes=num_bytes,
                whole=llm in whole,
                readers=self._readers.get(llm, 0),
                resident_bytes=copy.resident_bytes if copy else None,
                locked=copy is not None and copy.held.locked,
            )
            for llm, num_bytes in self._ram.held.items()
            for copy in (self._copies.get(llm),)
        )

    def close(self) -> None:
        for copy in self._copies.values():
            copy.held.close(drop=False)
        self._copies.clear()

    def _machine_has(self, num_bytes: int) -> bool:
        """Whether what is booked can be true: files are not to push anybody out."""
        free = available_bytes()
        if free is None:
            return True
        for llm, copy in self._copies.items():
            if copy.held.locked and not self._readers.get(llm):
                free += copy.held.num_bytes
        return num_bytes <= (1.0 - SPARE_SHARE) * free

    def _drop(self, llm: str, why: str) -> None:
        copy = self._copies.pop(llm, None)
        if copy is not None:
            copy.held.close(drop=True)
        self._readers.pop(llm, None)
        self._note(llm, why)

    def _note(self, llm: str, why: str) -> None:
        self._log.append(
            "host",
            at_s=self._now_s(),
            llm=llm,
            why=why,
            held=self._ram.held.get(llm, 0),
            readers=self._readers.get(llm, 0),
        )
