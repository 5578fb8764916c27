"""Policies: who should be where now. Ours, and every one we compare with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan

if TYPE_CHECKING:
    from foreserve.planner.policies.rolling import Online

POLICIES = {
    "planned": "foreserve.planner.policies.on_demand:planned",
    "reactive": "foreserve.planner.policies.on_demand:reactive",
    "reactive-keep": "foreserve.planner.policies.on_demand:reactive_keep",
    "ratio": "foreserve.planner.policies.ratio:ratio",
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


def get_policy(
    name: str, plan: Plan, keep_alive_s: float, online: Online | None = None
) -> Policy:
    """The policy called ``name`` on the plan's fleet (reactive ones ignore its epochs).

    ``online`` is what `rolling` plans with while it runs.
    """
    if name == "rolling" and online is not None:
        return online.policy(plan, keep_alive_s)
    if name == "rolling":
        raise InvalidInput(
            "the policy 'rolling' plans while it runs and needs to know what with",
            hint="--scenario, and no --seeds",
        )
    if name not in POLICIES:
        known: Sequence[str] = [*POLICIES, "rolling"]
        raise InvalidInput(f"unknown policy {name!r}", hint=did_you_mean(name, known))
    module, _, attribute = POLICIES[name].partition(":")
    policy: Policy = getattr(import_module(module), attribute)(plan, keep_alive_s)
    return policy
