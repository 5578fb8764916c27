"""The problems that a finished plan answers, made again from its trace and scenario."""

from __future__ import annotations

from dataclasses import replace

from foreserve.models import referee
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan
from foreserve.models.problem import Problem
from foreserve.planner.pipeline import Problems
from foreserve.planner.scenario import Scenario
from foreserve.traces.trace import Demand, Trace

OTHER = "the plan was made from another trace or scenario"


def problems_again(
    plan: Plan,
    scenario: Scenario,
    trace: Trace,
    history: Demand | None,
    horizon: int = 1,
) -> Problems:
    """As `plan_trace` had them; `InvalidInput` where the fleet is another one's."""
    forecast = replace(scenario.forecast, method=plan.forecaster)
    scenario = replace(scenario, forecast=forecast)
    problems = Problems(
        scenario, trace, history=history, seed=plan.solver.seed, horizon=horizon
    )
    if problems.fleet != plan.fleet:
        raise InvalidInput(f"{OTHER}: the fleets differ")
    if problems.count != len(plan.epochs):
        epochs = f"{problems.count} epochs, the plan has {len(plan.epochs)}"
        raise InvalidInput(f"{OTHER}: they have {epochs}")
    return problems


def problem_again(plan: Plan, problems: Problems, epoch: int) -> Problem:
    """The problem of one epoch; `InvalidInput` where the plan would cost other than it
    says."""
    before = placement_before(plan, epoch)
    problem = problems.at(epoch, before)
    chosen = plan.epochs[epoch]
    if chosen.certificate is not None:
        cost = referee.cost(problem, (chosen.placement,)).total
        stated = chosen.certificate.objective
        if abs(cost - stated) > 1e-6 * max(1.0, abs(stated)):
            raise InvalidInput(
                f"{OTHER}: epoch {epoch} would cost {cost:.6g}, it says {stated:.6g}"
            )
    return problem


def placement_before(plan: Plan, epoch: int) -> Placement:
    """What was resident when the epoch was planned; nothing before the first."""
    return plan.epochs[epoch - 1].placement if epoch else Placement()
