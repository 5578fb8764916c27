"""A node's weights in shared memory: read from storage once, copied from by everybody.

Each shard is an anonymous file (memfd), laid out as it will lie on its GPU. Nothing with a
name is left behind, however a process ends. `node_store` hands shards to other processes.

Who has to go when there is no room is `hostram`'s rule, as in the simulator.
"""

from __future__ import annotations

import mmap
import os
import threading
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
        view = np.frombuffer(self._map, np.uint8)
        self.address = int(view.ctypes.data)
        """Of its first byte here."""

    def array(self) -> NDArray[np.uint8]:
        """Its bytes; nobody may write to them, and they live as long as it is open."""
        view = np.frombuffer(self._map, np.uint8)
        view.setflags(write=False)
        return view

    def close(self) -> None:
        """Any number of calls. Raises `BufferError` while somebody has an `array`."""
        if not self._closed:
            self._map.close()
            self._closed = True
            self._done()


class Store(Protocol):
    """Where a process gets shards from: `HostStore`, or `node_store.RemoteStore`."""

    def open(self, key: str, stop: Stop = ...) -> Shared | None:
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
            while key in self._filling:
                self._wait_for_read(key, stop)
            self._ram.keep = frozenset(
                known
                for known in (*self._ram.reserved, key)
                if known.startswith(self._kept)
            )
            whole = self._ram.open(key, num_bytes)
            self._drop_images()
            if whole:
                return os.dup(self._images[key]), num_bytes
            if not self._ram.reserved.get(key):
                self._ram.close(key, done=False)
                return None
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
                elif fd >= 0:
                    os.close(fd)
                self._changed.notify_all()
        return own, num_bytes

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

    def give_back(self, key: str) -> None:
        """Nothing copies any more from what was lent once."""
        with self._changed:
            if key in self._ram.reserved:
                self._ram.close(key, done=False)

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
