"""Differences of plans, and the verbs that tell of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from foreserve.models.codec import to_json
from foreserve.models.placement import Placement, Replica
from foreserve.models.plan import Epoch, Plan
from foreserve.planner.diff import diff_plans
from tests.build import cluster, fleet, gpu, option, small_plan
from tests.problems import problem
from tests.test_cli import SCENARIO, TRACE


def with_placements(plan: Plan, *placements: tuple[Replica, ...]) -> Plan:
    epochs = tuple(
        replace(epoch, placement=Placement(replicas=replicas))
        for epoch, replicas in zip(plan.epochs, placements, strict=True)
    )
    return replace(plan, epochs=epochs)


A0 = Replica(llm="a", gpus=(gpu(0),), state="ACTIVE", traffic_share=1.0)
A1 = Replica(llm="a", gpus=(gpu(1),), state="ACTIVE", traffic_share=1.0)
B1 = Replica(llm="b", gpus=(gpu(1),), state="WARM")


def test_a_plan_does_not_differ_from_itself():
    """No change, no step, and costs side by side."""
    found = diff_plans(small_plan(), small_plan())
    assert found.same
    assert [len(epoch.transition.steps) for epoch in found.epochs] == [0, 0]
    assert found.epochs[0].costs["total"] == (5.0, 5.0)


def test_each_kind_of_change_has_its_bytes_and_seconds():
    """First epoch: a moves to n0/1 (30 bytes, 2 s), b appears beside it. Second: b goes
    to ACTIVE, and a keeps 40 % of its traffic."""
    second = with_placements(
        small_plan(),
        (A1, B1),
        (replace(A0, traffic_share=0.4), replace(B1, state="ACTIVE")),
    )
    found = diff_plans(small_plan(), second)
    first, last = found.epochs
    assert not found.same
    told = [
        (c.kind, c.llm, c.gpus, c.was, c.now, c.moved_bytes, c.load_s)
        for c in first.changes
    ]
    assert told == [
        ("moves", "a", "n0/1", "ACTIVE on n0/0", "ACTIVE", 30, 2.0),
        ("appears", "b", "n0/1", "", "WARM", 30, 2.0),
    ]
    assert [(c.kind, c.llm, c.was, c.now) for c in last.changes] == [
        ("share", "a", "100% of the traffic", "40%"),
        ("state", "b", "WARM", "ACTIVE"),
    ]
    assert [s.action.kind for s in first.transition.steps].count("load") == 2
    assert [s.action.kind for s in last.transition.steps] == ["activate"]
    back = diff_plans(second, small_plan()).epochs[0]
    assert [(c.kind, c.llm) for c in back.changes] == [("moves", "a"), ("leaves", "b")]


def test_other_fleets_are_told_plainly():
    """A second node, a rule, another option, and an LLM that is no more."""
    first = small_plan()
    f = fleet(option("a", load_s=3.0), on=cluster(2, 2), min_active=1)
    second = with_placements(replace(first, fleet=f), (A0,), (A0,))
    told = diff_plans(first, second).fleet
    assert told == (
        "node n1 (2 g) is in the second only",
        "LLM b is in the first only",
        "LLM a: min_active 0 and 1",
        "LLM a: what its replicas take and give differs",
    )


def test_epochs_of_other_lengths_are_cut_at_all_their_borders():
    """Epochs of 300 s against one of 450 s: three stretches are compared, none beyond
    what both plans are for."""
    first = small_plan()
    long = Epoch(start_s=0.0, end_s=450.0, placement=first.epochs[0].placement)
    found = diff_plans(first, replace(first, epochs=(long,)))
    assert [(e.start_s, e.end_s) for e in found.epochs] == [
        (0.0, 300.0),
        (300.0, 450.0),
    ]
    assert [len(e.changes) for e in found.epochs] == [0, 1]
    assert len(found.spans) == 2
    assert found.epochs[0].costs["total"] == (5.0, None)


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """a.json and b.json, which differ, as files of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(to_json(small_plan()))
    other = with_placements(small_plan(), (A1,), (A1, B1))
    (tmp_path / "b.json").write_text(to_json(other))
    return tmp_path


def test_verb_tells_people_and_programs(plan, plans):
    """Tables with the move, its bytes and seconds; JSON with the steps; exit code 1 only
    if asked for and different."""
    code, out, _ = plan("diff a.json b.json --steps")
    assert code == 0
    assert "ACTIVE on n0/0 → ACTIVE" in out
    assert "activate" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = plan("diff a.json b.json --json --exit-code")
    assert code == 1
    found = json.loads(out)
    assert not found["same"]
    kinds = [step["kind"] for step in found["epochs"][0]["transition"]["steps"]]
    assert kinds == ["load", "activate", "demote", "drop"]
    assert plan("diff a.json a.json --exit-code")[0] == 0


