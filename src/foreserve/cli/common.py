"""What the verbs share: options, inputs, progress, and where output goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from foreserve.models.plan import Plan
    from foreserve.planner.scenario import Scenario
    from foreserve.planner.tables import Part
    from foreserve.traces.trace import Demand, Trace

SAMPLE = "sample:"
"""Prefix of names that mean a shipped file, e.g. ``sample:azure-2023``."""

json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on stdout."
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress, no summary.")
seed_option = click.option(
    "--seed", type=int, default=None, help="Seed of everything random."
)


def solver_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--time-limit, --gap, --seed, --threads, --forecast: override the scenario."""
    for option in (
        click.option("--threads", type=click.IntRange(1), help="Solver threads."),
        seed_option,
        click.option("--gap", type=click.FloatRange(0), help="Stop at this gap."),
        click.option(
            "--time-limit",
            type=click.FloatRange(0, min_open=True),
            metavar="S",
            help="Seconds per epoch.",
        ),
        click.option(
            "--forecast",
            type=str,
            metavar="METHOD",
            help="auto, last, seasonal, corrective, ..., or perfect (sees the future).",
        ),
    ):
        command = option(command)
    return command


def read_scenario(source: str, /, **overrides: object) -> Scenario:
    """A scenario file or ``sample:NAME``, with the flags that were given on top."""
    from foreserve.planner.scenario import load_scenario
    from foreserve.planner.scenarios import scenario_path

    shipped = source.startswith(SAMPLE)
    path = scenario_path(source.removeprefix(SAMPLE)) if shipped else Path(source)
    scenario = load_scenario(path)
    given = {key: value for key, value in overrides.items() if value is not None}
    method = given.pop("method", scenario.forecast.method)
    history = scenario.forecast.history
    if history and not history.startswith(SAMPLE):
        history = str(Path(path).parent / history)
    return replace(
        scenario,
        solver=replace(scenario.solver, **given),  # type: ignore[arg-type]
        forecast=replace(scenario.forecast, method=str(method), history=history),
    )


def read_traces(names: Sequence[str], inputs: dict[str, str]) -> Trace:
    """One trace from one or more files or samples; notes their SHA-256 in ``inputs``."""
    from foreserve.traces.formats import read_trace
    from foreserve.traces.trace import merge

    traces = []
    for name in names:
        path = sample(name)
        traces.append(read_trace(path))
        inputs[f"trace {path.name}"] = file_digest(path)
    return traces[0] if len(traces) == 1 else merge(traces)


def read_history(scenario: Scenario, inputs: dict[str, str]) -> Demand | None:
    """The scenario's demand table of the time before the trace, if it names one."""
    from foreserve.traces.demand_table import read_demand

    if scenario.forecast.history is None:
        return None
    path = sample(scenario.forecast.history)
    inputs[f"history {path.name}"] = file_digest(path)
    return read_demand(path)


def sample(name: str) -> Path:
    """The path of a file, or of a shipped sample."""
    if not name.startswith(SAMPLE):
        return Path(name)
    from foreserve.traces.samples import sample_path

    path = sample_path(name.removeprefix(SAMPLE))
    if not path.exists():
        known = sorted(p.name.split(".")[0] for p in path.parent.glob("*.csv.gz"))
        raise InvalidInput(
            f"no sample {name!r}",
            hint="one of " + ", ".join(SAMPLE + n for n in dict.fromkeys(known)),
        )
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_same_cluster(plan: Plan, scenario: Scenario, file: str) -> None:
    """A plan made for another cluster is an input error, named by its difference."""
    theirs, ours = plan.fleet.cluster, scenario.cluster.cluster()
    if theirs.gpus != ours.gpus or theirs.nodes != ours.nodes:
        missing = [str(gpu) for gpu in theirs.gpus if not ours.has(gpu)]
        detail = (
            f"it uses GPU {missing[0]}"
            if missing
            else "its nodes differ from the scenario's"
        )
        raise InvalidInput(
            f"the plan was made for another cluster: {detail}",
            file=file,
            field="fleet.cluster",
            hint="solve again with this scenario",
        )


def consoles(quiet: bool) -> tuple[Console, Console]:
    """(stdout, stderr) consoles; the first is silent when asked to be."""
    from rich.console import Console

    width = None if Console().is_terminal else 100
    return Console(quiet=quiet, width=width), Console(stderr=True)


def print_parts(out: Console, parts: Iterable[Part]) -> None:
    """Titled tables, the first column to the left and numbers to the right."""
    from rich.table import Table

    for part in parts:
        table = Table(
            title=part.title, title_justify="left", box=None, padding=(0, 2, 0, 0)
        )
        for index, column in enumerate(part.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in part.rows:
            table.add_row(*row)
        out.print(table)
        if part.note:
            out.print(f"[dim]{part.note}[/]")
        out.print()


class Progress(Protocol):
    """Moves a bar: ``done`` of ``total``."""

    def __call__(self, done: float, total: float = 1.0, /) -> None: ...


@contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr, only on a terminal; yields ``update(done, total)``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(label, total=1.0)

        def update(done: float, total: float = 1.0) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def compile_simulator(quiet: bool) -> None:
    """Say what the first simulation after an installation spends some time on."""
    from foreserve.runtime.simulated.engine import compile_core, is_compiled

    if not is_compiled():
        _, err = consoles(quiet)
        if not quiet:
            err.print("[dim]compiling the simulator, once: some 20 s[/]")
        compile_core()


def fresh_folder(path: str, force: bool) -> Path:
    """Create an output folder; an existing one that is not empty needs ``--force``."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InvalidInput("is a file, a folder is needed", file=path)
    if folder.exists() and any(folder.iterdir()) and not force:
        raise InvalidInput(
            "the folder is not empty", file=path, hint="--force writes into it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def echo_json(document: Mapping[str, object]) -> None:
    """The one JSON document of ``--json``."""
    click.echo(json.dumps(document, indent=1, sort_keys=True, allow_nan=False))


def check_picture(path: str | None) -> None:
    """Refuse a picture of no known format or in no folder, before any work is done."""
    check_parent(path)
    if path:
        from foreserve.planner.figures import check_suffix

        check_suffix(path)


def check_parent(*paths: str | None) -> None:
    """Refuse output paths in folders that do not exist, before any work is done."""
    for path in paths:
        if path and not Path(path).absolute().parent.is_dir():
            raise InvalidInput("the folder does not exist", file=path)
