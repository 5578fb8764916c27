"""`plan simulate`: run a plan, and other policies beside it, against a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    check_parent,
    check_same_cluster,
    compile_simulator,
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    quiet_option,
    read_history,
    read_scenario,
    read_traces,
)
from foreserve.cli.forecast import Duration

if TYPE_CHECKING:
    from foreserve.models.faults import Fault
    from foreserve.models.outcome import Outcome, Run
    from foreserve.models.placement import Placement
    from foreserve.models.plan import Plan
    from foreserve.planner.policies.rolling import Online
    from foreserve.planner.scenario import Scenario
    from foreserve.planner.studies import Interval
    from foreserve.traces.trace import Trace

KEEP_ALIVE_S = 30.0


@click.command(
    epilog="Example: plan simulate plan.json --trace sample:fleet-day "
    "--policy planned --policy reactive --seed 1"
)
@click.argument("plan_file", metavar="PLAN")
@click.option("--trace", "traces", multiple=True, required=True, help="As for solve.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("planned",),
    show_default=True,
    help="planned, reactive, reactive-keep, ratio, or rolling, which plans while it runs; "
    "repeat to compare on equal GPUs.",
)
@click.option(
    "--scenario",
    help="Check that the plan fits this scenario's cluster, and load as its `runtime` "
    "says instead of as the plan assumed.",
)
@click.option(
    "--faults",
    "fault_file",
    metavar="FILE",
    help="Script of what breaks when, YAML or JSON.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Load-time noise.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    metavar="N",
    help="Run with N seeds, from --seed on: mean and 95 % interval of each metric.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Processes for --seeds.  [default: one per CPU, which is also the most]",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[auto|local|HOST:PORT]",
    help="Run --seeds on a Ray cluster: this machine's, one started here, or another.",
)
@click.option(
    "--keep-alive",
    type=click.FloatRange(0),
    default=KEEP_ALIVE_S,
    show_default=True,
    metavar="S",
    help="How long a replica started on demand stays ACTIVE without requests.",
)
@click.option(
    "--journal",
    type=click.Path(),
    help="Write every event as JSON lines (.jsonl or .jsonl.gz); one policy only.",
)
@click.option(
    "--series",
    metavar="FILE.csv[.gz]|.parquet",
    help="Write load, delays, throughput and GPUs over time, by LLM.",
)
@click.option(
    "--bin",
    "bin_s",
    type=Duration(),
    metavar="S",
    help="Bins of --series, e.g. 10s.  [default: the plan's epochs]",
)
@click.option("--report", type=click.Path(), help="Write an HTML report here.")
@quiet_option
@json_option
def simulate(
    plan_file: str,
    traces: tuple[str, ...],
    policies: tuple[str, ...],
    scenario: str | None,
    fault_file: str | None,
    seed: int,
    seeds: int | None,
    workers: int | None,
    ray: str | None,
    keep_alive: float,
    journal: str | None,
    series: str | None,
    bin_s: float | None,
    report: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a plan against a trace in virtual time. Same seed, same bytes.

    With --seeds the report and the series show the first one.
    """
    from foreserve.cli.seeds import run_seeds
    from foreserve.cli.series import check_series, write_series
    from foreserve.cli.solve import command_line
    from foreserve.models.codec import load_plan
    from foreserve.models.faults import load_faults
    from foreserve.planner.report import write_report
    from foreserve.planner.studies import intervals, study_part
    from foreserve.planner.summary import run_summary

    check_parent(journal, report)
    check_series(series)
    if bin_s and not series:
        raise click.UsageError("--bin needs --series")
    if journal and len(policies) > 1:
        raise click.UsageError("--journal takes one --policy, not several")
    if journal and seeds:
        raise click.UsageError("--journal takes one --seed, not --seeds")
    if workers and not seeds:
        raise click.UsageError("--workers needs --seeds")
    if ray and not seeds:
        raise click.UsageError("--ray needs --seeds")
    if ray and workers:
        raise click.UsageError("--workers is for processes here, not for --ray")
    plan = load_plan(plan_file)
    check_plan(plan, plan_file)
    trace = read_traces(traces, {})
    online = None
    if "rolling" in policies and scenario and not seeds:
        online = what_to_plan_with(plan, read_scenario(scenario), trace)
    if scenario:
        wanted = read_scenario(scenario)
        check_same_cluster(plan, wanted, plan_file)
        own = replace(
            plan.fleet,
            loading=wanted.runtime.loading(),
            serving=wanted.runtime.serving(),
        )
        plan = replace(plan, fleet=own)
    faults = load_faults(fault_file, plan.fleet) if fault_file else ()
    numbers = range(seed, seed + (seeds or 1))
    silent = quiet or as_json
    if seeds:
        runs, by_seed = run_seeds(
            plan, trace, policies, numbers, keep_alive, silent, workers, ray, faults
        )
    else:
        runs = run_policies(
            plan, trace, policies, seed, keep_alive, silent, journal, faults, online
        )
        by_seed = []
    if series:
        write_series(series, runs, bin_s)
    if report:
        write_report(
            report,
            plan=plan,
            solves=(),
            runs=runs,
            title=f"Simulation of {Path(plan_file).name}",
            command=command_line(),
        )
    stated = {"seed": seed, "outcomes": outcomes(runs), "report": report}
    if online:
        stated["solves"] = [asdict(solve) for solve in online.solves]
    out, _ = consoles(quiet)
    if seeds:
        studies = [intervals(own) for own in zip(*by_seed, strict=True)]
        if as_json:
            echo_json(stated | study(policies, numbers, by_seed, studies))
        else:
            print_parts(out, [study_part(policies, studies, seeds)])
    elif as_json:
        echo_json(stated)
    else:
        for part in run_summary(plan, runs):
            out.print(part)
        for line in replanned(online):
            out.print(line, markup=False)


