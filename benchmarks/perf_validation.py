"""Validate the cost model on all measurements there are, and write the tables of docs/.

    python benchmarks/perf_validation.py --shared ../shared

Writes benchmarks/results/perf_validation.json, docs/perf_errors.md and
docs/perf_errors.png: what `plan perf validate --data ../shared/data` shows.
"""

from __future__ import annotations

from pathlib import Path

import click
from record import write_result

from foreserve.cli.common import progress_bar
from foreserve.models.codec import write_text
from foreserve.planner.perf_report import draw, markdown_table, run

HEAD = """# Errors of the cost model

Made by `benchmarks/perf_validation.py`; `docs/performance.md` explains the model, how
fitting and validation are kept apart, and the worst cells.

![Predicted against measured](perf_errors.png)

"""


@click.command()
@click.option("--shared", default="../shared", show_default=True)
def main(shared: str) -> None:
    """Write the result, the tables and the picture."""
    with progress_bar("comparing", quiet=False) as update:
        found = run(str(Path(shared) / "data"), None, update)
    plain = {**found.plain(), "data": "all data sets"}
    write_result("perf_validation", plain)
    tables = markdown_table(found).split("\n", 2)[2]
    write_text("docs/perf_errors.md", HEAD + tables)
    draw(found, "docs/perf_errors.png")
    for name, errors in plain["steady"]["families"].items():
        for metric, row in errors.items():
            click.echo(f"{name} {metric}: {row['median_abs']:.1%}")


if __name__ == "__main__":
    main()
