"""What a run came to, by hand; and over several seeds, with intervals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from foreserve.cli.simulate import run_policies
from foreserve.models.codec import load_plan, to_json
from foreserve.models.cost import IterationTime
from foreserve.models.gaps import gap_bin
from foreserve.models.observed import Phase
from foreserve.models.outcome import Latency, Outcome, Run
from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Fleet
from foreserve.planner.display import NONE
from foreserve.planner.policies import POLICIES
from foreserve.planner.studies import interval, intervals, student_t, study_part
from foreserve.planner.tables import outcome_row
from foreserve.runtime.journal import (
    Ended,
    Event,
    PhaseChange,
    RequestEnd,
    Served,
    Started,
)
from foreserve.runtime.measures import RequestLog, Requests, isolated_s
from foreserve.runtime.simulated import simulate
from foreserve.runtime.tally import Tally
from foreserve.traces.formats import read_trace
from foreserve.traces.trace import Trace
from tests.build import TIME, cluster, fleet, gpu, option, ten_minutes

STARTED = Started(at_s=0.0, policy="p", start_s=0.0, end_s=10.0)
PAIR = fleet(option("a", exec_s=1.0), option("b", exec_s=2.0))


def asked(
    llm: str,
    arrival_s: float,
    first_s: float | None,
    end_s: float,
    output: int,
    **changes: object,
) -> RequestEnd:
    """A finished request of 10 input tokens."""
    values: dict[str, object] = {
        "request": round(1e3 * arrival_s),
        "result": "finished",
    }
    return RequestEnd(
        at_s=end_s,
        llm=llm,
        arrival_s=arrival_s,
        first_token_s=first_s,
        input_tokens=10,
        output_tokens=output,
        **(values | changes),  # type: ignore[arg-type]
    )


def phase(at_s: float, llm: str, index: int, to: Phase | None, **changes: bool):
    return PhaseChange(at_s=at_s, llm=llm, gpus=(gpu(index),), phase=to, **changes)


def tallied(f: Fleet, *events: Event, ended_s: float = 10.0) -> Outcome:
    tally = Tally(f)
    for event in (STARTED, *events, Ended(at_s=ended_s)):
        tally.record(event)
    return tally.run().outcome


@pytest.fixture(scope="module")
def served() -> Outcome:
    """Alone, a request of 10 + n tokens takes n x 10.1 ms; e_a = 1 s and e_b = 2 s.

    a: 0.5 s for 4 tokens, 40.4 ms for 4 (alone), 3 s for 2; b: 8 s for 101, and one of
    8 tokens that came at 6 s and still ran when the run stopped at 10 s.
    """
    return tallied(
        PAIR,
        asked("a", 0.1, 0.5, 0.6, 4),
        asked("a", 1.0, 1.0101, 1.0404, 4),
        asked("a", 2.0, 2.2, 5.0, 2),
        asked("b", 0.0, 0.1, 8.0, 101),
        asked("b", 6.0, 7.0, 10.0, 8, result="unfinished"),
    )


def test_normalized_latency_three_ways(served):
    """D1 = mean of (0.5 + 0.0404 + 3)/3 and (4 + 2)/2; D2 = mean of all five ratios;
    D3 = mean of seconds per token; the unfinished one counts with its 4 s."""
    total, by_llm = served.total, served.by_llm
    assert by_llm["a"].d1 == pytest.approx(3.5404 / 3)
    assert by_llm["a"].d1 == by_llm["a"].slowdown.mean
    assert by_llm["b"].d1 == pytest.approx(3.0)
    assert total.d1 == pytest.approx((3.5404 / 3 + 3.0) / 2)
    assert total.slowdown.mean == pytest.approx((3.5404 + 6.0) / 5)
    assert (total.slowdown.count, total.slowdown.p50) == (5, pytest.approx(2.0))
    per_token = [0.125, 0.0101, 1.5, 8 / 101, 0.5]
    assert total.normalized.mean_s == pytest.approx(sum(per_token) / 5)
    assert total.normalized.p50_s == pytest.approx(0.125)


def test_attainment_by_scale(served):
    """0.5/0.0404 = 12.4, 1, 3/0.0202 = 149, 8/1.0201 = 7.8 times what they take alone;
    the unfinished one attains nothing."""
    assert served.total.attainment_at == pytest.approx(
        {"1": 0.2, "2": 0.2, "4": 0.2, "8": 0.4, "16": 0.6}
    )
    own = served.by_llm["b"].attainment_at
    assert own == {"1": 0.0, "2": 0.0, "4": 0.0, "8": 0.5, "16": 0.5}


def test_goodput_counts_requests_within_targets(served):
    """TTFT <= 2 s and TPOT <= 0.1 s hold for the first two of a and the first of b (79 ms):
    three requests of 109 tokens in 10 s. The third of a has a TPOT of 2.8 s."""
    assert served.total.goodput_rps == pytest.approx(0.3)
    assert served.total.goodput_tokens_per_s == pytest.approx(10.9)
    assert served.by_llm["a"].goodput_tokens_per_s == pytest.approx(0.8)
    assert served.total.slo_attainment == pytest.approx(0.6)


def test_nobody_came():
    """No requests: no latency, nothing missed, no goodput; still plain JSON."""
    outcome = tallied(PAIR, asked("a", 0.0, 0.5, 1.0, 2))
    empty = outcome.by_llm["b"]
    assert (empty.slowdown.count, empty.normalized.count, empty.d1) == (0, 0, 0.0)
    assert set(empty.attainment_at.values()) == {1.0}
    assert empty.goodput_rps == 0.0
    assert outcome.total.d1 == outcome.by_llm["a"].d1 == 1.0
    assert json.loads(to_json(outcome))["by_llm"]["b"]["slowdown"]["p99"] == 0.0


def test_isolated_time_is_the_fastest_options():
    """The arrays say what `IterationTime.isolated_s` says, prompt floor and experts
    included, for whichever option is faster."""
    sparse = IterationTime(
        prefill_base_s=0.002,
        prefill_s_per_token=2e-5,
        prefill_s_per_token2=1e-9,
        decode_base_s=0.004,
        decode_s_per_seq=1e-4,
        decode_s_per_context_token=1e-6,
        relative_error=0.1,
        source="test",
        prefill_floor_s=0.03,
        decode_experts_s=0.01,
        expert_share=0.25,
    )
    options = option("a"), option("a", 2, time=sparse), option("b", time=sparse)
    rng = np.random.default_rng(0)
    llm = rng.integers(0, 2, 50).astype(np.int32)
    unknown = np.full(50, np.nan)
    requests = Requests(
        llm=llm,
        arrival_s=np.zeros(50),
        first_token_s=unknown,
        finish_s=unknown,
        input_tokens=rng.integers(1, 9000, 50),
        output_tokens=rng.integers(1, 500, 50),
        left_s=unknown,
    )
    found = isolated_s(fleet(*options), requests)
    pairs = zip(requests.input_tokens, requests.output_tokens, strict=True)
    for index, (prompt, answer) in enumerate(pairs):
        times = (TIME, sparse) if llm[index] == 0 else (sparse,)
        expected = min(time.isolated_s(prompt, answer) for time in times)
        assert found[index] == pytest.approx(expected, rel=1e-12)


def test_a_request_alone_is_within_one_isolated_time():
    """On the simulated engine, ACTIVE from the start: 300 + 200 tokens with a context
    price take just what the cost model says; two at once do not."""
    time = replace(TIME, decode_s_per_context_token=1e-7)
    f = fleet(option("a", kv_bytes=4000, time=time), on=cluster(memory_bytes=10_000))
    goal = Placement(
        replicas=(Replica(llm="a", gpus=(gpu(0),), state="ACTIVE", traffic_share=1.0),)
    )

    class Stay:
        name = "stay"

        def decide(self, now_s: float, observed: object) -> Placement:
            return goal

        def next_review_s(self, now_s: float) -> float:
            return now_s + 100.0

    def at(*arrivals: float) -> Run:
        trace = Trace(
            arrival_s=np.array(arrivals),
            llm=np.zeros(len(arrivals), dtype=np.int32),
            llms=("a",),
            input_tokens=np.full(len(arrivals), 300, dtype=np.int32),
            output_tokens=np.full(len(arrivals), 200, dtype=np.int32),
        )
        return simulate(f, trace, Stay(), start_s=0.0, end_s=90.0, seed=0, initial=goal)

    assert at(0.5, 20.25, 41.125).outcome.total.attainment_at["1"] == 1.0
    together = at(0.5, 0.5).outcome.total.attainment_at
    assert (together["1"], together["2"]) == (0.0, 1.0)


def test_loads_that_never_served():
    """Each load moves 25 bytes of weights (and makes 30 resident). b is dropped unused
    on GPU 0; on GPU 1 its load is cancelled, then it is lost, then it is still there at
    the end. a has worked on a request before it is dropped, and again not."""
    f = fleet(option("a", residue_bytes=5), option("b", residue_bytes=5))
    outcome = tallied(
        f,
        phase(0.0, "b", 0, "LOADING"),
        phase(1.0, "b", 0, "WARM"),
        phase(2.0, "b", 0, None),
        phase(2.0, "b", 1, "LOADING"),
        phase(3.0, "b", 1, None),
        phase(3.0, "b", 1, "LOADING"),
        phase(4.0, "b", 1, "WARM"),
        phase(5.0, "b", 1, None, lost=True),
        phase(5.0, "b", 1, "LOADING"),
        phase(6.0, "b", 1, "WARM"),
        phase(2.0, "a", 0, "LOADING"),
        phase(3.0, "a", 0, "WARM"),
        phase(3.0, "a", 0, "ACTIVATING"),
        phase(4.0, "a", 0, "ACTIVE"),
        asked("a", 2.0, 4.5, 5.0, 2, gpus=(gpu(0),)),
        phase(5.0, "a", 0, "DRAINING"),
        phase(5.0, "a", 0, "WARM"),
        phase(6.0, "a", 0, None),
        phase(7.0, "a", 0, "LOADING"),
        phase(8.0, "a", 0, "WARM"),
        phase(9.0, "a", 0, None),
    )
    a, b = outcome.effort["a"], outcome.effort["b"]
    assert (a.loads, a.moved_bytes, a.wasted_bytes, a.unused_bytes) == (2, 50, 25, 0)
    assert (b.loads, b.moved_bytes, b.wasted_bytes, b.unused_bytes) == (4, 100, 50, 25)
    assert (outcome.loaded_bytes, outcome.moved_bytes) == (180, 150)
    assert (outcome.wasted_bytes, outcome.unused_bytes) == (75, 25)
    assert (a.activations, a.warm_starts, b.activations) == (1, 1, 0)


def test_gpu_hours_of_llms_add_up():
    """GPU 0: a WARM 0-2 s, then ACTIVE until 6 s; b ACTIVE 4-10 s beside it (two LLMs in
    turns): a has 4 s and half of 2 s, b half of 2 s and 4 s, of 10 s in all."""
    f = fleet(option("a"), option("b"), on=cluster(1))
    outcome = tallied(
        f,
        phase(0.0, "a", 0, "WARM"),
        phase(2.0, "a", 0, "ACTIVE"),
        phase(4.0, "b", 0, "ACTIVE"),
        phase(6.0, "a", 0, None),
    )
    seconds = {llm: 3600 * effort.gpu_hours for llm, effort in outcome.effort.items()}
    assert seconds == pytest.approx({"a": 5.0, "b": 5.0})
    assert 3600 * outcome.gpu_hours["total"] == pytest.approx(10.0)
    assert 3600 * outcome.gpu_hours["WARM"] == pytest.approx(2.0)


def test_what_is_there_from_the_start_was_not_loaded():
    """A replica in place at the start that is dropped unused wastes no load."""
    warm = Replica(llm="a", gpus=(gpu(0),), state="WARM")
    tally = Tally(PAIR)
    tally.record(replace(STARTED, initial=Placement(replicas=(warm,))))
    tally.record(phase(3.0, "a", 0, None))
    tally.record(Ended(at_s=10.0))
    outcome = tally.run().outcome
    assert (outcome.moved_bytes, outcome.wasted_bytes, outcome.unused_bytes) == (
        0,
        0,
        0,
    )
    assert 3600 * outcome.effort["a"].gpu_hours == pytest.approx(3.0)


def test_itl_is_over_single_gaps():
    """a: 98 gaps of 10 ms and 2 of 1 s, b: 300 of 10 ms. Of a 2 in 100 are long, so its
    P99 is; of all 2 in 400. Means are exact, quantiles right within 1 %."""
    outcome = tallied(
        PAIR,
        Served(
            at_s=9.0,
            llm="a",
            gaps_s=98 * 0.01 + 2,
            gaps=((gap_bin(0.01), 98), (gap_bin(1.0), 2)),
        ),
        Served(at_s=9.0, llm="b", gaps_s=3.0, gaps=((gap_bin(0.01), 300),)),
    )
    a, b, both = outcome.by_llm["a"].itl, outcome.by_llm["b"].itl, outcome.total.itl
    assert (a.count, b.count, both.count) == (100, 300, 400)
    assert a.mean_s == pytest.approx(0.0298)
    assert both.mean_s == pytest.approx(5.98 / 400)
    assert (a.p50_s, a.p99_s) == pytest.approx((0.01, 1.0), rel=0.01)
    assert both.p99_s == pytest.approx(0.01, rel=0.01)
    row = outcome_row(outcome)
    assert (row["itl_p50_s"], row["itl_p99_s"]) == (both.p50_s, both.p99_s)


def test_gaps_of_a_run_add_up(day, tmp_path):
    """A simulated day in which all is answered: as many gaps as tokens after the first,
    and together as long as from first tokens to last, for each LLM."""
    plan = load_plan(str(tmp_path / "p.json"))
    (run,) = run_policies(
        plan, read_trace(tmp_path / "t.csv"), ["planned"], 1, 30.0, quiet=True
    )
    assert not np.isnan(run.finish_s).any()
    for index, llm in enumerate(run.llms):
        own = run.llm == index
        last_s = (run.finish_s - run.first_token_s)[own].sum()
        assert run.itl[index].sum() == (run.output_tokens[own] - 1).sum() > 0
        assert run.itl_s[index] == pytest.approx(last_s)
        itl = run.outcome.by_llm[llm].itl
        assert (itl.count, itl.mean_s * itl.count) == pytest.approx(
            (run.itl[index].sum(), last_s)
        )
        assert itl.p50_s <= itl.p90_s <= itl.p99_s


def test_no_gap_is_no_number(served):
    """Without single gaps there is no ITL, which shows as a dash."""
    assert served.total.itl == Latency(
        count=0, mean_s=0, p50_s=0, p90_s=0, p95_s=0, p99_s=0
    )
    part = study_part(["p"], [intervals([served])], 1)
    assert next(row for row in part.rows if row[0] == "ITL, P99")[1] == NONE


def test_requests_in_the_order_of_their_numbers():
    """They end in another order than they came; the columns are sorted, NaN where there
    is no first token or no end."""
    log = RequestLog(("a", "b"))
    log.add(asked("b", 2.0, None, 3.0, 7, result="failed"))
    log.add(asked("a", 1.0, 1.5, 4.0, 5))
    found = log.requests()
    assert (found.llm.tolist(), found.output_tokens.tolist()) == ([0, 1], [5, 7])
    assert found.arrival_s.tolist() == [1.0, 2.0]
    assert found.left_s.tolist() == [4.0, 3.0]
    np.testing.assert_array_equal(found.first_token_s, [1.5, np.nan])
    np.testing.assert_array_equal(found.finish_s, [4.0, np.nan])


@pytest.mark.parametrize(
    ("freedom", "coverage", "expected"),
    [
        (1, 0.95, 12.706205),
        (2, 0.95, 4.302653),
        (3, 0.95, 3.182446),
        (9, 0.95, 2.262157),
        (10, 0.99, 3.169273),
        (30, 0.95, 2.042272),
        (1000, 0.95, 1.962339),
    ],
)
def test_student_t_as_in_the_tables(freedom, coverage, expected):
    """Odd and even degrees of freedom, to the digits of printed tables."""
    assert student_t(freedom, coverage) == pytest.approx(expected, abs=6e-7)


def test_interval_by_hand():
    """1, 2, 3: mean 2, deviation 1, so 4.302653 / sqrt(3); one value has no width, equal
    values have width 0, none have no interval."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.runs, found.mean) == (3, 2.0)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([5.0]).half_width is None
    assert interval([0.1] * 7).half_width == pytest.approx(0.0, abs=1e-15)
    assert interval([]) is None


