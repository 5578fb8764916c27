"""`plan trace compose` and `plan trace synth`: make traces."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    SAMPLE,
    check_parent,
    consoles,
    echo_json,
    file_digest,
    json_option,
    progress_bar,
    quiet_option,
    sample,
    seed_option,
)
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.traces.compose import Composed
    from foreserve.traces.recipe import Recipe
    from foreserve.traces.synth import Tokens


@click.command(
    epilog="Example: plan trace compose sample:warmserve fleet.csv.gz   "
    "Your own: docs/traces.md"
)
@click.argument("recipe_file", metavar="RECIPE")
@click.argument("out_file", metavar="OUT", type=click.Path(dir_okay=False))
@click.option(
    "--source",
    "overrides",
    multiple=True,
    metavar="NAME=PATH",
    help="Take a source of the recipe from here.",
)
@seed_option
@quiet_option
@json_option
def compose(
    recipe_file: str,
    out_file: str,
    overrides: tuple[str, ...],
    seed: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a fleet's trace out of records, by a recipe.

    RECIPE is a YAML file or sample:NAME; OUT a .csv or .jsonl file, also .gz. Same recipe
    and seed, same bytes. A history goes beside OUT.
    """
    from foreserve.models.codec import placed, read_text
    from foreserve.traces.compose import compose as carry_out
    from foreserve.traces.demand_table import write_demand
    from foreserve.traces.formats import write_trace
    from foreserve.traces.recipe import load_recipe, recipe_path
    from foreserve.traces.sources import read_source

    check_parent(out_file)
    shipped = recipe_file.startswith(SAMPLE)
    path = (
        recipe_path(recipe_file.removeprefix(SAMPLE)) if shipped else Path(recipe_file)
    )
    recipe = load_recipe(path)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    try:
        paths = _source_paths(recipe, path.parent, overrides)
        with progress_bar("composing", quiet or as_json) as update:
            # Reading and writing take their time too: a step each.
            steps, sources = len(paths) + len(recipe.llms) + 1, {}
            for done, (name, where) in enumerate(paths.items(), start=1):
                sources[name] = read_source(where)
                update(done, steps)
            composed = carry_out(
                recipe, sources, lambda done, total: update(len(paths) + done, steps)
            )
            write_trace(composed.trace, out_file, _meta(recipe, paths, composed))
            history_file = None
            if composed.history is not None:
                history_file = _beside(out_file)
                write_demand(composed.history, history_file)
            update(steps, steps)
    except InvalidInput as error:
        raise placed(error, read_text(path), str(path)) from None
    if as_json:
        echo_json(
            {
                "trace": out_file,
                "history": history_file,
                "requests": len(composed.trace),
                "span_s": recipe.span,
                "seed": recipe.seed,
                "llms": [asdict(count) for count in composed.counts],
            }
        )
        return
    _show(recipe, composed, out_file, history_file, quiet)


def _source_paths(
    recipe: Recipe, folder: Path, overrides: tuple[str, ...]
) -> dict[str, Path]:
    """Where each source that is used lies."""
    from foreserve.models.codec import did_you_mean

    given = {}
    for override in overrides:
        name, _, given_path = override.partition("=")
        if not given_path:
            raise click.UsageError(f"--source takes NAME=PATH, not {override!r}")
        if name not in recipe.sources:
            hint = did_you_mean(name, list(recipe.sources))
            raise click.UsageError(
                f"--source: the recipe has no source {name!r}: {hint}"
            )
        given[name] = given_path
    paths = {}
    for name, where in recipe.sources.items():
        if name in given:
            path = sample(given[name])
        elif where.startswith(SAMPLE):
            path = sample(where)
        else:
            path = folder / where
        if not path.exists():
            raise InvalidInput(
                f"no file {str(path)!r}",
                field=f"sources.{name}",
                hint=f"--source {name}=PATH says where it is",
            )
        paths[name] = path
    return paths


def _meta(
    recipe: Recipe, paths: dict[str, Path], composed: Composed
) -> dict[str, object]:
    """What the sidecar says: recipe, sources with their licences, what was made."""
    from foreserve.models.codec import to_plain
    from foreserve.traces.formats import read_meta

    plain = to_plain(recipe)
    plain.pop("sources")  # as they were used: files and digests, not paths
    sources: dict[str, dict[str, object]] = {}
    for name, path in paths.items():
        inside = sorted(path.glob("chunk-*")) if path.is_dir() else [path]
        meta = read_meta(path)
        sources[name] = {
            "sha256": {each.name: file_digest(each) for each in inside},
            **{k: meta[k] for k in ("source", "licence", "attribution") if k in meta},
        }
    return {
        "made_by": "plan trace compose",
        "recipe": plain,
        "sources": sources,
        "llms": [asdict(count) for count in composed.counts],
        "rows": len(composed.trace),
        "start": None,
    }


def _beside(out_file: str) -> str:
    """``fleet.csv.gz`` -> ``fleet.history.csv.gz``: a demand table is always CSV."""
    path = Path(out_file)
    gz = ".gz" if path.suffix == ".gz" else ""
    name = Path(path.name.removesuffix(".gz")).stem
    return str(path.with_name(f"{name}.history.csv{gz}"))


