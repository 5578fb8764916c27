"""`plan size`: the least cluster for a trace and its SLOs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    check_parent,
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

if TYPE_CHECKING:
    from foreserve.models.plan import Plan
    from foreserve.planner.scenario import Scenario
    from foreserve.planner.sizing import Sizing
    from foreserve.traces.trace import Demand, Trace


@click.command(
    epilog="Example: plan size --trace sample:azure-2023 --scenario sample:azure-2023 "
    "--gpu h100 --gpu a100-80gb --target 99"
)
@click.option("--trace", "traces", multiple=True, required=True, help="As for solve.")
@click.option("--scenario", required=True, help="LLMs, SLOs, runtime; as for solve.")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    help="GPU type to size for; repeat to compare.  [default: the scenario's first]",
)
@click.option(
    "--target",
    type=click.FloatRange(0, 100, min_open=True),
    default=99.0,
    show_default=True,
    metavar="PERCENT",
    help="Of the requests, of every LLM and of all, to be within their SLO.",
)
@click.option(
    "--per-node",
    type=click.IntRange(1, 16),
    default=8,
    show_default=True,
    help="GPUs of a node.",
)
@click.option(
    "--step",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Try multiples of so many GPUs.",
)
@click.option(
    "--most", type=click.IntRange(1), default=256, show_default=True, help="GPUs."
)
@click.option("--solver", help="Instead of the scenario's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(), help="Write the answer's plan here.")
@quiet_option
@json_option
def size(
    traces: tuple[str, ...],
    scenario: str,
    gpus: tuple[str, ...],
    target: float,
    per_node: int,
    step: int,
    most: int,
    solver: str | None,
    seed: int,
    output: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """How many GPUs, of which type, and what they cost.

    Every size that is tried is planned and simulated. Exit code 3: not even --most GPUs of
    any type are enough.
    """
    from foreserve.cli import EXIT_NO_PLAN
    from foreserve.models.codec import to_json, write_text
    from foreserve.planner import sizing

    check_parent(output)
    wanted = read_scenario(scenario, name=solver)
    trace = read_traces(traces, {})
    history = read_history(wanted, {})
    silent = quiet or as_json
    compile_simulator(silent)
    types = gpus or (wanted.cluster.nodes[0].gpu,)
    found: list[tuple[Sizing, Plan | None]] = [
        _size(
            wanted,
            trace,
            history,
            gpu,
            target / 100,
            per_node,
            step,
            most,
            seed,
            silent,
        )
        for gpu in types
    ]
    sizings = [one for one, _ in found]
    enough = [(s.answer.usd_per_h, plan) for s, plan in found if s.answer is not None]
    if output and enough:
        plan = min(enough, key=lambda pair: pair[0])[1]
        assert plan is not None
        write_text(output, to_json(plan))
    out, err = consoles(quiet)
    if as_json:
        document = {"target": target / 100, "sizings": [*map(sizing.plain, sizings)]}
        echo_json(document)
    else:
        print_parts(out, sizing.parts(sizings, target / 100))
    if not enough:
        err.print(f"not even {most} GPUs are enough for {target:g} %")
        return EXIT_NO_PLAN
    return 0


def _size(
    scenario: Scenario,
    trace: Trace,
    history: Demand | None,
    gpu: str,
    target: float,
    per_node: int,
    step: int,
    most: int,
    seed: int,
    quiet: bool,
) -> tuple[Sizing, Plan | None]:
    """One GPU type: its sizing, and the answer's plan."""
    from foreserve.cli.simulate import run_policy
    from foreserve.models.errors import InvalidInput
    from foreserve.planner import sizing
    from foreserve.planner.fleet import align
    from foreserve.planner.pipeline import NoPlan, Problems, plan_trace

    plans: dict[int, Plan] = {}

    def attempt(count: int) -> sizing.Trial:
        sized = sizing.resized(scenario, gpu, count, per_node)
        price = sized.cluster.cluster().gpu_types[0].price_usd_per_h * count
        nothing = sizing.Trial(
            gpu=gpu,
            gpus=count,
            usd_per_h=price,
            attainment=0.0,
            worst_llm="",
            total_attainment=0.0,
            ttft_p99_s=0.0,
            busy_gpus=0.0,
            passed=False,
        )
        try:
            with progress_bar(f"planning {count} x {gpu}", quiet) as update:
                plan = plan_trace(sized, trace, history=history, progress=update).plan
        except NoPlan as failure:
            return replace(nothing, why_not=str(failure))
        except InvalidInput as error:
            if "fits nowhere" not in error.message:
                raise
            return replace(nothing, why_not=error.message)
        plans[count] = plan
        with progress_bar(f"simulating {count} x {gpu}", quiet) as update:
            keep_s = scenario.runtime.keep_alive
            # Bought for good: what comes up first is not the question.
            there = plan.epochs[0].placement
            run = run_policy(
                plan, own, "planned", seed, keep_s, progress=update, initial=there
            )
        return sizing.judge(gpu, count, price, run.outcome, target)

    whole = sizing.resized(scenario, gpu, per_node, per_node)
    fleet = Problems(whole, trace, history=history).fleet
    own = align(trace, tuple(llm.name for llm in fleet.llms))
    max_load = scenario.runtime.max_load
    peak, mean = sizing.perfect_gpus(fleet, own, scenario.epoch, max_load)
    least = max(1, math.floor(mean))
    trials = sizing.search(attempt, least=least, most=most, step=step)
    answer = sizing.smallest(trials)
    plan = None if answer is None else plans[answer.gpus]
    return sizing.Sizing(
        gpu=gpu,
        answer=answer,
        trials=trials,
        bound_gpus=peak,
        mean_gpus=mean,
        drivers=() if plan is None else sizing.drivers(plan),
    ), plan
