"""Weights: copies into slots, what is kept and what is revoked."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.memory.books import Books
from foreserve.runtime.memory.cuda import CudaMemory
from foreserve.runtime.memory.kv import Keeper, KvNeeds, KvSpace
from foreserve.runtime.memory.loading import Link, Load
from foreserve.runtime.memory.pool import Copying, InUse, PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.weights import NotResident, Shelf, Weights
from tests.fake_cuda import FakeCuda
from tests.waiting import SOON_S, until

PAGE = 4096


# --- copies ----------------------------------------------------------------------------


class Gate:
    """A copy that ends when it is let through."""

    def __init__(self, memory: Gated, done: Copying) -> None:
        self._memory, self._done = memory, done

    def wait(self) -> None:
        assert self._memory.tickets.acquire(timeout=SOON_S)
        self._done.wait()
        self._memory.story.append("copied")


class Gated(PosixMemory):
    """Copies end one by one, as the test lets them; what happens is written down."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(PAGE, num_pages)
        self.tickets = threading.Semaphore(0)
        self.story: list[str] = []
        self.copied: list[int] = []
        self.fail_at_page: int | None = None

    def copy(self, address: int, source: int, num_bytes: int) -> Copying:
        self.copied.append(num_bytes)
        return Gate(self, super().copy(address, source, num_bytes))

    def map(self, address: int, pages, *, filled: bool = False) -> None:
        if self.fail_at_page is not None:
            listed = list(pages)
            if any(first + count > self.fail_at_page for first, count in listed):
                raise OSError(12, "no more mappings")
            pages = listed
        super().map(address, pages, filled=filled)

    def unmap(self, address: int, num_bytes: int) -> None:
        if num_bytes:
            self.story.append("unmapped")
        super().unmap(address, num_bytes)

    def let(self, copies: int) -> None:
        for _ in range(copies):
            self.tickets.release()


@pytest.fixture
def gated() -> Iterator[tuple[Gated, PagePool, Link]]:
    """Chunks of one page, mapped two at a time."""
    memory = Gated(8)
    pool = PagePool(memory)
    link = Link(SystemClock(), chunk_bytes=PAGE, map_bytes=2 * PAGE)
    yield memory, pool, link
    memory.let(1000)
    link.close()
    pool.close()


def _source(num_bytes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, num_bytes, np.uint8)


def _begin(link: Link, weights: Weights, source: np.ndarray, **how) -> Load:
    pages = weights.pool.books.take(weights.missing_pages, top=True)
    assert pages is not None
    return weights.load(link, source.ctypes.data, pages, **how)


def test_a_load_brings_every_byte_and_says_how_far_it_is(gated):
    """Three pages and a bit arrive chunk by chunk; then they can be pinned and seen, and
    not before."""
    memory, pool, link = gated
    source = _source(3 * PAGE + 100)
    weights = Weights(pool, len(source))
    load = _begin(link, weights, source)
    memory.let(2)
    until(lambda: load.copied_bytes == 2 * PAGE)
    assert (load.end, weights.complete) == (None, False)
    with pytest.raises(NotResident, match="8192 of 12388"):
        weights.pin()
    memory.let(2)
    assert load.ended.wait(SOON_S)
    assert (load.end, load.copied_bytes, weights.complete) == (
        "done",
        len(source),
        True,
    )
    assert memory.copied == [PAGE, PAGE, PAGE, 100]
    weights.pin()
    assert bytes(weights.view()) == source.tobytes()
    weights.unpin()
    with pytest.raises(NotResident):
        weights.view()
    assert pool.free == 4


def test_a_cancelled_load_keeps_its_prefix_and_goes_on_behind_it(gated):
    """Of six pages two are there and two under way when it is cancelled: these arrive,
    pages that got nothing are free at once, and the next load copies the last two only."""
    memory, pool, link = gated
    source = _source(6 * PAGE)
    weights = Weights(pool, len(source))
    load = _begin(link, weights, source)
    memory.let(2)
    until(lambda: load.copied_bytes == 2 * PAGE and len(memory.copied) == 4)
    link.cancel(load)
    memory.let(2)
    assert load.ended.wait(SOON_S)
    weights.settle()
    assert (load.end, weights.resident_bytes, pool.free) == ("cancelled", 4 * PAGE, 4)
    assert weights.missing_pages == 2
    again = _begin(link, weights, source)
    memory.let(2)
    assert again.ended.wait(SOON_S)
    assert memory.copied == [PAGE] * 6
    weights.pin()
    assert bytes(weights.view()) == source.tobytes()


