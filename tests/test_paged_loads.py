"""Loads beside requests in a real worker: who may take whose memory, and who goes first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="LLMs are made for both")

from foreserve.runtime.clock import SystemClock  # noqa: E402
from foreserve.runtime.memory.pool import PagePool  # noqa: E402
from foreserve.runtime.memory.posix import PosixMemory  # noqa: E402
from foreserve.runtime.memory.store import HostStore  # noqa: E402
from foreserve.runtime.paged.decoder import Decoder  # noqa: E402
from foreserve.runtime.paged.jobs import Job  # noqa: E402
from foreserve.runtime.paged.loads import LoadFailed, NoRoom  # noqa: E402
from foreserve.runtime.paged.shards import shard  # noqa: E402
from foreserve.runtime.paged.worker import Service, Worker  # noqa: E402
from foreserve.runtime.scheduler import POLICIES  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402
from tests.test_paged_group import TIME  # noqa: E402
from tests.waiting import SOON_S, until  # noqa: E402

PAGE = 4096
FAMILIES = ("llama", "qwen3", "gemma2")


class Gate:
    """A copy that ends when it is let through."""

    def __init__(self, memory: Gated, done, num_bytes: int) -> None:
        self._memory, self._done, self._num_bytes = memory, done, num_bytes

    def wait(self) -> None:
        assert self._memory.tickets.acquire(timeout=SOON_S)
        self._done.wait()
        self._memory.copied_bytes += self._num_bytes


class Gated(PosixMemory):
    """Copies into slots wait until they are let through, one ticket each."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(PAGE, num_pages)
        self.tickets = threading.Semaphore(0)
        self.copied_bytes = 0

    def copy(self, address, source, num_bytes):
        return Gate(self, super().copy(address, source, num_bytes), num_bytes)

    def let(self, copies: int) -> None:
        self.tickets.release(copies)


class Client:
    """Asks again as soon as it has its answer, until it is told to stop."""

    def __init__(self, worker: Worker, service: int, prompt: list[int], most: int):
        self._worker, self._service = worker, service
        self._prompt, self._most = prompt, most
        self.stops = threading.Event()
        self.done = threading.Event()
        self.answers: list[list[int]] = [[]]
        worker.ask(self._ask).result()

    def _ask(self) -> None:
        self._worker.group.submit(
            Job(
                service=self._service,
                prompt=self._prompt,
                most_tokens=self._most,
                listener=self,
                arrival_s=self._worker.now_s(),
            )
        )

    def token(self, token: int) -> bool:
        self.answers[-1].append(token)
        return False

    def end(self, reason: str) -> None:
        if self.stops.is_set():
            self.done.set()
        else:
            self.answers.append([])
            self._worker.ask(self._ask)


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return {name: Llm(folder / name, name) for name in FAMILIES}


