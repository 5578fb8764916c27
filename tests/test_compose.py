"""Composed and synthetic traces: exact counts, every rule by hand, one-line errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.errors import InvalidInput
from foreserve.traces.arrivals import Cells, bent, renewals, scattered, spread
from foreserve.traces.compose import compose
from foreserve.traces.demand_table import read_demand
from foreserve.traces.formats import read_meta, read_trace
from foreserve.traces.lengths import LengthQuantiles
from foreserve.traces.rates import Rates
from foreserve.traces.recipe import Recipe, load_recipe, recipe_path, wanted
from foreserve.traces.sources import Source, read_source
from foreserve.traces.synth import Tokens, daily_moments, parse_tokens, synth
from foreserve.traces.trace import Trace

SHARED = Path(__file__).parents[2] / "shared" / "data" / "servegen"
HEADER = "arrival_s,llm,input_tokens,output_tokens\n"


def record(arrival, llm=None, llms=("a",)):
    """Request i has 10 + i input and 1 + i output tokens."""
    count = len(arrival)
    return Trace(
        arrival_s=np.array(arrival, dtype=np.float64),
        llm=np.array([0] * count if llm is None else llm, dtype=np.int32),
        llms=llms,
        input_tokens=np.arange(10, 10 + count, dtype=np.int32),
        output_tokens=np.arange(1, 1 + count, dtype=np.int32),
    )


def recipe(llms, span=60, **rest) -> Recipe:
    """A recipe over the one source ``s``, read as from a file."""
    from foreserve.models.codec import structure

    llms = [{"name": f"l{i}", "source": "s", **llm} for i, llm in enumerate(llms)]
    plain = {"span": span, "sources": {"s": "s.csv"}, "llms": llms, **rest}
    return structure(Recipe, plain, text="", file=None)


def made(source, llms, **rest):
    """What comes of one source: a `Trace` or `Rates`."""
    kind = "trace" if isinstance(source, Trace) else "rates"
    return compose(recipe(llms, **rest), {"s": Source(**{kind: source})})


def rates(counts, cv=None, names=("1",), window_s=60.0, start_s=0.0):
    return Rates(
        names=names,
        window_s=window_s,
        start_s=start_s,
        counts=np.array(counts, dtype=np.float64),
        cv=None if cv is None else np.array(cv, dtype=np.float64),
    )


FIXED = {"input_tokens": 8, "output_tokens": 4}


def cv_of(arrival_s):
    gaps = np.diff(arrival_s)
    return gaps.std() / gaps.mean()


def test_popularity_of_the_published_check():
    """WarmServe, M = 4, alpha 0.5, 15 requests/s, one hour: 54,000 requests, of which
    each LLM gets the floor of its share; an hour's record is then played exactly so."""
    four = recipe([{}] * 4, span=3600, popularity={"alpha": 0.5, "rate_rps": 15})
    assert wanted(four) == (19393, 13713, 11196, 9696)
    hour = record(np.linspace(0, 3599.9, 12_000))
    composed = compose(four, {"s": Source(trace=hour)})
    assert np.bincount(composed.trace.llm).tolist() == [19393, 13713, 11196, 9696]
    assert [(row.asked, row.made) for row in composed.counts] == [
        (19393, 19393),
        (13713, 13713),
        (11196, 11196),
        (9696, 9696),
    ]


def test_rate_and_share_are_exact():
    """0.29/s for 100 s is 29, not the 28 of a careless floor; half of 60 is 30."""
    asked = recipe([{"rate": 0.29}, {"share": 0.5}, {}], span=100,
                   popularity={"rate_rps": 0.6})  # fmt: skip
    assert wanted(asked) == (29, 30, None)


def test_as_recorded():
    """Without any rule the requests of one LLM come as they are, under the new name."""
    source = record([1, 2, 3, 50], llm=[0, 1, 0, 1], llms=("a", "b"))
    trace = made(source, [{"group": "b"}]).trace
    assert trace.llms == ("l0",)
    assert trace.arrival_s.tolist() == [2.0, 50.0]
    assert trace.input_tokens.tolist() == [11, 13]


