"""What the cost model says about one replica, as tables and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from foreserve.models.capacity import capacity
from foreserve.models.cost import IterationTime
from foreserve.models.footprint import GIB, EngineMemory, footprint
from foreserve.models.lengths import Lengths
from foreserve.models.llm import ModelSpec
from foreserve.models.loading import LOADERS, drain_s, load_times, switch_times
from foreserve.models.perf.compact import compact
from foreserve.models.perf.measured import Corrections, MeasuredTiming
from foreserve.models.perf.model import Measured
from foreserve.models.perf.tables import second_opinions
from foreserve.models.perf.timing import Estimate
from foreserve.models.specs import GpuType, Slo
from foreserve.planner.perf_pictures import Curve, Panel, draw_curves
from foreserve.planner.tables import Part

BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (512, 2048, 8192)
PROMPTS = (128, 512, 2048, 8192)
SHARE_CACHED = 0.5
MAX_NUM_SEQS = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sheet:
    title: str
    source: str
    parts: Sequence[Part]
    document: Mapping[str, Any]
    panels: Sequence[Panel]

    def plain(self) -> Mapping[str, Any]:
        return self.document


def draw_sheet(sheet: Sheet, path: str) -> None:
    draw_curves(sheet.panels, path)


def make_sheet(
    llm: ModelSpec,
    gpu: GpuType,
    tp: int,
    *,
    ep: int,
    engine: str,
    slo: Slo,
    lengths: Lengths,
    corrections: Mapping[str, Corrections] | None = None,
) -> Sheet:
    """Everything about one replica of ``llm`` on ``tp`` GPUs of type ``gpu``."""
    perf = Measured(engine=engine, corrections=tuple((corrections or {}).items()))
    timing = perf.timing(llm, gpu, tp, ep=ep)
    time = compact(timing) if timing else perf.fallback.iteration(llm, gpu, tp)
    parts: list[Part] = []
    panels: list[Panel] = []
    document: dict[str, Any] = {
        "llm": llm.name,
        "gpu": gpu.name,
        "tp": tp,
        "ep": ep,
        "engine": engine,
        "source": time.source,
        "weights": llm.weight_dtype,
        "extrapolated": time.extrapolated,
    }
    if timing is not None:
        decode, prefill = _iterations(timing, document)
        parts += [decode, prefill, _breakdown(timing, document)]
        panels = _panels(timing)
    opinions = _opinions(llm, gpu, tp, timing, document)
    parts += [
        *opinions,
        _capacity(llm, gpu, tp, time, slo, lengths, document),
        _memory(llm, gpu, tp, document),
        _loading(llm, gpu, tp, document),
        _coefficients(time, document),
    ]
    known = timing.corrections.source if timing else "hardware peaks, nothing measured"
    return Sheet(
        title=f"{llm.name} on {tp} x {gpu.name}, {engine}, {llm.weight_dtype} weights",
        source=f"kernels: {time.source}; engine overheads: {known}",
        parts=parts,
        document=document,
        panels=panels,
    )


def _iterations(timing: MeasuredTiming, document: dict[str, Any]) -> tuple[Part, Part]:
    batch, context = np.meshgrid(BATCHES, CONTEXTS, indexing="ij")
    steps = timing.decode(batch, context)
    rows = [
        [str(b), *(_cell(steps, (i, j)) for j in range(len(CONTEXTS)))]
        for i, b in enumerate(BATCHES)
    ]
    decode = Part(
        "Decode step, ms",
        ["batch", *(f"context {c:,}" for c in CONTEXTS)],
        rows,
        "in brackets the 90 % interval of a measured TPOT; * outside the measurements",
    )
    tokens = np.array(PROMPTS)
    whole = timing.prefill(tokens)
    cached = timing.prefill(tokens * (1 - SHARE_CACHED), past=tokens * SHARE_CACHED)
    beside = timing.mixed(32, 2048, tokens)
    alone = timing.decode(32, 2048)
    rows = [
        [
            f"{p:,}",
            _cell(whole, (i,)),
            _cell(cached, (i,)),
            f"{(beside.seconds[i] - alone.seconds) * 1e3:.1f}",
        ]
        for i, p in enumerate(PROMPTS)
    ]
    prefill = Part(
        "Prefill, ms",
        ["prompt tokens", "alone", "half of it cached", "added to a step of 32"],
        rows,
    )
    document["decode"] = _plain(steps, batch=batch, context_tokens=context)
    document["prefill"] = _plain(whole, tokens=tokens)
    document["prefill_half_cached"] = _plain(cached, tokens=tokens)
    return decode, prefill


def _breakdown(timing: MeasuredTiming, document: dict[str, Any]) -> Part:
    """Where a step of 32 sequences and a prompt of 2,048 tokens spend their time."""
    step = timing.composer.parts(decodes=32, context=2048)
    prompt = timing.composer.parts(chunk=2048, prompts=1)
    c = timing.corrections
    overhead = timing.llm.layers * c.layer_s + c.step_s
    columns = {
        "step": {k: float(v.seconds) * c.kernel_factor for k, v in step.items()},
        "prompt": {k: float(v.seconds) * c.prefill_factor for k, v in prompt.items()},
    }
    for column in columns.values():
        column["between kernels"] = overhead
    totals = {name: sum(column.values()) for name, column in columns.items()}
    rows = []
    for name in columns["step"]:
        step_s, prompt_s = columns["step"][name], columns["prompt"][name]
        star = "*" if name in step and bool(step[name].extrapolated) else ""
        rows.append(
            [
                name + star,
                f"{step_s * 1e3:.2f} ({step_s / totals['step']:.0%})",
                f"{prompt_s * 1e3:.2f} ({prompt_s / totals['prompt']:.0%})",
            ]
        )
    document["breakdown_s"] = columns
    return Part(
        "Where the time goes, ms",
        ["part", "step of 32 at context 2,048", "prompt of 2,048"],
        rows,
    )


def _opinions(
    llm: ModelSpec,
    gpu: GpuType,
    tp: int,
    timing: MeasuredTiming | None,
    document: dict[str, Any],
) -> list[Part]:
    """What others published of the same LLM, GPU and TP size, beside ours."""
    batch, context, prompt = np.array([1, 8, 32]), 512, np.array([512, 2048])
    rows: list[list[str]] = []
    said: list[dict[str, Any]] = []
    for other in second_opinions(llm.name, gpu.name, tp):
        answers = (other.decode(batch, context), other.prefill(prompt))
        for estimate in answers:
            said.append({"source": other.source, "seconds": estimate.seconds.tolist()})
        if timing is None:
            continue
        ours = (timing.decode(batch, context), timing.prefill(prompt))
        cells = []
        for theirs, mine in zip(answers, ours, strict=True):
            for i, value in enumerate(theirs.seconds):
                star = "*" if theirs.extrapolated[i] else ""
                ratio = mine.seconds[i] / value
                cells.append(f"{value * 1e3:.1f}{star} ({ratio:.2f})")
        rows.append([other.source, *cells])
    document["second_opinions"] = said
    if not rows:
        return []
    names = [f"step of {b}" for b in batch] + [f"prompt of {p:,}" for p in prompt]
    return [
        Part(
            "Second opinions, ms (ours over theirs)",
            ["source", *names],
            rows,
            f"steps at context {context}; published tables, of older engines mostly",
        )
    ]


def _capacity(
    llm: ModelSpec,
    gpu: GpuType,
    tp: int,
    time: IterationTime,
    slo: Slo,
    lengths: Lengths,
    document: dict[str, Any],
) -> Part:
    """What it holds within ``slo``, with its memory and without a limit by it."""
    per_token = llm.kv_bytes_per_token_per_gpu(tp)
    engine = EngineMemory(max_num_seqs=MAX_NUM_SEQS)
    found = capacity(
        time,
        slo,
        lengths,
        kv_tokens=footprint(llm, gpu, tp, engine).kv_tokens,
        max_num_seqs=MAX_NUM_SEQS,
        state_tokens=llm.kv_bytes_fixed_per_sequence_per_gpu(tp) / per_token,
    )
    document["capacity"] = {
        "slo": asdict(slo),
        "input_tokens": lengths.mean_input,
        "output_tokens": lengths.mean_output,
        **({"concurrency": 0, "rate_rps": 0.0} if found is None else asdict(found)),
    }
    title = (
        f"Capacity within P99 TTFT {slo.ttft_s:g} s and TPOT {slo.tpot_s * 1e3:g} ms, "
        f"for {lengths.mean_input:,.0f} tokens in and {lengths.mean_output:,.0f} out"
    )
    if found is None:
        return Part(title, ["", ""], [["not one request", "0"]])
    empty_s = drain_s(found.concurrency, lengths.mean_output, found.tpot_s)
    alone_s = time.isolated_s(lengths.mean_input, lengths.mean_output)
    rows = [
        ["requests in flight", f"{found.concurrency}"],
        ["requests per second", f"{found.rate_rps:.2f}"],
        ["output tokens per second", f"{found.rate_rps * lengths.mean_output:,.0f}"],
        ["TTFT, mean / P99", f"{found.ttft_s:.3f} / {found.ttft_p99_s:.3f} s"],
        ["TPOT, mean", f"{found.tpot_s * 1e3:.1f} ms"],
        ["until it has drained", f"{empty_s:.1f} s"],
        ["a request alone, start to end", f"{alone_s:.2f} s"],
    ]
    note = (
        "on real lengths 1.2 times the rate that the simulated engine meets, in nine "
        "cases of ten below 2.7 times"
    )
    if len(lengths.input_tokens) == 1:
        note = "all requests alike; --trace takes lengths from real ones"
    return Part(title, ["", ""], rows, note)


def _memory(llm: ModelSpec, gpu: GpuType, tp: int, document: dict[str, Any]) -> Part:
    found = footprint(llm, gpu, tp)
    rows = [
        [
            row.kind + ("" if row.inside else " (on top)"),
            f"{row.num_bytes / GIB:.2f}",
            f"{row.low_bytes / GIB:.2f}-{row.high_bytes / GIB:.2f}",
            row.source,
        ]
        for row in found.rows
    ]
    rows.append(["free", f"{found.free_bytes / GIB:.2f}", "", ""])
    low, middle, high = (num_bytes / GIB for num_bytes in found.residue_bytes)
    document["memory"] = {
        "rows": [asdict(row) for row in found.rows],
        "reported_bytes": found.reported_bytes,
        "kv_tokens": found.kv_tokens,
        "pinned_bytes": found.pinned_bytes,
        "residue_bytes": list(found.residue_bytes),
    }
    return Part(
        "Memory of each GPU, GiB (vLLM, utilization 0.9, 256 sequences)",
        ["part", "GiB", "interval", "source"],
        rows,
        f"KV cache of {found.kv_tokens:,} tokens; asleep it keeps {middle:.1f} GiB "
        f"({low:.1f}-{high:.1f}) on each GPU and pins {found.pinned_bytes / GIB:.1f} GiB "
        "of host memory",
    )


def _loading(llm: ModelSpec, gpu: GpuType, tp: int, document: dict[str, Any]) -> Part:
    storage = 3e9
    loads = {
        f"{loader} loader, {where}": load_times(
            llm, gpu, tp, loader=loader, storage_bytes_per_s=rate
        )
        for loader in LOADERS
        for where, rate in (("host memory", None), ("storage of 3 GB/s", storage))
    }
    rows = [
        [name, f"{found.total_s:.2f}", f"{found.low_s:.2f}-{found.high_s:.2f}"]
        for name, found in loads.items()
    ]
    switches = switch_times(llm, gpu, tp)
    rows += [
        [stage.name, f"{stage.seconds:.2f}", f"{stage.low_s:.2f}-{stage.high_s:.2f}"]
        for stage in switches
    ]
    document["loading"] = {
        name: {
            "total_s": found.total_s,
            "low_s": found.low_s,
            "high_s": found.high_s,
            "stages": [asdict(stage) for stage in found.stages],
        }
        for name, found in loads.items()
    }
    document["switching"] = [asdict(stage) for stage in switches]
    return Part("Loading and switching, seconds", ["", "seconds", "interval"], rows)


def _coefficients(time: IterationTime, document: dict[str, Any]) -> Part:
    fields = [
        name
        for name in time.__dataclass_fields__
        if name not in ("source", "extrapolated")
    ]
    document["compact"] = {name: getattr(time, name) for name in fields}
    return Part(
        "Compact form, as solver and simulator use it",
        ["coefficient", "value"],
        [[name, f"{getattr(time, name):.4g}"] for name in fields],
    )


def _panels(timing: MeasuredTiming) -> list[Panel]:
    batch = np.geomspace(1, 256, 33)
    tokens = np.geomspace(32, 16384, 37)
    curves = []
    for context in CONTEXTS:
        step = timing.decode(batch, context)
        curves.append(_curve(f"context {context:,}", batch, step))
    prompt = timing.prefill(tokens)
    return [
        Panel("Decode step", "sequences", "ms", curves),
        Panel("Prefill", "prompt tokens", "ms", [_curve("no prefix", tokens, prompt)]),
    ]


def _curve(label: str, x: Any, estimate: Estimate) -> Curve:
    ms = 1e3
    return Curve(label, x, estimate.seconds * ms, estimate.low * ms, estimate.high * ms)


def _cell(estimate: Estimate, at: tuple[int, ...]) -> str:
    star = "*" if estimate.extrapolated[at] else ""
    value, low, high = (
        float(part[at]) * 1e3
        for part in (estimate.seconds, estimate.low, estimate.high)
    )
    digits = 1 if value < 100 else 0
    return f"{value:.{digits}f}{star} [{low:.{digits}f}-{high:.{digits}f}]"


def _plain(estimate: Estimate, **sizes: Any) -> list[dict[str, Any]]:
    """Rows of numbers for ``--json``."""
    arrays = {name: np.asarray(size).ravel() for name, size in sizes.items()}
    return [
        {
            **{name: float(array[i]) for name, array in arrays.items()},
            "seconds": float(estimate.seconds.ravel()[i]),
            "low_s": float(estimate.low.ravel()[i]),
            "high_s": float(estimate.high.ravel()[i]),
            "extrapolated": bool(estimate.extrapolated.ravel()[i]),
        }
        for i in range(estimate.seconds.size)
    ]
