"""Sockets, limits of HTTP itself, and one thread with an event loop for both ports."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import socket
import threading
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from foreserve.models.errors import InvalidInput
from foreserve.runtime.gateway.app import App
from foreserve.runtime.gateway.errors import ApiError
from foreserve.runtime.gateway.gateway import Gateway

HEADER_BYTES = 32 << 10
HEADER_S = 10.0
"""For the head of a request to arrive, from its first byte on."""
CONTINUE = b"HTTP/1.1 100 "
REST_S = 2.0
"""For the rest of a body whose request has been answered already."""


class _Joined:
    """A transport that sends the head of an answer together with what follows it, so that
    the client wakes up once. For one answer."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport, self._loop = transport, loop
        self._head: bytes | None = None
        self._begun = False

    def write(self, data: bytes) -> None:
        if not self._begun and not data.startswith(CONTINUE):
            self._head, self._begun = data, True
            self._loop.call_soon(self._flush)
            return
        if self._head is not None:
            data, self._head = self._head + data, None
        self._transport.write(data)

    def _flush(self) -> None:
        # Nothing has followed: the answer has no body, or not yet.
        if self._head is not None:
            self.write(b"")

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's, with limits on the head of a request, errors that are JSON, and fewer
    writes."""

    _guard: TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _whole = True

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            # Bytes of a body that come with the head are not held against it.
            self._head_bytes += min(len(data), HEADER_BYTES)
            if self._guard is None:
                self._watch(HEADER_S)
        super().data_received(data)
        if self._in_head and self._head_bytes >= HEADER_BYTES:
            self._answer(431, "headers_too_large", "The headers are too large.")

    def on_message_begin(self) -> None:
        self._whole = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._unwatch()
        super().on_headers_complete()
        # Its task has not begun yet.
        self.cycle.transport = _Joined(self.transport, self.loop)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        self._whole = self._in_head = True
        self._unwatch()
        if self.cycle.response_complete:
            # uvicorn waits for the next request only from the answer on.
            self._watch(self.timeout_keep_alive)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._whole and not self.transport.is_closing():
            self._watch(REST_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._answer(400, "invalid_http", msg)

    def _watch(self, limit_s: float) -> None:
        self._unwatch()
        self._guard = self.loop.call_later(limit_s, self._too_slow)

    def _unwatch(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None

    def _too_slow(self) -> None:
        self._guard = None
        if self._in_head and (self.cycle is None or self.cycle.response_complete):
            self._answer(408, "headers_too_slow", "The headers came too slowly.")
        elif not self.transport.is_closing():
            self.transport.close()

    def _answer(self, status: int, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        body = ApiError(status, "invalid_request_error", code, message).body()
        head = (
            b"content-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


class Server:
    """Serves the public port, and the admin port if there is one, in its own thread."""

    def __init__(
        self,
        gateway: Gateway,
        public: App,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        admin: App | None = None,
        admin_host: str = "127.0.0.1",
        admin_port: int = 0,
        open_to_all: bool = False,
    ) -> None:
        if not (gateway.keys.required or open_to_all or _is_loopback(host)):
            raise InvalidInput(
                f"{host} is reachable from elsewhere, and there are no API keys",
                hint="give a file of keys, or --insecure",
            )
        self._gateway = gateway
        self._sockets = [_listen(host, port)]
        self.port: int = self._sockets[0].getsockname()[1]
        self._apps = [public]
        self.admin_port: int | None = None
        if admin is not None:
            self._sockets.append(_listen(admin_host, admin_port))
            self.admin_port = self._sockets[1].getsockname()[1]
            self._apps.append(admin)
        self._servers: list[uvicorn.Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def start(self) -> None:
        """Serve; returns when both ports answer."""
        # A stream needs two files, and many systems begin with 1,024.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._thread.start()
        self._up.wait()

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no new requests, let streams end for ``grace_s``, then break them off with
        an error. Returns when all is closed."""
        loop = self._loop
        if loop is None or not self._thread.is_alive():
            return

        def shut() -> None:
            self._gateway.shut()
            for server in self._servers:
                server.config.timeout_graceful_shutdown = max(1, round(grace_s))
                server.should_exit = True

        loop.call_soon_threadsafe(shut)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._servers = [uvicorn.Server(_config(app)) for app in self._apps]
        try:
            async with asyncio.TaskGroup() as group:
                for server, sock in zip(self._servers, self._sockets, strict=True):
                    group.create_task(server.serve([sock]))
                while not all(server.started for server in self._servers):
                    await asyncio.sleep(0.005)
                self._up.set()
            tasks = [t for s in self._servers for t in s.server_state.tasks]
            if tasks:
                # Those that were cancelled say so to their clients.
                await asyncio.wait(tasks, timeout=1.0)
        finally:
            self._up.set()
            self._gateway.close()


def _config(app: App) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    served: Callable[..., Any] = app
    return uvicorn.Config(
        served,
        http=GuardedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without naming TCP, some event loops would not send small pieces at once.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise InvalidInput(f"cannot listen on {host}:{port}: {error}") from None
    return sock


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
