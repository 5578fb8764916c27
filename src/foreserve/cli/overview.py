"""What the operator of a cluster that serves may see: the admin port's answers to GET."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreserve.cli import views
from foreserve.cli.state import State
from foreserve.models.codec import to_plain
from foreserve.models.placement import Placement
from foreserve.models.problem import Fleet
from foreserve.planner.online import LivePolicy
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.live import views as live
from foreserve.runtime.live.backend import LiveBackend
from foreserve.runtime.timeline import Timeline

SHOWN = 20
"""Proposals and events that the admin port tells of at once."""

AHEAD = 4
"""Epochs of the plan that are shown."""

RUNNING: Mapping[str, str] = {
    "active": "ready",
    "activating": "starting",
    "loading": "starting",
    "draining": "stopping",
}
"""llama-swap's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What there is to see of the parts of a serving cluster."""

    clock: SystemClock
    fleet: Fleet
    policy: LivePolicy
    controller: Controller
    backend: LiveBackend
    timeline: Timeline
    state: Callable[[str], str]
    """Of an LLM, as the gateway tells it."""
    failed: Callable[[], BaseException | None]
    """What ended the controller, if it was not asked to end."""
    folder: State
    drifted: Callable[[], Mapping[str, Any]] = dict
    """Reports of plan against actual."""
    time_scale: float = 1.0

    def generation(self) -> int:
        return self.policy.generation

    def status(self) -> Mapping[str, Any]:
        seen, desired = self.policy.observed, self.controller.desired or Placement()
        failed, wishes = self.failed(), self.policy.wishes
        refused = self.timeline.refused()
        return {
            "now_s": self.clock.now_s(),
            "mode": self.policy.mode,
            "generation": self.policy.generation,
            "plan_id": self.policy.plan_id,
            "failed": None if failed is None else str(failed),
            "amiss": list(self.folder.notes.values()),
            "refused": None if refused is None else list(refused.violations),
            "nodes": [
                {
                    "node": n.node,
                    "error": n.error,
                    "age_s": n.age_s,
                    "drained": n.node in wishes.drained,
                }
                for n in self.backend.status()
            ],
            "wanted": [views.replica_row(r) for r in desired.replicas],
            "observed": views.observed_rows(seen),
            "waiting": dict(seen.waiting),
            "lost_gpus": sorted(map(str, seen.lost_gpus)),
            "troubles": self._troubles(),
            "wishes": to_plain(wishes),
            "proposals": [
                views.whole_proposal(p) for p in self.policy.proposals[-SHOWN:]
            ],
        }

    def view(self, stays: int, after_s: float) -> Mapping[str, Any]:
        timeline, now_s = self.timeline, self.clock.now_s()
        version, pending = timeline.version, self.policy.pending
        return {
            **self.status(),
            "proposals": [
                views.proposal_row(p) for p in self.policy.proposals[-SHOWN:]
            ],
            "epoch_s": timeline.epoch_s,
            "keep_s": timeline.keep_s,
            "recent_s": timeline.recent_s,
            "time_scale": self.time_scale,
            "models": self.llms(),
            "nodes": self.nodes(),
            "gpus": views.gpu_rows(self.fleet, self.backend.status()),
            "planned": self._planned(now_s),
            "pending": None if pending is None else views.whole_proposal(pending),
            "epochs": [views.past_row(p, timeline.epoch_s) for p in timeline.epochs()],
            "drift": {k: v for k, v in self.drift().items() if k != "latest"},
            "notes": [views.note_row(note) for note in timeline.notes(SHOWN)],
            "stays_version": version,
            "stays": None
            if version == stays
            else [views.stay_row(stay) for stay in timeline.stays()],
            "samples": [views.sample_row(s) for s in timeline.samples(after_s)],
            "now_s": now_s,
        }

    def llms(self) -> Sequence[Mapping[str, Any]]:
        seen, wishes, now_s = (
            self.policy.observed,
            self.policy.wishes,
            self.clock.now_s(),
        )
        recent = self.timeline.recent(now_s)
        demand = {row.llm: row for row in self.policy.plan.at(now_s).demand}
        rows: list[Mapping[str, Any]] = []
        for llm in self.fleet.llms:
            own = [r for r in seen.replicas if r.llm == llm.name]
            hold, lately = wishes.hold_of(llm.name), recent.get(llm.name)
            eta_s = self.backend.eta(llm.name)[1]
            state = self.state(llm.name)
            rows.append(
                {
                    "llm": llm.name,
                    "state": state,
                    "eta_s": 0.0 if state == "active" else views.finite(eta_s),
                    "waiting": seen.waiting.get(llm.name, 0),
                    "in_flight": sum(r.in_flight for r in own),
                    "places": sum(
                        self.fleet.option_of(r.llm, r.gpus).concurrency
                        for r in own
                        if r.phase == "ACTIVE"
                    ),
                    "phases": dict(Counter(r.phase for r in own)),
                    "peak": self.policy.peaks.get(llm.name, 0),
                    "forecast": views.demand_row(demand[llm.name])
                    if llm.name in demand
                    else None,
                    "recent": None if lately is None else _plain(lately),
                    "pinned": llm.name in wishes.pinned,
                    "waking": llm.name in wishes.waking,
                    "hold": None if hold is None else to_plain(hold),
                    "min_active": llm.min_active,
                    "slo_ttft_s": llm.slo.ttft_s,
                    "slo_tpot_s": llm.slo.tpot_s,
                }
            )
        return rows

    def nodes(self) -> Sequence[Mapping[str, Any]]:
        seen, wishes = self.policy.observed, self.policy.wishes
        reports = {status.node: status.report for status in self.backend.status()}
        rows: list[Mapping[str, Any]] = []
        for known in live.nodes(self.backend):
            node = self.fleet.cluster.node_by_name[known["node"]]
            own = [r for r in seen.replicas if r.gpus[0].node == node.name]
            report = reports[node.name]
            rows.append(
                {
                    **known,
                    "gpu_type": node.gpu,
                    "gpus": [str(gpu) for gpu in node.gpu_ids()],
                    "drained": node.name in wishes.drained,
                    "replicas": len(own),
                    "in_flight": sum(r.in_flight for r in own),
                    "host_bytes": 0 if report is None else report.host_bytes,
                    "hosted": []
                    if report is None
                    else [
                        {"llm": r.llm, "bytes": r.held_bytes, "whole": r.whole}
                        for r in report.hosted
                    ],
                }
            )
        return rows

    def engines(self) -> Sequence[Mapping[str, Any]]:
        return live.engines(self.backend)

    def ledger(self) -> Sequence[Mapping[str, Any]]:
        return live.ledger(self.backend)

    def drift(self) -> Mapping[str, Any]:
        return self.drifted()

    def running(self) -> Sequence[Mapping[str, Any]]:
        phases: dict[str, set[str]] = {}
        for replica in self.policy.observed.replicas:
            phases.setdefault(replica.llm, set()).add(replica.phase.lower())
        return [
            {
                "model": llm,
                "state": next(s for p, s in RUNNING.items() if p in found),
                "ttl": 0,
                "name": llm,
                "description": "",
            }
            for llm, found in sorted(phases.items())
            if not found.isdisjoint(RUNNING)
        ]

    def _planned(self, now_s: float) -> list[Mapping[str, Any]]:
        """The plan's epochs from now on, those that are in it."""
        plan = self.policy.plan
        if self.policy.plan_id is None:
            return []
        epochs = [e for e in plan.epochs if e.end_s > now_s] or [plan.at(now_s)]
        return [
            {
                "start_s": epoch.start_s,
                "end_s": epoch.end_s,
                "replicas": [views.replica_row(r) for r in epoch.placement.replicas],
            }
            for epoch in epochs[:AHEAD]
        ]

    def _troubles(self) -> list[Mapping[str, Any]]:
        return [
            {"replica": str(t.id), "failures": t.failures, "reason": t.reason}
            for t in self.backend.troubles()
        ]


def _plain(record: Any) -> Any:
    return {name: getattr(record, name) for name in record.__slots__}
