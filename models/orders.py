"""The search for an order of the steps of a transition (`foreserve.models.transitions`).

A part of up to `MOST_STEPS` steps is ordered exactly, by the shortest path over the sets of
steps that are done; larger ones by a rule that looks one step ahead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from foreserve.models.placement import Action, Kind, Placement, Replica, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption, held_bytes

MOST_STEPS = 30
MOST_STATES = 3_000
"""Together about half a second; a move of a whole cluster has hundreds of steps."""

Cost = tuple[int, int, float, float]
"""Outages, exposures, delayed requests, waiting: compared in this sequence, added one by
one."""
NOTHING: Cost = (0, 0, 0.0, 0.0)


class Part:
    """The steps of one part, as bits of the sets that are done."""

    def __init__(
        self,
        fleet: Fleet,
        before: Placement,
        after: Placement,
        actions: Sequence[Action],
        demand_rps: Mapping[str, float] | None,
    ) -> None:
        self.fleet, self.actions = fleet, actions
        gpus = {gpu for action in actions for gpu in action.gpus}
        llms = {action.llm for action in actions}
        number = {(a.kind, a.replica): i for i, a in enumerate(actions)}
        self.all = (1 << len(actions)) - 1
        self.after = after
        self.replicas: list[_Life] = []
        """All that is on these GPUs, or serves these LLMs, before or after."""
        for key in sorted({*before.by_id, *after.by_id}):
            if key.llm not in llms and gpus.isdisjoint(key.gpus):
                continue
            old, new = before.by_id.get(key), after.by_id.get(key)
            self.replicas.append(
                _Life(
                    key=key,
                    option=fleet.option_of(key.llm, key.gpus),
                    resident=old is not None,
                    active=_active(old),
                    wanted_active=_active(new),
                    bits={
                        kind: 1 << number[kind, key]
                        for kind in ("demote", "drop", "load", "activate")
                        if (kind, key) in number
                    },
                )
            )
        self.on = {
            gpu: [life for life in self.replicas if gpu in life.key.gpus]
            for gpu in gpus
        }
        self.life = {life.key: life for life in self.replicas}
        self.needs = [self._needs(action, number) for action in actions]
        self.seconds = [self._seconds(action) for action in actions]
        self.goal = {llm: 0.0 for llm in llms}
        self.weight = {llm: fleet.llm_by_name[llm].weight for llm in llms}
        for life in self.replicas:
            if life.wanted_active and life.key.llm in llms:
                self.goal[life.key.llm] += life.option.rate_rps
        if demand_rps is not None:
            for llm, rate_rps in self.goal.items():
                self.goal[llm] = min(rate_rps, demand_rps.get(llm, 0.0))
        self._missing: dict[int, float] = {}
        serves = {llm for llm in llms if self._rate(llm, 0) > 0}
        self.kept = [
            llm for llm in sorted(llms) if self.goal[llm] > 0 and llm in serves
        ]
        self.floor = {
            llm: floor
            for llm in self.kept
            if (floor := fleet.llm_by_name[llm].min_after_loss)
            and min(self._left(llm, 0), self._left(llm, self.all)) >= floor
        }

    def _needs(
        self, action: Action, number: Mapping[tuple[Kind, ReplicaId], int]
    ) -> int:
        """Steps of the same replica that come before this one, as bits."""
        first: Mapping[Kind, Kind] = {"drop": "demote", "activate": "load"}
        if action.kind not in first:
            return 0
        before = number.get((first[action.kind], action.replica))
        return 0 if before is None else 1 << before

    def _seconds(self, action: Action) -> float:
        option = self.life[action.replica].option
        return {
            "demote": option.exec_s,
            "drop": 0.0,
            "load": option.load_s,
            "activate": option.activate_s,
        }[action.kind]

    def _rate(self, llm: str, done: int) -> float:
        """What the LLM can serve once ``done`` is."""
        return sum(
            life.option.rate_rps
            for life in self.replicas
            if life.key.llm == llm and life.is_active(done)
        )

    def _left(self, llm: str, done: int) -> int:
        """ACTIVE replicas of the LLM once ``done`` is and the failure domain that has most
        of them is lost."""
        domain_of = self.fleet.cluster.domain_of
        there = Counter(
            domain_of[life.key.gpus[0].node]
            for life in self.replicas
            if life.key.llm == llm and life.is_active(done)
        )
        return there.total() - max(there.values(), default=0)

    def safe(self, i: int, done: int) -> bool:
        """Whether step ``i`` may begin once ``done`` is done."""
        action = self.actions[i]
        if self.needs[i] & ~done:
            return False
        if action.kind in ("demote", "drop"):
            return True
        own, then = self.life[action.replica], done | 1 << i
        for gpu in action.gpus:
            there = self.on[gpu]
            held = sum(life.num_bytes(then) for life in there)
            if action.kind == "load":
                held += own.option.load_extra_bytes
            if held > self.fleet.cluster.usable_bytes(gpu):
                return False
            if action.kind == "activate" and any(
                life.is_active(done) and life is not own and not own.together(life)
                for life in there
            ):
                return False
        return True

    def price(self, i: int, done: int) -> Cost:
        """Of step ``i`` after ``done``: what is missing while it lasts."""
        action = self.actions[i]
        during = done | 1 << i if action.kind == "demote" else done
        outages = exposures = 0
        if action.kind == "demote" and action.llm in self.kept:
            now, then = self._rate(action.llm, done), self._rate(action.llm, during)
            outages = int(now > 0 and then <= 0)
        if action.kind == "demote" and action.llm in self.floor:
            floor = self.floor[action.llm]
            exposures = int(
                self._left(action.llm, done) >= floor > self._left(action.llm, during)
            )
        coming = sum(
            other.kind in ("load", "activate") and not done >> j & 1
            for j, other in enumerate(self.actions)
        )
        seconds = self.seconds[i]
        return outages, exposures, self.missing(during) * seconds, coming * seconds

    def missing(self, done: int) -> float:
        """Weighted rate that is missing after ``done``, in requests per second."""
        if done not in self._missing:
            self._missing[done] = sum(
                self.weight[llm] * max(0.0, goal - self._rate(llm, done))
                for llm, goal in self.goal.items()
                if goal > 0
            )
        return self._missing[done]

    def search(self, most_states: int) -> list[int] | None:
        """The best order of all; None if it takes a look at too many states."""
        if len(self.actions) > MOST_STEPS:
            return None
        known: dict[int, tuple[Cost, int]] = {0: (NOTHING, -1)}
        settled: set[int] = set()
        turn = count()  # of equals, the first found: deterministic
        queue: list[tuple[Cost, int, int]] = [(NOTHING, next(turn), 0)]
        while queue:
            cost, _, done = heappop(queue)
            if done in settled:
                continue
            settled.add(done)
            if done == self.all:
                return self._back(known)
            if len(settled) > most_states:
                return None
            for i in self._worth_a_look(done):
                then = done | 1 << i
                if then in settled:
                    continue
                more = self.price(i, done)
                total = (
                    cost[0] + more[0],
                    cost[1] + more[1],
                    cost[2] + more[2],
                    cost[3] + more[3],
                )
                if then not in known or total < known[then][0]:
                    known[then] = (total, i)
                    heappush(queue, (total, next(turn), then))
        raise AssertionError("no order of the steps is safe")

    def _worth_a_look(self, done: int) -> list[int]:
        """Steps that may come next. A drop costs nothing and only gives room, so where
        one is possible nothing else is better."""
        found = []
        for i, action in enumerate(self.actions):
            if not done >> i & 1 and self.safe(i, done):
                if action.kind == "drop":
                    return [i]
                found.append(i)
        return found

    def _back(self, known: Mapping[int, tuple[Cost, int]]) -> list[int]:
        order, done = [], self.all
        while done:
            i = known[done][1]
            order.append(i)
            done &= ~(1 << i)
        return order[::-1]

    def by_rule(self) -> list[int]:
        """An order by one look ahead at a time."""
        order: list[int] = []
        done = 0
        while done != self.all:
            i = min(
                (
                    i
                    for i in range(len(self.actions))
                    if not done >> i & 1 and self.safe(i, done)
                ),
                key=lambda i: self._rule(i, done),
            )
            order.append(i)
            done |= 1 << i
        return order

    def _rule(self, i: int, done: int) -> tuple[float, ...]:
        """Drops, activations, demotes that nobody misses, loads of what will serve (most
        missed rate per second first), demotes in the way of such a load or activation
        (least missed first), other demotes, and copies that stay WARM last."""
        action = self.actions[i]
        if action.kind == "drop":
            return (0, 0, 0, i)
        if action.kind == "activate":
            return (1, 0, 0, i)
        option = self.life[action.replica].option
        if action.kind == "load":
            if not self.life[action.replica].wanted_active:
                return (6, 0, option.load_s, i)
            weight = self.weight[action.llm] * min(
                option.rate_rps, self.goal[action.llm]
            )
            return (3, 0, -weight / max(option.load_s, 1e-9), i)
        outages, exposures, _, _ = self.price(i, done)
        more = self.missing(done | 1 << i) - self.missing(done)
        if more <= 0 and not outages and not exposures:
            return (2, 0, 0, i)
        in_the_way = any(
            other.kind in ("load", "activate")
            and not done >> j & 1
            and self.life[other.replica].wanted_active
            and not set(other.gpus).isdisjoint(action.gpus)
            for j, other in enumerate(self.actions)
        )
        return (4 if in_the_way else 5, outages, exposures, more, i)


def _active(replica: Replica | None) -> bool:
    return replica is not None and replica.state == "ACTIVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """One replica in the course of the steps: where it begins, and its bits."""

    key: ReplicaId
    option: ReplicaOption
    resident: bool
    active: bool
    wanted_active: bool
    bits: Mapping[str, int]

    def is_active(self, done: int) -> bool:
        if self.active:
            return not done & self.bits.get("demote", 0)
        return bool(done & self.bits.get("activate", 0))

    def num_bytes(self, done: int) -> int:
        """On each of its GPUs; a demote has freed its KV once it is done."""
        here = (
            not done & self.bits.get("drop", 0)
            if self.resident
            else (bool(done & self.bits.get("load", 0)))
        )
        if not here:
            return 0
        return held_bytes(self.option, "ACTIVE" if self.is_active(done) else "WARM")

    def together(self, other: _Life) -> bool:
        """Whether both may be ACTIVE on shared GPUs: wanted so, on the same set."""
        both = self.wanted_active and other.wanted_active
        return both and set(self.key.gpus) == set(other.key.gpus)
