"""What the operator of a cluster that serves may see and do: the admin port's side."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foreserve.cli import views
from foreserve.cli.receipts import Receipts
from foreserve.models.codec import from_json, to_plain
from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet
from foreserve.models.referee import fleet_violations
from foreserve.planner.diff import diff_plans
from foreserve.planner.online import LivePolicy, Mode, Proposal
from foreserve.planner.wishes import Hold, Level, Wishes
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.gateway.admin import Change, NotThere, Refused
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
class Operating:
    """The admin port's `Operator`, over the parts of a serving cluster."""

    clock: SystemClock
    fleet: Fleet
    policy: LivePolicy
    controller: Controller
    backend: LiveBackend
    timeline: Timeline
    receipts: Receipts
    state: Callable[[str], str]
    """Of an LLM, as the gateway tells it."""
    failed: Callable[[], BaseException | None]
    """What ended the controller, if it was not asked to end."""
    drifted: Callable[[], Mapping[str, Any]] = dict
    """Reports of plan against actual."""
    time_scale: float = 1.0

    # --- to be seen -------------------------------------------------------------------

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

    # --- plans ------------------------------------------------------------------------

    def plans(self) -> Mapping[str, Any]:
        pending = self.policy.pending
        epoch = self.policy.plan.at(self.clock.now_s())
        return {
            "current": {
                "id": self.policy.plan_id,
                "generation": self.policy.generation,
                "replicas": [views.replica_row(r) for r in epoch.placement.replicas],
            },
            "proposed": None if pending is None else views.whole_proposal(pending),
            "history": [views.proposal_row(p) for p in reversed(self.policy.proposals)],
        }

    def plan(self, plan_id: str) -> Mapping[str, Any]:
        if plan_id == self.policy.plan_id:
            plan, told = self._current(), self.policy.find(plan_id)
        else:
            told = self._found(plan_id)
            plan = self.policy.as_plan(told)
        return {
            "proposal": None if told is None else views.proposal_row(told),
            "plan": to_plain(plan),
        }

    def diff(self, plan_id: str) -> Mapping[str, Any]:
        proposal = self._found(plan_id)
        current = self._current()
        epoch = current.epochs[0]
        assert proposal.placement is not None
        other = replace(epoch, placement=proposal.placement, demand=proposal.demand)
        found = diff_plans(current, replace(current, epochs=(other,)))
        plain: dict[str, Any] = to_plain(found)
        return {"from": self.policy.plan_id, "to": plan_id, **plain}

    def hand_in(self, text: str, *, dry_run: bool) -> Mapping[str, Any]:
        try:
            plan = from_json(Plan, text, "plan")
        except InvalidInput:
            raise
        except (RecursionError, ValueError):  # too deep, or a number of too many digits
            raise InvalidInput("not a plan file", file="plan") from None
        placement = plan.at(self.clock.now_s()).placement
        broken = [
            f"({label}) {message}"
            for label, message in fleet_violations(self.fleet, placement)
        ]
        if broken:
            raise InvalidInput(
                f"this cluster cannot hold the plan: {broken[0]}",
                also=[InvalidInput(text) for text in broken[1:]],
            )
        if dry_run:
            return self._outlook(self.policy.would(placement=placement))
        proposal = self.policy.hand_in(placement)
        self.clock.wake()
        told = self._begin("hand in", proposal.id)
        return {
            **told,
            "plan_id": proposal.id,
            "proposal": views.proposal_row(proposal),
        }

    def approve(self, plan_id: str, *, dry_run: bool) -> Mapping[str, Any]:
        pending = self.policy.pending
        if dry_run and pending is not None and pending.id == plan_id:
            return self._outlook(self.policy.would(placement=pending.placement))
        if dry_run or not self.policy.approve(plan_id):
            raise NotThere(f"no proposed plan {plan_id!r}")

        def is_done(_: Observed) -> bool:
            found = self.policy.find(plan_id)
            return found is not None and found.fate == "carried out"

        told = self._begin("approve", plan_id, is_done=is_done)
        return {**told, "plan_id": plan_id}

    def reject(self, plan_id: str) -> Mapping[str, Any]:
        if not self.policy.reject(plan_id):
            raise NotThere(f"no proposed plan {plan_id!r}")
        return {**self._begin("reject", plan_id), "plan_id": plan_id}

    # --- to be changed ----------------------------------------------------------------

    def change(self, change: Change, *, dry_run: bool) -> Mapping[str, Any]:
        self._check(change)
        wishes = self.policy.wishes
        subjects = [change.subject]
        if change.subject is None:
            held = {llm.name for llm in self.fleet.llms if llm.min_active}
            subjects = [
                llm.name
                for llm in self.fleet.llms
                if llm.name not in held and llm.name not in wishes.pinned
            ]

        def after(before: Wishes) -> Wishes:
            for subject in subjects:
                assert subject is not None
                before = _after(before, change, subject)
            return before

        if dry_run:
            return self._outlook(self.policy.would(wishes=after(wishes)))
        subject = change.subject or "all"
        seen = self.policy.observed
        told = self._begin(
            change.verb,
            subject,
            is_done=lambda observed: all(
                _is_done(change, s, observed) for s in subjects
            ),
            touches=lambda r: any(_touches(change, s, r) for s in subjects),
            observed=seen,
        )
        self.policy.wish(after, f"the operator: {change.verb} {subject}")
        return told

    def action(self, action_id: str) -> Mapping[str, Any]:
        found = self.receipts.find(action_id, self.policy.observed)
        if found is None:
            raise NotThere(f"no action {action_id!r}")
        refused = self.timeline.refused()
        reason = ""
        if found["state"] == "running":
            if refused is not None:
                reason = f"refused: {'; '.join(refused.violations)}"
            elif found["in_flight"]:
                reason = f"{found['in_flight']} requests are in flight"
            else:
                reason = "under way"
        return {**found, "reason": reason}

    def mode(self) -> Mode:
        return self.policy.mode

    def set_mode(self, mode: Mode) -> Mapping[str, Any]:
        self.policy.set_mode(mode)
        return {**self._begin("mode", mode), "mode": mode}

    def tick(self) -> Mapping[str, Any]:
        self.clock.wake()
        return self._begin("tick", secrets.token_hex(2))

    # ----------------------------------------------------------------------------------

    def _begin(
        self,
        what: str,
        subject: str,
        *,
        observed: Observed | None = None,
        **options: Any,
    ) -> Mapping[str, Any]:
        return self.receipts.begin(
            what, subject, observed or self.policy.observed, **options
        )

    def _check(self, change: Change) -> None:
        """That it names something, and that no rule is against it."""
        subject = change.subject
        if subject is None:
            return
        if change.verb in ("drain", "resume"):
            if subject not in self.fleet.cluster.node_by_name:
                raise NotThere(f"no node {subject!r}")
            return
        llm = self.fleet.llm_by_name.get(subject)
        if llm is None:
            raise NotThere(f"no LLM {subject!r}")
        if change.verb in ("sleep", "unload"):
            if llm.min_active:
                raise Refused(
                    f"{subject}: the scenario wants {llm.min_active} ACTIVE at least"
                )
            if subject in self.policy.wishes.pinned:
                raise Refused(f"{subject} is pinned: unpin it first")

    def _found(self, plan_id: str) -> Proposal:
        found = self.policy.find(plan_id)
        if found is None or found.placement is None:
            raise NotThere(f"no plan {plan_id!r}")
        return found

    def _current(self) -> Plan:
        """What is carried out now, as a plan of one epoch."""
        plan = self.policy.plan
        return replace(plan, epochs=(plan.at(self.clock.now_s()),))

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

    def _outlook(self, after: Placement) -> Mapping[str, Any]:
        broken = [
            f"({label}) {text}" for label, text in fleet_violations(self.fleet, after)
        ]
        if broken:
            return {"dry_run": True, "refused": broken, "steps": [], "ledger": []}
        return views.outlook(self.fleet, self.policy.observed, after)

    def _troubles(self) -> list[Mapping[str, Any]]:
        return [
            {"replica": str(t.id), "failures": t.failures, "reason": t.reason}
            for t in self.backend.troubles()
        ]


def _after(wishes: Wishes, change: Change, subject: str) -> Wishes:
    match change.verb:
        case "wake":
            return wishes.wake(subject)
        case "sleep" | "unload":
            level: Level = "asleep" if change.verb == "sleep" else "unloaded"
            return wishes.hold(
                Hold(llm=subject, level=level, until_need=change.until_need)
            )
        case "pin":
            return wishes.pin(subject)
        case "unpin":
            return wishes.unpin(subject)
        case "drain":
            return wishes.drain(subject)
        case "resume":
            return wishes.resume(subject)


def _touches(change: Change, subject: str | None, replica: ObservedReplica) -> bool:
    if change.verb in ("drain", "resume"):
        return replica.gpus[0].node == subject
    return replica.llm == subject


def _is_done(change: Change, subject: str | None, observed: Observed) -> bool:
    phases = {r.phase for r in observed.replicas if _touches(change, subject, r)}
    match change.verb:
        case "wake" | "pin":
            return "ACTIVE" in phases
        case "sleep":
            return phases <= {"WARM", "LOADING"}
        case "unload" | "drain":
            return not phases
    return True


def _plain(record: Any) -> Any:
    return {name: getattr(record, name) for name in record.__slots__}
