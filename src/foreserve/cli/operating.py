"""What the operator of a cluster that serves may see and do: the admin port's side."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreserve.models.placement import Placement, Replica, ReplicaId
from foreserve.planner.online import LivePolicy, Mode, Proposal
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.gateway.admin import NotThere, Stale
from foreserve.runtime.live.backend import LiveBackend

SHOWN = 20
"""Proposals that the admin port tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operating:
    """The admin port's `Operator`, over the parts of a serving cluster."""

    clock: SystemClock
    policy: LivePolicy
    controller: Controller
    backend: LiveBackend
    failed: Callable[[], BaseException | None]
    """What ended the controller, if it was not asked to end."""

    def status(self) -> Mapping[str, Any]:
        seen, desired = self.policy.observed, self.controller.desired or Placement()
        failed = self.failed()
        return {
            "now_s": self.clock.now_s(),
            "mode": self.policy.mode,
            "generation": self.policy.generation,
            "plan_id": self.policy.plan_id,
            "failed": None if failed is None else str(failed),
            "nodes": [
                {"node": n.node, "error": n.error, "age_s": n.age_s}
                for n in self.backend.status()
            ],
            "wanted": [_replica(r) for r in desired.replicas],
            "observed": [
                {
                    "replica": str(r.id),
                    "llm": r.llm,
                    "gpus": [str(gpu) for gpu in r.gpus],
                    "phase": r.phase,
                    "in_flight": r.in_flight,
                }
                for r in seen.replicas
            ],
            "waiting": dict(seen.waiting),
            "lost_gpus": sorted(map(str, seen.lost_gpus)),
            "troubles": [
                {"replica": str(t.id), "failures": t.failures, "reason": t.reason}
                for t in self.backend.troubles()
            ],
            "proposals": [_proposal(p) for p in self.policy.proposals[-SHOWN:]],
        }

    def plans(self) -> Mapping[str, Any]:
        pending = self.policy.pending
        epoch = self.policy.plan.at(self.clock.now_s())
        return {
            "current": {
                "id": self.policy.plan_id,
                "replicas": [_replica(r) for r in epoch.placement.replicas],
            },
            "proposed": None if pending is None else _proposal(pending),
        }

    def approve(self, plan_id: str, generation: int | None) -> Mapping[str, Any]:
        if generation is not None and generation != self.policy.generation:
            raise Stale(
                f"the generation is {self.policy.generation}, not {generation}: look "
                "at the plan again"
            )
        if not self.policy.approve(plan_id):
            raise NotThere(f"no proposed plan {plan_id!r}")
        return {"action": secrets.token_hex(8), "plan_id": plan_id}

    def mode(self) -> Mode:
        return self.policy.mode

    def set_mode(self, mode: Mode) -> None:
        self.policy.set_mode(mode)

    def engines(self) -> Sequence[Mapping[str, Any]]:
        return [
            {
                "node": node.node,
                "replica": str(row.id),
                "phase": row.phase,
                "url": row.url,
            }
            for node in self.backend.status()
            if node.report is not None
            for row in node.report.rows
        ]

    def ledger(self) -> Sequence[Mapping[str, Any]]:
        rows = []
        for node in self.backend.status():
            if node.report is None:
                continue
            for gpu, usable in sorted(node.report.usable_bytes.items()):
                free = node.report.free_bytes[gpu]
                rows += [
                    {
                        "node": node.node,
                        "device": str(gpu),
                        "kind": kind,
                        "bytes": count,
                    }
                    for kind, count in (
                        ("usable", usable),
                        ("booked", usable - free),
                        ("free", free),
                    )
                ]
        return rows

    def tick(self) -> Mapping[str, Any]:
        self.clock.wake()
        return {"action": secrets.token_hex(8)}


def _replica(replica: Replica) -> Mapping[str, Any]:
    key: ReplicaId = replica.id
    return {
        "replica": str(key),
        "llm": replica.llm,
        "gpus": [str(gpu) for gpu in replica.gpus],
        "state": replica.state,
        "traffic_share": replica.traffic_share,
    }


def _proposal(proposal: Proposal) -> Mapping[str, Any]:
    report = proposal.report
    placement = proposal.placement
    return {
        "id": proposal.id,
        "epoch": proposal.epoch,
        "at_s": proposal.at_s,
        "took_s": proposal.took_s,
        "reasons": [reason.text for reason in proposal.reasons],
        "failed": proposal.failed,
        "status": None if report is None else report.status.value,
        "objective": None if report is None else report.objective,
        "bound": None if report is None else report.bound,
        "replicas": []
        if placement is None
        else [_replica(r) for r in placement.replicas],
    }
