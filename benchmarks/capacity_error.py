"""Predicted capacity against the simulated engine, for real length distributions.

    python benchmarks/capacity_error.py

For LLMs of two samples and two targets: the rate that `capacity` predicts with the
distribution of lengths, and with their means alone, over the largest rate of Poisson
arrivals at which the simulated engine keeps the 99th percentiles of TTFT and TPOT (by
bisection, 4,000 requests each). Above 1 is optimistic. Writes
benchmarks/results/capacity_error.json.
"""

from __future__ import annotations

import json

import click
import numpy as np
from record import write_result

from foreserve.cli.common import read_traces
from foreserve.models import catalog
from foreserve.models.capacity import capacity
from foreserve.models.cost import IterationTime
from foreserve.models.lengths import Lengths
from foreserve.models.perf.model import Measured
from foreserve.models.specs import Slo
from foreserve.runtime.simulated.engine import EngineLimits
from foreserve.runtime.simulated.replay import replay

REQUESTS, KV_TOKENS, ROUNDS = 4000, 400_000, 6
REPLICAS = (("llama-3.1-8b", "h100", 1), ("llama-3.1-70b", "h100", 4))
TARGETS = (Slo(ttft_s=1.0, tpot_s=0.04), Slo(ttft_s=2.0, tpot_s=0.1))


@click.command()
def main() -> None:
    """Print and write every case and the quantiles of the ratios."""
    rows = []
    for llm, gpu, tp in REPLICAS:
        time = Measured().iteration(catalog.llm(llm), catalog.gpu(gpu), tp)
        for name, lengths in _lengths():
            for slo in TARGETS:
                row = _case(time, lengths, slo)
                rows.append({"replica": f"{llm} {tp} x {gpu}", "lengths": name, **row})
                click.echo(json.dumps(rows[-1]))
    summary = {
        kind: [
            round(float(q), 2)
            for q in np.quantile(
                [r[kind] for r in rows if r[kind] is not None], (0.1, 0.5, 0.9)
            )
        ]
        for kind in ("distribution", "means")
    }
    write_result("capacity_error", {"ratio_p10_p50_p90": summary, "rows": rows})
    click.echo(json.dumps(summary))


def _lengths() -> list[tuple[str, Lengths]]:
    found = []
    for sample, every in (("azure-2023", 1), ("fleet-day", 3)):
        trace = read_traces([f"sample:{sample}"], {})
        for i in range(0, len(trace.llms), every):
            rows = trace.llm == i
            name = f"{sample} {trace.llms[i]}"
            lengths = Lengths.of_requests(
                trace.input_tokens[rows], trace.output_tokens[rows]
            )
            found.append((name, lengths))
    return found


def _case(time: IterationTime, lengths: Lengths, slo: Slo) -> dict[str, object]:
    limits = {"kv_tokens": KV_TOKENS, "max_num_seqs": 256}
    means = Lengths.fixed(lengths.mean_input, lengths.mean_output)
    full, plain = (capacity(time, slo, x, **limits) for x in (lengths, means))
    assert plain is not None
    low, high = plain.rate_rps / 20, plain.rate_rps * 4
    for _ in range(ROUNDS + 2):
        middle = (low * high) ** 0.5
        if _meets(time, lengths, slo, middle):
            low = middle
        else:
            high = middle
    truth = (low * high) ** 0.5
    return {
        "ttft_s": slo.ttft_s,
        "tpot_s": slo.tpot_s,
        "simulated_rps": round(truth, 3),
        "distribution": None if full is None else round(full.rate_rps / truth, 3),
        "means": round(plain.rate_rps / truth, 3),
    }


def _meets(time: IterationTime, lengths: Lengths, slo: Slo, rate_rps: float) -> bool:
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, REQUESTS)).tolist()
    pick = rng.integers(0, len(lengths.input_tokens), REQUESTS).tolist()
    rows = [
        (
            arrival_s,
            max(1, int(lengths.input_tokens[k])),
            max(1, int(lengths.output_tokens[k])),
        )
        for arrival_s, k in zip(arrivals, pick, strict=True)
    ]
    found = replay(time, KV_TOKENS, EngineLimits(), rows)
    # Neither the empty start nor the drain at the end.
    steady = slice(REQUESTS // 5, REQUESTS * 4 // 5)
    arrival_s, _, tokens = np.array(rows)[steady].T
    first_s, several = found.first_token_s[steady], tokens > 1
    ttft = first_s - arrival_s
    tpot = (found.end_s[steady] - first_s)[several] / (tokens[several] - 1)
    return bool(
        np.quantile(ttft, 0.99) <= slo.ttft_s and np.quantile(tpot, 0.99) <= slo.tpot_s
    )


if __name__ == "__main__":
    main()
