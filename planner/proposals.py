"""What the planner, or an operator, has proposed, and what has become of it."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Literal

from foreserve.models.placement import Placement
from foreserve.models.plan import LlmDemand
from foreserve.planner.replan import Reason
from foreserve.solvers.result import SolveReport

Mode = Literal["observe", "recommend", "automatic"]
Fate = Literal[
    "noted", "pending", "carried out", "rejected", "replaced", "late", "failed"
]
"""What has become of a proposal; noted: in mode observe, or not looked at yet."""

KEPT = 256
"""Proposals that are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What one solve has come to."""

    id: str
    """Of what it would place; "" where there is nothing."""
    epoch: int
    at_s: float
    """When the solve began."""
    took_s: float
    reasons: tuple[Reason, ...]
    """Why it was planned within the epoch; () at its start."""
    placement: Placement | None
    demand: tuple[LlmDemand, ...]
    report: SolveReport | None
    failed: str = ""
    """Why there is no placement, or why it came to nothing."""
    origin: Literal["planner", "operator"] = "planner"
    fate: Fate = "noted"
    generation: int | None = None
    """As which it was carried out."""


class Proposals:
    """All of them, the one that waits for approval, and which is carried out next. Any
    thread may use it."""

    def __init__(self) -> None:
        self.history: list[Proposal] = []
        """The latest ones, the last one last."""
        self.pending: Proposal | None = None
        """Waits for approval."""
        self.generation = 0
        """Raised with every proposal that is carried out."""
        self._lock = threading.Lock()
        self._ready: Proposal | None = None
        self._approved: Proposal | None = None
        self._approved_s = -math.inf

    def came(self, proposal: Proposal) -> None:
        """The planner has come to ``proposal``; `chosen` looks at it."""
        with self._lock:
            self._note(proposal)
            self._ready = proposal

    def hand_in(self, proposal: Proposal) -> Proposal:
        """Have the operator's own wait until somebody decides."""
        with self._lock:
            self._note(proposal)
            return self._pend(proposal)

    def approve(self, plan_id: str) -> bool:
        """Have the pending one chosen next, if it is this one; whether it is."""
        with self._lock:
            if self.pending is None or self.pending.id != plan_id:
                return False
            self._approved, self.pending = self.pending, None
        return True

    def reject(self, plan_id: str) -> bool:
        """Forget the pending one, if it is this one; whether it is."""
        with self._lock:
            if self.pending is None or self.pending.id != plan_id:
                return False
            self._is_now(self.pending, "rejected")
            self.pending = None
        return True

    def find(self, plan_id: str) -> Proposal | None:
        """The latest one of this id."""
        with self._lock:
            known = [p for p in self.history if p.id == plan_id]
        return known[-1] if known else None

    def chosen(self, mode: Mode, epoch: int, now_s: float) -> Proposal | None:
        """What is to be carried out from now on, once: what was approved, however old it
        is; else what is ready, if the mode says so and it is of this epoch."""
        with self._lock:
            ready, self._ready = self._ready, None
            chosen, self._approved = self._approved, None
            if chosen is not None:
                # Solves that began before know nothing of it.
                self._approved_s = now_s
            if ready is not None and ready.placement is not None:
                chosen = self._look_at(ready, mode, epoch, chosen)
            if chosen is None:
                return None
            self.generation += 1
            chosen = self._is_now(chosen, "carried out", generation=self.generation)
            if self.pending is not None and self.pending.origin == "planner":
                # What it was to replace is no more.
                self._is_now(self.pending, "replaced")
                self.pending = None
            return chosen

    # With the lock.

    def _look_at(
        self, ready: Proposal, mode: Mode, epoch: int, chosen: Proposal | None
    ) -> Proposal | None:
        """What to carry out: ``chosen``, which was approved, or what has just come."""
        if mode == "observe":
            return chosen
        if ready.at_s < self._approved_s:
            self._is_now(ready, "replaced")
        elif mode == "automatic":
            if ready.epoch >= epoch:
                return ready
            late = "came after its epoch; the plan before stays"
            self._is_now(ready, "late", failed=late)
        elif self.pending is None or self.pending.origin == "planner":
            # What somebody has handed in waits until somebody decides.
            self._pend(ready)
        return chosen

    def _note(self, proposal: Proposal) -> None:
        self.history.append(proposal)
        del self.history[:-KEPT]

    def _pend(self, proposal: Proposal) -> Proposal:
        """Have it wait for approval, in place of the one that did."""
        if self.pending is not None:
            self._is_now(self.pending, "replaced")
        self.pending = self._is_now(proposal, "pending")
        return self.pending

    def _is_now(
        self,
        proposal: Proposal,
        fate: Fate,
        *,
        generation: int | None = None,
        failed: str = "",
    ) -> Proposal:
        after = replace(proposal, fate=fate, generation=generation, failed=failed)
        for place, known in enumerate(self.history):
            if known is proposal:
                self.history[place] = after
        return after
