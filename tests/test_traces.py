"""Traces: reading what people have, saying what is wrong with it, counting it."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.traces import files
from foreserve.traces.formats import read_meta, read_trace, write_trace
from foreserve.traces.info import describe
from foreserve.traces.samples import sample_path
from foreserve.traces.trace import Trace, merge

HEADER = "arrival_s,llm,input_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = "0.5,a,10,5\n1.25,b,20,1\n1.25,a,30,7\n"


OBJECT = '{"arrival_s": 2, "llm": "a", "input_tokens": 7, "output_tokens": 1}\n'


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
    """One object per line, the same names in each."""
    rows = [
        {"arrival_s": 0.5, "model": "a", "input_tokens": 3, "output_tokens": 2},
        {"arrival_s": 2, "model": "b", "input_tokens": 4, "output_tokens": 1},
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
    """No output token means a failed request; kept, it has one."""
    path = put(tmp_path, HEADER + ROWS + "2,a,5,0\n")
    trace = read_trace(path)
    assert len(trace) == 3
    assert trace.dropped == 1
    kept = read_trace(path, keep_failed=True)
    assert kept.output_tokens.tolist() == [5, 1, 7, 1]
    assert kept.dropped == 0


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
        (HEADER + "0,a,-5,1\n", 2, "'-5' is not a whole number"),
        (HEADER + "0,a,5,-1\n", 2, "'-1' is not a whole number"),
        (HEADER + "0,a,1.5,1\n", 2, "'1.5' is not a whole number"),
        (HEADER + "0,a,3000000000,1\n", 2, "from 1 to 2147483647"),
        (HEADER + "0,a,1,0\n", None, "but 1 failed ones"),
        (HEADER + "5,a,1,1\n4,a,1,1\n", 3, "sort the rows by arrival_s"),
        (HEADER + "\n5,a,1,1\n\n4,a,1,1\n", 5, "not sorted"),
        (HEADER + "-5,a,1,1\n", 2, "'-5' is less than 0"),
        (HEADER + "0,,1,1\n", 2, "llm: '' is not a name"),
        (HEADER + "0,a,1,1\n0,a,1,1,9\n", 3, "5 cells, but the header has 4"),
        (HEADER + "0,a,1,1,9,9\n0,a,1,1\n", 2, "6 cells, but the header has 4"),
        (HEADER + '0,"a,1,1\n', 2, "quote is not closed"),
        ("llm,model," + HEADER + "x,a,0,x,1,1\n", 1, "two columns for 'llm'"),
        (HEADER.strip() + "," + AZURE + "0,a,1,1,x,1,1\n", 1, "canonical, azure"),
        (AZURE + "noon,1,1\n", 2, "time stamp"),
        (AZURE + "2024-05-10 00:00:05,1,1\n2024-05-10,1,1\n", 3, "by TIMESTAMP"),
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


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "empty file"),
        ("{}\n", 1, "unknown trace format"),
        ("[1]\n", 1, "not a JSON object"),
        (OBJECT + "{\n", 2, "not valid JSON"),
        (OBJECT + OBJECT.replace('"a"', "null"), 2, "llm: 'None' is not a name"),
        (OBJECT + '\n{"arrival_s": 3}\n', 3, "llm: 'None' is not a name"),
        (OBJECT.replace("7", "true"), 1, "'True' is not a finite number"),
        (OBJECT.replace("7", "NaN"), 1, "'nan' is not a finite number"),
        (OBJECT + OBJECT.replace("2", "1"), 2, "sort the rows by arrival_s"),
    ],
)
def test_broken_json_lines(tmp_path, text, line, expected):
    """The same for JSONL: a row that is no object, a key left out, null, true."""
    with pytest.raises(InvalidInput, match=re.escape(expected)) as caught:
        read_trace(put(tmp_path, text, "t.jsonl"))
    assert caught.value.line == line


def test_lines_are_right_in_every_chunk(tmp_path, monkeypatch):
    """Rows read two at a time: the fault in the sixth line is still in the sixth line,
    times are compared across chunks, and LLMs keep one index."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 2)
    good = HEADER + "0,b,1,1\n1,a,1,1\n2,a,1,1\n3,b,1,1\n"
    trace = read_trace(put(tmp_path, good))
    assert [trace.llms[i] for i in trace.llm] == ["b", "a", "a", "b"]
    for row in ("2,a,1,1\n", "4,a,x,1\n", "4,a,1,1,1\n"):
        with pytest.raises(InvalidInput) as caught:
            read_trace(put(tmp_path, good + row))
        assert caught.value.line == 6
    stamps = [f"2024-05-10 00:00:0{i}+00:00,1,1\n" for i in range(5)]
    trace = read_trace(put(tmp_path, AZURE + "".join(stamps)))
    assert trace.arrival_s.tolist() == [0, 1, 2, 3, 4]


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
    assert read_meta(tmp_path / name) == {"source": "here"}
    assert read_meta(tmp_path / "other.csv") == {}


