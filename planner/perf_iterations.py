"""Single iterations against published profiles that nothing was fitted to.

Each function turns one data set into rows of (batch, tokens or context, measured seconds)
for one LLM, GPU type and TP size, and predicts them with the shipped corrections, which
come from another data set. Sums of layer profiles (LLMServingSim) have no communication
and no step of an engine, so they are compared with kernels and the overhead of layers
alone; whole engines (Splitwise, SageServe, the vLLM runs) with everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from foreserve.models import catalog
from foreserve.models.perf.measured import MeasuredTiming
from foreserve.models.perf.model import Measured
from foreserve.models.perf.timing import Estimate

Floats = NDArray[np.float64]
_GPUS = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000"}
ASKED = 0.12
"""Median absolute error to stay within."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Iterations:
    """Predicted and measured seconds of one cell of one data set."""

    data_set: str
    gpu: str
    llm: str
    tp: int
    phase: str
    batch: Floats
    size: Floats
    """Tokens of each prompt, or context of each sequence."""
    predicted_s: Floats
    measured_s: Floats
    inside: NDArray[np.bool_]
    extrapolated: NDArray[np.bool_]

    @property
    def errors(self) -> Floats:
        return np.asarray(self.predicted_s / self.measured_s - 1)


def iterations(folder: Path) -> Iterator[Iterations]:
    """All cells of the data sets that ``folder`` has."""
    for name, read in SETS.items():
        if (folder / name).is_dir():
            yield from read(folder / name)


def _timing(llm: str, gpu: str, tp: int) -> MeasuredTiming:
    made = Measured().timing(catalog.llm(llm), catalog.gpu(gpu), tp)
    assert made is not None, "these GPU types have kernel tables"
    return made


def _cell(
    data_set: str,
    timing: MeasuredTiming,
    phase: str,
    sizes: tuple[ArrayLike, ArrayLike],
    found: Estimate,
    measured: ArrayLike,
) -> Iterations:
    truth = np.asarray(measured, dtype=np.float64)
    batch, size = (
        np.broadcast_to(np.asarray(part, dtype=np.float64), truth.shape)
        for part in sizes
    )
    return Iterations(
        data_set=data_set,
        gpu=timing.gpu.name,
        llm=timing.llm.name,
        tp=timing.tp,
        phase=phase,
        batch=batch,
        size=size,
        predicted_s=found.seconds,
        measured_s=truth,
        inside=(found.low <= truth) & (truth <= found.high),
        extrapolated=found.extrapolated,
    )


def _splitwise(folder: Path) -> Iterator[Iterations]:
    """vLLM of 2023: prompt and per-token times; DGX-A100 and DGX-H100."""
    table = pd.read_csv(folder / "perf_model.csv.gz")
    gpus = {"a100-80gb": "a100-80gb", "h100-80gb": "h100"}
    llms = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}
    table = table[table["hardware"].isin(gpus)]
    keys = ["model", "hardware", "tensor_parallel"]
    point = ["prompt_size", "batch_size", "token_size"]
    times = ["prompt_time_ms", "token_time_ms"]
    medians = table.groupby([*keys, *point])[times].median().reset_index()
    for key, rows in medians.groupby(keys):
        llm, gpu, tp = map(str, key)
        timing = _timing(llms[llm], gpus[gpu], int(tp))
        prompts = rows[rows["token_size"] == 128]
        batch, size = _columns(prompts, "batch_size", "prompt_size")
        found = timing.prefill(size, prompts=batch)
        measured = prompts["prompt_time_ms"] / 1e3
        yield _cell("splitwise", timing, "prefill", (batch, size), found, measured)
        batch, size, out = _columns(rows, *("batch_size", "prompt_size", "token_size"))
        found = timing.decode(batch, size + out / 2)
        measured = rows["token_time_ms"] / 1e3
        at = (batch, size + out / 2)
        yield _cell("splitwise", timing, "decode", at, found, measured)


def _sageserve(folder: Path) -> Iterator[Iterations]:
    """vLLM on an A100; TP 4 prefills slower than TP 2, so its GPUs have no NVLink."""
    gpu = "a100-80gb-pcie"
    table = pd.read_csv(folder / "llama_a100.csv.gz")
    keys, point = (
        ["model", "tensor_parallel"],
        ["prompt_size", "batch_size", "token_size"],
    )
    times = ["prompt_time_s", "decode_total_time_s"]
    medians = table.groupby([*keys, *point])[times].median().reset_index()
    for key, rows in medians.groupby(keys):
        llm, tp = map(str, key)
        timing = _timing(llm.lower(), gpu, int(tp))
        # With several prompts the column is the time of one of them, not said which.
        alone = rows[rows["batch_size"] == 1]
        (size,) = _columns(alone, "prompt_size")
        found = timing.prefill(size)
        measured = alone["prompt_time_s"]
        yield _cell("sageserve", timing, "prefill", (1, size), found, measured)
        batch, size, out = _columns(rows, *("batch_size", "prompt_size", "token_size"))
        step = timing.decode(batch, size + out / 2)
        # Requests sent at once: each waits for the prompts of the others.
        beside = (
            timing.mixed(batch, size, size).seconds - timing.decode(batch, size).seconds
        )
        added = (batch - 1) * beside / out
        found = Estimate(
            step.seconds + added,
            step.low + added,
            step.high + added,
            step.extrapolated,
            step.source,
        )
        measured = rows["decode_total_time_s"] / rows["token_size"]
        at = (batch, size + out / 2)
        yield _cell("sageserve", timing, "decode", at, found, measured)
    prompts = pd.read_csv(folder / "llama31_8b_tp4_prefill_test.csv.gz")
    median = prompts.groupby("prompt_tokens")["prefill_s"].median()
    timing = _timing("llama-3.1-8b", gpu, 4)
    size = median.index.to_numpy(dtype=np.float64)
    found, prompt_s = timing.prefill(size), median.to_numpy()
    yield _cell("sageserve", timing, "prefill by length", (1, size), found, prompt_s)


