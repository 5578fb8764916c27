"""Fit what engines add to their kernels, on measured deployments.

    python benchmarks/fit_corrections.py --shared ../shared

Reads `silicon_e2e`, keeps the columns and rows that `plan perf validate` needs in
`models/perf/data/silicon.csv.gz`, and writes `corrections.json` beside it: for dense LLMs
and for mixtures of experts the corrections fitted on everything, and for each (GPU, LLM)
pair those fitted on all other pairs, with intervals from the errors on pairs that were in
turn left out of *their* fit. Five numbers for each family and one for each engine in it;
nothing else is fitted.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import pandas as pd

from foreserve.models.codec import write_text
from foreserve.models.perf.calibrate import Slopes, corrections, fit, interval
from foreserve.models.perf.shipped import family, pair_name
from foreserve.planner.deployments import read_deployments

COLUMNS = [
    "system",
    "model_path",
    "backend",
    "backend_version",
    "precision",
    "isl",
    "osl",
    "concurrency",
    "tp_size",
    "pp_size",
    "attention_dp_size",
    "moe_ep_size",
    "gemm_quant_mode",
    "moe_quant_mode",
    "ttft_ms",
    "tpot_ms",
    "source",
]


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path())
@click.option("--into", default="models/perf/data/corrections.json", show_default=True)
def main(shared: str, into: str) -> None:
    """Write the shipped corrections."""
    path = Path(shared) / "data" / "silicon_e2e" / "silicon_dev.csv.gz"
    table = pd.read_csv(path, low_memory=False)
    table = table.loc[table["mode"] == "agg", COLUMNS]
    kept = Path(into).with_name("silicon.csv.gz")
    # A fixed header, so the same rows give the same bytes.
    table.to_csv(kept, index=False, compression={"method": "gzip", "mtime": 0})
    measured = read_deployments(str(kept))
    click.echo(f"{len(measured.deployments)} deployments; left out: {measured.skipped}")
    sets: dict[str, dict[str, dict[str, object]]] = {"all": {}}
    for kind in ("dense", "moe"):
        members = [d for d in measured.deployments if family(d.timing.llm) == kind]
        with click.progressbar(length=len(members), label=kind) as bar:
            slopes = Slopes.of(members, lambda done: bar.update(1))
        pairs = list(dict.fromkeys(d.pair for d in members))
        names = [pair_name(*pair) for pair in pairs]
        source = f"silicon_e2e, {kind}: {len(members)} runs of {len(pairs)} pairs"
        every = np.arange(len(pairs))
        sets["all"][kind] = _fitted(slopes, every, source)
        for i, name in enumerate(names):
            others = np.delete(every, i)
            sets.setdefault(name, {})[kind] = _fitted(
                slopes, others, f"{source}, without {name}"
            )
            click.echo(
                f"{kind} without {name}: {next(iter(sets[name][kind].values()))}"
            )
    text = json.dumps({"command": "python benchmarks/fit_corrections.py", "sets": sets})
    write_text(into, json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n")


def _fitted(slopes: Slopes, pairs: np.ndarray, source: str) -> dict[str, object]:
    """Corrections fitted on ``pairs``; intervals from each pair judged by the others."""
    errors = []
    for pair in pairs:
        rest = slopes.select(np.isin(slopes.groups, pairs[pairs != pair]))
        here = slopes.select(slopes.groups == pair)
        errors.append(here.log_errors(fit(rest)))
    ttft, tpot = (np.concatenate(parts) for parts in zip(*errors, strict=True))
    here = slopes.select(np.isin(slopes.groups, pairs))
    made = corrections(
        here,
        fit(here),
        ttft_interval=interval(ttft, len(pairs)),
        tpot_interval=interval(tpot, len(pairs)),
        source=source,
    )
    return {engine: asdict(known) for engine, known in made.items()}


if __name__ == "__main__":
    main()