def test_start_phase_and_compress():
    """Second t of the trace plays start + phase + compress * t of the source."""
    source = record([5, 15, 25, 35, 45, 55])
    assert made(source, [{}], start=10, span=20).trace.arrival_s.tolist() == [5, 15]
    shifted = made(source, [{"phase": 20}], start=10, span=20).trace
    assert shifted.arrival_s.tolist() == [5, 15]
    assert shifted.input_tokens.tolist() == [13, 14]
    faster = made(source, [{"compress": 2}], start=10, span=20).trace
    assert faster.arrival_s.tolist() == [2.5, 7.5, 12.5, 17.5]


def test_wrap_only_if_asked():
    """A record whose last request is in its first minute ends after 60 s; played from
    50 s on for 20 s, its request at 4 s comes at second 14."""
    source = record([4, 52])
    wrapped = made(source, [{"wrap": True}], start=50, span=20).trace
    assert wrapped.arrival_s.tolist() == [2.0, 14.0]
    with pytest.raises(InvalidInput, match="from 50 s to 70 s, but the record goes"):
        made(source, [{}], start=50, span=20)
    with pytest.raises(InvalidInput, match="wrap: true"):
        made(rates([[5, 5]]), [{"lengths": FIXED}], start=90, span=60)


def test_fewer_and_more_requests_than_recorded():
    """Of three requests two are drawn without replacement. Seven of three: each comes
    twice, one of them a third time, copies before the next request."""
    source = record([10, 20, 30])
    fewer = made(source, [{"rate": 2 / 60}]).trace
    assert len(set(fewer.input_tokens)) == 2
    assert set(fewer.arrival_s) < {10.0, 20.0, 30.0}
    more = made(source, [{"rate": 7 / 60}]).trace
    assert sorted(np.bincount(more.input_tokens)[10:]) == [2, 2, 3]
    until = {10: 20.0, 11: 30.0, 12: 60.0}
    for at_s, tokens in zip(more.arrival_s, more.input_tokens, strict=True):
        assert 10.0 * (tokens - 9) <= at_s < until[int(tokens)]
    assert len(set(more.arrival_s)) == 7


def test_clamps_and_lengths():
    """Prompts are cut at max_input, outputs raised to min_output; lengths may be stated
    or taken from another LLM."""
    source = record([1, 2, 3], llm=[0, 0, 1], llms=("a", "b"))
    clamped = made(source, [{"group": "a", "max_input": 10, "min_output": 2}]).trace
    assert clamped.input_tokens.tolist() == [10, 10]
    assert clamped.output_tokens.tolist() == [2, 2]
    stated = made(source, [{"lengths": FIXED}]).trace
    assert set(stated.input_tokens) == {8}
    assert set(stated.output_tokens) == {4}
    others = {"source": "s", "group": "b"}
    taken = made(source, [{"group": "a", "lengths": others}]).trace
    assert taken.input_tokens.tolist() == [12, 12]


def test_cv_redraws_gaps_and_keeps_lengths():
    """CV 0: equal gaps, lengths in their order. CV 3: the gaps of 20,000 requests at a
    constant rate have it within 10 %."""
    even = made(record([1, 2, 3, 50, 51, 52]), [{"cv": 0}]).trace
    assert np.allclose(np.diff(even.arrival_s), 10.0, atol=1e-4)
    assert even.input_tokens.tolist() == [10, 11, 12, 13, 14, 15]
    constant = record(np.linspace(0, 3599.9, 20_000))
    bursty = made(constant, [{"cv": 3}], span=3600).trace
    assert len(bursty) == 20_000
    assert cv_of(bursty.arrival_s) == pytest.approx(3, rel=0.1)
    assert bursty.input_tokens.tolist() == constant.input_tokens.tolist()


