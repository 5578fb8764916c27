"""Start replicas for the requests of this moment, on top of a base placement.

One rule for all policies, so that a comparison shows the plan and nothing else:
``planned`` starts from the placement of the plan's epoch, ``reactive`` from nothing (each
LLM is loaded when its first request comes and dropped when it has been idle), and
``reactive-keep`` also leaves a stopped LLM's weights where they are until the space is
needed. The scaling thresholds are WarmServe's: scale up above 0.8 of
the concurrency; a replica can be spared while the others are at most half full.

Where more LLMs are asked for than the GPUs hold, they take turns: an LLM that has no
replica gets its first one before others get more, who has waited longest first; if nothing
can be spared, in the place of one that works and has had its turn
(`models.tenure.turn_ends_s`); and what is started so is not given up for what was planned
there before its own turn is over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from foreserve.models.observed import HOLDS_KV, Observed, ObservedReplica
from foreserve.models.placement import Placement, Replica, ReplicaId
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet, ReplicaOption, held_bytes
from foreserve.models.specs import GpuId
from foreserve.models.tenure import turn_ends_s

SCALE_UP, SCALE_DOWN = 0.8, 0.5
MOST_MADE = 4096
"""Placements that a rule keeps at hand."""
REVIEW_S = 5.0
ELSEWHERE = 3
"""An LLM of which so many replicas have failed is not tried on yet another place."""


def planned(plan: Plan, keep_alive_s: float) -> OnDemand:
    """Follow the plan; promote its WARM replicas, or load, when requests ask for it.

    Weights that the plan does not name stay, too, while their space is not needed
    (WarmServe's workers return as universal, not idle).
    """
    return OnDemand(
        name="planned",
        fleet=plan.fleet,
        keep_alive_s=keep_alive_s,
        plan=plan,
        keep_weights=True,
    )


def reactive(plan: Plan, keep_alive_s: float) -> OnDemand:
    """Load on the first request, drop after ``keep_alive_s`` without one."""
    return OnDemand(name="reactive", fleet=plan.fleet, keep_alive_s=keep_alive_s)


def reactive_keep(plan: Plan, keep_alive_s: float) -> OnDemand:
    """As `reactive`, but stopped weights stay until their space is needed."""
    return OnDemand(
        name="reactive-keep",
        fleet=plan.fleet,
        keep_alive_s=keep_alive_s,
        keep_weights=True,
    )


@dataclass(frozen=True, kw_only=True)
class OnDemand:
    """Base placement plus what the observed requests need. Holds no state of its own:
    replicas it started earlier are recognised because the cluster reports them."""

    name: str
    fleet: Fleet
    keep_alive_s: float
    plan: Plan | None = None
    keep_weights: bool = False
    nothing: Placement = field(default_factory=Placement)

    def next_review_s(self, now_s: float) -> float:
        review_s = now_s + REVIEW_S
        if self.plan is None:
            return review_s
        end_s = self.plan.at(now_s).end_s
        return min(review_s, end_s) if end_s > now_s else review_s

    def decide(self, now_s: float, observed: Observed) -> Placement:
        base = self.plan.at(now_s).placement if self.plan else self.nothing
        draft = Draft(self, base.without(observed.lost_gpus), observed)
        draft.keep_busy()
        draft.start_missing()
        return self._with_lost(draft.placement(), base, observed.lost_gpus)

    def _with_lost(
        self, wanted: Placement, base: Placement, lost_gpus: frozenset[GpuId]
    ) -> Placement:
        """The base's ACTIVE replicas on lost GPUs stay wanted where an LLM would have
        less than the operator's least number: they come back with their GPUs."""
        missed = []
        for llm in self.fleet.llms if lost_gpus else ():
            short = llm.min_active - len(wanted.of(llm.name, "ACTIVE"))
            lost = (
                replica
                for replica in base.of(llm.name, "ACTIVE")
                if not lost_gpus.isdisjoint(replica.gpus)
            )
            missed += list(lost)[: max(0, short)]
        if not missed:
            return wanted
        return Placement(replicas=(*wanted.replicas, *missed))

    @cached_property
    def made(self) -> dict[object, Placement]:
        """Placements by what they follow from: the same few come again and again."""
        return {}

    @cached_property
    def usable_bytes(self) -> dict[GpuId, int]:
        cluster = self.fleet.cluster
        return {gpu: cluster.usable_bytes(gpu) for gpu in cluster.gpus}

    @cached_property
    def loss_s(self) -> dict[str, float]:
        """What losing the WARM weights of each LLM may cost."""
        return {llm.name: llm.weight * llm.cold_loss_s for llm in self.fleet.llms}

    @cached_property
    def blocks(self) -> dict[str, tuple[tuple[ReplicaOption, ReplicaId], ...]]:
        """Candidate replicas per LLM, smallest TP first."""
        found: dict[str, list[tuple[ReplicaOption, ReplicaId]]] = {}
        for option, gpus in self.fleet.candidates():
            replica = ReplicaId(llm=option.llm, gpus=gpus)
            found.setdefault(option.llm, []).append((option, replica))
        return {
            llm: tuple(sorted(pairs, key=lambda pair: pair[0].tp))
            for llm, pairs in found.items()
        }


class Draft:
    """The placement of one decision in the making."""

    def __init__(self, rule: OnDemand, base: Placement, observed: Observed) -> None:
        self.rule, self.base, self.observed = rule, base, observed
        self.seen = {replica.id: replica for replica in observed.replicas}
        self.serving = {r.id for r in base.replicas if r.state == "ACTIVE"}
        self.failing = {key for key in observed.busy if key not in self.seen}
        """They have failed, and may not be loaded for now."""
        tried = Counter(key.llm for key in self.failing)
        self.missed = {key for key in self.failing if tried[key.llm] < ELSEWHERE}
        """Of these, those in whose place another one is looked for."""
        self.in_system = Counter(observed.waiting)
        for replica in observed.replicas:
            self.in_system[replica.llm] += replica.in_flight
        self.changed = False

    @cached_property
    def on_gpu(self) -> dict[GpuId, list[ObservedReplica]]:
        """Who is resident on each GPU."""
        held: dict[GpuId, list[ObservedReplica]] = {}
        for replica in self.observed.replicas:
            for gpu in replica.gpus:
                held.setdefault(gpu, []).append(replica)
        return held

    def keep_busy(self) -> None:
        """Replicas started on demand stay while they work or are awaited, and a while
        longer where nobody else is planned to be ACTIVE."""
        for replica in self.observed.replicas:
            if replica.phase not in ("LOADING", "ACTIVATING", "ACTIVE"):
                continue
            if replica.id in self.serving:
                continue
            if replica.phase == "ACTIVE" and replica.in_flight == 0:
                idle_s = self.observed.now_s - (replica.idle_since_s or 0.0)
                kept = idle_s < self.rule.keep_alive_s or self._short(replica.llm)
                wanted = kept and self._is_free(replica.gpus)
            else:
                busy = replica.in_flight or self.in_system[replica.llm]
                wanted = bool(busy) and (
                    self._make_room(replica.gpus) or self._keep_turn(replica)
                )
            if wanted:
                self._start(replica.id)

    def start_missing(self) -> None:
        """One more replica for each LLM that has more requests than room, or fewer
        replicas than the operator's least number."""
        for llm in self._unserved():
            chosen = self._choose(llm) or self._take_turn(llm)
            if chosen is not None:
                self._start(chosen)
        floors = dict.fromkeys(filter(self._short, self.rule.fleet.llm_by_name), 0)
        # Longest queues choose first; names break ties so that runs repeat.
        for llm, in_system in sorted(
            (floors | self.in_system).items(), key=lambda item: (-item[1], item[0])
        ):
            while in_system > SCALE_UP * self._room(self._serving(llm)) or self._short(
                llm
            ):
                chosen = self._choose(llm)
                if chosen is None:
                    break
                self._start(chosen)

    def placement(self) -> Placement:
        """ACTIVE as drafted; WARM as in the base (or as found) where it still fits."""
        if not self.changed and self._nothing_to_keep():
            return self.base
        if self.observed.lost_gpus:
            return self._fitted()  # the base was made just now
        seen = (
            self.seen if self.rule.keep_weights else self.base.by_id.keys() & self.seen
        )
        basis = (id(self.base), frozenset(self.serving), frozenset(seen))
        made = self.rule.made
        if basis not in made:
            if len(made) >= MOST_MADE:
                made.clear()
            made[basis] = self._fitted()
        return made[basis]

    def _fitted(self) -> Placement:
        shares = {r.id: r.traffic_share for r in self.base.replicas}
        replicas = [
            Replica(
                llm=key.llm,
                gpus=key.gpus,
                state="ACTIVE",
                traffic_share=shares.get(key, 0.0),
            )
            for key in sorted(self.serving)
        ]
        free = self._free_bytes(replicas)
        present = {(r.llm, gpu) for r in replicas for gpu in r.gpus}
        for key in self._warm_wishes():
            option = self.rule.fleet.option_of(key.llm, key.gpus)
            held = held_bytes(option, "WARM")
            fits = all(free[gpu] >= held for gpu in key.gpus)
            if fits and present.isdisjoint((key.llm, gpu) for gpu in key.gpus):
                replicas.append(Replica(llm=key.llm, gpus=key.gpus, state="WARM"))
                present.update((key.llm, gpu) for gpu in key.gpus)
                for gpu in key.gpus:
                    free[gpu] -= held
        return Placement(replicas=tuple(replicas))

    def _short(self, llm: str) -> bool:
        """Whether fewer replicas are to serve than the operator wants at least."""
        least = self.rule.fleet.llm_by_name[llm].min_active
        return least > 0 and len(self._serving(llm)) < least

    def _serving(self, llm: str) -> list[ReplicaId]:
        return [k for k in self.serving if k.llm == llm and k not in self.missed]

    def _nothing_to_keep(self) -> bool:
        known = self.base.by_id
        return not self.rule.keep_weights or all(key in known for key in self.seen)

    def _start(self, replica: ReplicaId) -> None:
        self.serving.add(replica)
        self.changed = True

    def _room(self, replicas: Iterable[ReplicaId]) -> int:
        fleet = self.rule.fleet
        return sum(fleet.option_of(r.llm, r.gpus).concurrency for r in replicas)

    def _is_free(self, gpus: Iterable[GpuId]) -> bool:
        taken = {gpu for key in self.serving for gpu in key.gpus}
        return taken.isdisjoint(gpus)

    def _choose(self, llm: str) -> ReplicaId | None:
        """Resident weights first, then blocks where nobody serves, then the block whose
        loss hurts least; a serving replica that its LLM can spare gives way."""
        options = [
            (option, key)
            for option, key in self.rule.blocks[llm]
            if key not in self.serving
            and key not in self.failing
            and self.observed.lost_gpus.isdisjoint(key.gpus)
        ]
        for _, key in sorted(options, key=lambda pair: self._rank(*pair)):
            if self._make_room(key.gpus):
                return key
        return None

    def _rank(self, option: ReplicaOption, key: ReplicaId) -> tuple[object, ...]:
        replica = self.seen.get(key)
        readiness = 2 if replica is None else 1 if replica.phase == "LOADING" else 0
        others = {o.id: o for gpu in key.gpus for o in self.on_gpu.get(gpu, ())}
        others.pop(key, None)
        draining = any(other.phase in HOLDS_KV for other in others.values())
        at_risk = sum(self.rule.loss_s[other.llm] for other in others)
        taken = not self._is_free(key.gpus)
        return (readiness, taken, draining, option.tp, at_risk, key.gpus)

    def _make_room(self, gpus: tuple[GpuId, ...]) -> bool:
        """Whether no serving replica is left on ``gpus``: LLMs that can spare theirs give
        them up, all or none."""
        held = {key for key in self.serving if not set(gpus).isdisjoint(key.gpus)}
        left = self.serving - held
        for llm in {key.llm for key in held}:
            rest = [key for key in left if key.llm == llm]
            # An LLM without requests can spare all but the operator's least number.
            too_busy = self.in_system[llm] > SCALE_DOWN * self._room(rest)
            if too_busy or len(rest) < self.rule.fleet.llm_by_name[llm].min_active:
                return False
        if held:
            self.serving, self.changed = left, True
        return True

    def _unserved(self) -> list[str]:
        """LLMs for which requests wait and no replica is wanted, the longest wait first."""
        waiting = (m for m, n in self.observed.waiting.items() if n > 0)
        return sorted(
            (llm for llm in waiting if not self._serving(llm)),
            key=lambda llm: (self._unserved_s(llm), llm),
        )

    def _unserved_s(self, llm: str) -> float:
        return self.observed.unserved_since_s.get(llm, math.inf)

    def _take_turn(self, llm: str) -> ReplicaId | None:
        """A block for an LLM that has none: of replicas that have had their turn, those
        that are missed least."""
        best: tuple[tuple[object, ...], ReplicaId, set[ReplicaId]] | None = None
        for option, key in self.rule.blocks[llm]:
            if key in self.failing or not self.observed.lost_gpus.isdisjoint(key.gpus):
                continue
            held = {k for k in self.serving if not set(key.gpus).isdisjoint(k.gpus)}
            if not all(self._had_turn(k, llm) for k in held) or not self._spares(held):
                continue
            last = {k.llm for k in held} - {k.llm for k in self.serving - held}
            work = sum(self.seen[k].in_flight for k in held if k in self.seen)
            rank = (len(last), work, self._rank(option, key))
            if best is None or rank < best[0]:
                best = rank, key, held
        if best is None:
            return None
        self.serving -= best[2]
        return best[1]

    def _had_turn(self, key: ReplicaId, llm: str) -> bool:
        """Whether a replica that is wanted gives way to ``llm``, which has none: one that
        serves after its turn, one that is yet to come if its LLM has waited less long."""
        replica = self.seen.get(key)
        if replica is not None and replica.phase == "ACTIVE":
            return turn_ends_s(replica, self.rule.fleet) <= self.observed.now_s
        if replica is not None and replica.phase in ("LOADING", "ACTIVATING"):
            return False
        return self._unserved_s(key.llm) > self._unserved_s(llm)

    def _keep_turn(self, replica: ObservedReplica) -> bool:
        """Whether the only replica of its LLM stays, or comes, though others that do not
        serve now are wanted in its place: its turn is not over."""
        if self._serving(replica.llm) or not (
            replica.served_since_s is None
            or self.observed.now_s < turn_ends_s(replica, self.rule.fleet)
        ):
            return False
        held = {k for k in self.serving if not set(replica.gpus).isdisjoint(k.gpus)}
        begun = {"ACTIVE", "ACTIVATING", "LOADING"}
        if any(k in self.seen and self.seen[k].phase in begun for k in held):
            return False
        if not self._spares(held):
            return False
        self.serving -= held
        return True

    def _spares(self, replicas: set[ReplicaId]) -> bool:
        """Whether the operator's least numbers hold without them."""
        left = Counter(key.llm for key in self.serving - replicas)
        least = self.rule.fleet.llm_by_name
        return all(left[k.llm] >= least[k.llm].min_active for k in replicas)

    def _warm_wishes(self) -> list[ReplicaId]:
        """Replicas to keep WARM, most valuable LLMs first."""
        wishes = [r.id for r in self.base.replicas]
        if self.rule.keep_weights:
            wishes += [r.id for r in self.observed.replicas]
        return sorted(
            {key for key in wishes if key not in self.serving},
            key=lambda key: (
                key not in self.base.by_id,
                key not in self.seen,
                -self.rule.loss_s[key.llm],
                key,
            ),
        )

    def _free_bytes(self, replicas: list[Replica]) -> dict[GpuId, int]:
        free = dict(self.rule.usable_bytes)
        for replica in replicas:
            held = self.rule.fleet.bytes_on_gpu(replica)
            for gpu in replica.gpus:
                free[gpu] -= held
        return free
