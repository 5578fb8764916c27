"""A paged server in this process, behind a real port, for tests of what clients ask."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import asdict
from functools import partial

import httpx
import openai

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.paged import server
from foreserve.runtime.paged.shards import shard
from foreserve.runtime.paged.worker import Worker
from foreserve.runtime.scheduler import POLICIES
from foreserve.runtime.turns import Rules
from tests.test_paged_group import TIME

UNIX_S = 1_700_000_000.75
"""What the wall's clock shows."""


class Stand:
    """LLMs of these folders, ACTIVE, each an engine."""

    def __init__(self, folders, *, pages=200, page_bytes=65536, room_tokens=1024):
        self.deaths, self._connections = [], []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._run(self._serve(pages, page_bytes))
        self.http = httpx.Client(base_url=self.url, timeout=60.0)
        self._clients = [self.http]
        for number, folder in enumerate(folders):
            spec = {
                "served_name": folder.name,
                "checkpoint": str(folder),
                "room_tokens": room_tokens,
                "time": asdict(TIME),
                "exec_s": 0.1,
                "input_tokens": 30.0,
                "output_tokens": 10.0,
                "rate_rps": 1.0,
            }
            self.http.post("/engines", json=spec).raise_for_status()
            for step in ("load", "wake_up"):
                self.http.post(f"/r/{number}/{step}").raise_for_status()

    def _run(self, what):
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(60)

    async def _serve(self, pages, page_bytes):
        make = partial(
            Worker,
            PagePool(PosixMemory(page_bytes, pages)),
            SystemClock(),
            POLICIES["db-mean"].make(),
            dtype="float32",
            store=HostStore(2**28, shard),
            rules=Rules(max_prompt_tokens=64),
        )

        def made(**how):
            return make(**(how | {"on_death": self.deaths.append}))

        self.node = server.Node(self.loop, made, "127.0.0.1", b"", lambda: UNIX_S)
        self._server = await self.loop.create_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _connect(self):
        connection = server.Connection(self.node, b"")
        self._connections.append(connection)
        return connection

    def client(self, number=0):
        base = f"{self.url}/r/{number}/v1"
        client = openai.OpenAI(base_url=base, api_key="-", max_retries=0)
        self._clients.append(client)
        return client

    def close(self):
        for client in self._clients:
            client.close()

        async def close():
            self._server.close()
            for connection in self._connections:
                connection.transport.abort()
            await asyncio.sleep(0)  # They are told of it.

        self._run(close())
        self.node.worker.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        assert self.deaths == []
