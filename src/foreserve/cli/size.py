"""`plan size`: the least cluster for a trace and its SLOs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    check_parent,
    check_picture,
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
    from foreserve.models.problem import Fleet
    from foreserve.planner.scenario import Scenario
    from foreserve.planner.sizing import Sizing, Trial
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
@click.option(
    "--mix", is_flag=True, help="Also clusters of several types beside each other."
)
@click.option(
    "--attempts",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Mixtures to try at most.",
)
@click.option("--solver", help="Instead of the scenario's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(), help="Write the answer's plan here.")
@click.option(
    "--picture", type=click.Path(), help="Attainment by LLM over the price: .svg, .png."
)
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
    mix: bool,
    attempts: int,
    solver: str | None,
    seed: int,
    output: str | None,
    picture: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """How many GPUs, of which type, and what they cost.

    Every size that is tried is planned and simulated. Exit code 3: not even --most GPUs of
    any type are enough.
    """
    from foreserve.cli import EXIT_NO_PLAN
    from foreserve.models.codec import to_json, write_text
    from foreserve.planner import sizing_tables

    check_parent(output)
    check_picture(picture)
    wanted = read_scenario(scenario, name=solver)
    trace = read_traces(traces, {})
    history = read_history(wanted, {})
    silent = quiet or as_json
    compile_simulator(silent)
    types = tuple(dict.fromkeys(gpus or (wanted.cluster.nodes[0].gpu,)))
    if mix and len(types) < 2:
        raise click.UsageError("--mix needs two types: repeat --gpu")
    trials = _Trials(wanted, trace, history, target / 100, per_node, seed, silent)
    sizings = [_size(trials, gpu, step, most) for gpu in types]
    if mix:
        sizings.append(_mix(trials, sizings, step, most, attempts))
    enough = [s.answer for s in sizings if s.answer is not None]
    if output and enough:
        best = min(enough, key=lambda trial: trial.usd_per_h)
        write_text(output, to_json(trials.plan(best)))
    if picture:
        sizing_tables.draw(sizings, target / 100, picture)
    out, err = consoles(quiet)
    if as_json:
        rows = [*map(sizing_tables.plain, sizings)]
        echo_json({"target": target / 100, "sizings": rows})
    else:
        print_parts(out, sizing_tables.parts(sizings, target / 100))
    if not enough:
        err.print(f"not even {most} GPUs are enough for {target:g} %")
        return EXIT_NO_PLAN
    return 0


class _Trials:
    """Clusters planned and simulated for one trace; the plans are kept."""

    def __init__(
        self,
        scenario: Scenario,
        trace: Trace,
        history: Demand | None,
        target: float,
        per_node: int,
        seed: int,
        quiet: bool,
    ) -> None:
        self.scenario, self.trace, self.history = scenario, trace, history
        self.target, self.per_node, self.seed = target, per_node, seed
        self.quiet = quiet
        self.plans: dict[tuple[tuple[str, int], ...], Plan] = {}

    def resized(self, counts: Mapping[str, int]) -> Scenario:
        from foreserve.planner.sizing import mixed, resized

        if len(counts) > 1:
            return mixed(self.scenario, counts, self.per_node)
        ((gpu, count),) = counts.items()
        return resized(self.scenario, gpu, count, self.per_node)

    def plan(self, trial: Trial) -> Plan:
        """Of a trial that has one."""
        return self.plans[tuple(trial.counts.items())]

    def attempt(self, counts: Mapping[str, int]) -> Trial:
        """Plan and simulate the trace on so many GPUs of each type."""
        from foreserve.cli.simulate import run_policy
        from foreserve.models.errors import InvalidInput
        from foreserve.planner import sizing
        from foreserve.planner.fleet import align
        from foreserve.planner.pipeline import NoPlan, plan_trace

        sized = self.resized(counts)
        types = sized.cluster.cluster().type_by_name
        price = sum(types[gpu].price_usd_per_h * n for gpu, n in counts.items())
        label = " + ".join(f"{n} x {gpu}" for gpu, n in counts.items())
        nothing = sizing.Trial(
            gpu=" + ".join(counts),
            gpus=sum(counts.values()),
            counts=dict(counts),
            usd_per_h=price,
            attainment=0.0,
            worst_llm="",
            total_attainment=0.0,
            ttft_p99_s=0.0,
            busy_gpus=0.0,
            passed=False,
        )
        try:
            with progress_bar(f"planning {label}", self.quiet) as update:
                plan = plan_trace(
                    sized, self.trace, history=self.history, progress=update
                ).plan
        except NoPlan as failure:
            return replace(nothing, why_not=str(failure))
        except InvalidInput as error:
            if "fits nowhere" not in error.message:
                raise
            return replace(nothing, why_not=error.message)
        self.plans[tuple(counts.items())] = plan
        own = align(self.trace, tuple(llm.name for llm in plan.fleet.llms))
        with progress_bar(f"simulating {label}", self.quiet) as update:
            keep_s = self.scenario.runtime.keep_alive
            # Bought for good: what comes up first is not the question.
            there = plan.epochs[0].placement
            run = run_policy(
                plan, own, "planned", self.seed, keep_s, progress=update, initial=there
            )
        return sizing.judge(counts, price, run, plan.fleet, self.target)

    def fleet(self, types: Sequence[str]) -> Fleet:
        """What could run on one node of each type."""
        from foreserve.planner.pipeline import Problems

        whole = self.resized(dict.fromkeys(types, self.per_node))
        return Problems(whole, self.trace, history=self.history).fleet


def _size(trials: _Trials, gpu: str, step: int, most: int) -> Sizing:
    """One GPU type."""
    from foreserve.planner import sizing
    from foreserve.planner.fleet import align

    fleet = trials.fleet([gpu])
    own = align(trials.trace, tuple(llm.name for llm in fleet.llms))
    scenario = trials.scenario
    peak, mean = sizing.perfect_gpus(
        fleet, own, scenario.epoch, scenario.runtime.max_load
    )
    found = sizing.search(
        lambda count: trials.attempt({gpu: count}),
        least=max(1, math.floor(mean)),
        most=most,
        step=step,
    )
    answer = sizing.smallest(found)
    return sizing.Sizing(
        gpu=gpu,
        answer=answer,
        trials=found,
        bound_gpus=peak,
        bound_usd_per_h=peak * fleet.cluster.gpu_types[0].price_usd_per_h,
        mean_gpus=mean,
        drivers=() if answer is None else sizing.drivers(trials.plan(answer)),
    )


def _mix(
    trials: _Trials, pure: Sequence[Sizing], step: int, most: int, attempts: int
) -> Sizing:
    """Mixtures of the types that were sized alone, where they are cheaper."""
    from foreserve.planner import sizing
    from foreserve.planner.fleet import align
    from foreserve.planner.sizing_mix import Needs, cheapest, search_mix

    fleet = trials.fleet([one.gpu for one in pure])
    own = align(trials.trace, tuple(llm.name for llm in fleet.llms))
    scenario = trials.scenario
    rates = sizing.epoch_rates(own, scenario.epoch)
    needs = Needs.of(fleet, rates, scenario.runtime.max_load)
    answers = [one.answer for one in pure if one.answer is not None]
    found = search_mix(
        trials.attempt, needs, answers, most=most, step=step, attempts=attempts
    )
    answer = cheapest(found.trials)
    return sizing.Sizing(
        gpu=" + ".join(needs.types),
        answer=answer,
        trials=found.trials,
        bound_gpus=max(map(needs.gpus, rates.T)),
        bound_usd_per_h=needs.bound_usd_per_h,
        mean_gpus=needs.gpus(rates.mean(axis=1)),
        drivers=() if answer is None else sizing.drivers(trials.plan(answer)),
        undecided=len(found.undecided),
    )
