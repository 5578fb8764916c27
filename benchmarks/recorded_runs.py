"""Recorded runs of vLLM against the simulated engine: `plan simulate validate` for each.

    python benchmarks/recorded_runs.py --shared ../shared

Three runs of 300 requests that keep their engines full; the cost model is corrected by the
layer times of the same GPU and LLM, never by a run. Writes
benchmarks/results/recorded_runs.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from record import write_result


@click.command()
@click.option("--shared", default="../shared", show_default=True)
@click.option("--pictures", metavar="FOLDER", help="Draw the curves of each there.")
def main(shared: str, pictures: str | None) -> None:
    """Print and write measured beside simulated."""
    data = Path(shared) / "data"
    runs: list[dict[str, Any]] = []
    for meta in sorted((data / "vllm_e2e_runs").glob("*_meta.json")):
        stem = meta.name.removesuffix("_meta.json")
        command = [sys.executable, "-m", "foreserve", "simulate", "validate", "--json"]
        command += ["--run", str(meta.with_name(f"{stem}_requests.csv.gz"))]
        command += ["--meta", str(meta)]
        command += ["--profile", str(data / "llmservingsim_profile")]
        if pictures:
            command += ["--picture", str(Path(pictures) / f"{stem}.svg")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        errors = {row["metric"]: round(row["error"], 4) for row in found["compared"]}
        runs.append(
            {"run": stem, "preemptions": found["preemptions"], "errors": errors}
        )
        click.echo(runs[-1])
    write_result("recorded_runs", {"runs": runs})


if __name__ == "__main__":
    main()
