"""Closed-loop cases of a real server against the simulated engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.planner.recorded_pilot import (
    TARGET,
    Case,
    calibrated,
    pilot_errors,
    pilot_parts,
    validate_pilot,
)
from tests.build import TIME

SHARED = Path(__file__).parents[2] / "shared" / "data" / "llm_pilot"
SUMMARY = """model,gpu,n_gpus,users,errors,duration_s,output_tok_per_s
meta/llama-7b,H100,1,1,0,120.0,40.0
meta/llama-7b,H100,1,4,0,120.0,100.0
meta/llama-7b,H100,1,2,0,120.0,80.0
meta/llama-7b,H100,1,8,3,120.0,90.0
meta/llama-7b,T4,4,1,0,120.0,10.0
google/flan-t5-xl,H100,1,1,0,120.0,10.0
"""
HEAD = (
    "gpu,n_gpus,users,start_ms,input_tokens,output_tokens,ack_ms,ttft_ms,itl_mean_ms\n"
)
REQUESTS = HEAD + "".join(
    f"H100,1,{users},{start},{100 + users},{output},10,90,{gap}\n"
    for users in (1, 2, 4)
    for start, output, gap in ((900, 21, 20.0), (0, 11, 20.0), (950, 1, ""))
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """One group of three whole cases, one with errors, a GPU and an LLM not known."""
    (tmp_path / "summary.csv").write_text(SUMMARY)
    (tmp_path / "requests_llama-7b.csv.gz").write_bytes(_gzip(REQUESTS))
    return tmp_path


def _gzip(text: str) -> bytes:
    import gzip

    return gzip.compress(text.encode(), mtime=0)


def test_the_lightest_case_calibrates_and_the_others_are_played(folder):
    """Users 2 and 4 are played in order, with the lengths by their start and the time that
    meets users 1: 20 ms a step, 100 ms to the first token. 80 is told as 100 (+25 %), 100
    as 50 (-50 %)."""
    seen = []

    def play(time, lengths, users, duration_s):
        seen.append((users, duration_s, lengths))
        assert time.decode_s(1, 101.0) == pytest.approx(0.020)
        assert time.prefill_s(101, 101**2) == pytest.approx(0.100)
        return {2: 100.0, 4: 50.0}[users]

    cases, left_out = validate_pilot(str(folder), play)
    assert seen == [
        (users, 120.0, [(100 + users, 11), (100 + users, 21), (100 + users, 1)])
        for users in (2, 4)
    ]
    assert [case.error for case in cases] == pytest.approx([0.25, -0.5])
    assert (cases[0].llm, cases[0].gpu, cases[0].tp) == ("llama-7b", "H100", 1)
    assert left_out == {
        "requests failed": 1,
        "lightest of its group, or alone in it": 1,
        "no kernel tables of T4": 1,
        "google/flan-t5-xl is in no catalogue": 1,
    }


def test_calibration_scales_down_and_adds_up():
    """The made-up engine steps in 10 ms and more: a gap of 5 ms makes its kernels faster,
    one of 30 ms adds what is missing; without any gap the step stays."""
    prompt = {"input_tokens": [100.0], "ack_ms": [0.0], "ttft_ms": [500.0]}
    for gap_ms in (5.0, 30.0):
        lightest = pd.DataFrame({**prompt, "itl_mean_ms": [gap_ms]})
        found = calibrated(TIME, lightest)
        assert found.decode_s(1, 100.0) == pytest.approx(gap_ms / 1e3)
        assert found.prefill_s(100, 100**2) == pytest.approx(0.5)
        more_s = found.decode_s(9, 100.0) - found.decode_s(1, 100.0)
        known_s = TIME.decode_s(9, 100.0) - TIME.decode_s(1, 100.0)
        step_s = TIME.decode_s(1, 100.0)
        assert more_s == pytest.approx(known_s * min(1, gap_ms / 1e3 / step_s))
    lone = calibrated(TIME, pd.DataFrame({**prompt, "itl_mean_ms": [np.nan]}))
    assert lone.decode_s(1, 100.0) == pytest.approx(TIME.decode_s(1, 100.0))


def test_errors_and_tables_by_hand():
    """Absolute errors 0.1, 0.2, 0.4: median 0.2, P90 0.36; the table has a column per
    number of users and a dash where there was no case."""

    def case(llm: str, users: int, predicted: float) -> Case:
        return Case(
            llm=llm,
            gpu="H100",
            tp=2,
            users=users,
            measured_tokens_per_s=100.0,
            predicted_tokens_per_s=predicted,
        )

    cases = [case("a", 2, 110.0), case("a", 4, 80.0), case("b", 4, 140.0)]
    found = pilot_errors(cases)
    assert found["median"] == pytest.approx(0.2)
    assert found["p90"] == pytest.approx(0.36)
    assert found["max"] == pytest.approx(0.4)
    assert found["bias"] == pytest.approx(0.1)
    table, errors = pilot_parts(cases, {"requests failed": 3}, "x/pilot")
    assert table.columns == ["", "on", "2", "4"]
    assert table.rows == [
        ["a", "2 x H100", "+10%", "-20%"],
        ["b", "2 x H100", "–", "+40%"],
    ]
    assert "requests failed: 3" in table.note
    assert [row[:3] for row in errors.rows] == [
        ["a", "2", "15.0%"],
        ["b", "1", "40.0%"],
        ["all", "3", "20.0%"],
    ]


def test_the_command_prints_what_it_found(plan, folder, tmp_path):
    """Table, JSON and picture of the made-up folder; --llm and --gpu narrow it down."""
    args = f"simulate validate --pilot {folder} --llm LLAMA-7b --gpu H100"
    code, out, err = plan(args, "--picture", tmp_path / "p.svg")
    assert (code, err) == (0, "")
    assert "Throughput by users" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "llama-7b" in (tmp_path / "p.svg").read_text()
    found = json.loads(plan(args, "--json")[1])
    assert [case["users"] for case in found["cases"]] == [2, 4]
    assert all(case["predicted_tokens_per_s"] > 0 for case in found["cases"])
    assert found["target"] == TARGET
    assert set(found["left_out"]) == {
        "requests failed",
        "lightest of its group, or alone in it",
    }


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("summary.csv", "n_gpus", "gpus", "no column 'n_gpus'"),
        (
            "summary.csv",
            "120.0,100.0",
            "120.0,many",
            "summary.csv:3: output_tok_per_s: 'many'",
        ),
        ("summary.csv", "120.0,40.0", "120.0,-40.0", "at least 0"),
        ("summary.csv", "H100", "V100", "no case to predict"),
        ("summary.csv", "H100,1,2", "H100,1,3", "no requests of H100 x 1 with 3 users"),
        ("summary.csv", SUMMARY, "", "not a table"),
        ("summary.csv", SUMMARY, None, "no such file"),
        ("requests_llama-7b.csv.gz", REQUESTS, None, "no such file"),
        ("requests_llama-7b.csv.gz", "ttft_ms", "ttft", "no column 'ttft_ms'"),
        ("requests_llama-7b.csv.gz", "20.0", "x", "itl_mean_ms: 'x'"),
    ],
)
def test_a_broken_folder_is_one_line(plan, folder, file, old, new, said):
    """Exit code 2, and a line with file, line and column where there is one."""
    path = folder / file
    packed = file.endswith(".gz")
    if new is None:
        path.unlink()
    else:
        text = (REQUESTS if packed else SUMMARY).replace(old, new)
        path.write_bytes(_gzip(text) if packed else text.encode())
    code, out, err = plan("simulate validate --pilot", folder)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_cut_archive_is_one_line(plan, folder):
    """Half of a gzip file, and one that is none."""
    path = folder / "requests_llama-7b.csv.gz"
    for content in (path.read_bytes()[:60], b"plain text"):
        path.write_bytes(content)
        code, _, err = plan("simulate validate --pilot", folder)
        assert code == 2
        assert "requests_llama-7b.csv.gz" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("", "either --run and --meta"),
        ("--run r.csv", "either --run and --meta"),
        ("--run r.csv --meta m.json --pilot .", "either --run and --meta"),
        ("--run r.csv --meta m.json --llm a", "either --run and --meta"),
        ("--pilot . --profile p", "either --run and --meta"),
        ("--pilot {} --llm lama-7b", "did you mean 'llama-7b'"),
        ("--pilot {} --gpu H200", "no case of 'H200'"),
        ("--pilot {} --picture p.txt", "a picture ends in"),
    ],
)
def test_wrong_use_is_told(plan, folder, args, said):
    """One kind of input, and names that are there."""
    code, _, err = plan("simulate validate", args.format(folder))
    assert code == 2
    assert said in err


def test_names_of_another_folder_are_refused_softly(folder):
    """`validate_pilot` itself raises, for other callers than the command line."""
    with pytest.raises(InvalidInput, match="no case of 'x'"):
        validate_pilot(str(folder), lambda *args: 1.0, llms=["x"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets")
def test_a_real_server_is_reproduced(plan):
    """103 cases of five LLMs on three GPU types: median error of the throughput within
    15 %, each calibrated on two numbers of its lightest case."""
    code, out, err = plan("simulate validate --json --pilot", SHARED)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert len(found["cases"]) == 103
    assert found["errors"]["median"] <= TARGET
    assert abs(found["errors"]["bias"]) <= 0.05
