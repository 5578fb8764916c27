"""`plan compare`: the arena of solvers, and policies side by side on the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import click

from foreserve.cli.common import (
    consoles,
    echo_json,
    fresh_folder,
    json_option,
    progress_bar,
    quiet_option,
    read_history,
    read_scenario,
    read_traces,
    solver_options,
)
from foreserve.models.errors import InvalidInput

FORMATS = ("md", "csv", "json")


@click.command(
    epilog="Example: plan compare --trace sample:azure-2023 --scenario "
    "sample:azure-2023 --solvers milp,cpsat,greedy --output out"
)
@click.argument("instances", nargs=-1, metavar="[PROBLEM.json|LIBRARY]...")
@click.option("--trace", "traces", multiple=True, help="As for solve.")
@click.option("--scenario", help="As for solve.")
@click.option(
    "--solvers",
    default="milp,cpsat,greedy",
    show_default=True,
    help="Comma list; your own as package.module:function.",
)
@click.option(
    "--policies", default="", help="Comma list: also simulate these on the best plan."
)
@solver_options
@click.option(
    "--only", default="*", metavar="GLOBS", help="Instances by name, a comma list."
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, help="How many, from --seed on."
)
@click.option(
    "--update-best", is_flag=True, help="Keep better values and bounds in the library."
)
@click.option(
    "--muxserve-profile",
    "profile",
    type=click.Path(),
    metavar="CSV[.gz]",
    help="MuxServe's iteration times, for the instances that have its objective.",
)
@click.option(
    "--output", type=click.Path(), help="Folder for compare.md, .csv, .json, .html."
)
@click.option("--force", is_flag=True, help="Write into a folder that is not empty.")
@quiet_option
@json_option
def compare(
    instances: tuple[str, ...],
    traces: tuple[str, ...],
    scenario: str | None,
    solvers: str,
    policies: str,
    only: str,
    seeds: int,
    update_best: bool,
    profile: str | None,
    forecast: str | None,
    time_limit: float | None,
    gap: float | None,
    seed: int | None,
    threads: int | None,
    output: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run several solvers on the same problems, with the same limits.

    Problems are files (.json or .json.gz), those of a library (a folder with INDEX.json,
    such as benchmarks/instances), or the epochs of a trace. Files and libraries: every
    solver on every problem with every seed, each in a process of its own; the page shows
    what each knew when. Instances with MuxServe's objective have planners of
    their own. With a trace each solver plans the whole trace; `--policies` then simulates
    them on the first plan.
    """
    from foreserve.models.codec import write_text
    from foreserve.planner.tables import render

    names = _names(solvers)
    if bool(instances) == bool(traces):
        raise click.UsageError("give problem files, or --trace with --scenario")
    if traces and not scenario:
        raise click.UsageError("--trace needs --scenario")
    folder = fresh_folder(output, force) if output else None
    limits = {"time_limit": time_limit, "gap": gap, "seed": seed, "threads": threads}
    run_rows: list[Mapping[str, object]] = []
    mux_rows: list[Mapping[str, object]] = []
    if instances:
        rows, mux_rows = _arena(
            instances,
            only,
            names,
            limits,
            seeds,
            update_best,
            profile,
            folder,
            quiet or as_json,
        )
    else:
        rows, run_rows = _trace_rows(
            traces,
            str(scenario),
            names,
            [name for name in policies.split(",") if name],
            {**limits, "method": forecast},
            quiet or as_json,
        )
        for fmt in FORMATS if folder else ():
            write_text(Path(str(folder)) / f"compare.{fmt}", render(rows, fmt))
            if run_rows:
                write_text(Path(str(folder)) / f"policies.{fmt}", render(run_rows, fmt))
    if as_json:
        echo_json({"solvers": rows, "policies": run_rows, "muxserve": mux_rows})
        return
    out, _ = consoles(quiet)
    for table in (rows, run_rows, mux_rows):
        if table:
            out.print(render(table, "md"), markup=False, soft_wrap=True)
    if folder:
        kinds = ".csv, .json and .html" if instances else ".csv and .json"
        out.print(f"written to {folder}/compare.md, {kinds}", markup=False)


def _names(solvers: str) -> list[str]:
    from foreserve.models.codec import did_you_mean
    from foreserve.solvers.base import SOLVERS

    names = [name.strip() for name in solvers.split(",") if name.strip()]
    for name in names:
        if name not in SOLVERS and ":" not in name:
            hint = did_you_mean(name, list(SOLVERS))
            raise InvalidInput(f"unknown solver {name!r}", field="--solvers", hint=hint)
    if not names:
        raise InvalidInput("no solver given", field="--solvers")
    return names


