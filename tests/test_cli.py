"""The command line as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from foreserve import cli
from foreserve.models.codec import load_plan, to_json
from tests.build import small_plan

SCENARIO = """\
epoch: 60s
cluster:
  nodes: [{name: n0, gpu: h100, gpus: 2}]
models:
  - {name: chat, llm: llama-3.1-8b}
  - {name: code, llm: qwen2.5-14b}
forecast: {method: last, scenarios: 4}
solver: {time_limit: 5s, gap: 0}
"""
TRACE = "arrival_s,llm,input_tokens,output_tokens\n" + "".join(
    f"{0.5 * i},{'chat' if i % 3 else 'code'},{200 + i},{20 + i % 7}\n"
    for i in range(400)
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a scenario and a trace of 200 s, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SCENARIO)
    (tmp_path / "t.csv").write_text(TRACE)
    return tmp_path


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A plan of the small trace, solved once by milp."""
    folder = tmp_path_factory.mktemp("solved")
    (folder / "s.yaml").write_text(SCENARIO)
    (folder / "t.csv").write_text(TRACE)
    with pytest.MonkeyPatch.context() as patch:
        argv = "plan solve --trace t.csv --scenario s.yaml --solver milp --quiet"
        patch.chdir(folder)
        patch.setattr(sys, "argv", [*argv.split(), "-o", "plan.json"])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        assert not exited.value.code
    return folder


def test_solve_states_its_certificate(plan, files):
    """JSON on stdout only: status, objective, bound, gap, files; all of them true."""
    code, out, err = plan(
        "solve --trace t.csv --scenario s.yaml --solver milp --json",
        "-o plan.json --report report.html",
    )
    assert code == 0
    assert err == ""
    stated = json.loads(out)
    assert stated["status"] == "optimal"
    assert stated["gap"] <= 1e-6
    assert stated["bound"] <= stated["objective"] + 1e-9
    written = load_plan("plan.json")
    assert written.objective == pytest.approx(stated["objective"])
    assert sum(stated["terms"].values()) == pytest.approx(stated["objective"])
    assert len(written.epochs) == 4
    assert "<svg" in (files / "report.html").read_text()


def test_solve_gives_the_same_bytes_twice(plan, files, solved):
    """Same inputs, seed, one thread, and limits that were not reached."""
    plan(
        *[
            "solve",
            "--trace",
            "t.csv",
            "--scenario",
            "s.yaml",
            "--solver",
            "milp",
            "-o",
            "p.json",
            "--quiet",
        ]
    )
    assert (files / "p.json").read_bytes() == (solved / "plan.json").read_bytes()


def test_summary_is_printed_for_people(plan, files):
    """Without --json: the certificate and where things go, within 100 columns."""
    code, out, _ = plan("solve --trace t.csv --scenario s.yaml --solver greedy")
    assert code == 0
    assert "bound" in out.lower()
    assert "chat" in out
    assert max(map(len, out.splitlines())) <= 100


def test_simulate_twice_is_identical(plan, solved):
    """Same seed, same bytes: the JSON on stdout and the journal; another seed differs."""
    outputs, journals = [], []
    for run, seed in enumerate((1, 1, 2)):
        journal = solved / f"j{run}.jsonl.gz"
        code, out, _ = plan(
            "simulate", solved / "plan.json", "--trace", solved / "t.csv",
            "--seed", seed, "--journal", journal, "--json",
        )  # fmt: skip
        assert code == 0
        outputs.append(out)
        journals.append(journal.read_bytes())
    assert outputs[0] == outputs[1]
    assert journals[0] == journals[1]
    assert gzip.decompress(journals[0]) != gzip.decompress(journals[2])
    outcome = json.loads(outputs[0])["outcomes"][0]
    assert outcome["total"]["requests"] == 400
    assert outcome["total"]["finished"] == 400


def test_simulate_compares_policies_on_equal_gpus(plan, solved):
    """Both numbers are printed; reactive has cold starts, the plan has fewer."""
    code, out, _ = plan(
        "simulate", solved / "plan.json", "--trace", solved / "t.csv",
        "--policy", "planned", "--policy", "reactive", "--json",
    )  # fmt: skip
    assert code == 0
    planned, reactive = json.loads(out)["outcomes"]
    assert (planned["policy"], reactive["policy"]) == ("planned", "reactive")
    assert planned["total"]["finished"] == reactive["total"]["finished"] == 400


def test_compare_writes_the_table_three_times(plan, files):
    """milp and cpsat agree, greedy is not better; md, csv and json are written."""
    code, out, _ = plan(
        "compare --trace t.csv --scenario s.yaml --output out",
        "--json",
    )
    assert code == 0
    rows = {row["solver"]: row for row in json.loads(out)["solvers"]}
    assert list(rows) == ["milp", "cpsat", "greedy"]
    assert {p.name for p in (files / "out").iterdir()} == {
        "compare.md",
        "compare.csv",
        "compare.json",
    }
    assert "milp" in (files / "out" / "compare.md").read_text()


def test_validate(plan, files, solved):
    """A good plan and a good scenario pass, with a trace too."""
    assert plan("validate", solved / "plan.json")[0] == 0
    assert plan("validate", "s.yaml", "--trace", "t.csv")[0] == 0
    code, out, _ = plan("validate", "s.yaml", "--json")
    assert code == 0
    assert json.loads(out)["valid"] is True


