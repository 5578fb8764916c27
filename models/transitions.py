"""From one placement to the next: in which order, and what that costs the traffic.

The steps are those of `diff`; an order of them is found in which each is safe when its
turn comes. The clock runs step by step: a load or an activation takes its option's time,
a demote as long as a mean request needs to finish (it stops admitting, drains, and holds
its KV until then), a drop no time.

What an order is judged by, in this sequence:

1. *Outages*: how often an LLM with traffic, which serves before and after, loses its last
   ACTIVE replica.
2. *Exposures*: how often such an LLM with a floor (`min_after_loss`, which it keeps before
   and after) comes to a state in which the loss of one failure domain would leave it fewer
   ACTIVE replicas than that. With 0 the order is N-1 safe: at no step is any floor in
   danger. Where no LLM has a floor there are none.
3. *Delayed requests*: sum of omega_m times the rate that is missing, times how long.
   What is missing is counted against the demand or what the goal can serve, the lesser.
4. *Waiting*: seconds that all loads and activations wait for their end, summed.

Steps that share neither GPUs nor an LLM with each other, directly or by others, go on at
the same time: each such part has its own clock and is ordered by itself. A part is
ordered exactly, by search over the sets of steps done (shortest path), if it has up to
`orders.MOST_STEPS` steps and ``most_states`` such sets are enough, and else by a rule.

Safe is what `runtime.reconcile` calls safe (a test compares): weights and KV of all that
is there fit each GPU (C1), and a replica becomes ACTIVE only where no other one on its
GPUs is, unless both are wanted ACTIVE on the same set (C3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from foreserve.models.orders import MOST_STATES, Part
from foreserve.models.placement import (
    Action,
    Placement,
    diff,
)
from foreserve.models.problem import Fleet, Problem
from foreserve.models.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Record):
    """One action, and when it happens, in seconds since the transition began."""

    action: Action
    start_s: float
    end_s: float
    outage: bool = False
    """From its start on, no ACTIVE replica of an LLM with traffic is left for a while."""
    exposed: bool = False
    """From its start on, the loss of one failure domain would break the LLM's floor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition(Record):
    """Steps in order of their start, and what they cost."""

    steps: tuple[Step, ...]
    outages: int
    exposures: int = 0
    """0: N-1 safe at every step, as far as LLMs ask for it."""
    delayed_requests: float
    """Weighted requests that found less serving than they will."""
    exact: bool
    """No order is better (in the sense above); else a rule chose the order of a part."""

    @property
    def seconds(self) -> float:
        """Until the last step ends; what is done at the same time counts once."""
        return max((step.end_s for step in self.steps), default=0.0)


def transition(
    fleet: Fleet,
    before: Placement,
    after: Placement,
    demand_rps: Mapping[str, float] | None = None,
    *,
    most_states: int = MOST_STATES,
) -> Transition:
    """The best order found of the steps from ``before`` to ``after``.

    Both obey (C1)-(C4); replicas of ``before`` on GPUs that ``fleet`` does not have, or of
    no option there, are gone already. ``demand_rps`` is by LLM; without it an LLM is asked
    for as much as it can serve.
    """
    here = _known(fleet, before)
    steps: list[Step] = []
    outages, exposures, delayed, exact = 0, 0, 0.0, True
    for actions in parts(here, after):
        part = Part(fleet, here, after, actions, demand_rps)
        order = part.search(most_states)
        exact = exact and order is not None
        found = _follow(part, part.by_rule() if order is None else order)
        steps += found.steps
        outages += found.outages
        exposures += found.exposures
        delayed += found.delayed_requests
    steps.sort(key=lambda step: step.start_s)  # stable: within a part the order holds
    return Transition(
        steps=tuple(steps),
        outages=outages,
        exposures=exposures,
        delayed_requests=delayed,
        exact=exact,
    )


def transition_to(problem: Problem, placement: Placement) -> Transition:
    """From what is there to a placement for the problem's first epoch."""
    rows = zip(problem.fleet.llms, problem.demand_rps, strict=True)
    demand_rps = {llm.name: row[0] for llm, row in rows}
    return transition(problem.fleet, problem.initial, placement, demand_rps)


def leads(fleet: Fleet, before: Placement, after: Placement, by: Transition) -> bool:
    """Whether the steps are those from ``before`` to ``after``, in an order in which each
    is safe."""
    here = _known(fleet, before)
    left = {(step.action.kind, step.action.replica): step for step in by.steps}
    actions = diff(here, after)
    if len(left) < len(by.steps) or left.keys() != {
        (a.kind, a.replica) for a in actions
    }:
        return False
    for own in parts(here, after):
        part, done = Part(fleet, here, after, own, None), 0
        number = {(a.kind, a.replica): i for i, a in enumerate(own)}
        for step in by.steps:
            i = number.get((step.action.kind, step.action.replica))
            if i is None:
                continue
            if not part.safe(i, done):
                return False
            done |= 1 << i
    return True


def _known(fleet: Fleet, placement: Placement) -> Placement:
    """Without replicas on GPUs that the fleet does not have, or of no option there."""
    return Placement(
        replicas=tuple(
            r for r in placement.replicas if fleet.option_on(r.llm, r.gpus) is not None
        )
    )


def parts(before: Placement, after: Placement) -> Iterator[tuple[Action, ...]]:
    """Actions that have to do with each other, by shared GPUs or a shared LLM."""
    root: dict[object, object] = {}

    def find(key: object) -> object:
        while root.setdefault(key, key) != key:
            root[key] = key = root[root[key]]
        return key

    actions = diff(before, after)
    for action in actions:
        for gpu in action.gpus:
            root[find(gpu)] = find(action.llm)
    grouped: dict[object, list[Action]] = {}
    for action in actions:
        grouped.setdefault(find(action.llm), []).append(action)
    for group in grouped.values():
        yield tuple(group)


def _follow(part: Part, order: Sequence[int]) -> Transition:
    """The clock and the costs of an order."""
    steps, now_s, done = [], 0.0, 0
    outages, exposures, delayed = 0, 0, 0.0
    for i in order:
        lost, risked, requests, _ = part.price(i, done)
        end_s = now_s + part.seconds[i]
        steps.append(
            Step(
                action=part.actions[i],
                start_s=now_s,
                end_s=end_s,
                outage=bool(lost),
                exposed=bool(risked),
            )
        )
        outages += lost
        exposures += risked
        delayed += requests
        now_s, done = end_s, done | 1 << i
    return Transition(
        steps=tuple(steps),
        outages=outages,
        exposures=exposures,
        delayed_requests=delayed,
        exact=True,
    )
