"""One KV cache for LLMs of any shape: layout, grants, quotas, loans and swapping."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from foreserve.models.errors import InvalidInput
from foreserve.runtime.memory.books import Books, Pages
from foreserve.runtime.memory.kv import KvNeeds, KvSpace, KvTable
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.rules import spare_pages, tail_waste, tokens_per_page
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.scheduler import POLICIES, Profile, Progress
from foreserve.runtime.turns import Rules, next_turn

KIB, MIB = 1024, 1024**2


def _needs(llm: str, token_bytes: int, **changed) -> KvNeeds:
    usual = {"input_tokens": 10.0, "output_tokens": 6.0, "usual_output_tokens": 4}
    return KvNeeds(llm=llm, token_bytes=token_bytes, **{**usual, **changed})


@dataclass
class Loan:
    """Weights that took pages, and give back what they are told to, last ones first."""

    pages: dict[Books, Pages] = field(default_factory=dict)

    def take(self, pool: Books, count: int) -> None:
        taken = pool.take(count, top=True)
        assert taken is not None
        if pool in self.pages:
            self.pages[pool].absorb(taken)
        else:
            self.pages[pool] = taken

    def revocable(self, pool: Books) -> int:
        return len(self.pages[pool]) if pool in self.pages else 0

    def revoke(self, pool: Books, count: int) -> int:
        count = min(count, self.revocable(pool))
        if count:
            self.pages[pool].split(count).release()
        return count


@pytest.mark.parametrize(
    ("kappa_kib", "tokens", "waste_percent"),
    [
        (512, (4, 16, 32), (0, 0, 0)),  # LLaMA-2-7B
        (800, (2, 10, 20), (21.9, 2.3, 2.3)),  # LLaMA-2-13B
        (400, (5, 20, 40), (2.3, 2.3, 2.3)),  # LLaMA-2-13B at TP 2
        (780, (2, 10, 21), (23.8, 4.8, 0)),  # LLaMA-30B at TP 2
        (640, (3, 12, 25), (6.2, 6.2, 2.3)),  # LLaMA-65B at TP 4
        (80, (25, 102, 204), (2.3, 0.4, 0.4)),  # LLaMA-70B at TP 4
        (128, (16, 64, 128), (0, 0, 0)),  # LLaMA-3-8B
        (56, (36, 146, 292), (1.6, 0.2, 0.2)),  # Qwen2.5-7B
    ],
)
def test_tokens_and_waste_of_a_page(kappa_kib, tokens, waste_percent):
    """The design's table for pages of 2, 8 and 16 MiB: whole tokens of all layers, and
    what is left over behind them."""
    for mib, count, percent in zip((2, 8, 16), tokens, waste_percent, strict=True):
        page, token = mib * MIB, kappa_kib * KIB
        assert tokens_per_page(page, token) == count
        # 30B at 16 MiB wastes 0.02 %, printed as 0.
        assert 100 * tail_waste(page, token) == pytest.approx(percent, abs=0.051)


def test_what_an_instance_can_lend():
    """100 blocks, 8 requests of at most 32 with 20 blocks: max(25, 23.125) stay, 75 go.
    With 60 in use 63.125 stay, rounded up."""
    assert spare_pages(100, 8, 32, 20) == 75
    assert spare_pages(100, 8, 32, 60) == 36
    assert spare_pages(100, 32, 32, 20) == 0


def test_llms_of_different_shapes_share_one_pool():
    """4 and 10 tokens a page: tables grow by whole pages, at once on all GPUs of their
    LLM; where one GPU has none left, nothing is taken from the others, and it goes on as
    soon as another LLM's request ends."""
    pools = [Books(6, order=0), Books(6, order=1)]
    space = KvSpace(pools, 40)
    wide = space.add(_needs("wide", 10, pools=(0, 1)))
    small = space.add(_needs("small", 4, pools=(1,)))
    one, other = space.open(wide), space.open(small)
    assert one.grow(17)
    assert (one.pages, one.room_tokens, space.used(1)) == (5, 20, 5)
    assert not other.grow(11)
    assert other.grow(10)
    assert (list(other.numbers()), other.room_tokens) == ([5], 10)
    assert [pool.free for pool in pools] == [1, 0]
    assert not one.grow(21)
    assert [pool.free for pool in pools] == [1, 0]
    other.release()
    assert one.grow(21)
    assert [list(one.numbers(shard)) for shard in (0, 1)] == [[*range(6)]] * 2


