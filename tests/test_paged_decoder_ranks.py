"""LLMs spread over ranks by ``torch.distributed`` say what they say on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.paged.layout import Part, vocabulary_rows  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402

FAMILIES = ("qwen", "llama3", "qwen3-moe", "gemma2")


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return [Llm(folder / family, family) for family in FAMILIES]


@pytest.mark.parametrize("size", [2, 4])
def test_answers_on_several_ranks(llms, tmp_path, size):
    """Four families (biases, tied embeddings, experts, norms behind) over 2 and 4 ranks,
    where 2 KV heads are on two ranks each: all ranks say what transformers says."""
    prompts = [[(13 * i + n) % 500 for n in range(3 + 20 * i)] for i in range(3)]
    tokens = 8
    asked = [str(tmp_path / "meet"), *(str(llm.folder) for llm in llms)]
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-m", "tests.paged_ranks"),
                *(str(rank), str(size), *asked, json.dumps([prompts, tokens])),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            text=True,
        )
        for rank in range(size)
    ]
    wanted = [[llm.told(prompt, tokens) for prompt in prompts] for llm in llms]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=100)
            assert rank.returncode == 0, err[-2000:]
            assert json.loads(out) == wanted
    finally:
        for rank in ranks:
            rank.kill()


def test_a_vocabulary_that_does_not_divide(llms):
    """548 tokens over 3 ranks: 183, 183 and 182 of them, none twice."""
    config = llms[0].config
    rows = [vocabulary_rows(config, Part(rank=rank, size=3)) for rank in range(3)]
    assert rows == [(0, 183), (183, 366), (366, 548)]
