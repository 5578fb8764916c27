"""A newcomer's demand against its victims': Logos' rules, as its authors describe them.

An LLM for which requests are in the system gets a replica at once where memory is free.
Where somebody has to go for it, its demand must exceed the largest of its victims' so many
times: ``wake`` where its weights are there, ``load`` where they are not, ``drain`` where a
victim works. Victims are those with the least demand, `TENURE_S` after they began to serve
at the earliest; their weights stay while their space is not needed. No plan, no forecast,
and no turns: who never outweighs anybody waits for ever.

Demand is the number of an LLM's requests in the system per replica. (Logos adds a decaying
count of past requests; a policy here remembers nothing.) Of several newcomers, who has had
nobody for longest comes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foreserve.models.observed import Observed
from foreserve.models.placement import Placement, ReplicaId
from foreserve.models.plan import Plan
from foreserve.models.problem import held_bytes
from foreserve.models.specs import GpuId
from foreserve.planner.policies.on_demand import SCALE_UP, Draft, OnDemand

TENURE_S = 5.0
REVIEW_S = 1.0
"""Demand grows request by request, and nobody tells when it has grown enough."""


def ratio(plan: Plan, keep_alive_s: float) -> Ratio:
    """Compare demands on the plan's fleet; its epochs are not used."""
    return Ratio(
        name="ratio", fleet=plan.fleet, keep_alive_s=keep_alive_s, keep_weights=True
    )


@dataclass(frozen=True, kw_only=True)
class Ratio(OnDemand):
    """`OnDemand`'s warm replicas, with another rule of who serves."""

    wake: float = 1.5
    load: float = 2.0
    drain: float = 3.0

    def next_review_s(self, now_s: float) -> float:
        return now_s + REVIEW_S

    def decide(self, now_s: float, observed: Observed) -> Placement:
        contest = Contest(self, self.nothing, observed)
        contest.keep()
        contest.let_in()
        return contest.placement()


class Contest(Draft):
    """Who serves: what has begun, and newcomers that may push others out."""

    rule: Ratio

    def __init__(self, rule: Ratio, base: Placement, observed: Observed) -> None:
        super().__init__(rule, base, observed)
        for replica in observed.replicas:
            if replica.phase == "DRAINING":  # will be answered without anything new
                self.in_system[replica.llm] -= replica.in_flight

    def keep(self) -> None:
        """What is on its way stays, then what serves beside it and is not idle for too
        long, the most demanded first: so who was let in is not asked again."""
        order = {"ACTIVATING": 0, "LOADING": 1, "ACTIVE": 2}
        begun = [r for r in self.observed.replicas if r.phase in order]
        for replica in sorted(
            begun, key=lambda r: (order[r.phase], -self.in_system[r.llm], r.id)
        ):
            idle_s = 0.0
            if replica.phase == "ACTIVE" and replica.in_flight == 0:
                idle_s = self.observed.now_s - (replica.idle_since_s or 0.0)
            lasts = idle_s < self.rule.keep_alive_s or self._short(replica.llm)
            if lasts and self._victims(replica.id) == set():
                self._start(replica.id)

    def let_in(self) -> None:
        """Replicas for LLMs with more requests than room, first ones first."""
        short = [llm.name for llm in self.rule.fleet.llms if self._short(llm.name)]
        llms = sorted(
            {m for m, n in self.in_system.items() if n} | {*short},
            key=lambda m: (
                len(self._serving(m)) > 0,
                self._unserved_s(m),
                -self.in_system[m],
                m,
            ),
        )
        for llm in llms:
            while self._wants(llm) and (found := self._place(llm)) is not None:
                key, victims = found
                self.serving -= victims
                self._start(key)

    def _wants(self, llm: str) -> bool:
        room = SCALE_UP * self._room(self._serving(llm))
        return self.in_system[llm] > room or self._short(llm)

    def _demand(self, llm: str, more: int = 0) -> float:
        """Requests in the system per replica, with so many ``more`` of them; an LLM that
        has fewer than the operator's least number claims one at least."""
        count = max(self.in_system[llm], int(self._short(llm)))
        return count / max(1, len(self._serving(llm)) + more)

    def _place(self, llm: str) -> tuple[ReplicaId, set[ReplicaId]] | None:
        """The block on which the least demand is lost, and who goes for it."""
        best: tuple[tuple[object, ...], ReplicaId, set[ReplicaId]] | None = None
        for option, key in self.rule.blocks[llm]:
            if key in self.serving or key in self.failing:
                continue
            if not self.observed.lost_gpus.isdisjoint(key.gpus):
                continue
            victims = self._victims(key)
            if victims is None or not self.may_push(key, victims):
                continue
            lost = max((self._demand(v.llm) for v in victims), default=0.0)
            rank = (bool(victims), lost, self._rank(option, key))
            if best is None or rank < best[0]:
                best = rank, key, victims
        return None if best is None else best[1:]

    def may_push(self, key: ReplicaId, victims: set[ReplicaId]) -> bool:
        """Whether the demand for ``key`` outweighs that of ``victims``, which have all
        served for long enough and may be spared."""
        if not victims:
            return True
        seen = [self.seen.get(victim) for victim in victims]
        for replica in seen:
            if replica is None or replica.phase != "ACTIVE":
                return False
            since_s = replica.served_since_s
            if since_s is None or self.observed.now_s < since_s + TENURE_S:
                return False
        if any(v.llm == key.llm for v in victims) or not self._spares(victims):
            return False
        needed = self.rule.wake if key in self.seen else self.rule.load
        if any(replica is not None and replica.in_flight for replica in seen):
            needed = self.rule.drain
        lost = max(self._demand(victim.llm) for victim in victims)
        return self._demand(key.llm, more=1) > needed * lost

    def _victims(self, key: ReplicaId) -> set[ReplicaId] | None:
        """Of those that are to serve, who has to go for ``key`` to be ACTIVE: whoever may
        not share its GPUs, then those with the least demand until it fits. None: it does
        not fit on empty GPUs."""
        sharing = self.rule.fleet.sharing
        touching = {k for k in self.serving if not set(k.gpus).isdisjoint(key.gpus)}
        beside = {k for k in touching if sharing is not None and k.gpus == key.gpus}
        beside -= {k for k in beside if k.llm == key.llm}
        order = sorted(beside, key=lambda k: (self._demand(k.llm), k))
        most = 1 if sharing is None else sharing.most
        while not self._fits({key, *order}, key.gpus) or len(order) >= most:
            if not order:
                return None
            order = order[1:]
        return touching - {*order}

    def _fits(self, replicas: Iterable[ReplicaId], gpus: tuple[GpuId, ...]) -> bool:
        """Whether all may be ACTIVE on ``gpus``."""
        fleet = self.rule.fleet
        held = sum(
            held_bytes(fleet.option_of(key.llm, key.gpus), "ACTIVE") for key in replicas
        )
        return all(held <= self.rule.usable_bytes[gpu] for gpu in gpus)
