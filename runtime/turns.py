"""Which LLM of a group runs next, with which requests, and who gives up memory for it.

Several LLMs share the GPUs of a group and one pool of KV pages; an iteration runs one of
them. An engine, simulated or real, keeps a `Standing` per request and calls `next_turn`
before each iteration. Nothing here changes what it is given. The rules are those of the
SeaLLM-like design (our reconstruction; sections are those of its reference).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from foreserve.runtime.scheduler import Key, Policy, Profile, Progress, order


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a group's scheduler is set to."""

    max_num_seqs: int = 256
    """Of one LLM in one iteration."""
    max_prompt_tokens: int = 2048
    """Of one iteration; a longer prompt has one to itself."""
    near: float = 0.1
    """Who runs gives way only to a cost lower by this share; LLMs whose costs differ by no
    more than it go by the size of their batch."""
    patience: float = math.inf
    """Who was not served for this many e_s goes first."""
    eager: bool = True
    """Prompts of the LLM whose turn it is come before its decodes as long as its batch has
    room. False: only prompts whose request ranks first."""
    quota_every_s: float = 8.0
    """How often LLMs that use little of their quota give to those that are full."""


class Standing(Protocol):
    """One request as the choice sees it. Pages are those on each GPU of the group."""

    @property
    def progress(self) -> Progress: ...

    @property
    def prompt_tokens(self) -> int:
        """To compute before it can decode; 0: it decodes (after its KV has been swapped
        in, if it is not resident)."""
        ...

    @property
    def next_pages(self) -> int:
        """Held after one more iteration."""
        ...

    @property
    def promise(self) -> int:
        """Set aside for it while it is resident: its tokens and the output expected."""
        ...

    @property
    def pages(self) -> int:
        """Held."""
        ...

    @property
    def resident(self) -> bool: ...