def test_floors_quotas_and_promises():
    """Pages of 40 bytes: LLMs of 10 and 4 bytes a token. A usual request has 14 tokens,
    so 4 and 2 pages; of 30 pages the 24 others go by rate x bytes: 10 to 8. A request of
    10 tokens is promised the 3 more it will keep: 13 tokens."""
    space = KvSpace([Books(30)], 40)
    wide = space.add(_needs("wide", 10))
    small = space.add(_needs("small", 4, rate_rps=2.0))
    assert (space.floor(wide), space.floor(small)) == (4, 2)
    assert space.quotas == {
        wide: pytest.approx(4 + 24 * 10 / 18),
        small: pytest.approx(2 + 24 * 8 / 18),
    }
    assert (space.promise(wide, 10), space.promise(small, 10)) == (4, 2)
    assert space.promise(small, 10, next_pages=7) == 7
    table = space.open(small)
    table.promise = 12
    assert table.grow(30)
    before = dict(space.quotas)
    space.rebalance({small})
    assert space.quotas[small] == pytest.approx(before[small] * 1.1)
    assert sum(space.quotas.values()) == pytest.approx(30)
    with pytest.raises(InvalidInput, match="a token takes 41 bytes"):
        space.add(_needs("huge", 41))


def test_pages_on_loan_come_back_before_a_request_goes_without():
    """Of 20 pages 12 are lent. A request that needs 10 gets them, for which 2 are taken
    back; one that would need 11 more, with 10 on loan and none free, gets nothing, and
    then nothing is taken back either."""
    books, loan = Books(20), Loan()
    space = KvSpace([books], 40, borrower=loan)
    llm = space.add(_needs("wide", 10))
    loan.take(books, 12)
    assert space.pages() == 20
    first, second = space.open(llm), space.open(llm)
    assert first.grow(40)
    assert (first.pages, loan.revocable(books), books.free) == (10, 10, 0)
    assert not second.grow(41)
    assert (second.pages, loan.revocable(books)) == (0, 10)
    assert space.keep_free(3)
    assert (books.free, loan.revocable(books)) == (3, 7)
    assert not space.keep_free(11)
    assert (books.free, loan.revocable(books)) == (10, 0)
    first.release()
    assert first.numbers() == ()
    assert books.free == 20
    first.release()
    assert books.free == 20


def test_what_may_be_lent_leaves_reserve_and_floors():
    """100 pages, requests of at most 32 at a time: with 8 of them and 20 pages in use 75
    may be lent, as in the design's example; with 50 lent 25 more. The floor of an idle LLM
    counts as used, and so does what is promised; where no LLM is served, everything may
    go."""
    books, loan = Books(100), Loan()
    space = KvSpace([books], 40, borrower=loan, most=32, ahead_tokens=0)
    assert space.lendable() == 100
    busy = space.add(_needs("busy", 10))
    tables = [space.open(busy) for _ in range(8)]
    for number, table in enumerate(tables):
        assert table.grow(8 if number < 6 else 16)
    assert space.used() == 20
    assert space.lendable() == 75
    loan.take(books, 50)
    assert space.lendable() == 25
    idle = space.add(_needs("idle", 10, input_tokens=60.0))
    assert space.floor(idle) == 16
    assert space.lendable() == 100 - 40 - 50  # 20 + 16 + 100 / 32, rounded up
    assert space.soon() == 16
    tables[0].promise = 7  # It has two.
    assert (space.lendable(), space.soon()) == (5, 21)
    space.ahead_tokens = 8  # Two pages more of those that have not more promised.
    assert space.soon() == 5 + 7 * 2 + 16
    assert space.lendable() == 0
    space.remove(busy)
    assert books.free == 50