def test_intervals_cover_as_they_say():
    """Of 2000 studies of 5 normal values each, 95 % cover the true mean (+- 1.5 %)."""
    rng = np.random.default_rng(1)
    covered = 0
    for row in rng.normal(3.0, 2.0, (2000, 5)):
        found = interval(list(row))
        covered += abs(found.mean - 3.0) <= found.half_width
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_metrics_that_some_runs_lack(served):
    """A run without a second token has no TPOT: its interval is over the other runs."""
    bare = tallied(PAIR, asked("a", 0.0, 0.5, 1.0, 1))
    found = intervals([served, bare, served])
    assert (found["tpot_p99_s"].runs, found["ttft_p99_s"].runs) == (2, 3)
    assert found["requests"].mean == pytest.approx(11 / 3)
    assert "policy" not in found
    part = study_part(["p"], [found], 3)
    row = next(row for row in part.rows if row[0] == "Goodput, requests/s")
    assert row[1] == "0.233 ± 0.287"


# --- plan simulate --seeds ---------------------------------------------------------------


@pytest.fixture
def day(tmp_path):
    """Ten minutes of two LLMs on two GPUs, of which b is loaded for the second epoch."""
    ten_minutes(tmp_path, activate_s=0.5)
    return f"simulate {tmp_path}/p.json --trace {tmp_path}/t.csv"