S = TypeVar("S", bound=Standing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Memory of a GPU that some of the LLMs use."""

    services: frozenset[int]
    pages: int
    """That their requests together have, or could have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(Generic[S]):
    """What the next iteration does."""

    service: int
    batch: tuple[S, ...]
    """Best first. Those not resident become so."""
    prompts: bool
    """The batch computes prompts; else each of it gets a token."""
    evicted: tuple[S, ...]
    """Give up their pages first."""
    overdue: bool
    """Somebody runs for having waited too long, and will rank lower after it."""
    others_fit: bool
    """A request that waits, and is not of this batch, could have become resident."""


def next_turn(
    standings: Collection[S],
    *,
    policy: Policy,
    rules: Rules,
    now_s: float,
    profiles: Sequence[Profile],
    pages: int,
    quotas: Mapping[int, float],
    running: Collection[int] = frozenset(),
    bounds: Sequence[Bound] = (),
) -> Turn[S]:
    """The turn at ``now_s`` of one or more requests, each of which fits ``pages`` alone.
    ``bounds``: of GPUs that not all LLMs here use, beside those that all do; what follows
    holds on each, and who does not fit somewhere bars those behind it there.

    Requests become resident in the order of the policy, as long as what is promised to
    all residents fits the pool and their LLM's room in a batch is not used up; who does
    not fit bars those behind it. An LLM beyond its quota (``quotas``, in pages) gets no
    further ones while another one within its own has somebody waiting. The very first
    may evict residents that rank lowest, but no LLM's last one. The turn is that of the
    first request's LLM, or of one whose best costs hardly more and whose batch is larger.
    When pages for the batch run out, those who rank lowest are evicted, LLMs' last ones
    at the end. O(n log n).
    """
    rank = order(
        policy,
        now_s=now_s,
        profiles=profiles,
        running=running,
        margin=rules.near,
        patience=rules.patience,
    )
    ranks = {s: rank(s.progress) for s in standings}
    ranked = sorted(standings, key=ranks.__getitem__)
    everyone = frozenset(s.progress.service for s in ranked)
    rooms = _Rooms([Bound(services=everyone, pages=pages), *bounds])
    joining, evicted = _joining(
        ranked, policy=policy, rules=rules, rooms=rooms, quotas=quotas
    )
    able: dict[int, list[S]] = {}
    for s in ranked:
        if (s.resident and s not in evicted) or s in joining:
            able.setdefault(s.progress.service, []).append(s)
    mine = (
        ranked[0].progress.service
        if evicted
        else _service(able, ranks, rules, policy.costs)
    )
    prompts, decodes = _batches(able[mine], rules)
    # Who ranks first decides what it is; others' prompts only where they are wanted.
    to_prompt = bool(prompts) and (rules.eager or able[mine][0] is prompts[0])
    batch = prompts if to_prompt else decodes
    short = _short(batch, [s for s in ranked if s not in evicted], rooms)
    chosen = {s: None for s in batch if s not in short}
    return Turn(
        service=mine,
        batch=tuple(chosen),
        prompts=to_prompt,
        evicted=tuple(s for s in (*evicted, *short) if s.resident),
        overdue=any(not ranks[s][0] for s in chosen),
        others_fit=any(s not in chosen for s in joining),
    )


def rebalance(
    quotas: Mapping[int, float],
    used: Mapping[int, float],
    waiting: Collection[int],
    *,
    least: Mapping[int, float],
    share: float = 0.1,
    full: float = 0.9,
) -> dict[int, float]:
    """Quotas (pages by LLM) after idle LLMs have given to full ones; the sum stays.

    Full is who uses ``full`` of its quota and has requests ``waiting``; it asks for
    ``share`` of its quota. Idle is who uses less and has none waiting; it offers as much of
    its own as it does not use, and keeps ``least``.
    """
    asked = {
        s: share * quota
        for s, quota in quotas.items()
        if s in waiting and used[s] >= full * quota
    }
    offered = {
        s: max(0.0, min(share * quota, quota - max(used[s], least[s])))
        for s, quota in quotas.items()
        if s not in waiting and used[s] < full * quota
    }
    moved = min(sum(asked.values()), sum(offered.values()))
    if moved <= 0:
        return dict(quotas)
    give, get = moved / sum(offered.values()), moved / sum(asked.values())
    return {
        s: quota + get * asked.get(s, 0.0) - give * offered.get(s, 0.0)
        for s, quota in quotas.items()
    }


def swaps(kv_bytes: float, link_bytes_per_s: float, recompute_s: float) -> bool:
    """Whether KV that must leave a GPU is worth two ways over its link (section 5):
    else it is dropped, and computed again."""
    return link_bytes_per_s > 0 and 2 * kv_bytes / link_bytes_per_s < recompute_s


class _Rooms:
    """What each bound allows, and which of them an LLM is under."""

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self.pages = [bound.pages for bound in bounds]
        services = {service for bound in bounds for service in bound.services}
        self.of: dict[int, list[int]] = {
            service: [i for i, b in enumerate(bounds) if service in b.services]
            for service in services
        }

    def add(self, sums: list[int], s: Standing, pages: int) -> None:
        """``pages`` of ``s``, wherever it counts."""
        for i in self.of[s.progress.service]:
            sums[i] += pages


def _joining(
    ranked: Sequence[S],
    *,
    policy: Policy,
    rules: Rules,
    rooms: _Rooms,
    quotas: Mapping[int, float],
) -> tuple[dict[S, None], list[S]]:
    """Who may become resident, and who is evicted for the very first."""
    residents = [s for s in ranked if s.resident]
    booked = [0] * len(rooms.pages)
    for s in residents:
        rooms.add(booked, s, max(s.pages, s.promise))
    used: Counter[int] = Counter()
    for s in residents:
        used[s.progress.service] += s.promise
    wanting, seen = set(), set()
    for s in ranked:
        service = s.progress.service
        if not s.resident and service not in seen:
            seen.add(service)
            if not used[service] or used[service] + s.promise <= quotas[service]:
                wanting.add(service)
    count = Counter(s.progress.service for s in residents)
    first: set[int] = set()
    shut: set[int] = set()
    barred: set[int] = set()
    """Bounds that somebody did not fit into."""
    joining: dict[S, None] = {}
    evicted: list[S] = []
    for s in ranked:
        service, is_first = s.progress.service, s.progress.service not in first
        first.add(service)
        if s.resident or service in shut:
            continue
        if not is_first and count[service] >= rules.max_num_seqs:
            continue
        within = not used[service] or used[service] + s.promise <= quotas[service]
        if not within and wanting - {service}:
            shut.add(service)
            continue
        mine = rooms.of[service]
        if not barred.isdisjoint(mine):
            continue
        promise = min(s.promise, *(rooms.pages[i] for i in mine))
        lacking = {
            i: lack for i in mine if (lack := booked[i] + promise - rooms.pages[i]) > 0
        }
        if lacking and s is ranked[0] and policy.keeps:
            evicted = _lowest(residents, lacking, rooms)
            lacking = {} if evicted else lacking
            for v in evicted:
                rooms.add(booked, v, -max(v.pages, v.promise))
        if lacking:
            barred |= lacking.keys()
            if 0 in barred:
                break
            continue
        rooms.add(booked, s, promise)
        used[service] += s.promise
        count[service] += 1
        joining[s] = None
    return joining, evicted


def _lowest(
    residents: Sequence[S], lacking: Mapping[int, int], rooms: _Rooms
) -> list[S]:
    """Those that rank lowest and free what is ``lacking`` of what is promised, by bound,
    without any LLM's last; none if they cannot."""
    left = Counter(s.progress.service for s in residents)
    lacks = [lacking.get(i, 0) for i in range(len(rooms.pages))]
    found: list[S] = []
    for s in reversed(residents):
        if max(lacks) <= 0:
            break
        service = s.progress.service
        if left[service] > 1 and any(lacks[i] > 0 for i in rooms.of[service]):
            left[service] -= 1
            rooms.add(lacks, s, -max(s.pages, s.promise))
            found.append(s)
    return found if max(lacks) <= 0 else []


def _service(
    able: Mapping[int, Sequence[S]],
    ranks: Mapping[S, tuple[bool, Key]],
    rules: Rules,
    costs: bool,
) -> int:
    """Whose turn it is: the smallest rank, or a near one with a larger batch."""
    best = min(able, key=lambda service: ranks[able[service][0]])
    on_time, key = ranks[able[best][0]]
    if not (costs and on_time):
        return best
    most = key[0] / (1 - rules.near)

    def preference(service: int) -> tuple[int, tuple[bool, Key]]:
        lead = able[service][0]
        like = sum(
            bool(s.prompt_tokens) == bool(lead.prompt_tokens) for s in able[service]
        )
        return -min(like, rules.max_num_seqs), ranks[lead]

    near = [s for s in able if ranks[able[s][0]][1][0] <= most]
    return min(near, key=preference)


def _batches(able: Sequence[S], rules: Rules) -> tuple[list[S], list[S]]:
    """An LLM's prompts and its decodes of one iteration each, in order."""
    prompts: list[S] = []
    decodes: list[S] = []
    budget = rules.max_prompt_tokens
    for s in able:
        if not s.prompt_tokens:
            if len(decodes) < rules.max_num_seqs:
                decodes.append(s)
        elif len(prompts) < rules.max_num_seqs and budget > 0:
            fits = s.prompt_tokens <= budget or not prompts
            budget = budget - s.prompt_tokens if fits else 0
            if fits:
                prompts.append(s)
    return prompts, decodes


def _short(batch: Sequence[S], there: Sequence[S], rooms: _Rooms) -> list[S]:
    """Who must go so that the batch gets its pages: lowest ranks first, an LLM's last one
    and the batch's first after all others."""
    gone: list[S] = []
    over = [-pages for pages in rooms.pages]
    for s in there:
        rooms.add(over, s, s.pages)
    for s in batch:
        rooms.add(over, s, s.next_pages - s.pages)
    if max(over) <= 0:
        return gone
    left = Counter(s.progress.service for s in there if s.resident)
    for spare_last in (True, False):
        for s in reversed(there):
            if max(over) <= 0:
                return gone
            service, in_batch = s.progress.service, s in batch
            if s is batch[0] or s in gone or not (s.resident or in_batch):
                continue
            if spare_last and s.resident and left[service] == 1:
                continue
            if all(over[i] <= 0 for i in rooms.of[service]):
                continue
            left[service] -= s.resident
            rooms.add(over, s, -(s.next_pages if in_batch else s.pages))
            gone.append(s)
    return gone
