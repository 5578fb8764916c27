"""Whole days to plan: sixteen LLMs on 32 GPUs, and six on eight that exact solves can do.

The large one is made as `benchmarks/build_samples.py` makes fleet-day, from the same
records (alibaba/ServeGen, Apache-2.0) with four more clients and `LEVEL` times the
requests; it needs the data folder beside the repository. The small one is a part of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from build_samples import DAY_S, EPOCH_S, FLEET, HISTORY_DAYS, SAMPLE_DAY, client_day

from foreserve.cli.common import read_scenario
from foreserve.models.lengths import Lengths
from foreserve.planner.fleet import build_fleet, busy_s
from foreserve.planner.scenario import LlmPart, ObjectivePart, Scenario
from foreserve.traces.trace import Demand, Trace, bin_demand, merge

SEED, LEVEL = 20_230_812, 15
MORE = {
    "phi-4": ("m-small", 24, 12_000),
    "mistral-small-24b": ("m-large", 20, 6_000),
    "gemma-3-27b": ("m-large", 34, 6_000),
    "qwen3-30b-a3b": ("m-small", 14, 9_000),
}
OBJECTIVE = ObjectivePart(usd_s=0.1, load_s=1.0, demote_s=1.0, slower_s=0.002)
"""Of both: a load costs what it takes, since plans look ahead to see it pay."""
SMALL = (
    "qwen2.5-7b",
    "qwen3-8b",
    "mistral-7b-v0.3",
    "llama-2-7b",
    "qwen2.5-14b",
    "mistral-small-24b",
)
Day = tuple[Scenario, Trace, Demand]
"""What to plan, what comes, and what came in the week before."""


def large(shared: Path) -> Day:
    """288 epochs of 300 s, 16 LLMs, 32 GPUs in four nodes: (scenario, day, week before)."""
    base = read_scenario("sample:fleet-day")
    clients = FLEET | MORE
    (node,) = base.cluster.nodes
    nodes = replace(node, gpu="a100-80gb", count=4, gpus=8)
    scenario = replace(
        base,
        epoch=EPOCH_S,
        models=tuple(LlmPart(name=name) for name in clients),
        cluster=replace(base.cluster, nodes=(nodes,)),
        forecast=replace(base.forecast, scenarios=20, history=None),
        objective=OBJECTIVE,
    )
    data = shared / "data" / "servegen"
    tables = {
        (kind, name): pd.read_csv(data / f"{kind}_{name}_d00-09.csv.gz")
        for kind in ("rates", "lengths")
        for name in ("m-small", "m-large")
    }
    days, weeks = [], []
    for index, (name, (source, client, requests)) in enumerate(clients.items()):
        rng = np.random.default_rng([SEED, index])
        rates, lengths = tables["rates", source], tables["lengths", source]
        rates = rates[rates["client"] == client]
        lengths = lengths[lengths["client"] == client]
        of_day = rates[rates["t_s"] // DAY_S == SAMPLE_DAY]
        scale = LEVEL * requests / of_day["requests"].sum()
        played = []
        for day in range(SAMPLE_DAY - HISTORY_DAYS, SAMPLE_DAY + 1):
            windows = rates[(rates["t_s"] // DAY_S) == day]
            part = client_day(name, windows, lengths, day * DAY_S, scale, rng)
            played.append(part)
        days.append(played.pop())
        past = merge(
            [
                replace(part, arrival_s=part.arrival_s + offset * DAY_S)
                for offset, part in enumerate(played)
            ]
        )
        means = Lengths.fixed(
            float(past.input_tokens.mean()), float(past.output_tokens.mean())
        )
        own = replace(scenario, models=scenario.models[index : index + 1])
        fleet = build_fleet(own, {name: means})
        weeks.append(
            bin_demand(
                past,
                epoch_s=EPOCH_S,
                busy_s=busy_s(fleet, past),
                end_s=float(HISTORY_DAYS * DAY_S),
            )
        )
    return scenario, merge(days), _beside(weeks)


def _beside(parts: list[Demand]) -> Demand:
    """One demand of all LLMs, each of which has its own."""
    columns = ("rate_rps", "mean_load", "peak_load", "input_tokens", "output_tokens")
    stacked = {c: np.vstack([getattr(part, c) for part in parts]) for c in columns}
    llms = tuple(name for part in parts for name in part.llms)
    return replace(parts[0], llms=llms, **stacked)


def small(day: Day, epoch_s: float, scenarios: int) -> Day:
    """Six LLMs of the large day on one of its nodes, in longer epochs."""
    scenario, trace, history = day
    own = [trace.llms.index(name) for name in SMALL]
    number = np.full(len(trace.llms), -1, dtype=np.int32)
    number[own] = np.arange(len(own))
    kept = number[trace.llm] >= 0
    trace = replace(
        trace,
        arrival_s=trace.arrival_s[kept],
        llm=number[trace.llm[kept]],
        llms=SMALL,
        input_tokens=trace.input_tokens[kept],
        output_tokens=trace.output_tokens[kept],
    )
    (nodes,) = scenario.cluster.nodes
    scenario = replace(
        scenario,
        epoch=epoch_s,
        models=tuple(LlmPart(name=name) for name in SMALL),
        cluster=replace(scenario.cluster, nodes=(replace(nodes, count=1),)),
        forecast=replace(scenario.forecast, scenarios=scenarios),
    )
    return scenario, trace, history.select(SMALL)