def test_cv_keeps_the_shape_of_the_rate():
    """Three times as many requests in the second half hour stay so: 1,000 and 3,000."""
    times = np.concatenate([np.linspace(0, 1799, 1000), np.linspace(1800, 3599, 3000)])
    bursty = made(record(times), [{"cv": 1.5}], span=3600).trace
    assert int((bursty.arrival_s < 1800).sum()) == pytest.approx(1000, rel=0.15)


def test_insert_adds_exactly_its_requests():
    """Five more requests between seconds 30 and 40, with lengths of the LLM; the other
    LLM and the rest stay as they were."""
    source, llms = record([1, 20, 55]), [{}, {"rate": 0.2}]
    burst = {"llm": "l0", "at": 30, "duration": 10, "requests": 5}
    plain, more = made(source, llms), made(source, llms, insert=[burst])
    inside = more.trace.between(30, 40)
    added = inside.llm == 0
    assert int(added.sum()) == 5
    assert set(inside.input_tokens[added]) <= {10, 11, 12}
    assert [(row.asked, row.made) for row in more.counts] == [(8, 8), (12, 12)]
    rest = more.trace.arrival_s[more.trace.llm == 1]
    assert rest.tolist() == plain.trace.arrival_s[plain.trace.llm == 1].tolist()


def test_rates_become_requests():
    """Counts 10 and 30 of two minutes, 20 asked for: 5 and 15, one more or less by
    rounding. Played from second 30 on for a minute: 5 + 15 as recorded."""
    source = rates([[10, 30]], cv=[[1, 1]])
    composed = made(source, [{"lengths": FIXED, "rate": 20 / 120}], span=120)
    first = int((composed.trace.arrival_s < 60).sum())
    assert len(composed.trace) == 20
    assert abs(first - 5) <= 1
    assert composed.counts[0].recorded == 40
    half = made(source, [{"lengths": FIXED}], start=30, span=60)
    assert half.counts[0].recorded == 20
    assert len(half.trace) == 20
    assert abs(int((half.trace.arrival_s < 30).sum()) - 5) <= 1


def test_rates_keep_their_own_clock():
    """A record that starts at 120 s is played from there, not from 0."""
    source = rates([[7, 9]], start_s=120.0)
    assert len(made(source, [{"lengths": FIXED}], start=180, span=60).trace) == 9
    with pytest.raises(InvalidInput, match="goes from 120 s to 240 s"):
        made(source, [{"lengths": FIXED}], start=60, span=120)


def test_unknown_counts_are_filled_and_said():
    """After 10 requests a minute without a record counts 10 too, and is told of."""
    row = made(rates([[10, np.nan, 30]]), [{"lengths": FIXED}], span=180).counts[0]
    assert row.recorded == 50
    assert row.unknown_s == 60


def test_recorded_burstiness_of_a_window():
    """A window's recorded CV is that of its requests, within 10 % on 20,000."""
    source = rates([[20_000]], cv=[[2.5]], window_s=600.0)
    trace = made(source, [{"lengths": FIXED}], span=600).trace
    assert cv_of(trace.arrival_s) == pytest.approx(2.5, rel=0.1)


def test_an_empty_stretch_stays_empty():
    """Nobody comes in a window without requests, however arrivals are drawn."""
    cells = Cells(
        edges_s=np.array([0.0, 10, 20, 30]),
        requests=np.array([5.0, 0, 5]),
        cv=np.ones(3),
    )
    rng = np.random.default_rng(0)
    for arrivals in (bent(cells, 1000, 1.0, rng), scattered(cells, 1000, rng)):
        assert len(arrivals) == 1000
        assert not ((arrivals > 10) & (arrivals < 20)).any()
        assert (np.diff(arrivals) >= 0).all()