def test_pages_are_unmapped_behind_the_copies_into_them(gated):
    """Dropping weights that are on their way waits for the copies under way: no page is
    unmapped, let alone free, before the last of them has ended."""
    memory, pool, link = gated
    source = _source(4 * PAGE)
    weights = Weights(pool, len(source))
    _begin(link, weights, source)
    until(lambda: len(memory.copied) == 2)
    dropping = threading.Thread(target=weights.drop, args=(4,))
    dropping.start()
    assert memory.story == []
    memory.let(1)
    until(lambda: memory.story == ["copied"])
    assert dropping.is_alive()
    assert pool.free <= 6
    memory.let(1)
    dropping.join(SOON_S)
    assert memory.story[:2] == ["copied", "copied"]
    assert set(memory.story[2:]) == {"unmapped"}
    assert (pool.free, weights.resident_bytes) == (8, 0)


def test_urgent_loads_overtake_at_the_next_chunk(gated):
    """Loads go one after the other, as they were asked for; one that requests wait for
    takes over behind the two chunks under way, and then the first goes on."""
    memory, pool, link = gated
    sources = [_source(3 * PAGE, seed) for seed in (1, 2)]
    first, second = (Weights(pool, 3 * PAGE) for _ in range(2))
    slow = _begin(link, first, sources[0])
    until(lambda: len(memory.copied) == 2)
    fast = _begin(link, second, sources[1], urgent=True)
    until(lambda: second.slot.mapped > 0)
    memory.let(4)
    until(lambda: fast.copied_bytes == 2 * PAGE)
    assert (slow.copied_bytes, slow.end) == (2 * PAGE, None)
    memory.let(1)
    assert fast.ended.wait(SOON_S)
    link.hurry(slow)
    memory.let(1)
    assert slow.ended.wait(SOON_S)
    assert (fast.end, slow.end) == ("done", "done")


def test_a_load_that_fails_says_why_and_holds_nothing_more_than_it_got(gated):
    """The machine refuses to map the second pair of pages: of the first pair stays what
    was copied by then."""
    memory, pool, link = gated
    source = _source(4 * PAGE)
    weights = Weights(pool, len(source))
    memory.fail_at_page = 6
    memory.let(10)
    load = _begin(link, weights, source)
    assert load.ended.wait(SOON_S)
    weights.settle()
    assert (load.end, "no more mappings" in load.error) == ("failed", True)
    kept = weights.resident_bytes // PAGE
    assert kept <= 2
    assert (weights.slot.mapped, pool.free) == (kept, 8 - kept)


def test_a_load_without_its_pages_fails_at_once(gated):
    """KV took two of the slot's pages after it was asked how many are missing: the load
    ends before it begins, and its page is free. Of too many the rest is free, too. A
    closed link takes nothing."""
    memory, pool, link = gated
    memory.let(100)
    source = _source(4 * PAGE)
    weights = Weights(pool, len(source))
    assert _begin(link, weights, source).ended.wait(SOON_S)
    weights.settle()
    weights.drop(1)
    pages = pool.books.take(weights.missing_pages)
    assert pages is not None
    weights.drop(2)
    load = weights.load(link, source.ctypes.data, pages)
    assert (load.end, load.error) == ("failed", "1 pages where 3 are missing")
    assert (pool.free, weights.resident_bytes) == (7, PAGE)
    pages = pool.books.take(6)
    assert pages is not None
    load = weights.load(link, source.ctypes.data, pages)
    assert load.ended.wait(SOON_S)
    assert (load.end, pool.free) == ("done", 4)
    link.close()
    weights.drop(4)
    assert _begin(link, weights, source).error == "the link is closed"
    assert pool.free == 8


def test_loading_is_the_same_code_on_a_gpu():
    """Through the made-up driver: every byte arrives in the pages' memory, copies are
    asynchronous and waited for, and unmapping is refused while a span is alive."""
    driver = FakeCuda()
    pool = PagePool(CudaMemory(PAGE, 6, driver=driver))
    link = Link(SystemClock(), chunk_bytes=3000, map_bytes=2 * PAGE)
    source = _source(5 * PAGE - 10)
    weights = Weights(pool, len(source))
    pool.memory.pin(source.ctypes.data, len(source))
    load = _begin(link, weights, source)
    assert load.ended.wait(SOON_S)
    assert load.end == "done"
    back = np.zeros_like(source)
    with weights.slot.using(0, len(source)) as address:
        pool.memory.fetch(back.ctypes.data, address, len(back)).wait()
    assert (back == source).all()
    weights.pin()
    span = weights.view()
    weights.unpin()
    with pytest.raises(InUse):
        weights.drop(1)
    del span
    assert weights.drop(2) == 2
    assert weights.resident_bytes == 3 * PAGE
    pool.memory.unpin(source.ctypes.data)
    link.close()
    pool.close()
    assert (driver.handles, driver.pinned, driver.events) == ({}, {}, 0)


