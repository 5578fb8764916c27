"""From intent to plan: trace and scenario -> forecast -> problem -> plan, epoch by epoch.

The plan of an epoch is made from what was known before it started: the forecaster sees
the history and the trace up to the epoch's start, never more, unless the ``perfect``
forecast is asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve import __version__
from foreserve.models import referee
from foreserve.models.cost import PerfModel, Roofline, capacity, cold_loss_s
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.plan import Certificate, Epoch, LlmDemand, Plan, SolverInfo
from foreserve.models.problem import (
    Fleet,
    Problem,
    ReplicaOption,
    ServedLlm,
    round_rate,
)
from foreserve.models.specs import ClusterSpec, GpuType
from foreserve.planner.scenario import LlmPart, Scenario
from foreserve.solvers.base import SolveOptions, SolverPool, SolveReport
from foreserve.traces.forecast import Forecast, get_forecaster
from foreserve.traces.scenarios import independent_scenarios
from foreserve.traces.trace import Demand, Trace, bin_demand

TYPICAL_BATCH = 8
"""Batch at which a request's time in flight is estimated when load is counted."""
PEAK_HIGH = 0.95
"""`LlmDemand.peak_high`: this quantile of the planned-for peaks."""

Lengths = Mapping[str, tuple[float, float]]
"""LLM -> mean input and output tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and how each of its epochs was solved."""

    plan: Plan
    solves: tuple[SolveReport, ...]


class NoPlan(Exception):
    """A solve ended without a plan: an outcome for the command line to report."""

    def __init__(self, epoch: int, report: SolveReport) -> None:
        super().__init__(f"epoch {epoch}: {report.status} {report.message}".strip())
        self.epoch, self.report = epoch, report


def align(trace: Trace, scenario: Scenario) -> Trace:
    """The trace with its LLMs in the scenario's order; unknown ones are an error."""
    names = tuple(llm.name for llm in scenario.models)
    present = [trace.llms[i] for i in np.unique(trace.llm)]
    for name in present:
        if name not in names:
            raise InvalidInput(
                f"the trace asks for LLM {name!r}, the scenario does not serve it",
                field="llm",
                hint=f"add it under models; it serves {', '.join(names)}",
            )
    index = {name: i for i, name in enumerate(names)}
    order = np.array([index.get(name, -1) for name in trace.llms], dtype=np.int32)
    return replace(trace, llm=order[trace.llm], llms=names)


def mean_lengths(scenario: Scenario, trace: Trace, history: Demand | None) -> Lengths:
    """Mean lengths per LLM: as stated, else from the history, else from the trace."""
    lengths = {}
    for index, llm in enumerate(scenario.models):
        tokens = []
        for stated, column in (
            (llm.input_tokens, "input_tokens"),
            (llm.output_tokens, "output_tokens"),
        ):
            mean = stated
            if mean is None and history is not None:
                mean = _history_mean(history, llm.name, column)
            if mean is None:
                of_llm = getattr(trace, column)[trace.llm == index]
                mean = float(of_llm.mean()) if len(of_llm) else None
            if mean is None:
                raise InvalidInput(
                    f"no requests of {llm.name!r} to take its {column} from",
                    field=f"models.{index}.{column}",
                    hint=f"state {column} in the scenario",
                )
            tokens.append(mean)
        lengths[llm.name] = (tokens[0], tokens[1])
    return lengths


def _history_mean(history: Demand, llm: str, column: str) -> float | None:
    if llm not in history.llms:
        return None
    row = history.llms.index(llm)
    weight = history.rate_rps[row]
    if weight.sum() <= 0:
        return None
    return float(np.average(getattr(history, column)[row], weights=weight))