def test_init_then_validate(plan, files):
    """What `init` writes is valid, and is not overwritten without --force."""
    assert plan("init", "new.yaml")[0] == 0
    assert plan("validate", "new.yaml")[0] == 0
    code, _, err = plan("init", "new.yaml")
    assert code == 2
    assert "--force" in err


def test_catalog_and_trace_info(plan, files):
    """People's tables and machines' JSON."""
    assert "llama-3.1-8b" in plan("catalog", "list")[1]
    shown = json.loads(plan("catalog", "show", "h100", "--json")[1])
    assert shown["name"] == "h100"
    assert "source" in plan("catalog", "show", "llama-3.1-8b")[1]
    info = json.loads(plan("trace", "info", "t.csv", "--json")[1])
    assert info["requests"] == 400
    assert "chat" in plan("trace", "info", "t.csv")[1]


BROKEN = {
    "empty file": ("t.csv", "", "empty file"),
    "wrong column": ("t.csv", TRACE.replace("input_tokens", "in_tokens"), "column"),
    "NaN": ("t.csv", TRACE.replace(",200,", ",NaN,"), "t.csv:2"),
    "negative tokens": ("t.csv", TRACE.replace(",200,", ",-200,"), "t.csv:2"),
    "unsorted": ("t.csv", TRACE + "0.0,chat,1,1\n", "not sorted"),
    "unknown LLM": ("t.csv", TRACE.replace("code", "cood"), "'cood'"),
    "TP fits no node": (
        "s.yaml",
        SCENARIO.replace("llama-3.1-8b", "llama-3.1-8b, tp: [4]"),
        "fits no node",
    ),
    "duplicate GPU": (
        "s.yaml",
        SCENARIO.replace("gpus: 2}", "gpus: 2}, {name: n0, gpu: h100, gpus: 2}"),
        "duplicate GPU n0/0",
    ),
    "unknown key": ("s.yaml", SCENARIO.replace("epoch:", "epochs:"), "did you mean"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_inputs_of_solve(plan, files, case):
    """One line, exit code 2, no traceback, nothing written; also as JSON."""
    name, text, expected = BROKEN[case]
    (files / name).write_text(text)
    before = set(files.iterdir())
    args = "solve --trace t.csv --scenario s.yaml -o plan.json"
    code, out, err = plan(args, "--report r.html")
    assert code == 2
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert set(files.iterdir()) == before
    code, out, _ = plan(args, "--json")
    assert code == 2
    assert expected in json.loads(out)["error"]["message"]


def test_broken_plans(plan, files):
    """Truncated, newer schema, broken by the referee, or for another cluster."""
    text = to_json(small_plan())
    newer = text.replace('"schema_version": 2', '"schema_version": 99')
    # 60 bytes of KV per GPU beside 30 of weights, twice, do not fit 100.
    heavy = text.replace('"kv_bytes": 20', '"kv_bytes": 99')
    doubled = text.replace('"n0/0"\n', '"n0/0",\n "n0/0"\n', 1)
    elsewhere = text.replace('"n0/0"\n', '"n7/0"\n', 1)
    for broken, expected in (
        (text[:-40], "cut off"),
        (newer, "schema version 99"),
        (heavy, "(C1)"),
        (doubled, "duplicate GPU n0/0"),
        (elsewhere, "no GPU n7/0"),
    ):
        (files / "p.json").write_text(broken)
        for verb in (
            ("validate", "p.json"),
            ("simulate", "p.json", "--trace", "t.csv"),
        ):
            code, out, err = plan(*verb)
            assert (code, out) == (2, "")
            assert expected in err
            assert len(err.splitlines()) == 1
    (files / "p.json").write_text(text)
    code, _, err = plan("validate", "p.json", "--scenario", "s.yaml")
    assert code == 2
    assert "another cluster" in err


def test_infeasible_is_an_outcome(plan, files):
    """min_active that no GPU is left for: exit code 3, a reason, nothing written."""
    text = SCENARIO.replace("llama-3.1-8b}", "llama-3.1-8b, min_active: 5}")
    (files / "s.yaml").write_text(text)
    args = "solve --trace t.csv --scenario s.yaml --solver milp -o p.json --json"
    code, out, err = plan(args)
    assert code == 3
    assert json.loads(out)["status"] == "infeasible"
    assert "infeasible" in err
    assert not (files / "p.json").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["slove"], "solve"),
        (["solve"], "--trace"),
        (["catalog", "show", "h101"], "h100"),
        (["trace", "info", "nothing.csv"], "no such file"),
        (["trace", "info", "sample:azure"], "sample:azure-2023"),
        (
            ["compare", "--solvers", "gurobi", "--trace", "t", "--scenario", "s"],
            "gurobi",
        ),
        (["solve", "--trace", "t.csv", "--scenario", "s.yaml", "-o", "no/p"], "folder"),
    ],
)
def test_wrong_usage(plan, files, args, expected):
    """Exit code 2 and one line that helps."""
    code, _, err = plan(*args)
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("verb", [*cli.VERBS, "catalog show", "trace info"])
def test_help_ends_with_an_example(plan, verb):
    """Every verb's help shows how it is used."""
    code, out, _ = plan(verb, "--help")
    assert code == 0
    assert "Example: plan" in " ".join(out.split())
