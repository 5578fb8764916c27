"""What has come so far: bounded, exact, and there again after a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.planner.arrivals import LATE_S, MOST_EPOCHS, Arrivals, trace_of
from foreserve.planner.pipeline import Problems
from foreserve.planner.scenario import parse_scenario
from foreserve.runtime.live.since import KeptClock
from foreserve.traces.trace import Demand, Floats, Trace, bin_demand
from tests.build import fleet, option

LLMS = ("a", "b")
COLUMNS = ("rate_rps", "mean_load", "peak_load", "input_tokens", "output_tokens")


def busy_s(trace: Trace) -> Floats:
    """A tenth of a second for each token of the answer."""
    return 0.1 * trace.output_tokens.astype(np.float64)


def arrivals(epoch_s: float = 10.0, **changes: object) -> Arrivals:
    values: dict[str, object] = {"epoch_s": epoch_s, "busy_s": busy_s}
    return Arrivals(LLMS, **(values | changes))  # type: ignore[arg-type]


def columns(demand: Demand) -> Floats:
    return np.array([getattr(demand, name) for name in COLUMNS])


ROWS = st.lists(
    st.tuples(
        st.floats(0.0, 4000.0, allow_subnormal=False),
        st.integers(0, 1),
        st.integers(1, 5000),
        # Up to 600 s in flight: over many epochs, and from one fold to the next.
        st.integers(1, 6000),
        st.floats(0.0, LATE_S * 0.999),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=25)
@given(rows=ROWS, epoch_s=st.sampled_from([29.3, 60.0, 300.0, 1000.0]))
def test_rolling_is_counting_from_the_start(rows: list, epoch_s: float) -> None:
    """Told of in the order of their ends and asked at each epoch's, it says to the last bit
    what `bin_demand` says of all requests that have been told of by then."""
    rolling = arrivals(epoch_s)
    rows = sorted(rows, key=lambda row: row[0] + row[4])
    told: list[tuple[float, int, int, int]] = []
    for epoch in range(1, int(6000.0 / epoch_s)):
        while rows and rows[0][0] + rows[0][4] < epoch * epoch_s:
            arrival_s, llm, given_, asked, _ = rows.pop(0)
            rolling.add(arrival_s, LLMS[llm], given_, asked)
            told.append((arrival_s, llm, given_, asked))
        if epoch % 5:
            continue  # not every epoch is asked about
        trace = trace_of(LLMS, told).between(0.0, epoch * epoch_s)
        whole = bin_demand(
            trace, epoch_s=epoch_s, busy_s=busy_s(trace), end_s=epoch * epoch_s
        )
        found = rolling.demand(epoch)
        assert (columns(found) == columns(whole)).all()
        assert found.start_s == 0.0
    assert rolling.late == 0


def test_what_is_kept_is_bounded() -> None:
    """40,000 requests over 20,000 s: only those of the last 960 s and the current epoch are
    kept one by one; of epochs, as many as `MOST_EPOCHS`."""
    rolling = arrivals(2.0)
    for number in range(40_000):
        rolling.add(number / 2, "a", 10, 5)
        if number % 1000 == 0:
            rolling.demand(int(number / 4))
    found = rolling.demand(10_000)
    assert len(rolling._rows) <= 2 * (LATE_S + 2.0) + 4
    assert len(rolling._done) == MOST_EPOCHS
    assert found.start_s == (10_000 - found.num_epochs) * 2.0 > 0
    assert (found.rate_rps[0] == 2.0).all()
    assert (found.rate_rps[1] == 0.0).all()


def test_one_that_comes_too_late_is_said_to() -> None:
    """An epoch that is done with does not change any more."""
    rolling = arrivals()
    rolling.add(5.0, "a", 1, 1)
    rolling.demand(200)
    rolling.add(6.0, "a", 1, 1)
    assert rolling.demand(200).rate_rps[0, 0] == pytest.approx(0.1)
    assert rolling.late == 1


def test_a_restart_goes_on(tmp_path: Path) -> None:
    """What was saved is there again, counts and single requests alike: the next start
    says what one that never stopped says, to the last bit."""
    rng = np.random.default_rng(3)
    path = tmp_path / "past.npz"
    rows = [
        (float(t), "ab"[i % 2], 10, 30) for i, t in enumerate(rng.random(300) * 3e3)
    ]
    rows.sort()
    never = arrivals(100.0)
    first = arrivals(100.0, path=path)
    for row in rows[:200]:
        never.add(*row)
        first.add(*row)
    cut_s = rows[199][0]
    first.save(cut_s)
    second = arrivals(100.0, path=path, since_s=cut_s)
    for row in rows[200:]:
        never.add(*row)
        second.add(*row)
    for epoch in (25, 30, 40):
        assert (columns(second.demand(epoch)) == columns(never.demand(epoch))).all()
    assert not list(tmp_path.glob(".*"))


def test_what_nobody_counted_was_not_zero(tmp_path: Path) -> None:
    """One request a second, and a stop from 300 to 670 s: epochs that nobody saw are as the
    last one seen, one that was seen for 70 % has its rate; what came is unchanged."""
    path = tmp_path / "past.npz"
    first = arrivals(100.0, path=path)
    for second in range(300):
        first.add(second + 0.5, "a", 10, 5)
    first.save(300.0)
    later = arrivals(100.0, path=path, since_s=630.0)
    for second in range(630, 800):
        later.add(second + 0.5, "a", 10, 5)
    found = later.demand(8)
    assert found.rate_rps[0] == pytest.approx([1.0] * 8)
    assert found.mean_load[0] == pytest.approx([0.5] * 8, rel=0.02)
    assert (found.rate_rps[1] == 0.0).all()


def test_a_stop_of_a_day_is_as_the_day_before(tmp_path: Path) -> None:
    """Six-hour epochs with rates 1, 2, 3, 4 a day: three days of silence repeat them."""
    path = tmp_path / "past.npz"
    quarter_s = 21_600.0
    first = arrivals(quarter_s, path=path)
    for epoch in range(4):
        for number in range(epoch + 1):
            first.add(epoch * quarter_s + number, "a", 10, 5)
    first.save(4 * quarter_s)
    found = arrivals(quarter_s, path=path, since_s=16 * quarter_s).demand(16)
    assert found.rate_rps[0] * quarter_s == pytest.approx([1, 2, 3, 4] * 4)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rubbish", b"1,2\n"])
def test_a_broken_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    """It starts with nothing and says why; the file is still there for whoever wants to
    know."""
    path = tmp_path / "past.npz"
    path.write_bytes(content)
    fresh = arrivals(path=path, since_s=25.0)
    assert "past.npz" in fresh.dropped
    assert path.with_name("past.npz.broken").read_bytes() == content
    assert fresh.demand(3).num_epochs == 1  # those before it began are unknown


def test_other_epochs_and_other_llms(tmp_path: Path) -> None:
    """Counts in other epochs are of no use; an LLM that is new has been asked for nothing,
    one that is gone is left out."""
    path = tmp_path / "past.npz"
    first = arrivals(path=path)
    for second in range(2000):
        first.add(second, "b", 10, 5)
    first.save(2000.0)
    values = {"epoch_s": 10.0, "busy_s": busy_s, "since_s": 2000.0, "path": path}
    found = Arrivals(("b", "c"), **values).demand(200)  # type: ignore[arg-type]
    assert found.rate_rps[0] == pytest.approx(1.0)
    assert (found.rate_rps[1] == 0.0).all()
    other = arrivals(20.0, path=path, since_s=2000.0)
    assert other.dropped == "past.npz counts in epochs of 10 s"


def test_forecasts_go_on_where_epochs_were_let_go() -> None:
    """A demand that begins with epoch 3 gives epoch 5 the same forecast as the numbers
    alone do: the last value; a history that ended at second 0 is not put before it."""
    scenario = parse_scenario(
        "cluster: {nodes: [{name: n, gpu: h100, gpus: 1, host_ram: 1TiB}]}\n"
        "models: [{name: a, llm: llama-3.1-8b, input_tokens: 9, output_tokens: 9}]\n"
        "epoch: 10s\nforecast: {method: last}\n"
    )
    rates = np.array([[1.0, 2.0]])
    demand = Demand(
        epoch_s=10.0,
        start_s=30.0,
        llms=("a",),
        rate_rps=rates,
        mean_load=rates.copy(),
        peak_load=rates.copy(),
        input_tokens=rates.copy(),
        output_tokens=rates.copy(),
    )
    served = fleet(option("a"))
    found = Problems.so_far(scenario, served, demand, history=demand)
    assert found.forecast(5).rate_rps[0, 0] == 2.0
    assert found.count == 6


def test_the_clock_goes_on_after_a_restart(tmp_path: Path) -> None:
    """40 s of the wall's clock are 400 of one that runs ten times as fast; if the wall's
    goes back, ours does not; without a file, or with a broken one, it begins with 0."""
    path, wall_s = tmp_path / "clock.json", 1000.0
    first = KeptClock(path, 10.0, lambda: wall_s)
    assert first.first_s == 0.0
    shown_s = first.clock.now_s()
    first.note()
    wall_s = 1040.0
    second = KeptClock(path, 10.0, lambda: wall_s)
    assert 400.0 + shown_s <= second.first_s < 400.0 + first.clock.now_s()
    wall_s = 3.0
    assert KeptClock(path, 10.0, lambda: wall_s).first_s >= second.first_s
    path.write_text("{")
    assert KeptClock(path, 10.0, lambda: wall_s).first_s == 0.0
