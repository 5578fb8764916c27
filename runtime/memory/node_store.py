"""A node's store, shared by processes: over a socket that only this user can reach.

A connection is one shard: who wants it says its key, and gets its descriptor; while it is
still being read, he is told how far it is. It is his until he closes the connection or is
gone, however he went; a read goes on as long as anybody has it.
What he does not copy from any more he keeps open all the same, mapped (and pinned, for a
GPU) for the next time, until the store asks for it, or ends.
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
from foreserve.runtime.memory.filling import Filling, Stop
from foreserve.runtime.memory.safetensors import Stopped
from foreserve.runtime.memory.store import HostStore, Shared, StoreFailed

UNUSED, AGAIN = b".", b">"
"""What is said of a shard to the store: nobody uses it here, and then again."""
MOST_ASKED_BYTES = 16 * 1024**2
LOOK_S = 0.02
"""Between two looks at whether somebody still waits."""
SILENT_S = 5.0
"""Who waits for the store asks after so long whether it is still alive, and how long it
may take to say so."""


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
        """Until it leaves. Before a shard is whole, what can be read is its end."""

        def back() -> None:
            with suppress(OSError):
                client.send(b'{"back": true}\n', socket.MSG_DONTWAIT)

        try:
            lent = self._store.lend(key)
        except (ForeserveError, OSError) as error:
            _send(client, {"error": str(error)})
            return
        if lent is None:
            _send(client, {"error": None})
            return
        fd, filling = lent
        try:
            ready = filling.ready_bytes
            try:
                _send(client, {"bytes": filling.num_bytes, "ready": ready}, fd)
            finally:
                os.close(fd)
            self._tell(client, filling, ready)
            while said := client.recv(1):
                if said == UNUSED:
                    self._store.unused(key, back)
                else:
                    self._store.used_again(key, back)
        finally:
            self._store.give_back(key, back)

    def _tell(self, client: socket.socket, filling: Filling, told: int) -> None:
        """How far it is, until it is whole, or the client leaves."""
        try:
            while told < filling.num_bytes and not _says(client, 0.0):
                ready = filling.wait(told, LOOK_S)
                if ready > told:
                    told = ready
                    _send(client, {"ready": told})
        except StoreFailed as error:
            _send(client, {"error": str(error)})

    def close(self) -> None:
        """Answers nobody any more; what processes have mapped stays theirs."""
        # A thread that waits in `accept` would go on waiting.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in tuple(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


class _Held:
    """A shard that this process has open, in use or not."""

    def __init__(self, key: str, shared: Shared, link: socket.socket) -> None:
        self.key, self.shared, self.link = key, shared, link
        self.users = 1
        self.wanted = False
        """By the store, or it is gone."""
        self._heard = b""

    def say(self, what: bytes) -> None:
        """To the store, if it is there."""
        with suppress(OSError):
            self.link.send(what, socket.MSG_DONTWAIT)

    def hear(self, data: bytes) -> bool:
        """What the store says of it, b"" if it is gone; whether that is all."""
        *lines, self._heard = (self._heard + data).split(b"\n")
        for told in map(json.loads, lines):
            if "ready" in told:
                self.shared.filling.reach(told["ready"])
            elif "error" in told:
                self.fail(StoreFailed(told["error"]))
                return True
            else:
                return True
        if not data:
            self.fail(StoreGone("the node's store is gone"))
        return not data

    def fail(self, error: StoreFailed) -> None:
        """What is not there yet will not come."""
        self.shared.filling.fail(error)


class _Use:
    """One use of what is held: an `Opened`."""

    def __init__(self, held: _Held, done: Callable[[_Held], None]) -> None:
        shared = held.shared
        self.address, self.num_bytes = shared.address, shared.num_bytes
        self.filling, self.array, self.once = shared.filling, shared.array, shared.once
        self._held, self._done = held, done

    def close(self) -> None:
        """Any number of calls."""
        done, self._done = self._done, lambda _: None
        done(self._held)


class _Watch:
    """A thread that sees what the store says of what is open."""

    def __init__(
        self, wanted: Callable[[_Held], None], look: Callable[[float], object]
    ) -> None:
        """``wanted`` is called for each one once, unless this is closed before. ``look``:
        `RemoteStore.look`."""
        self._wanted, self._look = wanted, look
        self._links: dict[int, _Held] = {}
        self._poll, self._end = select.epoll(), os.eventfd(0)
        self._poll.register(self._end, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, held: _Held) -> None:
        self._links[held.link.fileno()] = held
        self._poll.register(held.link, select.EPOLLIN)

    def _run(self) -> None:
        while True:
            found = self._poll.poll(SILENT_S)
            for number, _ in found:
                if number == self._end:
                    return
                held = self._links[number]
                try:
                    data = held.link.recv(65536, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if held.hear(data):
                    self._poll.unregister(number)
                    self._wanted(self._links.pop(number))
            if not found:
                self._check()

    def _check(self) -> None:
        """Whether the store is alive, if somebody waits for more of a shard."""
        waiting = [
            held
            for held in tuple(self._links.values())
            if not held.shared.filling.whole
        ]
        if waiting:
            try:
                self._look(SILENT_S)
            except StoreGone as error:
                for held in waiting:
                    held.fail(error)

    def close(self) -> None:
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._poll.close()
        os.close(self._end)


class RemoteStore:
    """The node's store, as another process sees it: a `Store`. Any thread. It need not be
    there yet, and may be another one each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, _Held] = {}
        """By key, those that may be used again."""
        self._lock = threading.Lock()
        self._watch: _Watch | None = None
        """Since something was opened."""

    def open(self, key: str, stop: Stop = lambda: False) -> _Use | None:
        """As `Store.open`; raises `StoreFailed` with the store's reason, `StoreGone`."""
        with self._lock:
            use = self._use(key)
        if use is not None:
            return use
        link = self._ask({"key": key})
        looks = count(1)

        def check() -> None:
            if stop():
                raise Stopped(f"{key}: not wanted any more")
            if next(looks) % int(SILENT_S / LOOK_S) == 0:
                self.look(SILENT_S)

        try:
            told, more, fds = _told(link, check)
            if "bytes" in told:
                filling = Filling(told["bytes"], told["ready"])
                held = _Held(key, Shared(fds[0], filling, link.close), link)
                return self._hold(held, more)
            if told["error"] is not None:
                raise StoreFailed(told["error"])
        except BaseException:
            link.close()
            raise
        link.close()
        return None

    def _use(self, key: str) -> _Use | None:
        """With the lock: one use more of what is held."""
        held = self._held.get(key)
        if held is None or held.shared.filling.failed:
            return None
        held.users += 1
        if held.users == 1:
            held.say(AGAIN)
        return _Use(held, self._used)

    def _hold(self, held: _Held, heard: bytes) -> _Use:
        """``heard`` already of it."""
        with self._lock:
            # Two threads may have asked at once: one copy is enough.
            use = self._use(held.key)
            if use is None:
                self._held[held.key] = held
                if heard:
                    held.hear(heard)
                self._watch = self._watch or _Watch(self._wanted, self.look)
                self._watch.add(held)
                return _Use(held, self._used)
        held.shared.close()
        return use

    def _used(self, held: _Held) -> None:
        with self._lock:
            held.users -= 1
            if held.users:
                return
            if not held.wanted:
                if held.shared.filling.whole:
                    held.say(UNUSED)
                else:
                    # The store sees it at once; the watch closes it.
                    self._forget(held)
                    held.link.shutdown(socket.SHUT_RDWR)
                return
        held.shared.close()

    def _wanted(self, held: _Held) -> None:
        """By the store, or it has left it behind."""
        with self._lock:
            self._forget(held)
            held.wanted = True
            if held.users:
                return
        held.shared.close()

    def _forget(self, held: _Held) -> None:
        if self._held.get(held.key) is held:
            del self._held[held.key]

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
        """Nothing is kept open any more; what is in use is closed by who has opened it."""
        with self._lock:
            held, watch = tuple(self._held.values()), self._watch
            self._watch = None
        if watch is not None:
            watch.close()
        for one in held:
            one.fail(StoreGone("closed"))
            self._wanted(one)

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
) -> tuple[dict[str, Any], bytes, list[int]]:
    """Its answer, and what came behind it; ``check`` is called while there is none."""
    try:
        while not _says(link, LOOK_S):
            check()
        data, fds, _, _ = socket.recv_fds(link, 65536, 1)
    except OSError as error:
        raise StoreGone(f"the node's store is gone: {error}") from error
    if not data:
        raise StoreGone("the node's store is gone")
    line, _, more = data.partition(b"\n")
    return json.loads(line), more, fds


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
