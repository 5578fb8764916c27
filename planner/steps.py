"""The steps of a transition as a table and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreserve.models.transitions import Transition
from foreserve.planner.diff import block
from foreserve.planner.tables import Part

WORDS = {"demote": "drain", "drop": "drop", "load": "load", "activate": "activate"}
"""A demote stops admitting and drains; nothing else of it takes time."""


def steps_part(found: Transition, title: str = "steps, in order") -> Part:
    """One row per step; what it leaves out of service, or without its floor after the
    loss of a failure domain (no spare), is marked."""
    rows = [
        (
            WORDS[step.action.kind],
            step.action.llm,
            block(step.action.gpus),
            f"{step.start_s:.2f}",
            f"{step.end_s:.2f}",
            "out of service" if step.outage else "no spare" if step.exposed else "",
        )
        for step in found.steps
    ]
    how = "no order is better" if found.exact else "ordered by rule, too many to search"
    note = f"{how}; {found.delayed_requests:.1f} weighted requests delayed"
    if found.exposures:
        note += f"; not N-1 safe: {found.exposures} steps without a spare"
    return Part(title, ["step", "LLM", "GPUs", "from s", "to s", ""], rows, note)


def transition_facts(found: Transition) -> Mapping[str, Any]:
    """As plain data, for ``--json``."""
    return {
        "outages": found.outages,
        "exposures": found.exposures,
        "delayed_requests": found.delayed_requests,
        "exact": found.exact,
        "seconds": found.seconds,
        "steps": [
            {
                "kind": step.action.kind,
                "llm": step.action.llm,
                "gpus": block(step.action.gpus),
                "start_s": step.start_s,
                "end_s": step.end_s,
                "outage": step.outage,
                "exposed": step.exposed,
            }
            for step in found.steps
        ],
    }
