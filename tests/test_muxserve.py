"""MuxServe's placement: its recorded scores, and its formulas by hand."""

from __future__ import annotations

import csv
import gzip
from functools import cache
from pathlib import Path

import pytest

from foreserve.planner.policies.muxserve import (
    MuxLlm,
    MuxPlacement,
    every_mesh,
    place,
)
from foreserve.planner.policies.muxserve_profile import LENGTHS, SmProfile

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


def test_every_mesh_that_the_rules_allow():
    """Two LLMs of 7B at 0.5 req/s each, profiled on 1 and 2 GPUs: each alone on either and
    both on two. On one GPU there are 43.2 GB for weights, both and 7.6 GB take 35.6; three
    would take 57.2, too much for one GPU but not for two. A 65B was profiled nowhere."""
    llms = [MuxLlm(name=str(i), size="llama-7b", rate_rps=0.5) for i in range(3)]
    found = {(m.gpus, placed) for m, placed in every_mesh(llms, profile(), nodes=1)}
    one = {(n, (i,)) for n in (1, 2) for i in range(3)}
    two = {(n, pair) for n in (1, 2) for pair in ((0, 1), (0, 2), (1, 2))}
    assert found == one | two | {(2, (0, 1, 2))}


@cache
def read_profile() -> SmProfile:
    with gzip.open(DATA / "llama_sm_profile.csv.gz", "rt") as file:
        return SmProfile(
            (
                row["model"],
                *(int(row[key]) for key in ("tp", "sm_percent", "batch", "seq_len")),
                float(row["prefill_ms"]),
                float(row["decode_ms"]),
            )
            for row in csv.DictReader(file)
        )


def read_llms(compression: int) -> list[MuxLlm]:
    with open(DATA / "chatlmsys_day55_rates.csv") as file:
        return [
            MuxLlm(
                name=row["llm"],
                size=row["size"],
                rate_rps=float(row["rate_rps_unscaled"]) * compression,
            )
            for row in csv.DictReader(file)
        ]


@cache
def recorded(compression: int, corrected: bool) -> MuxPlacement:
    llms = read_llms(compression)
    found = place(llms, read_profile(), nodes=4, corrected=corrected)
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


@needs_data
@pytest.mark.parametrize("compression", [500, 2000])
def test_every_mesh_holds_those_of_the_planner(compression):
    """What the greedy planners choose is among the meshes of the exact search, at the same
    value; LLMs of one mesh stand in another order there."""
    llms = read_llms(compression)
    known = {
        (mesh.gpus, frozenset(llms[i].name for i in placed)): mesh.value_rps
        for mesh, placed in every_mesh(llms, read_profile(), nodes=4)
    }
    for corrected in (False, True):
        for mesh in recorded(compression, corrected).meshes:
            if mesh.llms:
                names = frozenset(llm.name for llm, _ in mesh.llms)
                assert known[mesh.gpus, names] == pytest.approx(mesh.value_rps)


@needs_data
def test_what_is_served_of_the_rates():
    """Check values of the published planner at compression 800: capped score and requests
    served; at 2000 nothing is above its rate."""
    assert recorded(800, False).capped_score_rps == pytest.approx(7.4887, abs=6e-5)
    assert recorded(800, False).served_rps == pytest.approx(67.72, abs=6e-3)
    mine = recorded(2000, False)
    assert mine.capped_score_rps == pytest.approx(mine.score_rps)
    assert mine.served_rps == pytest.approx(106.26, abs=6e-3)