def test_a_broken_plan_is_refused(plan, plans):
    """A GPU that the cluster does not have: the referee's words and exit code 2, not a
    table."""
    broken = with_placements(small_plan(), (A0,), (replace(B1, gpus=(gpu(5),)),))
    (plans / "c.json").write_text(to_json(broken))
    for command in ("diff a.json c.json", "explain c.json"):
        code, _, err = plan(command)
        assert code == 2
        assert "the cluster has no GPU n0/5" in err


@pytest.fixture
def solved(tmp_path, monkeypatch, plan):
    """A small trace, its scenario, and its plan as p.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SCENARIO)
    (tmp_path / "t.csv").write_text(TRACE)
    code, _, _ = plan(
        "solve --trace t.csv --scenario s.yaml -o p.json --write-model m.mps --epoch 1",
        "--quiet",
    )
    assert code == 0
    return tmp_path


def test_explain_finds_the_problem_again(plan, solved):
    """With trace and scenario: costs by LLM that add up to the certificate's, the price of
    a replica elsewhere, what more GPUs are worth. Another trace is refused."""
    inputs = "--trace t.csv --scenario s.yaml"
    code, out, _ = plan(
        f"explain p.json --epoch 1 {inputs} --llm chat --block n0/1 --more --json"
    )
    assert code == 0
    found = json.loads(out)
    code, out, _ = plan(f"explain p.json --epoch 1 {inputs} --json")
    by_llm = json.loads(out)["terms_by_llm"]
    for label, value in found["terms"].items():
        assert sum(t[label] for t in by_llm.values()) == pytest.approx(value, abs=1e-9)
    assert found["why_not"]["replica"] == "chat@n0/1x1"
    assert [row["change"] for row in found["more"]] == [
        "one more h100 GPU",
        "one more h100 node of 2 GPUs",
    ]
    (solved / "u.csv").write_text(TRACE.replace(",200,", ",900,"))
    code, _, err = plan("explain p.json --trace u.csv --scenario s.yaml")
    assert code == 2
    assert "another trace or scenario" in err


def test_explain_of_a_plan_alone(plan, solved):
    """Limits and terms from the file, and a hint at what more there would be."""
    code, out, _ = plan("explain p.json --epoch 2")
    assert code == 0
    assert "memory (C1)" in out
    assert "--trace" in out
    assert max(map(len, out.splitlines())) <= 100
    assert plan("explain p.json --epoch 9")[0] == 2
    assert plan("explain p.json --block n0/0")[0] == 2


def test_written_model_is_of_the_epoch(solved):
    """m.mps has the choices of both LLMs."""
    text = (solved / "m.mps").read_text()
    assert "x(chat,n0.0,ACTIVE)" in text
    assert "x(code,n0.0_1,ACTIVE)" in text


def test_no_plan_tells_the_conflict(plan, solved):
    """Three floors on two GPUs: exit code 3, the rules, and what would help; the fixed
    TP of chat is no part of it."""
    bad = SCENARIO.replace("{name: chat,", "{name: chat, min_active: 2, tp: [1],")
    bad = bad.replace("{name: code,", "{name: code, min_active: 1,")
    (solved / "bad.yaml").write_text(bad)
    code, out, err = plan("solve --trace t.csv --scenario bad.yaml --json")
    assert code == 3
    assert json.loads(out)["conflict"]["rules"] == [
        "'chat' keeps min_active=2",
        "'code' keeps min_active=1",
    ]
    assert "would help: 'chat': min_active=1" in err


def test_explain_of_a_problem_without_a_plan(plan, tmp_path, monkeypatch):
    """A problem file: solved, and where that is impossible, why."""
    monkeypatch.chdir(tmp_path)
    p = problem(fleet(option("a"), min_active=3), [[0.5]])
    (tmp_path / "bad.json").write_text(to_json(p))
    code, out, _ = plan("explain bad.json --json")
    assert code == 3
    assert json.loads(out)["conflict"]["rules"] == ["'a' keeps min_active=3"]
    (tmp_path / "good.json").write_text(
        to_json(problem(fleet(option("a")), [[0.5, 0.5]]))
    )
    code, out, _ = plan("explain good.json --epoch 1 --json")
    assert code == 0
    assert json.loads(out)["terms"]["O1"] == 0
