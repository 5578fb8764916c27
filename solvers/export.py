"""The MILP of a problem as an LP or MPS file, with names that people can read.

``x(chat,n0.0_3,ACTIVE)`` is the choice of LLM ``chat`` on GPUs 0 to 3 of node ``n0``.
Brackets, slashes and dashes mean something else in an LP file, so other characters than
letters, digits, dots and underscores of a name are written as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.models.problem import Problem
from foreserve.models.specs import GpuId
from foreserve.solvers import highs, milp
from foreserve.solvers.index import Index, index

SUFFIXES = (".lp", ".mps")

NAMES = {
    # component of `milp`: (name in the file, letters of its index, what comes last)
    "a": ("x", "rt", "ACTIVE"),
    "y": ("x", "rt", "WARM"),
    "used": ("used", "gt", ""),
    "q": ("served_rps", "rt", ""),
    "lost": ("unserved_rps", "mt", ""),
    "miss": ("missing", "smt", ""),
    "z": ("activated", "srt", ""),
    "came": ("loaded", "rt", ""),
    "left": ("stopped", "rt", ""),
    "c1": ("C1_memory", "gt", ""),
    "c3": ("C3_one_serves", "gt", ""),
    "c4": ("C4_one_copy", "gmt", ""),
    "c5": ("C5_demand", "mt", ""),
    "c5_rate": ("C5_rate", "rt", ""),
    "c10": ("C10_min_active", "mt", ""),
    "c10_most": ("C10_max_replicas", "mt", ""),
    "o2_warm": ("O2_needs_warm", "srt", ""),
    "o2_gpus": ("O2_whole_set", "sgt", ""),
    "o2_cover": ("O2_cover", "smt", ""),
    "o4_came": ("O4_loads", "rt", ""),
    "o4_left": ("O4_stops", "rt", ""),
}


def check_suffix(path: str) -> None:
    """Refuse a model file of no known format."""
    if Path(path).suffix not in SUFFIXES:
        raise InvalidInput(
            "unknown model format", file=path, hint="end its name with .lp or .mps"
        )


def write_model(problem: Problem, path: str) -> None:
    """Write the MILP of ``problem`` to ``path``; its suffix says the format."""
    check_suffix(path)
    p = index(problem)
    highs.write(milp.build(p), path, _namer(p))


def _namer(p: Index) -> Callable[[Any], str]:
    """The name of one variable or row."""
    nodes = _plain(node.name for node in p.problem.fleet.cluster.nodes)
    llms = _plain(llm.name for llm in p.problem.fleet.llms)

    def block(gpus: tuple[GpuId, ...]) -> str:
        last = f"_{gpus[-1].index}" if len(gpus) > 1 else ""
        return f"{nodes[gpus[0].node]}.{gpus[0].index}{last}"

    gpus = p.problem.fleet.cluster.gpus
    texts: Mapping[str, Callable[[int], str]] = {
        "r": lambda r: f"{llms[p.replicas[r][0].llm]},{block(p.replicas[r][1])}",
        "g": lambda g: block((gpus[g],)),
        "m": lambda m: llms[p.problem.fleet.llms[m].name],
        "s": lambda s: f"s{s}",
        "t": lambda t: f"t{t}",
    }

    def name(component: Any) -> str:
        called, letters, last = NAMES[component.parent_component().local_name]
        parts = [
            texts[letter](number)
            for letter, number in zip(letters, component.index(), strict=True)
            if letter != "t" or len(p.T) > 1
        ]
        return f"{called}({','.join([*parts, *([last] if last else [])])})"

    return name


def _plain(names: Iterable[str]) -> Mapping[str, str]:
    """Each name in characters that LP files allow, all different."""
    found: dict[str, str] = {}
    for name in names:
        plain = again = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        number = 1
        while again in found.values():
            number += 1
            again = f"{plain}_{number}"
        found[name] = again
    return found
