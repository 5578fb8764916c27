"""Throughput of closed-loop cases on real servers, each calibrated on its lightest case.

    python benchmarks/pilot_error.py --shared ../shared

Runs `plan simulate validate --pilot` on `llm_pilot` (see planner/recorded_pilot.py) and
writes benchmarks/results/pilot_error.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
from record import write_result


@click.command()
@click.option("--shared", default="../shared", show_default=True)
def main(shared: str) -> None:
    """Write every case and the errors; print the errors."""
    folder = str(Path(shared) / "data" / "llm_pilot")
    command = ["-m", "foreserve", "simulate", "validate", "--json", "--pilot", folder]
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    for case in found["cases"]:
        case["predicted_tokens_per_s"] = round(case["predicted_tokens_per_s"], 2)
        case["error"] = round(case["error"], 3)
    errors = {key: round(value, 3) for key, value in found["errors"].items()}
    write_result(
        "pilot_error",
        {
            "predicted": len(found["cases"]),
            "abs_throughput_error": errors,
            "left_out": found["left_out"],
            "rows": found["cases"],
        },
    )
    click.echo(errors)


if __name__ == "__main__":
    main()
