"""`plan forecast`: what the next epochs bring, and how good such forecasts were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import (
    check_picture,
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    quiet_option,
    read_traces,
    sample,
)
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.traces.backtest import Observed, Score


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds, or with a unit: 300, 5m, 1h."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from foreserve.models.quantities import parse_seconds

        try:
            found = float(value)
        except ValueError:
            found = float(str(parse_seconds(value)))
        if found <= 0:
            self.fail(f"{value!r} is not positive", param, ctx)
        return found


trace_option = click.option(
    "--trace",
    required=True,
    metavar="FILE|FOLDER|sample:NAME",
    help="Requests, or counts per window (any readable format), or a demand table.",
)
epoch_option = click.option(
    "--epoch",
    type=Duration(),
    default="5m",
    show_default=True,
    help="Length of an epoch; not shorter than the windows of counts.",
)
cover_option = click.option(
    "--cover",
    type=click.FloatRange(0.5, 0.999),
    default=0.95,
    show_default=True,
    help="Share of epochs that the bound is to cover.",
)
first_token_option = click.option(
    "--first-token",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Seconds to the first token: how long a request is in flight.",
)
token_option = click.option(
    "--token",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="Seconds for each output token.",
)


@click.group(epilog="Example: plan forecast backtest --trace sample:fleet-day")
def forecast() -> None:
    """Forecast load, and score forecasts on the past."""


@forecast.command(
    epilog="Example: plan forecast backtest --trace counts.csv.gz --epoch 1h --ahead 1,6"
)
@trace_option
@epoch_option
@click.option(
    "--ahead", default="1", show_default=True, help="Epochs ahead, e.g. 1,12."
)
@cover_option
@click.option(
    "--methods",
    metavar="NAME,...",
    help="Methods to score; last and last-or-yesterday always are.",
)
@click.option(
    "--series", "wanted", multiple=True, help="Only this series (LLM); repeatable."
)
@click.option(
    "--from",
    "score_from",
    type=click.FloatRange(0, 0.95),
    default=0.5,
    show_default=True,
    help="Epochs before this share of the past are not scored.",
)
@click.option(
    "--per-gpu",
    type=click.FloatRange(0, min_open=True),
    help="Load that one GPU serves; adds GPU-hours in whole GPUs.",
)
@first_token_option
@token_option
@click.option(
    "--picture",
    metavar="FILE.svg|png|pdf",
    help="Draw what came, the best method's forecast and bound, and misses.",
)
@quiet_option
@json_option
def backtest(
    trace: str,
    epoch: float,
    ahead: str,
    cover: float,
    methods: str | None,
    wanted: tuple[str, ...],
    score_from: float,
    per_gpu: float | None,
    first_token: float,
    token: float,
    picture: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Forecast every epoch of the past from what was known before it, and score that.

    Methods are compared at an equal share of missed epochs: by the capacity they provide
    when one multiplier per series covers `--cover` of the epochs (1 is perfect). Beside
    it: the error of the forecast, and what its own bound, which knew no future, missed
    and provided.
    """
    from foreserve.planner.forecast_tables import (
        plain,
        series_table,
        summarise,
        summary_table,
    )
    from foreserve.traces.backtest import ALWAYS, METHODS, roll
    from foreserve.traces.backtest import backtest as score
    from foreserve.traces.forecast import get_rule

    check_picture(picture)
    names = list(methods.split(",")) if methods else list(METHODS)
    names += [name for name in ALWAYS if name not in names]
    for name in names:
        get_rule(name)
    aheads = _aheads(ahead)
    observed = _observed(trace, epoch, wanted, first_token, token)
    first = max(1, round(score_from * observed.num_epochs))
    scores: list[Score] = []
    with progress_bar("forecasting", quiet or as_json) as update:
        for _, found in score(
            observed,
            names,
            aheads,
            cover=cover,
            first=first,
            per_gpu=per_gpu,
            progress=update,
        ):
            scores += found
    summary = summarise(scores, names, aheads)
    best = min(
        (row for row in summary if row["ahead"] == aheads[0]),
        key=lambda row: (row["factor"] is None, row["factor"] or 0.0),
    )
    if picture:
        from foreserve.planner.forecast_pictures import draw_backtest

        draw_backtest(
            observed, roll(observed, best["method"], aheads[0], cover), picture
        )
    if as_json:
        echo_json(
            {
                "trace": trace,
                "epoch_s": observed.epoch_s,
                "epochs": observed.num_epochs,
                "scored_from_epoch": first,
                "cover": cover,
                "unit": observed.unit,
                "best": best["method"],
                "summary": summary,
                "series": [plain(each) for each in scores],
            }
        )
        return
    out, _ = consoles(quiet)
    out.print(
        f"{len(observed.names)} series of {observed.num_epochs} epochs of "
        f"{observed.epoch_s:g} s, peaks in {observed.unit}; epochs from {first} on scored"
    )
    print_parts(
        out, [summary_table(summary, cover), series_table(scores, names, aheads[0])]
    )
    if picture:
        out.print(f"[dim]{picture} shows {best['method']}[/]")


