"""MuxServe's placement: its recorded scores, and its formulas by hand."""

from __future__ import annotations

import csv
import gzip
from functools import cache
from pathlib import Path

import pytest

from foreserve.planner.policies.muxserve import (
    LENGTHS,
    MuxLlm,
    MuxPlacement,
    SmProfile,
    place,
)

DATA = Path(__file__).parents[1] / "../shared/data/muxserve_profile"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs ../shared/data/muxserve_profile"
)


def profile(decode_ms: float = 10.0, prefill_ms: float = 100.0) -> SmProfile:
    """7B on 1 and 2 GPUs: the same times whatever the SMs, batch and length."""
    return SmProfile(
        ("llama-7b", tp, sm, batch, length, prefill_ms, decode_ms)
        for tp in (1, 2)
        for sm in range(30, 101, 10)
        for batch in (1, 4, 256)
        for length in LENGTHS
    )


def test_times_of_the_next_profiled_cell():
    """Batch 2 counts as the 4 that was profiled; 0.1 ms a sequence are added to a step.
    Decode times of 10, 20, 30 ms at the first lengths have running means of 10, 15, 20;
    those that did not run count for nothing. A prompt takes the 256 row, or the longest."""
    times = {32: 10.0, 64: 20.0, 128: 30.0}
    rows = [
        ("llama-7b", 1, 100, 4, at, 10.0 * at, times.get(at, -1.0)) for at in LENGTHS
    ]
    few = SmProfile(rows)
    assert few.decode_s("llama-7b", 1, 100, 2) == pytest.approx(0.015 + 0.0002)
    assert few.prefill_s("llama-7b", 1, 2) == pytest.approx(2.56)
    short = SmProfile([(*row[:5], -1.0, 1.0) if row[4] > 128 else row for row in rows])
    assert short.prefill_s("llama-7b", 1, 2) == pytest.approx(1.28)


def test_one_llm_goes_to_the_mesh_that_gains_most():
    """All splits with one mesh of 8 GPUs: 7B was not profiled there, so no split holds it;
    with two nodes' worth of LLMs each gets a mesh, and scores its rate or more."""
    lone = MuxLlm(name="a", size="llama-7b", rate_rps=1.0)
    assert place([lone], profile(), nodes=1, corrected=True) is None
    llms = [MuxLlm(name=str(i), size="llama-7b", rate_rps=0.5) for i in range(4)]
    found = place(llms, profile(), nodes=1, corrected=True)
    assert found is not None
    placed = [llm.name for mesh in found.meshes for llm, _ in mesh.llms]
    assert sorted(placed) == ["0", "1", "2", "3"]
    assert sum(mesh.gpus for mesh in found.meshes) == 8


@cache
def recorded(compression: int, corrected: bool) -> MuxPlacement:
    with gzip.open(DATA / "llama_sm_profile.csv.gz", "rt") as file:
        cells = SmProfile(
            (
                row["model"],
                *(int(row[key]) for key in ("tp", "sm_percent", "batch", "seq_len")),
                float(row["prefill_ms"]),
                float(row["decode_ms"]),
            )
            for row in csv.DictReader(file)
        )
    with open(DATA / "chatlmsys_day55_rates.csv") as file:
        llms = [
            MuxLlm(
                name=row["llm"],
                size=row["size"],
                rate_rps=float(row["rate_rps_unscaled"]) * compression,
            )
            for row in csv.DictReader(file)
        ]
    found = place(llms, cells, nodes=4, corrected=corrected)
    assert found is not None
    return found


@needs_data
@pytest.mark.parametrize(
    ("compression", "corrected", "score", "idle"),
    [
        (800, False, 7.4889, 4),
        (1600, False, 10.5986, 0),
        (2000, False, 10.6461, 0),
        (500, True, 5.3126, 0),
        (800, True, 8.1418, 0),
        (1200, True, 10.8219, 0),
        (1600, True, 11.2919, 0),
        (2000, True, 11.2225, 0),
    ],
)
def test_scores(compression, corrected, score, idle):
    """Check values to the printed digit: all five of the corrected planner, and three of
    the published one."""
    found = recorded(compression, corrected)
    assert found.score_rps == pytest.approx(score, abs=6e-5)
    assert found.idle_gpus == idle


@needs_data
@pytest.mark.parametrize(("compression", "score"), [(500, 5.2096), (1200, 9.5086)])
def test_scores_that_hang_on_the_order_of_empty_meshes(compression, score):
    """In the published planner the increase of a mesh is taken against another one's value,
    so the order of meshes that hold nothing yet matters; these two come out up to 1.2 %
    below what was stated."""
    found = recorded(compression, False).score_rps
    assert 0.988 * score < found < score


@needs_data
def test_the_published_placement():
    """Compression 2000, entry by entry: mesh size, LLM, SM percent and batch."""
    found = recorded(2000, False)
    entries = sorted(
        (mesh.gpus, *((llm.name, s.decode_sm, s.batch) for llm, s in mesh.llms))
        for mesh in found.meshes
    )
    assert entries == sorted(
        [
            (8, ("llm-1", 90, 576), ("llm-14", 30, 172)),
            (4, ("llm-3", 90, 287), ("llm-12", 30, 204)),
            (4, ("llm-11", 90, 147), ("llm-6", 30, 198)),
            (4, ("llm-4", 90, 450), ("llm-9", 30, 90)),
            (4, ("llm-10", 70, 89), ("llm-5", 30, 32)),
            (2, ("llm-15", 90, 224), ("llm-2", 30, 107)),
            (4, ("llm-16", 90, 89), ("llm-7", 30, 21)),
            (2, ("llm-8", 80, 73), ("llm-13", 30, 201)),
        ]
    )
