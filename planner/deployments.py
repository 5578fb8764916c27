"""Measured deployments from a file: closed-loop runs with their mean TTFT and TPOT.

The columns are those of AIConfigurator's ``silicon`` tables: system, model_path, isl, osl,
concurrency, tp_size, ttft_ms, tpot_ms, and optionally backend, gemm_quant_mode,
moe_quant_mode, moe_ep_size, attention_dp_size, pp_size, mode, source. What a row leaves
open is assumed, in one place and by name (`ASSUMED`); what the model does not cover is
skipped and counted by reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd

from foreserve.models import catalog
from foreserve.models.errors import InvalidInput
from foreserve.models.llm import TP_SIZES, ModelSpec, WeightDtype
from foreserve.models.perf.calibrate import Deployment
from foreserve.models.perf.closed_loop import Benchmark, Scheduler
from foreserve.models.perf.measured import MeasuredTiming
from foreserve.models.specs import GpuType

REQUIRED = (
    "system",
    "model_path",
    "isl",
    "osl",
    "concurrency",
    "tp_size",
    "ttft_ms",
    "tpot_ms",
)
SYSTEMS = {
    "a100_sxm": "a100-80gb",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000",
}
DTYPES: Mapping[str, WeightDtype] = {
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
}
ASSUMED = (
    "Sources named by date are InferenceMAX runs: ten requests per client, lengths "
    "uniform in 0.8 to 1 of the stated; sources named GPU/engine/version have equal "
    "lengths.",
    "Engines batch 8,192 tokens an iteration; SGLang prefills in iterations of their own.",
    "InferenceMAX runs of quantised LLMs keep an FP8 cache on TensorRT-LLM and, on "
    "Blackwell, on vLLM; all others a 2-byte cache.",
    "KV cache: 0.9 of the memory less weights (vLLM), 0.9 of what weights leave "
    "(TensorRT-LLM), 0.88 of the memory less weights (SGLang), less 3 GB each.",
    "No speculative decoding: the files do not say which runs used it.",
)
_RESERVE_BYTES = 3e9
_BLACKWELL = ("b200", "b300", "gb200")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Deployments of a file, and how many rows were left out why."""

    deployments: tuple[Deployment, ...]
    rows: tuple[dict[str, Any], ...]
    """The file's row of each deployment, with ``gpu`` and ``llm`` by catalogue name."""
    skipped: Mapping[str, int]


def read_deployments(path: str) -> Measured:
    """Read ``path`` (CSV, also compressed); a fault is an `InvalidInput` with its line."""
    try:
        table = pd.read_csv(path, low_memory=False)
    except (OSError, ValueError, EOFError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"cannot be read: {text}", file=path) from None
    missing = [column for column in REQUIRED if column not in table]
    if missing:
        raise InvalidInput(
            f"no column {missing[0]!r}",
            file=path,
            hint=f"a file of measured deployments has {', '.join(REQUIRED)}",
        )
    numbers = [c for c in REQUIRED if c not in ("system", "model_path")]
    for column in numbers:
        value = pd.to_numeric(table[column], errors="coerce")
        bad = (value.isna() & table[column].notna()) | (value <= 0)
        if bad.any():
            at = int(bad.to_numpy().argmax())
            raise InvalidInput(
                f"{table[column].iloc[at]!r} is not a positive number",
                file=path,
                line=at + 2,
                field=column,
            )
        table[column] = value
    # The same run is listed by several sources, with more or fewer digits.
    run = table.drop(columns=["source", "measured", "backend_version"], errors="ignore")
    again = run.round({"ttft_ms": 1, "tpot_ms": 2}).duplicated()
    repeated, table = int(again.sum()), table[~again]
    deployments: list[Deployment] = []
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    if repeated:
        skipped["the same run from another source"] = repeated
    for row in cast("list[dict[str, Any]]", table.to_dict("records")):
        # An empty cell says as much as a missing column.
        row = {key: value for key, value in row.items() if value == value}
        made = _deployment(row)
        if isinstance(made, str):
            skipped[made] += 1
            continue
        gpu, llm = made.pair
        deployments.append(made)
        rows.append({**row, "gpu": gpu, "llm": llm})
    return Measured(
        deployments=tuple(deployments),
        rows=tuple(rows),
        skipped=dict(sorted(skipped.items())),
    )


