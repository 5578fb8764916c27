"""Request counts per series and window, for sources that do not list single requests.

A `Rates` comes from a file (`read_rates`) or a trace (`rates_of`), and becomes a trace
again by chance (`sample_requests`).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.traces.arrivals import spread
from foreserve.traces.files import (
    check,
    is_jsonl,
    is_parquet,
    names,
    need_columns,
    numbers,
    on_grid,
    read_frames,
    read_header,
    write_file,
)
from foreserve.traces.lengths import LengthQuantiles
from foreserve.traces.trace import Floats, Trace, merge

if TYPE_CHECKING:
    import pandas as pd

SERVEGEN_WINDOW_S = 600.0
CHUNK_COLUMNS = ("t_s", "rate_rps", "iat_cv", "iat_dist", "iat_shape", "iat_scale")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rates:
    """How many requests came, per series and window of equal length."""

    names: tuple[str, ...]
    """What was counted: LLMs, clients, services."""
    window_s: float
    start_s: float
    """Start of the first window on the source's clock."""
    counts: Floats
    """[series, window] requests in the window, read-only; NaN is unknown."""
    cv: Floats | None = None
    """[series, window] coefficient of variation of the gaps between the requests of a
    window, read-only; NaN is unknown."""

    def __post_init__(self) -> None:
        if not (np.isfinite([self.window_s, self.start_s]).all() and self.window_s > 0):
            raise InvalidInput("rates: window_s must be positive, start_s finite")
        if len(set(self.names)) != len(self.names):
            raise InvalidInput("rates: a series comes twice in names")
        for column in (self.counts, self.cv):
            if column is None:
                continue
            if column.shape != self.counts.shape or len(column) != len(self.names):
                raise InvalidInput("rates: arrays must be [series, window]")
            if np.isinf(column).any() or (column < 0).any():
                raise InvalidInput("rates: values must be finite and not negative")
            column.setflags(write=False)

    @property
    def num_windows(self) -> int:
        return int(self.counts.shape[1])


def is_rates(path: str | os.PathLike[str]) -> bool:
    """Whether a file (by its header) or folder (by its files) holds counts, which
    `read_rates` reads, and not requests, which `read_trace` reads."""
    if Path(path).is_dir():
        return bool(_chunk_files(path))
    # Requests may be in binary files, or one a line; counts are in CSV files.
    if is_jsonl(path) or is_parquet(path):
        return False
    return bool(_fitting(read_header(os.fspath(path))))


def read_rates(path: str | os.PathLike[str]) -> Rates:
    """Counts from a rate table, a ServeGen folder, or one of the known CSV files.

    Cells without a row are 0 where the source leaves out what is little (rate tables,
    ServeGen), else NaN. `InvalidInput` on a fault, with file, line and field.
    """
    import pandas as pd

    file = os.fspath(path)
    if Path(path).is_dir():
        return _servegen(file, _chunks(file))
    header = read_header(file)
    fits = _fitting(header)
    if len(fits) != 1:
        known = " or ".join(",".join(columns) for columns, _ in FORMATS.values())
        what = "the header fits several formats: " + ", ".join(fits)
        raise InvalidInput(
            what if fits else f"no known columns of counts in {','.join(header)[:80]}",
            file=file,
            line=1,
            hint=f"known headers: {known}",
        )
    columns, convert = FORMATS[fits[0]]
    need_columns(file, header, columns)
    table = pd.concat(read_frames(file))
    if table.empty:
        raise InvalidInput("no rows in the table", file=file)
    return convert(file, table)


def _fitting(header: list[str]) -> list[str]:
    return [name for name, (need, _) in FORMATS.items() if set(need) <= set(header)]


def _table(file: str, table: pd.DataFrame) -> Rates:
    """Our rate table. A blank count is unknown, an absent row 0."""
    llm = names(file, table["llm"])
    if "client" in table:
        llm = llm + "/" + names(file, table["client"])
    width_s = numbers(file, table["width_s"], least=0)
    wrong = (width_s != width_s[0]) | (width_s <= 0)
    check(file, table["width_s"], wrong, "is not positive, or not as in the first row")
    requests = numbers(file, table["requests"], least=0, blank=True)
    cv = table.get("cv")
    return _filled(file, table, llm, float(width_s[0]), requests, cv)


def _filled(
    file: str,
    table: pd.DataFrame,
    series: pd.Series[str],
    window_s: float,
    requests: Floats,
    cv_column: pd.Series[str] | None,
) -> Rates:
    """Rows by ``t_s`` and series; a cell without a row is 0."""
    t_s = numbers(file, table["t_s"])
    labels, rows, windows, start_s = on_grid(file, series, table["t_s"], t_s, window_s)
    grid = np.zeros((len(labels), int(windows.max()) + 1))
    grid[rows, windows] = requests
    cv = None
    if cv_column is not None:
        cv = np.full(grid.shape, np.nan)
        cv[rows, windows] = numbers(file, cv_column, least=0, blank=True)
    return Rates(names=labels, window_s=window_s, start_s=start_s, counts=grid, cv=cv)


