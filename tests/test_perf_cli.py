"""`plan perf` as a user meets it, and the accuracy of what it says."""

from __future__ import annotations

import csv
import gzip
import json
from importlib.resources import files
from pathlib import Path

import pytest

from foreserve.models import catalog
from foreserve.models.perf.shipped import pair_name, shipped
from tests.test_huggingface import LLAMA

SHARED = Path(__file__).parents[2] / "shared" / "data"
HEAD = "system,model_path,isl,osl,concurrency,tp_size,ttft_ms,tpot_ms,backend"
LLM = "h100_sxm,meta-llama/Llama-3.1-8B-Instruct,1024,256"
RUNS = "\n".join(
    [HEAD, *(f"{LLM},{c},1,{80 + c},{12 + c / 8},vllm" for c in (1, 4, 8, 16, 32)), ""]
)
"""An engine that is slower than the measured ones."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a config.json and a small file of runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "runs.csv").write_text(RUNS)
    return tmp_path


def test_show_names_every_part(plan):
    """Tables of decode, prefill, capacity, memory and loading, the source of the
    kernels; 100 columns."""
    code, out, _ = plan("perf show llama-3.1-8b --gpu h100 --tp 2")
    assert code == 0
    for title in ("Decode step", "Prefill", "Capacity", "Memory of each", "Loading"):
        assert title in out
    assert "h100_sxm/vllm" in out
    assert max(map(len, out.splitlines())) <= 100


def test_show_from_a_config_alone(plan, folder):
    """An LLM that is not in the catalogue; JSON with intervals around every value."""
    code, out, _ = plan("perf show config.json --gpu h200 --tp 1 --json")
    shown = json.loads(out)
    assert code == 0
    assert shown["llm"] not in {llm.name for llm in catalog.llms()}
    assert len(shown["decode"]) == 18
    for row in (*shown["decode"], *shown["prefill"]):
        assert 0 < row["low_s"] < row["seconds"] < row["high_s"]
    assert shown["capacity"]["concurrency"] > 0
    assert shown["memory"]["kv_tokens"] > 0


def test_show_takes_lengths_from_a_trace(plan):
    """Uneven requests: their mean is that of the trace, and fewer are held than if all
    were alike."""
    show = "perf show llama-3.1-70b --gpu h100 --tp 4 --ttft 0.5 --tpot 0.05 --json"
    trace = json.loads(plan(show, "--trace sample:azure-2023")[1])["capacity"]
    lengths = "--input-tokens {input_tokens} --output-tokens {output_tokens}"
    alike = json.loads(plan(show, lengths.format(**trace))[1])["capacity"]
    assert trace["input_tokens"] == pytest.approx(alike["input_tokens"])
    assert 0 <= trace["concurrency"] < alike["concurrency"]


def test_no_capacity_is_said(plan):
    """Nothing meets a TPOT of 1 ms."""
    shown = json.loads(plan("perf show qwen3-32b --gpu h100 --tpot 0.001 --json")[1])
    assert shown["capacity"]["concurrency"] == 0
    assert "not one request" in plan("perf show qwen3-32b --gpu h100 --tpot 0.001")[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("show llama-3.1-8b --gpu h100 --tp 3", "does not run at TP 3"),
        ("show llama-3.1-8b --gpu h1000", "h1000"),
        ("show llama-9 --gpu h100", "llama-9"),
        ("show llama-3.1-8b --gpu h100 --ep 2", "EP 2"),
        ("show llama-3.1-8b --gpu h100 --picture x.gif", ".svg"),
        ("show llama-3.1-8b --gpu h100 --picture none/x.svg", "none"),
        ("show llama-3.1-8b --gpu h100 --corrections runs.csv", "corrections"),
        ("validate --data none.csv", "none.csv"),
        ("validate --data .", "silicon_e2e"),
        ("calibrate --from none.csv", "none.csv"),
        ("calibrate --from run.jsonl.gz", "--scenario"),
    ],
)
def test_bad_input_is_one_line(plan, folder, args, said):
    """Exit code 2, one error line (and a hint), nothing written."""
    before = sorted(folder.iterdir())
    code, out, err = plan("perf", args)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tpot_ms", "tpot", "no column 'tpot_ms'"),
        (",8,1,88,", ",8,1,none,", "runs.csv:4: ttft_ms: "),
        (",8,1,88,", ",8,1,-88,", "runs.csv:4: ttft_ms: "),
    ],
)
def test_a_broken_file_of_runs_names_line_and_column(plan, folder, old, new, said):
    """File, line and column of the first fault, for both readers of such files."""
    (folder / "runs.csv").write_text(RUNS.replace(old, new))
    for command in ("validate --data runs.csv", "calibrate --from runs.csv"):
        code, out, err = plan("perf", command)
        assert (code, out) == (2, "")
        assert said in err
    assert not (folder / "corrections.json").exists()


def test_calibrate_and_use(plan, folder):
    """Corrections fitted to runs bring their TPOT nearer; `show` and `validate` take
    them; the file is not overwritten unasked."""
    code, out, _ = plan("perf calibrate --from runs.csv --output mine.json --json")
    fitted = json.loads(out)
    assert code == 0
    assert fitted["runs"] == 5
    assert fitted["median_error_after"]["tpot"] < fitted["median_error_before"]["tpot"]
    args = "perf validate --data runs.csv --json"
    plain = json.loads(plan(args)[1])["steady"]["cells"][0]
    mine = json.loads(plan(args, "--corrections mine.json")[1])["steady"]["cells"][0]
    assert mine["tpot"]["median_abs"] < plain["tpot"]["median_abs"]
    show = "perf show llama-3.1-8b --gpu h100 --json"
    before = json.loads(plan(show)[1])["decode"]
    assert json.loads(plan(show, "--corrections mine.json")[1])["decode"] != before
    code, _, err = plan("perf calibrate --from runs.csv --output mine.json")
    assert code == 2
    assert "--force" in err


def test_calibrate_from_a_journal(plan, folder):
    """The simulated runtime's journal as measurements: its times came from the cost
    model, so what is fitted ends near it."""
    (folder / "s.yaml").write_text(
        "epoch: 60s\n"
        "cluster: {nodes: [{name: n0, gpu: h100, gpus: 1}]}\n"
        "models: [{name: chat, llm: llama-3.1-8b}]\n"
        "forecast: {method: last, scenarios: 4}\n"
        "solver: {time_limit: 5s, gap: 0}\n"
    )
    (folder / "t.csv").write_text(
        "arrival_s,llm,input_tokens,output_tokens\n"
        + "".join(f"{i / 5},chat,{300 + i},{50 + i % 9}\n" for i in range(600))
    )
    solve = "solve --scenario s.yaml --trace t.csv --solver greedy --quiet -o p.json"
    assert plan(solve)[0] == 0
    simulate = "simulate p.json --trace t.csv --policy planned --quiet"
    assert plan(simulate, "--journal run.jsonl.gz")[0] == 0
    code, out, err = plan(
        "perf calibrate --from run.jsonl.gz --scenario s.yaml --output j.json --json"
    )
    assert code == 0, err
    fitted = json.loads(out)
    assert fitted["runs"] > 100
    assert fitted["median_error_after"]["tpot"] < 0.1


def test_pictures_are_drawn(plan, folder):
    """A scatter and curves, as SVG with their axes named."""
    assert plan("perf validate --data runs.csv --quiet --picture v.svg")[0] == 0
    assert plan("perf show llama-3.1-8b --gpu h100 --picture s.svg")[0] == 0
    assert "predicted, ms" in (folder / "v.svg").read_text()
    assert "prompt tokens" in (folder / "s.svg").read_text()


def test_markdown_holds_the_tables(plan, folder):
    """The cell of the five runs, and the memory checks."""
    assert plan("perf validate --data runs.csv --quiet --markdown e.md")[0] == 0
    text = (folder / "e.md").read_text()
    assert "| h100 llama-3.1-8b | 1 | vllm | 5 |" in text
    assert "## Memory of an engine" in text


def test_no_pair_is_judged_by_what_it_was_fitted_on():
    """Each shipped pair has corrections of its own, and they differ from the set that
    was fitted on all; a pair that is not shipped takes the latter."""
    data = files("foreserve.models.perf").joinpath("data/silicon.csv.gz").read_bytes()
    rows = csv.DictReader(gzip.decompress(data).decode().splitlines())
    assert sum(1 for _ in rows) > 1500
    llm = catalog.llm("llama-3.1-70b")
    everything = shipped(llm, "vllm")
    held = shipped(llm, "vllm", without=pair_name("b200", "llama-3.1-70b"))
    assert held != everything
    assert held.source != everything.source
    assert shipped(llm, "vllm", without="no/pair") == everything


@pytest.fixture(scope="module")
def validation():
    """The shipped measurements, once."""
    from foreserve.planner.perf_report import run

    return run(None, None, lambda done, total: None).plain()


@pytest.mark.parametrize(
    ("family", "tpot", "ttft"), [("dense", 0.12, 0.25), ("moe", 0.18, 0.35)]
)
def test_accuracy_on_measured_deployments(validation, family, tpot, ttft):
    """Median errors on (GPU, LLM) pairs left out of the fit, and the coverage of the
    90 % interval."""
    errors = validation["steady"]["families"][family]
    assert errors["tpot"]["runs"] > 800
    assert errors["tpot"]["median_abs"] <= tpot
    assert errors["ttft"]["median_abs"] <= ttft
    for metric in ("tpot", "ttft"):
        assert 0.85 <= errors[metric]["coverage"] <= 0.95


def test_loading_intervals_cover_the_repeats(validation):
    """Every published loader, LLM and access."""
    assert len(validation["loading"]) >= 10
    assert all(row["covered"] for row in validation["loading"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets")
@pytest.mark.parametrize("name", ["llmservingsim_profile", "sageserve_perf"])
def test_single_iterations_of_other_data_sets(name):
    """Nothing was fitted to them: a median of 12 % at most."""
    import numpy as np

    from foreserve.planner.perf_iterations import ASKED, SETS

    cells = list(SETS[name](SHARED / name))
    errors = np.abs(np.concatenate([cell.errors for cell in cells]))
    assert len(errors) > 400
    assert np.median(errors) <= ASKED
