"""How many GPUs, of which type, a trace needs: the least cluster whose simulated run meets
every LLM's SLO, beside the bound of a perfect system.

A size is tried for real: planned epoch by epoch and simulated. Sizes double until one is
enough, then the interval to the last that was not is halved. That attainment grows with the
cluster is assumed; every size that was tried is listed, so that one can see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Run
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet
from foreserve.planner.scenario import NodeSpec, Scenario
from foreserve.traces.trace import Trace

HOURS_PER_MONTH = 730.0
FEW_REQUESTS = 100
"""An LLM with fewer cannot show 99 %: it counts in the total only."""


BINDING = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Requests of one LLM in one epoch that missed their SLO."""

    llm: str
    epoch: int
    missed: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One size, planned and simulated."""

    gpu: str
    gpus: int
    usd_per_h: float
    attainment: float
    """Of the LLM that has the least."""
    worst_llm: str
    total_attainment: float
    ttft_p99_s: float
    busy_gpus: float
    """Mean number that hold anything."""
    passed: bool
    why_not: str = ""
    """Where there is no plan at all."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """GPUs by type, where types are mixed."""
    by_llm: Mapping[str, float] = field(default_factory=dict)
    """Attainment of each LLM that got requests."""
    binding: tuple[Binding, ...] = ()
    """Where most requests missed their SLO, up to `BINDING` places."""

    @property
    def usd_per_month(self) -> float:
        return self.usd_per_h * HOURS_PER_MONTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The answer for one GPU type, or for a mixture of types."""

    gpu: str
    answer: Trial | None
    """The smallest that was enough; None: not even the largest allowed."""
    trials: tuple[Trial, ...]
    """All that were tried, by size."""
    bound_gpus: float
    """Rate over the best rate per GPU, summed over LLMs, in the busiest epoch: what a
    system without integrality, packing, bursts, headroom or switching would need."""
    mean_gpus: float
    """The same, mean over the epochs."""
    bound_usd_per_h: float
    """Price of the perfect system, each request on the type that is cheapest for it."""
    drivers: tuple[tuple[str, float], ...]
    """LLMs by their GPUs in the epoch of the answer's plan that holds most, most first."""
    undecided: int = 0
    """Cheaper mixtures that were neither tried nor ruled out."""


def resized(scenario: Scenario, gpu: str, gpus: int, per_node: int) -> Scenario:
    """``scenario`` on ``gpus`` GPUs of one type: nodes of ``per_node``, and one smaller
    node for the rest. All else is its first node's."""
    first = scenario.cluster.nodes[0]
    full, rest = divmod(gpus, per_node)
    nodes: list[NodeSpec] = []
    if full:
        nodes.append(replace(first, name="n", gpu=gpu, gpus=per_node, count=full))
    if rest:
        nodes.append(replace(first, name="rest", gpu=gpu, gpus=rest, count=1))
    return replace(scenario, cluster=replace(scenario.cluster, nodes=tuple(nodes)))


def mixed(scenario: Scenario, counts: Mapping[str, int], per_node: int) -> Scenario:
    """As `resized`, with nodes of several types beside each other."""
    nodes: list[NodeSpec] = []
    for gpu, gpus in counts.items():
        own = resized(scenario, gpu, gpus, per_node).cluster.nodes
        nodes += (replace(node, name=f"{gpu}-{node.name}") for node in own)
    return replace(scenario, cluster=replace(scenario.cluster, nodes=tuple(nodes)))


