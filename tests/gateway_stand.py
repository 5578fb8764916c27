"""A gateway on a real port, with echo engines behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np

from foreserve.models.placement import replica_id
from foreserve.models.specs import GpuId
from foreserve.runtime.gateway.app import public_app
from foreserve.runtime.gateway.gateway import Gateway, Settings
from foreserve.runtime.gateway.job import ServedLlm
from foreserve.runtime.gateway.server import Server
from foreserve.runtime.gateway.table import RequestRecord, Routable, RoutingTable
from tests.echo_engine import EchoEngine

CHAT = "/v1/chat/completions"


def replica(
    url: str, llm: str = "a", gpu: int = 0, cap: int = 4, room: int = 1000
) -> Routable:
    """One on GPU n0/``gpu``."""
    return Routable(
        id=replica_id(llm, (GpuId(node="n0", index=gpu),)),
        url=url,
        max_num_seqs=cap,
        room_tokens=room,
        served_name="echo",
    )


def wait_for(holds: Callable[[], object], within_s: float = 5.0) -> None:
    """Until ``holds()``, which must not take longer than ``within_s``."""
    end_s = time.monotonic() + within_s
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < end_s, "did not come true"
        pause.wait(0.005)


class Stand:
    """Gateway, table and engines; `needs` counts calls of ``on_need``."""

    def __init__(self, engines: int, stack: ExitStack, **options) -> None:
        self.engines = [stack.enter_context(EchoEngine()) for _ in range(engines)]
        self.records: list[RequestRecord] = []
        self.needs = 0
        self.eta = (1.0, 2.0)
        self.failed: list[str] = []
        settings: Settings = options.pop("settings", Settings())
        self.table = RoutingTable(
            lambda: time.monotonic() * settings.time_scale,
            on_need=self._need,
            eta=lambda llm: self.eta,
            ended=self.records.append,
            failed=lambda replica, reason: self.failed.append(reason),
        )
        llms = {"a": ServedLlm(max_model_len=4096), "b": ServedLlm()}
        self.gateway = Gateway(
            table=self.table,
            llms=options.pop("llms", llms),
            rng=np.random.default_rng(0),
            settings=settings,
            keys=options.pop("keys", None),
            plan_id=options.pop("plan_id", lambda: "p1"),
            state=options.pop("state", lambda llm: "absent"),
        )
        self.server = Server(self.gateway, public_app(self.gateway), **options)
        self.server.start()
        stack.callback(self.server.stop, 0.2)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.client = stack.enter_context(httpx.Client(base_url=self.url, timeout=20))
        self.publish_all()

    def _need(self) -> None:
        self.needs += 1

    def publish_all(self, **options) -> None:
        self.table.publish(
            [replica(e.url, gpu=i, **options) for i, e in enumerate(self.engines)]
        )

    def chat(self, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
        fields = {"model": "a", "messages": [{"role": "user", "content": "x"}]} | fields
        return self.client.post(CHAT, json=fields, headers=headers)

    def raw(self, data: bytes) -> bytes:
        """All that comes back on a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.server.port), 10) as sock:
            sock.sendall(data)
            parts = []
            while part := sock.recv(65536):
                parts.append(part)
        return b"".join(parts)

    def last(self) -> RequestRecord:
        """The record of the only request since the last call."""
        wait_for(lambda: self.records)
        (record,) = self.records
        self.records.clear()
        return record


@contextmanager
def stand(engines: int = 1, **options) -> Iterator[Stand]:
    with ExitStack() as stack:
        yield Stand(engines, stack, **options)


def post_bytes(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as it goes over the wire; the connection ends with it."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", *headers]
    head = "\r\n".join([*lines, f"content-length: {len(body)}"])
    return head.encode() + b"\r\n\r\n" + body
