"""Closed-loop cases of a real server, each deployment calibrated on its lightest one.

A folder in the form of `llm_pilot`: ``summary.csv`` with one line a case, and
``requests_<LLM>.csv.gz`` with the requests of one LLM. In a case ``users`` clients each
send the next request when the last one has ended (TGIS, a server of 2023 that prefills in
iterations of its own). Of each LLM and group of GPUs two numbers are taken from the case
with the fewest users alone: the time to the first token and the gap between tokens. What
they exceed the cost model by is what this server adds to an iteration. All other cases,
up to 128 times the load, are predicted. Cases with errors do not count: long requests
failed in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from foreserve.models import catalog
from foreserve.models.codec import did_you_mean
from foreserve.models.cost import IterationTime
from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.perf.compact import compact
from foreserve.models.perf.model import Measured
from foreserve.models.record import Record
from foreserve.planner.display import NONE
from foreserve.planner.figures import COLORS, new_figure, plain_ticks, save_figure
from foreserve.planner.recorded_runs import gpu_name, llm_name, read_table
from foreserve.planner.tables import Part

TARGET = 0.15
"""Largest median error of the throughput to stay within."""
QUANTILES = (0.5, 0.75, 0.9, 1.0)
GPUS = {"a100": "a100-40gb", "a10": "a10g"}
"""The data set's A100 is the PCIe part of 40 GB; A10 stands for A10G (same memory)."""
CASES: Mapping[str, float | None] = {
    "model": None,
    "gpu": None,
    "n_gpus": 1,
    "users": 1,
    "errors": 0,
    "duration_s": 0,
    "output_tok_per_s": 0,
}
REQUESTS: Mapping[str, float | None] = {
    "gpu": None,
    "n_gpus": 1,
    "users": 1,
    "start_ms": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "ack_ms": 0,
    "ttft_ms": 0,
}


class Shape(NamedTuple):
    """What a configuration file says of an LLM without a gate in its feed-forward."""

    params: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "gpt-neox-20b": Shape(20.6e9, 44, 6144, 64, 64, 96, 50432),
    "starcoder": Shape(15.5e9, 40, 6144, 48, 1, 128, 49152),
    "mpt-7b-instruct2": Shape(6.65e9, 32, 4096, 32, 32, 128, 50432),
    "codegen2-16b": Shape(16.0e9, 34, 6144, 24, 24, 256, 51200),
}
"""LLMs of before 2023 that the catalogue lacks, as their configuration files have them;
parameters to three digits. Their feed-forward is four times as wide as the rest."""


