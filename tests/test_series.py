"""A run over time, by hand; and against single requests, bin by bin."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Residency, Run
from foreserve.models.quantiles import grouped_quantiles
from foreserve.runtime.journal import Ended, Started
from foreserve.runtime.series import ALL, COUNTS, series
from foreserve.runtime.tally import BY_ACTIVITY, Tally
from tests.build import fleet, gpu, option, ten_minutes

NEVER = float("nan")


def made(rows, residency=(), *, end_s: float = 30.0, llms=("a", "b")) -> Run:
    """A run from 0 s; rows are (llm, arrival, first token, finish, left, tokens)."""
    empty = Tally(fleet(*(option(name) for name in llms)))
    empty.record(Started(at_s=0.0, policy="p", start_s=0.0, end_s=end_s))
    empty.record(Ended(at_s=end_s))
    llm, arrival, first, finish, left, tokens = (
        np.array([row[i] for row in rows]) for i in range(6)
    )
    return replace(
        empty.run(10.0),
        residency=tuple(residency),
        llm=llm.astype(np.int32),
        arrival_s=arrival.astype(float),
        first_token_s=first.astype(float),
        finish_s=finish.astype(float),
        left_s=left.astype(float),
        output_tokens=tokens.astype(np.int64),
    )


def stay(llm: str, count: int, phase, start_s: float, end_s: float) -> Residency:
    gpus = tuple(gpu(index) for index in range(count))
    return Residency(llm=llm, gpus=gpus, phase=phase, start_s=start_s, end_s=end_s)


RUN = made(
    [
        (0, 1.0, 2.0, 22.0, 22.0, 21),
        (0, 5.0, 8.0, 8.0, 8.0, 1),
        (1, 12.0, NEVER, NEVER, 12.0, 9),
        (1, 25.0, 28.0, 38.0, 38.0, 11),
        (1, 26.0, NEVER, NEVER, 40.0, 9),
    ],
    [
        stay("a", 2, "ACTIVE", -5.0, 15.0),
        stay("a", 2, "WARM", 15.0, 20.0),
        stay("b", 1, "LOADING", 19.0, 40.0),
    ],
)
"""Of a: one of 21 tokens from 2 to 22 s, one of a single token. Of b: one that fails at
12 s, one of 11 tokens that ends 8 s after the span, one that never gets a token."""


def test_counts_and_loads_by_hand():
    """Three bins of 10 s. Waiting: 1 s and 3 s of a in the first bin; of b 3 s and 4 s of
    the last. What leaves as it comes is never there; what leaves after the span is in no
    bin."""
    found = series(RUN)
    assert found.llm == ("a", "b", ALL)
    columns = {name: values.tolist() for name, values in found.columns.items()}
    assert columns["arrivals"] == [[2, 0, 0], [0, 1, 2], [2, 1, 2]]
    assert columns["finished"] == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert columns["failed"] == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert columns["in_system_mean"][0] == pytest.approx([1.2, 1.0, 0.2])
    assert columns["in_system_mean"][2] == pytest.approx([1.2, 1.0, 1.1])
    assert columns["in_system_max"] == [[2, 1, 1], [0, 0, 2], [2, 1, 2]]
    assert columns["waiting_mean"][0] == pytest.approx([0.4, 0, 0])
    assert columns["waiting_mean"][1] == pytest.approx([0, 0, 0.7])


def test_delays_by_hand():
    """a: 1 s and 3 s. The failed one of b counts with the 28 s to the run's end, at 40 s;
    the last two with 3 s and 14 s. No arrival, no number."""
    columns = series(RUN).columns
    np.testing.assert_allclose(columns["ttft_p50_s"][0], [2.0, NEVER, NEVER])
    np.testing.assert_allclose(columns["ttft_p99_s"][0], [2.98, NEVER, NEVER])
    np.testing.assert_allclose(columns["ttft_p50_s"][2], [2.0, 28.0, 8.5])


def test_tokens_by_hand():
    """The first of a: one token at 2 s and 20 in the 20 s from there, the other its one;
    that of b: one at 28 s and 10 in 10 s, of which 2 s are in the span."""
    found = series(RUN).columns["output_tokens_per_s"]
    assert 10 * found[0] == pytest.approx([1 + 8 + 1, 10, 2])
    assert 10 * found[1] == pytest.approx([0, 0, 1 + 2])
    assert found[2] == pytest.approx(found[0] + found[1])


def test_gpus_by_hand():
    """Two GPUs of a: 10 s and 5 s ACTIVE, then 5 s WARM; one of b, 1 s and 10 s LOADING."""
    columns = series(RUN).columns
    assert columns["gpus_active"][0].tolist() == [2.0, 1.0, 0.0]
    assert columns["gpus_warm"][0].tolist() == [0.0, 1.0, 0.0]
    assert columns["gpus_loading"][1] == pytest.approx([0.0, 0.1, 1.0])
    assert columns["gpus_loading"][2] == pytest.approx([0.0, 0.1, 1.0])
    assert not columns["gpus_draining"].any()


@pytest.mark.parametrize("bin_s", [0.7, 4.0, 30.0, 1e9, 30.0 / 49, 0.1])
def test_bins_add_up(bin_s):
    """Whatever the bin, also if the last one is shorter or there is one alone: counts,
    loads, tokens and GPU time sum up to the same."""
    found, whole = series(RUN, bin_s), series(RUN, 30.0)
    length_s = found.end_s - found.start_s
    assert (found.start_s[0], found.end_s[-1]) == (0.0, 30.0)
    assert length_s.sum() == pytest.approx(30.0)
    for name in COUNTS:
        assert (found.columns[name].sum(axis=1) == whole.columns[name][:, 0]).all()
    means = ("in_system_mean", "waiting_mean", "output_tokens_per_s", "gpus_active")
    for name in (*means, "gpus_warm", "gpus_loading"):
        total = (found.columns[name] * length_s).sum(axis=1)
        assert total == pytest.approx(30.0 * whole.columns[name][:, 0])
    peak = found.columns["in_system_max"].max(axis=1)
    assert (peak == whole.columns["in_system_max"][:, 0]).all()


def test_against_single_requests():
    """300 requests made up by chance, some never answered: tokens and quantiles of each
    bin as a loop over the requests has them."""
    rng = np.random.default_rng(7)
    rows = []
    for arrival in np.sort(rng.uniform(0, 100, 300)).tolist():
        first = arrival + rng.exponential(5.0)
        finish = first + rng.exponential(9.0)
        fate = rng.random()
        tokens = int(rng.integers(1, 50))
        if fate < 0.1:
            rows.append((0, arrival, NEVER, NEVER, arrival, tokens))
        else:
            rows.append((int(fate > 0.6), arrival, first, finish, finish, tokens))
    run = made(rows, end_s=100.0)
    found = series(run, 7.0)
    ended_s = max(100.0, *(row[4] for row in rows))
    for b, (low, high) in enumerate(zip(found.start_s, found.end_s, strict=True)):
        for index in (0, 1):
            own = [row for row in rows if row[0] == index]
            tokens = sum(
                (low <= first < high)
                + (n - 1) * max(0.0, min(high, end) - max(low, first)) / (end - first)
                for _, _, first, end, _, n in own
                if first == first
            )
            rate = found.columns["output_tokens_per_s"][index, b]
            assert rate * (high - low) == pytest.approx(tokens, abs=1e-6)
            waits = [
                (ended_s if first != first else first) - arrival
                for _, arrival, first, *_ in own
                if low <= arrival < high
            ]
            expected = np.quantile(waits, 0.99) if waits else NEVER
            assert found.columns["ttft_p99_s"][index, b] == pytest.approx(
                expected, nan_ok=True
            )


def test_quantiles_of_groups():
    """As numpy has them group by group; an empty group has none."""
    rng = np.random.default_rng(1)
    group, values = rng.integers(0, 6, 200), rng.normal(size=200)
    group[group == 3] = 4
    found = grouped_quantiles(values, group, 6, (0.0, 0.3, 1.0))
    for index in range(6):
        own = values[group == index]
        expected = np.quantile(own, (0.0, 0.3, 1.0)) if own.size else [NEVER] * 3
        np.testing.assert_allclose(found[:, index], expected)


@pytest.mark.parametrize("bin_s", [1e-6, 0.0, -1.0, NEVER])
def test_bins_that_cannot_be(bin_s):
    """Too many rows, or no bin at all."""
    with pytest.raises(InvalidInput, match="bin"):
        series(RUN, bin_s)


def test_a_run_without_requests():
    """Zeros, and no delays."""
    run = made([(0, 0.0, 0.0, 0.0, 0.0, 1)])
    none = {
        name: getattr(run, name)[:0]
        for name in ("llm", "arrival_s", "first_token_s", "finish_s")
    }
    empty = replace(
        run, left_s=run.left_s[:0], output_tokens=run.output_tokens[:0], **none
    )
    columns = series(empty).columns
    assert np.isnan(columns["ttft_p50_s"]).all()
    assert not any(columns[name].any() for name in (*COUNTS, "in_system_max"))


# --- plan simulate --series --------------------------------------------------------------


@pytest.fixture
def day(tmp_path):
    """Ten minutes of two LLMs on two GPUs, a request every 3 s."""
    ten_minutes(tmp_path)
    return f"simulate {tmp_path}/p.json --trace {tmp_path}/t.csv --quiet"


def test_series_as_files(plan, day, tmp_path):
    """Two policies, ten minutes in minutes, two LLMs and all: 60 rows, the same in CSV,
    gzip (same bytes each time) and Parquet; the counts are those of the outcome."""
    policies = "--policy planned --policy reactive --bin 1m"
    for name in ("s.csv", "s.csv.gz", "again.csv.gz"):
        code, _, err = plan(day, policies, "--series", tmp_path / name)
        assert (code, err) == (0, "")
    text = (tmp_path / "s.csv").read_text()
    assert gzip.decompress((tmp_path / "s.csv.gz").read_bytes()).decode() == text
    first, again = (tmp_path / f"{n}.csv.gz" for n in ("s", "again"))
    assert first.read_bytes() == again.read_bytes()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 2 * 10 * 3
    assert [row["llm"] for row in rows[:4]] == ["a", "b", ALL, "a"]
    assert [float(row["start_s"]) for row in rows[:4]] == [0.0, 0.0, 0.0, 60.0]
    found = json.loads(plan(day, "--policy planned --policy reactive --json")[1])
    for outcome in found["outcomes"]:
        own = [row for row in rows if row["policy"] == outcome["policy"]]
        for llm, service in (*outcome["by_llm"].items(), (ALL, outcome["total"])):
            arrived = sum(int(row["arrivals"]) for row in own if row["llm"] == llm)
            assert arrived == service["requests"]
        hours = sum(
            float(row[f"gpus_{phase.lower()}"]) * 60 / 3600
            for row in own
            for phase in BY_ACTIVITY
            if row["llm"] == ALL
        )
        assert hours >= outcome["gpu_hours"]["total"] - 1e-9
    parquet = pytest.importorskip("pyarrow.parquet")
    assert plan(day, policies, "--series", tmp_path / "s.parquet")[::2] == (0, "")
    table = parquet.read_table(tmp_path / "s.parquet")
    assert table.column_names == list(rows[0])
    assert table.column("llm").to_pylist() == [row["llm"] for row in rows]
    arrivals = table.column("arrivals").to_pylist()
    assert arrivals == [int(row["arrivals"]) for row in rows]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--series s.txt", "a series ends in"),
        ("--series no/where/s.csv", "the folder does not exist"),
        ("--bin 10s", "--bin needs --series"),
        ("--bin fast --series {}/s.csv", "is not a quantity"),
        ("--bin 0 --series {}/s.csv", "is not positive"),
        ("--bin 1us --series {}/s.csv", "rows, more than"),
    ],
)
def test_wrong_use_of_series_is_told(plan, day, tmp_path, flags, message):
    """Exit code 2, one line, no file."""
    code, _, err = plan(day, flags.format(tmp_path))
    assert code == 2
    assert message in err
    assert not (tmp_path / "s.csv").exists()