def test_seeds_do_not_depend_on_the_workers(plan, day, tmp_path):
    """One and two processes give the same bytes: every seed's outcome as it is without
    --seeds, the intervals of just these, and a report of the first."""
    policies = "--policy planned --policy reactive"
    texts = []
    for workers in (1, 2):
        report = f"--report {tmp_path}/r.html"
        code, out, err = plan(
            day, policies, f"--seed 3 --seeds 3 --workers {workers} --json", report
        )
        assert (code, err) == (0, "")
        texts.append(out)
    assert texts[0] == texts[1]
    found = json.loads(texts[0])
    assert [row["seed"] for row in found["seeds"]] == [3, 4, 5]
    single = json.loads(plan(day, policies, "--seed 4 --json")[1])
    assert found["seeds"][1]["outcomes"] == single["outcomes"]
    assert found["outcomes"] == found["seeds"][0]["outcomes"]
    reactive = found["intervals"][1]
    assert reactive["policy"] == "reactive"
    values = [row["outcomes"][1]["total"]["ttft"]["p99_s"] for row in found["seeds"]]
    assert len(set(values)) == 3
    expected = asdict(interval(values))
    assert reactive["metrics"]["ttft_p99_s"] == pytest.approx(expected)
    assert "<svg" in (tmp_path / "r.html").read_text()
    for outcome in single["outcomes"]:
        for name in ("loads", "moved_bytes", "wasted_bytes", "cold_starts"):
            own = sum(effort[name] for effort in outcome["effort"].values())
            assert outcome[name] == own
        hours = sum(effort["gpu_hours"] for effort in outcome["effort"].values())
        assert hours == pytest.approx(outcome["gpu_hours"]["total"])