def what_to_plan_with(plan: Plan, scenario: Scenario, trace: Trace) -> Online:
    """The plan's problems and the scenario's solver, for a policy that plans online."""
    from foreserve.planner.again import problems_again
    from foreserve.planner.pipeline import solve_options
    from foreserve.planner.policies.rolling import Online

    history, part = read_history(scenario, {}), scenario.solver
    problems = problems_again(plan, scenario, trace, history, part.horizon)
    return Online(problems=problems, solver=part.name, options=solve_options(scenario))


def replanned(online: Online | None) -> Iterator[str]:
    """When and why epochs were planned again before they were over."""
    from foreserve.planner.display import clock, plural

    if online is None:
        return
    early = [solve for solve in online.solves if solve.reasons]
    yield f"rolling planned {plural(len(online.solves) - len(early), 'epoch')}"
    for solve in early:
        why = "; ".join(reason.text for reason in solve.reasons)
        yield f"{clock(solve.at_s)}, within epoch {solve.epoch}: {why}"


def study(
    policies: Sequence[str],
    seeds: Iterable[int],
    by_seed: Sequence[Sequence[Outcome]],
    studies: Sequence[Mapping[str, Interval]],
) -> dict[str, object]:
    """What ``--seeds`` adds to the JSON document."""
    from foreserve.models.codec import to_plain

    rows = zip(seeds, by_seed, strict=True)
    return {
        "seeds": [
            {"seed": k, "outcomes": [to_plain(o) for o in own]} for k, own in rows
        ],
        "intervals": [
            {"policy": policy, "metrics": {k: to_plain(v) for k, v in found.items()}}
            for policy, found in zip(policies, studies, strict=True)
        ],
    }


def run_policies(
    plan: Plan,
    trace: Trace,
    policies: Sequence[str],
    seed: int,
    keep_alive_s: float,
    quiet: bool,
    journal: str | None = None,
    faults: Sequence[Fault] = (),
    online: Online | None = None,
) -> tuple[Run, ...]:
    """One simulated run per policy, on the plan's fleet and over the plan's span."""
    trace = check_policies(plan, trace, policies, keep_alive_s, online)
    compile_simulator(quiet)
    runs = []
    for name in policies:
        with progress_bar(f"simulating {name}", quiet) as update:
            runs.append(
                run_policy(
                    plan,
                    trace,
                    name,
                    seed,
                    keep_alive_s,
                    journal,
                    faults,
                    update,
                    online=online,
                )
            )
    return tuple(runs)


def check_policies(
    plan: Plan,
    trace: Trace,
    policies: Sequence[str],
    keep_alive_s: float,
    online: Online | None = None,
) -> Trace:
    """The trace with the plan's LLMs; what would fail a run later is an error now."""
    from foreserve.planner.fleet import align
    from foreserve.planner.policies import get_policy

    for name in policies:
        get_policy(name, plan, keep_alive_s, online)
    return align(trace, tuple(llm.name for llm in plan.fleet.llms))


def run_policy(
    plan: Plan,
    trace: Trace,
    name: str,
    seed: int,
    keep_alive_s: float,
    journal: str | None = None,
    faults: Sequence[Fault] = (),
    progress: Callable[[float], None] | None = None,
    initial: Placement | None = None,
    online: Online | None = None,
) -> Run:
    """One simulated run, of an empty cluster or of one with ``initial`` in place; ``trace``
    has the plan's LLMs in their order."""
    from foreserve.planner.policies import get_policy
    from foreserve.runtime.simulated import simulate as run

    policy = get_policy(name, plan, keep_alive_s, online)
    with ExitStack() as stack:
        if isinstance(policy, AbstractContextManager):
            stack.enter_context(policy)
        return run(
            plan.fleet,
            trace,
            policy,
            start_s=plan.start_s,
            end_s=plan.end_s,
            seed=seed,
            load_bin_s=plan.epochs[0].end_s - plan.epochs[0].start_s,
            journal=journal,
            faults=faults,
            progress=progress,
            initial=initial,
        )


def outcomes(runs: Sequence[Run]) -> list[object]:
    """The runs' outcomes as plain data."""
    from foreserve.models.codec import to_plain

    return [to_plain(run.outcome) for run in runs]


def check_plan(plan: Plan, file: str) -> None:
    """Every placement must pass the referee's rows that need no demand, and stored steps
    must lead there."""
    from foreserve.models.errors import InvalidInput
    from foreserve.models.placement import Placement
    from foreserve.models.referee import fleet_violations
    from foreserve.models.transitions import leads

    before = Placement()
    for index, epoch in enumerate(plan.epochs):
        found = list(fleet_violations(plan.fleet, epoch.placement))
        if found:
            label, message = found[0]
            raise InvalidInput(
                f"({label}) {message}",
                file=file,
                field=f"epochs.{index}.placement",
                hint=f"{len(found)} rows are broken in this epoch; solve again",
            )
        change, there = epoch.transition, epoch.placement
        if change is not None and not leads(plan.fleet, before, there, change):
            raise InvalidInput(
                "the steps do not lead from the placement before to this one",
                file=file,
                field=f"epochs.{index}.transition",
                hint="solve again, or leave transition out",
            )
        before = there