def build_fleet(
    scenario: Scenario, lengths: Lengths, perf: PerfModel | None = None
) -> Fleet:
    """What can run where: one option per (LLM, GPU type, TP) that holds its SLO."""
    perf = perf or Roofline()
    cluster = scenario.cluster.cluster()
    options = [
        option
        for llm in scenario.models
        for option in _options(scenario, llm, cluster, lengths[llm.name], perf)
    ]
    served = []
    for llm in scenario.models:
        own = [option for option in options if option.llm == llm.name]
        if not own:
            raise InvalidInput(_why_nowhere(scenario, llm, cluster))
        unit = min(option.concurrency for option in own)
        exec_s = min(option.exec_s for option in own)
        # A cold start is priced at the quickest one the operator allows.
        cold_s = min(option.load_s + option.activate_s for option in own)
        slowest_s = max(option.exec_s for option in own)
        served.append(
            ServedLlm(
                name=llm.name,
                weight=llm.weight,
                slo=(llm.slo or scenario.slo).slo(),
                # Refusing a request must never look better than serving it slowly.
                unserved_s=max(scenario.objective.unserved, 2 * slowest_s),
                cold_loss_s=cold_loss_s(unit, cold_s, exec_s),
                instance_concurrency=unit,
                min_active=llm.min_active,
                max_replicas=llm.max_replicas,
                nodes=llm.nodes,
            )
        )
    return Fleet(cluster=cluster, llms=tuple(served), options=tuple(options))


def _options(
    scenario: Scenario,
    llm: LlmPart,
    cluster: ClusterSpec,
    lengths: tuple[float, float],
    perf: PerfModel,
) -> Iterator[ReplicaOption]:
    spec, (input_tokens, output_tokens) = llm.model_spec(), lengths
    storage = _storage_bytes_per_s(scenario, cluster)
    for gpu in cluster.gpu_types:
        largest = max(node.gpus for node in cluster.nodes if node.gpu == gpu.name)
        for tp in (tp for tp in spec.tp if tp <= largest):
            resident = spec.weight_bytes_per_gpu(tp) + scenario.runtime.residue
            free = _usable_bytes(cluster, gpu) - resident
            per_token = spec.kv_bytes_per_token_per_gpu(tp)
            time = perf.iteration(spec, gpu, tp)
            held = capacity(
                time,
                (llm.slo or scenario.slo).slo(),
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                kv_tokens=free / per_token,
                max_num_seqs=scenario.runtime.max_num_seqs,
            )
            if held is None:
                continue
            kv_tokens = held.concurrency * (input_tokens + output_tokens)
            # One request of the longest allowed context must fit, memory permitting.
            kv_tokens = max(kv_tokens, min(spec.max_context_tokens, 16_384))
            yield ReplicaOption(
                llm=llm.name,
                gpu_type=gpu.name,
                tp=tp,
                resident_bytes=resident,
                kv_bytes=min(free, math.ceil(kv_tokens * per_token)),
                kv_token_bytes=per_token,
                concurrency=held.concurrency,
                rate_rps=round_rate(held.rate_rps * scenario.runtime.max_load),
                exec_s=time.isolated_s(input_tokens, output_tokens),
                load_s=perf.load_s(spec, gpu, tp, storage),
                activate_s=perf.activate_s(spec, gpu, tp),
                ttft_s=held.ttft_s,
                tpot_s=held.tpot_s,
                time=time,
            )


def _usable_bytes(cluster: ClusterSpec, gpu: GpuType) -> int:
    return int(gpu.memory_bytes * cluster.usable_fraction)


def _storage_bytes_per_s(scenario: Scenario, cluster: ClusterSpec) -> float | None:
    """None where every node can pin all weights in host memory, else storage's rate."""
    weights = sum(llm.model_spec().weight_bytes for llm in scenario.models)
    if all(weights <= node.host_ram_bytes for node in cluster.nodes):
        return None
    return min(node.storage_bytes_per_s for node in cluster.nodes)


def _why_nowhere(scenario: Scenario, llm: LlmPart, cluster: ClusterSpec) -> str:
    spec = llm.model_spec()
    gpu = max(cluster.gpu_types, key=lambda gpu: gpu.memory_bytes)
    tp = max(spec.tp)
    need_gib = (spec.weight_bytes_per_gpu(tp) + scenario.runtime.residue) / 2**30
    have_gib = _usable_bytes(cluster, gpu) / 2**30
    slo = (llm.slo or scenario.slo).slo()
    return (
        f"{llm.name!r} fits nowhere: at TP {tp} it needs {need_gib:.1f} GiB per GPU "
        f"beside its KV cache, {gpu.name} has {have_gib:.1f} GiB usable, and one request "
        f"must meet TTFT {slo.ttft_s} s and TPOT {slo.tpot_s} s"
    )


