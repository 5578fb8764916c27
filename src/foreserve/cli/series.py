"""`plan simulate --series`: runs over time, as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foreserve.cli.common import check_parent
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.outcome import Run

SUFFIXES = (".csv", ".csv.gz", ".parquet")


def check_series(path: str | None) -> None:
    """Refuse a table of no known format or in no folder, before any work is done."""
    check_parent(path)
    if path and not path.endswith(SUFFIXES):
        raise InvalidInput(f"a series ends in {', '.join(SUFFIXES)}", file=path)


def write_series(path: str, runs: Sequence[Run], bin_s: float | None) -> None:
    """Write the `Series` of all runs, by policy; whole or not at all, same bytes always.

    Without a number (no request came in the bin): an empty cell, NaN in Parquet.
    """
    import numpy as np
    import pandas as pd

    from foreserve.runtime.series import series
    from foreserve.traces.files import write_file
    from foreserve.traces.parquet import parquet_writer

    parts = []
    for run in runs:
        table = series(run, bin_s).table()
        policy = np.full(len(table["llm"]), run.outcome.policy, dtype=object)
        parts.append({"policy": policy, **table})
    columns = {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    if not path.endswith(".parquet"):
        frame = pd.DataFrame(columns)
        write_file(path, frame.to_csv(index=False, lineterminator="\n"))
        return
    kinds = {"O": "string", "i": "int64", "f": "double"}
    schema = {name: kinds[values.dtype.kind] for name, values in columns.items()}
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with parquet_writer(path, temporary, schema) as add:
            add(list(columns.values()))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
