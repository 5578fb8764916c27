"""Small problems to solve in tests: built by hand or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from foreserve.models.placement import HostCopy, Placement, Replica, State
from foreserve.models.problem import Fleet, Prices, Problem, ServedLlm, round_rate
from foreserve.models.rules import Held, Sharing
from foreserve.models.specs import ClusterSpec, GpuId, GpuType, Node
from tests.build import option

GIB = 2**30


def placement(*replicas: tuple[str, str, State]) -> Placement:
    """Replicas as ``(llm, "n0/0 n0/1", state)``, without traffic."""
    return Placement(
        replicas=tuple(
            Replica(llm=llm, gpus=tuple(map(GpuId.parse, gpus.split())), state=state)
            for llm, gpus, state in replicas
        )
    )


def problem(
    fleet: Fleet,
    demand_rps: Sequence[Sequence[float]],
    peaks: Sequence[tuple[float, Sequence[Sequence[float]]]] = (),
    initial: Placement | None = None,
    prices: Prices | None = None,
) -> Problem:
    """Epochs of 100 s; ``demand_rps[llm][epoch]``, peaks as (probability, [llm][epoch])."""
    return Problem(
        fleet=fleet,
        epoch_s=100.0,
        demand_rps=tuple(map(tuple, demand_rps)),
        scenario_probability=tuple(probability for probability, _ in peaks),
        peak_load=tuple(tuple(map(tuple, load)) for _, load in peaks),
        initial=initial or Placement(),
        prices=prices or Prices(),
    )


def _cluster(
    nodes: Sequence[int], *, memory_bytes: int, usd_per_h: float
) -> ClusterSpec:
    gpu = GpuType(
        name="g",
        memory_bytes=memory_bytes,
        hbm_bytes_per_s=1.0,
        bf16_flop_per_s=1.0,
        gpu_link_bytes_per_s=1.0,
        host_link_bytes_per_s=1.0,
        price_usd_per_h=usd_per_h,
    )
    return ClusterSpec(
        nodes=tuple(
            Node(name=f"n{i}", gpu="g", gpus=count, host_ram_bytes=1)
            for i, count in enumerate(nodes)
        ),
        gpu_types=(gpu,),
        usable_fraction=1.0,
    )


SIZES = (
    # billions of parameters, least TP, seconds of a mean request alone, KV GiB
    (3, 1, 1.0, 4),
    (8, 1, 2.0, 8),
    (14, 1, 3.5, 20),
    (32, 2, 5.0, 20),
    (70, 4, 6.0, 30),
)


def realistic(
    rng: np.random.Generator,
    llms: int,
    nodes: Sequence[int],
    scenarios: int,
    *,
    epochs: int = 1,
    busy: float = 0.4,
) -> Problem:
    """LLMs of 3 to 70 billion parameters on 80 GiB GPUs, from an empty cluster.

    Half of the LLMs have a steady demand, about ``busy`` of the GPUs in all, and peaks
    of one to five times their mean load; the others are asked for now and then only. GPU
    hours and slowness count little, as where the GPUs are there anyway.
    """
    served, options, demand, loads = [], [], [], []
    share = rng.dirichlet(np.ones(llms)) * busy * sum(nodes)
    share[llms // 2 :] = 0.0
    for i in range(llms):
        name = f"llm{i:02d}"
        kind = rng.choice(len(SIZES), p=[0.2, 0.35, 0.2, 0.15, 0.1])
        billions, least_tp, exec_s, kv_gib = SIZES[kind]
        for tp in (1, 2, 4, 8):
            times = tp // least_tp
            if times == 0 or times > 4 or tp > max(nodes):
                continue
            options.append(
                option(
                    name,
                    tp,
                    gpu_type="g",
                    resident_bytes=int((billions * 1.9 / tp + 0.5) * GIB),
                    kv_bytes=int(kv_gib / times * GIB),
                    concurrency=min(64, 32 * times),
                    rate_rps=round_rate(0.7 * 32 / (3 * exec_s) * times**0.8),
                    exec_s=round(exec_s / times**0.7, 4),
                    load_s=round(billions * 2 / tp / 50, 4),
                )
            )
        least = next(o for o in options if o.llm == name)
        rate_rps = share[i] / least_tp * least.rate_rps
        hours = np.arange(epochs) / 4
        day = 1 + 0.6 * np.sin((hours / 24 + rng.random()) * 2 * np.pi)
        demand.append(tuple(round_rate(rate_rps * level) for level in day))
        if rate_rps > 0:
            bursts = np.clip(rng.lognormal(0.5, 0.6, (scenarios, 1)), 1, 5)
            loads.append(rate_rps * 3 * exec_s * bursts * day)
        else:
            asked = rng.random((scenarios, epochs)) < 0.4
            loads.append(asked * rng.uniform(1, 50, (scenarios, epochs)))
        served.append(
            ServedLlm(
                name=name,
                weight=float(rng.choice([1.0, 2.0])),
                cold_loss_s=round(16 * (1 + 10 / exec_s) * billions / 5, 3),
                instance_concurrency=32,
            )
        )
    return Problem(
        fleet=Fleet(
            cluster=_cluster(nodes, memory_bytes=72 * GIB, usd_per_h=3.0),
            llms=tuple(served),
            options=tuple(options),
        ),
        epoch_s=300.0,
        prices=Prices(usd_s=0.1, load_s=0.05, demote_s=0.05, slower_s=0.01),
        demand_rps=tuple(demand),
        scenario_probability=(1 / scenarios,) * scenarios,
        peak_load=tuple(
            tuple(tuple(map(float, load[s])) for load in loads)
            for s in range(scenarios)
        ),
    )


def tiny(rng: np.random.Generator, epochs: int = 1) -> Problem:
    """One to three LLMs on two to four small GPUs, with rules and a placement before
    that may not suit them: small enough for brute force, odd enough to matter."""
    nodes = [(2,), (1, 1), (2, 1), (3,), (4,)][rng.integers(5)]
    names = "abc"[: rng.integers(1, 4)]
    served, options = [], []
    for name in names:
        sizes = [(1,), (1, 2), (2,)][rng.integers(3 if max(nodes) > 1 else 1)]
        for tp in sizes:
            options.append(
                option(
                    name,
                    tp,
                    resident_bytes=int(rng.integers(20, 70)),
                    kv_bytes=int(rng.integers(5, 40)),
                    concurrency=int(rng.integers(1, 20)),
                    rate_rps=round_rate(rng.uniform(0.2, 2.0)),
                    exec_s=float(rng.uniform(1, 5)),
                    load_s=float(rng.uniform(0.5, 5)),
                )
            )
        served.append(
            ServedLlm(
                name=name,
                weight=float(rng.choice([0.5, 1.0, 3.0])),
                unserved_s=float(rng.choice([2.0, 30.0])),
                cold_loss_s=float(rng.choice([0.0, 20.0, 200.0])),
                instance_concurrency=int(rng.integers(1, 9)),
                min_active=int(rng.choice([0, 0, 0, 1])),
                max_replicas=[None, None, 1, 2][rng.integers(4)],
                nodes=[None, None, ("n0",)][rng.integers(3)],
            )
        )
    fleet = Fleet(
        cluster=_cluster(nodes, memory_bytes=100, usd_per_h=float(rng.uniform(0, 9))),
        llms=tuple(served),
        options=tuple(options),
    )
    before = []
    for choice, block in fleet.candidates():
        free = not any(set(block) & set(r.gpus) for r in before)
        if free and rng.random() < 0.3:
            state: State = "ACTIVE" if rng.random() < 0.5 else "WARM"
            before.append(Replica(llm=choice.llm, gpus=block, state=state))
    if rng.random() < 0.2:
        gone = (GpuId(node="gone", index=0),)
        before.append(Replica(llm="a", gpus=gone, state="ACTIVE"))
    scenarios, times = int(rng.integers(0, 3)), range(epochs)
    return Problem(
        fleet=fleet,
        epoch_s=float(rng.choice([10.0, 100.0])),
        demand_rps=tuple(
            tuple(round_rate(rng.uniform(0, 2) * (rng.random() < 0.7)) for _ in times)
            for _ in names
        ),
        scenario_probability=((), (1.0,), (0.25, 0.75))[scenarios],
        peak_load=tuple(
            tuple(tuple(float(rng.uniform(0, 25)) for _ in times) for _ in names)
            for _ in range(scenarios)
        ),
        initial=Placement(replicas=tuple(before)),
        prices=Prices(usd_s=float(rng.choice([1.0, 20.0])), slower_s=0.5),
    )


ASKED = (
    "sharing",
    "host",
    "window",
    "keep_serving",
    "min_after_loss",
    "rules",
    "replan",
)
"""What `asking` can turn on: the keys of `models.problem.OPTIONAL`."""


def asking(
    rng: np.random.Generator,
    *keys: str,
    epochs: int = 1,
    problem: Problem | None = None,
) -> Problem:
    """A `tiny` problem that asks for these rows on top, tightly enough to matter."""
    problem = problem or tiny(rng, epochs)
    fleet, rules = problem.fleet, problem.fleet.rules
    nodes = fleet.cluster.nodes
    llms, options = list(fleet.llms), list(fleet.options)
    prices, initial = problem.prices, problem.initial
    loading, sharing = fleet.loading, fleet.sharing
    if "sharing" in keys:
        sharing = Sharing(
            most=int(rng.integers(2, 4)),
            booked_load=0.8,
            levels=[(0.4, 0.8), (0.3, 0.6)][rng.integers(2)],
            idle_lends=bool(rng.integers(2)),
        )
        llms = [replace(llm, max_replicas=1, min_active=0) for llm in llms]
        options = [
            replace(
                option,
                resident_bytes=int(option.resident_bytes * 0.7),
                input_tokens=float(rng.uniform(1, 5)),
                output_tokens=float(rng.uniform(1, 5)),
            )
            for option in options
        ]
    if "host" in keys:
        loading = replace(loading, host_cache="planned")
        llms = [
            replace(llm, storage_loss_s=float(rng.choice([0.0, 50.0]))) for llm in llms
        ]
        options = [
            replace(o, weight_bytes=60 + 10 * (len(o.llm) + o.tp)) for o in options
        ]
        nodes = tuple(
            replace(node, host_ram_bytes=100, storage_bytes_per_s=10.0)
            for node in nodes
        )
        initial = replace(initial, hosted=(HostCopy(node="n0", llm="a"),))
    if "window" in keys:
        rules = replace(rules, load_window_s=float(rng.uniform(2, 12)))
        nodes = tuple(
            replace(node, host_link_bytes_per_s=float(rng.choice([15.0, 60.0])))
            for node in nodes
        )
    if "keep_serving" in keys:
        rules = replace(rules, keep_serving=True)
    if "min_after_loss" in keys and "sharing" not in keys:
        llms[0] = replace(llms[0], min_after_loss=1, max_replicas=None, nodes=None)
        if rng.random() < 0.3:
            nodes = tuple(replace(node, domain="rack") for node in nodes)
    if "rules" in keys:
        rules = replace(rules, max_llms_per_gpu=int(rng.integers(1, 3)))
        if len(llms) > 1 and rng.random() < 0.5:
            rules = replace(rules, apart=((llms[0].name, llms[1].name),))
        if rng.random() < 0.5:
            rules = replace(rules, closed=(GpuId(node="n0", index=0),))
        choices = list(fleet.candidates())
        option_of, block = choices[rng.integers(len(choices))]
        state: State | None = [None, "ACTIVE", "WARM"][rng.integers(3)]
        if rng.random() < 0.7:
            held = Held(llm=option_of.llm, gpus=block, state=state)
            rules = replace(rules, held=(held,))
    if "replan" in keys:
        prices = replace(prices, replan_s=float(rng.uniform(5, 60)))
    fleet = replace(
        fleet,
        cluster=replace(fleet.cluster, nodes=nodes),
        llms=tuple(llms),
        options=tuple(options),
        rules=rules,
        sharing=sharing,
        loading=loading,
    )
    return replace(problem, fleet=fleet, prices=prices, initial=initial)
