"""`plan diff`: what is different between two plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from foreserve.cli.common import consoles, echo_json, json_option, print_parts

if TYPE_CHECKING:
    from foreserve.planner.diff import EpochDiff
    from foreserve.planner.tables import Part

GIB = 2**30


@click.command(epilog="Example: plan diff yesterday.json today.json --exit-code")
@click.argument("first", metavar="A.json", type=click.Path())
@click.argument("second", metavar="B.json", type=click.Path())
@click.option("--exit-code", is_flag=True, help="Exit with 1 if they differ.")
@click.option("--steps", is_flag=True, help="Also the order in which to switch over.")
@json_option
def diff(first: str, second: str, exit_code: bool, steps: bool, as_json: bool) -> int:
    """What appears, moves or changes state from plan A to plan B, epoch by epoch."""
    from dataclasses import asdict

    from foreserve.cli.simulate import check_plan
    from foreserve.models.codec import load_plan
    from foreserve.planner.diff import diff_plans
    from foreserve.planner.steps import transition_facts

    plans = load_plan(first), load_plan(second)
    for plan, path in zip(plans, (first, second), strict=True):
        check_plan(plan, path)
    found = diff_plans(*plans)
    code = int(exit_code and not found.same)
    if as_json:
        document = asdict(found)
        for row, epoch in zip(document["epochs"], found.epochs, strict=True):
            row["transition"] = transition_facts(epoch.transition)
        echo_json({"same": found.same, **document})
        return code
    out, _ = consoles(False)
    for line in (*found.fleet, *found.spans):
        out.print(f"different: {line}", markup=False, highlight=False)
    if found.same:
        out.print("the plans place and serve alike", markup=False)
    print_parts(out, (part for epoch in found.epochs for part in _parts(epoch, steps)))
    return code


def _parts(epoch: EpochDiff, steps: bool) -> list[Part]:
    from foreserve.planner.steps import steps_part
    from foreserve.planner.tables import Part

    if not epoch.changes:
        return []
    rows = [
        (
            change.llm,
            change.kind,
            change.gpus,
            f"{change.was} → {change.now}".strip() if change.now else change.was,
            f"{change.moved_bytes / GIB:.1f}" if change.moved_bytes else "",
            f"{change.load_s:.1f}" if change.moved_bytes else "",
        )
        for change in epoch.changes
    ]
    move = epoch.transition
    lost = f", {move.outages} LLMs out of service on the way" if move.outages else ""
    if move.exposures:
        lost += f", {move.exposures} steps without a spare"
    span = f"{epoch.start_s:g} to {epoch.end_s:g} s"
    parts = [
        Part(
            f"[bold]{span}[/]",
            ["LLM", "change", "GPUs", "state", "GiB", "load s"],
            rows,
            f"to switch over: {len(move.steps)} steps, {move.seconds:.1f} s{lost}",
        ),
        Part(
            "cost, s of delay",
            ["term", "A", "B", "B - A"],
            [_cost_row(label, *pair) for label, pair in epoch.costs.items()],
        ),
    ]
    if steps:
        parts.append(steps_part(move))
    return parts


def _cost_row(label: str, old: float | None, new: float | None) -> tuple[str, ...]:
    from foreserve.planner.explain_tables import seconds

    more = None if old is None or new is None else new - old
    return label, seconds(old), seconds(new), seconds(more, "+")
