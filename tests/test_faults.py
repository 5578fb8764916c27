"""Fault scripts, and what they do to a simulated cluster."""

from __future__ import annotations

import json

import pytest

from foreserve.models.errors import InvalidInput
from foreserve.models.faults import Fault, load_faults
from foreserve.models.placement import ReplicaId
from foreserve.planner.residency import residency_map
from foreserve.runtime.simulated.faults import Health
from tests.build import cluster, fleet, gpu, option
from tests.test_cli import SCENARIO, files, solved

__all__ = ["files", "solved"]

SCRIPT = """\
faults:
  - {at: 2h, kind: gpu-loss, target: n0/1, for: 10m}
  - {at: 30, kind: slow-node, target: n0, factor: 1.5, for: 1m}
  - {at: 30, kind: replica-crash, target: a@n0/0}
"""


def test_a_script_is_read_in_si(tmp_path):
    """Two hours are 7200 s; what has no `for` lasts for good."""
    path = tmp_path / "faults.yaml"
    path.write_text(SCRIPT)
    loss, slow, crash = load_faults(path, fleet(option("a")))
    assert (loss.at, loss.until_s) == (7200.0, 7800.0)
    assert (slow.factor, slow.until_s) == (1.5, 90.0)
    assert crash.until_s is None
    assert crash.where.hits(ReplicaId(llm="a", gpus=(gpu(0), gpu(1))))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("for: 10m", "fro: 10m", "2: faults.0.fro: unknown key 'fro' (hint: did you "),
        ("gpu-loss", "gpu-los", "2: faults.0.kind: input should be 'gpu-loss', "),
        ("2h", "2x", "2: faults.0.at: '2x' is not a quantity"),
        ("n0/1", "n0/7", "2: faults.0.target: the cluster has no GPU n0/7 (hint: n0/0"),
        ("n0/1", "n7/1", "2: faults.0.target: the cluster has no node 'n7'"),
        ("n0/1", "n0", "2: faults.0.target: a gpu-loss has no node as its target"),
        ("10m", "0", "2: faults.0.for: for must be positive"),
        ("factor: 1.5, ", "", "3: faults.1.factor: a slow-node needs a factor"),
        ("1.5", "0.5", "3: faults.1.factor: a factor below 1 is no fault"),
        ("a@n0/0", "aa@n0/0", "4: faults.2.target: the fleet has no LLM 'aa'"),
        ("a@n0/0", "a@n0", "4: faults.2.target: 'a@n0' is no node, GPU or replica"),
        ("faults:", "fault:", "1: fault: unknown key 'fault' (hint: did you mean"),
    ],
)
def test_faults_in_a_script_are_named_with_their_place(tmp_path, old, new, message):
    """One line each, with file, line, field, and what to write instead."""
    path = tmp_path / "faults.yaml"
    path.write_text(SCRIPT.replace(old, new, 1))
    with pytest.raises(InvalidInput) as error:
        load_faults(path, fleet(option("a")))
    assert str(error.value).startswith(f"{path}:{message}")


def test_targets_hit_what_lies_on_them():
    """A replica on n0/0 and n0/1: hit by its node, both GPUs, and its own name."""
    pair = ReplicaId(llm="a", gpus=(gpu(0), gpu(1)))
    hit = {
        target: Fault(at=0, kind="load-failure", target=target).where.hits(pair)
        for target in ("n0", "n1", "n0/0", "n0/1", "n0/2", "a@n0/0", "a@n0/1")
    }
    assert [target for target, yes in hit.items() if yes] == [
        "n0",
        "n0/0",
        "n0/1",
        "a@n0/0",
    ]
    for target, yes in (("a@n0/0x2", True), ("a@n0/0x1", False), ("b@n0/0", False)):
        where = Fault(at=0, kind="replica-crash", target=target).where
        assert where.hits(pair) is yes


def test_overlapping_faults_end_one_by_one():
    """n0/0 is lost with its GPU and with its node: it is back when both are; factors of
    1.5 and 2 make 3."""
    health = Health(cluster(gpus=2, nodes=2))
    one = Fault(at=0, kind="gpu-loss", target="n0/0", for_=9.0)
    node = Fault(at=0, kind="node-loss", target="n0", for_=5.0)
    health.begin(one)
    health.begin(node)
    assert health.lost_gpus == {gpu(0), gpu(1)}
    health.end(node)
    assert health.lost_gpus == {gpu(0)}
    health.end(one)
    assert health.lost_gpus == frozenset()
    for factor in (1.5, 2.0):
        health.begin(Fault(at=0, kind="slow-node", target="n1", factor=factor))
    assert (health.factor("n0"), health.factor("n1")) == (1.0, 3.0)


