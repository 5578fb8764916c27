"""The answer in the terminal: what goes where, how good that is, and what came of it.

Everything fits 100 columns and reads the same without colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from foreserve.models.memory import ledger
from foreserve.models.outcome import Run
from foreserve.models.placement import Replica
from foreserve.models.plan import Plan
from foreserve.models.specs import GpuId
from foreserve.planner.contents import (
    Table,
    comparison,
    drivers,
    interval_line,
    lead,
    service_brief,
)
from foreserve.planner.display import (
    clock,
    gib,
    gpu_span,
    number,
    percent,
    plural,
    seconds,
    usd,
)
from foreserve.planner.facts import PlanFacts, Solve, busiest, plan_facts

MAX_ROWS = 40
"""Rows of the GPU table that are shown."""


def summary(
    plan: Plan, solves: Sequence[Solve], runs: Sequence[Run]
) -> tuple[RenderableType, ...]:
    """What `plan solve` prints; ``solves`` and ``runs`` may be empty."""
    facts = plan_facts(plan)
    parts: list[RenderableType] = [
        Text(f"{line}\n") for line in lead(plan, facts, runs)
    ]
    parts += [_certificate(plan, facts, solves), Text()]
    parts += _placement(plan)
    if facts.certified:
        parts.append(_table("What drives the cost", drivers(facts)))
    parts.append(
        _table(
            "Predicted and simulated" if runs else "Predicted", comparison(plan, runs)
        )
    )
    return tuple(parts)


def run_summary(plan: Plan, runs: Sequence[Run]) -> tuple[RenderableType, ...]:
    """What `plan simulate` prints."""
    return (
        _table("Predicted and simulated", comparison(plan, runs)),
        _table("By LLM", service_brief(plan, runs)),
    )


def _certificate(
    plan: Plan, facts: PlanFacts, solves: Sequence[Solve]
) -> RenderableType:
    """Two columns: what is proven, and with what effort."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    solver = plan.solver
    if facts.certified:
        epochs = f"{facts.optimal} of {plural(facts.certified, 'epoch')} proven optimal"
        gap = f"{percent(facts.gap, 2)} ({percent(facts.gap_at_stake, 2)} of the value"
        rows = [
            ("status", f"{facts.status.value}: {epochs}"),
            ("objective", f"{number(facts.objective)} weighted seconds"),
            ("best bound", f"{number(facts.bound)}, summed over the epochs"),
            ("gap", f"{gap} at stake)"),
        ]
    else:
        rows = [("status", "no certificate")]
    used = f"{number(facts.gpu_hours)} GPU-hours, {usd(facts.cost_usd)}"
    ideal = f"{number(facts.perfect_gpus)} of {facts.gpus} GPUs if they could be split"
    if len(plan.epochs) > 1:
        rows.append(("stays", interval_line(plan, facts)))
    rows += [
        ("takes", used),
        ("at least", f"{ideal} at will, in the busiest epoch"),
        (
            "solver",
            f"{solver.name} ({solver.version}), seed {solver.seed}, "
            f"{plural(solver.threads, 'thread')}",
        ),
    ]
    if any(solve.stages for solve in solves):
        rows.append(("in order", _in_order(solves)))
    if solves:
        walls_s = [solve.wall_s for solve in solves]
        firsts = [s.time_to_first_s for s in solves if s.time_to_first_s is not None]
        first = f"; first plan after {seconds(max(firsts))} at most" if firsts else ""
        slowest = f"slowest epoch {seconds(max(walls_s))}{first}"
        rows.append(("time", f"{seconds(sum(walls_s))} in all, {slowest}"))
        stopped = sum(wall_s >= 0.95 * solver.time_limit_s for wall_s in walls_s)
        if stopped:
            rows.append(
                (
                    "note",
                    f"{plural(stopped, 'epoch')} ended at the limit of "
                    f"{seconds(solver.time_limit_s)}: another machine may find other plans",
                )
            )
    for name, value in rows:
        grid.add_row(Text(name), Text(value))
    return grid


def _in_order(solves: Sequence[Solve]) -> str:
    """How far each term is proven, where they were taken one after another: the bound of
    the sum says nothing then."""
    parts = []
    for label in dict.fromkeys(s.label for solve in solves for s in solve.stages):
        stages = [s for solve in solves for s in solve.stages if s.label == label]
        value = sum(stage.value for stage in stages)
        bound = sum(stage.bound for stage in stages)
        proven = "proven" if value - bound <= 1e-6 * max(1.0, value) else number(bound)
        parts.append(f"{label} {number(value)} ({proven})")
    return ", ".join(parts) + "; the gap above is to a perfect system"


def _placement(plan: Plan) -> Iterator[RenderableType]:
    """Who is where in the busiest epoch, GPUs that hold the same in one row."""
    index = busiest(plan)
    epoch = plan.epochs[index]
    held = epoch.placement.by_gpu
    free = {
        row.gpu: row.num_bytes
        for row in ledger(plan.fleet, epoch.placement)
        if row.kind == "free"
    }
    title = f"Busiest epoch: {index}, {clock(epoch.start_s)} to {clock(epoch.end_s)}"
    table = _rich(title, ("GPUs", "ACTIVE (share of its traffic)", "WARM", "free/GPU"))
    groups: list[list[GpuId]] = [
        list(same)
        for _, same in groupby(
            plan.fleet.cluster.gpus, key=lambda gpu: (gpu.node, held.get(gpu, ()))
        )
    ]
    for gpus in groups[:MAX_ROWS]:
        residents = held.get(gpus[0], ())
        active = [_named(r) for r in residents if r.state == "ACTIVE"]
        warm = [_named(r) for r in residents if r.state == "WARM"]
        least = min(free[gpu] for gpu in gpus)
        table.add_row(
            Text(gpu_span(gpus)),
            Text(", ".join(active), style="bold"),
            Text(", ".join(warm), style="dim"),
            Text(gib(least)),
        )
    yield table
    if len(groups) > MAX_ROWS:
        yield Text(f"and {len(groups) - MAX_ROWS} more rows; see the report\n")
    nowhere = [
        f"{row.llm} ({number(row.rate_rps)}/s)"
        for row in epoch.demand
        if row.rate_rps > 0 and not epoch.placement.of(row.llm)
    ]
    if nowhere:
        yield Text(
            f"Without a replica then, to be loaded on demand: {', '.join(nowhere)}\n"
        )


def _named(replica: Replica) -> str:
    tp = f" TP{replica.tp}" if replica.tp > 1 else ""
    share = (
        f" ({percent(replica.traffic_share, 0)})" if replica.state == "ACTIVE" else ""
    )
    return f"{replica.llm}{tp}{share}"


def _rich(title: str, head: Sequence[str]) -> RichTable:
    table = RichTable(
        box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False
    )
    table.title_style = "bold"
    for index, name in enumerate(head):
        last = index == len(head) - 1
        table.add_column(Text(name), justify="right" if last else "left")
    return table


def _table(title: str, content: Table) -> RichTable:
    table = _rich(title, content.head)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in content.rows:
        table.add_row(
            *(
                Text(cell, style="bold green" if i in row.best else "")
                for i, cell in enumerate(row.cells)
            )
        )
    return table
