"""What the operator has asked for by hand, beside the plan.

Wishes are no second way to the cluster: they change what the on-demand rule is shown and
what it starts from, and what the planner plans for; what is wanted then goes through the
same controller, the same referee and the same `reconcile` as any other placement.

The scenario's rules come first (`min_active`, and likewise a pin): an LLM that must serve
stays on a drained node if there is no room for it elsewhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Placement
from foreserve.models.plan import Epoch, Plan
from foreserve.models.problem import Fleet
from foreserve.models.record import Record
from foreserve.models.specs import GpuId
from foreserve.planner.policies.on_demand import OnDemand, planned

Level = Literal["asleep", "unloaded"]
"""asleep: WARM at most; unloaded: nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(Record):
    """An LLM that is not to serve."""

    llm: str
    level: Level
    until_need: bool = False
    """Only until a request waits for it; else until it is woken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes(Record):
    """All of them at one time. Kept over restarts."""

    pinned: tuple[str, ...] = ()
    """LLMs with at least one ACTIVE replica at any time."""
    waking: tuple[str, ...] = ()
    """LLMs to serve once, as if a request waited, until they do."""
    holds: tuple[Hold, ...] = ()
    drained: tuple[str, ...] = ()
    """Nodes where nothing is to be."""

    def hold_of(self, llm: str) -> Hold | None:
        return next((hold for hold in self.holds if hold.llm == llm), None)

    def refuses(self, llm: str) -> bool:
        """Whether requests for ``llm`` are not to be waited for."""
        hold = self.hold_of(llm)
        return hold is not None and not hold.until_need

    def of(self, fleet: Fleet) -> Wishes:
        """Those about LLMs and nodes of ``fleet``."""
        llms, nodes = fleet.llm_by_name, fleet.cluster.node_by_name
        return Wishes(
            pinned=tuple(llm for llm in self.pinned if llm in llms),
            waking=tuple(llm for llm in self.waking if llm in llms),
            holds=tuple(hold for hold in self.holds if hold.llm in llms),
            drained=tuple(node for node in self.drained if node in nodes),
        )

    # The next ones.

    def wake(self, llm: str) -> Wishes:
        waking = (*(name for name in self.waking if name != llm), llm)
        return replace(self, waking=waking, holds=self._other_holds(llm))

    def hold(self, hold: Hold) -> Wishes:
        """Unless it is pinned, which the caller has to see to."""
        waking = tuple(name for name in self.waking if name != hold.llm)
        holds = (*self._other_holds(hold.llm), hold)
        return replace(self, waking=waking, holds=holds)

    def pin(self, llm: str) -> Wishes:
        pinned = tuple(sorted({*self.pinned, llm}))
        return replace(self, pinned=pinned, holds=self._other_holds(llm))

    def unpin(self, llm: str) -> Wishes:
        return replace(self, pinned=tuple(n for n in self.pinned if n != llm))

    def drain(self, node: str) -> Wishes:
        return replace(self, drained=tuple(sorted({*self.drained, node})))

    def resume(self, node: str) -> Wishes:
        return replace(self, drained=tuple(n for n in self.drained if n != node))

    def after(self, observed: Observed) -> Wishes:
        """What is left: an LLM that was to wake serves, a request asks for another."""
        serving = {r.llm for r in observed.replicas if r.phase == "ACTIVE"}
        waking = tuple(llm for llm in self.waking if llm not in serving)
        holds = tuple(
            hold
            for hold in self.holds
            if not (hold.until_need and observed.waiting.get(hold.llm))
        )
        if len(waking) == len(self.waking) and len(holds) == len(self.holds):
            return self
        return replace(self, waking=waking, holds=holds)

    # What follows from them.

    def gpus(self, fleet: Fleet) -> frozenset[GpuId]:
        """Of drained nodes."""
        nodes = fleet.cluster.node_by_name
        return frozenset(gpu for node in self.drained for gpu in nodes[node].gpu_ids())

    def planned_for(self, fleet: Fleet) -> Fleet:
        """The fleet to plan with."""
        return _at_least(fleet, dict.fromkeys(self.pinned, 1))

    def rule(self, plan: Plan, now_s: float, keep_alive_s: float) -> OnDemand:
        """The on-demand rule over what is left of the plan. While replicas of the epoch
        are on drained nodes, as many as it has are asked for elsewhere: they are to be
        there before those are given up."""
        epoch = plan.at(now_s)
        drained = self.gpus(plan.fleet)
        least = Counter(dict.fromkeys(self.pinned, 1))
        moving = {
            replica.llm
            for replica in epoch.placement.replicas
            if replica.state == "ACTIVE" and not drained.isdisjoint(replica.gpus)
        }
        for llm in moving:
            if self.hold_of(llm) is None:
                least[llm] = max(least[llm], len(epoch.placement.of(llm, "ACTIVE")))
        if self.holds:
            epochs = tuple(self._without_held(epoch) for epoch in plan.epochs)
            plan = replace(plan, epochs=epochs)
        rule = planned(plan, keep_alive_s)
        return replace(rule, fleet=_at_least(rule.fleet, least)) if least else rule

    def seen(self, observed: Observed, fleet: Fleet) -> Observed:
        """The cluster as the rule is to see it: drained nodes are lost, and their requests
        are to be served elsewhere; nobody asks for what is held."""
        if self == Wishes():
            return observed
        drained = self.gpus(fleet)
        waiting = Counter(observed.waiting)
        for llm in self.waking:
            waiting[llm] = max(1, waiting[llm])
        replicas: list[ObservedReplica] = []
        for replica in observed.replicas:
            hold = self.hold_of(replica.llm)
            if not drained.isdisjoint(replica.gpus):
                waiting[replica.llm] += replica.in_flight
            elif hold is None:
                replicas.append(replica)
            elif hold.level == "asleep":
                # Not one that the rule would go on with, but weights that it may keep.
                replicas.append(
                    replace(replica, phase="WARM", in_flight=0, idle_since_s=None)
                )
        for hold in self.holds:
            del waiting[hold.llm]
        return replace(
            observed,
            replicas=tuple(replicas),
            waiting=dict(waiting),
            lost_gpus=observed.lost_gpus | drained,
        )

    def wanted(self, placement: Placement, fleet: Fleet) -> Placement:
        """What the rule wants, without what it has left on drained nodes, but for those
        that the scenario's rules, or a pin, need."""
        drained = self.gpus(fleet)
        elsewhere = placement.without(drained)
        if elsewhere is placement:
            return placement
        needed = []
        for llm in self.planned_for(fleet).llms:
            short = llm.min_active - len(elsewhere.of(llm.name, "ACTIVE"))
            there = (
                r
                for r in placement.of(llm.name, "ACTIVE")
                if r not in elsewhere.replicas
            )
            needed += list(there)[: max(0, short)]
        if not needed:
            return elsewhere
        return replace(elsewhere, replicas=(*elsewhere.replicas, *needed))

    def _without_held(self, epoch: Epoch) -> Epoch:
        """Its placement with held LLMs WARM, or not at all."""
        replicas = []
        for replica in epoch.placement.replicas:
            hold = self.hold_of(replica.llm)
            if hold is None:
                replicas.append(replica)
            elif hold.level == "asleep":
                replicas.append(replace(replica, state="WARM", traffic_share=0.0))
        placement = replace(epoch.placement, replicas=tuple(replicas))
        return replace(epoch, placement=placement)

    def _other_holds(self, llm: str) -> tuple[Hold, ...]:
        return tuple(hold for hold in self.holds if hold.llm != llm)


def _at_least(fleet: Fleet, least: dict[str, int] | Counter[str]) -> Fleet:
    """``fleet`` with so many ACTIVE replicas of each LLM at least."""
    if not least:
        return fleet
    llms = tuple(
        replace(llm, min_active=max(llm.min_active, least.get(llm.name, 0)))
        for llm in fleet.llms
    )
    return replace(fleet, llms=llms)
