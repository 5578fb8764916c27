"""How fast and in how much memory long traces are converted and counted.

    python benchmarks/convert_speed.py --rows 10000000

Makes a canonical CSV.gz of requests at random in a temporary folder, then runs each step
in a process of its own, whose peak memory is that of the step and of what it imports.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pandas as pd
from record import write_result

from foreserve.traces.formats import open_trace, read_trace
from foreserve.traces.rates import rates_of
from foreserve.traces.readers import Rows
from foreserve.traces.trace import bin_demand
from foreserve.traces.writers import write_rows

CHUNK_ROWS, SEED, LLMS, WEEK_S, EPOCH_S = 200_000, 1, 12, 604_800.0, 300.0


def made_up(rows: int) -> Iterator[Rows]:
    """Poisson arrivals over a week, lognormal lengths."""
    rng = np.random.default_rng(SEED)
    names = np.array([f"llm-{index}" for index in range(LLMS)], dtype=object)
    at_s = 0.0
    for start in range(0, rows, CHUNK_ROWS):
        count = min(CHUNK_ROWS, rows - start)
        arrival_s = np.round(at_s + rng.exponential(WEEK_S / rows, count).cumsum(), 6)
        at_s = float(arrival_s[-1])
        inputs, outputs = (
            np.maximum(1, rng.lognormal(mean, 1.2, count)).astype(np.int32)
            for mean in (6.5, 4.5)
        )
        yield Rows(
            arrival_s=arrival_s,
            time=pd.Series(arrival_s),
            llm=pd.Series(names[rng.integers(0, LLMS, count)]),
            input_tokens=inputs,
            output_tokens=outputs,
        )


def to(name: str, format: str = "canonical") -> Callable[[Path], int]:
    """Convert into a file of this name."""

    def step(source: Path) -> int:
        out = source.with_name(name)
        chunks = open_trace(source).chunks
        return write_rows(chunks, out, format, gzip_level=6).rows

    return step


def count_rates(source: Path) -> int:
    """Read, and count per LLM and 300 s."""
    return int(rates_of(read_trace(source), EPOCH_S).counts.sum())


def count_demand(source: Path) -> int:
    """Read, and bin rates and requests in flight; each is in flight for 10 s."""
    trace = read_trace(source)
    busy_s = np.full(len(trace), 10.0)
    demand = bin_demand(trace, epoch_s=EPOCH_S, busy_s=busy_s)
    return len(trace) if demand.num_epochs else 0


STEPS: dict[str, Callable[[Path], int]] = {
    "convert to CSV.gz": to("out.csv.gz"),
    "convert to Parquet": to("out.parquet"),
    "convert to Mooncake JSONL.gz": to("out.jsonl.gz", "mooncake"),
    "count per 300 s": count_rates,
    "bin into demand": count_demand,
}


def run(
    name: str, source: Path, answer: multiprocessing.Queue[tuple[int, float, int]]
) -> None:
    """One step: rows, seconds, peak memory in KiB."""
    began = time.perf_counter()
    rows = STEPS[name](source)
    seconds = time.perf_counter() - began
    answer.put((rows, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@click.command()
@click.option("--rows", default=10_000_000, show_default=True, type=click.IntRange(1))
def main(rows: int) -> None:
    """Measure every step once."""
    context = multiprocessing.get_context("spawn")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "requests.csv.gz"
        write_rows(made_up(rows), source, gzip_level=1)
        size = source.stat().st_size
        for name in STEPS:
            answer = context.Queue()
            child = context.Process(target=run, args=(name, source, answer))
            child.start()
            done, seconds, peak_kib = answer.get()
            child.join()
            assert done == rows, name
            results.append(
                {
                    "step": name,
                    "rows_per_s": round(rows / seconds),
                    "seconds": round(seconds, 1),
                    "peak_mib": round(peak_kib / 1024),
                }
            )
            click.echo(f"{results[-1]}")
    found = {
        "rows": rows,
        "source_bytes": size,
        # pandas keeps text in pyarrow's arrays where it is installed.
        "versions": {name: version(name) for name in ("numpy", "pandas", "pyarrow")},
        "steps": results,
    }
    write_result("convert_speed", found)


if __name__ == "__main__":
    main()
