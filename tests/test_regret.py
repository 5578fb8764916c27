"""A plan in worlds that are worse: the right worlds, and costs that are the referee's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from foreserve.models.codec import load_plan
from foreserve.planner.regret import further, more_demand, slower
from foreserve.planner.reshape import reshaped
from foreserve.planner.sizing import epoch_rates
from foreserve.traces.forecast import Forecast
from foreserve.traces.trace import Trace
from tests.build import fleet, option
from tests.test_cli import SCENARIO, TRACE


def forecast(rate: float, mean: float, peak: float) -> Forecast:
    """Of one LLM and one epoch; two past errors of 1 and -1."""
    at = {
        name: np.array([[value]])
        for name, value in (
            ("rate_rps", rate),
            ("mean_load", mean),
            ("peak_load", peak),
        )
    }
    return Forecast(
        **at,
        peak_low=np.array([[peak - 1]]),
        peak_high=np.array([[peak + 1]]),
        peak_errors=np.array([[[1.0]], [[-1.0]]]),
        input_tokens=np.array([[10.0]]),
        output_tokens=np.array([[10.0]]),
    )


def test_slower_worlds():
    """Twice as slow: 1 s becomes 2, 1 request/s 0.5, loads 4 s; or the loads alone."""
    f = fleet(option("a"))
    (both,) = slower(f, 2.0, requests=True).options
    assert (both.exec_s, both.rate_rps, both.load_s) == (2.0, 0.5, 4.0)
    assert both.time.isolated_s(100, 10) == 2 * option("a").time.isolated_s(100, 10)
    (loads,) = slower(f, 2.0, requests=False).options
    assert (loads.exec_s, loads.rate_rps, loads.load_s) == (1.0, 1.0, 4.0)


def test_more_demand_scales_all_of_a_forecast():
    """Rates, loads, peaks and the size of errors alike."""
    more = more_demand(forecast(1.0, 2.0, 4.0), 1.5)
    assert more.rate_rps[0, 0] == 1.5
    assert more.peak_high[0, 0] == 7.5
    assert more.peak_errors[:, 0, 0].tolist() == [1.5, -1.5]


def test_worse_forecasts_are_further_from_what_came():
    """Forecast 4 and came 6: at 1.5 times the error, 7 would have come; from 4 to 0 it is
    not below 0. With factor 1 it is what came."""
    expected, high, low = forecast(4, 4, 4), forecast(6, 6, 6), forecast(0, 0, 0)
    assert further(expected, high, 1.5).rate_rps[0, 0] == 7.0
    assert further(expected, low, 1.5).peak_load[0, 0] == 0.0
    assert further(expected, high, 1.0).mean_load[0, 0] == 6.0


def test_verb_prices_plan_greedy_and_foresight(plan, tmp_path, monkeypatch):
    """As planned the plan costs what its certificate says; foresight knows each world,
    and no bound is above it; a world twice as far off costs the plan no less."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SCENARIO)
    (tmp_path / "t.csv").write_text(TRACE)
    inputs = "--trace t.csv --scenario s.yaml"
    assert plan(f"solve {inputs} -o p.json --quiet")[0] == 0
    code, out, _ = plan(f"regret p.json {inputs} --factor 1.5 --factor 3 --json")
    assert code == 0
    worlds = json.loads(out)["worlds"]
    assert [(w["world"], w["factor"]) for w in worlds] == [
        ("as planned", 1.0),
        ("forecast", 1.0),
        *((name, f) for f in (1.5, 3.0) for name in _NAMES),
    ]
    assert worlds[0]["plan"] == pytest.approx(load_plan("p.json").objective)
    assert worlds[0]["plan_regret"] == pytest.approx(0.0, abs=1e-6)
    for world in worlds:
        assert world["foresight_bound"] <= world["foresight"] + 1e-9
    by = {(w["world"], w["factor"]): w["plan"] for w in worlds}
    for name in ("latencies", "loads", "demand"):
        assert by["as planned", 1.0] <= by[name, 1.5] <= by[name, 3.0]
    code, out, _ = plan(f"regret p.json {inputs} --factor 1.5")
    assert code == 0
    assert "foresight" in out
    assert max(map(len, out.splitlines())) <= 100