def epoch_rates(trace: Trace, epoch_s: float) -> NDArray[np.float64]:
    """[llm, epoch] requests per second."""
    epoch = (trace.arrival_s // epoch_s).astype(np.int64)
    requests = np.zeros((len(trace.llms), int(epoch.max(initial=0)) + 1))
    np.add.at(requests, (trace.llm, epoch), 1.0)
    return requests / epoch_s


def perfect_gpus(
    fleet: Fleet, trace: Trace, epoch_s: float, max_load: float
) -> tuple[float, float]:
    """GPUs of a perfect system for the true rates: in the busiest epoch, and on average.
    ``trace`` has the fleet's LLMs in their order."""
    per_gpu = [
        max(o.rate_rps / o.tp for o in fleet.options if o.llm == llm.name) / max_load
        for llm in fleet.llms
    ]
    gpus = (epoch_rates(trace, epoch_s) / np.array(per_gpu)[:, None]).sum(axis=0)
    return float(gpus.max()), float(gpus.mean())


def judge(
    counts: Mapping[str, int], usd_per_h: float, run: Run, fleet: Fleet, target: float
) -> Trial:
    """Whether a simulated run is good enough."""
    outcome = run.outcome
    counted = {
        name: service.slo_attainment
        for name, service in outcome.by_llm.items()
        if service.requests >= FEW_REQUESTS
    }
    counted = counted or {"all": outcome.total.slo_attainment}
    worst = min(counted, key=counted.__getitem__)
    span_h = (outcome.end_s - outcome.start_s) / 3600
    return Trial(
        gpu=" + ".join(counts),
        gpus=sum(counts.values()),
        counts=dict(counts),
        usd_per_h=usd_per_h,
        attainment=counted[worst],
        worst_llm=worst,
        total_attainment=outcome.total.slo_attainment,
        ttft_p99_s=outcome.total.ttft.p99_s,
        busy_gpus=outcome.gpu_hours["total"] / span_h,
        passed=min(counted[worst], outcome.total.slo_attainment) >= target,
        by_llm={
            name: service.slo_attainment
            for name, service in outcome.by_llm.items()
            if service.requests
        },
        binding=binding(run, fleet),
    )


def binding(run: Run, fleet: Fleet) -> tuple[Binding, ...]:
    """LLMs and epochs (the run's bins) with most misses, by arrival, most first."""
    slo = np.array([(llm.slo.ttft_s, llm.slo.tpot_s) for llm in fleet.llms])[run.llm]
    gaps = np.where(run.output_tokens > 1, run.output_tokens - 1, np.nan)
    tpot_s = (run.finish_s - run.first_token_s) / gaps
    kept = ~np.isnan(run.finish_s) & (run.ttft_s <= slo[:, 0]) & ~(tpot_s > slo[:, 1])
    start_s = run.outcome.start_s
    epoch = ((run.arrival_s - start_s) // run.load_bin_s).astype(np.int64)
    shape = len(run.llms), int(epoch.max(initial=0)) + 1
    asked, missed = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    np.add.at(asked, (run.llm, epoch), 1)
    np.add.at(missed, (run.llm[~kept], epoch[~kept]), 1)
    order = np.argsort(-missed, axis=None, kind="stable")[:BINDING]
    places = zip(*np.unravel_index(order, shape), strict=True)
    return tuple(
        Binding(
            llm=run.llms[m],
            epoch=int(t),
            missed=int(missed[m, t]),
            requests=int(asked[m, t]),
        )
        for m, t in places
        if missed[m, t]
    )


def search(
    attempt: Callable[[int], Trial], *, least: int, most: int, step: int = 1
) -> tuple[Trial, ...]:
    """Trials by size, from ``least`` to ``most`` at multiples of ``step``: doubling until
    one passes, then halving. O(log(most / least)) attempts."""
    if most < least:
        raise InvalidInput(
            f"at most {most} GPUs, but a perfect system needs {least} for the mean rate",
            hint="raise --most",
        )
    low, high = math.ceil(least / step), most // step
    found: dict[int, Trial] = {}

    def passes(units: int) -> bool:
        if units not in found:
            found[units] = attempt(units * step)
        return found[units].passed

    failed, units = low - 1, min(low, high)
    while not passes(units) and units < high:
        failed, units = units, min(2 * units, high)
    while found[units].passed and units - failed > 1:
        middle = (units + failed) // 2
        if passes(middle):
            units = middle
        else:
            failed = middle
    return tuple(found[units] for units in sorted(found))


def smallest(trials: Sequence[Trial]) -> Trial | None:
    """The smallest above which everything that was tried was enough, too."""
    answer = None
    for trial in sorted(trials, key=lambda t: t.gpus, reverse=True):
        if not trial.passed:
            break
        answer = trial
    return answer


def drivers(plan: Plan) -> tuple[tuple[str, float], ...]:
    """GPUs by LLM in the epoch that holds most; a GPU's LLMs share it equally."""
    busiest = max(plan.epochs, key=lambda epoch: len(epoch.placement.by_gpu))
    held: dict[str, float] = {}
    for replicas in busiest.placement.by_gpu.values():
        for replica in replicas:
            held[replica.llm] = held.get(replica.llm, 0.0) + 1 / len(replicas)
    return tuple(sorted(held.items(), key=lambda item: -item[1]))