def test_merge_keeps_time_order():
    """Two services on one clock; equal times keep the order of the arguments."""
    both = merge([make([0, 2]), make([1, 2], llms=("b",))])
    assert both.llms == ("a", "b")
    assert both.arrival_s.tolist() == [0, 1, 2, 2]
    assert both.llm.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("name", "llms"), [("azure-2023", 2), ("fleet-day", 12)])
def test_shipped_samples(name, llms):
    """The samples read, and hold what their notes and their README say."""
    path = sample_path(name)
    trace, meta = read_trace(path), read_meta(path)
    assert len(trace) == meta["rows"]
    assert len(trace.llms) == llms
    assert meta["licence"] in ("CC-BY-4.0", "Apache-2.0")
    assert f"{len(trace):,} requests" in (path.parent / "README.md").read_text()


def test_bursts_of_the_fleet_do_not_follow_the_recording():
    """Counts were recorded per 600 s; the first second of such a window is like any
    other: it has about 1 in 600 of the requests."""
    at_s = read_trace(sample_path("fleet-day")).arrival_s % 600
    assert (at_s < 1).mean() == pytest.approx(1 / 600, rel=0.5)


def test_description_by_hand():
    """Gaps of 1, 1 and 4 s: CV sqrt(2)/2. Tokens 10: every quantile is 10. No minute has
    more than two requests."""
    trace = merge([make([58, 59, 60, 64]), make([70], llms=("b",))])
    info = describe(trace)
    a, b = info.llms
    assert (info.requests, info.span_s, a.requests, b.requests) == (5, 70, 4, 1)
    assert a.arrival_cv == pytest.approx(0.5**0.5)
    assert (a.input_mean, a.input_p50, a.output_p90, a.output_p99) == (10, 10, 10, 10)
    assert a.peak_minute_rps == pytest.approx(2 / 60)
    assert b.arrival_cv == 0


@pytest.mark.parametrize(
    "change",
    [
        {"arrival_s": [1.0, 0.0]},
        {"arrival_s": [-1.0, 0.0]},
        {"arrival_s": [0.0, np.nan]},
        {"arrival_s": [0.0]},
        {"llm": [0, 1]},
        {"llm": [0, -1]},
        {"output_tokens": [1, 0]},
        {"llms": ("a", "a")},
    ],
)
def test_a_trace_that_exists_is_sound(change):
    """Order, range, length and index are checked when it is made."""
    columns = {key: np.array(v) for key, v in change.items() if key != "llms"}
    kinds = {"arrival_s": np.float64}
    good = make([0, 1])
    with pytest.raises(InvalidInput):
        replace(
            good,
            llms=change.get("llms", good.llms),
            **{k: v.astype(kinds.get(k, np.int32)) for k, v in columns.items()},
        )
    with pytest.raises(InvalidInput, match="int32"):
        replace(good, llm=np.zeros(2))
    with pytest.raises(ValueError, match="read-only"):
        good.arrival_s[0] = 5
