"""A node's weights in shared memory: read from storage once, copied from by everybody,
also while they are still being read (`filling`).

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
from foreserve.runtime.memory.filling import Fill, Filling, Stop, windows
from foreserve.runtime.memory.safetensors import Stopped

Shards = Callable[[str], tuple[int, Fill]]
"""What may be asked for: bytes of the shard of that key, and how to read it. Raises a
`ForeserveError` for a key that it does not know."""

BACK_S = 0.5
"""Who has a shard open that he does not copy from may take so long to close it, and a read
that nobody waits for to end."""


class StoreFailed(ForeserveError):
    """The store did not give what it was asked for; one line says why."""


class Shared:
    """One shard, mapped into this process. Close it when nothing copies from it."""

    def __init__(self, fd: int, filling: Filling, done: Callable[[], None]) -> None:
        """``done`` is called once, by `close`. ``fd`` is closed at once: the mapping
        keeps the memory."""
        self.filling, self.num_bytes = filling, filling.num_bytes
        try:
            self._map = mmap.mmap(fd, self.num_bytes)
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
        """Its bytes, which may still be on their way; nobody may write to them, and they
        live as long as it is open."""
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

    @property
    def filling(self) -> Filling:
        """How much of it is there."""
        ...

    def once(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Call ``begin`` unless that has been done since it was mapped, and ``end`` before
        it is unmapped, which may be long after `close`, and by another thread."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """Where a process gets shards from: `HostStore`, or `node_store.RemoteStore`."""

    def open(self, key: str, stop: Stop = ...) -> Opened | None:
        """The shard of that key, which is read from storage if it is not here, once for
        all who have it open meanwhile, and only until they have closed it. None if there is
        no room for it beside what is copied from now. Raises `StoreFailed` where nothing
        can be read, and `Stopped` soon after ``stop`` says so."""
        ...

    def close(self) -> None: ...


class _Image:
    """A shard's file, which is here or on its way."""

    def __init__(self, num_bytes: int) -> None:
        self.fd = os.memfd_create("foreserve-weights")
        os.ftruncate(self.fd, num_bytes)
        self.filling = Filling(num_bytes)
        self.read = False
        """To its end."""


class HostStore:
    """All shards of one node, in this process. Any thread."""

    def __init__(self, num_bytes: int, shards: Shards) -> None:
        """``num_bytes``: most memory for them."""
        self._shards = shards
        self._ram = HostRam(num_bytes)
        self._images: dict[str, _Image] = {}
        self._kept: tuple[str, ...] = ()
        self._backs: dict[str, list[Callable[[], None]]] = {}
        """Of those who have a shard open and do not use it: how to ask for it."""
        self._uses: Counter[str] = Counter()
        """How many use each one."""
        self._changed = threading.Condition()
        self._closed = False
        self.read_bytes = 0
        """From storage so far, of shards that were read to their end."""

    @property
    def held_bytes(self) -> int:
        with self._changed:
            return self._ram.held_bytes

    def __contains__(self, key: str) -> bool:
        with self._changed:
            return key in self._images and self._images[key].read

    def keep(self, prefixes: Sequence[str]) -> None:
        """Shards whose keys begin with one of these go only for each other."""
        with self._changed:
            self._kept = tuple(prefixes)

    def open(self, key: str, stop: Stop = lambda: False) -> Shared | None:
        """As `Store.open`."""
        image = self.lend(key)
        if image is None:
            return None
        fd, filling = image
        try:
            return Shared(fd, filling, lambda: self.give_back(key))
        except BaseException:
            self.give_back(key)
            raise

    def lend(self, key: str) -> tuple[int, Filling] | None:
        """As `open`: a descriptor of its own for the caller. He is a reader until he has
        called `give_back`."""
        num_bytes, fill = self._shards(key)
        with self._changed:
            if not self._begin(key, num_bytes) and not (
                self._ask_back(key, num_bytes) and self._begin(key, num_bytes)
            ):
                return None
            try:
                image = self._images.get(key) or self._read(key, num_bytes, fill)
                fd = os.dup(image.fd)
            except BaseException:
                self._ram.close(key, done=False)
                raise
            self._uses[key] += 1
            return fd, image.filling

    def _begin(self, key: str, num_bytes: int) -> bool:
        """With the lock: one reader more, if there is room."""
        self._ram.keep = frozenset(
            known
            for known in (*self._ram.reserved, key)
            if known.startswith(self._kept)
        )
        self._ram.open(key, num_bytes)
        self._drop_images()
        if self._ram.reserved.get(key):
            return True
        self._ram.close(key, done=False)
        return False

    def _read(self, key: str, num_bytes: int, fill: Fill) -> _Image:
        """With the lock: begin to read it, for as long as anybody uses it."""
        image = _Image(num_bytes)
        threading.Thread(
            target=self._fill, args=(key, image, fill), daemon=True
        ).start()
        self._images[key] = image
        self._ram.open(key, num_bytes)
        return image

    def _fill(self, key: str, image: _Image, fill: Fill) -> None:
        filling, wanted = image.filling, True
        while wanted:
            failure: StoreFailed | None = None
            wanted = False
            try:
                windows(image.fd, filling, fill, lambda: not self._wanted(key))
            except Exception as error:
                failure = StoreFailed(str(error) or type(error).__name__)
                wanted = isinstance(error, Stopped)
            with self._changed:
                # Somebody may have come just before.
                wanted = wanted and self._wanted(key)
                if not wanted:
                    self._end_read(key, image, done=failure is None)
        if failure is None:
            filling.reach(filling.num_bytes)
        else:
            filling.fail(failure)

    def _wanted(self, key: str) -> bool:
        return self._uses[key] > 0 and not self._closed

    def _end_read(self, key: str, image: _Image, *, done: bool) -> None:
        """With the lock."""
        if self._closed:
            os.close(image.fd)
            return
        self._ram.close(key, done=done)
        if done:
            image.read = True
            self.read_bytes += image.filling.num_bytes
        else:
            os.close(self._images.pop(key).fd)
        self._changed.notify_all()

    def _ask_back(self, key: str, num_bytes: int) -> bool:
        """With the lock: have those closed that nobody uses and whose place it could take,
        in the order in which they would go, read or not; whether that may do."""
        ram = self._ram
        missing, asked = num_bytes - (ram.num_bytes - ram.held_bytes), []
        for other, held in sorted(
            ram.held.items(), key=lambda item: item[0] in ram.keep
        ):
            mine = other not in ram.keep or key in ram.keep
            if missing > 0 and mine and not self._uses[other]:
                missing -= held
                asked += [other] if self._ending(other) else []
        if missing > 0 or not asked:
            return False
        for other in asked:
            for back in self._backs.get(other, ()):
                back()
        self._changed.wait_for(lambda: not any(map(self._ending, asked)), BACK_S)
        return True

    def _ending(self, key: str) -> bool:
        """Of one that nobody uses: whether it will have left when it is asked to."""
        image = self._images.get(key)
        return key in self._backs or (image is not None and not image.read)

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
            os.close(self._images.pop(key).fd)

    def close(self) -> None:
        """Let go of all, and read nothing any more; whoever has one open keeps what is
        there of it."""
        with self._changed:
            self._closed = True
            # Who reads one closes it.
            for image in self._images.values():
                if image.read:
                    os.close(image.fd)
            self._images.clear()
            self._ram.clear()
