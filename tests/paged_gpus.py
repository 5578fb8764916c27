"""GPUs of one node, each with a worker, in one process: for LLMs of one and of several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.paged.following import Door, Followers
from foreserve.runtime.paged.jobs import Job
from foreserve.runtime.paged.layout import Part, lay_out
from foreserve.runtime.paged.shards import shard
from foreserve.runtime.paged.worker import Resident, Service, Worker
from foreserve.runtime.scheduler import POLICIES
from foreserve.runtime.turns import Rules
from tests.paged_llms import Llm
from tests.test_paged_group import TIME

HOST = "127.0.0.1"


@dataclass
class Asked:
    """A request, and what its listener heard."""

    llm: Llm
    prompt: list[int]
    most: int
    over: Callable[[], None]
    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    begun: threading.Event = field(default_factory=threading.Event)
    job: Job = field(init=False)

    def token(self, token: int) -> bool:
        self.tokens.append(token)
        self.begun.set()
        return False

    def end(self, reason: str) -> None:
        self.reason = reason
        self.over()


class Gpus:
    """Workers on pools of ``page_bytes``, one per GPU."""

    def __init__(
        self,
        pages: Sequence[int],
        page_bytes: int,
        policy: str,
        swap_bytes: int = 0,
        **rules: float,
    ) -> None:
        """``pages``: of each pool."""
        self.died: list[BaseException] = []
        self._store = HostStore(1 << 30, shard)
        self.workers = [
            Worker(
                PagePool(PosixMemory(page_bytes, count)),
                SystemClock.of_machine(),
                POLICIES[policy].make(),
                dtype="float32",
                store=self._store,
                rules=Rules(**rules),
                swap_bytes=swap_bytes,
                on_death=self._die,
            )
            for count in pages
        ]
        self.doors = [Door(worker, HOST, b"") for worker in self.workers]
        self._left = threading.Semaphore(0)
        self._asked: list[Asked] = []

    def _die(self, error: BaseException) -> None:
        self.died.append(error)
        self._left.release(len(self._asked))

    def have(self, llm: Llm, *gpus: int) -> Resident:
        """ACTIVE there; the first one leads."""
        worker = self.workers[gpus[0]]
        service = Service(
            llm=f"{llm.config.family} {gpus}",
            folder=llm.folder,
            time=TIME,
            reference_s=0.2,
            input_tokens=30.0,
            output_tokens=1.0,
        )
        resident = worker.begin(service, Part(rank=0, size=len(gpus)))
        if gpus[1:]:
            ports = [self.doors[gpu].port for gpu in gpus[1:]]
            worker.lead(resident, Followers(HOST, ports, b""))
        worker.fetch(resident)
        worker.wake(resident)
        return resident

    def ask(
        self, gpu: int, resident: Resident, llm: Llm, prompt, most, then=lambda _: None
    ) -> Asked:
        """``then`` is done with its job before anything else is."""
        worker, asked = self.workers[gpu], Asked(llm, prompt, most, self._left.release)
        assert resident.number is not None
        asked.job = Job(
            service=resident.number,
            prompt=prompt,
            most_tokens=most,
            listener=asked,
            arrival_s=worker.now_s(),
        )

        def submit() -> None:
            worker.group.submit(asked.job)
            then(asked.job)

        worker.ask(submit).result()
        self._asked.append(asked)
        return asked

    def wait(self) -> None:
        """For all that was asked."""
        for _ in self._asked:
            assert self._left.acquire(timeout=100.0)
        assert not self.died

    def check(self) -> None:
        """All answers are those of each LLM alone, and no request has a page."""
        for one in self._asked:
            assert one.reason == "length"
            assert one.tokens == one.llm.after_each(one.prompt, one.tokens)
        pause = threading.Event()
        while any(w.ask(w.space.used).result() for w in self.workers):
            pause.wait(0.01)  # Followers hear of it later.

    @property
    def waits(self) -> int:
        """How often a request had to wait for another leader's."""
        return sum(worker.group.leading.waits for worker in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def weight_pages(llm: Llm, page_bytes: int, size: int = 1, rank: int = 0) -> int:
    layout = lay_out(llm.config, "float32", Part(rank=rank, size=size))
    return -(-layout.num_bytes // page_bytes)
