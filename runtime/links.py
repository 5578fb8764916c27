"""Loads over the links of one node, in virtual time, as fluids.

A load first waits for its engine process, then its bytes stream through storage (unless
they are in pinned host memory), the link that the node's GPUs may share, and the link of
each of its GPUs, all at once: the slowest sets the pace. Whatever links they share is
divided max-min fairly, in bytes per second of each load; what requests wait for comes
first and leaves the rest to the others.

A GPU's own link takes one load at a time: urgent ones first, then in the order in which
they became ready; an urgent load interrupts one that is not. To share it would end no
load sooner: of two equal loads, both would end when the second of a queue does. A load
that waits for several links holds its place on each, so it is never overtaken for ever.

Between events everything moves in a straight line, so each load's end is known, and stays
the same number until its speed changes. Pure bookkeeping: the owner calls.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from foreserve.models.loading import LOADERS, LoadRules
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId, GpuType, Node

Link = Literal["storage", "host"] | GpuId
"""``host``: what all GPUs of the node share; a GPU: its own link."""

INSTANT_S = 1e-9
"""Nothing takes less, so that rates are finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What one load moves, and how long it takes with all links to itself."""

    alone_s: float
    uses_s: Mapping[Link, float]
    """For how long it would fill each link: at most ``alone_s``."""
    num_bytes: Mapping[Link, int]

    @property
    def gpus(self) -> frozenset[GpuId]:
        return frozenset(link for link in self.uses_s if isinstance(link, GpuId))

    @property
    def size(self) -> int:
        """What its rate counts: the most it moves over any one link."""
        return max(1, *self.num_bytes.values())


def transfer(
    option: ReplicaOption,
    gpus: Iterable[GpuId],
    node: Node,
    gpu: GpuType,
    rules: LoadRules,
    *,
    pinned: bool,
    noise: float = 1.0,
) -> Transfer:
    """The load of a replica; ``pinned``: its weights are in host memory. With the host
    cache ``all`` it takes the option's time, without the start of its process. ``noise``
    multiplies all its times."""
    known = LOADERS["fast"]
    # What it waits for a process is the owner's to count.
    moves_s = option.load_s - option.start_s
    copy_s = moves_s if option.copy_s is None else option.copy_s
    alone_s = moves_s if rules.host_cache == "all" else copy_s
    uses_s: dict[Link, float] = dict.fromkeys(gpus, min(copy_s, alone_s))
    num_bytes: dict[Link, int] = dict.fromkeys(gpus, option.shard_bytes)
    if node.host_link_bytes_per_s is not None:
        num_bytes["host"] = option.shard_bytes * option.tp
        rate = node.host_link_bytes_per_s * known.link_share
        uses_s["host"] = num_bytes["host"] / rate
    if not pinned and rules.host_cache != "all":
        num_bytes["storage"] = option.stored_bytes
        rate = node.storage_bytes_per_s * known.storage_share
        uses_s["storage"] = option.stored_bytes / rate
        readers = known.readers_bytes_per_s(option.tp)
        alone_s = max(alone_s, option.stored_bytes / readers)
    alone_s = max(INSTANT_S, alone_s, *uses_s.values())
    return Transfer(
        alone_s=alone_s * noise,
        uses_s={link: seconds * noise for link, seconds in uses_s.items()},
        num_bytes=num_bytes,
    )


@dataclass(slots=True, eq=False)
class _Load:
    transfer: Transfer
    ready_s: float
    order: int
    most: float
    """Of its own speed, at most."""
    left_s: float
    """At ``since_s``, in seconds alone."""
    since_s: float
    urgent: bool = False
    speed: float = 0.0

    @property
    def ends_s(self) -> float:
        return self.since_s + self.left_s / self.speed if self.speed else math.inf

    def move(self, now_s: float) -> float:
        """Bring it to ``now_s``; the share of the whole load that has moved since."""
        ended = now_s >= self.ends_s
        moved_s = self.left_s if ended else self.speed * (now_s - self.since_s)
        moved_s = min(moved_s, self.left_s)
        self.left_s, self.since_s = self.left_s - moved_s, now_s
        return moved_s / self.transfer.alone_s


class Links:
    """The loads under way on one node. Mutable, for one owner, who calls `advance` at
    every ``next_s`` and in between as often as he likes."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s, self._asked = now_s, 0
        self._loads: dict[Hashable, _Load] = {}
        self._factor = 1.0
        self.used_s: dict[Link, float] = {}
        """For how long each link was filled, by loads up to their last event."""
        self.moved_bytes: dict[Link, float] = {}

    @property
    def next_s(self) -> float:
        """When a load ends or becomes ready."""
        times = [load.ends_s for load in self._loads.values()]
        waits = [load.ready_s for load in self._loads.values()]
        return min([*times, *(s for s in waits if s > self._now_s)], default=math.inf)

    @property
    def copying(self) -> frozenset[GpuId]:
        """GPUs to which bytes are on their way now."""
        moving = [load for load in self._loads.values() if load.speed]
        return frozenset(gpu for load in moving for gpu in load.transfer.gpus)

    def speed(self, key: Hashable) -> float:
        """Of a load now: 1 is its own with all links to itself; 0: it waits."""
        return self._loads[key].speed

    def add(
        self,
        key: Hashable,
        load: Transfer,
        now_s: float,
        *,
        ready_s: float = -math.inf,
        most: float = 1.0,
    ) -> None:
        """A load is asked for. Its process is there at ``ready_s``; it goes at ``most``
        times its own speed; nobody waits for it yet."""
        self._loads[key] = _Load(
            transfer=load,
            ready_s=max(ready_s, now_s),
            order=self._asked,
            most=most,
            left_s=load.alone_s,
            since_s=now_s,
        )
        self._asked += 1
        self._share(now_s)

    def cancel(self, key: Hashable, now_s: float) -> dict[Link, float]:
        """The load leaves its links; the bytes it has moved over each."""
        load = self._loads[key]
        self._book(load, now_s)
        done = 1 - load.left_s / load.transfer.alone_s
        del self._loads[key]
        self._share(now_s)
        return {link: done * size for link, size in load.transfer.num_bytes.items()}

    def advance(self, now_s: float) -> tuple[Hashable, ...]:
        """Pass to ``now_s``, not after ``next_s``: the loads that end there."""
        ended = [key for key, load in self._loads.items() if load.ends_s <= now_s]
        for key in ended:
            self._book(self._loads.pop(key), now_s)
        self._share(now_s)
        return tuple(ended)

    def set_urgent(self, urgent: Iterable[Hashable], now_s: float) -> None:
        """From now on requests wait for these loads, and for no other."""
        waited = set(urgent)
        for key, load in self._loads.items():
            load.urgent = key in waited
        self._share(now_s)

    def set_most(self, most: Mapping[Hashable, float], now_s: float) -> None:
        """From now on these loads go at most that many times their own speed."""
        for key, value in most.items():
            self._loads[key].most = value
        self._share(now_s)

    def set_factor(self, factor: float, now_s: float) -> None:
        """From now on everything on this node takes ``factor`` times as long."""
        self._factor = factor
        self._share(now_s)

    def _book(self, load: _Load, now_s: float) -> None:
        part = load.move(now_s)
        for link, seconds in load.transfer.uses_s.items():
            self.used_s[link] = self.used_s.get(link, 0.0) + part * seconds
        for link, size in load.transfer.num_bytes.items():
            self.moved_bytes[link] = self.moved_bytes.get(link, 0.0) + part * size

    def _share(self, now_s: float) -> None:
        """Decide afresh who moves, and how fast."""
        self._now_s = now_s
        taken: set[GpuId] = set()
        moving: list[_Load] = []
        ready = (load for load in self._loads.values() if load.ready_s <= now_s)
        for load in sorted(ready, key=lambda x: (not x.urgent, x.ready_s, x.order)):
            if taken.isdisjoint(load.transfer.gpus):
                moving.append(load)
            taken |= load.transfer.gpus
        free: dict[Link, float] = {}
        speeds: dict[int, float] = {}
        for urgent in (True, False):
            _divide([load for load in moving if load.urgent is urgent], free, speeds)
        for load in self._loads.values():
            speed = speeds.get(load.order, 0.0) / self._factor
            if speed != load.speed:
                self._book(load, now_s)
                load.speed = speed


