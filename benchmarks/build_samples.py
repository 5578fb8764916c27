"""Build the shipped samples in traces/samples/ from the public data they are made of.

    python benchmarks/build_samples.py --shared ../shared

Deterministic: the same data and version give the same bytes. See traces/samples/README.md
for sources, licences and the rules used here.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pandas as pd

from foreserve.models.lengths import Lengths
from foreserve.planner.fleet import build_fleet, busy_s
from foreserve.planner.scenario import load_scenario
from foreserve.planner.scenarios import scenario_path
from foreserve.traces.demand_table import write_demand
from foreserve.traces.formats import write_trace
from foreserve.traces.samples import sample_path
from foreserve.traces.trace import Trace, bin_demand, merge

DAY_S, WINDOW_S, LENGTH_WINDOW_S, EPOCH_S = 86_400, 600, 21_600, 300.0
SAMPLE_DAY, HISTORY_DAYS, SEED, MAX_CV = 8, 7, 20_230_811, 8.0

# LLM: the client that plays it, and how many requests it gets on the sample day.
FLEET = {
    "llama-3.1-8b": ("m-small", 36, 26_000),
    "qwen2.5-7b": ("m-small", 41, 20_000),
    "qwen3-8b": ("m-large", 137, 14_000),
    "llama-2-13b": ("m-large", 91, 12_000),
    "qwen2.5-14b": ("m-large", 147, 12_000),
    "mistral-7b-v0.3": ("m-large", 113, 10_000),
    "deepseek-v2-lite": ("m-large", 0, 10_000),
    "llama-2-7b": ("m-large", 95, 8_000),
    "qwen3-32b": ("m-large", 61, 7_000),
    "qwen2.5-32b": ("m-large", 12, 1_500),
    "mixtral-8x7b": ("m-large", 17, 6_000),
    "llama-3.1-70b": ("m-large", 47, 6_000),
}
QUANTILES = ["min", "p1", "p5", *(f"p{q}" for q in range(10, 100, 10)), "p95", "p99"]
QUANTILES += ["p99_9", "max"]
LEVELS = [0, 0.01, 0.05, *(q / 100 for q in range(10, 100, 10)), 0.95, 0.99, 0.999, 1]


def azure(shared: Path) -> None:
    """Both services of the Azure LLM inference trace 2023, on one clock."""
    traces, sources = [], {}
    for name in ("code", "conv"):
        path = shared / "data" / "azure_llm_2023" / f"{name}.csv.gz"
        sources[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        rows = pd.read_csv(path)
        rows = rows[rows["output_tokens"] > 0]
        traces.append(
            Trace(
                arrival_s=rows["t_s"].to_numpy(dtype=np.float64),
                llm=np.zeros(len(rows), dtype=np.int32),
                llms=(name,),
                input_tokens=rows["input_tokens"].to_numpy(dtype=np.int32),
                output_tokens=rows["output_tokens"].to_numpy(dtype=np.int32),
            )
        )
    trace = merge(traces)
    meta = {
        "source": "Azure/AzurePublicDataset, AzureLLMInferenceTrace_{code,conv}.csv",
        "licence": "CC-BY-4.0",
        "attribution": "Patel et al., Splitwise, ISCA 2024",
        "start": "2023-11-16T18:15:00",
        "zone": None,
        "rows": len(trace),
        "sha256": sources,
    }
    write_trace(trace, sample_path("azure-2023"), meta)


def fleet_day(shared: Path) -> None:
    """A day of twelve LLMs, and the demand of the seven days before it."""
    rng = np.random.default_rng(SEED)
    data = shared / "data" / "servegen"
    tables = {
        (kind, name): pd.read_csv(data / f"{kind}_{name}_d00-09.csv.gz")
        for kind in ("rates", "lengths")
        for name in ("m-small", "m-large")
    }
    scenario = load_scenario(scenario_path("fleet-day"))
    names = tuple(llm.name for llm in scenario.models)
    days: list[list[Trace]] = [[] for _ in range(HISTORY_DAYS + 1)]
    for name in names:
        source, client, requests = FLEET[name]
        rates = tables["rates", source]
        lengths = tables["lengths", source]
        rates = rates[rates["client"] == client]
        lengths = lengths[lengths["client"] == client]
        of_day = rates[rates["t_s"] // DAY_S == SAMPLE_DAY]
        scale = requests / of_day["requests"].sum()
        for offset, day in enumerate(range(SAMPLE_DAY - HISTORY_DAYS, SAMPLE_DAY + 1)):
            start_s = day * DAY_S
            windows = rates[(rates["t_s"] // DAY_S) == day]
            days[offset].append(client_day(name, windows, lengths, start_s, scale, rng))
    *past, sample = [replace(merge(day)) for day in days]
    meta = {
        "source": "alibaba/ServeGen, rates and length quantiles of twelve clients",
        "licence": "Apache-2.0",
        "attribution": "Xiang et al., ServeGen, 2025",
        "mapping": {
            n: f"{s} client {c}, {k} requests" for n, (s, c, k) in FLEET.items()
        },
        "seed": SEED,
        "rows": len(sample),
        "start": None,
    }
    write_trace(sample, sample_path("fleet-day"), meta)
    weeks = [
        replace(day, arrival_s=day.arrival_s + offset * DAY_S)
        for offset, day in enumerate(past)
    ]
    history = merge(weeks)
    lengths_of = {
        name: Lengths.fixed(
            float(history.input_tokens[history.llm == i].mean()),
            float(history.output_tokens[history.llm == i].mean()),
        )
        for i, name in enumerate(history.llms)
    }
    fleet = build_fleet(scenario, lengths_of)
    demand = bin_demand(
        history,
        epoch_s=EPOCH_S,
        busy_s=busy_s(fleet, history),
        end_s=float(HISTORY_DAYS * DAY_S),
    )
    write_demand(demand, sample_path("fleet-history"))


def client_day(
    llm: str,
    windows: pd.DataFrame,
    lengths: pd.DataFrame,
    start_s: float,
    scale: float,
    rng: np.random.Generator,
) -> Trace:
    """One client's day: scaled counts per window, Gamma gaps of the recorded CV."""
    arrivals = []
    for row in windows.sort_values("t_s").itertuples():
        exact = float(str(row.requests)) * scale
        count = int(exact) + int(rng.random() < exact - int(exact))
        cv = min(max(float(str(row.iat_cv)), 0.05), MAX_CV)
        gaps = rng.gamma(1 / cv**2, 1.0, count) + 1e-12
        # Turned by chance, else every window would begin with a burst, for all clients.
        inside = (np.cumsum(gaps) / gaps.sum() + rng.random()) % 1.0
        arrivals.append(float(str(row.t_s)) - start_s + WINDOW_S * inside)
    arrival_s = np.round(np.sort(np.concatenate([*arrivals, np.zeros(0)])), 6)
    arrival_s = np.minimum(arrival_s, DAY_S - 1e-6)
    columns = {
        field: draw_lengths(
            lengths[lengths["field"] == field], arrival_s + start_s, rng
        )
        for field in ("input_tokens", "output_tokens")
    }
    return Trace(
        arrival_s=arrival_s,
        llm=np.zeros(len(arrival_s), dtype=np.int32),
        llms=(llm,),
        **columns,
    )


def draw_lengths(
    table: pd.DataFrame, times: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Inverse transform of the recorded quantiles of each 6-hour window."""
    known = table["t_s"].to_numpy()
    quantiles = table[QUANTILES].to_numpy(dtype=np.float64)
    windows = times // LENGTH_WINDOW_S * LENGTH_WINDOW_S
    drawn = np.empty(len(times))
    for window in np.unique(windows):
        mask = windows == window
        # A window without a record borrows the nearest one of the same client.
        nearest = quantiles[np.argmin(np.abs(known - window))]
        drawn[mask] = np.interp(rng.random(int(mask.sum())), LEVELS, nearest)
    return np.maximum(1, np.rint(drawn)).astype(np.int32)


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path())
def main(shared: str) -> None:
    """Write azure-2023, fleet-day and fleet-history."""
    azure(Path(shared))
    fleet_day(Path(shared))


if __name__ == "__main__":
    main()
