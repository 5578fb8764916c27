"""A serving cluster's state as plain data for JSON: what the admin port answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from foreserve.models.codec import to_plain
from foreserve.models.observed import HOLDS_KV, Observed
from foreserve.models.placement import Action, Placement, Replica, ReplicaId
from foreserve.models.plan import LlmDemand
from foreserve.models.problem import Fleet, held_bytes
from foreserve.models.transitions import transition
from foreserve.planner.proposals import Proposal
from foreserve.runtime.journal import Decision, Event, Faulted, Refusal
from foreserve.runtime.live.remote import NodeStatus
from foreserve.runtime.timeline import Past, Sample, Stay

MOST_STATES = 2000
"""Of the search for an order of steps that is only shown."""


def replica_row(replica: Replica) -> Mapping[str, Any]:
    key: ReplicaId = replica.id
    return {
        "replica": str(key),
        "llm": replica.llm,
        "gpus": [str(gpu) for gpu in replica.gpus],
        "state": replica.state,
        "traffic_share": replica.traffic_share,
    }


def observed_rows(observed: Observed) -> list[Mapping[str, Any]]:
    return [
        {
            "replica": str(r.id),
            "llm": r.llm,
            "gpus": [str(gpu) for gpu in r.gpus],
            "phase": r.phase,
            "in_flight": r.in_flight,
        }
        for r in observed.replicas
    ]


def proposal_row(proposal: Proposal) -> Mapping[str, Any]:
    report, placement = proposal.report, proposal.placement
    return {
        "id": proposal.id,
        "epoch": proposal.epoch,
        "at_s": proposal.at_s,
        "took_s": proposal.took_s,
        "reasons": [reason.text for reason in proposal.reasons],
        "failed": proposal.failed,
        "origin": proposal.origin,
        "fate": proposal.fate,
        "generation": proposal.generation,
        "solver": None if report is None else report.solver,
        "status": None if report is None else report.status.value,
        "objective": None if report is None else finite(report.objective),
        "bound": None if report is None else finite(report.bound),
        "gap": None if report is None else finite(report.gap),
        "solve_s": None if report is None else report.wall_s,
        "count": 0 if placement is None else len(placement.replicas),
        "active": 0
        if placement is None
        else sum(r.state == "ACTIVE" for r in placement.replicas),
    }


def whole_proposal(proposal: Proposal) -> Mapping[str, Any]:
    """With its replicas."""
    placement = proposal.placement or Placement()
    return {
        **proposal_row(proposal),
        "replicas": [replica_row(r) for r in placement.replicas],
    }


def finite(value: float | None) -> float | None:
    """JSON has no infinity: None."""
    return value if value is not None and math.isfinite(value) else None


def demand_row(row: LlmDemand) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = to_plain(row)
    return plain


def gpu_rows(fleet: Fleet, nodes: Sequence[NodeStatus]) -> list[Mapping[str, Any]]:
    """Every GPU with what is booked on it, by replica."""
    reports = {node.node: node.report for node in nodes}
    rows: list[Mapping[str, Any]] = []
    for gpu in fleet.cluster.gpus:
        report = reports.get(gpu.node)
        held = [] if report is None else [r for r in report.rows if gpu in r.id.gpus]
        rows.append(
            {
                "gpu": str(gpu),
                "node": gpu.node,
                "usable_bytes": fleet.cluster.usable_bytes(gpu),
                "held": [
                    {"llm": r.id.llm, "phase": r.phase, "bytes": r.held_bytes}
                    for r in held
                ],
            }
        )
    return rows


def stay_row(stay: Stay) -> Sequence[Any]:
    """LLM, GPUs, phase, start, end (null: goes on), whether it was lost."""
    gpus = [str(gpu) for gpu in stay.replica.gpus]
    llm = stay.replica.llm
    return (llm, gpus, stay.phase, round(stay.start_s, 2), _end(stay), stay.lost)


def _end(stay: Stay) -> float | None:
    return None if stay.end_s is None else round(stay.end_s, 2)


def sample_row(sample: Sample) -> Sequence[Any]:
    """Second, waiting by LLM, in flight by LLM."""
    return (round(sample.at_s, 2), dict(sample.waiting), dict(sample.in_flight))


def past_row(past: Past, epoch_s: float) -> Mapping[str, Any]:
    return {
        "index": past.index,
        "start_s": past.index * epoch_s,
        "forecast": [demand_row(row) for row in past.demand],
        "peaks": past.peaks,
        "requests": dict(past.arrived),
    }


def note_row(event: Event) -> Mapping[str, Any]:
    """A line for people."""
    match event:
        case Decision():
            kinds = Counter(action.kind for action in event.actions)
            what = "; ".join(map(action_text, event.actions[:3]))
            if len(event.actions) > 3:
                what = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
            return {"at_s": event.at_s, "kind": "decision", "text": what}
        case Refusal():
            text = "; ".join(event.violations[:2])
            return {"at_s": event.at_s, "kind": "refusal", "text": text}
        case Faulted():
            lost = f", {event.replicas} replicas lost" if event.replicas else ""
            text = f"{event.kind} of {event.target}{lost}"
            return {"at_s": event.at_s, "kind": "fault", "text": text}
    return {"at_s": event.at_s, "kind": "event", "text": ""}


def action_text(action: Action) -> str:
    return f"{action.kind} {action.llm} on {', '.join(map(str, action.gpus))}"


def as_placement(observed: Observed) -> Placement:
    """What is there as a placement: what drains ends WARM, what activates ACTIVE."""
    return Placement(
        replicas=tuple(
            Replica(
                llm=r.llm,
                gpus=r.gpus,
                state="ACTIVE"
                if r.phase in HOLDS_KV and r.phase != "DRAINING"
                else "WARM",
            )
            for r in observed.replicas
        )
    )


def outlook(fleet: Fleet, observed: Observed, after: Placement) -> Mapping[str, Any]:
    """The steps from what is there to ``after``, and what is booked then."""
    found = transition(fleet, as_placement(observed), after, most_states=MOST_STATES)
    booked = Counter[str]()
    for replica in after.replicas:
        option = fleet.option_of(replica.llm, replica.gpus)
        for gpu in replica.gpus:
            booked[str(gpu)] += held_bytes(option, replica.state)
    return {
        "dry_run": True,
        "steps": [
            {
                "kind": step.action.kind,
                "llm": step.action.llm,
                "gpus": [str(gpu) for gpu in step.action.gpus],
                "start_s": step.start_s,
                "end_s": step.end_s,
                "outage": step.outage,
            }
            for step in found.steps
        ],
        "outages": found.outages,
        "takes_s": found.seconds,
        "ledger": [
            {
                "node": gpu.node,
                "device": str(gpu),
                "usable_bytes": fleet.cluster.usable_bytes(gpu),
                "booked_bytes": booked[str(gpu)],
            }
            for gpu in fleet.cluster.gpus
        ],
        "replicas": [replica_row(r) for r in after.replicas],
    }
