"""One process's share of a GPU group: a pool, the weights of many LLMs, and one loop.

A thread of its own runs the iterations, and between two of them whatever others `ask`:
requests, cancellations, LLMs that wake or sleep. Loads go on beside it, in the threads of
`memory.loading.Link` and of whoever called. An LLM that is WARM has weights and nothing
else; waking it pins them and makes it known to the group, so it takes no memory to be
mapped and no byte to be moved unless some of its weights were taken back for KV.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from foreserve.models.cost import IterationTime
from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.runtime.clock import Clock
from foreserve.runtime.memory.kv import Keeper, KvNeeds, KvSpace
from foreserve.runtime.memory.loading import Link
from foreserve.runtime.memory.pacing import Pacer
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.store import Store
from foreserve.runtime.memory.streaming import Sources
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.memory.weights import Shelf, Weights
from foreserve.runtime.paged.config import DecoderConfig, read_config
from foreserve.runtime.paged.decoder import Alone, Decoder, Peers
from foreserve.runtime.paged.following import FollowerFailed, Followers
from foreserve.runtime.paged.group import Group, Hosted
from foreserve.runtime.paged.layout import ITEM_BYTES, Layout, Part, lay_out
from foreserve.runtime.paged.loading import DTYPES, tensor, views
from foreserve.runtime.paged.loads import LoadFailed, Loads
from foreserve.runtime.paged.mirror import Leader
from foreserve.runtime.paged.shards import key_of, shard
from foreserve.runtime.paged.text import Words
from foreserve.runtime.scheduler import Policy
from foreserve.runtime.turns import Rules

T = TypeVar("T")
IDLE_S = 0.05
"""After which nobody is served, also where another process leads."""
RETRY_S = 1.0
"""Requests that wait for pages of other GPUs try again after this, should nobody have told
them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is known ahead of an LLM and its requests."""

    llm: str
    """Its name in this group."""
    folder: Path
    """Its checkpoint."""
    time: IterationTime
    reference_s: float
    """e_s: a mean request alone."""
    input_tokens: float
    output_tokens: float
    """Means."""
    rate_rps: float = 1.0
    kept: bool = False
    """Its weights stay, also where it is WARM and KV could use their memory: a plan has
    given it to them."""


class Resident:
    """One LLM of this process, or a shard of it: its files read, its weights on the
    shelf."""

    def __init__(self, service: Service, dtype: str, device: str, part: Part) -> None:
        self.service, self.dtype, self._device = service, dtype, device
        self.part = part
        self.peers: Peers = Alone()
        """Set before it is woken, where it has others."""
        self.followers: Followers | None = None
        """Where this is the first of them."""
        self.leader: Leader | None = None
        """Where it is not."""
        self.config: DecoderConfig = read_config(service.folder)
        self.layout: Layout = lay_out(self.config, dtype, part)
        self.words = Words(service.folder)
        self.leaving = threading.Event()
        """It is not to be loaded any more."""
        self.urgent = threading.Event()
        """Requests wait for it."""
        self.waits_pages = 0
        """That its load lacks, while it waits for memory."""
        self.settled = False
        """Its weights are there, to stay."""
        self.number: int | None = None
        """In the group; None while it is not ACTIVE."""
        self.prepared: Future[None] | None = None
        """That its kernels are compiled, from the first load on."""
        self.lock = threading.RLock()
        """Of changes between states: one at a time."""

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.config, self.peers, self._device)

    @property
    def token_bytes(self) -> int:
        """Of KV, on each of its GPUs."""
        return self.config.kv_token_bytes(ITEM_BYTES[self.dtype], self.part.size)

    @property
    def shard_key(self) -> str:
        """In the node's store."""
        return key_of(self.service.folder, self.dtype, self.part)


