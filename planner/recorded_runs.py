"""Recorded runs of an engine, to be replayed: what was asked of it, and what it did.

A run is a table of requests (columns of `vllm_e2e_runs`: input_tokens, output_tokens,
queued_s, first_token_s, last_token_s) and a JSON file with the GPU, the LLM and the
engine's settings. The cost model may be corrected by a profile of single layers of the
same GPU and LLM (`llmservingsim_profile`), never by the run itself.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from foreserve.models import catalog
from foreserve.models.codec import read_text
from foreserve.models.errors import InvalidInput
from foreserve.models.footprint import EngineMemory, footprint
from foreserve.models.perf.measured import Corrections, MeasuredTiming
from foreserve.models.perf.model import Measured
from foreserve.planner.figures import COLORS, MUTED, new_figure, save_figure
from foreserve.planner.perf_iterations import profile_cells
from foreserve.planner.tables import Part
from foreserve.traces.trace import Floats

COLUMNS = ("input_tokens", "output_tokens", "queued_s", "first_token_s", "last_token_s")
TARGETS = {"ttft_mean": 0.15, "ttft_p99": 0.15, "tpot_mean": 0.10, "duration": 0.05}
"""Largest relative errors to stay within."""
UTILIZATION = 0.9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedRun:
    """Requests in order of their arrival at the engine, and what served them."""

    name: str
    llm: str
    gpu: str
    timing: MeasuredTiming
    replicas: int
    """Data parallel ones; which of them served a request is not recorded."""
    kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    input_tokens: Floats
    output_tokens: Floats
    queued_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    timeseries: pd.DataFrame | None
    """t, running, waiting, kv_cache_pct, where the run recorded them."""


class Compared(NamedTuple):
    metric: str
    unit: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


def read_run(
    requests: str,
    meta: str,
    *,
    profile: str | None = None,
    corrections: Mapping[str, Corrections] | None = None,
) -> RecordedRun:
    """Read a run; `InvalidInput` on a fault, with file and field."""
    plain = _meta(meta)
    kwargs = plain["engine_kwargs"]
    llm = catalog.llm(llm_name(str(plain["model"])))
    gpu = catalog.gpu(gpu_name(str(plain["gpu"])))
    tp = int(kwargs.get("tensor_parallel_size", 1))
    known = Measured(corrections=tuple((corrections or {}).items()))
    timing = known.timing(llm, gpu, tp)
    if timing is None:
        raise InvalidInput(f"GPU type {gpu.name!r} has no kernel tables", file=meta)
    if profile:
        timing = _corrected(timing, Path(profile))
    table = read_table(requests, dict.fromkeys(COLUMNS, 0.0))
    table = table.sort_values("queued_s", kind="stable")
    seqs = int(kwargs.get("max_num_seqs", 256))
    tokens = int(kwargs.get("max_num_batched_tokens", 8192))
    memory = EngineMemory(
        utilization=float(kwargs.get("gpu_memory_utilization") or UTILIZATION),
        max_num_seqs=seqs,
        max_batched_tokens=tokens,
        vllm=_version(str(plain.get("engine", ""))),
    )
    columns = {name: table[name].to_numpy(dtype=np.float64) for name in COLUMNS}
    beside = Path(requests.removesuffix("_requests.csv.gz") + "_timeseries.csv")
    return RecordedRun(
        name=f"{llm.name} on {tp} x {gpu.name}",
        llm=llm.name,
        gpu=gpu.name,
        timing=timing,
        replicas=int(kwargs.get("data_parallel_size", 1)),
        kv_tokens=footprint(llm, gpu, tp, memory).kv_tokens,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        timeseries=read_table(str(beside), {"t": 0.0}) if beside.is_file() else None,
        **columns,
    )


def read_table(
    path: str, columns: Mapping[str, float | None], blank: Sequence[str] = ()
) -> pd.DataFrame:
    """A CSV file (or CSV.gz) with these columns: texts, or numbers of at least so much;
    numbers in the columns ``blank`` may be missing. `InvalidInput` with the line else."""
    try:
        table = pd.read_csv(path, low_memory=False)
    except FileNotFoundError:
        raise InvalidInput("no such file", file=path) from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        what = next(iter(str(error).splitlines()), "")
        raise InvalidInput(f"not a table: {what}", file=path) from None
    for name in (*columns, *blank):
        if name not in table:
            raise InvalidInput(f"no column {name!r}", file=path, line=1)
        if (least := columns.get(name, 0.0)) is None:
            continue
        numbers = pd.to_numeric(table[name], errors="coerce")
        right = np.isfinite(numbers) & (numbers >= least)
        if name in blank:
            right |= table[name].isna()
        if not right.all():
            row = int(np.argmin(right))
            raise InvalidInput(
                f"{table[name].iloc[row]!r} is not a number of at least {least:g}",
                file=path,
                line=row + 2,
                field=name,
            )
        table[name] = numbers
    return table


def _meta(path: str) -> dict[str, Any]:
    try:
        plain = json.loads(read_text(path))
        for key in ("gpu", "model", "engine_kwargs"):
            plain[key]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"not the meta file of a run: {error}",
            file=path,
            hint="it has gpu, model and engine_kwargs",
        ) from None
    return dict(plain)


def llm_name(model: str) -> str:
    """The catalogue's name of a hub's."""
    name = model.rpartition("/")[2].lower().removesuffix("-instruct-2507")
    by_hub = {llm.hub_id.lower(): llm.name for llm in catalog.llms()}
    return by_hub.get(model.lower(), name)


def gpu_name(gpu: str) -> str:
    """``RTXPRO6000`` is ``rtx-pro-6000``: names without their hyphens."""
    plain = {each.name.replace("-", ""): each.name for each in catalog.gpus()}
    return plain.get(re.sub(r"[^a-z0-9]", "", gpu.lower()), gpu.lower())


def _version(engine: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", engine)
    return (int(found[1]), int(found[2])) if found else EngineMemory().vllm


def _corrected(timing: MeasuredTiming, folder: Path) -> MeasuredTiming:
    """Kernels of decodes and of prompts each scaled by one number, the median over the
    profile; what the engine adds stays."""
    cells = profile_cells(folder, timing)
    factors: dict[str, list[Floats]] = {"decode": [], "prefill": []}
    for cell in cells:
        factors["decode" if cell.phase == "decode" else "prefill"].append(
            cell.measured_s / cell.predicted_s
        )
    if not all(factors.values()):
        raise InvalidInput(
            f"no profile of {timing.llm.name} on {timing.gpu.name} at TP {timing.tp}",
            file=str(folder),
        )
    decode, prefill = (float(np.median(np.concatenate(f))) for f in factors.values())
    known = timing.corrections
    scaled = replace(
        known,
        kernel_factor=known.kernel_factor * decode,
        prefill_factor=known.prefill_factor * prefill,
        source=f"{known.source}; layers profiled: decode x {decode:.3f}, "
        f"prefill x {prefill:.3f}",
    )
    return replace(timing, corrections=scaled)


def compare(run: RecordedRun, first_token_s: Floats, end_s: Floats) -> list[Compared]:
    """Measured against simulated, request by request in the run's order."""

    def of(first: Floats, last: Floats) -> tuple[Floats, Floats]:
        several = run.output_tokens > 1
        ttft = first - run.queued_s
        tpot = (last - first)[several] / (run.output_tokens[several] - 1)
        return ttft, tpot

    measured_ttft, measured_tpot = of(run.first_token_s, run.last_token_s)
    ttft, tpot = of(first_token_s, end_s)
    return [
        Compared("ttft_mean", "s", float(measured_ttft.mean()), float(ttft.mean())),
        Compared("ttft_p50", "s", *_quantile(0.5, measured_ttft, ttft)),
        Compared("ttft_p99", "s", *_quantile(0.99, measured_ttft, ttft)),
        Compared("tpot_mean", "s", float(measured_tpot.mean()), float(tpot.mean())),
        Compared("tpot_p99", "s", *_quantile(0.99, measured_tpot, tpot)),
        Compared("duration", "s", float(run.last_token_s.max()), float(end_s.max())),
    ]