def _servegen(file: str, table: pd.DataFrame) -> Rates:
    """Clients of one LLM. Windows with few requests are left out by the source: 0; one
    in which none of several clients reports is a gap in the collection: NaN."""
    requests = numbers(file, table["requests"], least=0)
    client = names(file, table["client"])
    found = _filled(file, table, client, SERVEGEN_WINDOW_S, requests, table["iat_cv"])
    grid = found.counts.copy()
    if len(grid) > 1:
        grid[:, grid.sum(axis=0) == 0] = np.nan
    return Rates(
        names=found.names,
        window_s=found.window_s,
        start_s=found.start_s,
        counts=grid,
        cv=found.cv,
    )


def _chunk_files(folder: str | os.PathLike[str]) -> list[Path]:
    return sorted(Path(folder).glob("chunk-*-trace.csv"))


def _chunks(folder: str) -> pd.DataFrame:
    """A raw ServeGen folder as the table its clients would make together."""
    import pandas as pd

    tables = []
    for path in _chunk_files(folder):
        # The columns of a file have to be checked with its own name and lines.
        table = pd.concat(read_frames(str(path), header=CHUNK_COLUMNS))
        rate = numbers(str(path), table["rate_rps"], least=0)
        # The source divides a count by the width of the window.
        table["requests"] = np.rint(rate * SERVEGEN_WINDOW_S)
        table["iat_cv"] = numbers(str(path), table["iat_cv"], least=0, blank=True)
        table["t_s"] = numbers(str(path), table["t_s"])
        table["client"] = path.name.split("-")[1]
        tables.append(table)
    if not tables:
        raise InvalidInput("no chunk-<client>-trace.csv in the folder", file=folder)
    whole = pd.concat(tables)
    whole["iat_cv"] = whole["iat_cv"].map(lambda cv: "" if np.isnan(cv) else repr(cv))
    return whole


def _totals(file: str, table: pd.DataFrame) -> Rates:
    """ServeGen's totals per LLM; ``gap`` 1 and windows without a row are unknown."""
    rate_rps = numbers(file, table["total_rps"], least=0)
    gap = numbers(file, table["gap"], least=0) > 0
    t_s, series = numbers(file, table["t_s"]), names(file, table["model"])
    width_s = SERVEGEN_WINDOW_S
    labels, rows, windows, start_s = on_grid(file, series, table["t_s"], t_s, width_s)
    grid = np.full((len(labels), int(windows.max()) + 1), np.nan)
    # Recorded with few decimals; what was divided is whole.
    grid[rows, windows] = np.where(gap, np.nan, np.rint(rate_rps * width_s))
    return Rates(names=labels, window_s=width_s, start_s=start_s, counts=grid)


def _hourly(file: str, table: pd.DataFrame) -> Rates:
    """Requests per hour of one service, named as the file."""
    requests = numbers(file, table["requests"], least=0, blank=True)
    t_s = numbers(file, table["hour"]) * 3600.0
    return _single(file, table["hour"], t_s, 3600.0, requests)


def _digitised(file: str, table: pd.DataFrame) -> Rates:
    """Requests per minute read off a plot, one pixel column a window: its middle value.
    A stamp is the start of its column, rounded; columns are equally wide."""
    t_min = numbers(file, table["t_min"])
    width_min = abs(float(t_min[-1] - t_min[0])) / max(len(t_min) - 1, 1) or 1.0
    even = t_min[0] + np.arange(len(t_min)) * width_min
    wrong = np.abs(t_min - even) > max(0.01, width_min / 100)
    check(file, table["t_min"], wrong, "is not as far from the row above as others are")
    requests = numbers(file, table["rpm_mid"], least=0) * width_min
    width_s = width_min * 60
    return _single(file, table["t_min"], even * 60, width_s, requests)


def _single(
    file: str, column: pd.Series[str], t_s: Floats, window_s: float, requests: Floats
) -> Rates:
    """One series, named as the file; a window without a row is unknown."""
    import pandas as pd

    series = pd.Series(Path(file).name.split(".")[0], index=column.index)
    labels, _, windows, start_s = on_grid(file, series, column, t_s, window_s)
    grid = np.full((1, int(windows.max()) + 1), np.nan)
    grid[0, windows] = requests
    return Rates(names=labels, window_s=window_s, start_s=start_s, counts=grid)


