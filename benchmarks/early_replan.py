"""Planning while it runs against a plan made epoch by epoch, when a node is lost.

    python benchmarks/early_replan.py

Four hours of the shipped fleet-day sample (9h to 13h, no history: the first epochs are
planned blind), epochs of 15 minutes on three nodes of four GPUs, of which one is lost for
an hour within an epoch. ``planned`` follows a plan that knows of no loss; ``rolling`` makes
the same plan as it goes, and again when a reason comes up. Both start replicas on demand.
Writes benchmarks/results/early_replan.json.
"""

from __future__ import annotations

from dataclasses import replace
from os import getloadavg
from typing import Any

import click
from record import write_result

from foreserve.cli.common import read_scenario, read_traces
from foreserve.cli.simulate import run_policies, what_to_plan_with
from foreserve.cli.solve import run_solve
from foreserve.models.faults import Fault

BEGIN_S, END_S, LOST_S, BACK_S = 9 * 3600.0, 13 * 3600.0, 7500.0, 3600.0


@click.command()
def main() -> None:
    """Plan, simulate both with and without the loss, write the table."""
    scenario = read_scenario("sample:fleet-day", name="milp", time_limit=2.0)
    scenario = replace(
        scenario,
        forecast=replace(scenario.forecast, method="last", history=None),
    )
    day = read_traces(["sample:fleet-day"], {})
    part = day.between(BEGIN_S, END_S)
    trace = replace(part, arrival_s=part.arrival_s - BEGIN_S)
    plan = run_solve(scenario, trace, {}, quiet=True).plan
    lost = Fault(at=LOST_S, kind="node-loss", target="n1", for_=BACK_S)
    rows: list[dict[str, Any]] = []
    for faults in ((), (lost,)):
        for policy in ("planned", "rolling"):
            online = what_to_plan_with(plan, scenario, trace)
            (run,) = run_policies(
                plan, trace, [policy], 0, 30.0, True, None, faults, online
            )
            total = run.outcome.total
            early = [solve for solve in online.solves if solve.reasons]
            rows.append(
                {
                    "policy": policy,
                    "node_lost": bool(faults),
                    "slo_attainment": round(total.slo_attainment, 5),
                    "ttft_mean_s": round(total.ttft.mean_s, 4),
                    "ttft_p99_s": round(total.ttft.p99_s, 4),
                    "gpu_hours": round(run.outcome.gpu_hours["total"], 2),
                    "loads": run.outcome.loads,
                    "cold_starts": run.outcome.cold_starts,
                    "failed_solves": sum(bool(s.failed) for s in online.solves),
                    "early": [
                        f"{s.at_s:.0f} s: {'; '.join(r.text for r in s.reasons)}"
                        for s in early
                    ],
                }
            )
            click.echo(str(rows[-1]))
    requests = len(trace)
    load = round(getloadavg()[0], 1)
    write_result(
        "early_replan", {"requests": requests, "load_average": load, "rows": rows}
    )


if __name__ == "__main__":
    main()
