"""Policies: who should be where now. Ours, and every one we compare with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan

POLICIES = {
    "planned": "foreserve.planner.policies.on_demand:planned",
    "reactive": "foreserve.planner.policies.on_demand:reactive",
    "reactive-keep": "foreserve.planner.policies.on_demand:reactive_keep",
}


class Policy(Protocol):
    """Decides what should be resident; the runtime makes it so."""

    @property
    def name(self) -> str: ...

    def decide(self, now_s: float, observed: Observed) -> Placement:
        """The placement wanted now. Pure: same arguments, same answer."""
        ...

    def next_review_s(self, now_s: float) -> float:
        """When to ask again even if nothing happens."""
        ...


def get_policy(name: str, plan: Plan, keep_alive_s: float) -> Policy:
    """The policy called ``name`` on the plan's fleet (reactive ones ignore its epochs)."""
    if name not in POLICIES:
        known: Sequence[str] = list(POLICIES)
        raise InvalidInput(f"unknown policy {name!r}", hint=did_you_mean(name, known))
    module, _, attribute = POLICIES[name].partition(":")
    policy: Policy = getattr(import_module(module), attribute)(plan, keep_alive_s)
    return policy
