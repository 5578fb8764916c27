"""Counts: what rate sources say, and back from a trace."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.traces.lengths import LengthQuantiles, read_lengths
from foreserve.traces.rates import (
    Rates,
    is_rates,
    rates_of,
    read_rates,
    sample_requests,
    write_rates,
)
from foreserve.traces.trace import Trace

SHARED = Path(__file__).parents[2] / "shared" / "data"
TABLE = "t_s,width_s,llm,requests\n"
SERVEGEN = "t_s,client,requests,iat_cv,iat_dist,iat_shape,iat_scale\n"
DIGITISED = "t_min,rpm_min,rpm_mid,rpm_max\n"
NAN = None


def put(folder, text, name="t.csv"):
    path = folder / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def plain(grid):
    """NaN as None, to compare."""
    return [[None if np.isnan(x) else x for x in row] for row in grid.tolist()]


def flat(tokens=10.0):
    """Every request alike."""
    same = np.full((1, 2), tokens)
    return LengthQuantiles(
        input_tokens=same,
        output_tokens=same.copy(),
        starts_s=np.zeros(1),
        levels=np.array([0.0, 1.0]),
    )


@pytest.mark.parametrize(
    ("text", "names", "window_s", "start_s", "counts"),
    [
        # Absent is none, blank is unknown; the order of rows does not matter.
        (
            TABLE + "120,60,a,7\n0,60,b,1\n60,60,a,\n",
            ("a", "b"),
            60,
            0,
            [[0, NAN, 7], [1, 0, 0]],
        ),
        # A rate table may name clients.
        (
            "t_s,width_s,llm,requests,cv,client\n0,60,a,1,,x\n0,60,a,2,3,y\n",
            ("a/x", "a/y"),
            60,
            0,
            [[1], [2]],
        ),
        # Clients in order of their numbers; where none reports, nothing is known.
        (
            SERVEGEN + "600,10,5,1,G,1,1\n600,9,6,2,W,1,1\n1800,9,7,1,G,1,1\n",
            ("9", "10"),
            600,
            600,
            [[6, NAN, 7], [5, NAN, 0]],
        ),
        # A collection gap is not zero load, nor is a day that one LLM does not have.
        (
            "model,t_s,total_rps,active_clients,gap\n"
            "x,0,0.5,2,0\nx,600,0,0,1\ny,600,0.25,1,0\n",
            ("x", "y"),
            600,
            0,
            [[300, NAN], [NAN, 150]],
        ),
        (
            "hour,requests,sessions\n5,38,1\n7,0,0\n",
            ("t",),
            3600,
            18000,
            [[38, NAN, 0]],
        ),
        # Stamps are rounded to a hundredth: 7.215 min between them.
        (
            DIGITISED + "21.65,1,10,20\n28.86,1,20,30\n36.08,1,30,40\n",
            ("t",),
            432.9,
            1299,
            [[72.15, 144.3, 216.45]],
        ),
    ],
)
def test_each_source_by_hand(tmp_path, text, names, window_s, start_s, counts):
    """Names, windows and counts of five lines each, with the traps of the source."""
    for name in ("t.csv", "t.csv.gz"):
        path = put(tmp_path, text, name)
        assert is_rates(path)
        found = read_rates(path)
        assert (found.names, found.start_s) == (names, start_s)
        assert found.window_s == pytest.approx(window_s)
        np.testing.assert_allclose(
            found.counts, np.array(counts, dtype=float), rtol=1e-9
        )


def test_servegen_folder(tmp_path):
    """No header, rates for counts, windows left out, an empty family; lengths are maps in
    strings: half of the prompts are 10 tokens, half 20."""
    put(tmp_path, "0.0,0.5,1.5,Gamma,0.4,4.5\n1200.0,0.25,,,,\n", "chunk-10-trace.csv")
    put(tmp_path, "600,0.1,2,Weibull,1,1\n", "chunk-2-trace.csv")
    put(
        tmp_path,
        '{"0": {"input_tokens": "{20: 0.5, 10: 0.5}", "output_tokens": "{7: 1.0}"}}',
        "chunk-10-dataset.json",
    )
    assert is_rates(tmp_path)
    rates = read_rates(tmp_path)
    assert rates.names == ("2", "10")
    assert rates.counts.tolist() == [[0, 60, 0], [300, 0, 150]]
    assert rates.cv is not None
    assert plain(rates.cv) == [[None, 2, None], [1.5, None, None]]
    (lengths,) = read_lengths(tmp_path).values()
    assert lengths.input_tokens[0, [0, 6, 7, 8, -1]].tolist() == [10, 10, 10, 20, 20]
    assert set(lengths.output_tokens[0]) == {7.0}


@pytest.mark.parametrize(
    "cell", ["\"__import__('os')\"", '"{1: -1}"', '"{}"', "3", '"{"', '"{1: 1e999}"']
)
def test_a_histogram_is_read_never_run(tmp_path, cell):
    """Only a map of numbers passes; the fault is named by file and field."""
    text = f'{{"0": {{"input_tokens": {cell}, "output_tokens": "{{7: 1.0}}"}}}}'
    path = put(tmp_path, text, "chunk-1-dataset.json")
    with pytest.raises(InvalidInput, match=r"0\.input_tokens: not a map") as caught:
        read_lengths(tmp_path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "empty file"),
        ("a,b\n1,2\n", 1, "no known columns of counts"),
        (TABLE, None, "no rows"),
        (TABLE + "0,60,a,1\n0,60,a,2\n", 3, "second row for the same"),
        (TABLE + "0,60,a,1\n60,30,a,2\n", 3, "not as in the first row"),
        (TABLE + "0,60,a,1\n30,60,a,2\n", 3, "whole number of epochs"),
        (TABLE + "0,60,a,-1\n", 2, "'-1' is less than 0"),
        (TABLE + "0,60,a,x\n", 2, "requests: 'x' is not a finite number"),
        (TABLE + "0,60,,1\n", 2, "llm: '' is not a name"),
        (TABLE + "0,1,a,1\n1e9,1,a,1\n", 3, "cells after the first"),
        (DIGITISED + "0,1,1,1\n5,1,1,1\n6,1,1,1\n", 3, "as far from the row above"),
        ("hour,t_s,width_s,llm,requests\n0,0,60,a,1\n", 1, "rate table, hourly"),
    ],
)
def test_broken_counts_are_named_in_one_line(tmp_path, text, line, expected):
    """File, line, field, what is wrong."""
    path = put(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        read_rates(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert caught.value.line == line


def test_requests_are_not_rates(tmp_path):
    """What `read_trace` reads is told apart by its header."""
    assert not is_rates(put(tmp_path, "t_s,input_tokens,output_tokens\n0,1,1\n"))
    assert not is_rates(put(tmp_path, '{"timestamp": 0}\n', "t.jsonl"))
    assert not is_rates(tmp_path)
    with pytest.raises(InvalidInput, match="no such file"):
        is_rates(tmp_path / "missing.csv")


def test_counts_of_a_trace_by_hand():
    """Gaps of 1, 1 and 4 s in the first minute: CV sqrt(2)/2. Two requests have one gap,
    of which nothing follows."""
    trace = Trace(
        arrival_s=np.array([1.0, 2.0, 3.0, 7.0, 50.0, 61.0, 62.0]),
        llm=np.array([0, 0, 0, 0, 1, 0, 0], dtype=np.int32),
        llms=("a", "b"),
        input_tokens=np.ones(7, dtype=np.int32),
        output_tokens=np.ones(7, dtype=np.int32),
    )
    rates = rates_of(trace, 60)
    assert rates.counts.tolist() == [[4, 2], [1, 0]]
    assert rates.cv is not None
    assert rates.cv[0, 0] == pytest.approx(0.5**0.5)
    assert plain(rates.cv)[1] == [None, None]
    assert np.isnan(rates.cv[0, 1])


def test_written_rates_are_read_back(tmp_path):
    """Zeros at the ends, unknown counts and CVs survive; same rates, same bytes."""
    rates = Rates(
        names=("a", "b"),
        window_s=600.0,
        start_s=1200.0,
        counts=np.array([[0, 3, np.nan, 0], [5, 0, 1, 0]]),
        cv=np.array([[np.nan, 1.5, np.nan, np.nan], [2, np.nan, 0.1, np.nan]]),
    )
    for name in ("r.csv.gz", "s.csv.gz"):
        write_rates(rates, tmp_path / name)
    again = read_rates(tmp_path / "r.csv.gz")
    assert (again.names, again.window_s, again.start_s) == (("a", "b"), 600, 1200)
    assert again.cv is not None
    assert rates.cv is not None
    assert plain(again.counts) == plain(rates.counts)
    assert plain(again.cv) == plain(rates.cv)
    assert (tmp_path / "r.csv.gz").read_bytes() == (tmp_path / "s.csv.gz").read_bytes()


def test_sampled_requests_have_the_counts_and_the_bursts(rng):
    """The counts of every window are exact, unknown ones are left out, the CV of 2,000
    gaps is near the recorded one, a missing CV is Poisson's 1, and the same seed draws
    the same."""
    rates = Rates(
        names=("a", "b"),
        window_s=600.0,
        start_s=600.0,
        counts=np.array([[2000, np.nan, 0, 3.0], [1, 2000, 0, 0]]),
        cv=np.array([[4, np.nan, np.nan, 0], [np.nan, np.nan, np.nan, np.nan]]),
    )
    trace = sample_requests(rates, flat(), rng)
    found = rates_of(trace, 600.0)
    assert found.counts.tolist() == [[0, 2000, 0, 0, 3], [0, 1, 2000, 0, 0]]
    assert found.cv is not None
    assert found.cv[0, 1] == pytest.approx(4, rel=0.25)
    assert found.cv[0, 4] == pytest.approx(0, abs=0.5)
    assert found.cv[1, 2] == pytest.approx(1, rel=0.1)
    again = [sample_requests(rates, flat(), np.random.default_rng(5)) for _ in "ab"]
    assert (again[0].arrival_s == again[1].arrival_s).all()
    assert set(trace.input_tokens) == {10}
    with pytest.raises(InvalidInput, match="no lengths for 'b'"):
        sample_requests(rates, {"a": flat()}, rng)


def test_lengths_by_hand(tmp_path, rng):
    """Between quantiles lengths are even; the window that starts nearest counts."""
    columns = ["min", "p1", "p5", *(f"p{q}" for q in range(10, 100, 10))]
    header = "client,t_s,field,mean," + ",".join([*columns, "p95,p99,p99_9,max\n"])

    def row(t_s, field, tokens):
        return f"7,{t_s},{field},1," + ",".join(str(tokens) for _ in range(16)) + "\n"

    text = header + row(0, "input_tokens", 10) + row(0, "output_tokens", 0)
    text += row(100, "input_tokens", 30) + row(100, "output_tokens", 5)
    text += row(200, "input_tokens", 99) + row(0, "reason_ratio", 0.5)
    lengths = read_lengths(put(tmp_path, text))["7"]
    inputs, outputs = lengths.draw(np.array([0.0, 49, 51, 1e9]), rng)
    assert inputs.tolist() == [10, 10, 30, 30]
    assert outputs.tolist() == [1, 1, 5, 5]
    falls = text.replace("7,0,input_tokens,1,10", "7,0,input_tokens,1,11")
    with pytest.raises(InvalidInput, match="quantiles do not rise") as caught:
        read_lengths(put(tmp_path, falls))
    assert caught.value.line == 2
    even = LengthQuantiles(
        input_tokens=np.array([[0.0, 1000.0]]),
        output_tokens=np.array([[5.0, 5.0]]),
        starts_s=np.zeros(1),
        levels=np.array([0.0, 1.0]),
    )
    drawn, _ = even.draw(np.zeros(20_000), rng)
    assert drawn.mean() == pytest.approx(500, rel=0.02)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_gaps_in_the_clients_are_those_of_the_totals():
    """Two files of one source agree: which windows are gaps, and the sums of clients."""
    clients = read_rates(SHARED / "servegen" / "rates_m-small_d00-09.csv.gz")
    totals = read_rates(SHARED / "servegen" / "totals.csv.gz")
    total = totals.counts[totals.names.index("m-small")]
    assert int(np.isnan(total).sum()) == 6
    assert (np.isnan(clients.counts).all(axis=0) == np.isnan(total)).all()
    assert np.nanmax(np.abs(clients.counts.sum(axis=0) - total)) < 5
