"""Build the shipped second opinions: whole iterations as others measured them.

    python benchmarks/build_tables.py --shared ../shared

Reads the data sets of `planner/perf_iterations.py` and writes
`models/perf/data/opinions.npz`: for each (source, LLM, GPU, TP) a grid over sequences and
context and one over prompts and their length. Points that were not measured are filled
as if sizes and batch acted independently (their logarithms add), and marked.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from foreserve.models.perf.kernels import FILLED, encode_ms
from foreserve.planner.perf_iterations import Iterations, iterations

SOURCES = ("llmservingsim", "splitwise", "sageserve", "muxserve")


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path())
@click.option("--into", default="models/perf/data/opinions.npz", show_default=True)
def main(shared: str, into: str) -> None:
    """Write one file with all tables."""
    cells: dict[str, dict[str, Iterations]] = {}
    for cell in iterations(Path(shared) / "data"):
        if cell.data_set in SOURCES and cell.phase in ("prefill", "decode"):
            name = f"{cell.data_set}/{cell.llm}/{cell.gpu}/{cell.tp}"
            cells.setdefault(name, {})[cell.phase] = cell
    arrays: dict[str, np.ndarray] = {}
    for name, phases in sorted(cells.items()):
        for phase, cell in phases.items():
            _add(arrays, f"{name}/{phase}", cell)
    np.savez_compressed(into, **arrays)
    click.echo(f"{len(cells)} tables, {Path(into).stat().st_size / 1e3:.0f} kB")


def _add(arrays: dict[str, np.ndarray], name: str, cell: Iterations) -> None:
    batches, sizes = np.unique(cell.batch), np.unique(np.round(cell.size))
    if len(batches) == 1:  # a grid needs two lines; the second is filled and marked
        batches = np.append(batches, 2 * batches)
    log_ms = np.full((len(batches), len(sizes)), np.nan)
    row = np.searchsorted(batches, cell.batch)
    column = np.searchsorted(sizes, np.round(cell.size))
    log_ms[row, column] = np.log(cell.measured_s * 1e3)
    missing = np.isnan(log_ms)
    arrays[f"{name}/values"] = encode_ms(_filled(log_ms, batches, sizes))[
        None
    ] | np.where(missing[None], FILLED, 0).astype(np.uint16)
    arrays[f"{name}/shapes"] = np.zeros((1, 0), dtype=np.int32)
    arrays[f"{name}/axis0"] = batches.astype(np.int32)
    arrays[f"{name}/axis1"] = sizes.astype(np.int32)


def _filled(log_ms: np.ndarray, batches: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows and columns act independently; a line without any point doubles its kin."""
    known = ~np.isnan(log_ms)
    base = int(known.sum(axis=1).argmax())
    logs = np.log(sizes)
    row = np.interp(logs, logs[known[base]], log_ms[base, known[base]])
    filled = log_ms.copy()
    for i in range(len(batches)):
        if known[i].any():
            shift = float(np.mean((log_ms[i] - row)[known[i]]))
        else:
            shift = float(np.log(batches[i] / batches[base]))
        filled[i, ~known[i]] = row[~known[i]] + shift
    return filled


if __name__ == "__main__":
    main()
