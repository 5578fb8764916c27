"""Observe, decide, act: the one loop, whatever the clock and the cluster are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from foreserve.models.observed import Observed
from foreserve.models.placement import Action, Placement
from foreserve.models.problem import Fleet
from foreserve.models.referee import fleet_violations
from foreserve.models.specs import GpuId
from foreserve.models.tenure import turn_ends_s
from foreserve.runtime.clock import Clock
from foreserve.runtime.journal import Decision, Recorder, Refusal
from foreserve.runtime.reconcile import kept_for_now, reconcile


class Policy(Protocol):
    """Who should be where. The seam to planning."""

    @property
    def name(self) -> str: ...

    def decide(self, now_s: float, observed: Observed) -> Placement:
        """The placement wanted now; may be asked several times in one instant."""
        ...

    def next_review_s(self, now_s: float) -> float:
        """When it wants to be asked again even if nothing happens; after ``now_s``."""
        ...


class Backend(Protocol):
    """Where replicas live. Wakes the controller's clock when there is something to
    decide: a request that no replica can take, a phase that changed, a lost replica, one
    that has fallen idle on GPUs that somebody waits for."""

    def observe(self) -> Observed:
        """What is true now."""
        ...

    def apply(self, actions: Sequence[Action]) -> None:
        """Start the actions; never blocks. How they end shows in a later `observe`."""
        ...

    def watch(self, gpus: frozenset[GpuId]) -> None:
        """From now on the GPUs that somebody waits for: whenever the last request of a
        replica that takes requests there has ended, the controller is to look again."""
        ...


class Controller:
    """Keeps the cluster on its way to what the policy wants."""

    def __init__(
        self,
        *,
        policy: Policy,
        backend: Backend,
        clock: Clock,
        fleet: Fleet,
        journal: Recorder,
    ) -> None:
        self.policy, self.backend, self.clock = policy, backend, clock
        self.fleet, self.journal = fleet, journal
        self.desired: Placement | None = None
        """The last placement that was accepted; before the first, nothing is done."""
        self._refused: Placement | None = None
        self._watched: frozenset[GpuId] = frozenset()
        self._again_s = math.inf
        """When time alone makes something possible."""

    def run(self, until_s: float) -> None:
        """Take turns until the clock shows ``until_s``."""
        while self.clock.now_s() < until_s:
            self.turn(until_s)

    def turn(self, until_s: float) -> None:
        """One step, then wait until woken, the next review, or ``until_s``."""
        self.step()
        now_s = self.clock.now_s()
        review_s = self.policy.next_review_s(now_s)
        if not review_s > now_s:
            raise ValueError(
                f"policy {self.policy.name!r}: next_review_s({now_s}) = {review_s}, "
                "which is not later"
            )
        self.clock.wait(min(review_s, self._again_s, until_s))

    def step(self) -> None:
        """Observe, decide, and do what is safe now."""
        observed = self.backend.observe()
        self._again_s = math.inf
        changed = self._accept(self.policy.decide(observed.now_s, observed), observed)
        if self.desired is None:
            return
        actions = reconcile(self.desired, observed, self.fleet)
        if changed or actions:
            self.journal.record(
                Decision(
                    at_s=observed.now_s,
                    desired=self.desired if changed else None,
                    actions=actions,
                )
            )
        if actions:
            self.backend.apply(actions)
        awaited = self._awaited(observed, actions)
        if awaited != self._watched:
            self._watched = awaited
            self.backend.watch(awaited)
        self._again_s = self._next_s(observed)

    def _awaited(
        self, observed: Observed, actions: Sequence[Action]
    ) -> frozenset[GpuId]:
        """GPUs where LLMs could serve whose requests wait, which have nobody, and nothing
        of which is on its way. (Where there are replicas, places become free.)"""
        if not observed.unserved_since_s:
            return frozenset()
        coming = {a.llm for a in actions if a.kind in ("load", "activate")}
        coming |= {
            replica.llm
            for replica in observed.replicas
            if replica.phase in ("LOADING", "ACTIVATING")
        }
        left = [
            self._places.get(m, frozenset())
            for m in {*observed.unserved_since_s} - coming
        ]
        return frozenset().union(*left)

    def _next_s(self, observed: Observed) -> float:
        """When a replica's tenure is over that is to go, or the turn of one that works
        where an LLM waits that has none."""
        assert self.desired is not None
        kept = kept_for_now(self.desired, observed, self.fleet)
        ends_s = [until_s for _, until_s in kept]
        if self._watched:
            turns_s = [
                turn_ends_s(replica, self.fleet)
                for replica in observed.replicas
                if replica.phase == "ACTIVE"
                and not self._watched.isdisjoint(replica.gpus)
            ]
            ends_s += [end_s for end_s in turns_s if end_s > observed.now_s]
        return min(ends_s, default=math.inf)

    @cached_property
    def _places(self) -> dict[str, frozenset[GpuId]]:
        """GPUs on which each LLM may be."""
        found: dict[str, set[GpuId]] = {}
        for option, gpus in self.fleet.candidates():
            found.setdefault(option.llm, set()).update(gpus)
        return {llm: frozenset(gpus) for llm, gpus in found.items()}

    def _accept(self, wish: Placement, observed: Observed) -> bool:
        """Make ``wish`` desired if the fleet can hold it; whether that changed it."""
        if wish == self.desired or wish == self._refused:
            return False
        broken = tuple(
            f"({label}) {message}"
            for label, message in fleet_violations(self.fleet, wish)
        )
        if broken:
            self._refused = wish
            self.journal.record(
                Refusal(at_s=observed.now_s, desired=wish, violations=broken)
            )
            return False
        self.desired, self._refused = wish, None
        return True