def busy_s(fleet: Fleet, trace: Trace) -> NDArray[np.float64]:
    """Estimated time in flight of each request: [request], seconds."""
    seconds = np.zeros(len(trace))
    for index, name in enumerate(trace.llms):
        time = min(
            (o for o in fleet.options if o.llm == name), key=lambda o: (o.tp, o.exec_s)
        ).time
        mask = trace.llm == index
        tokens = trace.input_tokens[mask].astype(np.float64)
        output = trace.output_tokens[mask].astype(np.float64)
        context = TYPICAL_BATCH * (tokens + output / 2)
        step_s = (
            time.decode_base_s
            + time.decode_s_per_seq * TYPICAL_BATCH
            + time.decode_s_per_context_token * context
        )
        prefill_s = (
            time.prefill_base_s
            + time.prefill_s_per_token * tokens
            + time.prefill_s_per_token2 * tokens**2
        )
        seconds[mask] = prefill_s + output * step_s
    return seconds


def build_problem(
    scenario: Scenario,
    fleet: Fleet,
    forecast: Forecast,
    before: Placement,
    rng: np.random.Generator,
) -> Problem:
    """The problem of the next epochs, from their forecast and what is resident now."""
    peaks = independent_scenarios(forecast, scenario.forecast.scenarios, rng)
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
) -> Planned:
    """Plan every epoch of the trace's span, each from its own past.

    ``progress(done, epochs)`` is called after each epoch. Raises `NoPlan` when an epoch
    ends without a feasible placement.
    """
    solver = solver or scenario.solver.name
    options = options or solve_options(scenario)
    trace = align(trace, scenario)
    fleet = build_fleet(scenario, mean_lengths(scenario, trace, history), perf)
    demand = bin_demand(trace, epoch_s=scenario.epoch, busy_s=busy_s(fleet, trace))
    past_epochs = 0
    if history is not None:
        history = history.select(demand.llms)
        _check_history(history, scenario)
        past_epochs = history.num_epochs
        demand = history.concat(demand)
    perfect = scenario.forecast.method == "perfect"
    forecaster = None if perfect else get_forecaster(scenario.forecast.method)
    rng = np.random.default_rng(options.seed)
    epochs: list[Epoch] = []
    solves: list[SolveReport] = []
    before, total = Placement(), demand.num_epochs - past_epochs
    with SolverPool(solver, options) as pool:
        for index in range(total):
            now = past_epochs + index
            if forecaster is None:
                forecast = Forecast.of(demand, now)
            else:
                forecast = forecaster(demand.upto(now), 1)
            problem = build_problem(scenario, fleet, forecast, before, rng)
            solved = pool.solve(problem)
            if solved.schedule is None:
                raise NoPlan(index, solved.report)
            before = solved.schedule[0]
            start_s = index * scenario.epoch
            epochs.append(
                Epoch(
                    start_s=start_s,
                    end_s=start_s + scenario.epoch,
                    placement=before,
                    demand=_demand_rows(problem, forecast),
                    certificate=certify(problem, solved.schedule, solved.report),
                )
            )
            solves.append(solved.report)
            if progress is not None:
                progress(index + 1, total)
    info = SolverInfo(
        name=solves[-1].solver,
        version=solves[-1].version,
        seed=options.seed,
        threads=options.threads,
        time_limit_s=options.time_limit_s,
        gap=options.gap,
    )
    plan = Plan(
        foreserve_version=__version__,
        fleet=fleet,
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


def _demand_rows(problem: Problem, forecast: Forecast) -> tuple[LlmDemand, ...]:
    return tuple(
        LlmDemand(
            llm=llm.name,
            rate_rps=float(forecast.rate_rps[i, 0]),
            mean_load=float(forecast.mean_load[i, 0]),
            peak_load=float(forecast.peak_load[i, 0]),
            peak_high=float(
                np.quantile([rows[i][0] for rows in problem.peak_load], PEAK_HIGH)
            ),
        )
        for i, llm in enumerate(problem.fleet.llms)
    )


def _check_history(history: Demand, scenario: Scenario) -> None:
    if not math.isclose(history.epoch_s, scenario.epoch):
        raise InvalidInput(
            f"the history has epochs of {history.epoch_s:g} s, the scenario of "
            f"{scenario.epoch:g} s",
            field="forecast.history",
            hint=f"set epoch: {history.epoch_s:g}s, or bin the history again",
        )
