"""`plan explain`: why a plan is as it is, or why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import (
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    read_history,
    read_scenario,
    read_traces,
)
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.placement import Placement, ReplicaId
    from foreserve.models.plan import Plan
    from foreserve.models.problem import Fleet, Problem
    from foreserve.models.transitions import Transition
    from foreserve.planner.conflict import Conflict
    from foreserve.planner.explain import Obstacle
    from foreserve.planner.tables import Part
    from foreserve.solvers.result import Schedule, SolveOptions, SolveReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be explained: one epoch of a plan, or of a problem and its schedule."""

    fleet: Fleet
    before: Placement
    placement: Placement
    demand_rps: Mapping[str, float]
    terms: Mapping[str, float]
    problem: Problem | None = None
    """None for a plan without its trace and scenario."""
    schedule: Schedule = ()
    epoch: int = 0
    """Within ``problem``."""
    max_load: float = 1.0
    """Share of a replica's rate that is booked; 1 where nobody says."""
    bound: float = -math.inf
    """Of a solve of ``problem``."""
    transition: Transition | None = None
    """As the plan has it; None where it has none."""


@click.command(
    epilog="Example: plan explain plan.json --trace sample:azure-2023 --scenario "
    "sample:azure-2023 --epoch 3 --llm chat --block n0/0-1"
)
@click.argument("path", metavar="PLAN.json|PROBLEM.json[.gz]", type=click.Path())
@click.option("--epoch", default=0, type=click.IntRange(0), help="Counted from 0.")
@click.option("--trace", "traces", multiple=True, help="That the plan was made from.")
@click.option("--scenario", help="That the plan was made from.")
@click.option("--llm", help="Only this LLM's rows; with --block: why not there?")
@click.option("--block", "block_text", metavar="n0/0-3", help="GPUs of the question.")
@click.option("--more", is_flag=True, help="What one more GPU or node is worth.")
@click.option(
    "--split", is_flag=True, help="Where the gap to a perfect system is from."
)
@click.option("--solver", default="auto", show_default=True, help="For new solves.")
@click.option(
    "--time-limit",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds per new solve.",
)
@json_option
def explain(
    path: str,
    epoch: int,
    traces: tuple[str, ...],
    scenario: str | None,
    llm: str | None,
    block_text: str | None,
    more: bool,
    split: bool,
    solver: str,
    time_limit: float,
    as_json: bool,
) -> int:
    """What binds, what costs what, why not elsewhere; or why there is no plan.

    A plan is explained by itself; with its trace and scenario the problem of the epoch is
    made again, and costs by LLM and new solves are possible. Exit code 3: the problem has
    no plan, and the rules that are in conflict are printed.
    """
    from foreserve.cli import EXIT_NO_PLAN
    from foreserve.planner.explain import parse_block
    from foreserve.planner.explain_tables import conflict_lines
    from foreserve.solvers.result import SolveOptions

    if block_text and not llm:
        raise click.UsageError("--block needs --llm")
    if bool(traces) != bool(scenario):
        raise click.UsageError("--trace and --scenario go together")
    options = SolveOptions(time_limit_s=time_limit, gap=1e-4)
    subject = _subject(path, epoch, traces, scenario, solver, options)
    if not isinstance(subject, Subject):
        status, found = subject
        for line in conflict_lines(found):
            click.echo(line, err=as_json)
        if as_json:
            echo_json({"status": status, "conflict": found and asdict(found)})
        else:
            click.echo(f"no plan: {status}", err=True)
        return EXIT_NO_PLAN
    if llm and llm not in subject.fleet.llm_by_name:
        from foreserve.models.codec import did_you_mean

        hint = did_you_mean(llm, list(subject.fleet.llm_by_name))
        raise InvalidInput(f"no LLM {llm!r}", field="--llm", hint=hint)
    for flag, asked in (("--more", more), ("--split", split)):
        if asked and subject.problem is None:
            raise click.UsageError(f"{flag} needs --trace and --scenario")
    gpus = parse_block(block_text, subject.fleet.cluster) if block_text else None
    document, parts = _explained(subject, llm, gpus, more, solver, options)
    if split:
        facts, table = _split(subject, solver, options, as_json)
        document["split"] = facts
        parts.append(table)
    if as_json:
        echo_json({"file": path, "epoch": epoch, **document})
        return 0
    out, _ = consoles(False)
    print_parts(out, parts)
    if subject.problem is None:
        out.print(
            "[dim]costs by LLM, --more, --split: give --trace and --scenario too[/]"
        )
    return 0


