"""The server of one GPU group: real LLMs behind one port, engine ``n`` under ``/r/n``.

The routes are those of `engines.simulated_server`: OpenAI's, health, metrics, sleep and
wake; ``POST /engines`` makes an engine, ``POST /r/n/load`` returns when its weights are
there, ``DELETE /r/n`` ends it, ``GET /pool`` tells of the pages. The loop here does HTTP;
iterations run in the worker's thread, which hands over what was said after each of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreserve.models.errors import ForeserveError
from foreserve.runtime.clock import SystemClock, unix_s
from foreserve.runtime.engines.bodies import Refused, object_of
from foreserve.runtime.engines.hosted import KEY, NO_ROOM
from foreserve.runtime.engines.http import HttpConnection
from foreserve.runtime.memory.cuda import CudaMemory
from foreserve.runtime.memory.node_store import RemoteStore
from foreserve.runtime.memory.pool import Memory, PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.paged.answers import Answer, Engine, News
from foreserve.runtime.paged.asked import understand
from foreserve.runtime.paged.exchange import Exchange
from foreserve.runtime.paged.following import Door, Followers
from foreserve.runtime.paged.layout import Part
from foreserve.runtime.paged.loads import LoadFailed, NoRoom
from foreserve.runtime.paged.worker import Worker
from foreserve.runtime.scheduler import POLICIES
from foreserve.runtime.turns import Rules


class Node:
    """The group's worker and its engines, on the event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Callable[..., Worker],
        host: str,
        key: bytes,
        unix_s: Callable[[], float] = unix_s,
    ) -> None:
        """``host``: where it listens; ``unix_s``: the wall's clock."""
        self.unix_s = unix_s
        self.loop = loop
        self._host, self._key = host, key
        self.news: list[Answer] = []
        """For the worker's thread: answers of which there is some."""
        self.worker = make(on_step=self._stepped, on_death=_die)
        self.door = Door(self.worker, host, key)
        self.engines: dict[int, Engine] = {}
        self.made = self.answers = 0
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="states")
        self.chance = np.random.default_rng()

    def gather(self, ports: Sequence[int]) -> Followers:
        return Followers(self._host, ports, self._key)

    def submit(self, exchange: Exchange) -> None:
        def submit() -> None:
            group, jobs = self.worker.group, [one.job for one in exchange.answers]
            for i, job in enumerate(jobs):
                try:
                    group.submit(job)
                except BaseException:
                    for other in jobs[:i]:
                        group.cancel(other)
                    raise

        self.worker.ask(submit).add_done_callback(partial(self._submitted, exchange))

    def _submitted(self, exchange: Exchange, done: Future[None]) -> None:
        """In the worker's thread."""
        error = done.exception()
        if error is not None:
            self.loop.call_soon_threadsafe(exchange.reject, error)

    def _stepped(self) -> None:
        """In the worker's thread: hand over what was said."""
        if self.news:
            told = [(answer, answer.take()) for answer in self.news]
            self.news.clear()
            self.loop.call_soon_threadsafe(self._deliver, told)

    def _deliver(self, told: list[tuple[Answer, News]]) -> None:
        for answer, news in told:
            answer.hear(news)

    def outside(
        self, action: Callable[[], object], done: Callable[[BaseException | None], None]
    ) -> None:
        """Have it done by a thread, then call ``done`` on the loop."""

        def ended(future: Future[object]) -> None:
            self.loop.call_soon_threadsafe(done, future.exception())

        self._threads.submit(action).add_done_callback(ended)