def test_history_is_the_time_before():
    """Of ten requests a minute (odd minutes: 4) history holds minutes 0-3, the trace
    4 and 5. Halved like the trace: 14 of 28 requests, each in flight 1 + 2 * 4 s."""
    times = [m * 60 + s for m in range(6) for s in range(4 if m % 2 else 10)]
    composed = made(
        record(times),
        [{"rate": 7 / 120, "lengths": FIXED, "prefill": 1}],
        start=240,
        span=120,
        history={"span": 240, "epoch": 60, "prefill": 9, "decode": 2},
    )
    history = composed.history
    assert history is not None
    assert (history.start_s, history.num_epochs) == (0.0, 4)
    assert history.rate_rps.sum() * 60 == pytest.approx(14)
    assert history.mean_load.sum() * 60 == pytest.approx(14 * 9)
    assert len(composed.trace) == 7


def test_history_knows_nothing_of_the_future():
    """Changing what is recorded from the start on leaves the history as it was."""
    llms, rest = [{}], {"start": 120, "span": 60, "history": {"span": 120, "epoch": 60}}
    past = [float(s) for s in range(0, 120, 7)]
    one = made(record([*past, 130, 150]), llms, **rest)
    other = made(record([*past, 121, 179]), llms, **rest)
    for key in ("rate_rps", "mean_load", "peak_load"):
        assert np.array_equal(getattr(one.history, key), getattr(other.history, key))


def test_history_knows_no_later_lengths():
    """Prompts are 5 tokens until second 100 and 9 from there on. A history up to second
    90 has 5 only, though its end is nearer to the later window's start."""
    level = np.array([0.0, 1.0])
    tokens = np.array([[5.0, 5.0], [9.0, 9.0]])
    lengths = LengthQuantiles(
        input_tokens=tokens,
        output_tokens=tokens.copy(),
        starts_s=np.array([0.0, 100.0]),
        levels=level,
    )
    source = Source(
        rates=rates([[40, 40, 40, 40]], window_s=30.0), lengths={"1": lengths}
    )
    before = {"span": 30, "history": {"span": 90, "epoch": 30}, "start": 90}
    composed = compose(recipe([{"group": 1}], **before), {"s": source})
    assert composed.history is not None
    assert set(composed.history.input_tokens[0]) == {5.0}
    assert set(composed.trace.input_tokens) == {9}


def test_history_must_have_been_recorded():
    """It neither begins before the record nor goes on behind its end."""
    rest = {"span": 60, "history": {"span": 120, "epoch": 60}}
    with pytest.raises(InvalidInput, match="from -60 s to 60 s"):
        made(record([1, 179]), [{}], start=60, **rest)
    with pytest.raises(InvalidInput, match="trace's future"):
        made(record([1, 179]), [{"wrap": True}], start=60, **rest)


def test_a_servegen_folder_has_counts_and_lengths(tmp_path):
    """A client of a raw folder plays an LLM with its own lengths: 0.1/s in ten minutes
    are 60 requests of 7 and 3 tokens."""
    (tmp_path / "chunk-4-trace.csv").write_text("0,0.1,1.5,Gamma,0.44,22.5\n")
    fields = {"input_tokens": "{7: 1.0}", "output_tokens": "{3: 1.0}"}
    (tmp_path / "chunk-4-dataset.json").write_text(json.dumps({"0": fields}))
    composed = compose(recipe([{"group": 4}], span=600), {"s": read_source(tmp_path)})
    assert len(composed.trace) == 60
    assert set(composed.trace.input_tokens) == {7}
    assert set(composed.trace.output_tokens) == {3}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_whatever_the_recipe(data):
    """Any mixture of rules: as many requests as asked, inside the span, in order."""
    draw = data.draw
    counted = rates([draw(st.lists(st.integers(0, 40), min_size=3, max_size=8))])
    listed = record(sorted(draw(st.lists(st.floats(0, 500), min_size=1, max_size=40))))
    llm = {
        "rate": draw(st.none() | st.floats(0, 3)),
        "phase": draw(st.floats(-400, 400)),
        "compress": draw(st.floats(0.2, 5)),
        "cv": draw(st.none() | st.floats(0, 20)),
        "lengths": FIXED,
        "wrap": True,
    }
    span = draw(st.floats(1, 900))
    for source in (counted, listed):
        try:
            composed = made(source, [llm], span=span, start=draw(st.floats(0, 300)))
        except InvalidInput as error:
            if "none in this time" not in str(error):
                raise
            continue
        (row,) = composed.counts
        assert row.made == row.asked == len(composed.trace)
        if llm["rate"] is not None:
            assert row.asked == int(round(span * llm["rate"], 6))
        assert composed.trace.span_s < span


