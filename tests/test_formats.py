"""Formats of traces: each with its traps, in and out; broken ones told in one line."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreserve.models.errors import InvalidInput
from foreserve.traces import files
from foreserve.traces.formats import (
    open_trace,
    read_meta,
    read_trace,
    write_trace,
)
from foreserve.traces.lengths import read_lengths
from foreserve.traces.rates import is_rates, read_rates
from foreserve.traces.readers import FORMATS
from foreserve.traces.trace import Trace, merge
from foreserve.traces.writers import merge_rows, rows_of, write_rows

BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURSTGPT_LATER = BURSTGPT.replace("Model", "Session ID,Elapsed time,Model")
SPLITWISE = "request_id,request_type,application_id,arrival_timestamp,batch_size,"
SPLITWISE += "prompt_size,token_size\n"
SAGESERVE = (
    "request_id,batch_id,client_tenant,request_type,scenario,sla,utility,regions,"
)
SAGESERVE += "model_type,workload_type,application_id,arrival_timestamp,batch_size,"
SAGESERVE += "prompt_size,token_size\n"
JOURNAL = [
    {"event": "started", "at_s": 0, "policy": "x", "start_s": 0, "end_s": 9},
    {"event": "phase", "at_s": 0.5, "llm": "a", "gpus": [], "phase": "ready"},
    {
        "event": "request",
        "at_s": 5,
        "request": 1,
        "llm": "b",
        "arrival_s": 2.5,
        "input_tokens": 7,
        "output_tokens": 1,
        "result": "failed",
        "first_token_s": None,
    },
    {
        "event": "request",
        "at_s": 6,
        "request": 0,
        "llm": "a",
        "arrival_s": 2.5,
        "input_tokens": 8,
        "output_tokens": 2,
        "result": "finished",
        "first_token_s": 3.0,
    },
    {"event": "ended", "at_s": 9},
]


def put(folder, text, name="t.csv"):
    path = folder / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def requests(trace):
    """A trace as plain rows."""
    return [
        (float(at_s), trace.llms[llm], int(inputs), int(outputs))
        for at_s, llm, inputs, outputs in zip(
            trace.arrival_s,
            trace.llm,
            trace.input_tokens,
            trace.output_tokens,
            strict=True,
        )
    ]


@pytest.fixture
def trace():
    """Three requests of two LLMs, two at one time; 0.1 is no double."""
    return Trace(
        arrival_s=np.array([0.1, 60.25, 60.25]),
        llm=np.array([1, 0, 1], dtype=np.int32),
        llms=("a", "b"),
        input_tokens=np.array([512, 513, 1], dtype=np.int32),
        output_tokens=np.array([1, 2, 3], dtype=np.int32),
    )


@pytest.mark.parametrize(
    ("format", "name", "text", "expected", "left_out"),
    [
        # Spaces in names; models name themselves; no response: failed; a row without
        # request tokens cannot be served; a time may come twice.
        (
            "burstgpt",
            "t.csv",
            BURSTGPT
            + "5,ChatGPT,472,18,490,Conversation log\n5,GPT-4,10,0,10,API log\n"
            + "7,ChatGPT,0,20,20,API log\n45.5,GPT-4,1087,230,1317,API log\n",
            [(5, "ChatGPT", 472, 18), (45.5, "GPT-4", 1087, 230)],
            ("Log Type", "Total tokens"),
        ),
        (
            "burstgpt",
            "t.csv.gz",
            BURSTGPT_LATER + "5,s1,3.5,ChatGPT,472,18,490,Conversation log\n",
            [(5, "ChatGPT", 472, 18)],
            ("Elapsed time", "Log Type", "Session ID", "Total tokens"),
        ),
        # Milliseconds, many ties, lists of any length, no name of an LLM.
        (
            "mooncake",
            "talk.jsonl.gz",
            '{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": []}\n'
            '{"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": [46]}\n'
            '{"timestamp": 3052, "input_length": 9, "output_length": 4}\n',
            [(0, "talk", 513, 5), (0, "talk", 7, 1), (3.052, "talk", 9, 4)],
            (),
        ),
        (
            "splitwise",
            "t.csv",
            SPLITWISE + "0,2,0,0.125,1,100,20\n1,2,0,3,1,5,6\n",
            [(0.125, "t", 100, 20), (3, "t", 5, 6)],
            ("application_id", "request_id", "request_type"),
        ),
        # The wider table names an LLM, and its 0 means 1.
        (
            "splitwise",
            "t.csv",
            SAGESERVE + "0,0,x,2,s,IW,0,001,llama,w,0,0.5,1,100,0\n",
            [(0.5, "llama", 100, 1)],
            None,
        ),
        ("times", "code.csv", "t_s,input_tokens,output_tokens\n1.5,8,9\n",
         [(1.5, "code", 8, 9)], ()),
        ("times", "x.csv", "t_s,model,input_tokens,output_tokens\n1.5,a,8,9\n",
         [(1.5, "a", 8, 9)], ()),
        # Lines of many kinds, in order of ends: the order of arrival is restored.
        (
            "journal",
            "run.jsonl",
            lines(JOURNAL),
            [(2.5, "a", 8, 2), (2.5, "b", 7, 1)],
            (),
        ),
        (
            "canonical",
            "t.csv",
            "arrival_s,tenant,llm,input_tokens,output_tokens\n0,me,a,1,2\n",
            [(0, "a", 1, 2)],
            ("tenant",),
        ),
    ],
)  # fmt: skip
def test_each_format_by_hand(tmp_path, format, name, text, expected, left_out):
    """Told from the header; read at once, in chunks of one, or when told what it is."""
    path = put(tmp_path, text, name)
    assert requests(read_trace(path)) == expected
    assert requests(read_trace(path, format=format)) == expected
    reading = open_trace(path)
    assert reading.format == format
    if left_out is not None:
        assert reading.left_out == left_out
    assert sum(len(rows) for rows in reading.chunks) == len(expected)
    assert reading.read - reading.dropped == len(expected)


def test_failed_requests_of_burstgpt_are_counted(tmp_path):
    """No response or no request: dropped and counted, or kept with a token."""
    path = put(
        tmp_path, BURSTGPT + "1,a,0,5,5,x\n2,a,5,0,5,x\n3,a,0,0,0,x\n4,a,6,7,13,x\n"
    )
    found = read_trace(path)
    assert (requests(found), found.dropped) == ([(4, "a", 6, 7)], 3)
    kept = read_trace(path, keep_failed=True)
    assert kept.input_tokens.tolist() == [1, 5, 1, 6]
    assert kept.output_tokens.tolist() == [5, 1, 1, 7]


def test_a_header_that_fits_several_formats(tmp_path):
    """An error that names them; one that is named is read."""
    text = "arrival_s,llm,t_s,input_tokens,output_tokens\n1,a,2,3,4\n"
    path = put(tmp_path, text)
    with pytest.raises(InvalidInput, match="several formats: canonical, times"):
        read_trace(path)
    assert requests(read_trace(path, format="times")) == [(2, "a", 3, 4)]
    with pytest.raises(InvalidInput, match="did you mean 'azure'"):
        read_trace(path, format="azur")
    with pytest.raises(InvalidInput, match="'TIMESTAMP' is missing"):
        read_trace(path, format="azure")


@pytest.mark.parametrize(
    ("name", "text", "line", "expected"),
    [
        ("t.csv", BURSTGPT + "x,a,1,1,2,l\n", 2, "Timestamp: 'x' is not a finite"),
        ("t.csv", BURSTGPT + "1,,1,1,2,l\n", 2, "Model: '' is not a name"),
        ("t.csv", BURSTGPT + "2,a,1,1,2,l\n1,a,1,1,2,l\n", 3, "by Timestamp"),
        ("t.csv", SPLITWISE + "0,2,0,1,4,5,6\n", 2, "batch_size: '4' is not one"),
        ("t.csv", BURSTGPT.replace("Model", "Modell") + "1\n", 1, "did you mean"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 0, "output_length": 1}\n', 1,
         "input_length: '0' is not a whole number from 1"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 1, "output_length": 1}\n{}\n', 2,
         "timestamp: 'None' is not a finite number"),
        ("t.jsonl", lines([*JOURNAL[:3], {"event": "request"}]), 4, "request: 'None'"),
        ("t.jsonl", lines(JOURNAL[:2]), None, "no requests"),
        ("t.csv", "event,at_s\nrequest,1\n", 1, "'request' is missing"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n0001-01-01,1,1\n", 2,
         "is not a time stamp"),
        ("t.jsonl", "[" * 100_000 + "\n", 1, "not valid JSON"),
        ("t.csv", "hour,requests\n1,2\n", None, "holds counts, not requests"),
        ("t.parquet", "no", None, "not a whole Parquet file"),
    ],
)  # fmt: skip
def test_broken_files_are_named_in_one_line(tmp_path, name, text, line, expected):
    """File, line, field, what is wrong."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = put(tmp_path, text, name)
    with pytest.raises(InvalidInput) as caught:
        read_trace(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert caught.value.line == line


@pytest.mark.parametrize(
    "name", ["o.csv", "o.csv.gz", "o.jsonl", "o.jsonl.gz", "o.parquet"]
)
def test_canonical_round_trip(tmp_path, monkeypatch, trace, name):
    """All is kept, in files written in one chunk or in two; the same bytes."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    write_trace(trace, tmp_path / name)
    assert requests(read_trace(tmp_path / name)) == requests(trace)
    again = tmp_path / f"again-{name}"
    monkeypatch.setattr(files, "CHUNK_ROWS", 2)
    write_trace(trace, again)
    assert requests(read_trace(again)) == requests(trace)
    if not name.endswith("parquet"):  # whose chunks are in the file
        assert again.read_bytes() == (tmp_path / name).read_bytes()


def test_names_that_need_care(tmp_path, trace):
    """Commas, quotes and letters of the world in a name survive CSV and JSON."""
    odd = replace(trace, llms=('a,"b"', "模型\\é"))
    for name in ("o.csv", "o.jsonl"):
        write_trace(odd, tmp_path / name)
        assert requests(read_trace(tmp_path / name)) == requests(odd)


def test_azure_round_trip(tmp_path, trace):
    """Stamps of seven decimals; what it has no place for is said: names, the time before
    the first request, and steps finer than the clock's."""
    path = tmp_path / "o.csv"
    written = write_rows(rows_of(trace), path, "azure", start="2023-11-16T18:15:00")
    assert path.read_text().splitlines() == [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:00.1000000,512,1",
        "2023-11-16 18:16:00.2500000,513,2",
        "2023-11-16 18:16:00.2500000,1,3",
    ]
    assert written.lost("azure") == [
        "which of 2 LLMs a request is for",
        "the 0.1 s before the first request, when read",
    ]
    again = read_trace(path, llm="a")
    assert again.arrival_s.tolist() == [0.0, 60.15, 60.15]
    assert again.input_tokens.tolist() == [512, 513, 1]
    fine = replace(trace, arrival_s=np.array([0.0, 1e-8, 1]))
    written = write_rows(rows_of(fine), path, "azure")
    assert "times between steps of 1e-07 s" in written.lost("azure")
    assert path.read_text().splitlines()[1].startswith("1970-01-01 00:00:00.0000000,")
    with pytest.raises(InvalidInput, match="not a date"):
        write_rows(rows_of(trace), path, "azure", start="noon")
    late = replace(trace, arrival_s=np.array([0.0, 1, 1e18]))
    with pytest.raises(InvalidInput, match="too late"):
        write_rows(rows_of(late), path, "azure")


def test_mooncake_round_trip(tmp_path, trace, monkeypatch):
    """Blocks of 512 tokens, the last one partial, none shared, numbered across chunks."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 2)
    path = tmp_path / "o.jsonl"
    written = write_rows(rows_of(trace), path, "mooncake")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["timestamp"] for row in rows] == [100, 60250, 60250]
    assert [row["hash_ids"] for row in rows] == [[0], [1, 2], [3]]
    assert written.lost("mooncake") == ["which of 2 LLMs a request is for"]
    again = read_trace(path, llm="a")
    assert again.arrival_s.tolist() == trace.arrival_s.tolist()
    assert again.output_tokens.tolist() == [1, 2, 3]
    one = replace(trace, llms=("only",), llm=np.zeros(3, dtype=np.int32))
    half = replace(one, arrival_s=np.array([0, 0.0005, 1]))
    written = write_rows(rows_of(half), path, "mooncake")
    assert written.lost("mooncake") == [
        "the name of the LLM, only",
        "times between steps of 0.001 s",
    ]


def test_a_failed_write_leaves_nothing(tmp_path, trace):
    """An error half-way: the old file stays, and no temporary one."""
    path = put(tmp_path, "old", "o.csv")

    def broken():
        yield from rows_of(trace)
        raise InvalidInput("here")

    with pytest.raises(InvalidInput, match="here"):
        write_rows(broken(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InvalidInput, match=r"it ends in \.jsonl"):
        write_rows(rows_of(trace), path, "mooncake")


def test_parquet_without_pyarrow(tmp_path, trace, monkeypatch):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInput, match="foreserve\\[parquet\\]"):
        read_trace(put(tmp_path, "", "t.parquet"))
    with pytest.raises(InvalidInput, match="foreserve\\[parquet\\]"):
        write_trace(trace, tmp_path / "o.parquet")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 6), max_size=9).map(sorted), min_size=1, max_size=4
    ),
    st.integers(1, 4),
)
def test_sources_merge_in_chunks_as_at_once(times, chunk_rows):
    """For any sources with many ties and any size of chunk: the order is that of
    `merge`, which has all in memory."""
    traces = [
        Trace(
            arrival_s=np.array(row, dtype=np.float64),
            llm=np.zeros(len(row), dtype=np.int32),
            llms=(f"llm-{index}",),
            input_tokens=np.arange(1, len(row) + 1, dtype=np.int32),
            output_tokens=np.ones(len(row), dtype=np.int32),
        )
        for index, row in enumerate(times)
    ]
    before = files.CHUNK_ROWS
    try:
        files.CHUNK_ROWS = chunk_rows
        merged = [
            (float(at_s), llm, int(inputs))
            for rows in merge_rows([rows_of(trace) for trace in traces])
            for at_s, llm, inputs in zip(
                rows.arrival_s, rows.llm, rows.input_tokens, strict=True
            )
        ]
    finally:
        files.CHUNK_ROWS = before
    assert merged == [row[:3] for row in requests(merge(traces))]


HEADERS = [
    ",".join((*each.columns, *each.fields, *each.lists)) for each in FORMATS.values()
]
HEADERS += ["t_s,width_s,llm,requests", "t_s,client,requests,iat_cv", "hour,requests"]
HEADERS += ["t_min,rpm_min,rpm_mid,rpm_max", "model,t_s,total_rps,gap"]
CELLS = st.one_of(
    st.integers(-1, 3).map(str),
    st.sampled_from(
        ["1e308", "-0", "1e18", "nan", "inf", "", '"', "a", "9999-01-01", "2024"]
    ),
    st.text(max_size=4),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(HEADERS),
    st.lists(st.lists(CELLS, min_size=1, max_size=9), max_size=4),
    st.sampled_from(["t.csv", "t.jsonl"]),
)
def test_any_text_is_read_or_refused(tmp_path, header, rows, name):
    """Whatever the cells: a sound trace, counts, or one `InvalidInput`."""
    if name == "t.csv":
        width = header.count(",") + 1
        body = [",".join((row * width)[:width]) for row in rows]
        text = "\n".join([header, *body])
    else:
        columns = header.split(",")
        text = lines([dict(zip(columns, row * 9, strict=False)) for row in rows])
    path = put(tmp_path, text.encode("utf-8", "replace").decode(), name)
    readers = (read_trace, read_rates if name == "t.csv" else read_trace, read_lengths)
    faults = []
    for reader in (*readers, is_rates):
        try:
            reader(path)
        except InvalidInput as error:
            faults.append(str(error))
    assert not [fault for fault in faults if "\n" in fault]


def test_convert_on_the_command_line(tmp_path, plan):
    """Two sources on one clock into one file; its sidecar says what it is from, with the
    SHA-256 of the sources, and `info` reads it and tells of the coarse clock."""
    burst = put(tmp_path, BURSTGPT + "5,x,1,2,3,l\n5,x,1,0,1,l\n9,y,3,4,7,l\n", "b.csv")
    other = put(
        tmp_path, "arrival_s,llm,input_tokens,output_tokens\n5,z,8,9\n", "z.csv"
    )
    out = tmp_path / "out.csv.gz"
    code, text, err = plan("trace convert", burst, other, out)
    assert (code, err) == (0, "")
    assert "b.csv: burstgpt, 3 rows, 1 dropped" in text
    assert "column 'Log Type'" in text
    assert requests(read_trace(out)) == [(5, "x", 1, 2), (5, "z", 8, 9), (9, "y", 3, 4)]
    meta = read_meta(out)
    assert meta["rows"] == 3
    assert [source["file"] for source in meta["sources"]] == ["b.csv", "z.csv"]
    assert len(meta["sources"][0]["sha256"]) == 64
    stamps = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01+00:00,1,2\n"
    code, text, _ = plan("trace convert", put(tmp_path, stamps, "s.csv"), other, out)
    assert code == 0
    assert "s.csv begins: all begin at 0" in text
    # The date of second 0 goes with it, so that the stamps come back.
    assert plan("trace convert", tmp_path / "s.csv", out)[0] == 0
    assert read_meta(out)["start"] == "2024-05-10 00:00:01+00:00"
    assert plan("trace convert --format azure", out, tmp_path / "back.csv")[0] == 0
    assert "2024-05-10 00:00:01.0000000,1,2" in (tmp_path / "back.csv").read_text()
    azure = "trace convert --format azure"
    assert plan(azure, tmp_path / "s.csv", tmp_path / "same.csv")[0] == 0
    assert (tmp_path / "same.csv").read_bytes() == (tmp_path / "back.csv").read_bytes()
    ties = tmp_path / "ties.jsonl"
    code, text, err = plan(
        "trace convert --format mooncake --keep-failed --json", burst, ties
    )
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert (found["rows"], found["sources"][0]["dropped"]) == (3, 0)
    assert found == read_meta(ties)
    code, text, _ = plan("trace info --llm a", put(tmp_path, TIES, "ties.jsonl"))
    assert code == 0
    assert "5 requests came at 2 times" in text
    assert "a " in text


TIES = "".join(
    f'{{"timestamp": {at}, "input_length": 5, "output_length": 1}}\n'
    for at in (0, 0, 0, 3, 3)
)


def test_converted_counts_are_a_rate_table(tmp_path, plan):
    """A source of counts becomes ours, and reads as the same."""
    hourly = put(tmp_path, "hour,requests,sessions\n0,5,1\n1,0,0\n3,7,1\n", "h.csv")
    out = tmp_path / "out.csv"
    assert plan("trace convert", hourly, out)[0] == 0
    assert out.read_text().splitlines()[0] == "t_s,width_s,llm,requests"
    np.testing.assert_array_equal(read_rates(out).counts, read_rates(hourly).counts)


def test_conversions_that_are_refused(tmp_path, plan):
    """One line that says why; the source stays as it was."""
    hourly = put(tmp_path, "hour,requests\n0,5\n", "h.csv")
    ties = put(tmp_path, TIES, "ties.jsonl")
    for args, expected in (
        ((ties, ties), "would be overwritten"),
        ((hourly, ties, tmp_path / "o.csv"), "one by one"),
        ((hourly, tmp_path / "o.jsonl", "--format mooncake"), "holds counts"),
        ((ties, tmp_path / "o.csv", "--format mooncake"), "it ends in .jsonl"),
        ((ties, tmp_path / "o.csv", "--from azur"), "did you mean 'azure'"),
        ((ties, tmp_path / "no" / "o.csv"), "folder does not exist"),
        ((tmp_path / "none.csv", tmp_path / "o.csv"), "no such file"),
    ):
        code, _, err = plan("trace convert", *args)
        assert code == 2
        assert expected in err
        assert err.count("\n") == 1
    assert ties.read_text() == TIES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.csv", "ties.jsonl"]