def _subject(
    path: str,
    epoch: int,
    traces: Sequence[str],
    scenario: str | None,
    solver: str,
    options: SolveOptions,
) -> Subject | tuple[str, Conflict | None]:
    """What the file is about; where it is a problem without a plan, why."""
    from foreserve.cli.simulate import check_plan
    from foreserve.models import referee
    from foreserve.models.codec import load_plan, read_text
    from foreserve.planner.arena import read_problem
    from foreserve.planner.conflict import conflict
    from foreserve.solvers.base import solve

    packed = path.endswith(".gz")
    if not packed and not _is_problem(read_text(path)):
        plan = load_plan(path)
        check_plan(plan, path)
        _check_epoch(epoch, len(plan.epochs), path)
        return _of_plan(plan, epoch, traces, scenario)
    problem = read_problem(Path(path))
    _check_epoch(epoch, problem.num_epochs, path)
    solved = solve(problem, solver, options)
    if solved.schedule is None:
        return str(solved.report.status), conflict(problem, options)
    before = problem.initial if epoch == 0 else solved.schedule[epoch - 1]
    placement = solved.schedule[epoch]
    return Subject(
        fleet=problem.fleet,
        before=before,
        placement=placement,
        demand_rps=_demand(problem, epoch),
        terms={
            label: term(problem, epoch, before, placement)
            for label, term in referee.TERMS.items()
        },
        problem=problem,
        schedule=solved.schedule,
        epoch=epoch,
        bound=solved.report.bound,
    )


def _is_problem(text: str) -> bool:
    try:
        plain = json.loads(text)
    except json.JSONDecodeError:
        return False  # reading it as a plan says what is wrong
    return isinstance(plain, dict) and "demand_rps" in plain


def _check_epoch(epoch: int, epochs: int, path: str) -> None:
    if epoch >= epochs:
        hint = f"--epoch 0 to {epochs - 1}"
        raise InvalidInput(f"no epoch {epoch}", file=path, field="--epoch", hint=hint)


def _of_plan(
    plan: Plan, epoch: int, traces: Sequence[str], scenario: str | None
) -> Subject:
    from foreserve.planner.again import placement_before

    chosen = plan.epochs[epoch]
    problem, fleet, max_load = None, plan.fleet, 1.0
    demand: Mapping[str, float] = {row.llm: row.rate_rps for row in chosen.demand}
    terms = chosen.certificate.terms if chosen.certificate else {}
    if terms.get("O1") == 0:
        # All demand is served: an LLM that nothing serves is one left to WARM replicas.
        demand = {llm: r for llm, r in demand.items() if _served(chosen.placement, llm)}
    if scenario:
        problem = problem_of(plan, epoch, traces, scenario)
        fleet, demand = problem.fleet, _demand(problem, 0)
        max_load = read_scenario(scenario).runtime.max_load
    return Subject(
        fleet=fleet,
        before=placement_before(plan, epoch),
        placement=chosen.placement,
        demand_rps=demand,
        terms=terms,
        problem=problem,
        schedule=(chosen.placement,),
        max_load=max_load,
        bound=chosen.certificate.bound if chosen.certificate else -math.inf,
        transition=chosen.transition,
    )


def _served(placement: Placement, llm: str) -> bool:
    return any(replica.traffic_share > 0 for replica in placement.of(llm))


def problem_of(plan: Plan, epoch: int, traces: Sequence[str], scenario: str) -> Problem:
    """The problem that an epoch of a plan answers; InvalidInput if it is another's."""
    from foreserve.planner.again import problem_again, problems_again

    wanted = read_scenario(scenario)
    trace, history = read_traces(traces, {}), read_history(wanted, {})
    try:
        problems = problems_again(plan, wanted, trace, history)
        return problem_again(plan, problems, epoch)
    except InvalidInput as error:
        raise error.at(file=scenario) from None


def _demand(problem: Problem, epoch: int) -> Mapping[str, float]:
    rows = zip(problem.fleet.llms, problem.demand_rps, strict=True)
    return {llm.name: row[epoch] for llm, row in rows}


