"""Problems drawn at random, and problems of real traces, with moments held back.

Both give a problem and the same problem with other moments of the same distribution: a
plan made for the first is judged by the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from foreserve.cli.common import read_history, read_scenario, read_traces
from foreserve.models.cost import IterationTime
from foreserve.models.placement import Placement
from foreserve.models.problem import (
    Fleet,
    Prices,
    Problem,
    ReplicaOption,
    ServedLlm,
    round_rate,
)
from foreserve.models.specs import ClusterSpec, GpuType, Node
from foreserve.planner.fleet import align, build_fleet, busy_s, request_lengths
from foreserve.planner.pipeline import build_problem
from foreserve.solvers.base import get_solver
from foreserve.solvers.result import SolveOptions
from foreserve.traces.forecast import Outlook, get_rule
from foreserve.traces.trace import bin_demand

GIB = 2**30
USABLE_GIB = 72
SIZES = (
    # billions of parameters, least TP, seconds of a mean request alone, KV GiB, chance
    (3, 1, 1.0, 4, 0.2),
    (8, 1, 2.0, 8, 0.35),
    (14, 1, 3.5, 20, 0.2),
    (32, 2, 5.0, 20, 0.15),
    (70, 4, 6.0, 30, 0.1),
)
UNIT = 32
"""Requests in flight that count as one instance."""


def draw(
    rng: np.random.Generator,
    llms: int,
    nodes: Sequence[int],
    scenarios: int,
    *,
    busy: float = 0.4,
    steady: int | None = None,
    asked: float = 0.4,
    correlation: float = 0.0,
    fresh: int = 0,
) -> tuple[Problem, Problem | None]:
    """LLMs of 3 to 70 billion parameters on GPUs with 72 GiB, from an empty cluster.

    The first ``steady`` LLMs (None: half of them) have a steady demand, ``busy`` of the
    GPUs in all (of the others' peaks nothing), and peaks of one to five times their mean
    load; the rest is ``asked`` for in that share of the moments. ``correlation`` c of the
    Normal numbers behind all peaks: a factor that all share, with weight sqrt(|c|); where
    c < 0 it counts for every other LLM with the opposite sign, so that half of them burst
    when the others do not. The second problem has ``fresh`` other moments; None if 0.
    """
    served, options, demand, mean = [], [], [], np.zeros(llms)
    share = rng.dirichlet(np.ones(llms)) * busy * sum(nodes)
    share[llms // 2 if steady is None else steady :] = 0.0
    for i in range(llms):
        name = f"llm{i:03d}"
        kind = rng.choice(len(SIZES), p=[size[4] for size in SIZES])
        billions, least_tp, exec_s, kv_gib, _ = SIZES[kind]
        own = [
            _option(name, tp, billions, tp // least_tp, exec_s, kv_gib)
            for tp in (1, 2, 4, 8)
            if least_tp <= tp <= min(max(nodes), 4 * least_tp)
        ]
        options += own
        rate_rps = round_rate(share[i] / least_tp * own[0].rate_rps)
        demand.append((rate_rps,))
        mean[i] = rate_rps * 3 * exec_s
        served.append(
            ServedLlm(
                name=name,
                weight=float(rng.choice([1.0, 2.0])),
                cold_loss_s=round(16 * (1 + 10 / exec_s) * billions / 5, 3),
                instance_concurrency=UNIT,
            )
        )
    problem = Problem(
        fleet=Fleet(
            cluster=_cluster(nodes), llms=tuple(served), options=tuple(options)
        ),
        epoch_s=300.0,
        prices=Prices(usd_s=0.1, load_s=0.05, demote_s=0.05, slower_s=0.01),
        demand_rps=tuple(demand),
    )
    peaks = _peaks(rng, mean, scenarios + fresh, correlation, asked)
    first = _with_peaks(problem, peaks[:scenarios])
    return first, _with_peaks(problem, peaks[scenarios:]) if fresh else None


def _peaks(
    rng: np.random.Generator,
    mean: NDArray[np.float64],
    count: int,
    c: float,
    often: float,
) -> NDArray[np.float64]:
    """[moment, llm] requests in flight; see `draw`."""
    llms = len(mean)
    sign = np.where((np.arange(llms) % 2 == 1) & (c < 0), -1.0, 1.0)
    together = rng.normal(size=(count, 1)) * sign
    alone = rng.normal(size=(count, llms))
    z = sqrt(abs(c)) * together + sqrt(1 - abs(c)) * alone
    bursts = mean * np.clip(np.exp(0.5 + 0.6 * z), 1, 5)
    level = np.vectorize(lambda x: 0.5 * (1 + erf(x / sqrt(2))))(z)
    idle = 1 - often
    asked = np.where(level > idle, 1 + 49 * (level - idle) / often, 0.0)
    return np.round(np.where(mean > 0, bursts, asked), 3)


def _with_peaks(problem: Problem, peaks: NDArray[np.float64]) -> Problem:
    count = len(peaks)
    return replace(
        problem,
        scenario_probability=(1 / count,) * count,
        peak_load=tuple(tuple((float(v),) for v in row) for row in peaks),
    )


def pressure(problem: Problem) -> float:
    """Weights of every LLM at its least TP, over the usable memory of all GPUs."""
    fleet = problem.fleet
    weights = sum(
        min(
            (o.tp, o.tp * o.resident_bytes) for o in fleet.options if o.llm == llm.name
        )[1]
        for llm in fleet.llms
    )
    return weights / sum(map(fleet.cluster.usable_bytes, fleet.cluster.gpus))


def of_trace(
    sample: str, at: Sequence[int], *, scenarios: int, fresh: int, nodes: int
) -> Iterator[tuple[Problem, Problem]]:
    """Problems of some epochs of a shipped sample on ``nodes`` of its nodes.

    What is resident before an epoch is what greedy planned, epoch by epoch from an empty
    cluster; a greedy plan of each epoch up to the last of ``at`` is made. Forecasts are
    the scenario's, from what was known before the epoch.
    """
    scenario = read_scenario(f"sample:{sample}")
    trace = read_traces([f"sample:{sample}"], {})
    history = read_history(scenario, {})
    (node,) = scenario.cluster.nodes
    scenario = replace(
        scenario,
        cluster=replace(scenario.cluster, nodes=(replace(node, count=nodes),)),
        forecast=replace(scenario.forecast, scenarios=scenarios),
    )
    more = replace(scenario, forecast=replace(scenario.forecast, scenarios=fresh))
    trace = align(trace, tuple(llm.name for llm in scenario.models))
    fleet = build_fleet(scenario, request_lengths(scenario, trace, history))
    demand = bin_demand(trace, epoch_s=scenario.epoch, busy_s=busy_s(fleet, trace))
    past = 0
    if history is not None:
        factor = round(scenario.epoch / history.epoch_s)
        history = history.coarser(factor).select(demand.llms)
        past, demand = history.num_epochs, history.then(demand)
    outlook = Outlook(get_rule(scenario.forecast.method), demand, 1)
    greedy, before = get_solver("greedy"), Placement()
    for epoch in range(max(at) + 1):
        forecast = outlook.after(past + epoch)
        rng, other = np.random.default_rng(0), np.random.default_rng(10_000 + epoch)
        problem = build_problem(scenario, fleet, forecast, before, rng)
        if epoch in at:
            yield problem, build_problem(more, fleet, forecast, before, other)
        schedule = greedy(problem, SolveOptions()).schedule
        if schedule is None:
            raise ValueError(f"no plan for epoch {epoch} of {sample}")
        before = schedule[0]


def _option(
    name: str, tp: int, billions: int, times: int, exec_s: float, kv_gib: int
) -> ReplicaOption:
    """``times``: how many times the least TP."""
    alone_s = round(exec_s / times**0.7, 4)
    return ReplicaOption(
        llm=name,
        gpu_type="g",
        tp=tp,
        resident_bytes=int((billions * 1.9 / tp + 0.5) * GIB),
        kv_bytes=int(kv_gib / times * GIB),
        kv_token_bytes=1,
        concurrency=min(64, UNIT * times),
        rate_rps=round_rate(0.7 * UNIT / (3 * exec_s) * times**0.8),
        exec_s=alone_s,
        load_s=round(billions * 2 / tp / 50, 4),
        activate_s=0.05,
        ttft_s=0.1,
        tpot_s=round(alone_s / 300, 6),
        time=IterationTime(
            prefill_base_s=0.01,
            prefill_s_per_token=1e-5,
            prefill_s_per_token2=0.0,
            decode_base_s=round(alone_s / 300, 6),
            decode_s_per_seq=1e-4,
            decode_s_per_context_token=0.0,
            relative_error=0.4,
            source="made up",
        ),
    )


def _cluster(nodes: Sequence[int]) -> ClusterSpec:
    gpu = GpuType(
        name="g",
        memory_bytes=USABLE_GIB * GIB,
        hbm_bytes_per_s=2e12,
        bf16_flop_per_s=3e14,
        gpu_link_bytes_per_s=3e11,
        host_link_bytes_per_s=5e10,
        price_usd_per_h=3.0,
    )
    return ClusterSpec(
        nodes=tuple(
            Node(name=f"n{i}", gpu="g", gpus=count, host_ram_bytes=2 * 2**40)
            for i, count in enumerate(nodes)
        ),
        gpu_types=(gpu,),
        usable_fraction=1.0,
    )