def pages_of(llm) -> int:
    return -(-len(llm.memory) // PAGE)


class Stand:
    """A worker; ``spare``: pages beside the weights of so many LLMs."""

    def __init__(self, llms, names, spare, **how):
        self.llms = llms
        self.memory = Gated(sum(pages_of(llms[n]) for n in names) + spare)
        self.pool = PagePool(self.memory)
        self.died: list[BaseException] = []
        self.store = HostStore(1 << 28, shard)
        self.worker = Worker(
            self.pool,
            SystemClock(),
            POLICIES["db-mean"].make(),
            dtype="float32",
            store=self.store,
            on_death=self.died.append,
            **how,
        )
        self.worker.link._chunk_bytes = 16 * PAGE
        self.threads = ThreadPoolExecutor(4)
        self.clients: list[Client] = []

    def begin(self, name, **how):
        return self.worker.begin(
            Service(
                llm=name,
                folder=self.llms[name].folder,
                time=TIME,
                reference_s=0.2,
                input_tokens=30.0,
                output_tokens=1.0,
                **({"kept": True} | how),
            )
        )

    def load(self, name, *, urgent=False, **how):
        resident = self.begin(name, **how)
        shared = self.store.open(resident.shard_key)
        assert shared is not None
        # Who is not read yet does not overtake others.
        shared.filling.wait(shared.num_bytes - 1, SOON_S)
        shared.close()
        return resident, self.fetch(resident, urgent=urgent)

    def fetch(self, resident, *, urgent=False) -> Future[None]:
        return self.threads.submit(self.worker.fetch, resident, urgent=urgent)

    def awake(self, name):
        self.memory.let(1000)
        resident, loaded = self.load(name)
        loaded.result(SOON_S)
        self.worker.wake(resident)
        while self.memory.tickets.acquire(blocking=False):
            pass
        return resident

    def crowd(self, resident, count=5):
        """Requests that hold 60 pages each, and more, from now on."""
        self.clients = [
            Client(self.worker, resident.number, [3 + i] * 240, 100)
            for i in range(count)
        ]
        until(lambda: self.worker.group.held(resident.number) >= 60 * count)

    def calm(self):
        for client in self.clients:
            client.stops.set()
        for client in self.clients:
            assert client.done.wait(SOON_S)

    def copied(self, resident) -> int:
        (weights,) = self.worker.shelf.shards(resident.service.llm)
        return weights.resident_bytes

    def step(self, resident) -> bool:
        """Whether its weights are there; a single copy may go on."""
        if not self.memory.tickets._value:
            self.memory.let(1)
        return self.copied(resident) == len(self.llms[resident.service.llm].memory)

    def load_of(self, name):
        (weights,) = self.worker.shelf.shards(name)
        return weights._load and weights._load[1]

    def let_go(self, name) -> None:
        """Once its load is cancelled, the copies under way may end."""
        load = self.load_of(name)
        self.threads.submit(
            lambda: (until(lambda: load._cancelled), self.memory.let(2))
        )

    def close(self):
        self.calm()
        self.memory.let(1000)
        self.worker.close()
        self.threads.shutdown()
        assert self.died == []


@pytest.fixture
def stand(llms) -> Iterator[Callable[..., Stand]]:
    made: list[Stand] = []

    def make(*args, **how) -> Stand:
        made.append(Stand(llms, *args, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_load_that_nobody_waits_for_takes_what_requests_do_not_need(stand):
    """Five requests at a time have more than the 200 pages that two LLMs leave; the second
    one's load waits, says for how many pages, and preempts nobody. When the requests have
    ended it is loaded."""
    here = stand(("llama", "qwen3"), 200)
    llama = here.awake("llama")
    here.crowd(llama)
    here.memory.let(1000)
    qwen3, loaded = here.load("qwen3")
    until(lambda: qwen3.waits_pages > 0)
    assert qwen3.waits_pages == pages_of(here.llms["qwen3"])
    before = here.worker.group.iterations
    until(lambda: here.worker.group.iterations > before + 50)
    assert (loaded.done(), here.copied(qwen3)) == (False, 0)
    assert here.worker.group.preemptions == 0
    here.calm()
    loaded.result(SOON_S)
    assert (qwen3.waits_pages, here.worker.group.preemptions) == (0, 0)
    here.worker.wake(qwen3)


def test_requests_give_way_to_a_load_that_others_wait_for(stand):
    """The same, and requests begin to wait for the second LLM: its load takes what it
    needs, some of the five are preempted, and all answers are what they are alone."""
    here = stand(("llama", "qwen3"), 200)
    llama = here.awake("llama")
    here.crowd(llama)
    here.memory.let(1000)
    qwen3, loaded = here.load("qwen3")
    until(lambda: qwen3.waits_pages > 0)
    here.worker.hurry(qwen3)
    loaded.result(SOON_S)
    assert here.worker.group.preemptions > 0
    here.calm()
    for client in here.clients:
        answer = client.answers[-1]
        assert client.answers == [answer] * len(client.answers)
        assert answer == here.llms["llama"].after_each(client._prompt, answer)


def test_what_is_said_when_there_is_no_room(stand):
    """A load that nobody waits for gives up after its time, and one that could not even
    without requests at once; nothing is left of either, or of one that is dropped while
    it waits."""
    here = stand(("llama", "qwen3"), 200, room_within_s=0.05)
    llama = here.awake("llama")
    here.crowd(llama)
    free = here.worker.pool.capacity - pages_of(here.llms["llama"])
    missing = pages_of(here.llms["qwen3"])
    qwen3, loaded = here.load("qwen3")
    says = rf"qwen3: {missing} pages are missing, \d+ of \d+ free, and nobody waits"
    with pytest.raises(NoRoom, match=says):
        loaded.result(SOON_S)
    here.worker.drop(qwen3)
    here.worker._loads._room_within_s = 1000.0
    qwen3, loaded = here.load("qwen3")
    until(lambda: qwen3.waits_pages > 0)
    here.worker.drop(qwen3)
    with pytest.raises(LoadFailed, match="cancelled"):
        loaded.result(SOON_S)
    here.calm()
    here.memory.let(1000)
    qwen3, loaded = here.load("qwen3")
    loaded.result(SOON_S)
    gemma2, loaded = here.load("gemma2")
    with pytest.raises(NoRoom, match="gemma2"):
        loaded.result(SOON_S)
    here.worker.drop(gemma2)
    here.worker.drop(qwen3)
    assert here.pool.free == free


def test_kernels_are_there_when_a_load_ends(stand, monkeypatch):
    """They are compiled by a thread of their own while weights are copied, and the load
    waits for both; LLMs without kernels, or gone meanwhile, fail with one line, and
    nobody compiles for a wake."""
    begun, compiled = threading.Semaphore(0), threading.Event()
    called: list[str] = []

    def prepare(decoder, layout, page_bytes):
        called.append(threading.current_thread().name)
        begun.release()
        assert page_bytes == PAGE
        assert compiled.wait(SOON_S)
        if len(called) > 2:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(Decoder, "prepare", prepare)
    here = stand(FAMILIES, spare=70)
    here.memory.let(1000)
    resident, loaded = here.load("llama")
    other, gone = here.load("qwen3")
    assert all(begun.acquire(timeout=SOON_S) for _ in range(2))
    until(lambda: here.copied(resident) == len(here.llms["llama"].memory))
    until(lambda: here.copied(other) == len(here.llms["qwen3"].memory))
    other.leaving.set()
    with pytest.raises(LoadFailed, match="cancelled"):
        gone.result(SOON_S)
    assert not loaded.done()
    compiled.set()
    loaded.result(SOON_S)
    here.worker.wake(resident)
    assert called == ["kernels"] * 2
    _, failed = here.load("gemma2")
    with pytest.raises(LoadFailed, match="gemma2: no kernels for it: no compiler"):
        failed.result(SOON_S)


def test_loads_that_nobody_waits_for_yield_first(stand):
    """Of a load that nobody waits for 96 pages have come when another one is waited for,
    for which there is no room: the first gives up what has not come, keeps what has, and
    waits; when there is room again it goes on behind that. Nobody is preempted."""
    here = stand(("llama", "qwen3"), 100)
    llama = here.awake("llama")
    before = here.memory.copied_bytes
    gemma2, predicted = here.load("gemma2")
    here.memory.let(6)
    until(lambda: here.copied(gemma2) == 96 * PAGE)
    here.let_go("gemma2")
    qwen3, direct = here.load("qwen3", urgent=True)
    until(lambda: qwen3.service.llm in here.worker.shelf and here.load_of("qwen3"))
    here.memory.let(1000)
    direct.result(SOON_S)
    until(lambda: gemma2.waits_pages > 0)
    assert (predicted.done(), here.copied(gemma2) > 0) == (False, True)
    kept = here.copied(gemma2)
    here.worker.drop(qwen3)
    predicted.result(SOON_S)
    sizes = [here.pool.pages_for(len(here.llms[n].memory)) for n in ("qwen3", "gemma2")]
    assert kept <= 98 * PAGE + 32 * PAGE
    assert here.worker.group.preemptions == 0
    copied = here.memory.copied_bytes - before
    assert copied <= sum(sizes) * PAGE + 34 * PAGE
    here.worker.wake(gemma2)
    assert llama.number is not None


def test_requests_take_pages_back_from_a_load_under_way(stand):
    """A load that nobody waits for is under way when requests come that need its pages:
    they get them, nobody is preempted, and it goes on when they have ended. Once it is
    there, its pages stay: then the same requests are preempted."""
    here = stand(("llama", "qwen3"), 200)
    llama = here.awake("llama")
    qwen3, loaded = here.load("qwen3")
    here.memory.let(1)
    until(lambda: here.copied(qwen3) > 0)
    here.let_go("qwen3")
    here.crowd(llama)
    assert not loaded.done()
    assert here.worker.group.preemptions == 0
    here.calm()
    here.memory.let(1000)
    loaded.result(SOON_S)
    (weights,) = here.worker.shelf.shards("qwen3")
    assert weights.complete
    here.crowd(llama, 3)  # Of these no more than 200 pages hold.
    here.clients += [Client(here.worker, llama.number, [9] * 240, 100)]
    until(lambda: here.worker.group.preemptions > 0)
    assert weights.complete


def test_what_is_waited_for_goes_first_over_the_link(stand):
    """Two loads, with room for both: the one that nobody waits for began first, and the
    other overtakes it behind the chunks under way. A third, which was asked for in between,
    goes before both once it is hurried."""
    here = stand(("llama", "qwen3", "gemma2"), 10)
    slow, first = here.load("llama")
    here.memory.let(2)
    until(lambda: here.copied(slow) >= 16 * PAGE)
    other, third = here.load("gemma2")
    until(lambda: here.load_of("gemma2") is not None)
    fast, second = here.load("qwen3", urgent=True)
    (weights,) = here.worker.shelf.shards("qwen3")
    until(lambda: weights.slot.mapped == pages_of(here.llms["qwen3"]))
    here.memory.let(4)
    until(lambda: here.copied(fast) > 0)
    here.worker.hurry(other)
    until(lambda: here.load_of("gemma2").urgent)
    for resident, behind in ((other, fast), (fast, slow)):
        until(lambda one=resident: here.step(one))
        assert here.copied(behind) < len(here.llms[behind.service.llm].memory)
    here.memory.let(1000)
    for done in (first, second, third):
        done.result(SOON_S)
