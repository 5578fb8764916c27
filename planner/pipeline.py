"""From intent to plan: trace and scenario -> forecast -> problem -> plan, epoch by epoch.

The plan of an epoch is made from what was known before it started: the forecaster sees
the history and the trace up to the epoch's start, never more, unless the ``perfect``
forecast is asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve import __version__
from foreserve.models import referee
from foreserve.models.capacity import cold_loss_s
from foreserve.models.cost import PerfModel
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.plan import Certificate, Epoch, LlmDemand, Plan, SolverInfo
from foreserve.models.problem import Fleet, Problem, round_rate
from foreserve.models.transitions import transition_to
from foreserve.planner.fleet import align, build_fleet, busy_s, request_lengths
from foreserve.planner.rolling import Rolling
from foreserve.planner.scenario import Scenario
from foreserve.solvers.result import SolveOptions, SolveReport
from foreserve.traces.forecast import Forecast, Outlook, get_rule
from foreserve.traces.scenarios import joint_scenarios
from foreserve.traces.trace import Demand, Trace, bin_demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and how each of its epochs was solved."""

    plan: Plan
    solves: tuple[SolveReport, ...]


class NoPlan(Exception):
    """A solve ended without a plan: an outcome for the command line to report."""

    def __init__(self, epoch: int, report: SolveReport, problem: Problem) -> None:
        super().__init__(f"epoch {epoch}: {report.status} {report.message}".strip())
        self.epoch, self.report, self.problem = epoch, report, problem


def build_problem(
    scenario: Scenario,
    fleet: Fleet,
    forecast: Forecast,
    before: Placement,
    rng: np.random.Generator,
) -> Problem:
    """The problem of the next epochs, from their forecast and what is resident now."""
    peaks = joint_scenarios(forecast, scenario.forecast.scenarios, rng)
    fleet = price_bursts(scenario, fleet, forecast, peaks)
    steady = forecast.mean_load >= scenario.forecast.occasional_load
    rates = np.where(steady, forecast.rate_rps, 0.0)
    count = len(peaks)
    return Problem(
        fleet=fleet,
        epoch_s=scenario.epoch,
        demand_rps=tuple(tuple(round_rate(float(v)) for v in row) for row in rates),
        scenario_probability=(1 / count,) * count,
        peak_load=tuple(
            tuple(tuple(float(v) for v in row) for row in rows) for rows in peaks
        ),
        initial=before,
        prices=scenario.objective.prices(),
    )


def price_bursts(
    scenario: Scenario,
    fleet: Fleet,
    forecast: Forecast,
    peaks: NDArray[np.float64],
) -> Fleet:
    """The fleet with loss_m of (O2) as it is in this epoch.

    A scenario is one moment; an epoch has as many moments of danger as requests arrive
    that find their LLM idle for longer than a replica is kept alive without work. Each
    costs a cold start to the requests of one burst. The number is divided by the share of
    scenarios that show the LLM busy, so that the expectation over them comes out right.
    """
    llms = []
    for index, llm in enumerate(fleet.llms):
        rate_rps = float(forecast.rate_rps[index, 0])
        idle = math.exp(-rate_rps * scenario.runtime.keep_alive)
        idle *= math.exp(-float(forecast.mean_load[index, 0]))
        arrivals = rate_rps * scenario.epoch
        bursts = max(arrivals * idle, 1 - math.exp(-arrivals))
        shown = max(1, int(np.count_nonzero(peaks[:, index, 0]))) / len(peaks)
        own = [option for option in fleet.options if option.llm == llm.name]
        burst = max(2.0, float(forecast.peak_load[index, 0]))
        together = min(float(llm.instance_concurrency), burst)
        exec_s = min(option.exec_s for option in own)
        hosted_s = min(option.load_s + option.activate_s for option in own)
        stored_s = min(
            option.load_s + option.activate_s + fleet.least_storage_s(option)
            for option in own
        )
        loss_s = cold_loss_s(together, hosted_s, exec_s)
        storage_s = cold_loss_s(together, stored_s, exec_s)
        llms.append(
            replace(
                llm,
                cold_loss_s=float(bursts / shown * loss_s),
                storage_loss_s=float(bursts / shown * (storage_s - loss_s)),
            )
        )
    return replace(fleet, llms=tuple(llms))