def test_seeds_as_a_table(plan, day):
    """For people: mean and half width of each metric, within 100 columns."""
    code, out, _ = plan(day, "--seeds 2 --policy planned --policy reactive-keep")
    assert code == 0
    assert "Mean of 2 seeds" in out
    assert "reactive-keep" in out
    attainment = next(line for line in out.splitlines() if "SLO attainment" in line)
    assert attainment.count("±") == 2
    assert max(map(len, out.splitlines())) <= 100


def test_a_failing_worker_ends_with_one_line(plan, day, monkeypatch):
    """A policy that only this process knows: the worker fails, exit code 1."""
    monkeypatch.setitem(POLICIES, "ghost", POLICIES["planned"])
    code, out, err = plan(day, "--seeds 2 --policy planned --policy ghost")
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: seed 0 of policy 'ghost' failed: InvalidInput: unknown"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 2 --policy ghost", "unknown policy 'ghost'"),
        ("--seeds 2 --journal j.jsonl", "--journal takes one --seed"),
        ("--workers 2", "--workers needs --seeds"),
        ("--seeds 0", "x>=1"),
        ("--seed -1", "x>=0"),
    ],
)
def test_wrong_use_is_told_before_any_run(plan, day, flags, message):
    """Exit code 2 and a line that says what to do."""
    code, _, err = plan(day, flags)
    assert code == 2
    assert message in err