def _explained(
    subject: Subject,
    llm: str | None,
    gpus: tuple[Any, ...] | None,
    more: bool,
    solver: str,
    options: SolveOptions,
) -> tuple[dict[str, Any], list[Part]]:
    """The JSON document and the tables."""
    from foreserve.models.placement import replica_id
    from foreserve.models.transitions import transition
    from foreserve.planner.explain import gpu_limits, llm_limits, terms_by_llm
    from foreserve.planner.explain_tables import (
        limit_parts,
        terms_part,
        what_if_part,
    )
    from foreserve.planner.steps import steps_part, transition_facts
    from foreserve.planner.what_if import more_hardware
    from foreserve.solvers.base import SolverPool

    fleet, placement = subject.fleet, subject.placement
    gpu_rows = gpu_limits(fleet, placement)
    llm_rows = llm_limits(fleet, placement, subject.demand_rps)
    by_llm: Mapping[str, Mapping[str, float]] = {}
    if subject.problem is not None:
        by_llm = terms_by_llm(subject.problem, subject.epoch, subject.before, placement)
    if llm:
        asked = set(map(str, gpus or ()))
        gpu_rows = tuple(
            row
            for row in gpu_rows
            if row.gpu in asked or any(t.startswith(f"{llm} ") for t in row.replicas)
        )
        llm_rows = tuple(row for row in llm_rows if row.llm == llm)
        by_llm = {name: terms for name, terms in by_llm.items() if name == llm}
    move = subject.transition or transition(
        fleet, subject.before, placement, subject.demand_rps
    )
    document: dict[str, Any] = {
        "gpus": [
            asdict(row) | {"free_bytes": row.free_bytes, "binds": row.binds}
            for row in gpu_rows
        ],
        "llms": [asdict(row) for row in llm_rows],
        "terms": dict(subject.terms),
        "terms_by_llm": by_llm,
        "transition": transition_facts(move),
    }
    parts = limit_parts(gpu_rows, llm_rows)
    parts.append(terms_part(subject.terms, by_llm))
    if move.steps and not llm:
        parts.append(steps_part(move, "steps from the epoch before"))
    with ExitStack() as stack:
        base, pool = None, None
        if subject.problem is not None and (gpus or more):
            pool = stack.enter_context(SolverPool(solver, options))
            base = pool.solve(subject.problem, subject.schedule).report
        if llm and gpus:
            facts, tables = _why_not(subject, replica_id(llm, gpus), base, options)
            document["why_not"] = facts
            parts += tables
        if more and subject.problem is not None and base is not None and pool:
            worth = more_hardware(subject.problem, subject.schedule, base, pool)
            document["more"] = [asdict(row) for row in worth]
            parts.append(what_if_part("what one more would change", worth))
    return document, parts


def _split(
    subject: Subject, solver: str, options: SolveOptions, quiet: bool
) -> tuple[Mapping[str, Any], Part]:
    from foreserve.planner.explain_tables import split_facts, split_part
    from foreserve.planner.gap_split import NoStep, gap_split

    assert subject.problem is not None
    try:
        with progress_bar("solving from perfect to real", quiet) as update:
            found = gap_split(
                subject.problem,
                subject.schedule,
                options,
                solver=solver,
                max_load=subject.max_load,
                bound=subject.bound,
                progress=update,
            )
    except NoStep as failure:
        raise click.ClickException(f"--split: {failure}") from None
    return split_facts(found), split_part(found)


def _why_not(
    subject: Subject,
    key: ReplicaId,
    base: SolveReport | None,
    options: SolveOptions,
) -> tuple[Mapping[str, Any], list[Part]]:
    from foreserve.planner.explain import obstacles
    from foreserve.planner.explain_tables import seconds, what_if_part
    from foreserve.planner.tables import Part
    from foreserve.planner.what_if import held_there, repriced

    here = subject.placement.by_id.get(key)
    found: Sequence[Obstacle] = obstacles(subject.fleet, subject.placement, key)
    facts: dict[str, Any] = {
        "replica": str(key),
        "state": here.state if here else None,
        "obstacles": [asdict(row) for row in found],
        "added": {},
        "held": None,
    }
    rows = []
    for state in ("ACTIVE", "WARM"):
        limits = [row for row in found if row.state == state]
        text = f"({limits[0].label}) {limits[0].text}" if limits else "possible"
        if here is not None and here.state == state:
            text = "it is there"
        elif not limits and subject.problem is not None:
            more = repriced(
                subject.problem, subject.schedule, subject.epoch, key, state
            )
            facts["added"][state] = more
            if more is not None:
                text = f"possible; all else as it is, {seconds(more, '+')} s"
        rows.append((state, text))
    parts = [Part(f"{key}: why not?", ["state", "first limit"], rows)]
    possible = not any(row.label in ("plan", "C2") for row in found)
    if subject.problem is not None and base is not None and possible and not here:
        held = held_there(subject.problem, base, options, key, subject.epoch)
        facts["held"] = asdict(held)
        parts.append(what_if_part("if the plan had to hold it", [held]))
    return facts, parts
