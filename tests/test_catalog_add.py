"""`plan catalog add`: from a config.json to a name that every command knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foreserve.models import catalog
from foreserve.models.errors import InvalidInput
from foreserve.planner.scenario import load_scenario
from tests.test_huggingface import LLAMA


@pytest.fixture
def plan(run_plan):
    """Run `plan catalog ARGS` in this process; returns (exit code, stdout, stderr)."""
    return lambda *args: run_plan(["catalog", *args])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the checkpoint folder ``My LLM``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My LLM").mkdir()
    (tmp_path / "My LLM" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_an_added_llm_is_known_by_name(plan, folder):
    """Named after its folder, printed, listed, shown, and equal to its config.json."""
    code, out, _ = plan("add", "My LLM/config.json")
    assert code == 0
    assert "8,030,261,248" in out
    assert "catalog/my-llm.toml" in out
    assert catalog.llm("my-llm") == catalog.llm("My LLM/config.json")
    assert catalog.llm("my-llm") == catalog.llm("catalog/my-llm.toml")
    listed = json.loads(plan("list", "--json")[1])["llms"]
    assert "my-llm" in [llm["name"] for llm in listed]
    assert json.loads(plan("show", "my-llm", "--json")[1])["layers"] == 32


def test_facts_as_json(plan, folder):
    """Weights and KV per GPU: 2 B a parameter, 128 KiB a token, 8 KV heads split."""
    document = json.loads(plan("add", "My LLM", "--name", "mine", "--json")[1])
    assert document["file"] == "catalog/mine.toml"
    assert document["weight_bytes"] == 2 * 8_030_261_248
    tokens = {row["tp"]: row["kv_bytes_per_token"] for row in document["per_gpu"]}
    assert tokens == {1: 131_072, 2: 65_536, 4: 32_768, 8: 16_384}


def test_add_does_not_overwrite_or_hide(plan, folder):
    """A second time, or under a shipped name, only with --force; a file sets the name."""
    assert plan("add", "My LLM")[0] == 0
    code, _, err = plan("add", "My LLM")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--force" in err
    assert plan("add", "My LLM", "--force")[0] == 0
    assert "would hide" in plan("add", "My LLM", "--name", "qwen3-8b")[2]
    assert plan("add", "My LLM", "--into", "other.toml")[0] == 0
    assert catalog.llm("other.toml").name == "other"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["nothing.json"], "no such file"),
        (["bad.json"], "bad.json:1: not valid JSON"),
        (["list.json"], "a JSON object is expected"),
        (["t5.json"], "is_encoder_decoder: an encoder-decoder"),
        (["My LLM", "--name", "a/b"], "--name 'a/b'"),
        (["My LLM", "--into", "no/such/folder"], "the folder does not exist"),
        (["My LLM", "--into", "bad.json"], "a folder is needed"),
        (["My LLM", "--into", "x.toml", "--name", "y"], "must be y.toml"),
    ],
)
def test_faults_are_one_line(plan, folder, args, expected):
    """Exit code 2, one line, and nothing written."""
    Path("bad.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("t5.json").write_text('{"is_encoder_decoder": true}')
    code, _, err = plan("add", *args)
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) == 1
    assert not list(folder.glob("**/*.toml"))


def test_modelopt_says_the_weight_type_beside_config_json(folder):
    """hf_quant_config.json counts where config.json is silent; a hub id names the LLM."""
    named = {**LLAMA, "_name_or_path": "nvidia/Llama-3.1-8B-Instruct-FP8"}
    Path("My LLM/config.json").write_text(json.dumps(named))
    Path("My LLM/hf_quant_config.json").write_text(
        json.dumps(
            {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
        )
    )
    llm = catalog.llm("My LLM/config.json")
    assert (llm.name, llm.hub_id) == (
        "llama-3.1-8b-instruct-fp8",
        "nvidia/Llama-3.1-8B-Instruct-FP8",
    )
    assert (llm.weight_dtype, llm.kv_bytes_per_value) == ("fp8", 1)


def test_help_ends_with_an_example(plan):
    """`plan catalog add --help` shows how it is used."""
    code, out, _ = plan("add", "--help")
    assert code == 0
    assert "Example: plan catalog add ./my-llm/config.json" in " ".join(out.split())


def test_a_scenario_names_an_llm_by_path(folder):
    """The path is relative to the scenario; a fault is placed at its key."""
    scenario = (
        "cluster: {{nodes: [{{name: n0, gpu: h100}}]}}\n"
        "models: [{{name: a, llm: '{}'}}]\n"
    )
    (folder / "deep").mkdir()
    path = folder / "deep" / "s.yaml"
    path.write_text(scenario.format("../My LLM/config.json"))
    assert load_scenario(path).models[0].model_spec().params == 8_030_261_248
    path.write_text(scenario.format("./gone.json"))
    with pytest.raises(InvalidInput, match="no such file"):
        load_scenario(path)