def test_a_swapped_request_comes_back_as_it_was():
    """Its pages go to the host, others write where it was, and it returns to other pages
    with the same bytes; where the host has no room nothing happens. By the clock a copy
    takes a second, however many pages: one each at first, of three a tenth is learnt."""
    pool, seconds = PagePool(PosixMemory(4096, 8)), itertools.count()
    swap = Swap(pool, 3 * 4096 + 100, lambda: next(seconds))
    assert swap.bytes_per_s == 4096
    window = np.frombuffer(pool.window_span(), np.uint8).reshape(8, 4096)
    pages = pool.books.take(3)
    assert pages is not None
    window[list(pages.numbers)] = np.array([[5], [6], [7]], np.uint8)
    there = swap.out(pages.numbers)
    assert there is not None
    assert swap.host.free == 0
    assert swap.bytes_per_s == pytest.approx(4096 / (0.9 + 0.1 / 3))
    swap.try_out(0)  # No room for it.
    pages.release()
    window[:] = 0
    low = pool.books.take(4)
    again = pool.books.take(3)
    assert low is not None
    assert again is not None
    assert swap.out(low.numbers) is None
    swap.back(there, again.numbers)
    assert window[list(again.numbers), 100].tolist() == [5, 6, 7]
    assert swap.host.free == 3
    del window
    swap.close()
    pool.close()


