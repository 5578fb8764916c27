"""What a plan costs where the world is worse than it was planned for.

Three plans are put into the same world: the plan, greedy's from the same forecasts, and
one made epoch by epoch for that world by the plan's solver (foresight). Replicas stay
where a plan has them and traffic is split anew, best for the world. All costs are the
referee's, in weighted seconds of delay, summed over epochs.

Worlds, each ``factor`` times off:

* *latencies*: requests and loads take ``factor`` times as long, rates are as much lower;
* *loads*: only loads and activations do;
* *demand*: rates, loads and peaks are ``factor`` times the forecast's;
* *forecast*: what came, pushed away from its forecast: forecast + factor (real -
  forecast), not below 0; with factor 1, what came.

To be simulated, a world needs requests: the trace, reshaped to the world's rates by epoch
and LLM (`planner.reshape`), and served by the world's fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models import referee
from foreserve.models.outcome import Outcome
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet, Problem, round_rate
from foreserve.planner.fleet import align
from foreserve.planner.pipeline import NoPlan, Problems
from foreserve.planner.reshape import reshaped
from foreserve.solvers.base import SolverPool
from foreserve.solvers.result import SolveOptions
from foreserve.solvers.shares import with_shares
from foreserve.traces.forecast import Forecast
from foreserve.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What users get where a plan's placements meet the requests of a world."""

    requests: int
    slo_attainment: float
    worst_llm: str
    worst_attainment: float
    """Of the LLM that is served worst."""
    ttft_p50_s: float
    ttft_p99_s: float

    @classmethod
    def of(cls, outcome: Outcome) -> Simulated:
        asked = {k: s.slo_attainment for k, s in outcome.by_llm.items() if s.requests}
        worst = min(asked, key=asked.__getitem__, default="")
        return cls(
            requests=outcome.total.requests,
            slo_attainment=outcome.total.slo_attainment,
            worst_llm=worst,
            worst_attainment=asked.get(worst, 1.0),
            ttft_p50_s=outcome.total.ttft.p50_s,
            ttft_p99_s=outcome.total.ttft.p99_s,
        )


Simulate = Callable[[Plan, Trace], Outcome]
"""Runs a plan against requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """One world, and what each plan costs there."""

    world: str
    factor: float
    plan: float
    greedy: float
    foresight: float
    """Of the plan made for this world: its epochs' solves, one after another."""
    foresight_bound: float
    """Sum of the bounds of those solves, each given the placement before it."""
    simulated: Mapping[str, Simulated] = field(default_factory=dict)
    """Of plan, greedy and foresight, where asked for."""

    @property
    def plan_regret(self) -> float:
        """What foresight would have saved."""
        return self.plan - self.foresight

    @property
    def greedy_regret(self) -> float:
        return self.greedy - self.foresight


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    name: str
    factor: float
    fleet: Fleet
    forecast: Callable[[int], Forecast]


def regret(
    plan: Plan,
    problems: Problems,
    factors: Sequence[float],
    solver: str,
    options: SolveOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
    trace: Trace | None = None,
    simulate: Simulate | None = None,
) -> tuple[Regret, ...]:
    """The plan, greedy and foresight in every world; ``problems`` are the plan's.

    With ``simulate``, also run against the requests of each world, made of ``trace``.
    Raises `NoPlan` where an epoch of a world has no plan.
    """
    worlds = list(_worlds(problems, factors))
    planned = tuple(epoch.placement for epoch in plan.epochs)
    runs = simulate is not None and trace is not None
    done, total = 1, 1 + len(worlds) * (4 if runs else 1)
    with SolverPool("greedy", options) as pool:
        simple, _ = _solved(problems, worlds[0], pool)
    progress(done, total)
    found = []
    with SolverPool(solver, options) as pool:
        for world in worlds:
            known, bound = _solved(problems, world, pool)
            done += 1
            progress(done, total)
            split = {
                name: _split(problems, world, placements)
                for name, placements in zip(
                    PLANS, (planned, simple, known), strict=True
                )
            }
            costs = {name: cost for name, (_, cost) in split.items()}
            simulated = {}
            if simulate is not None and trace is not None:
                requests = _requests(problems, world, trace)
                for name, (placements, _) in split.items():
                    there = _in_world(plan, world, placements)
                    simulated[name] = Simulated.of(simulate(there, requests))
                    done += 1
                    progress(done, total)
            found.append(
                Regret(
                    world=world.name,
                    factor=world.factor,
                    **costs,
                    foresight_bound=min(bound, costs["foresight"]),
                    simulated=simulated,
                )
            )
    return tuple(found)


PLANS = ("plan", "greedy", "foresight")