FILE = """\
seed: 3
span: 1m
sources:
  s: t.csv
llms:
  - {name: chat, source: s, group: a, rate: 0.5}
  - {name: code, source: s, cv: 2}
history: {span: 1m, epoch: 30s}
start: 1m
"""
ROWS = HEADER + "".join(f"{i},{'ab'[i % 2]},{10 + i},{1 + i}\n" for i in range(120))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe and its source, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(FILE)
    (tmp_path / "t.csv").write_text(ROWS)
    return tmp_path


def test_compose_on_the_command_line(folder, plan):
    """Trace, history and sidecar are written; counts are said; same recipe, same bytes;
    another seed, another trace."""
    code, out, _ = plan("trace compose r.yaml one.csv.gz --json")
    assert code == 0
    said = json.loads(out)
    assert [(row["asked"], row["made"]) for row in said["llms"]] == [(30, 30), (60, 60)]
    assert len(read_trace("one.csv.gz")) == said["requests"] == 90
    assert read_demand(said["history"]).llms == ("chat", "code")
    assert read_meta("one.csv.gz")["recipe"]["seed"] == 3
    assert plan("trace compose r.yaml two.csv.gz --quiet")[:2] == (0, "")
    for suffix in (".csv.gz", ".csv.gz.meta.json", ".history.csv.gz"):
        one, two = Path("one" + suffix), Path("two" + suffix)
        assert one.read_bytes() == two.read_bytes()
    plan("trace compose r.yaml two.csv.gz --seed 4")
    assert Path("one.csv.gz").read_bytes() != Path("two.csv.gz").read_bytes()


def test_a_source_from_elsewhere(folder, plan):
    """--source replaces the recipe's path; an unknown name is an error with a hint."""
    Path("t.csv").rename("elsewhere.csv")
    code, _, err = plan("trace compose r.yaml one.csv")
    assert code == 2
    assert "r.yaml:4: sources.s: no file" in err
    assert "--source s=PATH" in err
    assert plan("trace compose r.yaml one.csv --source s=elsewhere.csv")[0] == 0
    code, _, err = plan("trace compose r.yaml one.csv --source x=elsewhere.csv")
    assert code == 2
    assert "no source 'x'" in err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 3", "sead: 3", "r.yaml:1: sead: unknown key 'sead' (hint: did you mean"),
        ("span: 1m\ns", "span: 1 moon\ns", "r.yaml:2: span: '1 moon' is not a quantity"),
        ("span: 1m\ns", "s", "span: required key is missing"),
        ("cv: 2", "cv: -2", "r.yaml:7: llms.1.cv: must be from 0 to 100"),
        ("cv: 2", "cw: 2", "r.yaml:7: llms.1.cw: unknown key 'cw'"),
        ("cv: 2", "rate: 1, share: 1", "r.yaml:7: llms.1: give rate or share, not both"),
        ("cv: 2", "share: 1", "r.yaml:7: llms.1: share: of how many requests?"),
        ("cv: 2", "lengths: {}", "r.yaml:7: llms.1.lengths: lengths: give either"),
        ("source: s, cv", "source: t, cv", "r.yaml:7: llms.1.source: no source 't'"),
        ("name: code", "name: chat", "r.yaml:7: llms.1.name: 'chat' is listed twice"),
        ("group: a", "group: A", "r.yaml:6: llms.0.group: the source has no 'A'"),
        ("span: 1m\ns", "span: 2m\ns", "r.yaml:6: llms.0.source: 'chat' plays its"),
        ("epoch: 30s", "epoch: 25s", "r.yaml:8: history.span: must be a whole number"),
        ("seed: 3", "insert: [{llm: chad, at: 0, duration: 1, requests: 1}]",
         "r.yaml:1: insert.0.llm: no LLM 'chad' (hint: did you mean 'chat'?)"),
        ("seed: 3", "insert: [{llm: chat, at: 55, duration: 9, requests: 1}]",
         "r.yaml:1: insert.0.at: the burst must end within the span"),
        ("seed: 3", "popularity: {alpha: 1, rate_rps: 1}", "r.yaml:6: llms.0: popularity"),
        ("seed: 3", "popularity: {rate_rps: 1}", "r.yaml:1: popularity: of no use"),
        ("epoch: 30s", "epoch: 30s, decode: -1", "r.yaml:8: history.decode: must be at"),
        ("seed: 3", "{", "r.yaml"),
    ],
)  # fmt: skip
def test_faults_of_a_recipe_are_one_line(folder, plan, old, new, expected):
    """File, line, field, what is wrong; exit code 2, nothing written."""
    assert old in FILE
    Path("r.yaml").write_text(FILE.replace(old, new))
    code, out, err = plan("trace compose r.yaml one.csv")
    assert code == 2
    assert out == ""
    assert expected in err.splitlines()[0]
    assert not Path("one.csv").exists()