FORMATS: Mapping[str, tuple[tuple[str, ...], Callable[[str, pd.DataFrame], Rates]]] = {
    "rate table": (("t_s", "width_s", "llm", "requests"), _table),
    "servegen": (("t_s", "client", "requests", "iat_cv"), _servegen),
    "servegen totals": (("model", "t_s", "total_rps", "gap"), _totals),
    "hourly": (("hour", "requests"), _hourly),
    "digitised": (("t_min", "rpm_min", "rpm_mid", "rpm_max"), _digitised),
}
"""Kinds of files with counts: the columns each needs, and who reads its rows."""


def write_rates(rates: Rates, path: str | os.PathLike[str]) -> int:
    """Write a rate table: counts of 0 are left out, but for the ends, which give the
    table its span and names; a blank count is unknown. The number of rows written."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ["t_s", "width_s", "llm", "requests", "cv"]
    writer.writerow(columns[: 5 if rates.cv is not None else 4])
    number = 0
    ends = (0, rates.num_windows - 1)
    for window in range(rates.num_windows):
        start_s = rates.start_s + window * rates.window_s
        for row, name in enumerate(rates.names):
            count = rates.counts[row, window]
            if count == 0 and window not in ends:
                continue
            cells = [f"{start_s:.15g}", f"{rates.window_s:.15g}", name, _text(count)]
            if rates.cv is not None:
                cells.append(_text(rates.cv[row, window]))
            writer.writerow(cells)
            number += 1
    write_file(path, buffer.getvalue())
    return number


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.15g}"


def rates_of(trace: Trace, window_s: float) -> Rates:
    """Count a trace's requests per LLM in windows from time 0 to the last arrival.

    The last window holds what came, though the trace may end before it does. The CV is
    that of the gaps between requests of the same window: NaN below three requests.
    """
    if not (np.isfinite(window_s) and window_s > 0):
        raise InvalidInput("rates: window_s must be positive and finite")
    num_windows = int(trace.span_s // window_s) + 1 if len(trace) else 0
    grid = np.zeros((len(trace.llms), num_windows))
    cv = np.full(grid.shape, np.nan)
    for row in range(len(trace.llms)):
        arrival_s = trace.arrival_s[trace.llm == row]
        window = (arrival_s // window_s).astype(np.int64)
        grid[row] = np.bincount(window, minlength=num_windows)
        inside = window[1:] == window[:-1]
        gaps, of = np.diff(arrival_s)[inside], window[1:][inside]
        number = np.bincount(of, minlength=num_windows)
        total_s = np.bincount(of, weights=gaps, minlength=num_windows)
        mean_s = total_s / np.maximum(number, 1)
        spread = np.bincount(of, (gaps - mean_s[of]) ** 2, num_windows)
        known = (number >= 2) & (mean_s > 0)
        cv[row, known] = np.sqrt(spread[known] / number[known]) / mean_s[known]
    return Rates(names=trace.llms, window_s=window_s, start_s=0.0, counts=grid, cv=cv)


def sample_requests(
    rates: Rates,
    lengths: LengthQuantiles | Mapping[str, LengthQuantiles],
    rng: np.random.Generator,
) -> Trace:
    """Requests that came to these counts, each window for itself, on the same clock.

    Exactly the recorded number in each window (a fraction is rounded by chance, an
    unknown count is none). Gaps are Gamma with shape ``1/cv^2``, scaled to fill the
    window; an unknown CV is 1, Poisson. ``lengths``: for all series, or by name.
    """
    traces = []
    cvs = np.ones(rates.counts.shape) if rates.cv is None else rates.cv
    for row, name in enumerate(rates.names):
        if not isinstance(lengths, LengthQuantiles) and name not in lengths:
            raise InvalidInput(
                f"rates: no lengths for {name!r}", hint="lend it those of another"
            )
        of_series = lengths if isinstance(lengths, LengthQuantiles) else lengths[name]
        arrivals = []
        for window in np.flatnonzero(rates.counts[row] > 0):
            exact, cv = rates.counts[row, window], cvs[row, window]
            count = int(exact) + int(rng.random() < exact % 1)
            start_s = rates.start_s + float(window) * rates.window_s
            inside = spread(count, 1.0 if np.isnan(cv) else float(cv), rng)
            at_s = np.round(start_s + inside * rates.window_s, 6)
            before_end = np.nextafter(start_s + rates.window_s, -np.inf)
            arrivals.append(np.clip(at_s, start_s, before_end))
        arrival_s: NDArray[np.float64] = np.concatenate([*arrivals, np.zeros(0)])
        inputs, outputs = of_series.draw(arrival_s, rng)
        traces.append(
            Trace(
                arrival_s=arrival_s,
                llm=np.zeros(len(arrival_s), dtype=np.int32),
                llms=(name,),
                input_tokens=inputs,
                output_tokens=outputs,
            )
        )
    return merge(traces)