def _requests(problems: Problems, world: _World, trace: Trace) -> Trace:
    """The trace's requests, as many of each LLM in each epoch as the world has."""
    rates, came = (
        np.stack([made(i).rate_rps[:, 0] for i in range(problems.count)], axis=1)
        for made in (world.forecast, problems.truth)
    )
    names = tuple(llm.name for llm in world.fleet.llms)
    rng = np.random.default_rng(problems.seed)
    own = align(trace, names)
    return reshaped(own, problems.scenario.epoch, came, rates, rng)


def _in_world(plan: Plan, world: _World, placements: Sequence[Placement]) -> Plan:
    """These placements at the plan's times, on the world's fleet."""
    epochs = tuple(
        replace(epoch, placement=placement, certificate=None)
        for epoch, placement in zip(plan.epochs, placements, strict=True)
    )
    return replace(plan, fleet=world.fleet, epochs=epochs)


def _worlds(problems: Problems, factors: Sequence[float]) -> Iterator[_World]:
    """As planned first, what came next, then each kind at each factor."""
    fleet, forecast = problems.fleet, problems.forecast
    yield _World(name="as planned", factor=1.0, fleet=fleet, forecast=forecast)
    yield _World(name="forecast", factor=1.0, fleet=fleet, forecast=problems.truth)
    for factor in factors:
        for name, requests in (("latencies", True), ("loads", False)):
            worse = slower(fleet, factor, requests=requests)
            yield _World(name=name, factor=factor, fleet=worse, forecast=forecast)
        yield _World(
            name="demand",
            factor=factor,
            fleet=fleet,
            forecast=lambda i, factor=factor: more_demand(forecast(i), factor),  # type: ignore[misc]
        )
        yield _World(
            name="forecast",
            factor=factor,
            fleet=fleet,
            forecast=lambda i, factor=factor: further(  # type: ignore[misc]
                forecast(i), problems.truth(i), factor
            ),
        )


def slower(fleet: Fleet, factor: float, *, requests: bool) -> Fleet:
    """Loads and activations take ``factor`` times as long, and so do requests."""
    options = []
    for option in fleet.options:
        worse = replace(
            option,
            load_s=option.load_s * factor,
            activate_s=option.activate_s * factor,
            copy_s=None if option.copy_s is None else option.copy_s * factor,
            start_s=option.start_s * factor,
        )
        if requests:
            worse = replace(
                worse,
                exec_s=option.exec_s * factor,
                ttft_s=option.ttft_s * factor,
                tpot_s=option.tpot_s * factor,
                time=option.time.times(factor),
                rate_rps=round_rate(option.rate_rps / factor),
            )
        options.append(worse)
    return replace(fleet, options=tuple(options))


def more_demand(forecast: Forecast, factor: float) -> Forecast:
    """All of a forecast but the lengths of requests, times ``factor``."""
    return replace(
        forecast,
        rate_rps=forecast.rate_rps * factor,
        mean_load=forecast.mean_load * factor,
        peak_load=forecast.peak_load * factor,
        peak_low=forecast.peak_low * factor,
        peak_high=forecast.peak_high * factor,
        peak_errors=forecast.peak_errors * factor,
    )


def further(forecast: Forecast, truth: Forecast, factor: float) -> Forecast:
    """``truth`` with its distance from ``forecast`` times ``factor``."""

    def pushed(
        expected: NDArray[np.float64], came: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return np.maximum(0.0, expected + factor * (came - expected))

    peak = pushed(forecast.peak_load, truth.peak_load)
    return replace(
        truth,
        rate_rps=pushed(forecast.rate_rps, truth.rate_rps),
        mean_load=pushed(forecast.mean_load, truth.mean_load),
        peak_load=peak,
        peak_low=peak,
        peak_high=peak,
    )


def _problem(
    problems: Problems, world: _World, index: int, before: Placement
) -> Problem:
    return problems.at(index, before, world.forecast(index), world.fleet)


def _solved(
    problems: Problems, world: _World, pool: SolverPool
) -> tuple[tuple[Placement, ...], float]:
    """Placements of all epochs for this world, and the sum of their bounds."""
    placements: list[Placement] = []
    before, bound = Placement(), 0.0
    for index in range(problems.count):
        problem = _problem(problems, world, index, before)
        solved = pool.solve(problem, start=(before,))
        if solved.schedule is None:
            raise NoPlan(index, solved.report, problem)
        before = solved.schedule[0]
        placements.append(before)
        bound += solved.report.bound
    return tuple(placements), bound


def _split(
    problems: Problems, world: _World, placements: Sequence[Placement]
) -> tuple[tuple[Placement, ...], float]:
    """The placements with the world's traffic split best, and what they cost."""
    before, total, found = Placement(), 0.0, []
    for index, placement in enumerate(placements):
        problem = _problem(problems, world, index, before)
        found.append(with_shares(problem, 0, placement))
        total += referee.cost(problem, found[-1:]).total
        before = placement
    return tuple(found), total