def test_shipped_recipes(tmp_path, plan):
    """WarmServe's runs with what ships: floors of 18,000 shares; the other one says what
    it needs."""
    code, out, _ = plan("trace compose sample:warmserve", tmp_path / "w.csv", "--json")
    assert code == 0
    made_of = json.loads(out)["llms"]
    assert [row["made"] for row in made_of] == [6464, 4571, 3732, 3232]
    trace = read_trace(tmp_path / "w.csv")
    assert trace.input_tokens.max() <= 1024
    assert trace.output_tokens.min() >= 3
    assert read_demand(tmp_path / "w.history.csv").num_epochs == 7
    code, _, err = plan("trace compose sample:twelve-llms", tmp_path / "t.csv")
    assert code == 2
    assert "--source small=PATH" in err
    with pytest.raises(InvalidInput, match="did you mean 'warmserve'"):
        recipe_path("warmserv")


def test_the_guide_shows_a_recipe_that_reads(tmp_path):
    """The YAML in docs/traces.md is a recipe without faults, of three LLMs."""
    guide = (Path(__file__).parents[1] / "docs" / "traces.md").read_text("utf-8")
    (tmp_path / "r.yaml").write_text(guide.split("```yaml\n")[1].split("```")[0])
    assert wanted(load_recipe(tmp_path / "r.yaml")) == (216_000, 43_200, None)


