"""The arena: solvers on the same instances, with the same limits, one process each.

An instance is a problem file, alone or in a library: a folder with an INDEX.json that
names and describes its problems and keeps the best value and bound known for each.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from foreserve.models.codec import dump_json, from_json, read_text, write_text
from foreserve.models.errors import InvalidInput
from foreserve.models.plan import CLOSED, Certificate, Status
from foreserve.models.problem import Problem
from foreserve.planner.pipeline import certify
from foreserve.solvers.base import SolverPool
from foreserve.solvers.result import SolveOptions, SolveReport

INDEX = "INDEX.json"
NEAR = 0.01
"""An answer this much above the best known one counts as near it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A value somebody reached or proved, in weighted seconds of delay."""

    value: float
    by: str
    """Solver, version, seed and time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A problem to compare solvers on; ``best`` is refereed, ``bound`` is a solver's."""

    name: str
    file: Path
    about: str = ""
    best: Known | None = None
    bound: Known | None = None

    def read(self) -> Problem:
        return read_problem(self.file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How one solver fared on one instance with one seed."""

    instance: str
    solver: str
    seed: int
    report: SolveReport
    certificate: Certificate | None
    """None without a plan."""


def read_problem(path: Path) -> Problem:
    """A problem file, as JSON or gzipped JSON."""
    if path.suffix != ".gz":
        return from_json(Problem, read_text(path), str(path))
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot be read: {error}", file=str(path)) from None
    return from_json(Problem, text, str(path))


def find_instances(paths: Sequence[Path]) -> list[Instance]:
    """Problem files, and the instances of the libraries among ``paths``."""
    found: list[Instance] = []
    for path in paths:
        if path.is_dir():
            found += read_library(path)
        else:
            name = path.name.removesuffix(".gz").removesuffix(".json")
            found.append(Instance(name=name, file=path))
    names = [instance.name for instance in found]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(f"two instances are called {name!r}")
    return found


def read_library(folder: Path) -> list[Instance]:
    """The instances of a library with a plan as their answer, in the order listed."""
    index = folder / INDEX
    try:
        rows = json.loads(read_text(index))["instances"]
        return [
            Instance(
                name=row["name"],
                file=folder / row["file"],
                about=row["about"],
                best=_known(row.get("best")),
                bound=_known(row.get("bound")),
            )
            for row in rows
            if row.get("objective", "foreserve") == "foreserve"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"is no index of instances: {error!r}", file=str(index)
        ) from (None)


def _known(row: Mapping[str, object] | None) -> Known | None:
    if row is None:
        return None
    value, by = row["value"], row["by"]
    if not isinstance(value, int | float):
        raise ValueError(f"not a number: {value!r}")
    return Known(value=float(value), by=str(by))


def compete(
    instances: Sequence[Instance],
    solvers: Sequence[str],
    seeds: Sequence[int],
    options: SolveOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Entry]:
    """Every solver on every instance with every seed, one after another.

    A process of its own for each: nobody pays or gains from another's start, and the
    memory measured is its own.
    """
    found: list[Entry] = []
    total = len(instances) * len(solvers) * len(seeds)
    for instance in instances:
        problem = instance.read()
        for name, seed in product(solvers, seeds):
            with SolverPool(name, replace(options, seed=seed)) as pool:
                solved = pool.solve(problem)
            schedule, report = solved.schedule, solved.report
            found.append(
                Entry(
                    instance=instance.name,
                    solver=name,
                    seed=seed,
                    report=report,
                    certificate=None
                    if schedule is None
                    else certify(problem, schedule, report),
                )
            )
            progress(len(found), total)
    return found


def reference(instance: Instance, entries: Sequence[Entry]) -> Known | None:
    """The best value known of an instance: the library's, or one of ``entries``'."""
    reached = [] if instance.best is None else [instance.best]
    reached += [
        Known(value=entry.certificate.objective, by=_by(entry))
        for entry in entries
        if entry.instance == instance.name and entry.certificate is not None
    ]
    return min(reached, key=lambda known: known.value, default=None)


def proven(instance: Instance, entries: Sequence[Entry]) -> Known | None:
    """The best bound known of an instance; as `reference`."""
    reached = [] if instance.bound is None else [instance.bound]
    reached += [
        Known(value=entry.report.bound, by=_by(entry))
        for entry in entries
        if entry.instance == instance.name and entry.report.status is not Status.ERROR
    ]
    return max(reached, key=lambda known: known.value, default=None)


def _by(entry: Entry) -> str:
    report = entry.report
    return (
        f"{report.solver} ({report.version}), seed {entry.seed}, {report.wall_s:.0f} s"
    )


def near_s(entry: Entry, best: Known | None) -> float | None:
    """Seconds until the solve had a plan within 1 % of the best one known."""
    if best is None:
        return None
    most = best.value + NEAR * abs(best.value) + 1e-9
    times = (
        p.elapsed_s
        for p in entry.report.progress
        if p.objective is not None and p.objective <= most
    )
    return next(times, None)


def row(entry: Entry, best: Known | None, bound: Known | None) -> Mapping[str, object]:
    """One entry as plain numbers; ``above_best`` is relative to the best value known, and
    ``gap_known`` to the best bound known."""
    report, found = entry.report, entry.certificate
    known = max(report.bound, bound.value if bound else report.bound)
    return {
        "instance": entry.instance,
        "solver": entry.solver,
        "seed": entry.seed,
        "status": str(report.status),
        "objective": found and found.objective,
        "bound": report.bound,
        "gap": found and found.gap,
        "gap_at_stake": found and found.gap_at_stake,
        "gap_at_stake_known": found
        and replace(found, bound=min(known, found.objective)).gap_at_stake,
        "above_best": found and best and _above(found.objective, best.value),
        "first_plan_s": _rounded(report.time_to_first_s),
        "near_best_s": _rounded(near_s(entry, best)),
        "wall_s": _rounded(report.wall_s),
        "peak_mb": report.peak_bytes and round(report.peak_bytes / 1e6),
        "version": report.version,
        "threads": report.threads,
        "message": report.message,
    }


def _above(value: float, best: float) -> float:
    return max(0.0, value - best) / max(abs(best), 1e-9)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def update_index(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """Write better values and bounds into a library's index; the names that changed."""
    document = json.loads(read_text(folder / INDEX))
    instances = {instance.name: instance for instance in read_library(folder)}
    changed: list[str] = []
    for stored in document["instances"]:
        instance = instances.get(stored["name"])
        if instance is None:
            continue
        for key, old, new, sign in (
            ("best", instance.best, reference(instance, entries), -1),
            ("bound", instance.bound, proven(instance, entries), 1),
        ):
            if new is None:
                continue
            better = old is None or sign * (new.value - old.value) > CLOSED * abs(
                old.value
            )
            if better:
                stored[key] = {"value": new.value, "by": new.by}
                changed.append(stored["name"])
    if changed:
        write_text(folder / INDEX, dump_json(document))
    return list(dict.fromkeys(changed))