def _arena(
    paths: tuple[str, ...],
    only: str,
    solvers: list[str],
    limits: Mapping[str, object],
    seeds: int,
    update: bool,
    profile: str | None,
    folder: Path | None,
    quiet: bool,
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    """Run the arena and write what is asked for; its rows, and those of instances with
    MuxServe's objective."""
    from foreserve.models.codec import write_text
    from foreserve.planner import arena, mux_arena
    from foreserve.planner.arena_page import page
    from foreserve.planner.scenario import SolverPart
    from foreserve.planner.tables import render
    from foreserve.solvers.result import SolveOptions

    given = {key: value for key, value in limits.items() if value is not None}
    part = SolverPart(**given)  # type: ignore[arg-type]
    options = SolveOptions(
        time_limit_s=part.time_limit, gap=part.gap, seed=part.seed, threads=part.threads
    )
    libraries = [Path(path) for path in paths if Path(path).is_dir()]
    if update and not libraries:
        raise InvalidInput("needs a library of instances", field="--update-best")

    def asked(name: str) -> bool:
        return any(fnmatch(name, glob) for glob in only.split(","))

    instances = [
        instance
        for instance in arena.find_instances([Path(path) for path in paths])
        if asked(instance.name)
    ]
    others = [
        instance
        for library in libraries
        for instance in mux_arena.read_mux_library(library)
        if asked(instance.name)
    ]
    if not instances and not others:
        raise InvalidInput(f"no instance is called {only!r}", field="--only")
    mux: list[mux_arena.MuxEntry] = []
    if others and profile is None:
        hint = "give --muxserve-profile"
        if not instances:
            raise InvalidInput(
                "MuxServe's instances need its profile", field="--only", hint=hint
            )
        _, err = consoles(quiet)
        err.print(f"{len(others)} of MuxServe's instances are left out: {hint}")
    elif others and profile is not None:
        times = mux_arena.read_profile(Path(profile))
        with progress_bar("MuxServe's instances", quiet) as update_bar:
            mux = mux_arena.compete_mux(others, times, part.time_limit, update_bar)
    with progress_bar("solving", quiet) as update_bar:
        entries = arena.compete(
            instances,
            solvers,
            range(part.seed, part.seed + seeds),
            options,
            update_bar,
        )
    # Against the best that anybody knows, these solvers included.
    instances = [
        replace(
            instance,
            best=arena.reference(instance, entries),
            bound=arena.proven(instance, entries),
        )
        for instance in instances
    ]
    rows = [
        arena.row(entry, instance.best, instance.bound)
        for instance in instances
        for entry in entries
        if entry.instance == instance.name
    ]
    mux_rows = [mux_arena.mux_row(entry) for entry in mux]
    if update:
        for library in libraries:
            arena.update_index(library, entries)
            mux_arena.update_mux_index(library, mux, "plan compare")
    if folder:
        stated = (
            f"Time limit {part.time_limit:g} s, gap {part.gap:g}, "
            f"{part.threads} thread(s), {seeds} seed(s)."
        )
        html = page(instances, entries, rows, stated, mux_rows)
        write_text(folder / "compare.html", html)
        curves = [
            {**row, "progress": [list(point) for point in entry.report.progress]}
            for row, entry in zip(rows, entries, strict=True)
        ]
        write_text(folder / "compare.json", render(curves, "json"))
        for fmt in ("md", "csv"):
            write_text(folder / f"compare.{fmt}", render(rows, fmt))
        for fmt in FORMATS if mux_rows else ():
            write_text(folder / f"muxserve.{fmt}", render(mux_rows, fmt))
    return rows, mux_rows


def _trace_rows(
    traces: tuple[str, ...],
    scenario: str,
    solvers: list[str],
    policies: list[str],
    overrides: Mapping[str, object],
    quiet: bool,
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    from foreserve.cli.simulate import run_policies
    from foreserve.cli.solve import facts
    from foreserve.planner.pipeline import Planned, plan_trace
    from foreserve.planner.tables import outcome_row

    inputs: dict[str, str] = {}
    trace = read_traces(traces, inputs)
    rows: list[Mapping[str, object]] = []
    plans: list[Planned] = []
    for name in solvers:
        wanted = read_scenario(scenario, name=name, **overrides)
        history = read_history(wanted, inputs)
        with progress_bar(f"solving with {name}", quiet) as update:
            planned = plan_trace(
                wanted, trace, history=history, inputs=inputs, progress=update
            )
        plans.append(planned)
        stated = facts(planned)
        rows.append(
            {
                "instance": scenario.removeprefix("sample:"),
                "solver": name,
                **{
                    key: stated[key]
                    for key in (
                        "status",
                        "objective",
                        "bound",
                        "gap",
                        "gap_at_stake",
                        "time_to_first_plan_s",
                        "wall_s",
                        "gpu_hours",
                        "version",
                        "seed",
                        "threads",
                    )
                },
            }
        )
    runs = run_policies(
        plans[0].plan,
        trace,
        policies,
        plans[0].plan.solver.seed,
        wanted.runtime.keep_alive,
        quiet,
    )
    return rows, [outcome_row(run.outcome) for run in runs]