class Worker:
    """Any thread may call anything but what says otherwise."""

    def __init__(
        self,
        pool: PagePool,
        clock: Clock,
        policy: Policy,
        *,
        dtype: str,
        store: Store,
        device: str = "cpu",
        rules: Rules | None = None,
        swap_bytes: int = 0,
        room_within_s: float = 30.0,
        most_loss: float = 0.05,
        on_step: Callable[[], None] = lambda: None,
        on_death: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """``store``: of the node. ``device``: torch's name of where the pool is.
        ``swap_bytes``: of host memory at most, for KV of requests that must leave.
        ``room_within_s``: a load that nobody waits for waits so long for spare memory.
        ``most_loss``: of the time between tokens, to such loads; infinite: all of it.
        ``on_step`` is called after each iteration, and ``on_death`` when one failed, both
        by the loop's thread; nothing runs after that."""
        self.pool, self.dtype, self.device = pool, dtype, device
        self._clock = clock
        self._residents: dict[str, Resident] = {}
        self.shelf = Shelf()
        self.link = Link(clock)
        self._sources = Sources(store, shard, pool.memory)
        self.space = KvSpace([pool.books], pool.page_bytes, borrower=self.shelf)
        window = tensor(pool.window_span()).view(pool.capacity, pool.page_bytes)
        self.name = f"{os.getpid()} {id(self)}"
        """No other one of this machine has it."""
        self.swap: Swap | None = None
        if swap_bytes >= pool.page_bytes:
            self.swap = Swap(pool, swap_bytes, clock.now_s)
        self._keeper = Keeper(self.space)
        self.group = Group(
            self.space,
            window,
            policy,
            clock.now_s,
            rules,
            self.swap,
            self._keeper.want,
            self.name,
        )
        """For the loop's thread."""
        self._pacer = Pacer(self.link, most_loss)
        if most_loss < math.inf:
            self.group.pacer = self._pacer
        self._loads = Loads(
            self,
            space=self.space,
            shelf=self.shelf,
            group=self.group,
            link=self.link,
            sources=self._sources,
            room_within_s=room_within_s,
        )
        self._asked: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._on_step, self._on_death = on_step, on_death
        self._thread = threading.Thread(
            target=self._run, name="iterations", daemon=True
        )
        self._thread.start()

    def now_s(self) -> float:
        return self._clock.now_s()

    # --- the loop ------------------------------------------------------------------

    def ask(self, action: Callable[[], T]) -> Future[T]:
        """Have ``action`` done between two iterations."""
        done: Future[T] = Future()

        def act() -> None:
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._closed:
                raise ForeserveError("the worker has ended")
            self._asked.append(act)
            self._changed.notify()
        return done

    def _run(self) -> None:
        try:
            # What a thread's first product needs to be made is, before anybody asks.
            one = torch.ones(1, 1, dtype=DTYPES[self.dtype], device=self.device)
            torch.mm(one, one)
            while True:
                with self._changed:
                    while not (self._asked or self._closed or self.group.busy):
                        paced, stuck = self._pacer.paces, self.group.leading.stuck
                        wait_s = IDLE_S if paced else RETRY_S if stuck else None
                        if not self._changed.wait(wait_s):
                            self._pacer.idle()
                            self.group.leading.retry()
                    if self._closed:
                        return
                    actions = tuple(self._asked)
                    self._asked.clear()
                for act in actions:
                    act()
                if self.group.step() or actions:
                    self._on_step()
        except BaseException as error:
            self._on_death(error)
            raise

    def close(self) -> None:
        """End the loop after the iteration under way, and the loads."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for resident in self._residents.values():
            resident.leaving.set()
        self._keeper.close()
        self.link.close()
        self._sources.close()
        if self.swap is not None:
            self.swap.close()

    # --- weights -------------------------------------------------------------------

    def load(self, service: Service) -> Resident:
        """Have its weights here: WARM. Blocks until they are; raises `LoadFailed` or
        `InvalidInput`, and nothing of it is left then."""
        resident = self.begin(service)
        try:
            self.fetch(resident)
        except BaseException:
            self.drop(resident)
            raise
        return resident

    def begin(self, service: Service, part: Part | None = None) -> Resident:
        """Read what there is to know of it, and reserve its addresses. ``part``: the
        shard that is kept here."""
        resident = Resident(service, self.dtype, self.device, part or Part())
        token_bytes = resident.token_bytes
        if token_bytes > self.pool.page_bytes:
            raise InvalidInput(
                f"{service.llm}: a token takes {token_bytes} bytes, a page has "
                f"{self.pool.page_bytes}"
            )
        self._residents[service.llm] = resident
        self.shelf.put(service.llm, [Weights(self.pool, resident.layout.num_bytes)])
        return resident

    def fetch(self, resident: Resident, *, urgent: bool = False) -> None:
        """Bring what is missing of its weights; blocks. Raises `LoadFailed`, also when
        `leaving` is set meanwhile. ``urgent``: requests wait for it."""
        if urgent:
            resident.urgent.set()
        self._loads.fetch(resident)

    def hurry(self, resident: Resident) -> None:
        """Requests wait for it now, and for its load."""
        resident.urgent.set()

    def bring(self, resident: Resident) -> None:
        """`fetch`, of a shard whose leader says when it is to stay (`settle`)."""
        self._loads.bring(resident)

    def settle(self, resident: Resident) -> bool:
        """Whether its weights are there; those of a kept one stay then."""
        return self._loads.settle(resident)

    def lead(self, resident: Resident, followers: Followers) -> None:
        """It has shards in other processes, too; before it is fetched."""
        resident.followers = followers

        def hear(what: str, request: int) -> None:
            self.ask(lambda: self.group.leading.hear(what, request))

        resident.peers = followers.begin(resident.service, self.name, hear)

    def drop(self, resident: Resident) -> None:
        """Give all up: its requests are aborted, its memory is free."""
        resident.leaving.set()
        with resident.lock:
            if resident.number is not None:
                self.sleep(resident)
            if resident.followers is not None:
                resident.followers.close()
            self.shelf.take(resident.service.llm)
            del self._residents[resident.service.llm]

    # --- states --------------------------------------------------------------------

    def wake(self, resident: Resident) -> None:
        """WARM -> ACTIVE: it may be asked when this returns. Fetches what KV has taken
        back of its weights."""
        with resident.lock:
            if resident.leaving.is_set():
                raise LoadFailed(f"{resident.service.llm}: it is on its way out")
            if resident.number is None:
                resident.number = self._enter(resident)

    def _enter(self, resident: Resident) -> int:
        service = resident.service
        self.shelf.keep(service.llm)  # Nobody takes some of it back in between.
        try:
            self.fetch(resident, urgent=True)
            self.ask(lambda: self._pin(service.llm)).result()
        finally:
            self.shelf.lend(service.llm)
        if resident.followers is not None:
            try:
                resident.followers.wake()
            except FollowerFailed:
                self.shelf.unpin(service.llm)
                raise
        (weights,) = self.shelf.shards(service.llm)
        hosted = Hosted(
            llm=service.llm,
            decoder=resident.decoder,
            weights=views(resident.layout, tensor(weights.view())),
            dtype=self.dtype,
            time=service.time,
            needs=KvNeeds(
                llm=service.llm,
                token_bytes=resident.token_bytes,
                input_tokens=service.input_tokens,
                output_tokens=service.output_tokens,
                usual_output_tokens=max(1, round(service.output_tokens)),
                rate_rps=service.rate_rps,
            ),
            reference_s=service.reference_s,
            team=resident.followers,
            leader=resident.leader,
        )
        return self.ask(lambda: self.group.add(hosted)).result()

    def _pin(self, llm: str) -> None:
        """In the loop's thread: what is pinned is not KV's any more."""
        self.shelf.pin(llm)
        if self.space.pages() < self.group.largest:
            self.shelf.unpin(llm)
            raise LoadFailed(f"{llm}: a request in flight would not fit beside it")

    def sleep(self, resident: Resident) -> None:
        """ACTIVE -> WARM: what it was asked is aborted, its KV is free."""
        with resident.lock:
            number = resident.number
            if number is None:
                return
            resident.number = None
            self.ask(lambda: self.group.remove(number)).result()
            self.shelf.unpin(resident.service.llm)
            if resident.followers is not None and not resident.leaving.is_set():
                resident.followers.sleep()

    def held_bytes(self, resident: Resident) -> int:
        """Of GPU memory, now: pages of its weights and of its KV."""
        llm, number = resident.service.llm, resident.number
        if llm not in self.shelf:
            return 0
        pages = sum(own.held_pages for own in self.shelf.shards(llm))
        if number is not None:
            pages += self.group.held(number)
        return pages * self.pool.page_bytes
