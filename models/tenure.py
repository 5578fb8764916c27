"""How long a replica keeps its GPUs: what bounds how often LLMs take turns on them."""

from __future__ import annotations

import math

from foreserve.models.observed import ObservedReplica
from foreserve.models.placement import State
from foreserve.models.problem import Fleet


def kept_until_s(replica: ObservedReplica, wanted: State | None, fleet: Fleet) -> float:
    """Until when a replica that has served stays as it is, though it is ``wanted``
    otherwise (None: not at all): since it became ACTIVE, `ServingRules.tenure` times what
    it takes to have it back. Who waits so long for it never loses more than twice what the
    best choice in hindsight would have (the ski rental problem, for a tenure of 1).

    Minus infinity for what has not served since it was loaded: weights that somebody
    expects to be needed give way at once to those that are.
    """
    if replica.served_since_s is None:
        return -math.inf
    option = fleet.option_of(replica.llm, replica.gpus)
    back_s = option.activate_s + (0.0 if wanted == "WARM" else option.load_s)
    return replica.served_since_s + fleet.serving.tenure * back_s


def turn_ends_s(replica: ObservedReplica, fleet: Fleet) -> float:
    """From when on a replica that works gives way to an LLM that has none."""
    if replica.served_since_s is None:
        return -math.inf
    since_s = replica.served_since_s + fleet.serving.turn_s
    return max(since_s, kept_until_s(replica, None, fleet))