def _muxserve(folder: Path) -> Iterator[Iterations]:
    """MuxServe's engine (2024) on an A100 with all of its multiprocessors."""
    table = pd.read_csv(folder / "llama_sm_profile.csv.gz")
    table = table[(table["sm_percent"] == 100)]
    for key, rows in table.groupby(["model", "tp"]):
        llm, tp = map(str, key)
        timing = _timing(llm, "a100-80gb", int(tp))
        for phase, column in (("prefill", "prefill_ms"), ("decode", "decode_ms")):
            ran = rows[rows[column] > 0]
            batch, size = _columns(ran, "batch", "seq_len")
            prompt = phase == "prefill"
            found = (
                timing.prefill(size, prompts=batch)
                if prompt
                else timing.decode(batch, size)
            )
            measured = ran[column] / 1e3
            yield _cell("muxserve", timing, phase, (batch, size), found, measured)


def _vidur(folder: Path) -> Iterator[Iterations]:
    """The linear operators of all layers, each profiled alone; attention is not here."""
    table = pd.read_csv(folder / "mlp_medians.csv.gz")
    llms = {
        "meta-llama/Llama-2-7b-hf": "llama-2-7b",
        "meta-llama/Llama-2-70b-hf": "llama-2-70b",
        "meta-llama/Meta-Llama-3-8B": "llama-3.1-8b",
        "meta-llama/Meta-Llama-3-70B": "llama-3.1-70b",
    }
    gpus = {"a100": "a100-80gb", "h100": "h100"}
    table = table[table["model"].isin(llms) & table["gpu"].isin(gpus)]
    operators = ["attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"]
    for key, rows in table.groupby(["gpu", "model", "num_tensor_parallel_workers"]):
        gpu, llm, tp = map(str, key)
        timing = _timing(llms[llm], gpus[gpu], int(tp))
        (tokens,) = _columns(rows, "num_tokens")
        layer_ms = rows[[f"{name}_ms" for name in operators]].sum(axis=1).to_numpy()
        parts = timing.composer.parts(chunk=tokens, prompts=1)
        kernels = parts["projections"] + parts["feed-forward"]
        found = Estimate.within(
            kernels.seconds, (0.8, 1.25), kernels.extrapolated, timing.source
        )
        measured = layer_ms / 1e3 * timing.llm.layers
        yield _cell("vidur", timing, "linear operators", (1, tokens), found, measured)


def _llmservingsim(folder: Path) -> Iterator[Iterations]:
    """vLLM's layers, profiled one by one; summed up to an iteration."""
    for head, gpu, llm, tp in _profiles(folder):
        timing = _timing(llm, gpu, tp)
        if timing.llm.moe is not None and tp > 1:
            continue  # its experts were profiled whole
        yield from _layer_sums(folder, head, timing)


def profile_cells(folder: Path, timing: MeasuredTiming) -> list[Iterations]:
    """What a folder of layer profiles says of the LLM, GPU and TP size of ``timing``,
    beside its prediction; empty where it has none."""
    wanted = (timing.gpu.name, timing.llm.name, timing.tp)
    return [
        cell
        for head, *found in _profiles(folder)
        if tuple(found) == wanted
        for cell in _layer_sums(folder, head, timing)
    ]


def _profiles(folder: Path) -> Iterator[tuple[str, str, str, int]]:
    """Begin of the files' names, GPU and LLM by catalogue names, and TP of each profile."""
    for path in sorted(folder.glob("*_dense.csv.gz")):
        head, _, tp = path.name.removesuffix("_dense.csv.gz").rpartition("_tp")
        gpu, _, llm = head.partition("_")
        yield head, _GPUS.get(gpu, gpu), _llm_name(llm), int(tp)