class Problems:
    """The problems of a trace's epochs, each from what was known before it began."""

    def __init__(
        self,
        scenario: Scenario,
        trace: Trace,
        *,
        history: Demand | None = None,
        seed: int | None = None,
        perf: PerfModel | None = None,
        horizon: int = 1,
    ) -> None:
        """``horizon``: how many epochs `window` looks ahead."""
        trace = align(trace, tuple(llm.name for llm in scenario.models))
        lengths = request_lengths(scenario, trace, history)
        fleet = build_fleet(scenario, lengths, perf)
        busy = busy_s(fleet, trace)
        demand = bin_demand(trace, epoch_s=scenario.epoch, busy_s=busy)
        self._set(scenario, fleet, demand, history, seed, horizon)
        self.count = demand.num_epochs

    @classmethod
    def so_far(
        cls,
        scenario: Scenario,
        fleet: Fleet,
        demand: Demand,
        *,
        history: Demand | None = None,
        horizon: int = 1,
    ) -> Problems:
        """Those of the epochs that follow ``demand``, which ends with a whole one. Epochs
        are numbered from second 0; a ``history`` ends there, and is of no use where the
        first epochs of ``demand`` have been let go."""
        problems = cls.__new__(cls)
        demand = demand.select([llm.name for llm in scenario.models])
        first = round(demand.start_s / scenario.epoch)
        past = history if first == 0 else None
        problems._set(scenario, fleet, demand, past, None, horizon)
        problems._past -= first
        problems.count = first + demand.num_epochs + horizon
        return problems

    def _set(
        self,
        scenario: Scenario,
        fleet: Fleet,
        demand: Demand,
        history: Demand | None,
        seed: int | None,
        horizon: int,
    ) -> None:
        self.scenario, self.fleet, self.horizon = scenario, fleet, horizon
        self.seed = scenario.solver.seed if seed is None else seed
        self._past = 0
        if history is not None:
            history = fit_history(history, scenario).select(demand.llms)
            self._past = history.num_epochs
            demand = history.then(demand)
        self._demand = demand
        perfect = scenario.forecast.method == "perfect"
        rule = None if perfect else get_rule(scenario.forecast.method)
        self._outlook = None if rule is None else Outlook(rule, demand, 1)
        self._far = None
        if rule is not None and horizon > 1:
            self._far = Outlook(rule, demand, horizon)

    def forecast(self, index: int) -> Forecast:
        """Of epoch ``index``, as the scenario's method makes it."""
        if self._outlook is None:
            return self.truth(index)
        return self._outlook.after(self._past + index)

    def forecasts(self, index: int) -> list[Forecast]:
        """Of the epochs from ``index`` on, as far as the horizon and the trace go, all as
        known when the first begins; that one is `forecast`'s."""
        ahead = range(min(self.horizon, self.count - index))
        if self._outlook is None:
            return [self.truth(index + i) for i in ahead]
        if self._far is None:
            return [self.forecast(index)]
        far = self._far.after(self._past + index)
        return [far.only(i) if i else self.forecast(index) for i in ahead]

    def truth(self, index: int) -> Forecast:
        """Of epoch ``index``, as it came."""
        return Forecast.perfect(self._demand, self._past + index)

    def at(
        self,
        index: int,
        before: Placement,
        forecast: Forecast | None = None,
        fleet: Fleet | None = None,
    ) -> Problem:
        """The problem of epoch ``index`` with ``before`` resident.

        Another ``forecast`` or ``fleet`` may stand in. Common random numbers: epochs
        differ by their forecast, not by their luck.
        """
        rng = np.random.default_rng(self.seed)
        forecast = forecast or self.forecast(index)
        fleet = fleet or self.fleet
        return build_problem(self.scenario, fleet, forecast, before, rng)

    def window(self, index: int, before: Placement) -> list[Problem]:
        """The problems of epoch ``index`` and those after it, as far as the horizon goes,
        each with the forecast of now."""
        return [
            self.at(index + i, before, forecast)
            for i, forecast in enumerate(self.forecasts(index))
        ]


