"""MuxServe's recorded runs, simulated: sharing of SMs, GPUs of one's own, turns.

    python benchmarks/muxserve.py

16 LLMs (day 55 of Chatbot Arena, times five compressions) on 4 x 8 A100-80GB, 4,089
requests a run, Poisson; mean of 3 seeds beside what the authors recorded. Prompts and
outputs are lognormal (sigma 1.0 and 0.8) within the stated bounds (prompts of 4 to 1,024
tokens, at most 2,048 in all), scaled to the stated means of 161 and 337: the distribution
is not known, this one is ours. Iteration times are fits (DistServe's form, relative least
squares) to the profile at the share of SMs in question, plus the stated overhead per
sequence of a decode batch, in all three:

* mux: placement of `planner.policies.muxserve` as published, prompts and decodes of all
  LLMs of a mesh at the same time (`sm_sharing`).
* spatial: each LLM on GPUs of its own, as few as hold it (28 in all; what was done with the
  other 4 is not known); prompts first, first come first served. spatial-32: the 4 double
  those with the most load per GPU.
* temporal: mux's placement, one iteration at a time with all SMs, LLMs in turn.

All but mux run in the shared engine. Throughput of an LLM: its requests over the end of
its last one. Writes benchmarks/results/muxserve.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from record import write_result
from sm_sharing import TOKENS, Job, Lane, MuxMesh

from foreserve.models.cost import IterationTime
from foreserve.planner.policies.muxserve import MuxLlm, place
from foreserve.planner.policies.muxserve_profile import SIZES, SmProfile
from foreserve.runtime.scheduler import Fcfs, Profile, RoundRobin
from foreserve.runtime.simulated.shared import Hosted, Pool, SharedEngine, SharedJob
from foreserve.runtime.turns import Rules

DATA = Path("..") / "shared/data/muxserve_profile"
SEEDS, REQUESTS, MEANS = range(3), 4089, (161, 337)
RECORDED = {
    500: (
        (4.19, 38.1, 5.2, 76, 8.9),
        (3.87, 36.5, 8.3, 64, 9.4),
        (3.51, 32.0, 8.1, 135, 11.5),
    ),
    800: (
        (5.37, 50.6, 6.6, 87, 10.0),
        (4.63, 47.1, 13.2, 83, 13.9),
        (2.72, 27.7, 25.2, 234, 29.8),
    ),
    1200: (
        (6.31, 61.6, 6.2, 125, 11.6),
        (5.06, 55.8, 16.4, 89, 16.2),
        (4.70, 48.7, 6.4, 177, 13.1),
    ),
    1600: (
        (7.57, 71.6, 6.0, 165, 11.2),
        (5.36, 62.1, 17.4, 90, 17.9),
        (5.18, 47.9, 6.8, 272, 19.0),
    ),
    2000: (
        (7.83, 76.5, 6.3, 181, 9.5),
        (5.67, 67.8, 19.2, 90, 19.4),
        (5.35, 49.6, 6.8, 294, 13.0),
    ),
}
"""mux, spatial (of either kind), temporal: rate-weighted throughput and sum of throughputs
(req/s), mean TTFT s, mean TPOT ms, mean over LLMs of the P99 TTFT s."""
MODES = ("mux", "spatial", "spatial-32", "temporal")
Times = Mapping[tuple[str, int, int], IterationTime]
"""By size, TP and percent of SMs."""


def fits(table: pd.DataFrame) -> dict[tuple[str, int, int], IterationTime]:
    """Coefficients of every (size, TP, percent of SMs)."""
    found = {}
    for (size, tp, sm), rows in table.groupby(["model", "tp", "sm_percent"]):
        batch, length = rows["batch"].to_numpy(), rows["seq_len"].to_numpy()
        ones = np.ones(len(rows))
        prompts = _least(rows["prefill_ms"], ones, batch * length, batch * length**2)
        steps = _least(rows["decode_ms"], ones, batch, batch * length)
        found[str(size), int(tp), int(sm)] = IterationTime(
            prefill_base_s=prompts[0],
            prefill_s_per_token=prompts[1],
            prefill_s_per_token2=prompts[2],
            decode_base_s=steps[0],
            decode_s_per_seq=steps[1] + SIZES[str(size)].decode_overhead_s,
            decode_s_per_context_token=steps[2],
            relative_error=0.15,
            source="muxserve profile",
        )
    return found


def _least(ms: pd.Series[float], *columns: Any) -> list[float]:
    """Seconds; relative least squares over what ran, without negative coefficients."""
    seconds = ms.to_numpy() / 1e3
    ran = seconds > 0
    matrix = np.stack(columns, axis=1)[ran] / seconds[ran, None]
    kept = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, kept], np.ones(ran.sum()), rcond=None)[0]
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    values = dict(zip(kept, found.tolist(), strict=True))
    return [values.get(i, 0.0) for i in range(matrix.shape[1])]


def draw(llms: Sequence[MuxLlm], rng: np.random.Generator) -> list[Job]:
    """The requests of one run, in order of arrival."""
    rates = np.array([llm.rate_rps for llm in llms])
    at_s = np.cumsum(rng.exponential(1 / rates.sum(), REQUESTS))
    llm = rng.choice(len(llms), REQUESTS, p=rates / rates.sum())
    shape = rng.normal(size=(REQUESTS, 2)) * (1.0, 0.8)
    scale = np.array(MEANS, dtype=float)
    for _ in range(20):
        prompt = np.clip(np.exp(shape[:, 0]) * scale[0], 4, 1024)
        output = np.clip(np.exp(shape[:, 1]) * scale[1], 1, 2048 - prompt)
        scale *= np.array(MEANS) / (prompt.mean(), output.mean())
    rows = zip(llm.tolist(), at_s.tolist(), prompt, output, strict=True)
    return [Job(i, at, round(p), max(1, int(o))) for i, at, p, o in rows]


def by_turns(
    llms: Sequence[MuxLlm], jobs: Sequence[Job], gpus: int, times: Times, alone: bool
) -> None:
    """Serve one group in the shared engine; ``Job.llm`` is the index in ``llms``."""
    weights_gb = sum(llm.of.weight_gb / gpus + 7.6 for llm in llms)
    usual = int(np.median([job.output_tokens for job in jobs])) if jobs else 1
    hosted = [
        Hosted(
            time=(time := times[llm.size, gpus, 100]),
            kv_bytes_per_token=llm.of.layers * llm.of.hidden * 4 // gpus,
            profile=Profile(
                reference_s=time.isolated_s(*MEANS),
                decode_s=time.isolated_s(*MEANS),
                rate_rps=llm.rate_rps,
            ),
            input_tokens=MEANS[0],
            output_tokens=MEANS[1],
            usual_output_tokens=usual,
        )
        for llm in llms
    ]
    pool = Pool(num_bytes=round((80 - weights_gb) * 1e9), page_bytes=16 << 20)
    policy = Fcfs() if alone else RoundRobin()
    engine = SharedEngine(hosted, pool, policy, Rules(max_prompt_tokens=TOKENS))
    coming = 0
    while coming < len(jobs) or engine.next_s < math.inf:
        if coming < len(jobs) and jobs[coming].arrival_s <= engine.next_s:
            job = jobs[coming]
            shared = SharedJob(
                request=coming,
                service=job.llm,
                arrival_s=job.arrival_s,
                input_tokens=job.input_tokens,
                output_tokens=job.output_tokens,
            )
            engine.submit(shared, job.arrival_s)
            coming += 1
            continue
        now_s = engine.next_s
        for done in engine.advance():
            jobs[done.request].first_s = done.first_token_s or now_s
            jobs[done.request].end_s = now_s


def own_gpus(llms: Sequence[MuxLlm], total: int) -> list[int]:
    """As few as hold each; of ``total`` the rest doubles those of most load per GPU."""
    found = [llm.of.base_gpus for llm in llms]
    left = total - sum(found)
    for i in sorted(
        range(len(llms)),
        key=lambda i: -llms[i].rate_rps * llms[i].of.scale / found[i],
    ):
        if found[i] <= left:
            left -= found[i]
            found[i] *= 2
    return found


def run(case: tuple[int, str, int]) -> tuple[float, ...]:
    """One run's numbers as in `RECORDED`."""
    compression, mode, seed = case
    table = pd.read_csv(DATA / "llama_sm_profile.csv.gz")
    times = fits(table)
    llms = [
        MuxLlm(name=name, size=size, rate_rps=rate * compression)
        for name, size, _, rate in pd.read_csv(
            DATA / "chatlmsys_day55_rates.csv"
        ).values
    ]
    jobs = draw(llms, np.random.default_rng(seed))
    groups: list[tuple[int, list[tuple[int, int, int]]]]
    alone = mode.startswith("spatial")
    if alone:
        gpus = own_gpus(llms, 32 if mode == "spatial-32" else 0)
        groups = [(n, [(i, 0, 0)]) for i, n in enumerate(gpus)]
    else:
        cells = SmProfile(table.itertuples(index=False, name=None))
        found = place(llms, cells, nodes=4, corrected=False)
        if found is None:
            raise ValueError("no placement")
        number = {llm.name: i for i, llm in enumerate(llms)}
        groups = [
            (m.gpus, [(number[llm.name], s.decode_sm, s.batch) for llm, s in m.llms])
            for m in found.meshes
            if m.llms
        ]
    for n, members in groups:
        at = {i: k for k, (i, _, _) in enumerate(members)}
        here = [llms[i] for i, _, _ in members]
        mine = [job for job in jobs if job.llm in at]
        before = [job.llm for job in mine]
        for job in mine:
            job.llm = at[job.llm]
        if mode == "mux":
            kv_gib = n * 80 - sum(llm.of.weight_gb + 7.6 * n for llm in here)
            lanes = [
                Lane(
                    prompt_time=times[llm.size, n, llm.of.prefill_sm],
                    decode_time=times[llm.size, n, sm],
                    prompt_units=llm.of.prefill_sm // 10,
                    decode_units=sm // 10,
                    kv_gib=llm.of.kv_gib_per_token,
                    mean_tokens=sum(MEANS),
                    batch=batch,
                )
                for llm, (_, sm, batch) in zip(here, members, strict=True)
            ]
            MuxMesh(lanes, kv_gib).serve(mine)
        else:
            by_turns(here, mine, n, times, alone)
        for job, llm in zip(mine, before, strict=True):
            job.llm = llm
    return _numbers(llms, jobs)