def _divide(
    loads: Iterable[_Load], free: dict[Link, float], speeds: dict[int, float]
) -> None:
    """Max-min fair: raise the bytes per second of all evenly; each stops at its own limit
    or where a link is full. ``free`` is the share of each link that is left (1 where
    absent); ``speeds`` gets the result by ``order``."""
    rising = list(loads)
    level = 0.0
    while rising:
        tops = [load.most * _bytes_per_s(load) for load in rising]
        wanted: dict[Link, float] = {}
        for load in rising:
            for link, seconds in load.transfer.uses_s.items():
                use = seconds / load.transfer.size
                wanted[link] = wanted.get(link, 0.0) + use
        rooms = {link: free.get(link, 1.0) / use for link, use in wanted.items() if use}
        step = min(rooms.values(), default=math.inf)
        own = min(tops) - level
        # A load alone reaches its own speed exactly, whichever way it is computed.
        capped = own <= step * (1 + 1e-12)
        step = own if capped else step
        full = {link for link, room in rooms.items() if room <= step * (1 + 1e-12)}
        level += step
        for link, use in wanted.items():
            left = free.get(link, 1.0) - step * use
            free[link] = 0.0 if link in full else max(0.0, left)
        still = []
        for load, top in zip(rising, tops, strict=True):
            if capped and top <= level * (1 + 1e-12):
                speeds[load.order] = load.most
            elif full.isdisjoint(x for x, s in load.transfer.uses_s.items() if s):
                still.append(load)
            else:
                speeds[load.order] = level / _bytes_per_s(load)
        rising = still


def _bytes_per_s(load: _Load) -> float:
    """Alone."""
    return load.transfer.size / load.transfer.alone_s


class ProcessPool:
    """Engine processes that a node keeps ready. Mutable, for one owner."""

    def __init__(self, rules: LoadRules) -> None:
        self._start_s = rules.process_start_s
        self._ready_s = [-math.inf] * rules.process_pool

    def restart(self, now_s: float) -> None:
        """All processes are gone and start anew."""
        self._ready_s = [now_s + self._start_s for _ in self._ready_s]

    def take(self, now_s: float) -> float:
        """When the process of a load that is asked for now is there."""
        if not self._ready_s:
            return now_s + self._start_s
        ready_s = max(now_s, self._ready_s[0])
        heapq.heapreplace(self._ready_s, ready_s + self._start_s)
        return ready_s
