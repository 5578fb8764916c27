"""The rules of an operator that may be in conflict, in words, and problems without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from foreserve.models.problem import Problem, ReplicaOption, ServedLlm, held_bytes
from foreserve.models.rules import Rules
from foreserve.planner.diff import block

GIB = 2**30
Change = Callable[[Problem], Problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of the operator's, and the problem without it."""

    kind: str
    """min_active, max_replicas, nodes, tp or memory of an LLM, or a key of the fleet's
    rules."""
    text: str
    without: Change
    llm: str = ""
    """None for a rule of the whole fleet."""
    way: str = ""
    """Giving it up, as advice; else what is the least change has to be looked for."""


FLOORS = ("min_active", "min_after_loss", "held", "keep_serving")
"""Kinds of rules that ask for replicas: without any of them nothing can fail."""


def rules_of(
    problem: Problem, other_tp: Mapping[str, Sequence[ReplicaOption]]
) -> Iterator[Rule]:
    """Rules of LLMs with a floor (the others can go without any replica), then those of
    the fleet."""
    fleet = problem.fleet
    held = {one.llm for one in fleet.rules.held}
    for llm in fleet.llms:
        floors = llm.min_active or llm.min_after_loss
        if not (floors or llm.name in held or fleet.rules.keep_serving):
            continue
        own = [option for option in fleet.options if option.llm == llm.name]
        name = repr(llm.name)
        for kind in ("min_active", "min_after_loss"):
            if floor := getattr(llm, kind):
                yield Rule(
                    llm=llm.name,
                    kind=kind,
                    text=f"{name} keeps {kind}={floor}",
                    without=with_llm(llm, **{kind: 0}),
                )
        if llm.max_replicas is not None:
            yield Rule(
                llm=llm.name,
                kind="max_replicas",
                text=f"{name} has max_replicas={llm.max_replicas}",
                without=with_llm(llm, max_replicas=None),
            )
        if llm.nodes is not None:
            yield Rule(
                llm=llm.name,
                kind="nodes",
                text=f"{name} may only be on {', '.join(llm.nodes)}",
                without=with_llm(llm, nodes=None),
                way=f"{name}: any node",
            )
        if others := other_tp.get(llm.name):
            sizes = ", ".join(str(tp) for tp in sorted({o.tp for o in own}))
            yield Rule(
                llm=llm.name,
                kind="tp",
                text=f"{name} runs at TP {sizes} only",
                without=_with_options(llm, others),
            )
        if large := _too_large(problem, own):
            yield Rule(
                llm=llm.name,
                kind="memory",
                text=f"{name} at TP {large[0]} takes {large[1] / GIB:.1f} GiB per GPU "
                f"while ACTIVE, {large[2] / GIB:.1f} are usable",
                without=_with_options(
                    llm,
                    [
                        replace(o, resident_bytes=0, kv_bytes=0, activation_bytes=0)
                        for o in own
                    ],
                ),
            )

    yield from _fleet_rules(fleet.rules)


def _fleet_rules(rules: Rules) -> Iterator[Rule]:
    for held in rules.held:
        where = f"{held.state or 'resident'} on {block(held.gpus)}"
        yield Rule(
            kind="held",
            text=f"{held.llm!r} is held {where}",
            without=with_rules(held=partial(_without_any, (held,))),
            way=f"{held.llm!r}: not held on {block(held.gpus)}",
        )
    for pair in rules.apart:
        names = f"{pair[0]!r} and {pair[1]!r}"
        yield Rule(
            kind="apart",
            text=f"{names} lie apart",
            without=with_rules(apart=partial(_without_any, (pair,))),
            way=f"{names}: not apart",
        )
    if rules.max_llms_per_gpu is not None:
        yield Rule(
            kind="max_llms_per_gpu",
            text=f"a GPU holds max_llms_per_gpu={rules.max_llms_per_gpu}",
            without=with_rules(max_llms_per_gpu=lambda old: None),
        )
    for node in dict.fromkeys(gpu.node for gpu in rules.closed):
        own = tuple(gpu for gpu in rules.closed if gpu.node == node)
        names = ", ".join(map(str, own))
        yield Rule(
            kind="closed",
            text=f"closed: {names}",
            without=with_rules(closed=partial(_without_any, own)),
            way=f"open {names}",
        )
    if rules.load_window_s is not None:
        yield Rule(
            kind="load_window",
            text=f"loads are done within load_window={rules.load_window_s:g} s",
            without=with_rules(load_window_s=lambda old: None),
            way="no load_window",
        )
    if rules.keep_serving:
        yield Rule(
            kind="keep_serving",
            text="LLMs that serve go on (keep_serving)",
            without=with_rules(keep_serving=lambda old: False),
            way="keep_serving: false",
        )


def _without_any(gone: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value for value in values if value not in gone)


def with_rules(**changes: Callable[[Any], object]) -> Change:
    """Changes fields of the fleet's rules; each change is given the field as it is."""

    def change(problem: Problem) -> Problem:
        rules = problem.fleet.rules
        new = {name: made(getattr(rules, name)) for name, made in changes.items()}
        rules = replace(rules, **new)  # type: ignore[arg-type]
        return replace(problem, fleet=replace(problem.fleet, rules=rules))

    return change


def with_llm(llm: ServedLlm, **changes: object) -> Change:
    """Replaces fields of one LLM."""

    def change(problem: Problem) -> Problem:
        llms = tuple(
            replace(other, **changes) if other.name == llm.name else other  # type: ignore[arg-type]
            for other in problem.fleet.llms
        )
        return replace(problem, fleet=replace(problem.fleet, llms=llms))

    return change


def _with_options(llm: ServedLlm, options: Sequence[ReplicaOption]) -> Change:
    """Replaces what one LLM can run as."""

    def change(problem: Problem) -> Problem:
        rest = (o for o in problem.fleet.options if o.llm != llm.name)
        fleet = replace(problem.fleet, options=(*rest, *options))
        return replace(problem, fleet=fleet)

    return change


def _too_large(
    problem: Problem, own: Sequence[ReplicaOption]
) -> tuple[int, int, int] | None:
    """(TP, bytes needed, bytes usable) of an option that can never be ACTIVE."""
    cluster = problem.fleet.cluster
    for option in own:
        kind = cluster.type_by_name[option.gpu_type]
        usable = int(kind.memory_bytes * cluster.usable_fraction)
        if (needed := held_bytes(option, "ACTIVE")) > usable:
            return option.tp, needed, usable
    return None
