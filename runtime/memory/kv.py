"""One KV cache for all LLMs of a node: pages of fixed bytes, granted to requests.

A page holds whole tokens of all layers of one LLM (`rules.tokens_per_page`), so LLMs of any
shape and TP size take from the same pools, one per GPU, and nothing is fragmented. A page
number is a place in the pool's window: granting is bookkeeping and maps nothing.

Who joins, who is evicted and whether he is swapped is `turns.next_turn`'s to decide; this
tells it ``pages``, ``quotas`` and promises, and keeps the tables. What no request needs may
be lent to weights, and is taken back before a request would go without: by `Keeper` while
iterations go on, or else when it is granted.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from foreserve.models.errors import InvalidInput
from foreserve.runtime.memory.books import Books, Pages, take_all
from foreserve.runtime.memory.rules import (
    first_quotas,
    pages_of,
    promised_pages,
    spare_pages,
    tokens_per_page,
    usual_pages,
)
from foreserve.runtime.turns import rebalance

AHEAD_TOKENS = 8
"""Iterations that go on while what is lent is taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvNeeds:
    """What the space has to know of an LLM."""

    llm: str
    token_bytes: int
    """Of one token on each of its GPUs: all layers, keys and values."""
    pools: tuple[int, ...] = (0,)
    """Its GPUs, one per shard, as indices of the space's pools."""
    input_tokens: float
    output_tokens: float
    """Means."""
    usual_output_tokens: int
    """Output for which a request is promised pages when it joins: the median."""
    rate_rps: float = 1.0


class Borrower(Protocol):
    """Who has pages of the pools on loan, and has to do without them when told."""

    def revocable(self, pool: Books) -> int:
        """Pages of ``pool`` that `revoke` could free now."""
        ...

    def revoke(self, pool: Books, count: int) -> int:
        """Free at least ``count`` pages of ``pool``, or all that can be; how many. Returns
        when they are free."""
        ...


class Nobody:
    """Nothing is lent."""

    def revocable(self, pool: Books) -> int:
        return 0

    def revoke(self, pool: Books, count: int) -> int:
        return 0


@dataclass(slots=True, eq=False)
class KvTable:
    """The pages of one request, on each of its LLM's GPUs. Only `KvSpace.open` makes
    them; for one owner, the space's."""

    space: KvSpace
    service: int
    per_page: int
    """Tokens."""
    promise: int = 0
    """Pages set aside for it (`KvSpace.promise`); its owner keeps that up to date."""
    _shards: list[Pages] = field(default_factory=list)
    _tokens: int = 0
    """That it has pages for, as it was last asked."""

    @property
    def pages(self) -> int:
        """On each GPU."""
        return len(self._shards[0]) if self._shards else 0

    @property
    def room_tokens(self) -> int:
        return self.pages * self.per_page

    def numbers(self, shard: int = 0) -> Sequence[int]:
        """Its pages in order of its tokens; none once it is released."""
        return self._shards[shard].numbers if self._shards else ()

    def grow(self, tokens: int) -> bool:
        """Have pages for ``tokens`` in all, on every GPU or on none; False if there are
        none, not even on loan. Never gives any back."""
        missing = pages_of(tokens, self.per_page) - self.pages
        if missing <= 0:
            self._tokens = max(self._tokens, tokens)
            return True
        granted = self.space._grant(self.service, missing)
        if granted is None:
            return False
        if self._shards:
            for own, new in zip(self._shards, granted, strict=True):
                own.absorb(new)
        else:
            self._shards += granted
        self.space._count(self.service, missing)
        self._tokens = tokens
        return True

    def likely(self, ahead: int) -> int:
        """Pages that it has, was promised, or needs for so many tokens more."""
        soon = pages_of(self._tokens + ahead, self.per_page) if self.pages else 0
        return max(self.pages, self.promise, soon)

    def release(self) -> None:
        """Its pages are free, and it is no table any more; any number of calls."""
        self.space._count(self.service, -self.pages)
        for own in self._shards:
            own.release()
        self._shards.clear()
        self.space._forget(self)


