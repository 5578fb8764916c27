"""What the operator of a cluster that serves may do, beside looking: plans and changes by
hand, each with a receipt."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from foreserve.cli import views
from foreserve.cli.overview import Overview
from foreserve.cli.receipts import Receipts
from foreserve.models.codec import from_json, to_plain
from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan
from foreserve.models.referee import fleet_violations
from foreserve.planner.diff import diff_plans
from foreserve.planner.proposals import Mode, Proposal
from foreserve.planner.wishes import Hold, Level, Wishes
from foreserve.runtime.gateway.admin import Change, NotThere, Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Operating(Overview):
    """The admin port's `Operator`, over the parts of a serving cluster."""

    receipts: Receipts

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
            plan, told = self._current(), self.policy.proposed.find(plan_id)
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
            found = self.policy.proposed.find(plan_id)
            return found is not None and found.fate == "carried out"

        told = self._begin("approve", plan_id, is_done=is_done)
        return {**told, "plan_id": plan_id}

    def reject(self, plan_id: str) -> Mapping[str, Any]:
        if not self.policy.proposed.reject(plan_id):
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
        if mode == "automatic":
            try:
                self.folder.check()
            except InvalidInput as error:
                raise Refused(f"no automatic mode: {error}") from None
        self.folder.clear()
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
            what,
            subject,
            observed or self.policy.observed,
            generation=self.policy.generation,
            **options,
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
        found = self.policy.proposed.find(plan_id)
        if found is None or found.placement is None:
            raise NotThere(f"no plan {plan_id!r}")
        return found

    def _current(self) -> Plan:
        """What is carried out now, as a plan of one epoch."""
        plan = self.policy.plan
        return replace(plan, epochs=(plan.at(self.clock.now_s()),))

    def _outlook(self, after: Placement) -> Mapping[str, Any]:
        broken = [
            f"({label}) {text}" for label, text in fleet_violations(self.fleet, after)
        ]
        if broken:
            return {"dry_run": True, "refused": broken, "steps": [], "ledger": []}
        return views.outlook(self.fleet, self.policy.observed, after)


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
