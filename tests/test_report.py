"""What report, summary and tables show, on plans that can be checked by hand."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Residency, Run
from foreserve.models.placement import Placement, Replica
from foreserve.models.plan import LlmDemand, Plan
from foreserve.planner.display import (
    clock,
    number,
    percent,
    seconds,
    shorten,
    time_ticks,
)
from foreserve.planner.facts import course, load_fits, plan_facts, predicted
from foreserve.planner.picture import ledger_bars
from foreserve.planner.report import write_report
from foreserve.planner.residency import planned_residency, residency_map
from foreserve.planner.summary import run_summary, summary
from foreserve.planner.tables import outcome_row, render
from tests.build import cluster, fleet, gpu, option, small_plan
from tests.made_up import EpochSolve, made_up_plan, made_up_run

HOSTILE = "<script>alert('1')</script>\"&$x$_{é🚀}"


@pytest.fixture(scope="module")
def day() -> tuple[Plan, tuple[EpochSolve, ...], tuple[Run, ...]]:
    """Twelve LLMs on eight GPUs over 48 epochs, run under two policies."""
    plan, solves = made_up_plan()
    runs = (made_up_run(plan, "planned"), made_up_run(plan, "reactive", 3, slow=1.6))
    return plan, solves, runs


def page(
    folder: Path, plan: Plan, solves: Any = (), runs: Any = (), **changes: Any
) -> str:
    values = {"title": "A day", "command": "plan demo"} | changes
    path = folder / "report.html"
    write_report(path, plan=plan, solves=solves, runs=runs, **values)
    return path.read_text(encoding="utf-8")


def words(html: str) -> str:
    """The page as text, each run of blanks one space."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S)
    return " ".join(text.split())


def printed(parts: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=False, no_color=True)
    for part in parts:
        console.print(part)
    return file.getvalue()