def test_load_failures_for_a_time_and_once():
    """Without `for` one load fails; with it, each that ends meanwhile."""
    health, key = Health(cluster()), ReplicaId(llm="a", gpus=(gpu(0),))
    health.begin(Fault(at=0, kind="load-failure", target="n0/0"))
    assert [health.load_fails(key) for _ in range(2)] == [True, False]
    lasting = Fault(at=0, kind="load-failure", target="a@n0/0", for_=5.0)
    health.begin(lasting)
    assert [health.load_fails(key) for _ in range(2)] == [True, True]
    assert not health.load_fails(ReplicaId(llm="b", gpus=(gpu(0),)))
    health.end(lasting)
    assert not health.load_fails(key)


def test_the_map_shows_faults_on_the_rows_they_hit():
    """100 s on two GPUs: n0/1 lost for the second half and the slow node lie under the
    replicas, a crash is a mark above; each tells what it is."""
    faults = (
        Fault(at=50.0, kind="gpu-loss", target="n0/1"),
        Fault(at=10.0, kind="slow-node", target="n0", for_=20.0, factor=1.5),
        Fault(at=30.0, kind="replica-crash", target="a@n0/0"),
        Fault(at=200.0, kind="node-loss", target="n0"),
    )
    picture = residency_map(fleet(option("a")), [], 0.0, 100.0, 10, faults)
    below, _, _, above = picture.layers
    first, second = picture.lines
    rows = [(box.style, box.y, box.width / first.width) for box in below.boxes]
    assert rows == [
        ("fault", second.y, pytest.approx(0.5)),
        ("slow", first.y, pytest.approx(0.2)),
        ("slow", second.y, pytest.approx(0.2)),
    ]
    (mark,) = above.boxes
    assert (mark.y, mark.width) == (first.y, 3.0)
    assert below.boxes[1].tip == (
        "slow-node of n0, 1.5 times as slow\nfrom 0:00:10 for 20.0 s"
    )


def test_simulate_with_faults(plan, files, solved):
    """n0/0 is lost for a minute: told in the outcome, the table, the report and the
    journal; with seeds in processes, too, and the same there."""
    (files / "f.yaml").write_text(
        "faults: [{at: 60s, kind: gpu-loss, target: n0/0, for: 1m}]"
    )
    args = f"simulate {solved / 'plan.json'} --trace t.csv --faults f.yaml"
    code, out, err = plan(args, "--json --report r.html --journal j.jsonl")
    assert (code, err) == (0, "")
    (outcome,) = json.loads(out)["outcomes"]
    assert outcome["faults"] == 1
    assert outcome["total"]["finished"] == outcome["total"]["requests"] == 400
    lines = [json.loads(line) for line in (files / "j.jsonl").read_text().splitlines()]
    (fault,) = [line for line in lines if line["event"] == "fault"]
    assert (fault["at_s"], fault["until_s"], fault["target"]) == (60.0, 120.0, "n0/0")
    assert outcome["restarted"] == fault["requests"]
    assert "gpu-loss of n0/0" in (files / "r.html").read_text()
    code, out, _ = plan(args)
    assert code == 0
    assert "Requests they restarted" in out
    code, out, _ = plan(args, "--json --seeds 2 --workers 2")
    assert code == 0
    assert json.loads(out)["seeds"][0]["outcomes"] == [outcome]


def test_simulate_loads_as_the_scenario_says(plan, files, solved):
    """The plan assumes all weights in host memory; a scenario without such a cache has
    every load read storage, and then serves later."""
    (files / "s.yaml").write_text(SCENARIO + "runtime: {host_cache: none}\n")
    args = f"simulate {solved / 'plan.json'} --trace t.csv --json"
    found = []
    for more in ("", "--scenario s.yaml"):
        code, out, err = plan(args, more)
        assert (code, err) == (0, "")
        found += json.loads(out)["outcomes"]
    cached, stored = found
    assert cached["storage_loads"] == 0
    assert stored["storage_loads"] == stored["loads"] > 0
    assert stored["total"]["ttft"]["p99_s"] > cached["total"]["ttft"]["p99_s"] + 1


def test_broken_fault_scripts_on_the_command_line(plan, files, solved):
    """One line, exit code 2, and what to write instead."""
    for text, expected in (
        ("faults: [{at: 60s, kind: gpu-loss, target: n0/5}]", "no GPU n0/5"),
        ("faults: [{at: 1m, kind: node-loss, target: n0, form: 1m}]", "mean 'for'?"),
        ("", "f.yaml: a list under the key `faults` is expected"),
    ):
        (files / "f.yaml").write_text(text)
        code, out, err = plan(
            f"simulate {solved / 'plan.json'} --trace t.csv --faults f.yaml"
        )
        assert (code, out) == (2, "")
        assert expected in err
        assert len(err.splitlines()) == 1