def _show(
    recipe: Recipe,
    composed: Composed,
    out_file: str,
    history_file: str | None,
    quiet: bool,
) -> None:
    from rich.table import Table

    out, _ = consoles(quiet)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("llm")
    table.add_column("played by")
    for label in ("recorded", "asked", "made", "requests/s"):
        table.add_column(label, justify="right")
    for row in composed.counts:
        table.add_row(
            row.llm,
            row.source if row.group is None else f"{row.source} {row.group}",
            f"{row.recorded:,.0f}",
            f"{row.asked:,}",
            f"{row.made:,}",
            f"{row.made / recipe.span:,.4g}",
        )
    out.print(table)
    out.print(f"{len(composed.trace):,} requests in {recipe.span:,g} s: {out_file}")
    if history_file:
        out.print(f"demand before them: {history_file}")
    for row in composed.counts:
        if row.unknown_s:
            out.print(
                f"{row.llm}: {row.unknown_s:,g} s of its source are unknown, taken to be "
                "like the time before them"
            )


@click.command(
    epilog="Example: plan trace synth chat.csv.gz --llm chat --rate 2.5 --span 1h "
    "--arrivals gamma --cv 3 --input-tokens lognormal:800,1.5 --output-tokens 200"
)
@click.argument("out_file", metavar="OUT", type=click.Path(dir_okay=False))
@click.option("--llm", required=True, help="Name of the LLM in the trace.")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), required=True, help="Requests/s."
)
@click.option(
    "--span", required=True, metavar="TIME", help="How long, e.g. 90s, 1h, 7d."
)
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "gamma", "diurnal"]),
    default="poisson",
    show_default=True,
    help="gamma: bursts, by --cv. diurnal: a sine over the day, lowest at 0 h; --rate is "
    "the day's mean.",
)
@click.option("--cv", type=click.FloatRange(0, 100), help="Of the gaps; 1 is Poisson.")
@click.option(
    "--peak-ratio",
    type=click.FloatRange(1),
    help="diurnal: highest by lowest rate.  [default: 4]",
)
@click.option("--input-tokens", default="lognormal:1000,1", show_default=True)
@click.option(
    "--output-tokens",
    default="lognormal:200,1",
    show_default=True,
    help="A number, or lognormal:MEAN,CV.",
)
@seed_option
@quiet_option
@json_option
def synth(
    out_file: str,
    llm: str,
    rate: float,
    span: str,
    arrivals: str,
    cv: float | None,
    peak_ratio: float | None,
    input_tokens: str,
    output_tokens: str,
    seed: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a trace of one LLM by chance. Same options and seed, same bytes."""
    from foreserve.traces import synth as chance
    from foreserve.traces.formats import write_trace
    from foreserve.traces.info import describe

    check_parent(out_file)
    if arrivals == "gamma" and cv is None:
        raise click.UsageError("--arrivals gamma needs --cv")
    if arrivals == "poisson" and cv is not None:
        raise click.UsageError("--cv goes with --arrivals gamma or diurnal")
    if arrivals != "diurnal" and peak_ratio is not None:
        raise click.UsageError("--peak-ratio goes with --arrivals diurnal")
    peak_ratio = peak_ratio or (4.0 if arrivals == "diurnal" else 1.0)
    span_s, cv = _seconds(span), 1.0 if cv is None else cv
    inputs = _tokens("--input-tokens", input_tokens)
    outputs = _tokens("--output-tokens", output_tokens)
    asked = {
        "rate_rps": rate,
        "span_s": span_s,
        "cv": cv,
        "peak_ratio": peak_ratio,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "seed": seed or 0,
    }
    with progress_bar("making requests", quiet or as_json) as update:
        made = chance.synth(
            llm,
            rate_rps=rate,
            span_s=span_s,
            cv=cv,
            peak_ratio=peak_ratio,
            input_tokens=inputs,
            output_tokens=outputs,
            seed=seed or 0,
        )
        update(0.3)
        meta = {"made_by": "plan trace synth", **asked, "rows": len(made)}
        write_trace(made, out_file, meta)
        update(1.0)
    if as_json:
        echo_json({"trace": out_file, "asked": asked, **asdict(describe(made))})
        return
    out, _ = consoles(quiet)
    found = describe(made).llms
    cv_text = f", CV of gaps {found[0].arrival_cv:.3g}" if found else ""
    mean_rps = len(made) / span_s
    out.print(f"{len(made):,} requests, {mean_rps:.4g}/s{cv_text}: {out_file}")


def _seconds(text: str) -> float:
    from foreserve.models.quantities import parse_seconds

    try:
        return float(text)
    except ValueError:
        pass
    try:
        return float(str(parse_seconds(text)))
    except InvalidInput as error:
        raise error.at(field="--span") from None


def _tokens(option: str, text: str) -> Tokens:
    from foreserve.traces.synth import parse_tokens

    try:
        return parse_tokens(text)
    except InvalidInput as error:
        raise error.at(field=option) from None
