"""Demand tables: the past per LLM and epoch as CSV (.gz), e.g. from monitoring."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np

from foreserve.models.errors import InvalidInput
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
from foreserve.traces.trace import Demand, Floats

COLUMNS = (
    "t_s",
    "width_s",
    "llm",
    "requests",
    "mean_in_flight",
    "peak_in_flight",
    "input_tokens",
    "output_tokens",
)


def is_demand(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the columns of a demand table."""
    if Path(path).is_dir() or is_jsonl(path) or is_parquet(path):
        return False
    return set(COLUMNS) <= set(read_header(os.fspath(path)))


def read_demand(path: str | os.PathLike[str]) -> Demand:
    """Read a demand table: one row per LLM and epoch, in any order; absent rows are
    zero. All epochs are equally long and lie on one grid."""
    import pandas as pd

    file = os.fspath(path)
    table = pd.concat(read_frames(file))
    need_columns(file, list(table.columns), COLUMNS)
    if table.empty:
        raise InvalidInput("no rows in the demand table", file=file)
    values = {
        name: numbers(file, table[name], least=-np.inf if name == "t_s" else 0)
        for name in COLUMNS
        if name != "llm"
    }
    width_s = values["width_s"]
    epoch_s = float(width_s[0])
    wrong = (width_s != epoch_s) | (width_s <= 0)
    check(file, table["width_s"], wrong, "is not positive, or not as in the first row")
    llms, rows, epochs, start_s = on_grid(
        file, names(file, table["llm"]), table["t_s"], values["t_s"], epoch_s
    )
    shape = (len(llms), int(epochs.max()) + 1)

    def spread(name: str, scale: float = 1.0) -> Floats:
        grid = np.zeros(shape)
        grid[rows, epochs] = values[name] * scale
        return grid

    return Demand(
        epoch_s=epoch_s,
        start_s=start_s,
        llms=llms,
        rate_rps=spread("requests", 1 / epoch_s),
        mean_load=spread("mean_in_flight"),
        peak_load=spread("peak_in_flight"),
        input_tokens=spread("input_tokens"),
        output_tokens=spread("output_tokens"),
    )


def write_demand(demand: Demand, path: str | os.PathLike[str]) -> None:
    """Write a demand table; epochs without any load are left out, but for the first
    and the last, which give the table its span. Loads and lengths are rounded to 4 and
    5 digits; the requests of a partial last epoch are scaled to a whole one."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    ends = (0, demand.num_epochs - 1)
    idle = (demand.peak_load == 0) & (demand.rate_rps == 0)
    for epoch in range(demand.num_epochs):
        for row, llm in enumerate(demand.llms):
            if idle[row, epoch] and epoch not in ends:
                continue
            writer.writerow(
                [
                    f"{demand.start_s + epoch * demand.epoch_s:.15g}",
                    f"{demand.epoch_s:.15g}",
                    llm,
                    f"{demand.rate_rps[row, epoch] * demand.epoch_s:.9g}",
                    f"{demand.mean_load[row, epoch]:.4g}",
                    f"{demand.peak_load[row, epoch]:.9g}",
                    f"{demand.input_tokens[row, epoch]:.5g}",
                    f"{demand.output_tokens[row, epoch]:.5g}",
                ]
            )
    write_file(path, buffer.getvalue())
