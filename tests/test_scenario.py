"""Scenario files: units, defaults, and one-line errors with file, line, field, hint."""

from __future__ import annotations

import pytest

from foreserve.models.errors import InvalidInput
from foreserve.models.lengths import Lengths
from foreserve.models.quantities import parse_bytes, parse_bytes_per_s, parse_seconds
from foreserve.planner.fleet import build_fleet
from foreserve.planner.scenario import load_scenario, parse_scenario
from foreserve.planner.scenarios import scenario_path

GOOD = """\
cluster:
  nodes:
    - {name: n0, gpu: h100, gpus: 4, host_ram: 1TiB}
models:
  - {name: chat, llm: llama-3.1-8b}
"""


def test_units():
    """1.5 GiB is 1.5 * 2^30 bytes, 5m is 300 s; numbers pass through."""
    assert parse_bytes("1.5GiB") == 1610612736
    assert parse_bytes("2TB") == 2 * 10**12
    assert parse_bytes_per_s("8GB/s") == 8e9
    assert parse_seconds("500ms") == 0.5
    assert parse_seconds("5m") == 300.0
    assert parse_seconds("7d") == 604800
    assert parse_seconds(7) == 7
    with pytest.raises(InvalidInput, match="not a quantity"):
        parse_seconds("5 parsecs")


@pytest.mark.parametrize("name", ["init", "fleet-day", "azure-2023"])
def test_shipped_scenarios_are_valid(name):
    """What ships must read, and every LLM in it must fit somewhere."""
    scenario = load_scenario(scenario_path(name))
    lengths = {llm.name: Lengths.fixed(1000.0, 200.0) for llm in scenario.models}
    fleet = build_fleet(scenario, lengths)
    assert {o.llm for o in fleet.options} == {llm.name for llm in scenario.models}


def test_flat_file_and_envelope_are_the_same():
    """Only the spec keys, or the whole envelope: one meaning."""
    wrapped = "apiVersion: foreserve/v1alpha1\nkind: Scenario\nspec:\n" + "".join(
        f"  {line}\n" for line in GOOD.splitlines()
    )
    assert parse_scenario(wrapped) == parse_scenario(GOOD)


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("llm: llama-3.1-8b", "llm: llama-3.1-8c", None, "did you mean"),
        ("gpu: h100", "gpu: h1000", None, "did you mean 'h100'"),
        ("name: chat,", "name: chat, wieght: 2,", 5, "did you mean 'weight'"),
        ("1TiB", "1 parsec", 3, "not a quantity"),
        ("models:", "modles:", 4, "did you mean 'models'"),
        ("llm: llama-3.1-8b", "llm: llama-3.1-8b, tp: [8]", None, "fits no node"),
        ("llm: llama-3.1-8b", "llm: llama-3.1-8b, tp: [3]", None, "tp [3]"),
        ("llm: llama-3.1-8b", "llm: llama-3.1-8b, nodes: [n9]", None, "unknown node"),
        ("host_ram: 1TiB}", "host_ram: 1TiB", None, "not valid YAML"),
        ("models:", "cluster: {}\nmodels:", 4, "duplicate key"),
        (
            "host_ram: 1TiB}",
            "host_ram: 1TiB}\n    - {name: n0, gpu: h100, gpus: 2}",
            None,
            "duplicate GPU n0/0",
        ),
        (GOOD, "", None, "empty file"),
        (GOOD, "- 1\n", None, "mapping"),
    ],
)
def test_one_line_errors(old, new, line, expected):
    """Each fault says where it is and what to do."""
    with pytest.raises(InvalidInput) as caught:
        parse_scenario(GOOD.replace(old, new, 1), "s.yaml")
    messages = [str(caught.value), *map(str, caught.value.also)]
    assert any(expected in message for message in messages), messages
    assert all(message.startswith("s.yaml") for message in messages)
    assert not any("\n" in message for message in messages)
    if line is not None:
        assert caught.value.line == line


def test_several_faults_come_in_one_pass():
    """The user fixes a file once, not once per fault."""
    text = GOOD.replace("gpus: 4", "gpus: four").replace("name: chat", "nmae: chat")
    with pytest.raises(InvalidInput) as caught:
        parse_scenario(text, "s.yaml")
    assert len(caught.value.also) >= 2


def test_an_llm_that_fits_nowhere_says_why():
    """70B on one 24 GiB GPU: the message carries both sizes."""
    text = GOOD.replace("h100, gpus: 4", "a10g, gpus: 1").replace(
        "llama-3.1-8b", "llama-2-70b"
    )
    scenario = parse_scenario(text.replace("llama-2-70b", "llama-2-70b, tp: [1]"))
    with pytest.raises(InvalidInput, match=r"128\.\d+ GiB .* 20\.\d+|fits nowhere"):
        build_fleet(scenario, {"chat": Lengths.fixed(1000.0, 200.0)})


RUNTIME = """\
runtime:
  host_cache: none
  process_start: 10s
  process_pool: 0
  load_share_beside_serving: 0.5
  slowdown_beside_loading: 0.1
"""


def test_how_loads_run_comes_from_the_runtime():
    """16.06 GB: 0.3 s from host memory; without a cache 5.6 s from storage of 3 GB/s at
    95 %, and 10 s more for the process where none is kept ready."""
    lengths = {"chat": Lengths.fixed(1000.0, 200.0)}
    found = {}
    for name, text in (
        ("cached", GOOD),
        ("stored", GOOD + RUNTIME),
        ("ready", GOOD + RUNTIME.replace("pool: 0", "pool: 1")),
    ):
        fleet = build_fleet(parse_scenario(text), lengths)
        found[name] = next(o for o in fleet.options if o.tp == 1)
    cached, stored, ready = (found[name] for name in ("cached", "stored", "ready"))
    assert cached.load_s == cached.copy_s == pytest.approx(16.06e9 / 54.4e9, rel=1e-3)
    assert ready.load_s == pytest.approx(16.06e9 / (0.95 * 3e9), rel=1e-3)
    assert (stored.load_s, stored.start_s) == (10.0 + ready.load_s, 10.0)
    assert (stored.copy_s, stored.weight_bytes) == (cached.copy_s, cached.weight_bytes)
    rules = fleet.loading
    assert (rules.host_cache, rules.process_pool) == ("none", 1)
    assert rules.share_beside_serving == 0.5
    assert rules.slowdown_beside_loading == 0.1


def test_a_switch_is_part_of_its_node():
    """`host_link` of a node; none is no limit; zero is an error."""
    for written, rate in (("", None), (", host_link: 64GB/s", 64e9)):
        text = GOOD.replace("host_ram: 1TiB", f"host_ram: 1TiB{written}")
        (node,) = parse_scenario(text).cluster.cluster().nodes
        assert node.host_link_bytes_per_s == rate
    with pytest.raises(InvalidInput, match="host_link must be positive"):
        parse_scenario(GOOD.replace("1TiB", "1TiB, host_link: 0"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("load_share_beside_serving", "0"),
        ("slowdown_beside_loading", "-0.1"),
        ("process_start", "-1"),
    ],
)
def test_rules_of_loads_that_cannot_be(key, value):
    """Named by the field they are in."""
    with pytest.raises(InvalidInput, match=f"runtime: .*{key}"):
        parse_scenario(GOOD + f"runtime: {{{key}: {value}}}\n")