class Space(RuleBasedStateMachine):
    """Three LLMs, at TP 1 and 2 over two GPUs, whose requests come, grow and go while
    weights borrow and give back."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = [Books(14, order=0), Books(11, order=1)]
        self.loan = Loan()
        self.space = KvSpace(self.pools, 40, borrower=self.loan, most=4)
        self.services = [
            self.space.add(_needs("both", 10, pools=(0, 1))),
            self.space.add(_needs("first", 4, pools=(0,))),
            self.space.add(_needs("second", 13, pools=(1,))),
        ]
        self.tables: list[KvTable] = []
        self.asked: dict[KvTable, int] = {}

    @rule(which=st.integers(0, 2))
    def open(self, which: int) -> None:
        self.tables.append(self.space.open(self.services[which]))

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99), tokens=st.integers(1, 40))
    def grow(self, at: int, tokens: int) -> None:
        table = self.tables[at % len(self.tables)]
        pools = {0: (0, 1), 1: (0,), 2: (1,)}[self.services.index(table.service)]
        need = max(0, -(-tokens // table.per_page) - table.pages)
        room = min(
            self.pools[p].free + self.loan.revocable(self.pools[p]) for p in pools
        )
        lent = [self.loan.revocable(pool) for pool in self.pools]
        assert table.grow(tokens) == (need <= room)
        if need > room:
            assert lent == [self.loan.revocable(pool) for pool in self.pools]
        else:
            assert table.room_tokens >= tokens
            self.asked[table] = max(tokens, self.asked.get(table, 0))

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99))
    def release(self, at: int) -> None:
        self.tables.pop(at % len(self.tables)).release()

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99), pages=st.integers(0, 6))
    def promise(self, at: int, pages: int) -> None:
        self.tables[at % len(self.tables)].promise = pages

    @rule(pool=st.integers(0, 1), share=st.floats(0, 1))
    def lend(self, pool: int, share: float) -> None:
        """As much as leaves max(C Q / B, T + C / B) to requests, by trying it out; who
        takes some may take the rest, and no more."""
        books, most = self.pools[pool], self.space.lendable(pool)
        there = self.services[:1] + self.services[pool + 1 : pool + 2]
        tables = [t for t in self.tables if t.service in there]
        usable = books.free + self.space.used(pool) + self.loan.revocable(books)
        likely = 0
        for service in there:
            mine = [t for t in tables if t.service == service]
            pages = [
                max(
                    t.pages,
                    t.promise,
                    t.pages and -(-(self.asked[t] + 8) // t.per_page),
                )
                for t in mine
            ]
            likely += max(sum(pages), self.space.floor(service))
        reserve = max(usable * len(tables) / 4, likely + usable / 4)
        lent = self.loan.revocable(books)
        fits = [n for n in range(books.free + 1) if lent + n + reserve <= usable]
        assert most == max(fits, default=0)
        count = int(most * share)
        self.loan.take(books, count)
        assert self.space.lendable(pool) == most - count
        # What is to be free soon is, and is not taken back at once.
        if count:
            assert books.free >= self.space.soon(pool)
            assert self.space.keep_free(self.space.soon(pool), pool)
            assert self.loan.revocable(books) == lent + count

    @rule(waiting=st.sets(st.integers(0, 2)))
    def rebalance(self, waiting: set[int]) -> None:
        before = sum(self.space.quotas.values())
        self.space.rebalance({self.services[w] for w in waiting})
        assert sum(self.space.quotas.values()) == pytest.approx(before)

    @invariant()
    def balanced(self) -> None:
        for index, pool in enumerate(self.pools):
            owned = (
                list(self.loan.pages[pool].numbers) if pool in self.loan.pages else []
            )
            for table in self.tables:
                pools = {0: (0, 1), 1: (0,), 2: (1,)}[
                    self.services.index(table.service)
                ]
                if index in pools:
                    owned += table.numbers(pools.index(index))
            assert len(owned) == len(set(owned)) == pool.held
            assert self.space.pages(index) == pool.capacity


TestSpace = Space.TestCase
TestSpace.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@dataclass(eq=False)
class Job:
    """A request of the driver below: a `turns.Standing` over a table."""

    progress: Progress
    input_tokens: int
    output_tokens: int
    table: KvTable
    given: int = 0
    computed: int = 0
    promise: int = 0

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.computed else self.input_tokens + self.given

    @property
    def next_pages(self) -> int:
        return -(-(self.prompt_tokens or self.computed + 1) // self.table.per_page)

    @property
    def pages(self) -> int:
        return self.table.pages

    @property
    def resident(self) -> bool:
        return bool(self.table.pages)


@given(
    policy=st.sampled_from(sorted(set(POLICIES) - {"oracle", "oracle-service"})),
    requests=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 20), st.integers(1, 12)),
        min_size=1,
        max_size=14,
    ),
    lent=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_turns_never_ask_for_pages_that_are_not_there(policy, requests, lent):
    """An engine that does what `next_turn` says over a space's books, over-subscribed and
    partly lent: every page a turn needs is granted, everybody ends, nothing is left."""
    books, loan = Books(12), Loan()
    loan.take(books, lent)
    space = KvSpace([books], 40, borrower=loan, most=4)
    services = [space.add(_needs("wide", 10)), space.add(_needs("small", 4))]
    profiles = [Profile(reference_s=3.0, decode_s=2.0) for _ in services]
    order = POLICIES[policy].make()
    jobs = []
    for number, (which, prompt, output) in enumerate(requests):
        progress = Progress(
            request=number, service=which, arrival_s=0.1 * number, prefill_s=0.5
        )
        progress = order.arrive(progress, profiles)
        table = space.open(services[which])
        jobs.append(Job(progress, prompt, output, table))
    now_s, running = 0.0, frozenset()
    while jobs:
        for job in jobs:
            if not job.resident:
                job.promise = job.table.promise = space.promise(
                    job.table.service, job.input_tokens, job.next_pages
                )
        turn = next_turn(
            jobs,
            policy=order,
            rules=Rules(max_num_seqs=4, max_prompt_tokens=30),
            now_s=now_s,
            profiles=profiles,
            pages=space.pages(),
            quotas=space.quotas,
            running=running,
        )
        for job in turn.evicted:
            service = job.table.service
            job.table.release()
            job.table, job.computed = space.open(service), 0
        now_s += 0.5
        for job in turn.batch:
            job.computed = job.prompt_tokens or job.computed + 1
            assert job.table.grow(job.computed)
            job.given += 1
            job.progress = order.ran(job.progress, 0.5, now_s)
            if job.given == job.output_tokens:
                job.table.release()
                jobs.remove(job)
        running = frozenset(job.progress.request for job in turn.batch)
        space.rebalance({job.table.service for job in jobs if not job.resident})
        assert now_s < 500
    assert books.held == loan.revocable(books)
