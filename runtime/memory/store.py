"""A node's weights in shared memory: read from storage once, copied from by everybody.

Each shard is an anonymous file (memfd), laid out as it will lie on its GPU. Other processes
of the node get its descriptor over a local socket and map it; what they hold is theirs
until they close it or are gone, however they went: nothing with a name is left behind.

Who has to go when there is no room is `hostram`'s rule, as in the simulator.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import ForeserveError
from foreserve.runtime.hostram import HostRam

Fill = Callable[[NDArray[np.uint8]], None]
"""Writes a shard into its memory, from storage."""

Shards = Callable[[str], tuple[int, Fill]]
"""What the store may be asked for: bytes of the shard of that key, and how to read it.
Raises a `ForeserveError` for a key that it does not know."""


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


class HostStore:
    """All shards of one node, in this process. Any thread."""

    def __init__(self, num_bytes: int, shards: Shards) -> None:
        """``num_bytes``: most memory for them."""
        self._shards = shards
        self._ram = HostRam(num_bytes)
        self._images: dict[str, int] = {}
        """File descriptors, of shards that are here as a whole."""
        self._filling: set[str] = set()
        self._changed = threading.Condition()
        self.read_bytes = 0
        """From storage so far."""

    @property
    def held_bytes(self) -> int:
        with self._changed:
            return self._ram.held_bytes

    def __contains__(self, key: str) -> bool:
        with self._changed:
            return key in self._images

    def open(self, key: str) -> Shared | None:
        """The shard of that key, read from storage if it is not here; whoever asks at the
        same time waits for the same read. None if there is no room for it beside what is
        copied from now. Raises what reading it raises."""
        image = self._open(key)
        if image is None:
            return None
        fd, num_bytes = image
        try:
            return Shared(fd, num_bytes, lambda: self._close(key))
        except BaseException:
            self._close(key)
            raise

    def _open(self, key: str) -> tuple[int, int] | None:
        """A descriptor of its own for the caller, who is a reader until `_close`."""
        num_bytes, fill = self._shards(key)
        with self._changed:
            self._changed.wait_for(lambda: key not in self._filling)
            whole = self._ram.open(key, num_bytes)
            self._drop_images()
            if whole:
                return os.dup(self._images[key]), num_bytes
            if not self._ram.reserved.get(key):
                self._ram.close(key, done=False)
                return None
            self._filling.add(key)
        fd = os.memfd_create("foreserve-weights")
        done, own = False, -1
        try:
            os.ftruncate(fd, num_bytes)
            fill(np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8))
            done = True
        finally:
            with self._changed:
                self._filling.discard(key)
                self._ram.close(key, done=done)
                if done:
                    self._images[key], own = fd, os.dup(fd)
                    self._ram.open(key, num_bytes)
                    self.read_bytes += num_bytes
                else:
                    os.close(fd)
                self._changed.notify_all()
        return own, num_bytes

    def _close(self, key: str) -> None:
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


class StoreServer:
    """Hands the shards of a store to other processes of the node, over a socket that only
    this user can reach. One thread for each process."""

    def __init__(self, store: HostStore, path: Path) -> None:
        self._store = store
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(before)
        self._path = path
        self._socket.listen()
        self._clients: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Requests are lines; what the process opened ends with its connection."""
        opened: list[str] = []
        try:
            with client, client.makefile("r") as lines:
                for line in lines:
                    self._answer(client, json.loads(line), opened)
        except (OSError, ValueError, KeyError):
            pass  # It is gone, or no client of ours.
        finally:
            self._clients.discard(client)
            for key in opened:
                self._store._close(key)

    def _answer(
        self, client: socket.socket, asked: dict[str, Any], opened: list[str]
    ) -> None:
        key = str(asked["key"])
        if asked.get("close"):
            opened.remove(key)
            self._store._close(key)
            return
        try:
            image = self._store._open(key)
        except (ForeserveError, OSError) as error:
            _send(client, {"error": str(error)})
            return
        if image is None:
            _send(client, {"error": None})
            return
        fd, num_bytes = image
        opened.append(key)
        try:
            _send(client, {"num_bytes": num_bytes}, fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Answers nobody any more; what processes have mapped stays theirs."""
        # A thread that waits in `accept` would go on waiting.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        for client in tuple(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


class RemoteStore:
    """The node's store, as another process sees it. Any thread."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._lock = threading.Lock()

    def open(self, key: str) -> Shared | None:
        """As `HostStore.open`; raises `StoreFailed` with the store's reason."""
        with self._lock:
            try:
                _send(self._socket, {"key": key})
                data, fds, _, _ = socket.recv_fds(self._socket, 65536, 1)
            except OSError as error:
                raise StoreFailed(f"the node's store is gone: {error}") from error
            if not data:
                raise StoreFailed("the node's store is gone")
        found = json.loads(data)
        if "num_bytes" not in found:
            if found["error"] is None:
                return None
            raise StoreFailed(found["error"])
        return Shared(fds[0], found["num_bytes"], lambda: self._forget(key))

    def _forget(self, key: str) -> None:
        with self._lock, suppress(OSError):
            _send(self._socket, {"key": key, "close": True})

    def close(self) -> None:
        """All that was opened is the store's again."""
        self._socket.close()


def _send(peer: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    data = json.dumps(message).encode() + b"\n"
    if fd is None:
        peer.sendall(data)
    else:
        socket.send_fds(peer, [data], [fd])