# --- loans -----------------------------------------------------------------------------


def _resident(pool: PagePool, pages: int, seed: int = 0) -> tuple[Weights, np.ndarray]:
    source = _source(pages * PAGE, seed)
    weights = Weights(pool, len(source))
    link = Link(SystemClock(), chunk_bytes=PAGE)
    assert _begin(link, weights, source).ended.wait(SOON_S)
    link.close()
    weights.settle()
    assert weights.complete
    return weights, source


def test_kv_gets_its_pages_back_from_the_least_valuable_weights():
    """12 pages: three LLMs' weights have 4, 3 and 3. The one that serves is pinned; a
    request that needs 5 pages gets the 2 free ones and the last 3 of the LLM worth least.
    What that kept is resident, and its next load brings the rest."""
    pool, shelf = PagePool(PosixMemory(PAGE, 12)), Shelf()
    active, _ = _resident(pool, 4, 1)
    cheap, source = _resident(pool, 3, 2)
    dear, _ = _resident(pool, 3, 3)
    shelf.put("active", [active])
    shelf.put("cheap", [cheap], score=1.0)
    shelf.put("dear", [dear], score=2.0)
    shelf.pin("active")
    space = KvSpace([pool.books], PAGE, borrower=shelf)
    service = space.add(
        KvNeeds(
            llm="active",
            token_bytes=PAGE,
            input_tokens=1.0,
            output_tokens=1.0,
            usual_output_tokens=1,
        )
    )
    assert space.pages() == 8
    table = space.open(service)
    assert table.grow(4)
    assert (cheap.resident_bytes, dear.complete) == (PAGE, True)
    assert table.grow(7)
    assert (cheap.resident_bytes, dear.resident_bytes) == (0, PAGE)
    assert not table.grow(9)
    assert table.grow(8)
    assert (pool.free, shelf.revoked_pages) == (0, 6)
    table.release()
    link = Link(SystemClock())
    load = _begin(link, cheap, source)
    assert load.ended.wait(SOON_S)
    link.close()
    shelf.pin("cheap")
    assert bytes(cheap.view()) == source.tobytes()
    with pytest.raises(NotResident):
        shelf.pin("dear")
    shelf.unpin("active")
    for llm in ("active", "dear", "cheap"):
        shelf.take(llm)
    assert pool.free == 12
    assert "active" not in shelf
    pool.close()


def test_shards_of_an_llm_lose_alike_and_are_pinned_together():
    """Weights on two GPUs: what KV needs on one of them is dropped on both, so no shard
    is kept without the other; if one is not whole, neither is pinned."""
    pools = [PagePool(PosixMemory(PAGE, 4), order=n) for n in (0, 1)]
    shelf = Shelf()
    shards = [_resident(pool, 3, n)[0] for n, pool in enumerate(pools)]
    shelf.put("wide", shards)
    assert shelf.revocable(pools[0].books) == 3
    assert shelf.revoke(pools[0].books, 2) == 2
    assert [pool.free for pool in pools] == [3, 3]
    assert [own.resident_bytes for own in shards] == [PAGE, PAGE]
    with pytest.raises(NotResident):
        shelf.pin("wide")
    assert not any(own.pinned for own in shards)
    with pytest.raises(ValueError, match="wide is here"):
        shelf.put("wide", shards)
    shelf.take("wide")
    for pool in pools:
        pool.close()


def test_what_is_kept_is_not_on_loan():
    """Weights that a plan gave their memory, or that requests wait for, stay whatever KV
    asks for, also while they are only there in part; others go before them."""
    pool, shelf = PagePool(PosixMemory(PAGE, 6)), Shelf()
    planned, _ = _resident(pool, 3, 1)
    lent, _ = _resident(pool, 2, 2)
    shelf.put("planned", [planned], score=1.0)
    shelf.put("lent", [lent], score=9.0)
    shelf.keep("planned")
    shelf.keep("planned")
    assert shelf.revoke(pool.books, 5) == 2
    assert (planned.complete, lent.resident_bytes) == (True, 0)
    shelf.lend("planned")
    assert shelf.revocable(pool.books) == 0
    shelf.lend("planned")
    assert shelf.revoke(pool.books, 1) == 1
    with pytest.raises(ValueError, match="planned is on loan"):
        shelf.lend("planned")
    pool.close()


def test_a_load_under_way_is_on_loan_too(gated):
    """Revoking counts the pages a load has not used yet, and takes those first."""
    memory, pool, link = gated
    shelf = Shelf()
    weights = Weights(pool, 6 * PAGE)
    source = _source(6 * PAGE)
    shelf.put("llm", [weights])
    load = _begin(link, weights, source)
    memory.let(1)
    until(lambda: load.copied_bytes == PAGE)
    assert shelf.revocable(pool.books) == 6
    memory.let(10)
    freed = shelf.revoke(pool.books, 2)
    assert freed >= 2
    assert pool.free == 2 + freed
    assert load.end in ("cancelled", "done")
    assert weights.resident_bytes == (6 - freed) * PAGE


