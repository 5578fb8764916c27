"""What replicas were in which phase when, and which LLMs suffered from a fault then.

A memory of the last while, fed with a journal's events in order; older things are let go
(`forget`), so that it stays as large as what happens in such a while.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from foreserve.models.observed import Phase
from foreserve.models.placement import Placement, ReplicaId
from foreserve.models.problem import Fleet, held_bytes
from foreserve.models.specs import GpuId
from foreserve.runtime.journal import Decision, Faulted, PhaseChange


@dataclass(slots=True, eq=False)
class Stretch:
    """One phase of one replica."""

    phase: Phase
    begin_s: float
    end_s: float = math.inf
    cold: bool = False
    """Of ACTIVE: its weights were not there when it was called for; of LOADING: it has been
    called for."""
    told: bool = False
    """Of such a one: a request is known to have waited for it."""

    def within(self, begin_s: float, end_s: float) -> float:
        """Seconds of it in this time."""
        return max(0.0, min(self.end_s, end_s) - max(self.begin_s, begin_s))


@dataclass(slots=True, eq=False)
class Life:
    """A replica, from its load, or from when it was first seen, until it is gone."""

    id: ReplicaId
    stretches: list[Stretch] = field(default_factory=list)
    unworked_bytes: int = 0
    """Weights that were loaded while nothing has been worked on here since."""
    cold: bool = False
    """It was called for while its weights were not there."""
    from_storage: bool = False
    """Its load reads storage."""

    @property
    def now(self) -> Stretch:
        return self.stretches[-1]

    def serving_at(self, at_s: float) -> Stretch | None:
        """The stretch of ACTIVE that it served in at ``at_s``; DRAINING belongs to it."""
        active = found = None
        for stretch in self.stretches:
            if stretch.phase == "ACTIVE":
                active = stretch
            elif stretch.phase != "DRAINING":
                active = None
            if active is not None and stretch.begin_s <= at_s <= stretch.end_s:
                found = active
        return found


@dataclass(slots=True, eq=False)
class Window:
    """A time in which an LLM had less than it would have had without a fault."""

    begin_s: float
    end_s: float = math.inf
    need: int = 0
    """So many ACTIVE replicas, and it is over; 0: not by that."""
    gpus: frozenset[GpuId] = frozenset()
    """Or one of these is back."""


class Lives:
    """The replicas of a run. Mutable, for one owner."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.now: dict[ReplicaId, Life] = {}
        """Who is there."""
        self.gone: list[Life] = []
        self.windows: dict[str, list[Window]] = {llm.name: [] for llm in fleet.llms}
        self.slow: list[tuple[str, float, float]] = []
        """(node, from, until) in which all takes longer there."""
        self._wanted: frozenset[ReplicaId] = frozenset()
        self._active = dict.fromkeys(self.windows, 0)

    # Events.

    def place(self, initial: Placement, at_s: float) -> None:
        """In place already."""
        for replica in initial.replicas:
            self._enter(replica.id, replica.state, at_s)

    def want(self, event: Decision) -> None:
        if event.desired is None:
            return
        wanted = [r.id for r in event.desired.replicas if r.state == "ACTIVE"]
        self._wanted = frozenset(wanted)
        for life in self.now.values():
            if life.id not in self._wanted:
                life.cold = False
            elif life.now.phase == "LOADING":
                life.cold = life.now.cold = True
        count = dict.fromkeys(self.windows, 0)
        for key in wanted:
            count[key.llm] += 1
        for llm, windows in self.windows.items():
            if self._active[llm] >= count[llm]:  # no more is asked for
                _close(windows, event.at_s, need=math.inf)

    def change(self, event: PhaseChange) -> tuple[Life | None, Stretch | None]:
        """The replica's life, None if nothing has changed; the phase that has ended."""
        key = ReplicaId(llm=event.llm, gpus=event.gpus)
        life = self.now.get(key)
        before = life.now if life is not None else None
        if event.phase == (None if before is None else before.phase):
            return None, None
        if event.phase is not None:
            return self._enter(key, event.phase, event.at_s), before
        assert life is not None
        assert before is not None
        del self.now[key]
        before.end_s = event.at_s
        self.gone.append(life)
        served = before.phase == "ACTIVE"
        self._active[key.llm] -= served
        if event.lost and not event.revoked:
            # What was not to serve, or no longer, is not missed.
            missed = key in self._wanted and before.phase != "DRAINING"
            need = self._active[key.llm] + 1 if missed else 0
            end_s = math.inf if need else event.at_s
            window = Window(begin_s=event.at_s, end_s=end_s, need=need)
            self.windows[key.llm].append(window)
        return life, before

    def fault(self, event: Faulted, planned: Placement | None) -> None:
        """``planned``: what the plan of now wants, and will miss where GPUs are lost."""
        end_s = math.inf if event.until_s is None else event.until_s
        if event.kind == "slow-node":
            self.slow.append((event.target, event.at_s, end_s))
        if event.kind not in ("gpu-loss", "node-loss") or planned is None:
            return
        where = event.fault.where
        gpus = frozenset(gpu for gpu in self.fleet.cluster.gpus if where.covers(gpu))
        for llm in {r.llm for r in planned.replicas if not gpus.isdisjoint(r.gpus)}:
            window = Window(begin_s=event.at_s, end_s=end_s, gpus=gpus)
            self.windows[llm].append(window)

    def plan(self, placement: Placement, at_s: float) -> None:
        """From now on this is planned: GPUs that an LLM is not to have are not missed."""
        for llm, windows in self.windows.items():
            asked = {gpu for replica in placement.of(llm) for gpu in replica.gpus}
            for window in windows:
                if window.gpus and window.gpus.isdisjoint(asked):
                    window.end_s = min(window.end_s, at_s)

    def forget(self, before_s: float) -> None:
        """What was over by then."""
        self.gone = [life for life in self.gone if life.now.end_s >= before_s]
        for life in self.now.values():
            life.stretches = [x for x in life.stretches if x.end_s >= before_s]
        for llm, windows in self.windows.items():
            self.windows[llm] = [w for w in windows if w.end_s >= before_s]
        self.slow = [row for row in self.slow if row[2] >= before_s]

    def _enter(self, key: ReplicaId, phase: Phase, at_s: float) -> Life:
        life = self.now.get(key)
        if life is None:
            life = self.now[key] = Life(key)
            life.cold = key in self._wanted
        else:
            life.now.end_s = at_s
            if life.now.phase == "ACTIVE":
                self._active[key.llm] -= 1
        stretch = Stretch(phase, at_s, cold=phase == "LOADING" and life.cold)
        life.stretches.append(stretch)
        windows = self.windows[key.llm]
        for window in windows:
            if not window.gpus.isdisjoint(key.gpus):
                window.end_s = min(window.end_s, at_s)
        if phase == "ACTIVE":
            stretch.cold, life.cold = life.cold, False
            self._active[key.llm] += 1
            _close(windows, at_s, need=self._active[key.llm])
        return life

    # Questions.

    def all(self, key: ReplicaId | None = None) -> Iterator[Life]:
        """Who is there and who was, the latest first; only those of ``key``."""
        if key is None:
            yield from self.now.values()
        elif key in self.now:
            yield self.now[key]
        for life in reversed(self.gone):
            if key is None or life.id == key:
                yield life

    def served_by(self, key: ReplicaId, at_s: float) -> Stretch | None:
        """The ACTIVE stretch of ``key`` at ``at_s``."""
        for life in self.all(key):
            found = life.serving_at(at_s)
            if found is not None:
                return found
        return None

    def was_active(self, llm: str, at_s: float) -> bool:
        """Whether any replica of ``llm`` was."""
        return any(
            stretch.phase == "ACTIVE" and stretch.begin_s <= at_s < stretch.end_s
            for life in self.all()
            if life.id.llm == llm
            for stretch in life.stretches
        )

    def suffered(
        self, llm: str, key: ReplicaId | None, begin_s: float, end_s: float
    ) -> bool:
        """Whether a fault was in the way of ``llm``, or slowed down ``key``, then."""
        if any(w.begin_s <= end_s and w.end_s >= begin_s for w in self.windows[llm]):
            return True
        return key is not None and any(
            node == key.gpus[0].node and a <= end_s and b >= begin_s
            for node, a, b in self.slow
        )

    def shared(self, key: ReplicaId, begin_s: float, stop_s: float) -> bool:
        """Whether another replica was ACTIVE on its GPUs beside it: they take turns, of
        which nothing is known here."""
        if self.fleet.sharing is None:
            return False
        lives = [x for x in self.all() if not set(x.id.gpus).isdisjoint(key.gpus)]

        def active(own: bool) -> list[Stretch]:
            return [
                stretch
                for life in lives
                for stretch in life.stretches
                if (life.id == key) == own
                and stretch.phase in ("ACTIVE", "DRAINING")
                and stretch.within(begin_s, stop_s) > 0
            ]

        others = active(False)
        return any(
            a.within(b.begin_s, b.end_s) > 0 for a in active(True) for b in others
        )

    def warm(self, begin_s: float, stop_s: float) -> Mapping[str, tuple[float, int]]:
        """By LLM: bytes held WARM times seconds; replicas that were WARM in vain."""
        found: dict[str, tuple[float, int]] = {}
        for life in self.all():
            warm_s = sum(
                x.within(begin_s, stop_s) for x in life.stretches if x.phase == "WARM"
            )
            if not warm_s:
                continue
            option = self.fleet.option_of(life.id.llm, life.id.gpus)
            num_bytes = held_bytes(option, "WARM") * len(life.id.gpus)
            vain = warm_s >= (stop_s - begin_s) / 2 and not _called(
                life, begin_s, stop_s
            )
            so_far = found.get(life.id.llm, (0.0, 0))
            found[life.id.llm] = so_far[0] + warm_s * num_bytes, so_far[1] + vain
        return found


def _called(life: Life, begin_s: float, stop_s: float) -> bool:
    return any(
        x.phase != "WARM" and x.phase != "LOADING" and x.within(begin_s, stop_s) > 0
        for x in life.stretches
    )


def _close(windows: list[Window], at_s: float, need: float) -> None:
    for window in windows:
        if 0 < window.need <= need:
            window.end_s = min(window.end_s, at_s)