class KvSpace:
    """The tables of all LLMs over the pools of their GPUs. Mutable, for one owner."""

    def __init__(
        self,
        pools: Sequence[Books],
        page_bytes: int,
        *,
        borrower: Borrower | None = None,
        most: int = 256,
        ahead_tokens: int = AHEAD_TOKENS,
    ) -> None:
        """``most``: requests at a time that a GPU is laid out for, for what may be lent;
        ``ahead_tokens``: of each request, for which pages are kept free."""
        self.pools = tuple(pools)
        self.page_bytes = page_bytes
        self.borrower: Borrower = borrower or Nobody()
        self.most, self.ahead_tokens = most, ahead_tokens
        self.quotas: dict[int, float] = {}
        """Soft shares in pages, by service; those of one GPU group are for `next_turn`."""
        self._needs: dict[int, KvNeeds] = {}
        self._tables: dict[KvTable, None] = {}
        self._held: dict[int, int] = {}
        """Pages on each GPU, by service."""
        self._made = 0
        self._taking = threading.Lock()
        """Back what is lent: one at a time, or two would take it twice."""

    # --- LLMs ----------------------------------------------------------------------

    def add(self, needs: KvNeeds) -> int:
        """An LLM joins, all quotas begin anew; its number, which is not used again."""
        if self.page_bytes < needs.token_bytes:
            raise InvalidInput(
                f"{needs.llm}: a token takes {needs.token_bytes} bytes, "
                f"a page has {self.page_bytes}",
                field="page",
                hint="larger pages",
            )
        service = self._made
        self._made += 1
        self._needs[service], self._held[service] = needs, 0
        self._first_quotas()
        return service

    def remove(self, service: int) -> None:
        """An LLM leaves, and whatever its requests had is free."""
        for table in [t for t in self._tables if t.service == service]:
            table.release()
        del self._needs[service], self._held[service]
        self._first_quotas()

    def per_page(self, service: int) -> int:
        """Tokens of that LLM in a page."""
        return tokens_per_page(self.page_bytes, self._needs[service].token_bytes)

    def promise(self, service: int, input_tokens: int, next_pages: int = 0) -> int:
        """Pages to set aside for a request that joins."""
        return promised_pages(
            input_tokens,
            self._needs[service].usual_output_tokens,
            next_pages,
            self.per_page(service),
        )

    def floor(self, service: int) -> int:
        """Pages of one usual request: neither quotas nor loans go below."""
        needs = self._needs[service]
        return usual_pages(
            needs.input_tokens, needs.usual_output_tokens, self.per_page(service)
        )

    def rebalance(self, waiting: Collection[int]) -> None:
        """LLMs that use little of their quota give to those that are full and have
        requests ``waiting``; call it every `turns.Rules.quota_every_s`."""
        used = dict.fromkeys(self._needs, 0)
        for table in self._tables:
            used[table.service] += table.promise
        least = {s: self.floor(s) for s in self._needs}
        for services in self._groups():
            mine = {s: self.quotas[s] for s in services}
            self.quotas |= rebalance(mine, used, set(waiting) & set(mine), least=least)

    def _groups(self) -> list[list[int]]:
        """Services by their GPUs: only pages of the same ones can be passed on."""
        found: dict[tuple[int, ...], list[int]] = {}
        for service, needs in self._needs.items():
            found.setdefault(needs.pools, []).append(service)
        return list(found.values())

    def _first_quotas(self) -> None:
        """By the KV that comes in. An LLM that meets others on one of its GPUs alone
        counts there, too: its quota is the least of what its GPUs would give it."""
        self.quotas = {}
        for index, pool in enumerate(self.pools):
            there = {s: n for s, n in self._needs.items() if index in n.pools}
            shares = first_quotas(
                pool.capacity,
                {s: self.floor(s) for s in there},
                {
                    s: n.rate_rps * n.token_bytes * (n.input_tokens + n.output_tokens)
                    for s, n in there.items()
                },
            )
            for service, share in shares.items():
                self.quotas[service] = min(share, self.quotas.get(service, share))

    # --- requests ------------------------------------------------------------------

    def open(self, service: int) -> KvTable:
        """An empty table for a request of that LLM."""
        if service not in self._needs:
            raise ValueError(f"service {service} is not here")
        table = KvTable(self, service, self.per_page(service))
        self._tables[table] = None
        return table

    def pages(self, pool: int = 0) -> int:
        """Pages of that GPU that requests have, or could have: `next_turn`'s ``pages``."""
        books = self.pools[pool]
        # In this order: what becomes free meanwhile counts twice rather than not at all,
        # for which requests would be evicted.
        lent = self.borrower.revocable(books)
        return lent + books.free + self.used(pool)

    def used(self, pool: int = 0) -> int:
        """Pages that requests have there."""
        return sum(
            self._held[service]
            for service, needs in self._needs.items()
            if pool in needs.pools
        )

    def _grant(self, service: int, count: int) -> tuple[Pages, ...] | None:
        """For `KvTable.grow`."""
        pools = [self.pools[index] for index in self._needs[service].pools]
        granted = take_all(pools, count)
        if granted is None:
            with self._taking:
                self._take_back(pools, count)
            granted = take_all(pools, count)
        return granted

    def _count(self, service: int, pages: int) -> None:
        """For `KvTable`: so many pages more."""
        if service in self._held:
            self._held[service] += pages

    def _forget(self, table: KvTable) -> None:
        """For `KvTable.release`."""
        self._tables.pop(table, None)

    # --- lending -------------------------------------------------------------------

    def soon(self, pool: int = 0) -> int:
        """Pages of that GPU that should be free now, or iterations will wait: what its
        requests are likely to take next, and what an LLM lacks to a usual one."""
        return self._likely(pool)[1] - self.used(pool)

    def keep_free(self, count: int, pool: int = 0) -> bool:
        """Take back what is lent until ``count`` pages of that GPU are free, or nothing is
        lent; whether they are. Any thread: called while iterations go on, so that none
        waits for it."""
        books = self.pools[pool]
        with self._taking:
            if books.free < count:
                self.borrower.revoke(books, count - books.free)
        return books.free >= count

    def _take_back(self, pools: Sequence[Books], count: int) -> None:
        """All that is missing, or nothing at all."""
        missing: Mapping[Books, int] = {
            pool: count - free for pool in pools if (free := pool.free) < count
        }
        if all(self.borrower.revocable(pool) >= n for pool, n in missing.items()):
            for pool, short in missing.items():
                self.borrower.revoke(pool, short)

    def lendable(self, pool: int = 0) -> int:
        """Pages of that GPU that weights may take now on top of what they have: beyond
        what its requests, and a usual one of each LLM that has fewer, are likely to need
        and the reserve (`rules.spare_pages`). Whatever they take must be revocable, or be
        meant to stay."""
        books = self.pools[pool]
        if not any(pool in needs.pools for needs in self._needs.values()):
            return books.free
        requests, likely = self._likely(pool)
        spare = spare_pages(self.pages(pool), requests, self.most, likely)
        return max(0, min(spare - self.borrower.revocable(books), books.free))

    def _likely(self, pool: int) -> tuple[int, int]:
        """Requests in flight on that GPU, and pages that they are likely to come to; an
        LLM has one usual request's at least."""
        pages = {s: 0 for s, needs in self._needs.items() if pool in needs.pools}
        requests = 0
        for table in self._tables:
            if table.service in pages:
                pages[table.service] += table.likely(self.ahead_tokens)
                requests += 1
        return requests, sum(max(n, self.floor(s)) for s, n in pages.items())


class Keeper:
    """Has a thread take back what is lent while iterations go on."""

    def __init__(self, space: KvSpace) -> None:
        self._space = space
        self._wanted: int | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def want(self, count: int) -> None:
        """Have so many pages free soon; does not wait. The last number counts."""
        with self._changed:
            self._wanted = count
            self._changed.notify()

    def close(self) -> None:
        """End after what is being taken back."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._wanted is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                count, self._wanted = self._wanted, None
            assert count is not None
            self._space.keep_free(count)
