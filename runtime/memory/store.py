"""A node's weights in shared memory: read from storage once, copied from by everybody.

Each shard is an anonymous file (memfd), laid out as it will lie on its GPU. Nothing with a
name is left behind, however a process ends. `node_store` hands shards to other processes.

Who has to go when there is no room is `hostram`'s rule, as in the simulator.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import ForeserveError
from foreserve.runtime.hostram import HostRam
from foreserve.runtime.memory.safetensors import Stopped

Stop = Callable[[], bool]
"""Whether nobody waits any more; quick."""

Fill = Callable[[NDArray[np.uint8], int, Stop], None]
"""Writes a shard's bytes from that offset on, as many as the memory has; `Stopped` soon
after nobody waits."""

Shards = Callable[[str], tuple[int, Fill]]
"""What may be asked for: bytes of the shard of that key, and how to read it. Raises a
`ForeserveError` for a key that it does not know."""

BACK_S = 0.5
"""Who has a shard open that he does not copy from may take so long to close it."""
LOOK_S = 0.02
"""Between two looks of who waits for another one's read at whether he still does."""


class StoreFailed(ForeserveError):
    """The store did not give what it was asked for; one line says why."""


class Shared:
    """One shard, mapped into this process. Close it when nothing copies from it."""

    def __init__(self, fd: int, num_bytes: int, done: Callable[[], None]) -> None:
        """``done`` is called once, by `close`. ``fd`` is closed at once: the mapping
        keeps the memory."""
        self.num_bytes = num_bytes
        try:
            self._map = mmap.mmap(fd, num_bytes)
        finally:
            os.close(fd)
        self._done = done
        self._closed = False
        self._ends: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        view = np.frombuffer(self._map, np.uint8)
        self.address = int(view.ctypes.data)
        """Of its first byte here."""

    def array(self) -> NDArray[np.uint8]:
        """Its bytes; nobody may write to them, and they live as long as it is open."""
        view = np.frombuffer(self._map, np.uint8)
        view.setflags(write=False)
        return view

    def once(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """As `Opened.once`."""
        with self._lock:
            if not self._ends:
                begin()
                self._ends.append(end)

    def close(self) -> None:
        """Any number of calls. Raises `BufferError` while somebody has an `array`."""
        with self._lock:
            if self._closed:
                return
            while self._ends:
                self._ends.pop()()
            self._map.close()
            self._closed = True
        self._done()


class Opened(Protocol):
    """A shard that can be copied from until it is closed."""

    @property
    def address(self) -> int:
        """Of its first byte in this process."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def once(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Call ``begin`` unless that has been done since it was mapped, and ``end`` before
        it is unmapped, which may be long after `close`, and by another thread."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """Where a process gets shards from: `HostStore`, or `node_store.RemoteStore`."""

    def open(self, key: str, stop: Stop = ...) -> Opened | None:
        """The shard of that key, read from storage if it is not here; whoever asks at the
        same time waits for the same read. None if there is no room for it beside what is
        copied from now. Raises what reading it raises, and `Stopped` soon after ``stop``
        says so."""
        ...

    def close(self) -> None: ...


class HostStore:
    """All shards of one node, in this process. Any thread."""

    def __init__(self, num_bytes: int, shards: Shards) -> None:
        """``num_bytes``: most memory for them."""
        self._shards = shards
        self._ram = HostRam(num_bytes)
        self._images: dict[str, int] = {}
        """File descriptors, of shards that are here as a whole."""
        self._filling: dict[str, int] = {}
        """How many wait for each read under way, but for who reads."""
        self._kept: tuple[str, ...] = ()
        self._backs: dict[str, list[Callable[[], None]]] = {}
        """Of those who have a shard open and do not use it: how to ask for it."""
        self._uses: Counter[str] = Counter()
        """How many use each one."""
        self._changed = threading.Condition()
        self.read_bytes = 0
        """From storage so far, of shards that were read to their end."""

    @property
    def held_bytes(self) -> int:
        with self._changed:
            return self._ram.held_bytes

    def __contains__(self, key: str) -> bool:
        with self._changed:
            return key in self._images

    def keep(self, prefixes: Sequence[str]) -> None:
        """Shards whose keys begin with one of these go only for each other."""
        with self._changed:
            self._kept = tuple(prefixes)

    def open(self, key: str, stop: Stop = lambda: False) -> Shared | None:
        """As `Store.open`."""
        image = self.lend(key, stop)
        if image is None:
            return None
        fd, num_bytes = image
        try:
            return Shared(fd, num_bytes, lambda: self.give_back(key))
        except BaseException:
            self.give_back(key)
            raise

    def lend(self, key: str, stop: Stop) -> tuple[int, int] | None:
        """As `open`: a descriptor of its own for the caller, and how many bytes. He is a
        reader until he has called `give_back`."""
        num_bytes, fill = self._shards(key)
        with self._changed:
            found = self._begin(key, num_bytes, stop)
            if found is None and self._ask_back(key, num_bytes):
                found = self._begin(key, num_bytes, stop)
            if found is None:
                return None
            self._uses[key] += 1
            if found:
                return os.dup(self._images[key]), num_bytes
            self._filling[key] = 0
        fd, done, own = -1, False, -1
        try:
            fd = os.memfd_create("foreserve-weights")
            os.ftruncate(fd, num_bytes)
            memory = np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)
            # It goes on for those who wait for it, also if who began it has left.
            fill(memory, 0, lambda: not self._filling[key] and stop())
            done = True
        finally:
            with self._changed:
                del self._filling[key]
                self._ram.close(key, done=done)
                if done:
                    self._images[key], own = fd, os.dup(fd)
                    self._ram.open(key, num_bytes)
                    self.read_bytes += num_bytes
                else:
                    self._uses[key] -= 1
                    if fd >= 0:
                        os.close(fd)
                self._changed.notify_all()
        return own, num_bytes

    def _begin(self, key: str, num_bytes: int, stop: Stop) -> bool | None:
        """With the lock: one reader more; whether it is here, None if there is no room."""
        while key in self._filling:
            self._wait_for_read(key, stop)
        self._ram.keep = frozenset(
            known
            for known in (*self._ram.reserved, key)
            if known.startswith(self._kept)
        )
        whole = self._ram.open(key, num_bytes)
        self._drop_images()
        if whole or self._ram.reserved.get(key):
            return whole
        self._ram.close(key, done=False)
        return None

    def _ask_back(self, key: str, num_bytes: int) -> bool:
        """With the lock: have those closed that nobody uses and whose place it could take,
        in the order in which they would go; whether that may do."""
        ram = self._ram
        missing, asked = num_bytes - (ram.num_bytes - ram.held_bytes), []
        for other, held in sorted(
            ram.held.items(), key=lambda item: item[0] in ram.keep
        ):
            mine = other not in ram.keep or key in ram.keep
            if missing > 0 and mine and not self._uses[other]:
                missing -= held
                asked += [other] if other in self._backs else []
        if missing > 0 or not asked:
            return False
        for other in asked:
            for back in self._backs[other]:
                back()
        self._changed.wait_for(lambda: not any(a in self._backs for a in asked), BACK_S)
        return True

    def unused(self, key: str, back: Callable[[], None]) -> None:
        """Who was lent it does not use it for now, and can be asked to give it back:
        ``back`` is quick."""
        with self._changed:
            self._uses[key] -= 1
            self._backs.setdefault(key, []).append(back)

    def used_again(self, key: str, back: Callable[[], None]) -> None:
        with self._changed:
            self._uses[key] += 1
            self._forget(key, back)
            if key in self._images:
                self._ram.open(key, 0)  # the most recently used one
                self._ram.close(key, done=False)

    def _forget(self, key: str, back: Callable[[], None]) -> None:
        self._backs[key].remove(back)
        if not self._backs[key]:
            del self._backs[key]

    def _wait_for_read(self, key: str, stop: Stop) -> None:
        self._filling[key] += 1
        try:
            while key in self._filling:
                if stop():
                    raise Stopped(f"{key}: not wanted any more")
                self._changed.wait(LOOK_S)
        finally:
            if key in self._filling:
                self._filling[key] -= 1

    def give_back(self, key: str, back: Callable[[], None] | None = None) -> None:
        """What was lent once is closed; ``back``: as for `unused`."""
        with self._changed:
            if back is not None and back in self._backs.get(key, ()):
                self._forget(key, back)
            else:
                self._uses[key] -= 1
            if key in self._ram.reserved:
                self._ram.close(key, done=False)
            self._changed.notify_all()

    def _drop_images(self) -> None:
        """Those that had to make room."""
        for key in [k for k in self._images if k not in self._ram.reserved]:
            os.close(self._images.pop(key))

    def close(self) -> None:
        """Let go of all; whoever has one open keeps it."""
        with self._changed:
            for fd in self._images.values():
                os.close(fd)
            self._images.clear()
            self._ram.clear()