def test_nobody_waits_for_what_is_taken_back_ahead(gated):
    """A load of six of eight pages stands at its first chunk when five free ones are
    wanted. Until that chunk is through nothing is free, but all pages count, and requests
    get the two that are left; then four more are there without being asked for again."""
    memory, pool, link = gated
    shelf = Shelf()
    weights = Weights(pool, 6 * PAGE)
    source = _source(6 * PAGE)
    shelf.put("llm", [weights])
    load = _begin(link, weights, source)
    until(lambda: memory.copied)
    space = KvSpace([pool.books], PAGE, borrower=shelf)
    needs = {"input_tokens": 1.0, "output_tokens": 1.0, "usual_output_tokens": 1}
    table = space.open(space.add(KvNeeds(llm="b", token_bytes=PAGE, **needs)))
    keeper = Keeper(space)
    keeper.want(5)
    until(lambda: load._cancelled)
    assert (space.pages(), shelf.revocable(pool.books), pool.free) == (8, 6, 2)
    assert table.grow(2)
    assert (space.pages(), pool.free) == (8, 0)
    memory.let(10)
    until(lambda: pool.free >= 4)
    keeper.close()
    assert load.end == "cancelled"
    assert space.pages() == 8
    assert table.grow(6)
    table.release()


class Loans(RuleBasedStateMachine):
    """Weights of three LLMs are loaded, cancelled, pinned, dropped and taken back by KV in
    any order, with copies under way: what is resident is right, the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PosixMemory(PAGE, 10))
        self.link = Link(SystemClock(), chunk_bytes=1000, map_bytes=PAGE)
        self.shelf = Shelf()
        self.sources = [_source(size, size) for size in (3 * PAGE, 4 * PAGE - 1, 9000)]
        self.weights = [Weights(self.pool, len(source)) for source in self.sources]
        for number, own in enumerate(self.weights):
            self.shelf.put(str(number), [own], score=number)
        self.kv: list = []

    @rule(which=st.integers(0, 2), urgent=st.booleans())
    def load(self, which: int, urgent: bool) -> None:
        own = self.weights[which]
        own.settle()
        if not own.pinned:
            pages = self.pool.books.take(own.missing_pages, top=True)
            if pages is not None:
                source = self.sources[which].ctypes.data
                own.load(self.link, source, pages, urgent=urgent)

    @rule(which=st.integers(0, 2))
    def stop(self, which: int) -> None:
        self.weights[which].stop()

    @rule(which=st.integers(0, 2))
    def pin(self, which: int) -> None:
        own = self.weights[which]
        own.settle()
        if own.pinned:
            own.unpin()
        elif own.complete:
            own.pin()

    @rule(count=st.integers(1, 8))
    def kv_grows(self, count: int) -> None:
        """As `KvSpace` does: what is missing is taken back if all of it can be."""
        books = self.pool.books
        missing = count - books.free
        if missing > 0:
            could = self.shelf.revocable(books)
            freed = self.shelf.revoke(books, missing)
            assert freed >= min(missing, could)
        enough = books.free >= count
        pages = books.take(count)
        assert (pages is not None) == enough
        if pages is not None:
            self.kv.append(pages)

    @rule()
    def kv_ends(self) -> None:
        # No precondition: how much is there depends on how far cancelled loads came, and
        # what is drawn must not.
        if self.kv:
            self.kv.pop().release()

    @invariant()
    def right(self) -> None:
        for own, source in zip(self.weights, self.sources, strict=True):
            if own._load is None or own._load[1].ended.is_set():
                own.settle()
                size = own.resident_bytes
                assert own.slot.mapped == self.pool.pages_for(size)
                if size:
                    seen = bytes(own.slot.view(0, size))
                    assert seen == source[:size].tobytes()

    def teardown(self) -> None:
        for own in self.weights:
            own.stop()
        held = sum(own.slot.mapped for own in self.weights)
        held += sum(len(pages) for pages in self.kv)
        assert self.pool.free + held == self.pool.capacity
        self.link.close()
        self.pool.close()


TestLoans = Loans.TestCase
TestLoans.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_books_of_pools_are_told_apart():
    """Revoking from one GPU asks nothing of another."""
    shelf = Shelf()
    pool = PagePool(PosixMemory(PAGE, 3))
    own, _ = _resident(pool, 2)
    shelf.put("llm", [own])
    other = Books(3)
    assert (shelf.revocable(other), shelf.revoke(other, 2)) == (0, 0)
    assert own.complete
    pool.close()
