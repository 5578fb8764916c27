"""A node's store, shared by processes: over a socket that only this user can reach.

A connection is one shard: who wants it says its key, and gets its descriptor. It is his
until he closes the connection or is gone, however he went; who leaves before has cancelled.
What he has mapped stays his, also if the store ends.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from foreserve.models.errors import ForeserveError
from foreserve.runtime.memory.safetensors import Stopped
from foreserve.runtime.memory.store import LOOK_S, HostStore, Shared, Stop, StoreFailed

MOST_ASKED_BYTES = 16 * 1024**2
SILENT_S = 5.0
"""Between two questions, of who waits for a read, whether the store is still alive, and
how long it may take to say so."""


class StoreGone(StoreFailed):
    """No store answers; another one may have what is wanted."""


def listen(path: Path) -> socket.socket:
    """Where a store is to be found. What was there before, is not any more."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _name(path) as name:
            listener.bind(name)
        path.chmod(0o600)
        # Nobody can connect before this.
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def _name(path: Path) -> Iterator[str]:
    """Of it, short enough for a socket's address wherever it lies."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class StoreServer:
    """Lends the shards of a store to other processes. One thread for each shard that
    somebody has."""

    def __init__(self, store: HostStore, listener: socket.socket) -> None:
        """Begins at once; the listener is its own from now on."""
        self._store, self._listener = store, listener
        self._clients: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as lines:
                asked = json.loads(lines.readline(MOST_ASKED_BYTES))
                if "key" in asked:
                    self._lend(client, str(asked["key"]))
                elif "keep" in asked:
                    self._store.keep(list(map(str, asked["keep"])))
                else:
                    _send(client, self._told())
        except (OSError, ValueError, TypeError):
            pass  # It is gone, or no client of ours.
        finally:
            self._clients.discard(client)

    def _told(self) -> dict[str, Any]:
        return {
            "held_bytes": self._store.held_bytes,
            "read_bytes": self._store.read_bytes,
        }

    def _lend(self, client: socket.socket, key: str) -> None:
        """Until it leaves: it says nothing more, so what can be read is its end."""
        try:
            image = self._store.lend(key, lambda: _says(client, 0.0))
        except Stopped:
            return
        except (ForeserveError, OSError) as error:
            _send(client, {"error": str(error)})
            return
        if image is None:
            _send(client, {"error": None})
            return
        fd, num_bytes = image
        try:
            try:
                _send(client, {"num_bytes": num_bytes}, fd)
            finally:
                os.close(fd)
            client.recv(1)
        finally:
            self._store.give_back(key)

    def close(self) -> None:
        """Answers nobody any more; what processes have mapped stays theirs."""
        # A thread that waits in `accept` would go on waiting.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in tuple(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


class RemoteStore:
    """The node's store, as another process sees it: a `Store`. Any thread. It need not be
    there yet, and may be another one each time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, key: str, stop: Stop = lambda: False) -> Shared | None:
        """As `Store.open`; raises `StoreFailed` with the store's reason, `StoreGone`."""
        link = self._ask({"key": key})
        looks = count(1)

        def check() -> None:
            if stop():
                raise Stopped(f"{key}: not wanted any more")
            if next(looks) % int(SILENT_S / LOOK_S) == 0:
                self.look(SILENT_S)

        try:
            told, fds = _told(link, check)
            if "num_bytes" in told:
                return Shared(fds[0], told["num_bytes"], link.close)
            if told["error"] is not None:
                raise StoreFailed(told["error"])
        except BaseException:
            link.close()
            raise
        link.close()
        return None

    def look(self, within_s: float) -> dict[str, int]:
        """``held_bytes`` now, ``read_bytes`` so far. Raises `StoreGone`, also if it does
        not answer in time."""
        with self._ask({}) as link:
            if not _says(link, within_s):
                raise StoreGone(f"the node's store said nothing for {within_s:g} s")
            return _told(link, lambda: None)[0]

    def keep(self, prefixes: Sequence[str]) -> None:
        """As `HostStore.keep`; does not wait for it. Raises `StoreGone`."""
        self._ask({"keep": list(prefixes)}).close()

    def close(self) -> None:
        """What was opened is closed by who has opened it."""

    def _ask(self, asked: dict[str, Any]) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _name(self._path) as name:
                link.connect(name)
            _send(link, asked)
        except OSError as error:
            link.close()
            raise StoreGone(f"the node's store is gone: {error}") from error
        return link


def _told(
    link: socket.socket, check: Callable[[], None]
) -> tuple[dict[str, Any], list[int]]:
    """Its answer; ``check`` is called while there is none."""
    try:
        while not _says(link, LOOK_S):
            check()
        data, fds, _, _ = socket.recv_fds(link, 65536, 1)
    except OSError as error:
        raise StoreGone(f"the node's store is gone: {error}") from error
    if not data:
        raise StoreGone("the node's store is gone")
    return json.loads(data), fds


def _says(peer: socket.socket, within_s: float) -> bool:
    """Whether there is something to be read from it, if only its end."""
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def _send(peer: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    data = json.dumps(message).encode() + b"\n"
    if fd is None:
        peer.sendall(data)
    else:
        socket.send_fds(peer, [data], [fd])