class Connection(HttpConnection):
    """One client connection."""

    def __init__(self, node: Node, key: bytes) -> None:
        super().__init__(key)
        self.node = node
        self.exchange: Exchange | None = None
        """Requests for tokens that it waits for."""
        self._waits = False

    @property
    def occupied(self) -> bool:
        return self._waits or self.exchange is not None

    def left(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.cancel()

    # --- routes --------------------------------------------------------------------------

    def handle(self, method: str, path: str, body: bytes) -> None:
        node = self.node
        if path.startswith("/r/"):
            number, _, rest = path[3:].partition("/")
            engine = node.engines.get(int(number)) if number.isdigit() else None
            if engine is None:
                self.abort()  # As where no process listens any more.
                return
            self._route(engine, method, rest, body)
        elif (method, path) == ("POST", "/engines"):
            engine = Engine(node.made, object_of(body), node.unix_s())
            node.engines[node.made] = engine
            node.made += 1
            self.json({"number": engine.number})
        elif (method, path) == ("GET", "/health"):
            self.json({})
        elif (method, path) == ("GET", "/pool"):
            pool = node.worker.pool
            used, door = pool.capacity - pool.free, node.door.port
            self.json({"pages": pool.capacity, "used": used, "door": door})
        else:
            raise Refused(404, "Not Found")

    def _route(self, engine: Engine, method: str, path: str, body: bytes) -> None:
        node = self.node
        plain: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "health"): dict,
            ("GET", "version"): lambda: {"version": "paged"},
            ("GET", "is_sleeping"): lambda: {"is_sleeping": not self._awake(engine)},
            ("GET", "needs"): lambda: {"bytes": self._needs(engine)},
            ("GET", "v1/models"): lambda: self._models(engine),
        }
        if (method, path) == ("DELETE", ""):
            self._delete(engine)
        elif (method, path) == ("POST", "load"):
            self._outside(lambda: self._load(engine))
        elif (method, path) == ("GET", "memory"):
            self.json(self._memory(engine))
        elif (method, path) == ("POST", "hurry"):
            engine.urgent = True
            if engine.resident is not None:
                node.worker.hurry(engine.resident)
            self.json({})
        elif not engine.loaded:
            raise Refused(503, "the engine is still loading")
        elif (method, path) in plain:
            self.json(plain[method, path]())
        elif (method, path) == ("GET", "metrics"):
            text = engine.metrics(node.worker).encode()
            self.send(200, text, b"text/plain; version=0.0.4")
        elif (method, path) == ("POST", "wake_up"):
            assert engine.resident is not None
            self._outside(partial(node.worker.wake, engine.resident))
        elif (method, path) == ("POST", "sleep"):
            assert engine.resident is not None
            self._outside(partial(node.worker.sleep, engine.resident))
        elif (method, path) == ("POST", "v1/completions"):
            self._complete(engine, body, chat=False)
        elif (method, path) == ("POST", "v1/chat/completions"):
            self._complete(engine, body, chat=True)
        else:
            raise Refused(404, "Not Found")

    def _awake(self, engine: Engine) -> bool:
        return engine.resident is not None and engine.resident.number is not None

    def _memory(self, engine: Engine) -> dict[str, int]:
        """What it holds, and what its load waits for."""
        worker, resident = self.node.worker, engine.resident
        if resident is None:
            return {"bytes": 0, "waits_for_bytes": 0}
        return {
            "bytes": worker.held_bytes(resident),
            "waits_for_bytes": resident.waits_pages * worker.pool.page_bytes,
        }

    def _needs(self, engine: Engine) -> int:
        """KV memory that its requests hold, or may come to hold."""
        assert engine.resident is not None
        number, worker = engine.resident.number, self.node.worker
        pages = 0 if number is None else worker.group.needs(number)
        return pages * worker.pool.page_bytes

    def _models(self, engine: Engine) -> Any:
        card = {
            "id": engine.name,
            "object": "model",
            "created": int(engine.made_s),
            "owned_by": "foreserve",
            "max_model_len": engine.room_tokens,
        }
        return {"object": "list", "data": [card]}

    def _load(self, engine: Engine) -> None:
        """In a thread."""
        worker = self.node.worker
        ports = engine.followers
        part = Part(rank=0, size=len(ports) + 1)
        resident = engine.resident = worker.begin(engine.service, part)
        if engine.urgent:
            worker.hurry(resident)
        try:
            if ports:
                worker.lead(resident, self.node.gather(ports))
            if engine.gone:
                raise LoadFailed("stopped before it was loaded")
            worker.fetch(resident)
            with engine.lock:
                if engine.gone:
                    raise LoadFailed("stopped while it was loaded")
                engine.loaded = True
        except BaseException:
            engine.resident = None
            worker.drop(resident)
            raise

    def _delete(self, engine: Engine) -> None:
        """It ends at once; a load under way sees to itself."""
        with engine.lock:
            engine.gone = True
            resident, loaded = engine.resident, engine.loaded
        if resident is not None:
            resident.leaving.set()

        def drop() -> None:
            if resident is not None and loaded:
                self.node.worker.drop(resident)

        del self.node.engines[engine.number]
        self._outside(drop)

    def _outside(self, action: Callable[[], object]) -> None:
        """Answer when a thread has done it."""
        self._waits = True

        def done(failed: BaseException | None) -> None:
            self._waits = False
            if failed is None:
                self.json({})
            elif isinstance(failed, ForeserveError):
                status = NO_ROOM if isinstance(failed, NoRoom) else 500
                self.refuse(Refused(status, str(failed)))
            else:
                traceback.print_exception(failed, file=sys.stderr)
                self.refuse(Refused(500, f"{type(failed).__name__}: {failed}"))

        self.node.outside(action, done)

    # --- answers -------------------------------------------------------------------------

    def _complete(self, engine: Engine, body: bytes, *, chat: bool) -> None:
        node, resident = self.node, engine.resident
        asked = object_of(body)
        if asked.get("model") != engine.name:
            raise Refused(404, f"The model `{asked.get('model')}` does not exist.")
        if resident is None or resident.number is None:
            raise Refused(503, "the engine sleeps")
        wanted = understand(
            asked, resident.words, resident.config.vocabulary, chat=chat
        )
        node.answers += 1
        self.exchange = Exchange(
            self,
            engine,
            resident,
            wanted,
            asked,
            f"{engine.number}-{node.answers}",
            chat=chat,
        )
        node.submit(self.exchange)