class Outline(HTMLParser):
    """Collects what a page refers to and what it names."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value or "")


def test_the_report_fetches_nothing(tmp_path: Path, day: Any) -> None:
    """No link leaves the page, no script runs, the policy forbids both, and every
    reference inside the page finds its one target."""
    html = page(tmp_path, *day)
    outline = Outline()
    outline.feed(html)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src" in html
    assert not {"script", "link", "iframe", "img", "object"} & set(outline.tags)
    assert all(link.startswith("#") for link in outline.links)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    targets = re.findall(r"url\(\s*['\"]?(.)([\w-]*)", html)
    assert targets
    assert {first for first, _ in targets} == {"#"}
    twice = [name for name, count in Counter(outline.ids).items() if count > 1]
    assert not twice
    wanted = {name for _, name in targets} | {link[1:] for link in outline.links}
    assert wanted <= set(outline.ids)


def test_the_plan_is_stated_in_numbers_summed_by_hand(tmp_path: Path) -> None:
    """Two epochs of cost 5 and bound 4 (6 without WARM): 10, 8, gap 2/10, at stake 2/4;
    one GPU, then two, for 5 minutes at 3.60 dollars: 0.25 GPU-hours, 0.90 dollars."""
    facts = plan_facts(small_plan())
    assert (facts.objective, facts.bound, facts.gap) == (10, 8, 0.2)
    assert facts.gap_at_stake == 0.5
    assert facts.terms == {"O1": 4.0, "O5": 6.0}
    assert facts.gpu_hours == pytest.approx(0.25)
    assert (facts.used, facts.active, facts.warm) == ((1, 2), (1, 1), (0, 1))
    assert (facts.changes, facts.steps["load"]) == (1, 1)
    text = words(page(tmp_path, small_plan()))
    assert "Objective 10 weighted seconds; bound 8" in text
    assert "Gap 20 % 50 % of the value at stake" in text
    assert "GPU-hours 0.250 $0.90 as planned" in text
    assert (
        "2 LLMs on 2 GPUs of 1 node, planned in 2 epochs of 5 min: 1 replica ACTIVE"
        in text
    )
    assert "Unserved demand (O1) 4 40 %" in text
    assert "GPU-hours (O5) 6 60 %" in text
    assert "TTFT, median (plan: mean) 100 ms ± 40 %" in text


def test_every_section_shows_its_numbers(tmp_path: Path, day: Any) -> None:
    """With solves and two runs no section is empty, and each states its own figures."""
    plan, solves, runs = day
    text = words(page(tmp_path, plan, solves, runs))
    total = runs[0].outcome.total
    assert f"{percent(total.slo_attainment, 2)} planned, simulated" in text
    assert f"P99 TTFT {seconds(total.ttft.p99_s)}" in text
    assert "planned, simulated reactive, simulated" in text
    worst = max(range(len(solves)), key=lambda i: solves[i].wall_s)
    assert f"the slowest (epoch {worst}) {seconds(solves[worst].wall_s)}" in text
    fit = load_fits(plan, runs[0])[0]
    errors = f"{number(fit.peak_error)} {number(fit.last_value_error)}"
    assert f"{fit.llm} {errors} {percent(fit.above)}" in text
    own = runs[1].outcome.by_llm[fit.llm]
    assert f"reactive {own.requests:,}" in text
    assert "llama-3.1-8b h100 1 17.0 GiB 0.0 GiB 24.0 GiB 32 5.71" in text
    assert "cd" * 32 in text
    assert "milp (highspy 1.13.1)" in text
    assert "Simulated: planned" in text
    assert "Simulated: reactive" in text


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, day: Any) -> None:
    """Nothing in the page depends on when or how often it is written."""
    assert page(tmp_path, *day) == page(tmp_path, *day)


def test_matplotlib_is_loaded_only_to_draw() -> None:
    """A solve that writes no report does not wait for matplotlib to load."""
    code = "import sys, foreserve.planner.report, foreserve.planner.summary\n"
    code += "raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    """LLM, policy, title, command and inputs are text wherever they appear."""
    plan, solves = made_up_plan(num_llms=3, nodes=1, epochs=3)

    def renamed(name: str) -> str:
        return f"{name}{HOSTILE}"

    plan = replace(
        plan,
        fleet=replace(
            plan.fleet,
            llms=tuple(replace(x, name=renamed(x.name)) for x in plan.fleet.llms),
            options=tuple(replace(x, llm=renamed(x.llm)) for x in plan.fleet.options),
        ),
        epochs=tuple(
            replace(
                epoch,
                demand=tuple(replace(x, llm=renamed(x.llm)) for x in epoch.demand),
                placement=Placement(
                    replicas=tuple(
                        replace(x, llm=renamed(x.llm)) for x in epoch.placement.replicas
                    )
                ),
            )
            for epoch in plan.epochs
        ),
        inputs={HOSTILE: "00"},
    )
    runs = [made_up_run(plan, HOSTILE)]
    html = page(tmp_path, plan, solves, runs, title=HOSTILE, command=HOSTILE)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    outline = Outline()
    outline.feed(html)
    assert outline.tags["script"] == 0
    assert HOSTILE in printed(summary(plan, solves, runs)).replace("\n", "")


def test_a_plan_alone_says_what_is_missing(tmp_path: Path) -> None:
    """Without solves, runs, forecast and certificate the page still stands."""
    bare = replace(
        small_plan(),
        epochs=tuple(
            replace(epoch, demand=(), certificate=None) for epoch in small_plan().epochs
        ),
    )
    text = words(page(tmp_path, bare, command=None))
    assert "This plan carries no certificate" in text
    assert "The plan carries no forecast" in text
    assert "No run yet" in text
    assert "Solve times are not part of a plan file" in text
    assert not re.search(r"\bnan\b", text, re.I)
    assert "no certificate" in printed(summary(bare, (), ()))


def test_the_course_of_a_run_by_hand(day: Any) -> None:
    """One request a bin waits 1, 2, 3 ... s: its P99 is that; the load is the sum over
    LLMs, and a bin without requests has no delay."""
    plan, _, runs = day
    run = runs[0]
    bins = run.mean_load.shape[1]
    at = run.outcome.start_s + run.load_bin_s * (np.arange(bins - 1) + 0.5)
    wait_s = np.arange(1.0, bins)
    single = replace(
        run,
        llm=np.zeros(bins - 1, np.int32),
        arrival_s=at,
        first_token_s=at + wait_s,
        finish_s=at + wait_s,
        left_s=at + wait_s,
        output_tokens=np.ones(bins - 1, np.int64),
    )
    edges_s, load, p99_s = course(single)
    assert (edges_s[0], edges_s[-1]) == (plan.start_s, plan.end_s)
    assert len(edges_s) == bins + 1
    np.testing.assert_allclose(load, run.mean_load.sum(axis=0))
    np.testing.assert_allclose(p99_s[:-1], wait_s)
    assert np.isnan(p99_s[-1])


def test_unfinished_requests_count_and_leave_no_holes(tmp_path: Path, day: Any) -> None:
    """Requests without a first token, even all of them, are no error and no NaN."""
    plan, _, (run, _) = day
    lost = np.full_like(run.first_token_s, np.nan)
    nothing = replace(run, first_token_s=lost, finish_s=lost)
    some = replace(run, first_token_s=np.where(run.llm == 0, np.nan, run.first_token_s))
    for runs in ([nothing], [some, nothing]):
        text = words(page(tmp_path, plan, (), runs))
        assert not re.search(r"\bnan\b", text, re.I)
        assert "What each LLM's users got" in text


@pytest.mark.slow
def test_the_largest_report_stays_below_5_mb(tmp_path: Path) -> None:
    """64 GPUs and 288 epochs where every GPU changes its ACTIVE and its three WARM
    replicas in every epoch, planned and in two runs."""
    names = [f"llm-{i:02}" for i in range(16)]
    kind = fleet(*map(option, names), on=cluster(gpus=8, nodes=8, memory_bytes=200))
    first = small_plan().epochs[0]
    epochs = []
    for index in range(288):
        replicas = [
            Replica(
                llm=names[(4 * index + 5 * place + role) % 16],
                gpus=(where,),
                state="WARM" if role else "ACTIVE",
            )
            for place, where in enumerate(kind.cluster.gpus)
            for role in range(4)
        ]
        epochs.append(
            replace(
                first,
                start_s=300.0 * index,
                end_s=300.0 * (index + 1),
                placement=Placement(replicas=tuple(replicas)),
                demand=tuple(
                    LlmDemand(
                        llm=name,
                        rate_rps=1.0,
                        mean_load=2.0 + index % 7,
                        peak_load=4.0 + index % 7,
                        peak_high=6.0 + index % 5,
                    )
                    for name in names
                ),
            )
        )
    plan = replace(small_plan(), fleet=kind, epochs=tuple(epochs))
    runs = [made_up_run(plan, "planned"), made_up_run(plan, "reactive")]
    html = page(tmp_path, plan, (), runs)
    assert len(html.encode()) <= 5_000_000
    assert html.count("<title>") < 9_200


def test_unchanged_replicas_are_one_stretch() -> None:
    """a is ACTIVE through both epochs: one stretch of 600 s; b joins for the second."""
    stretches = planned_residency(small_plan())
    assert [(s.llm, s.phase, s.start_s, s.end_s) for s in stretches] == [
        ("a", "ACTIVE", 0.0, 600.0),
        ("b", "WARM", 300.0, 600.0),
    ]


def stay(llm: str, phase: Any, start_s: float, end_s: float, *gpus: int) -> Residency:
    where = tuple(map(gpu, gpus))
    return Residency(llm=llm, gpus=where, phase=phase, start_s=start_s, end_s=end_s)


def test_the_map_shows_who_shares_what() -> None:
    """A TP 2 replica alone is one box over two rows; two ACTIVE ones share a row in
    halves only while both are there; WARM ones are thin lanes that do not overlap."""
    kind = fleet(*(option(name, tp) for name in "abc" for tp in (1, 2)))
    picture = residency_map(
        kind,
        [
            stay("a", "ACTIVE", 0, 50, 0, 1),
            stay("a", "ACTIVE", 60, 100, 0),
            stay("b", "ACTIVE", 80, 100, 0),
            stay("b", "WARM", 0, 100, 1),
            stay("c", "WARM", 20, 100, 1),
        ],
        0,
        100,
        100,
    )
    row = picture.lines[0]
    wide, thin = picture.layers
    *rest, both = sorted(wide.boxes, key=lambda box: (box.width > 500, box.x, box.y))
    assert both.height == pytest.approx(picture.lines[1].y + row.height - row.y)
    assert both.width == pytest.approx(row.width / 2)
    heights = [(box.style, box.height / row.height) for box in rest]
    assert heights == [("a0", 1.0), ("a0", 0.5), ("a1", 0.5)]
    halves = rest[1:]
    assert halves[0].y + halves[0].height == pytest.approx(halves[1].y)
    below, above = sorted(thin.boxes, key=lambda box: -box.y)
    assert (below.style, above.style) == ("w1", "w2")
    assert above.y + above.height == pytest.approx(below.y)
    assert above.height < row.height / 3
    assert "b: WARM on n0/1 (TP 1)\n0:00 to 0:01:40 (1.7 min)" in below.tip


def test_boxes_beyond_the_limit_keep_their_place_but_no_tip() -> None:
    """With one tip allowed the larger of two boxes has it, the other joins a path."""
    kind = fleet(option("a"), option("b"))
    stretches = [stay("a", "ACTIVE", 0, 70, 0), stay("b", "ACTIVE", 70, 100, 0)]
    layer = residency_map(kind, stretches, 0, 100, 1).layers[0]
    assert [box.style for box in layer.boxes] == ["a0"]
    (other,) = layer.merged
    assert (other.style, other.height) == ("a1", 42.0)
    assert other.path == "m860 25h323.5"


def test_loads_are_visible_and_activation_counts_as_active() -> None:
    """A load of 0.1 % of the span is drawn two units wide, one of 800 only one unit;
    ACTIVATING joins ACTIVE."""
    kind = fleet(option("a"))
    stretches = [
        stay("a", "LOADING", 0, 0.1, 0),
        stay("a", "ACTIVATING", 10, 11, 0),
        stay("a", "ACTIVE", 11, 100, 0),
    ]
    wide, thin = residency_map(kind, stretches, 0, 100, 10).layers
    assert [box.width for box in thin.boxes] == [2.0]
    many = [stay("a", "LOADING", i / 10, i / 10 + 0.01, 0) for i in range(800)]
    thin = residency_map(kind, many, 0, 100, 10).layers[1]
    assert [box.width for box in thin.boxes] == [1.0] * 10
    assert [box.style for box in wide.boxes] == ["a0"]
    assert wide.boxes[0].width == pytest.approx(0.9 * 1080)


def test_the_ledger_fills_each_gpu() -> None:
    """100 bytes: a ACTIVE takes 30 + 20, b WARM 30, 20 are free; columns are full."""
    placement = small_plan().epochs[1].placement
    picture = ledger_bars(small_plan().fleet, placement)
    tips = [box.tip for box in picture.layers[0].boxes]
    assert [tip.split(" 0.0")[0] for tip in tips] == [
        "n0/0: a, weights",
        "n0/0: a, kv",
        "n0/1: b, weights",
    ]
    shares = [box.height / 270 for box in (*picture.layers[0].boxes, *picture.lines)]
    assert shares == pytest.approx([0.3, 0.2, 0.3, 0.5, 0.0, 0.7, 0.0])


def test_forecast_errors_are_means_over_known_epochs(day: Any) -> None:
    """Peaks forecast 3, 3, seen 4 and 9: errors 1 and 6; last value misses by 5; the
    range up to 5 is passed once. An LLM without forecast has no error."""
    run = replace(
        day[2][0],
        llms=("a", "b"),
        load_bin_s=150.0,
        mean_load=np.array([[1.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]),
        peak_load=np.array([[2.0, 4.0, 9.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),
    )
    known, unknown = load_fits(small_plan(), run)
    assert known.actual_mean.tolist() == [2.0, 2.0]
    assert known.actual_peak.tolist() == [4.0, 9.0]
    assert known.peak_error == 3.5
    assert known.last_value_error == 5.0
    assert known.missed.tolist() == [False, True]
    assert known.above == 0.5
    assert np.isnan(unknown.peak_error)


def test_predictions_weigh_options_by_planned_requests() -> None:
    """Three quarters of the demand at TTFT 0.1 s and one quarter at 0.5 s: 0.2 s mean,
    0.5 s worst; the fifth that is left unplaced weighs nothing."""
    plan = small_plan()
    options = (option("a", 1, ttft_s=0.1), option("a", 2, ttft_s=0.5))
    kind = fleet(*options, on=cluster(gpus=4))
    replicas = (
        Replica(llm="a", gpus=(gpu(0),), state="ACTIVE", traffic_share=0.6),
        Replica(llm="a", gpus=(gpu(2), gpu(3)), state="ACTIVE", traffic_share=0.2),
    )
    epoch = replace(plan.epochs[0], placement=Placement(replicas=replicas))
    said = predicted(replace(plan, fleet=kind, epochs=(epoch,)))
    assert said.ttft_s == pytest.approx(0.2)
    assert said.worst_ttft_s == 0.5
    assert np.isnan(predicted(plan, "b").ttft_s)


def test_the_summary_fits_a_terminal_without_colour(day: Any) -> None:
    """100 columns, no escape codes, and the facts a solve must state."""
    plan, solves, runs = day
    for text in (
        printed(summary(plan, solves, runs)),
        printed(summary(plan, (), ())),
        printed(run_summary(plan, runs)),
    ):
        assert max(map(len, text.splitlines())) <= 100
        assert "\x1b" not in text
        assert "TTFT" in text
        # A plan alone promises times; attainment is what a run shows.
        assert ("SLO" in text) == ("simulated" in text)
    text = printed(summary(plan, solves, runs))
    facts = plan_facts(plan)
    assert f"{facts.optimal} of 48 epochs proven optimal" in text
    assert f"{number(facts.objective)} weighted seconds" in text
    assert f"{number(facts.bound)}, summed over the epochs" in text
    assert "milp (highspy 1.13.1), seed 1, 1 thread" in text
    assert "Expected cold starts (O2)" in text
    assert re.search(r"n1/2–3 +\S+ TP2 \(", text)


def test_rows_are_rendered_for_people_and_programs() -> None:
    """Missing and NaN cells are empty, pipes and commas do not break columns, and CSV
    and JSON keep every digit."""
    rows = [
        {"solver": "a|b", "gap": 0.123456, "n": 1},
        {"solver": "c,d", "gap": np.nan},
    ]
    assert render(rows, "md") == (
        "| solver |    gap |   n |\n"
        "| ------ | -----: | --: |\n"
        "| a\\|b   | 0.1235 |   1 |\n"
        "| c,d    |        |     |\n"
    )
    assert render(rows, "csv") == 'solver,gap,n\na|b,0.123456,1\n"c,d",,\n'
    assert json.loads(render(rows, "json")) == [
        {"solver": "a|b", "gap": 0.123456, "n": 1},
        {"solver": "c,d", "gap": None},
    ]
    assert [render([], fmt) for fmt in ("md", "csv", "json")] == ["", "", "[]\n"]
    with pytest.raises(InvalidInput, match="unknown table format 'pdf'"):
        render(rows, "pdf")


def test_a_run_is_a_flat_row(day: Any) -> None:
    """Every value of an outcome's row is a plain number or text, in one table."""
    rows = [outcome_row(run.outcome) for run in day[2]]
    assert [row["policy"] for row in rows] == ["planned", "reactive"]
    assert rows[0]["ttft_p99_s"] == day[2][0].outcome.total.ttft.p99_s
    assert len(json.loads(render(rows, "json"))) == 2


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (number(0.0), "0"),
        (number(0.1234), "0.123"),
        (number(32.000001), "32"),
        (number(12345.6), "12,346"),
        (number(None), "–"),
        (percent(0.0), "0 %"),
        (percent(0.00001), "< 0.1 %"),
        (percent(0.99999), "> 99.9 %"),
        (percent(0.123), "12.3 %"),
        (seconds(0.0042), "4.2 ms"),
        (seconds(1.5), "1.50 s"),
        (seconds(300), "5 min"),
        (seconds(9000), "2.5 h"),
        (clock(3661), "1:01:01"),
        (clock(86400), "24:00"),
        (shorten("abcdefgh", 5), "ab…gh"),
    ],
)
def test_numbers_read_as_a_person_would_write_them(shown: str, text: str) -> None:
    """Each in its unit, and never rounded to a certainty it is not."""
    assert shown == text


def test_time_ticks_are_round_and_few() -> None:
    """Four hours in at most nine ticks are half-hours; 50 s in 6 are tens."""
    assert time_ticks(0, 14400, 9) == [1800.0 * i for i in range(9)]
    assert time_ticks(100, 150, 6) == [100, 110, 120, 130, 140, 150]