def _deployment(row: Mapping[str, Any]) -> Deployment | str:
    """The deployment of a row, or why it is left out."""
    if row.get("mode", "agg") != "agg":
        return "prefill and decode on separate GPUs"
    if any(column not in row for column in REQUIRED):
        return "no concurrency, length or latency stated"
    tp, ep = int(row["tp_size"]), int(row.get("moe_ep_size", 1) or 1)
    if tp not in TP_SIZES or int(row.get("pp_size", 1)) > 1:
        return "more than one node or pipeline stages"
    if int(row.get("attention_dp_size", 1)) > 1:
        return "data-parallel attention"
    gpu = find_gpu(str(row["system"]))
    if gpu is None:
        return f"GPU {row['system']} is not in the catalogue"
    published = find_llm(str(row["model_path"]))
    if published is None:
        return f"LLM {row['model_path']} is not in the catalogue"
    engine = str(row.get("backend", "vllm"))
    fixed = "/" in str(row.get("source", "")) and not str(row["source"]).startswith(
        "db-"
    )
    llm = _as_deployed(published, row, gpu, engine, inferencemax=not fixed)
    timing = MeasuredTiming(llm=llm, gpu=gpu, tp=tp, ep=max(1, ep), engine=engine)
    return Deployment(
        timing=timing,
        run=Benchmark(
            input_tokens=int(row["isl"]),
            output_tokens=max(2, int(row["osl"])),
            concurrency=int(row["concurrency"]),
            spread=0.0 if fixed else 0.2,
        ),
        scheduler=Scheduler(mixes=engine != "sglang"),
        kv_tokens=_kv_tokens(llm, gpu, tp, engine),
        ttft_s=float(row["ttft_ms"]) / 1e3,
        tpot_s=float(row["tpot_ms"]) / 1e3,
        pair=(gpu.name, published.name),
    )


def find_gpu(system: str) -> GpuType | None:
    name = SYSTEMS.get(system, system)
    return next((gpu for gpu in catalog.gpus() if gpu.name == name), None)


def find_llm(model_path: str) -> ModelSpec | None:
    """Catalogue entry of a hub id, whatever its precision or tuning suffix."""
    wanted = _plain(model_path)
    for llm in catalog.llms():
        if wanted in (_plain(llm.hub_id), _plain(llm.name)):
            return llm
    return None


def _plain(hub_id: str) -> str:
    name = hub_id.rpartition("/")[2].lower()
    name = re.sub(r"[-_](fp8|nvfp4|fp4|bf16|int4|instruct|chat|hf|\d{4})\b", "", name)
    # V3.1 and R1 have V3's shape.
    return re.sub(r"^deepseek-(r1|v3\.1)$", "deepseek-v3", name)


def _as_deployed(
    llm: ModelSpec,
    row: Mapping[str, Any],
    gpu: GpuType,
    engine: str,
    *,
    inferencemax: bool,
) -> ModelSpec:
    """``llm`` with the row's weight types and the cache type that the engine picks."""
    stated = row.get("gemm_quant_mode")
    dtype = DTYPES.get(str(stated), "bf16")
    moe = llm.moe
    if moe is not None and moe.dtype is not None:
        # Only the experts are quantised in these checkpoints, whoever quantised them.
        experts = DTYPES.get(str(row.get("moe_quant_mode")), moe.dtype)
        if moe.dtype == "mxfp4" or experts == "bf16":
            experts = moe.dtype
        moe, dtype = replace(moe, dtype=experts), llm.weight_dtype
    elif moe is not None:
        experts = DTYPES.get(str(row.get("moe_quant_mode")), "bf16")
        moe = replace(moe, dtype=experts)
    quantised = stated is not None
    fp8_cache = (
        inferencemax
        and quantised
        and (engine == "trtllm" or (engine == "vllm" and gpu.name in _BLACKWELL))
    )
    return replace(
        llm, weight_dtype=dtype, moe=moe, kv_bytes_per_value=1 if fp8_cache else 2
    )


def _kv_tokens(llm: ModelSpec, gpu: GpuType, tp: int, engine: str) -> float:
    weights = llm.weight_bytes_per_gpu(tp)
    if engine == "trtllm":
        free = 0.9 * (gpu.memory_bytes - weights - _RESERVE_BYTES)
    else:
        share = 0.88 if engine == "sglang" else 0.9
        free = share * gpu.memory_bytes - weights - _RESERVE_BYTES
    # It did run, so there was some cache, whatever the stated reserve leaves.
    free = max(free, 0.05 * gpu.memory_bytes)
    return free / llm.kv_bytes_per_token_per_gpu(tp)
