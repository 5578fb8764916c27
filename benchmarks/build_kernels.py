"""Build the shipped kernel tables from aiconfigurator's measurements.

    python benchmarks/build_kernels.py --shared ../shared

Reads `../shared/data/aiconfigurator_ops` (Apache-2.0, NVIDIA; latencies of one call of
one kernel on a real GPU) and writes `models/perf/data/GPU_BACKEND.npz`, one file for each
GPU and engine, beside a README with source and licence. A table holds one row for each
shape (heads, experts, ...) and a grid over the sizes that vary at run time (tokens, batch,
context). Latencies are stored as 15-bit logarithms (steps of 0.08 %), so all tables
together take a few megabytes. Cells that were not measured (mostly corners that exceed
the memory) are extended along the grid as power laws and marked: whoever reads one is
told that it is extrapolated.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import click
import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from foreserve.models.perf.kernels import FILLED, encode_ms

DTYPES = {
    "bfloat16": "bf16",
    "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4",
}
LEAST_GEMM_WIDTH = 4096
MOE_SHAPE = [
    "hidden_size",
    "inter_size",
    "topk",
    "num_experts",
    "moe_tp_size",
    "moe_ep_size",
]
MOE_SKEWS = {"balanced": "balanced", "power_law_1.01": "skewed"}
"""Routing of tokens to experts that is kept; the skewed one is the default answer."""


@click.command()
@click.option("--shared", default="../shared", show_default=True, type=click.Path())
@click.option("--into", default="models/perf/data", show_default=True)
def main(shared: str, into: str) -> None:
    """Write one npz file for each GPU and engine."""
    source = Path(shared) / "data" / "aiconfigurator_ops"
    index = pd.read_csv(source / "INDEX.csv")
    folder = Path(into)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for (gpu, backend), rows in index.groupby(["gpu", "backend"]):
        if backend == "nccl":
            continue
        arrays: dict[str, np.ndarray] = {}
        for row in rows.to_dict("records"):
            table = _read(source, row)
            for name, group, shape, axes in _tables(row["table"], table):
                _add(arrays, name, group, shape, axes)
        versions = rows.set_index("table")["version"].to_dict()
        text = ";".join(f"{table}={version}" for table, version in versions.items())
        arrays["versions"] = np.array(text)
        arrays["peaks"] = _peaks(source / f"gpu_{gpu}.yaml")
        path = folder / f"{gpu}_{backend}.npz"
        np.savez_compressed(path, **arrays)
        total += path.stat().st_size
        click.echo(f"{path}  {path.stat().st_size / 1e3:.0f} kB  {len(arrays)} arrays")
    click.echo(f"{total / 1e6:.2f} MB in all")


def _read(source: Path, row: dict[str, str]) -> pd.DataFrame:
    """One table with its constant columns back in place."""
    path = source / row["gpu"] / f"{row['backend']}_{row['table']}.csv.gz"
    table = pd.read_csv(path)
    for constant in row["constant_columns"].split(";"):
        column, _, value = constant.partition("=")
        if column not in table:
            table[column] = int(value) if value.isdigit() else value
    return table


def _peaks(path: Path) -> np.ndarray:
    """Peaks of the GPU in the order of `Peaks`; a missing precision runs as the next."""
    file = YAML(typ="safe").load(path)
    gpu = file["gpu"]
    bf16 = gpu["bfloat16_tc_flops"]
    fp8 = gpu.get("fp8_tc_flops", bf16)
    fp4 = gpu.get("fp4_tc_flops", fp8)
    link = file["node"]["intra_node_bw"]
    return np.array([bf16, fp8, fp4, gpu["mem_bw"], link], dtype=np.float64)


def _tables(kind: str, table: pd.DataFrame):
    """Name, rows, shape columns and axis columns of the tables a file is cut into."""
    if kind == "gemm":
        for dtype, group in table.groupby("gemm_dtype"):
            # One set has a few tiny matrices in a precision: no ground for any LLM.
            if group["n"].max() >= LEAST_GEMM_WIDTH:
                yield f"gemm.{_dtype(dtype)}", group, [], ["m", "n", "k"]
    elif kind in ("context_attention", "generation_attention"):
        if "window_size" not in table:
            table["window_size"] = 0
        phase, length = kind.split("_")[0], "isl"
        if phase == "generation":
            table["length"], length = table["step"] + 1, "length"
        # An fp8 attention kernel needs an fp8 cache; vLLM's default stays in bf16.
        table = table[table["attn_dtype"] == "bfloat16"]
        keys = ["head_dim", "window_size", "kv_cache_dtype"]
        for (dim, window, cache), group in table.groupby(keys):
            name = f"{phase}.{dim}.{window}.{_dtype(cache)}"
            yield (
                name,
                group,
                ["num_heads", "num_key_value_heads"],
                ["batch_size", length],
            )
    elif kind == "moe":
        table = table[table["distribution"].isin(MOE_SKEWS)]
        for (dtype, skew), group in table.groupby(["moe_dtype", "distribution"]):
            name = f"moe.{_dtype(dtype)}.{MOE_SKEWS[skew]}"
            yield name, group, MOE_SHAPE, ["num_tokens"]
    elif kind.startswith("mla_") and kind.endswith("_module"):
        phase = kind.split("_")[1]
        length = "step" if phase == "generation" else "isl"
        for (cache, dtype), group in table.groupby(["kv_cache_dtype", "gemm_type"]):
            name = f"mla_{phase}.{_dtype(dtype)}.{_dtype(cache)}"
            yield name, group, ["num_heads"], ["batch_size", length]
    elif kind in ("context_mla", "generation_mla"):
        phase, length = kind.split("_")[0], "isl"
        if phase == "generation":
            table["length"], length = table["step"] + 1, "length"
        for cache, group in table.groupby("kv_cache_dtype"):
            # Whole heads of all ranks are listed with their TP size; one rank runs these.
            yield (
                f"{phase}_latent.{_dtype(cache)}",
                group,
                ["num_heads"],
                ["batch_size", length],
            )
    elif kind == "mla_bmm":
        dtype = "bfloat16"
        if "bmm_dtype" in table:
            table = table[table["bmm_dtype"] == dtype]
        for op, group in table.groupby("op_name"):
            yield (
                f"bmm.{op.removeprefix('mla_gen_')}",
                group,
                ["num_heads"],
                ["num_tokens"],
            )
    elif kind == "custom_allreduce":
        if (
            "backend" in table
        ):  # eager rows measure the launch of the kernel, not its run
            table = table[~table["backend"].astype(str).str.endswith("eager")]
        yield "all_reduce", table, ["num_gpus"], ["message_size"]


def _dtype(name: object) -> str:
    return DTYPES.get(str(name), str(name))


def _add(
    arrays: dict[str, np.ndarray],
    name: str,
    rows: pd.DataFrame,
    shape: list[str],
    axes: list[str],
) -> None:
    """Lay the rows out as one grid for each shape; fill and mark what is missing."""
    rows = rows[rows["latency_ms"] > 0]
    if rows.empty:
        return
    grid = rows.groupby([*shape, *axes])["latency_ms"].median().reset_index()
    ticks = [np.sort(grid[axis].unique()) for axis in axes]
    if shape:
        shapes = np.unique(grid[shape].to_numpy(dtype=np.int32), axis=0)
    else:
        shapes = np.zeros((1, 0), dtype=np.int32)
    where = {tuple(key): i for i, key in enumerate(shapes.tolist())}
    log_ms = np.full((len(shapes), *(len(t) for t in ticks)), np.nan)
    position = [
        np.searchsorted(t, grid[axis]) for t, axis in zip(ticks, axes, strict=True)
    ]
    if shape:
        first = [where[tuple(key)] for key in grid[shape].to_numpy().tolist()]
    else:
        first = [0] * len(grid)
    log_ms[(np.array(first), *position)] = np.log(grid["latency_ms"])
    filled = np.isnan(log_ms)
    logs = [np.log(np.maximum(t, 1)) for t in ticks]
    # The axis with most work per step first: batch and tokens scale almost linearly.
    for axis in range(len(ticks)):
        _extend(log_ms, logs[axis], axis + 1)
    if np.isnan(log_ms).any():
        raise click.ClickException(f"{name}: a line without any measured cell")
    code = encode_ms(log_ms)
    arrays[f"{name}/values"] = code | np.where(filled, FILLED, 0).astype(np.uint16)
    arrays[f"{name}/shapes"] = shapes
    for i, tick in enumerate(ticks):
        arrays[f"{name}/axis{i}"] = tick.astype(np.int32)


def _extend(values: np.ndarray, ticks: np.ndarray, axis: int) -> None:
    """Fill NaN along ``axis``: between measured cells linearly, beyond as a power law."""
    lines = np.moveaxis(values, axis, -1)
    for line in itertools.product(*(range(n) for n in lines.shape[:-1])):
        row = lines[line]
        known = np.flatnonzero(~np.isnan(row))
        if len(known) == len(row) or not len(known):
            continue
        if len(known) == 1:
            row[:] = row[known[0]] + np.maximum(ticks - ticks[known[0]], 0)
            continue
        filled = np.interp(ticks, ticks[known], row[known])
        for end, inner, beyond in (
            (known[0], known[1], range(known[0])),
            (known[-1], known[-2], range(known[-1] + 1, len(row))),
        ):
            slope = (row[end] - row[inner]) / (ticks[end] - ticks[inner])
            slope = min(2.0, max(0.0, slope))
            for i in beyond:
                filled[i] = row[end] + slope * (ticks[i] - ticks[end])
        row[:] = filled


if __name__ == "__main__":
    main()