def _die(error: BaseException) -> None:
    """An iteration failed: nobody knows what memory holds now."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


async def serve(listener: socket.socket, given: argparse.Namespace, key: bytes) -> None:
    loop = asyncio.get_running_loop()
    memory: Memory = (
        PosixMemory(given.page_bytes, given.pages)
        if given.device == "cpu"
        else CudaMemory(given.page_bytes, given.pages)
    )
    pool = PagePool(memory)
    node = Node(
        loop,
        partial(
            Worker,
            pool,
            SystemClock.of_machine(),
            POLICIES[given.policy].make(),
            dtype=given.dtype,
            device=given.device,
            store=RemoteStore(given.store),
            rules=Rules(
                max_num_seqs=given.max_num_seqs,
                max_prompt_tokens=given.chunk_tokens,
                near=given.near,
                patience=given.patience,
            ),
            swap_bytes=given.swap_bytes,
            most_loss=given.load_loss,
            room_within_s=given.room_within,
        ),
        listener.getsockname()[0],
        key,
    )
    server = await loop.create_server(lambda: Connection(node, key), sock=listener)
    asked = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, asked.set)
    async with server:
        await asked.wait()
    # What is under way has no one to wait for it, and memory goes with the process.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--pages", type=int, required=True)
    parser.add_argument("--page-bytes", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--policy", choices=list(POLICIES), default="db-mean")
    parser.add_argument("--patience", type=float, default=float("inf"))
    parser.add_argument("--near", type=float, default=0.1)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--swap-bytes", type=int, default=0)
    parser.add_argument("--load-loss", type=float, default=0.05)
    parser.add_argument("--room-within", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    listener = socket.socket(fileno=given.fd)
    asyncio.run(serve(listener, given, os.environ.get(KEY, "").encode()))


if __name__ == "__main__":
    main()
