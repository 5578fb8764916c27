"""Build the shipped loading times from ServerlessLLM's measurements.

    python benchmarks/build_loading.py --shared ../shared

Reads `model_loading` (Apache-2.0) and writes `models/catalog/loading.csv`: quantiles of
the loading time of each (testbed, LLM, loader, access), with the bytes that were loaded.
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd

from foreserve.models.codec import write_text

WEIGHT_BYTES = {
    "facebook/opt-6.7b": 13_316_947_968,
    "Qwen/Qwen3-32B": 65_524_246_528,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 65_527_752_704,
    "meta-llama/Llama-3.1-8B-Instruct": 16_060_522_496,
}
"""Two bytes for each published parameter."""
HEAD = """\
# Seconds to load an LLM's weights onto one GPU, by loader.
# Source: ServerlessLLM/ServerlessLLM, commit 9f50241baa5386e06a9321c51f19a9ef5f964c2b,
# benchmarks/results (Apache-2.0). h100_2025: H100 SXM, PCIe 5.0, NVMe 29.4 GB/s;
# a5000_2024: PCIe 4.0. access random: another copy on the NVMe each time; cached: in
# host memory already.
"""


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path())
@click.option("--into", default="models/catalog/loading.csv", show_default=True)
def main(shared: str, into: str) -> None:
    """Write the table."""
    path = Path(shared) / "data" / "model_loading" / "serverlessllm.csv.gz"
    table = pd.read_csv(path)
    rows = []
    keys = ["testbed", "model", "loader", "access"]
    for key, group in table.groupby(keys):
        seconds = group["loading_s"]
        rows.append(
            {
                **dict(zip(keys, key, strict=True)),
                "weight_bytes": WEIGHT_BYTES[key[1]],
                "repeats": len(seconds),
                **{f"p{q:g}": round(seconds.quantile(q / 100), 4) for q in (5, 50, 95)},
                "least": seconds.min(),
                "most": seconds.max(),
            }
        )
    write_text(into, HEAD + pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    main()