@forecast.command(
    epilog="Example: plan forecast show llama-3.1-8b --trace sample:fleet-day --epoch 15m"
)
@click.argument("llm", required=False)
@trace_option
@epoch_option
@click.option(
    "--ahead",
    type=click.IntRange(1, 2000),
    default=12,
    show_default=True,
    help="How many epochs to forecast.",
)
@click.option("--method", default="auto", show_default=True)
@cover_option
@first_token_option
@token_option
@click.option("--picture", metavar="FILE.svg|png|pdf", help="Draw past and forecast.")
@json_option
def show(
    llm: str | None,
    trace: str,
    epoch: float,
    ahead: int,
    method: str,
    cover: float,
    first_token: float,
    token: float,
    picture: str | None,
    as_json: bool,
) -> None:
    """Forecast the epochs after the end of a trace, for one LLM or for all."""
    import numpy as np

    from foreserve.traces.forecast import get_rule
    from foreserve.traces.margins import margins

    check_picture(picture)
    rule = get_rule(method)
    observed = _observed(trace, epoch, (llm,) if llm else (), first_token, token)
    values = observed.series.values
    columns = []
    for h in range(1, ahead + 1):
        rolled = rule(observed.series, h)
        bounds = margins(values, rolled, h, cover)
        columns.append((bounds.low[:, -1], rolled[:, -1], bounds.high[:, -1]))
    ahead_of = np.nan_to_num(np.array(columns))
    start_s = observed.start_s + observed.num_epochs * observed.epoch_s
    if picture:
        from foreserve.planner.forecast_pictures import draw_forecast

        draw_forecast(observed, ahead_of, picture)
    rows: list[dict[str, Any]] = [
        {
            "series": name,
            "start_s": start_s + h * observed.epoch_s,
            "low": float(ahead_of[h, 0, row]),
            "peak": float(ahead_of[h, 1, row]),
            "high": float(ahead_of[h, 2, row]),
        }
        for row, name in enumerate(observed.names)
        for h in range(ahead)
    ]
    if as_json:
        echo_json(
            {
                "method": method,
                "unit": observed.unit,
                "epoch_s": observed.epoch_s,
                "cover": cover,
                "forecast": rows,
            }
        )
        return
    from foreserve.planner.forecast_tables import ahead_table

    out, _ = consoles(quiet=False)
    print_parts(out, [ahead_table(observed, rows, method, cover)])


def _aheads(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InvalidInput(
            f"{text!r} is not a list of epochs", field="ahead", hint="e.g. 1,12"
        )
    return found


def _observed(
    source: str,
    epoch_s: float,
    wanted: Sequence[str],
    first_token_s: float,
    token_s: float,
) -> Observed:
    """Requests, counts or a demand table, whichever ``source`` is."""
    from foreserve.traces.backtest import (
        observed_demand,
        observed_rates,
        observed_trace,
    )
    from foreserve.traces.demand_table import is_demand, read_demand
    from foreserve.traces.rates import is_rates, read_rates

    path = sample(source)
    if is_demand(path):
        demand = read_demand(path)
        factor = round(epoch_s / demand.epoch_s)
        if factor < 1 or abs(factor * demand.epoch_s - epoch_s) > 1e-6:
            raise InvalidInput(
                f"epochs of {epoch_s:g} s do not fit the table's of {demand.epoch_s:g} s",
                file=str(path),
                field="epoch",
                hint=f"use a multiple of {demand.epoch_s:g}s",
            )
        observed = observed_demand(demand.coarser(factor))
    elif is_rates(path):
        observed = observed_rates(read_rates(path), epoch_s)
    else:
        requests = read_traces([source], {})
        observed = observed_trace(
            requests, epoch_s, first_token_s=first_token_s, token_s=token_s
        )
    return observed.select(wanted) if wanted else observed