def test_verb_simulates_each_world(plan, tmp_path, monkeypatch):
    """`--simulate`: with what came as the world the requests are the trace's; 1.5 times
    the demand is about 1.5 times as many as planned; slow engines serve no better. All
    plans of a world meet the same requests."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SCENARIO)
    (tmp_path / "t.csv").write_text(TRACE)
    inputs = "--trace t.csv --scenario s.yaml"
    scenario = SCENARIO.replace("time_limit: 5s", "time_limit: 0.3s, name: cpsat")
    (tmp_path / "s.yaml").write_text(scenario)
    assert plan(f"solve {inputs} -o p.json --quiet")[0] == 0
    code, out, _ = plan(f"regret p.json {inputs} --factor 1.5 --simulate --json")
    assert code == 0
    worlds = {(w["world"], w["factor"]): w for w in json.loads(out)["worlds"]}
    for world in worlds.values():
        assert set(world["simulated"]) == {"plan", "greedy", "foresight"}
        assert len({got["requests"] for got in world["simulated"].values()}) == 1
    got = {key: w["simulated"]["plan"] for key, w in worlds.items()}
    assert got["forecast", 1.0]["requests"] == TRACE.count("\n") - 1
    as_planned = got["as planned", 1.0]
    assert got["demand", 1.5]["requests"] == pytest.approx(
        1.5 * as_planned["requests"], rel=0.1
    )
    assert (
        got["latencies", 1.5]["ttft_p99_s"] > as_planned["ttft_p99_s"]
        or got["latencies", 1.5]["slo_attainment"] <= as_planned["slo_attainment"]
    )
    code, out, _ = plan(f"regret p.json {inputs} --factor 1.5 --simulate")
    assert code == 0
    assert "within SLO" in out
    assert max(map(len, out.splitlines())) <= 100


def columns(rows: list[tuple[float, int]]) -> Trace:
    """Requests as (arrival, llm); a row's number is its prompt's length less one."""
    return Trace(
        arrival_s=np.array([at for at, _ in rows]),
        llm=np.array([llm for _, llm in rows], np.int32),
        llms=("a", "b"),
        input_tokens=np.arange(1, len(rows) + 1, dtype=np.int32),
        output_tokens=np.ones(len(rows), np.int32),
    )


def test_the_right_rate_is_left_alone():
    """The same rates give the same requests, to the bit."""
    trace = columns([(0.1 * i, i % 2) for i in range(300)])
    rates = epoch_rates(trace, 10.0)
    same = reshaped(trace, 10.0, rates, rates, np.random.default_rng(0))
    for name in ("arrival_s", "llm", "input_tokens", "output_tokens"):
        assert (getattr(same, name) == getattr(trace, name)).all()


def test_other_rates_come_about():
    """a at 2.5 times and at 0.4 times its rate of 10/s: every request of the first epoch
    twice or three times, 0.4 of those of the second, all within their epoch. b, which
    has no request in the second, gets about 500 like those it has; time 200 on is cut."""
    trace = columns([(0.1 * i, 0) for i in range(2500)] + [(249.95, 1)])
    wanted = np.array([[25.0, 4.0], [0.0, 5.0]])
    now = epoch_rates(trace, 100.0)[:, :2]
    found = reshaped(trace, 100.0, now, wanted, np.random.default_rng(1))
    assert found.span_s < 200
    first = found.between(0.0, 100.0)
    kinds, counts = np.unique(first.input_tokens, return_counts=True)
    assert kinds.tolist() == list(range(1, 1001))
    assert set(counts) == {2, 3}
    assert (first.llm == 0).all()
    second = found.between(100.0, 200.0)
    assert (second.llm == 0).sum() == pytest.approx(400, rel=0.15)
    b = second.take(second.llm == 1)
    assert len(b) == pytest.approx(500, rel=0.15)
    assert set(b.input_tokens) == {2501}


_NAMES = ("latencies", "loads", "demand", "forecast")
