"""Throughput of closed-loop cases on real servers, each calibrated on its lowest load.

    python benchmarks/pilot_error.py --shared ../shared

`llm_pilot` has cases of 120 s in which 1 to 128 users each send the next request when the
last one has ended (TGIS, a server of 2023 that prefills in iterations of its own). For each
decoder-only LLM and GPU with kernel tables, two numbers are taken from the case with the
fewest users alone: the time to the first token and the gap between tokens. What they
exceed the cost model by is what this server adds to an iteration. All other cases, up to
128 times the load, are predicted. Only cases without errors count (in the others long
requests failed). Writes benchmarks/results/pilot_error.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from record import write_result

from foreserve.models import catalog
from foreserve.models.cost import IterationTime
from foreserve.models.llm import ModelSpec
from foreserve.models.perf.compact import compact
from foreserve.models.perf.model import Measured
from foreserve.runtime.simulated.engine import EngineLimits
from foreserve.runtime.simulated.replay import closed_loop

GPUS = {"A100": "a100-40gb", "H100": "h100", "A10": "a10g"}
"""The data set's A100 is the PCIe part of 40 GB; A10 stands for A10G (same memory)."""
LIMITS = EngineLimits(mixes=False)
KV_TOKENS = 1_000_000
"""Short requests: no case without errors was short of memory."""


def _plain(name: str, params: float, **shape: Any) -> ModelSpec:
    """LLMs of before 2023, as their configuration files have them."""
    return ModelSpec(
        name=name,
        hub_id=name,
        params=round(params),
        gated=False,
        max_context_tokens=2048,
        **shape,
    )


LLMS = {
    "llama-7b": catalog.llm("llama-7b"),
    "EleutherAI/gpt-neox-20b": _plain(
        "gpt-neox-20b",
        20.6e9,
        layers=44,
        hidden=6144,
        intermediate=24576,
        heads=64,
        kv_heads=64,
        head_dim=96,
        vocab=50432,
    ),
    "bigcode/starcoder": _plain(
        "starcoder",
        15.5e9,
        layers=40,
        hidden=6144,
        intermediate=24576,
        heads=48,
        kv_heads=1,
        head_dim=128,
        vocab=49152,
    ),
    "ibm/mpt-7b-instruct2": _plain(
        "mpt-7b",
        6.65e9,
        layers=32,
        hidden=4096,
        intermediate=16384,
        heads=32,
        kv_heads=32,
        head_dim=128,
        vocab=50432,
    ),
    "Salesforce/codegen2-16B": _plain(
        "codegen2-16b",
        16.0e9,
        layers=34,
        hidden=6144,
        intermediate=24576,
        heads=24,
        kv_heads=24,
        head_dim=256,
        vocab=51200,
    ),
}


@click.command()
@click.option("--shared", default="../shared", show_default=True)
def main(shared: str) -> None:
    """Print and write every case, and the errors."""
    folder = Path(shared) / "data" / "llm_pilot"
    summary = pd.read_csv(folder / "summary.csv")
    clean = summary[(summary["errors"] == 0) & summary["model"].isin(LLMS)]
    skipped = sorted({*clean["gpu"]} - {*GPUS})
    rows: list[dict[str, Any]] = []
    for model, llm in LLMS.items():
        stem = model.rpartition("/")[2]
        requests = pd.read_csv(folder / f"requests_{stem}.csv.gz")
        own = clean[(clean["model"] == model) & clean["gpu"].isin(GPUS)]
        for (gpu, tp), cases in own.groupby(["gpu", "n_gpus"]):
            timing = Measured().timing(llm, catalog.gpu(GPUS[gpu]), int(tp))
            if timing is None or len(cases) < 2:
                continue
            of_gpu = requests[(requests["gpu"] == gpu) & (requests["n_gpus"] == tp)]
            for case in _predicted(compact(timing), of_gpu, cases):
                rows.append({"llm": llm.name, "gpu": gpu, "tp": int(tp), **case})
                click.echo(rows[-1])
    errors = np.array([row["error"] for row in rows])
    result = {
        "cases": len(rows),
        "median_abs_throughput": round(float(np.median(np.abs(errors))), 3),
        "p90_abs_throughput": round(float(np.quantile(np.abs(errors), 0.9)), 3),
        "bias": round(float(np.median(errors)), 3),
        "gpus_without_tables": skipped,
        "rows": rows,
    }
    write_result("pilot_error", result)
    click.echo({key: value for key, value in result.items() if key != "rows"})


def _predicted(
    time: IterationTime, requests: pd.DataFrame, cases: pd.DataFrame
) -> list[dict[str, Any]]:
    """All cases but the one with the fewest users, which calibrates."""
    cases = cases.sort_values("users")
    lowest = requests[requests["users"] == cases["users"].iloc[0]]
    time = _calibrated(time, lowest)
    found = []
    for case in cases.iloc[1:].to_dict("records"):
        own = requests[requests["users"] == case["users"]].sort_values("start_ms")
        lengths = list(
            zip(
                own["input_tokens"].clip(lower=1).astype(int).tolist(),
                own["output_tokens"].clip(lower=1).astype(int).tolist(),
                strict=True,
            )
        )
        rate, _ = closed_loop(
            time,
            KV_TOKENS,
            LIMITS,
            lengths,
            users=int(case["users"]),
            duration_s=float(case["duration_s"]),
        )
        found.append(
            {
                "users": int(case["users"]),
                "measured_tokens_per_s": float(case["output_tok_per_s"]),
                "predicted_tokens_per_s": round(rate, 2),
                "error": round(rate / case["output_tok_per_s"] - 1, 3),
            }
        )
    return found


def _calibrated(time: IterationTime, lowest: pd.DataFrame) -> IterationTime:
    """``time`` that meets the median gap and first token of one case: faster kernels where
    it was too slow, more between iterations where it was too fast."""
    gap_s = float(lowest["itl_mean_ms"].dropna().median()) / 1e3
    first_s = float((lowest["ttft_ms"] + lowest["ack_ms"]).median()) / 1e3
    prompts = lowest["input_tokens"].to_numpy(dtype=np.float64)
    step_s = time.decode_s(1, float(prompts.mean()))
    prompt_s = float(np.median([time.prefill_s(x, x * x) for x in prompts.tolist()]))
    scale, more_s = min(1.0, gap_s / step_s), max(0.0, gap_s - step_s)
    later_s = max(0.0, first_s - prompt_s)
    return replace(
        time,
        decode_base_s=time.decode_base_s * scale + more_s,
        decode_s_per_seq=time.decode_s_per_seq * scale,
        decode_s_per_context_token=time.decode_s_per_context_token * scale,
        prefill_base_s=time.prefill_base_s + later_s,
        prefill_floor_s=time.prefill_floor_s + later_s,
    )


if __name__ == "__main__":
    main()