def _quantile(q: float, *values: Floats) -> tuple[float, float]:
    one, other = (float(np.quantile(value, q)) for value in values)
    return one, other


def table(rows: list[Compared], title: str, note: str) -> Part:
    """Measured, simulated, error and what was asked."""
    cells = []
    for row in rows:
        target = TARGETS.get(row.metric)
        cells.append(
            [
                row.metric.replace("_", " ").upper().replace("MEAN", "mean"),
                f"{row.measured:.4g} {row.unit}",
                f"{row.simulated:.4g} {row.unit}",
                f"{row.error:+.1%}",
                f"<= {target:.0%}" if target else "",
            ]
        )
    return Part(title, ["", "measured", "simulated", "error", "asked"], cells, note)


def draw(run: RecordedRun, timeline: Mapping[str, Floats], path: str) -> None:
    """Running, waiting and KV cache over time: recorded against simulated.

    ``timeline`` has t_s, running, waiting and kv_used (a share of the cache).
    """
    figure = new_figure(1, 3, width=9.0, height=2.2)
    panels = (
        ("running", "running", 1.0),
        ("waiting", "waiting", 1.0),
        ("kv_used", "kv_cache_pct", 0.01),
    )
    for place, (ours, theirs, scale) in enumerate(panels):
        axes = figure.add_subplot(3, 1, place + 1)
        recorded = run.timeseries
        if recorded is not None and theirs in recorded and recorded[theirs].any():
            values = recorded[theirs] * scale
            axes.plot(recorded["t"], values, color="#1c2128", lw=1.2, label="recorded")
        t_s = timeline["t_s"]
        axes.step(
            t_s, timeline[ours], where="post", color=COLORS[0], lw=1, label="simulated"
        )
        axes.set_ylabel(
            {"kv_used": "KV cache used"}.get(ours, f"requests {ours}"), color=MUTED
        )
        axes.set_ylim(bottom=0)
        if place == 0:
            axes.set_title(run.name)
            axes.legend(ncols=2, fontsize=8, loc="upper right")
    axes.set_xlabel("seconds")
    save_figure(figure, path)