def test_twelve_llms_of_servegen():
    """With the data at hand the recipe makes what it asks, whole days of history."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data/servegen")
    found = load_recipe(recipe_path("twelve-llms"))
    sources = {name: read_source(SHARED / file) for name, file in found.sources.items()}
    composed = compose(found, sources)
    assert [row.made for row in composed.counts] == list(wanted(found))
    assert composed.history is not None
    assert composed.history.num_epochs == 2 * 288
    again = compose(replace(found, history=None), sources)
    assert np.array_equal(again.trace.arrival_s, composed.trace.arrival_s)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_renewals_have_rate_and_cv(cv):
    """20,000 expected: the number within 5 standard deviations (cv * sqrt(n)), the CV
    within 10 %; the first moments are as likely as others."""
    moments = renewals(20_000.0, cv, np.random.default_rng(5))
    assert abs(len(moments) - 20_000) <= 5 * cv * np.sqrt(20_000)
    assert cv_of(moments) == pytest.approx(cv, rel=0.1)
    rng = np.random.default_rng(6)
    early = sum(len(renewals(1.0, cv, rng)) for _ in range(4000))
    assert early == pytest.approx(4000, rel=0.15)


def test_spread_is_exact_and_turned():
    """Always as many as asked, within [0, 1), also none and one."""
    rng = np.random.default_rng(0)
    assert [len(spread(n, 5.0, rng)) for n in (0, 1, 100)] == [0, 1, 100]
    firsts = [spread(1, 5.0, rng)[0] for _ in range(1000)]
    assert np.mean(firsts) == pytest.approx(0.5, abs=0.05)


def test_diurnal_rates():
    """Peak ratio 4, mean 1/s: the hour around noon has 1.6/s, that at midnight 0.4/s,
    the day 86,400 requests."""
    moments = daily_moments(rate_rps=1, span_s=86_400, cv=1, peak_ratio=4, seed=1)
    noon = ((moments >= 41_400) & (moments < 45_000)).sum() / 3600
    night = ((moments < 1800) | (moments >= 84_600)).sum() / 3600
    assert noon == pytest.approx(1.6, rel=0.1)
    assert night == pytest.approx(0.4, rel=0.15)
    assert len(moments) == pytest.approx(86_400, rel=0.03)


def test_token_distributions():
    """Fixed: always the same. Lognormal: the stated mean and CV within 5 % on 200,000."""
    rng = np.random.default_rng(2)
    assert set(parse_tokens("512").draw(5, rng)) == {512}
    drawn = parse_tokens("lognormal:800,1.5").draw(200_000, rng)
    assert drawn.mean() == pytest.approx(800, rel=0.05)
    assert drawn.std() / drawn.mean() == pytest.approx(1.5, rel=0.05)
    for wrong in ("x", "0", "lognormal:5", "1.2.3", "lognormal:-1,2"):
        with pytest.raises(InvalidInput, match="is not a number of tokens"):
            parse_tokens(wrong)


def test_synth_on_the_command_line(tmp_path, plan):
    """Same options, same bytes; the JSON says what was asked and what came."""
    options = "--llm chat --rate 2 --span 30m --arrivals gamma --cv 2 --seed 9"
    options += " --input-tokens 64 --output-tokens lognormal:32,1"
    code, out, _ = plan("trace synth", tmp_path / "a.csv.gz", options, "--json")
    assert code == 0
    said = json.loads(out)
    trace = read_trace(tmp_path / "a.csv.gz")
    assert said["requests"] == len(trace)
    assert said["asked"]["cv"] == 2
    assert set(trace.input_tokens) == {64}
    assert trace.span_s < 1800
    plan("trace synth", tmp_path / "b.csv.gz", options)
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--rate 1 --span 1h --arrivals gamma", "gamma needs --cv"),
        ("--rate 1 --span 1h --cv 2", "--cv goes with"),
        ("--rate 1 --span 1h --peak-ratio 2", "--peak-ratio goes with"),
        ("--rate 1 --span 1moon", "--span: '1moon' is not a quantity"),
        ("--rate 1 --span 0s", "must be positive"),
        ("--rate 1 --span nan", "must be positive"),
        ("--rate 1 --span 1h --seed -1", "seed at least 0"),
        ("--rate 1 --span 1h --input-tokens many", "--input-tokens: 'many' is not"),
        ("--rate 1e9 --span 30d", "are more than"),
        ("--rate 0 --span 1h", "0.0 is not in the range"),
    ],
)
def test_faults_of_synth_are_one_line(tmp_path, plan, options, expected):
    """Exit code 2 and what to do, nothing written."""
    out = tmp_path / "a.csv"
    code, _, err = plan("trace synth", out, "--llm chat", options)
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_synth_of_almost_nothing():
    """A rate so low that no request comes is an empty trace, not an error."""
    one = Tokens(mean=1)
    none = synth("a", rate_rps=1e-9, span_s=1, input_tokens=one, output_tokens=one)
    assert len(none) == 0