def _layer_sums(
    folder: Path, head: str, timing: MeasuredTiming
) -> Iterator[Iterations]:
    stem, experts = f"{head}_tp{timing.tp}", folder / f"{head}_tp1_moe.csv.gz"
    llm = timing.llm
    dense = _by_size(folder / f"{stem}_dense.csv.gz", "tokens", "layer")
    last = _by_size(folder / f"{stem}_per_sequence.csv.gz", "sequences", "layer")
    attention = pd.read_csv(folder / f"{stem}_attention.csv.gz")
    once = [name for name in dense if name in ("embedding", "final_layernorm")]
    layer = dense.drop(columns=once).sum(axis=1)
    if "layernorm" in dense:
        layer = layer + dense["layernorm"]  # two in each layer
    routed: Callable[[Floats], Floats | float] = lambda tokens: 0.0  # noqa: E731
    if llm.moe is not None:
        routed = _routed(experts, llm.moe.experts, llm.moe.experts_per_token)

    def whole_s(tokens: Floats, sequences: Floats, attention_us: Floats) -> Floats:
        each = _at(layer, tokens) + attention_us + routed(tokens)
        ends = _at(dense[once].sum(axis=1), tokens) + _at(last.sum(axis=1), sequences)
        return np.asarray((llm.layers * each + ends) / 1e6)

    # A profile of layers holds neither communication nor an engine's step.
    alone = replace(
        timing, corrections=replace(timing.corrections, step_s=0.0), communicates=False
    )
    steps = attention[(attention["prefill_chunk"] == 0) & (attention["n_decode"] > 0)]
    steps = steps[(steps["kv_decode"] >= 128)]
    steps = steps[steps["n_decode"] * steps["kv_decode"] <= 400_000]
    batch, context, us = _columns(steps, "n_decode", "kv_decode", "time_us")
    found = alone.decode(batch, context)
    measured = whole_s(batch, batch, us)
    yield _cell("llmservingsim", timing, "decode", (batch, context), found, measured)
    chunks = attention[
        (attention["n_decode"] == 0) & (attention["prefill_chunk"] >= 64)
    ]
    tokens, past, us = _columns(chunks, "prefill_chunk", "kv_prefill", "time_us")
    measured = whole_s(tokens, np.ones_like(tokens), us)
    for phase, rows in (("prefill", past == 0), ("prefill after a prefix", past > 0)):
        found = alone.prefill(tokens[rows], past=past[rows])
        at = (1, tokens[rows])
        yield _cell("llmservingsim", timing, phase, at, found, measured[rows])


def _routed(
    path: Path, experts: int, per_token: int
) -> Callable[[Floats], Floats | float]:
    """Experts' time by tokens, at the number of experts that so many tokens touch."""
    table = pd.read_csv(path)
    expected = experts * (1 - (1 - per_token / experts) ** table["tokens"])
    table["off"] = np.abs(np.log(table["activated_experts"] / expected))
    nearest = table.sort_values("off").groupby("tokens")["time_us"].first()
    return lambda tokens: _at(nearest, tokens)


def _vllm_runs(folder: Path) -> Iterator[Iterations]:
    """vLLM 0.19 under overload: each request's TPOT at the batch it met."""
    from foreserve.planner.perf_calibration import Served, slopes_of_replica

    for path in sorted(folder.glob("*_meta.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["engine_kwargs"]["data_parallel_size"] > 1:
            continue  # which replica served a request is not recorded
        name = path.name.removesuffix("_meta.json")
        table = pd.read_csv(folder / f"{name}_requests.csv.gz")
        timing = _timing(_llm_name(name.partition("_")[2]), _GPUS[meta["gpu"]], 1)
        served = [
            Served(
                replica=(timing.llm.name, ("0",)),
                arrival_s=row["scheduled_s"],
                first_token_s=row["first_token_s"],
                end_s=row["last_token_s"],
                input_tokens=int(row["input_tokens"]),
                output_tokens=int(row["output_tokens"]),
            )
            for row in table.to_dict("records")
            if row["output_tokens"] > 1
        ]
        slopes = slopes_of_replica(0, timing, served, 1)
        predicted = slopes.predict_tpot(timing.corrections)
        low, high = timing.corrections.tpot_interval
        estimate = Estimate.within(
            predicted, (low, high), timing.decode(1, 1).extrapolated, timing.source
        )
        at = (1, [row.input_tokens for row in served])
        yield _cell("vllm_e2e_runs", timing, "tpot", at, estimate, slopes.tpot_s)


def _llm_name(name: str) -> str:
    return name.lower().removesuffix("-instruct-2507")


def _columns(table: pd.DataFrame, *names: str) -> tuple[Floats, ...]:
    return tuple(table[name].to_numpy(dtype=np.float64) for name in names)


def _by_size(path: Path, size: str, layer: str) -> pd.DataFrame:
    return pd.read_csv(path).pivot_table(index=size, columns=layer, values="time_us")


def _at(series: pd.Series[float], sizes: Floats) -> Floats:
    return np.interp(sizes, series.index.to_numpy(dtype=np.float64), series.to_numpy())


SETS: dict[str, Callable[[Path], Iterator[Iterations]]] = {
    "llmservingsim_profile": _llmservingsim,
    "vllm_e2e_runs": _vllm_runs,
    "sageserve_perf": _sageserve,
    "splitwise_perf": _splitwise,
    "muxserve_profile": _muxserve,
    "vidur_profile": _vidur,
}