class ClosedLoop(Protocol):
    """Plays a closed loop on a simulated engine whose prompts do not mix with decodes."""

    def __call__(
        self,
        time: IterationTime,
        lengths: Sequence[tuple[int, int]],
        users: int,
        duration_s: float,
    ) -> float:
        """Output tokens per second. ``lengths`` (input, output) are taken in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(Record):
    """One case that was predicted; throughputs in output tokens per second."""

    llm: str
    gpu: str
    tp: int
    users: int
    measured_tokens_per_s: float
    predicted_tokens_per_s: float

    @property
    def error(self) -> float:
        return self.predicted_tokens_per_s / self.measured_tokens_per_s - 1


class _Group(NamedTuple):
    """Cases of one LLM on one group of GPUs, by users, and all their requests."""

    llm: str
    gpu: str
    tp: int
    time: IterationTime
    cases: pd.DataFrame
    requests: pd.DataFrame


def validate_pilot(
    folder: str,
    play: ClosedLoop,
    *,
    llms: Sequence[str] = (),
    gpus: Sequence[str] = (),
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> tuple[tuple[Case, ...], Mapping[str, int]]:
    """All cases of the folder but the lightest of each group, predicted; and the number
    of those left out by reason.

    ``llms`` and ``gpus`` narrow it down, by the names in the folder (of an LLM its last
    part will do). `InvalidInput` where the folder is broken or nothing can be predicted.
    """
    groups, left_out = _groups(Path(folder), llms, gpus)
    total = sum(len(group.cases) - 1 for group in groups)
    if not total:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in left_out.items())
        raise InvalidInput(
            "no case to predict", file=folder, hint=f"left out: {reasons or 'nothing'}"
        )
    found: list[Case] = []
    for group in groups:
        lightest, *others = group.cases.to_dict("records")
        users = group.requests["users"]
        time = calibrated(group.time, group.requests[users == lightest["users"]])
        for case in others:
            own = group.requests[users == case["users"]]
            lengths = own[["input_tokens", "output_tokens"]].clip(lower=1).astype(int)
            rate = play(
                time,
                list(lengths.itertuples(index=False, name=None)),
                int(case["users"]),
                float(case["duration_s"]),
            )
            found.append(
                Case(
                    llm=group.llm,
                    gpu=group.gpu,
                    tp=group.tp,
                    users=int(case["users"]),
                    measured_tokens_per_s=float(case["output_tok_per_s"]),
                    predicted_tokens_per_s=rate,
                )
            )
            progress(len(found), total)
    return tuple(found), left_out


def _groups(
    folder: Path, llms: Sequence[str], gpus: Sequence[str]
) -> tuple[list[_Group], Mapping[str, int]]:
    summary = read_table(str(folder / "summary.csv"), CASES)
    summary = _named(summary, "model", llms, lambda name: name.rpartition("/")[2])
    summary = _named(summary, "gpu", gpus, str)
    left_out: Counter[str] = Counter()
    found = []
    for model, of_llm in summary.groupby("model", sort=False):
        file = folder / f"requests_{str(model).rpartition('/')[2]}.csv.gz"
        spec = _spec(str(model))
        if spec is None:
            left_out[f"{model} is in no catalogue"] += len(of_llm)
            continue
        requests = None
        for key, cases in of_llm.groupby(["gpu", "n_gpus"]):
            gpu, tp = str(key[0]), int(cases["n_gpus"].iloc[0])
            time = _time(spec, gpu, tp)
            if time is None:
                left_out[f"no kernel tables of {gpu}"] += len(cases)
                continue
            clean = cases[(cases["errors"] == 0) & (cases["output_tok_per_s"] > 0)]
            left_out["requests failed"] += len(cases) - len(clean)
            left_out["lightest of its group, or alone in it"] += min(1, len(clean))
            if len(clean) < 2:
                continue
            if requests is None:
                requests = read_table(str(file), REQUESTS, blank=("itl_mean_ms",))
            own = requests[(requests["gpu"] == gpu) & (requests["n_gpus"] == tp)]
            known = clean["users"].isin(own["users"])
            if not known.all():
                raise InvalidInput(
                    f"no requests of {gpu} x {tp} with "
                    f"{clean['users'][~known].iloc[0]:.0f} users",
                    file=str(file),
                )
            found.append(
                _Group(
                    llm=spec.name,
                    gpu=gpu,
                    tp=tp,
                    time=time,
                    cases=clean.sort_values("users", kind="stable"),
                    requests=own.sort_values("start_ms", kind="stable"),
                )
            )
    return found, {reason: count for reason, count in left_out.items() if count}


def _named(
    table: pd.DataFrame, column: str, names: Sequence[str], short: Callable[[str], str]
) -> pd.DataFrame:
    """The rows of these names, in full or ``short``, whatever their case; all if none."""
    if not names:
        return table
    there = {
        form.lower(): name
        for name in map(str, table[column].unique())
        for form in (name, short(name))
    }
    for name in names:
        if name.lower() not in there:
            raise InvalidInput(
                f"no case of {name!r} in summary.csv",
                field=column,
                hint=did_you_mean(name, sorted({short(n) for n in there.values()})),
            )
    return table[table[column].isin([there[name.lower()] for name in names])]


def _spec(model: str) -> ModelSpec | None:
    """From the catalogue, else from `SHAPES`; None if in neither."""
    name = llm_name(model)
    try:
        return catalog.llm(name)
    except InvalidInput:
        shape = SHAPES.get(name)
    if shape is None:
        return None
    return ModelSpec(
        name=name,
        hub_id=model,
        intermediate=4 * shape.hidden,
        max_context_tokens=2048,
        gated=False,
        **{**shape._asdict(), "params": round(shape.params)},
    )


def _time(spec: ModelSpec, gpu: str, tp: int) -> IterationTime | None:
    name = GPUS.get(gpu.lower()) or gpu_name(gpu)
    known = next((g for g in catalog.gpus() if g.name == name), None)
    timing = Measured().timing(spec, known, tp) if known and tp in spec.tp else None
    return compact(timing) if timing else None


def calibrated(time: IterationTime, lightest: pd.DataFrame) -> IterationTime:
    """``time`` that meets the median gap and first token of one case: faster kernels where
    it was too slow, more between iterations where it was too fast."""
    first_s = float((lightest["ttft_ms"] + lightest["ack_ms"]).median()) / 1e3
    prompts = lightest["input_tokens"].to_numpy(dtype=np.float64)
    step_s = time.decode_s(1, float(prompts.mean()))
    prompt_s = float(np.median([time.prefill_s(x, x * x) for x in prompts.tolist()]))
    gaps_ms = lightest["itl_mean_ms"].dropna()
    # Answers of one token have no gap to learn from.
    gap_s = float(gaps_ms.median()) / 1e3 if len(gaps_ms) else step_s
    scale, more_s = min(1.0, gap_s / step_s), max(0.0, gap_s - step_s)
    later_s = max(0.0, first_s - prompt_s)
    return replace(
        time,
        decode_base_s=time.decode_base_s * scale + more_s,
        decode_s_per_seq=time.decode_s_per_seq * scale,
        decode_s_per_context_token=time.decode_s_per_context_token * scale,
        prefill_base_s=time.prefill_base_s + later_s,
        prefill_floor_s=time.prefill_floor_s + later_s,
    )


def pilot_errors(cases: Sequence[Case]) -> Mapping[str, float]:
    """Quantiles of the absolute errors of the throughput, and their median with sign."""
    errors = np.array([case.error for case in cases])
    names = [f"p{q:.0%}".rstrip("%") for q in QUANTILES[1:-1]]
    found = np.quantile(np.abs(errors), QUANTILES)
    return {
        **dict(zip(["median", *names, "max"], map(float, found), strict=True)),
        "bias": float(np.median(errors)),
    }


def pilot_parts(
    cases: Sequence[Case], left_out: Mapping[str, int], folder: str
) -> list[Part]:
    """Error of every case, and the quantiles by LLM and of all."""
    users = sorted({case.users for case in cases})
    by_group: dict[tuple[str, str], dict[int, Case]] = {}
    by_llm: dict[str, list[Case]] = {}
    for case in cases:
        group = by_group.setdefault((case.llm, f"{case.tp} x {case.gpu}"), {})
        group[case.users] = case
        by_llm.setdefault(case.llm, []).append(case)
    rows = [
        [*key, *(f"{own[n].error:+.0%}" if n in own else NONE for n in users)]
        for key, own in by_group.items()
    ]
    note = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
    every = {**by_llm, "all": list(cases)} if len(by_llm) > 1 else by_llm
    quantiles = []
    for name, own_cases in every.items():
        found = pilot_errors(own_cases)
        texts = (f"{found[k]:.1%}" for k in found if k != "bias")
        quantiles.append(
            [name, str(len(own_cases)), *texts, f"{found['bias']:+.1%}"],
        )
    heads = ["", "cases", *(k for k in pilot_errors(cases) if k != "bias"), "bias"]
    return [
        Part(
            f"Throughput by users: simulated / measured - 1, {Path(folder).name}",
            ["", "on", *map(str, users)],
            rows,
            f"Not predicted: {note}" if note else "",
        ),
        Part(
            "Error of the throughput",
            heads,
            quantiles,
            f"asked: median of all <= {TARGET:.0%}",
        ),
    ]


def draw_pilot(cases: Sequence[Case], path: str) -> None:
    """Throughput by users, one panel an LLM: measured (points), predicted (lines)."""
    llms = list(dict.fromkeys(case.llm for case in cases))
    columns = min(3, len(llms))
    figure = new_figure(columns, -(-len(llms) // columns), width=3.6, height=3.2)
    for place, llm in enumerate(llms):
        axes = figure.add_subplot(-(-len(llms) // columns), columns, place + 1)
        own = [case for case in cases if case.llm == llm]
        groups = list(dict.fromkeys((case.gpu, case.tp) for case in own))
        for index, (gpu, tp) in enumerate(groups):
            rows = [case for case in own if (case.gpu, case.tp) == (gpu, tp)]
            color, at = COLORS[index % len(COLORS)], [case.users for case in rows]
            filled = color if index < len(COLORS) else "none"
            measured = [case.measured_tokens_per_s for case in rows]
            predicted = [case.predicted_tokens_per_s for case in rows]
            axes.plot(
                at, predicted, marker="_", color=color, lw=1.2, label=f"{tp} x {gpu}"
            )
            axes.plot(at, measured, "o", ms=4, mec=color, mfc=filled)
        axes.set(xscale="log", yscale="log", title=llm)
        axes.legend(fontsize=7, loc="lower right")
        plain_ticks(axes)
        users = sorted({case.users for case in own})
        axes.set_xticks(users, [str(number) for number in users])
    figure.supxlabel("users", fontsize=9)
    figure.supylabel(
        "output tokens/s: measured (points), simulated (lines)", fontsize=9
    )
    save_figure(figure, path)
