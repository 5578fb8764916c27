"""A made-up day of many LLMs: a plan, how it was solved, and runs of it, for the report.

Loads swing over the day with bursts; a simple rule keeps what is ACTIVE where it is and
fills free memory with WARM replicas. Feasible by the referee, but nothing is optimised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.cost import IterationTime
from foreserve.models.gaps import GAP_BINS
from foreserve.models.outcome import (
    SCALES,
    Latency,
    Outcome,
    Ratios,
    Residency,
    Run,
    Service,
)
from foreserve.models.placement import Placement, Replica, ReplicaId
from foreserve.models.plan import (
    Certificate,
    Epoch,
    LlmDemand,
    Plan,
    SolverInfo,
    Status,
)
from foreserve.models.problem import Fleet, ReplicaOption, ServedLlm
from foreserve.models.specs import ClusterSpec, GpuId, GpuType, Node

GIB = 2**30
SIZES = (
    ("llama-3.1-8b", 16, (1, 2)),
    ("qwen2.5-7b", 15, (1, 2)),
    ("mistral-7b-v0.3", 14, (1, 2)),
    ("llama-2-13b", 26, (1, 2)),
    ("qwen2.5-14b", 29, (1, 2)),
    ("phi-4", 29, (1, 2)),
    ("qwen2.5-32b", 64, (2, 4)),
    ("qwen3-32b", 64, (2, 4)),
    ("llama-3.1-70b", 138, (4,)),
    ("mixtral-8x7b", 92, (2, 4)),
    ("qwen3-8b", 16, (1,)),
    ("deepseek-v2-lite", 31, (1, 2)),
)
"""(name, GiB of weights, TP sizes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    elapsed_s: float
    objective: float | None
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSolve:
    wall_s: float
    time_to_first_s: float | None
    progress: tuple[Moment, ...]
    stages: tuple[()] = ()


def made_up_fleet(num_llms: int = 12, nodes: int = 2, gpus: int = 4) -> Fleet:
    kind = GpuType(
        name="h100",
        memory_bytes=80 * GIB,
        hbm_bytes_per_s=3.35e12,
        bf16_flop_per_s=9.9e14,
        gpu_link_bytes_per_s=4.5e11,
        host_link_bytes_per_s=6.4e10,
        price_usd_per_h=4.0,
    )
    cluster = ClusterSpec(
        nodes=tuple(
            Node(name=f"n{i}", gpu="h100", gpus=gpus, host_ram_bytes=2048 * GIB)
            for i in range(nodes)
        ),
        gpu_types=(kind,),
        usable_fraction=0.9,
    )
    llms, options = [], []
    for index in range(num_llms):
        name, gib, sizes = SIZES[index % len(SIZES)]
        name = name if index < len(SIZES) else f"{name}-{index // len(SIZES)}"
        llms.append(ServedLlm(name=name, cold_loss_s=40.0))
        for tp in (tp for tp in sizes if tp <= gpus):
            shard = gib * GIB // tp
            decode_s = 0.002 + shard / 2.7e12
            options.append(
                ReplicaOption(
                    llm=name,
                    gpu_type="h100",
                    tp=tp,
                    resident_bytes=shard + GIB,
                    kv_bytes=min(24 * GIB, 70 * GIB - shard),
                    kv_token_bytes=131072 // tp,
                    concurrency=32 * tp,
                    rate_rps=round(8.0 * tp / (1 + gib / 40), 6),
                    exec_s=200 * decode_s,
                    load_s=0.8 + shard / 5.4e10,
                    activate_s=0.05,
                    ttft_s=0.08 + gib / 400 / tp,
                    tpot_s=1.8 * decode_s,
                    time=IterationTime(
                        prefill_base_s=0.01,
                        prefill_s_per_token=gib / tp * 4e-6,
                        prefill_s_per_token2=0.0,
                        decode_base_s=decode_s,
                        decode_s_per_seq=1e-5,
                        decode_s_per_context_token=1e-8,
                        relative_error=0.4,
                        source="roofline",
                    ),
                )
            )
    return Fleet(cluster=cluster, llms=tuple(llms), options=tuple(options))


def _placement(fleet: Fleet, rate: NDArray[np.float64], before: Placement) -> Placement:
    """Busiest first: ACTIVE where it was, else on the first free block; then WARM."""
    free = {g: fleet.cluster.usable_bytes(g) for g in fleet.cluster.gpus}
    busy: set[GpuId] = set()
    chosen: dict[ReplicaId, Replica] = {}
    by_llm: dict[str, list[tuple[ReplicaOption, tuple[GpuId, ...]]]] = {}
    for option, block in fleet.candidates():
        by_llm.setdefault(option.llm, []).append((option, block))

    def blocks(llm: str) -> list[tuple[ReplicaOption, tuple[GpuId, ...]]]:
        def key(pair: tuple[ReplicaOption, tuple[GpuId, ...]]) -> tuple[int, int]:
            old = before.by_id.get(ReplicaId(llm=llm, gpus=pair[1]))
            return (0 if old and old.state == "ACTIVE" else 1 if old else 2, pair[0].tp)

        return sorted(by_llm[llm], key=key)

    for index in np.argsort(-rate, kind="stable"):
        llm, left = fleet.llms[index].name, 1.0
        for option, block in blocks(llm):
            needed = option.resident_bytes + option.active_bytes
            if left <= 1e-9 or rate[index] < 0.25:
                break
            if busy.isdisjoint(block) and all(free[g] >= needed for g in block):
                share = min(left, option.rate_rps / rate[index])
                left -= share
                busy.update(block)
                for gpu in block:
                    free[gpu] -= needed
                replica = Replica(
                    llm=llm, gpus=block, state="ACTIVE", traffic_share=share
                )
                chosen[replica.id] = replica
    for index in np.argsort(-rate, kind="stable"):
        llm = fleet.llms[index].name
        taken = {g for r in chosen.values() if r.llm == llm for g in r.gpus}
        for option, block in blocks(llm):
            sets = [set(r.gpus) for r in chosen.values() if set(r.gpus) & set(block)]
            nested = all(s <= set(block) or s >= set(block) for s in sets)
            fits = all(free[g] >= option.resident_bytes for g in block)
            if nested and fits and taken.isdisjoint(block):
                for gpu in block:
                    free[gpu] -= option.resident_bytes
                replica = Replica(llm=llm, gpus=block, state="WARM")
                chosen[replica.id] = replica
                break
    return Placement(replicas=tuple(chosen.values()))


def made_up_plan(
    *,
    num_llms: int = 12,
    nodes: int = 2,
    gpus: int = 4,
    epochs: int = 48,
    epoch_s: float = 300.0,
    seed: int = 1,
) -> tuple[Plan, tuple[EpochSolve, ...]]:
    rng = np.random.default_rng(seed)
    fleet = made_up_fleet(num_llms, nodes, gpus)
    phase = rng.uniform(0, 2 * math.pi, num_llms)
    size = nodes * gpus / num_llms * 4.0 * rng.lognormal(0, 0.7, num_llms)
    placement, found, solves = Placement(), [], []
    for index in range(epochs):
        wave = np.sin(2 * math.pi * 2 * index / epochs + phase)
        rate = size * np.maximum(0.03, 0.55 + 0.6 * wave) ** 2
        placement = _placement(fleet, rate, placement)
        demand = tuple(
            LlmDemand(
                llm=llm.name,
                rate_rps=float(rate[i]),
                mean_load=float(rate[i] * 4),
                peak_load=float(rate[i] * 7 + 2),
                peak_high=float(rate[i] * 9 + 5),
            )
            for i, llm in enumerate(fleet.llms)
        )
        terms = {
            "O1": float(rng.choice([0.0, 12.0], p=[0.9, 0.1])),
            "O2": float(rng.gamma(4, 5)),
            "O3": float(rng.gamma(3, 4)),
            "O4": float(rng.gamma(1.5, 5)),
            "O5": 4.0 * len(placement.by_gpu) * epoch_s / 3600 * 10,
        }
        objective = sum(terms.values())
        closed = rng.random() < 0.7
        bound = objective if closed else objective * float(rng.uniform(0.96, 1))
        found.append(
            Epoch(
                start_s=index * epoch_s,
                end_s=(index + 1) * epoch_s,
                placement=placement,
                demand=demand,
                certificate=Certificate(
                    status=Status.OPTIMAL if closed else Status.FEASIBLE,
                    objective=objective,
                    bound=bound,
                    terms=terms,
                    without_warm=objective + float(rng.gamma(4, 15)),
                ),
            )
        )
        wall_s = 0.1 + float(rng.gamma(2, 0.2)) if closed else 2.0
        points = np.sort(rng.uniform(0.05, wall_s, 6))
        solves.append(
            EpochSolve(
                wall_s=wall_s,
                time_to_first_s=float(points[0]),
                progress=tuple(
                    Moment(
                        elapsed_s=float(at),
                        objective=objective * (1 + 0.4 * 0.4**step),
                        bound=bound * (1 - 0.3 * 0.5**step) if step else None,
                    )
                    for step, at in enumerate(points)
                ),
            )
        )
    plan = Plan(
        foreserve_version="0.1.0",
        fleet=fleet,
        epochs=tuple(found),
        solver=SolverInfo(
            name="milp",
            version="highspy 1.13.1",
            seed=seed,
            threads=1,
            time_limit_s=2.0,
            gap=0.01,
        ),
        forecaster="corrective",
        inputs={"trace day.csv": "ab" * 32, "scenario day.yaml": "cd" * 32},
    )
    return plan, tuple(solves)


def made_up_run(plan: Plan, policy: str, seed: int = 2, slow: float = 1.0) -> Run:
    """A run that follows the plan with load and drain times; ``slow`` scales TTFT."""
    rng = np.random.default_rng(seed)
    epochs, llms = plan.epochs, plan.fleet.llms
    forecast = np.array([[row.rate_rps for row in epoch.demand] for epoch in epochs]).T
    mean_load = forecast * 4 * rng.lognormal(0, 0.2, forecast.shape)
    burst = rng.random(forecast.shape) < 0.04
    peak_load = mean_load * rng.uniform(1.5, 2.1, forecast.shape) + 2 + 15 * burst
    epoch_s = epochs[0].end_s - epochs[0].start_s
    count = rng.poisson(np.minimum(forecast * epoch_s * 0.05, 60))
    llm = np.repeat(np.arange(len(llms)), count.sum(axis=1)).astype(np.int32)
    starts = np.array([epoch.start_s for epoch in epochs])
    arrival_s = np.concatenate([np.repeat(starts, row) for row in count])
    arrival_s = arrival_s + rng.uniform(0, epoch_s, len(arrival_s))
    order = np.argsort(arrival_s, kind="stable")
    llm, arrival_s = llm[order], arrival_s[order]
    base_s = np.array([plan.fleet.reference_s(one.name) / 8 for one in llms])[llm]
    ttft_s = base_s * rng.lognormal(0, 0.5, len(llm)) * slow
    cold = rng.random(len(llm)) < 0.01 * slow**2
    first_token_s = arrival_s + ttft_s + cold * rng.uniform(2, 9, len(llm))
    tpot_s = rng.lognormal(-3.9, 0.3, len(llm))
    finish_s = first_token_s + 120 * tpot_s
    late = finish_s > plan.end_s
    finish_s[late] = np.nan
    first_token_s[first_token_s > plan.end_s] = np.nan

    def service(mask: NDArray[np.bool_]) -> Service:
        done = mask & ~late
        waits = (first_token_s - arrival_s)[done]
        good = (waits <= 2.0) & (tpot_s[done] <= 0.1)
        asked = int(mask.sum())
        return Service(
            requests=asked,
            finished=int(done.sum()),
            ttft=_latency(waits),
            tpot=_latency(tpot_s[done]),
            itl=_latency(tpot_s[done]),
            e2e=_latency((finish_s - arrival_s)[done]),
            slo_attainment=float(good.sum() / asked) if asked else 0.0,
            input_tokens=500 * asked,
            output_tokens=121 * int(done.sum()),
            normalized=_latency((finish_s - arrival_s)[done] / 121),
            slowdown=Ratios(count=asked, mean=2.0, p50=1.5, p90=3.0, p95=4.0, p99=9.0),
            d1=2.5 * slow,
            attainment_at={str(scale): 1 - 0.5 / scale for scale in SCALES},
            goodput_rps=float(good.sum() / plan.end_s),
            goodput_tokens_per_s=float(121 * good.sum() / plan.end_s),
        )

    residency, loads = _residency(plan, rng, slow)
    hours = sum(len(e.placement.by_gpu) * (e.end_s - e.start_s) for e in epochs) / 3600
    outcome = Outcome(
        policy=policy,
        start_s=plan.start_s,
        end_s=plan.end_s,
        total=service(np.ones(len(llm), dtype=bool)),
        by_llm={one.name: service(llm == i) for i, one in enumerate(llms)},
        gpu_hours={"ACTIVE": 0.7 * hours, "WARM": 0.3 * hours, "total": hours * slow},
        cost_usd=4.0 * hours * slow,
        loads=loads,
        loaded_bytes=loads * 20 * GIB,
        activations=90,
        warm_starts=round(80 / slow),
        cold_starts=90 - round(80 / slow),
        moved_bytes=loads * 19 * GIB,
        wasted_bytes=round(2 * slow) * 19 * GIB,
        unused_bytes=0,
        effort={},
    )
    return Run(
        outcome=outcome,
        residency=residency,
        llms=tuple(one.name for one in llms),
        llm=llm,
        arrival_s=arrival_s,
        first_token_s=first_token_s,
        finish_s=finish_s,
        left_s=np.where(np.isnan(finish_s), plan.end_s, finish_s),
        output_tokens=np.full(len(llm), 121),
        itl=np.zeros((len(llms), GAP_BINS), np.int64),
        itl_s=np.zeros(len(llms)),
        load_bin_s=epoch_s,
        mean_load=mean_load,
        peak_load=peak_load,
    )


def _latency(values: NDArray[np.float64]) -> Latency:
    if not len(values):
        return Latency(count=0, mean_s=0, p50_s=0, p90_s=0, p95_s=0, p99_s=0)
    p50, p90, p95, p99 = (float(v) for v in np.quantile(values, [0.5, 0.9, 0.95, 0.99]))
    return Latency(
        count=len(values),
        mean_s=float(values.mean()),
        p50_s=p50,
        p90_s=p90,
        p95_s=p95,
        p99_s=p99,
    )


def _residency(
    plan: Plan, rng: np.random.Generator, slow: float
) -> tuple[tuple[Residency, ...], int]:
    stays: list[Residency] = []
    before, loads = Placement(), 0
    for epoch in plan.epochs:
        for replica in epoch.placement.replicas:
            old, at_s = before.by_id.get(replica.id), epoch.start_s
            stay = Residency(
                llm=replica.llm,
                gpus=replica.gpus,
                phase=replica.state,
                start_s=at_s,
                end_s=epoch.end_s,
            )
            parts = [stay]
            if old is None:
                loads += 1
                ready_s = at_s + slow * float(rng.uniform(3, 25))
                parts = [
                    replace(stay, phase="LOADING", end_s=ready_s),
                    replace(stay, start_s=ready_s),
                ]
            elif old.state == "ACTIVE" and replica.state == "WARM":
                idle_s = at_s + float(rng.uniform(5, 60))
                parts = [
                    replace(stay, phase="DRAINING", end_s=idle_s),
                    replace(stay, start_s=idle_s),
                ]
            stays += parts
        before = epoch.placement
    return tuple(stays), loads
