"""Error of the roofline against measured deployments (silicon_e2e, bf16 dense, H100).

    python benchmarks/roofline_error.py --shared ../shared

Nothing is fitted to these rows: the roofline's efficiencies are stated constants. Prints,
and writes to benchmarks/results/roofline_error.json, the errors behind the
`relative_error` that the cost model carries.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pandas as pd
from record import write_result

from foreserve.models import catalog
from foreserve.models.cost import Roofline

LLMS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Qwen/Qwen3-32B": "qwen3-32b",
}


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path())
def main(shared: str) -> None:
    """Median and 90th percentile of the absolute error of TPOT, by LLM and TP."""
    path = Path(shared) / "data" / "silicon_e2e" / "silicon_dev.csv.gz"
    rows = pd.read_csv(path, low_memory=False)
    rows = rows[
        (rows["system"] == "h100_sxm")
        & (rows["mode"] == "agg")
        & rows["precision"].isna()
        & rows["model_path"].isin(LLMS)
        & (rows["pp_size"] == 1)
    ]
    perf, gpu, errors = Roofline(), catalog.gpu("h100"), []
    for row in rows.to_dict("records"):
        llm = catalog.llm(LLMS[row["model_path"]])
        time = perf.iteration(llm, gpu, int(row["tp_size"]))
        batch, isl, osl = row["concurrency"], row["isl"], row["osl"]
        step_s = time.decode_s(batch, batch * (isl + osl / 2))
        tpot_s = step_s + batch / osl * time.prefill_s(isl, isl**2)
        measured_s = row["tpot_ms"] / 1e3
        errors.append(
            {
                "llm": llm.name,
                "tp": int(row["tp_size"]),
                "backend": row["backend"],
                "error": tpot_s / measured_s - 1,
            }
        )
    table = pd.DataFrame(errors)
    summary = {"all": _summary(table)}
    for key, group in table.groupby(["llm", "tp", "backend"]):
        summary[" ".join(map(str, key))] = _summary(group)
    write_result("roofline_error", summary)
    click.echo(json.dumps(summary, indent=1))


def _summary(table: pd.DataFrame) -> dict[str, float | int]:
    error = table["error"].to_numpy()
    low, middle, high = np.percentile(np.abs(error), (50, 80, 90))
    return {
        "rows": len(error),
        "median_abs": round(float(low), 3),
        "p80_abs": round(float(middle), 3),
        "p90_abs": round(float(high), 3),
        "bias": round(float(np.median(error)), 3),
    }


if __name__ == "__main__":
    main()
