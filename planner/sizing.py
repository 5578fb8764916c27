"""How many GPUs, of which type, a trace needs: the least cluster whose simulated run meets
every LLM's SLO, beside the bound of a perfect system.

A size is tried for real: planned epoch by epoch and simulated. Sizes double until one is
enough, then the interval to the last that was not is halved. That attainment grows with the
cluster is assumed; every size that was tried is listed, so that one can see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Outcome
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet
from foreserve.planner.scenario import NodeSpec, Scenario
from foreserve.planner.tables import Part
from foreserve.traces.trace import Trace

HOURS_PER_MONTH = 730.0
FEW_REQUESTS = 100
"""An LLM with fewer cannot show 99 %: it counts in the total only."""


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

    @property
    def usd_per_month(self) -> float:
        return self.usd_per_h * HOURS_PER_MONTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The answer for one GPU type."""

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
    drivers: tuple[tuple[str, float], ...]
    """LLMs by their GPUs in the epoch of the answer's plan that holds most, most first."""


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


def perfect_gpus(
    fleet: Fleet, trace: Trace, epoch_s: float, max_load: float
) -> tuple[float, float]:
    """GPUs of a perfect system for the true rates: in the busiest epoch, and on average.
    ``trace`` has the fleet's LLMs in their order."""
    per_gpu = [
        max(o.rate_rps / o.tp for o in fleet.options if o.llm == llm.name) / max_load
        for llm in fleet.llms
    ]
    epoch = (trace.arrival_s // epoch_s).astype(np.int64)
    requests = np.zeros((len(per_gpu), int(epoch.max(initial=0)) + 1))
    np.add.at(requests, (trace.llm, epoch), 1.0)
    gpus = (requests / epoch_s / np.array(per_gpu)[:, None]).sum(axis=0)
    return float(gpus.max()), float(gpus.mean())


def judge(
    gpu: str, gpus: int, usd_per_h: float, outcome: Outcome, target: float
) -> Trial:
    """Whether a simulated run is good enough."""
    counted = {
        name: service.slo_attainment
        for name, service in outcome.by_llm.items()
        if service.requests >= FEW_REQUESTS
    }
    counted = counted or {"all": outcome.total.slo_attainment}
    worst = min(counted, key=counted.__getitem__)
    span_h = (outcome.end_s - outcome.start_s) / 3600
    return Trial(
        gpu=gpu,
        gpus=gpus,
        usd_per_h=usd_per_h,
        attainment=counted[worst],
        worst_llm=worst,
        total_attainment=outcome.total.slo_attainment,
        ttft_p99_s=outcome.total.ttft.p99_s,
        busy_gpus=outcome.gpu_hours["total"] / span_h,
        passed=min(counted[worst], outcome.total.slo_attainment) >= target,
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


def parts(sizings: Sequence[Sizing], target: float) -> list[Part]:
    """The answer, then what was tried."""
    answers = [s.answer for s in sizings if s.answer is not None]
    best = min(answers, key=lambda t: t.usd_per_h, default=None)
    rows = [
        [
            s.gpu,
            str(s.answer.gpus) if s.answer else "-",
            f"{s.bound_gpus:.1f}",
            f"{s.answer.gpus / s.bound_gpus:.1f}x" if s.answer else "-",
            f"${s.answer.usd_per_h:,.2f}" if s.answer else "-",
            f"${s.answer.usd_per_month:,.0f}" if s.answer else "-",
            "least price" if s.answer is best and best and len(answers) > 1 else "",
        ]
        for s in sizings
    ]
    columns = [
        "GPU type",
        "GPUs",
        "perfect system",
        "ratio",
        "per hour",
        "per month",
        "",
    ]
    note = (
        f"every LLM (of at least {FEW_REQUESTS} requests) and the total within the SLO "
        f"for {target:.1%} of the requests, in simulation"
    )
    tried = [
        [
            t.gpu,
            str(t.gpus),
            "enough" if t.passed else "not enough",
            t.why_not or f"{t.attainment:.2%} ({t.worst_llm})",
            "-" if t.why_not else f"{t.total_attainment:.2%}",
            "-" if t.why_not else f"{t.ttft_p99_s:.2f} s",
            "-" if t.why_not else f"{t.busy_gpus:.1f}",
        ]
        for s in sizings
        for t in s.trials
    ]
    found = [Part("Least cluster", columns, rows, note)]
    found.append(
        Part(
            "Tried",
            ["GPU type", "GPUs", "", "worst LLM", "all", "P99 TTFT", "GPUs in use"],
            tried,
        )
    )
    if best is not None:
        held = next(s for s in sizings if s.answer is best).drivers
        found.append(
            Part(
                "What drives it: GPUs by LLM, busiest epoch",
                ["LLM", "GPUs"],
                [[name, f"{gpus:.1f}"] for name, gpus in held],
            )
        )
    return found


def plain(sizing: Sizing) -> Mapping[str, object]:
    """For ``--json``."""

    def row(trial: Trial) -> dict[str, object]:
        return asdict(trial) | {"usd_per_month": trial.usd_per_month}

    return {
        "gpu": sizing.gpu,
        "answer": None if sizing.answer is None else row(sizing.answer),
        "bound_gpus": sizing.bound_gpus,
        "mean_gpus": sizing.mean_gpus,
        "drivers": dict(sizing.drivers),
        "trials": [row(trial) for trial in sizing.trials],
    }
