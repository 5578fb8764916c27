"""`plan drift`: what became of the plan, epoch by epoch, and whose fault misses were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import consoles, echo_json, json_option, print_parts
from foreserve.cli.forecast import Duration
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.drift import DriftTotal, EpochDrift, Measured
    from foreserve.planner.tables import Part

STATE = ".foreserve"
GIB = 2**30


@click.command(epilog="Example: plan drift run.jsonl.gz --plan plan.json --bin 1h")
@click.argument("journal", type=click.Path(path_type=Path), default=Path(STATE))
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(),
    help="Of a simulated run: the plan that it followed.",
)
@click.option(
    "--bin", "bin_s", type=Duration(), metavar="S", help="Add up epochs, e.g. 1h."
)
@json_option
def drift(
    journal: Path, plan_path: str | None, bin_s: float | None, as_json: bool
) -> None:
    """Compare a plan with what came: forecasts, predictions, prewarming, missed targets.

    JOURNAL is that of a simulation (`plan simulate --journal`), with --plan, or the state
    folder of a cluster that serves or has served (`plan serve --state`), by default
    .foreserve.
    """
    from foreserve.models.codec import to_plain
    from foreserve.models.drift import total
    from foreserve.planner.display import plural

    epochs = read(journal, plan_path)
    if as_json:
        rows = [row for epoch in epochs for row in epoch.llms]
        names = list(dict.fromkeys(row.llm for row in rows))
        echo_json(
            {
                "epochs": [to_plain(epoch) for epoch in epochs],
                "total": to_plain(total(rows)),
                "by_llm": {
                    name: to_plain(total(r for r in rows if r.llm == name))
                    for name in names
                },
            }
        )
        return
    out, _ = consoles(False)
    if not epochs:
        out.print("no epoch is over yet")
        return
    print_parts(out, parts(epochs, bin_s))
    late = sum(epoch.late for epoch in epochs)
    if late:
        out.print(f"{plural(late, 'request')} ended after the report of their epoch")


def read(journal: Path, plan_path: str | None) -> list[EpochDrift]:
    """The reports in a live cluster's journal, or those of a simulated run."""
    from functools import partial

    from foreserve.models.codec import load_plan
    from foreserve.planner.fleet import busy_s
    from foreserve.runtime.drift_reports import fold, read_drift
    from foreserve.runtime.journal import read_journal

    if journal.is_dir():
        journal = journal / "journal.jsonl"
        if plan_path is not None:
            raise InvalidInput(
                "a cluster's journal has its reports in it: leave the plan out",
                field="--plan",
            )
        return list(read_drift(journal))
    if plan_path is None:
        found = [] if journal.suffix == ".gz" else list(read_drift(journal))
        if not found:
            raise InvalidInput(
                "no reports in this journal",
                file=str(journal),
                hint="of a simulated run, give its plan: --plan plan.json",
            )
        return found
    plan = load_plan(plan_path)
    return list(fold(plan, read_journal(journal), partial(busy_s, plan.fleet)))


def parts(epochs: Sequence[EpochDrift], bin_s: float | None = None) -> list[Part]:
    """Tables: over time, and by LLM."""
    from foreserve.models.drift import BLAMES, MEASURES, total
    from foreserve.planner.display import clock, number, plural
    from foreserve.planner.tables import Part

    bins: dict[float, list[EpochDrift]] = {}
    for epoch in epochs:
        place = epoch.start_s if bin_s is None else epoch.start_s // bin_s * bin_s
        bins.setdefault(place, []).append(epoch)
    rows = [row for epoch in epochs for row in epoch.llms]
    names = list(dict.fromkeys(row.llm for row in rows))
    by_llm = {name: total(r for r in rows if r.llm == name) for name in names}
    whole = total(rows)
    counts = ("requests", "missed", *BLAMES, "peaks passed")
    time = Part(
        "[bold]Plan against actual[/]",
        ["from", *counts],
        [
            *(
                (clock(at_s), *_counts(total(r for e in own for r in e.llms)))
                for at_s, own in bins.items()
            ),
            ("all", *_counts(whole)),
        ],
        "missed: not answered within the targets, each with one blame. peaks passed: "
        "above the 95 % bound",
    )
    llms = Part(
        "[bold]By LLM[/]",
        ["LLM", *counts],
        [(name, *_counts(found)) for name, found in by_llm.items()],
    )
    every = [*by_llm.items(), ("all", whole)]
    warm = Part(
        "[bold]Prewarming[/]",
        ["LLM", "called for", "cold, waited for", "unused", "wasted GiB", "WARM GiB h"],
        [
            (
                name,
                *(_count(x) for x in (found.hits, found.misses, found.unused)),
                _count(round(found.wasted_bytes / GIB)),
                _count(round(found.warm_byte_s / GIB / 3600)),
            )
            for name, found in every
        ],
        "unused: WARM for half of an epoch or more without being called for",
    )
    off = Part(
        "[bold]Forecasts[/]",
        ["LLM", "requests/s off", "mean size", "peak off", "mean size"],
        [
            (
                name,
                _signed(found.rate_error_rps),
                number(found.rate_abs_error_rps),
                _signed(found.peak_error),
                number(found.peak_abs_error),
            )
            for name, found in every
        ],
        f"mean over {plural(whole.planned, 'forecast')}: actual less forecast",
    )
    model = Part(
        "[bold]Measured by predicted[/]",
        ["LLM", "TTFT", "TPOT", "load", "activate"],
        [
            (name, *(_ratio(getattr(found, which)) for which in MEASURES))
            for name, found in every
        ],
        "in brackets: of how many",
    )
    return [time, llms, warm, off, model]


def _counts(found: DriftTotal) -> Iterable[str]:
    from foreserve.models.drift import BLAMES

    numbers = (found.requests, found.missed, *(found.blame[x] for x in BLAMES))
    peaks = f"{found.passed}/{found.planned}" if found.planned else ""
    return (*map(_count, numbers), peaks)


def _count(value: int) -> str:
    return f"{value:,}" if value else ""


def _signed(value: float) -> str:
    from foreserve.planner.display import number

    return number(value) if value < 0 else f"+{number(value)}"


def _ratio(measured: Measured) -> str:
    from foreserve.planner.display import NONE

    if measured.ratio is None:
        return NONE
    return f"{measured.ratio:.2f} ({measured.count:,})"
