"""Demand: what a trace looks like per epoch, and tables of it that others hand in."""

from __future__ import annotations

import re

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.traces.demand_table import COLUMNS, read_demand, write_demand
from foreserve.traces.formats import read_trace
from foreserve.traces.samples import sample_path
from foreserve.traces.trace import Demand, bin_demand
from tests.test_traces import make

HEADER = ",".join(COLUMNS) + "\n"
ROW = "0,10,a,1,1,1,1,1\n"


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


def test_what_ends_as_an_epoch_begins_is_not_carried_over():
    """10 s from 0 fill the first epoch of 10 s and leave the second empty; one that
    starts on the edge belongs to the second."""
    one = bin_demand(make([0]), epoch_s=10, busy_s=np.array([10.0]), end_s=20)
    assert one.peak_load.tolist() == [[1, 0]]
    two = bin_demand(make([0, 10]), epoch_s=10, busy_s=np.full(2, 10.0), end_s=20)
    assert two.peak_load.tolist() == [[1, 1]]
    assert two.rate_rps.tolist() == [[0.1, 0.1]]


def test_only_the_time_asked_for_is_counted():
    """From 10 to 20 s: the request from 8 s is in flight until 12 but did not arrive;
    those at 20 and 25 s are the future."""
    trace = make([8, 15, 20, 25])
    busy_s = np.array([4.0, 1, 1, 1])
    demand = bin_demand(trace, epoch_s=10, busy_s=busy_s, start_s=10, end_s=20)
    assert demand.start_s == 10
    assert demand.rate_rps.tolist() == [[0.1]]
    assert demand.mean_load.tolist() == [[0.3]]
    assert demand.peak_load.tolist() == [[1]]


@pytest.mark.parametrize(("last", "rate"), [(0.0, 1.0), (10.000001, 1.0), (14.0, 0.25)])
def test_a_lone_last_request_is_no_high_rate(last, rate):
    """Nobody knows how the last epoch goes on: it counts as at least a second long."""
    demand = bin_demand(make([last]), epoch_s=10, busy_s=np.ones(1))
    assert demand.rate_rps[0, -1] == pytest.approx(rate)


def test_binning_agrees_with_counting_one_by_one():
    """Random requests on whole seconds, so that ends, edges and starts often coincide:
    mean and peak equal those of a count made second by second."""
    rng = np.random.default_rng(5)
    for _ in range(30):
        trace = make(np.sort(rng.integers(0, 40, 12)))
        busy_s = rng.integers(1, 15, 12).astype(float)
        demand = bin_demand(trace, epoch_s=5, busy_s=busy_s, start_s=5, end_s=38)
        seconds = np.arange(5, 38)[:, None]
        begun = trace.arrival_s <= seconds
        level = (begun & (seconds < trace.arrival_s + busy_s)).sum(axis=1)
        parts = np.split(level, np.arange(5, 33, 5))
        assert demand.peak_load[0].tolist() == [part.max() for part in parts]
        assert demand.mean_load[0] == pytest.approx([part.mean() for part in parts])


def test_busy_times_must_be_known():
    """One number per request, none missing."""
    for busy_s in (np.ones(2), np.array([np.nan]), np.array([-1.0])):
        with pytest.raises(InvalidInput, match="busy_s"):
            bin_demand(make([1]), epoch_s=10, busy_s=busy_s)


def test_tables_keep_long_clocks(tmp_path):
    """Half-second epochs on a clock that started in 1970: each stays where it was."""
    one = np.ones((1, 4))
    columns = ("rate_rps", "mean_load", "peak_load", "input_tokens", "output_tokens")
    demand = Demand(
        epoch_s=0.5,
        start_s=1_700_000_000.0,
        llms=("a",),
        **{name: one.copy() for name in columns},
    )
    for name in ("one.csv", "two.csv"):
        write_demand(demand, tmp_path / name)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    again = read_demand(tmp_path / "one.csv")
    assert (again.start_s, again.epoch_s) == (1_700_000_000.0, 0.5)
    for name in columns:
        assert (getattr(again, name) == one).all()


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "empty file"),
        (HEADER, None, "no rows"),
        (HEADER.replace("requests", "request"), 1, "did you mean it by 'request'?"),
        (HEADER + ROW + ROW, 3, "second row for the same LLM"),
        (HEADER + ROW + ROW.replace("0,", "14,", 1), 3, "whole number of epochs"),
        (HEADER + ROW + "1e13,10,a,1,1,1,1,1\n", 3, "cells after the first"),
        (HEADER + ROW + "10,20,a,1,1,1,1,1\n", 3, "width_s: '20'"),
        (HEADER + "0,0,a,1,1,1,1,1\n", 2, "width_s: '0' is not positive"),
        (HEADER + "0,10,a,-1,1,1,1,1\n", 2, "requests: '-1' is less than 0"),
        (HEADER + "0,10,a,1,nan,1,1,1\n", 2, "mean_in_flight: 'nan'"),
        (HEADER + "0,10,,1,1,1,1,1\n", 2, "llm: '' is not a name"),
    ],
)
def test_broken_tables_are_named_in_one_line(tmp_path, text, line, expected):
    """A history from elsewhere is checked cell by cell, too."""
    path = tmp_path / "d.csv"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=re.escape(expected)) as caught:
        read_demand(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert caught.value.line == line


def test_shipped_history_is_seven_days():
    """2,016 epochs of five minutes, of the same LLMs as the day that follows."""
    history = read_demand(sample_path("fleet-history"))
    assert history.num_epochs == 7 * 288
    assert set(history.llms) == set(read_trace(sample_path("fleet-day")).llms)