def plan_trace(
    scenario: Scenario,
    trace: Trace,
    *,
    history: Demand | None = None,
    inputs: Mapping[str, str] | None = None,
    solver: str | None = None,
    options: SolveOptions | None = None,
    perf: PerfModel | None = None,
    progress: Callable[[int, int], None] | None = None,
    inspect: Callable[[int, Problem], None] | None = None,
) -> Planned:
    """Plan every epoch of the trace's span, each from its own past.

    ``inspect(epoch, problem)`` is called before each epoch's solve, ``progress(done,
    epochs)`` after it. Raises `NoPlan` when an epoch ends without a feasible placement.
    """
    solver = solver or scenario.solver.name
    options = options or solve_options(scenario)
    horizon = scenario.solver.horizon
    problems = Problems(
        scenario, trace, history=history, seed=options.seed, perf=perf, horizon=horizon
    )
    epochs: list[Epoch] = []
    solves: list[SolveReport] = []
    before, total = Placement(), problems.count
    with Rolling(solver, options, horizon) as rolling:
        for index in range(total):
            window = problems.window(index, before)
            problem = window[0]
            if inspect is not None:
                inspect(index, problem)
            step = rolling.step(window, before)
            if step.schedule is None:
                raise NoPlan(index, step.report, problem)
            change = transition_to(problem, step.schedule[0])
            before = step.schedule[0]
            start_s = index * scenario.epoch
            epochs.append(
                Epoch(
                    start_s=start_s,
                    end_s=start_s + scenario.epoch,
                    placement=before,
                    demand=demand_rows(problem, problems.forecast(index)),
                    certificate=certify(problem, (before,), step.report),
                    transition=change,
                )
            )
            solves.append(step.report)
            if progress is not None:
                progress(index + 1, total)
    info = SolverInfo(
        name=solves[-1].solver,
        version=solves[-1].version,
        seed=options.seed,
        threads=options.threads,
        time_limit_s=options.time_limit_s,
        gap=options.gap,
        horizon=horizon,
    )
    plan = Plan(
        foreserve_version=__version__,
        fleet=problems.fleet,
        epochs=tuple(epochs),
        solver=info,
        forecaster=scenario.forecast.method,
        inputs=dict(inputs or {}),
    )
    return Planned(plan=plan, solves=tuple(solves))


def solve_options(scenario: Scenario) -> SolveOptions:
    """The scenario's limits as solver options."""
    part = scenario.solver
    return SolveOptions(
        time_limit_s=part.time_limit,
        gap=part.gap,
        seed=part.seed,
        threads=part.threads,
        lexicographic=part.lexicographic,
    )


def certify(
    problem: Problem, schedule: Sequence[Placement], report: SolveReport
) -> Certificate:
    """The referee's numbers for a schedule, beside the solver's bound."""
    bare = [
        Placement(replicas=tuple(r for r in p.replicas if r.state == "ACTIVE"))
        for p in schedule
    ]
    cost = referee.cost(problem, schedule)
    return Certificate(
        status=report.status,
        objective=cost.total,
        bound=min(report.bound, cost.total),
        terms=dict(cost.terms),
        without_warm=referee.cost(problem, bare).total,
    )


def demand_rows(problem: Problem, forecast: Forecast) -> tuple[LlmDemand, ...]:
    return tuple(
        LlmDemand(
            llm=llm.name,
            rate_rps=float(forecast.rate_rps[i, 0]),
            mean_load=float(forecast.mean_load[i, 0]),
            peak_load=float(forecast.peak_load[i, 0]),
            peak_high=float(max(forecast.mean_load[i, 0], forecast.peak_high[i, 0])),
        )
        for i, llm in enumerate(problem.fleet.llms)
    )


def fit_history(history: Demand, scenario: Scenario) -> Demand:
    """The history in the scenario's epochs, which may be longer than its own."""
    factor = round(scenario.epoch / history.epoch_s)
    if factor < 1 or not math.isclose(history.epoch_s * factor, scenario.epoch):
        raise InvalidInput(
            f"epochs of {scenario.epoch:g} s do not fit the history's of "
            f"{history.epoch_s:g} s",
            field="epoch",
            hint=f"use a multiple of {history.epoch_s:g}s",
        )
    return history.coarser(factor)
