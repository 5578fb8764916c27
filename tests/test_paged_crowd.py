"""Five LLMs in one process, twice as much as its memory holds, and a thousand requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow]
torch = pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="LLMs are made for both")

from foreserve.runtime.clock import SystemClock  # noqa: E402
from foreserve.runtime.memory.pool import PagePool  # noqa: E402
from foreserve.runtime.memory.posix import PosixMemory  # noqa: E402
from foreserve.runtime.memory.store import HostStore  # noqa: E402
from foreserve.runtime.paged.jobs import Job  # noqa: E402
from foreserve.runtime.paged.shards import shard  # noqa: E402
from foreserve.runtime.paged.worker import Resident, Service, Worker  # noqa: E402
from foreserve.runtime.scheduler import POLICIES  # noqa: E402
from foreserve.runtime.turns import Rules  # noqa: E402
from tests.paged_llms import Llm, Pages, Sequence_, iterate  # noqa: E402
from tests.test_paged_group import TIME  # noqa: E402

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "mixtral")
REQUESTS = 1000
PAGE = 8192
KV_PAGES = 900
"""Of a burst, if all its requests had theirs at once."""


@dataclass
class Asked:
    llm: int
    prompt: list[int]
    most: int
    done: Callable[[], None]
    tokens: list[int] = field(default_factory=list)
    reason: str = ""

    def token(self, token: int) -> bool:
        self.tokens.append(token)
        return False

    def end(self, reason: str) -> None:
        self.reason = reason
        self.done()


def alone(llm: Llm, asked: list[Asked]) -> list[list[int]]:
    """Answers of one LLM that has a cache of its own, eight requests at a time, nothing
    chunked and nobody preempted."""
    pages = Pages(40)
    told = [Sequence_(llm, one.prompt, one.most) for one in asked]
    for first in range(0, len(told), 8):
        eight = told[first : first + 8]
        while busy := [one for one in eight if not one.done]:
            iterate(llm, pages, busy, chunk=1000)
    return [one.answer for one in told]


class Told:
    """Times, for whoever reads the log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def time(self, what: str, action: Callable[[], object]) -> None:
        began_s = monotonic()
        action()
        self.lines.append(f"{what} {1000 * (monotonic() - began_s):.1f} ms")


def test_a_thousand_requests_to_five_llms(tmp_path, record_property):
    """Weights of five LLMs and the KV of bursts need twice the pool: LLMs go and come back,
    pages run out, weights of WARM LLMs are taken back for KV; that of who is preempted is
    swapped, as long as 40 pages on the host have room, or else computed again. Every answer
    is the one that its LLM gives alone; at the end all pages are free."""
    llms = [Llm(tmp_path / family, family) for family in FAMILIES]
    need = sum(-(-len(llm.memory) // PAGE) for llm in llms) + KV_PAGES
    pool = PagePool(PosixMemory(PAGE, need // 2))
    told, rng = Told(), np.random.default_rng(3)
    left = threading.Semaphore(0)
    died: list[BaseException] = []

    def die(error: BaseException) -> None:
        died.append(error)
        left.release(REQUESTS)

    worker = Worker(
        pool,
        SystemClock(),
        POLICIES["db-mean"].make(),
        dtype="float32",
        store=HostStore(1 << 30, shard),
        rules=Rules(max_prompt_tokens=64, max_num_seqs=256),
        swap_bytes=40 * PAGE,
        on_death=die,
    )
    residents: dict[int, Resident] = {}

    def have(llm: int, kept: list[int]) -> Resident:
        """It is ACTIVE; the least recently used go if there is no room."""
        if llm not in residents:
            while pool.free < -(-len(llms[llm].memory) // PAGE):
                oldest = next(r for r in residents if r not in kept)
                gone = residents.pop(oldest)
                told.time(
                    f"dropped {FAMILIES[oldest]}", lambda gone=gone: worker.drop(gone)
                )
            service = Service(
                llm=FAMILIES[llm],
                folder=llms[llm].folder,
                time=TIME,
                reference_s=0.2,
                input_tokens=30.0,
                output_tokens=1.0,  # Far too few: pages run out.
            )
            told.time(
                f"cold load of {FAMILIES[llm]}",
                lambda: residents.update({llm: worker.load(service)}),
            )
        residents[llm] = residents.pop(llm)
        if residents[llm].number is None:
            told.time(
                f"WARM to ACTIVE {FAMILIES[llm]}", lambda: worker.wake(residents[llm])
            )
        return residents[llm]

    asked: list[Asked] = []
    while len(asked) < REQUESTS:
        # A burst for one or two LLMs; who has none is put to sleep.
        mine = rng.choice(5, size=rng.integers(1, 3), replace=False).tolist()
        for llm in list(residents):
            if llm not in mine and residents[llm].number is not None:
                told.time(
                    f"asleep {FAMILIES[llm]}", lambda r=residents[llm]: worker.sleep(r)
                )
        burst, jobs = [], []
        for _ in range(min(200, REQUESTS - len(asked))):
            llm = int(rng.choice(mine))
            prompt = rng.integers(0, 540, rng.integers(1, 80)).tolist()
            one = Asked(llm, prompt, int(rng.integers(4, 16)), left.release)
            service = have(llm, mine).number
            assert service is not None
            job = Job(
                service=service,
                prompt=prompt,
                most_tokens=one.most,
                listener=one,
                arrival_s=worker.now_s(),
            )
            burst.append(one)
            jobs.append(job)
        worker.ask(lambda jobs=jobs: [*map(worker.group.submit, jobs)]).result(30)
        for _ in burst:
            left.acquire()
        assert not died
        asked += burst
    preempted, swapped = worker.group.preemptions, worker.group.swaps
    revoked = worker.shelf.revoked_pages
    for resident in list(residents.values()):
        worker.drop(resident)
    assert pool.free == pool.capacity
    assert worker.swap.host.books.held == 0
    worker.close()
    for llm in range(5):
        mine = [one for one in asked if one.llm == llm]
        for one, answer in zip(mine, alone(llms[llm], mine), strict=True):
            assert one.reason == "length"
            assert one.tokens == answer
    assert preempted > swapped > 0
    assert revoked > 0
    lines = "\n".join(told.lines[-12:])
    record_property("measured", f"{lines}\n{preempted=} {swapped=} {revoked=}")
