"""Traces: reading what people have, saying what is wrong with it, counting it."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.traces.formats import (
    read_demand,
    read_trace,
    write_demand,
    write_trace,
)
from foreserve.traces.info import describe
from foreserve.traces.samples import sample_path
from foreserve.traces.trace import Trace, bin_demand, merge

HEADER = "arrival_s,llm,input_tokens,output_tokens\n"
ROWS = "0.5,a,10,5\n1.25,b,20,1\n1.25,a,30,7\n"


def put(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def make(arrival, llm=None, llms=("a",), tokens=10):
    count = len(arrival)
    return Trace(
        arrival_s=np.array(arrival, dtype=np.float64),
        llm=np.array(llm if llm is not None else [0] * count, dtype=np.int32),
        llms=llms,
        input_tokens=np.full(count, tokens, dtype=np.int32),
        output_tokens=np.full(count, tokens, dtype=np.int32),
    )


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_canonical_csv(tmp_path, name):
    """Four columns in any order, aliases and optional columns accepted."""
    trace = read_trace(put(tmp_path, HEADER + ROWS, name))
    assert trace.llms == ("a", "b")
    assert trace.arrival_s.tolist() == [0.5, 1.25, 1.25]
    assert trace.llm.tolist() == [0, 1, 0]
    other = "model,tenant,output_tokens,input_tokens,arrival_s\na,x,5,10,0.5\n"
    assert read_trace(put(tmp_path, other)).input_tokens.tolist() == [10]


def test_jsonl(tmp_path):
    """One object per line, the same names."""
    rows = [
        {"arrival_s": 0.5, "model": "a", "input_tokens": 3, "output_tokens": 2},
        {"arrival_s": 2, "llm": "b", "input_tokens": 4, "output_tokens": 1},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    trace = read_trace(put(tmp_path, text, "t.jsonl"))
    assert trace.arrival_s.tolist() == [0.5, 2.0]
    assert trace.llms == ("a", "b")


def test_azure_2023(tmp_path):
    """CRLF line ends, seven decimals, no zone, no LLM column; times become relative."""
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n"
    )
    trace = read_trace(put(tmp_path, text, "conv.csv"))
    assert trace.llms == ("conv",)
    assert trace.arrival_s.tolist() == [0.0, 4.314579]
    assert read_trace(put(tmp_path, text), llm="chat").llms == ("chat",)


def test_azure_2024(tmp_path):
    """A zone, and a whole second without decimals."""
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,10,2\n"
        "2024-05-10 00:00:01+00:00,11,3\n"
    )
    trace = read_trace(put(tmp_path, text, "code.csv"))
    assert trace.arrival_s.tolist() == [0.0, 0.99007]


def test_failed_requests_are_dropped_and_counted(tmp_path):
    """No output token means a failed request."""
    trace = read_trace(put(tmp_path, HEADER + ROWS + "2,a,5,0\n"))
    assert len(trace) == 3
    assert trace.dropped == 1


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "empty file"),
        (HEADER, None, "no requests"),
        ("arrival_s,lllm,input_tokens,output_tokens\n0,a,1,1\n", 1, "did you mean"),
        ("arrival_s,llm,input_tokens\n0,a,1\n", 1, "'output_tokens' is missing"),
        ("x,y\n1,2\n", 1, "unknown trace format"),
        (HEADER + "0,a,1,1\nNaN,a,1,1\n", 3, "not a finite number"),
        (HEADER + "0,a,1,1\n1,a,,1\n", 3, "not a finite number"),
        (HEADER + "0,a,1,1\n1,a,x,1\n", 3, "'x' is not a finite number"),
        (HEADER + "0,a,-5,1\n", 2, "-5 is not a whole number"),
        (HEADER + "0,a,5,-1\n", 2, "-1 is not a whole number"),
        (HEADER + "0,a,1.5,1\n", 2, "1.5 is not a whole number"),
        (HEADER + "5,a,1,1\n4,a,1,1\n", 3, "not sorted"),
        (HEADER + "-5,a,1,1\n", 2, "negative"),
        (HEADER + "0,,1,1\n", 2, "llm: empty"),
        (HEADER + "0,a,1,1,9,9\n0,a,1,1\n", None, "CSV"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", 2, "time stamp"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, text, line, expected):
    """File, line, field, what is wrong: one line, no traceback."""
    path = put(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        read_trace(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message
    if line is not None:
        assert caught.value.line == line


def test_files_that_are_not_text(tmp_path):
    """A missing file, a folder, a truncated gzip, another encoding."""
    whole = gzip.compress((HEADER + ROWS * 2000).encode())
    cases = {"cut.csv.gz": whole[: len(whole) // 2], "plain.csv.gz": b"x,y\n"}
    cases["latin.csv"] = HEADER.encode() + b"0,\xe9,1,1\n"
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "missing.csv", ""):
        with pytest.raises(InvalidInput, match=r"gzip|UTF-8|no such|folder"):
            read_trace(tmp_path / name)


@pytest.mark.parametrize("name", ["o.csv", "o.csv.gz", "o.jsonl", "o.jsonl.gz"])
def test_round_trip(tmp_path, name):
    """Written and read back equal; written twice, the same bytes."""
    trace = read_trace(put(tmp_path, HEADER + ROWS))
    for target in (name, f"again-{name}"):
        write_trace(trace, tmp_path / target, {"source": "here"})
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    again = read_trace(tmp_path / name)
    assert again.llms == trace.llms
    for column in ("arrival_s", "llm", "input_tokens", "output_tokens"):
        assert (getattr(again, column) == getattr(trace, column)).all()
    meta = json.loads((tmp_path / f"{name}.meta.json").read_text())
    assert meta == {"source": "here"}


def test_merge_keeps_time_order():
    """Two services on one clock; equal times keep the order of the arguments."""
    both = merge([make([0, 2]), make([1, 2], llms=("b",))])
    assert both.llms == ("a", "b")
    assert both.arrival_s.tolist() == [0, 1, 2, 2]
    assert both.llm.tolist() == [0, 1, 0, 1]


def test_demand_by_hand():
    """Three requests of 10 s at 0, 5 and 12, epochs of 10 s, end at 20.

    In flight: 1 on [0,5), 2 on [5,10), 1 on [10,12), 2 on [12,15), 1 on [15,20).
    """
    trace = make([0, 5, 12])
    demand = bin_demand(trace, epoch_s=10, busy_s=np.full(3, 10.0), end_s=20)
    assert demand.rate_rps.tolist() == [[0.2, 0.1]]
    assert demand.mean_load.tolist() == [[1.5, 1.3]]
    assert demand.peak_load.tolist() == [[2, 2]]
    assert demand.input_tokens.tolist() == [[10, 10]]


def test_peak_starts_at_what_is_carried_over():
    """A long request counts in every epoch it is in flight, not only where it came."""
    demand = bin_demand(make([1]), epoch_s=10, busy_s=np.array([25.0]), end_s=40)
    assert demand.peak_load.tolist() == [[1, 1, 1, 0]]
    assert demand.mean_load.tolist() == [[0.9, 1.0, 0.6, 0.0]]


def test_partial_last_epoch_is_over_its_elapsed_time():
    """15 s of trace in epochs of 10: the second epoch is 5 s long."""
    demand = bin_demand(make([12, 13]), epoch_s=10, busy_s=np.full(2, 9.0), end_s=15)
    assert demand.rate_rps.tolist() == [[0, 0.4]]
    assert demand.mean_load[0, 1] == pytest.approx((3 + 2) / 5)


def test_demand_table_round_trip(tmp_path):
    """What is written for monitoring reads back; absent rows are zero."""
    trace = make([0, 5, 12, 41], [0, 0, 1, 0], ("a", "b"))
    demand = bin_demand(trace, epoch_s=10, busy_s=np.full(4, 4.0), end_s=50)
    write_demand(demand, tmp_path / "d.csv.gz")
    again = read_demand(tmp_path / "d.csv.gz")
    assert again.llms == demand.llms
    assert again.epoch_s == 10
    for column in ("rate_rps", "mean_load", "peak_load", "output_tokens"):
        assert getattr(again, column) == pytest.approx(
            getattr(demand, column), rel=1e-3
        )


def test_past_select_and_join():
    """`upto` hides the future, `select` orders and pads, `then` joins."""
    demand = bin_demand(make([1, 11]), epoch_s=10, busy_s=np.ones(2), end_s=20)
    past, rest = demand.upto(1), demand.upto(2)
    assert past.num_epochs == 1
    assert past.then(rest).rate_rps.tolist() == [[0.1, 0.1, 0.1]]
    assert demand.select(("z", "a")).rate_rps.tolist() == [[0, 0], [0.1, 0.1]]


@pytest.mark.parametrize(
    ("name", "rows", "llms"), [("azure-2023", 28_185, 2), ("fleet-day", 132_486, 12)]
)
def test_shipped_samples(name, rows, llms):
    """The samples read, and hold what their notes say."""
    trace = read_trace(sample_path(name))
    assert len(trace) == rows
    assert len(trace.llms) == llms
    meta = json.loads(
        (sample_path(name).parent / f"{name}.csv.gz.meta.json").read_text()
    )
    assert meta["rows"] == rows
    assert meta["licence"] in ("CC-BY-4.0", "Apache-2.0")
    info = describe(trace)
    assert sum(row.requests for row in info.llms) == rows


def test_shipped_history_is_seven_days():
    """2,016 epochs of five minutes, of the same LLMs as the day that follows."""
    history = read_demand(sample_path("fleet-history"))
    assert history.num_epochs == 7 * 288
    assert set(history.llms) == set(read_trace(sample_path("fleet-day")).llms)