def _numbers(llms: Sequence[MuxLlm], jobs: Sequence[Job]) -> tuple[float, ...]:
    llm = np.array([job.llm for job in jobs])
    end_s = np.array([job.end_s for job in jobs])
    ttft_s = np.array([job.first_s - job.arrival_s for job in jobs])
    many = np.array([job.output_tokens > 1 for job in jobs])
    steps = np.array([max(job.output_tokens - 1, 1) for job in jobs])
    tpot_s = (end_s - ttft_s - [job.arrival_s for job in jobs]) / steps
    seen = np.unique(llm)
    rps = np.array([(llm == i).sum() / end_s[llm == i].max() for i in seen])
    rate = np.array([llms[i].rate_rps for i in seen])
    p99 = np.mean([np.quantile(ttft_s[llm == i], 0.99) for i in seen])
    return (
        float(rps @ rate / rate.sum()),
        float(rps.sum()),
        float(ttft_s.mean()),
        float(tpot_s[many].mean() * 1e3),
        float(p99),
    )


@click.command()
def main() -> None:
    """Print and write all runs beside the recorded ones."""
    cases = [(c, mode, seed) for c in RECORDED for mode in MODES for seed in SEEDS]
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(run, cases), strict=True))
    keys = ("weighted_rps", "rps", "ttft_s", "tpot_ms", "ttft_p99_s")
    rows = []
    for compression, recorded in RECORDED.items():
        mux, spatial, temporal = recorded
        known = (mux, spatial, spatial, temporal)
        for mode, stated in zip(MODES, known, strict=True):
            mean = np.mean([found[compression, mode, seed] for seed in SEEDS], axis=0)
            digits = [float(f"{value:.3g}") for value in mean]
            row = {
                "compression": compression,
                "mode": mode,
                **dict(zip(keys, digits, strict=True)),
                "recorded": dict(zip(keys, stated, strict=True)),
            }
            rows.append(row)
            click.echo(f"{compression:5} {mode:9} {digits}  recorded {stated}")
    write_result("muxserve", {"seeds": len(SEEDS), "requests": REQUESTS, "rows": rows})


if __name__ == "__main__":
    main()
