"""`plan serve` on vLLM: three tiny LLMs, of which two fit at a time."""

from __future__ import annotations

import json
import os
from time import monotonic

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("openai")

from foreserve.runtime.engines import tiny
from tests.tiny_cluster import scenario, serving

PYTHON = os.environ.get("FORESERVE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="FORESERVE_VLLM_PYTHON names no interpreter with vLLM"
    ),
]
FAMILIES = {"first": "llama", "second": "qwen", "third": "mistral"}


def test_the_third_llm_is_answered_after_a_real_switch(tmp_path, record_property):
    """The official client lists all three and streams a chat from each; for the third one
    of the others has to go. A second round of what is there is answered at once."""
    llms = {
        name: tiny.make(tmp_path / name, family, seed=seed)
        for seed, (name, family) in enumerate(FAMILIES.items())
    }
    text = scenario(
        llms, memory_bytes=1_200_000_000, residue="0.7GiB", keep_alive="60s"
    )
    (tmp_path / "s.yaml").write_text(text)
    told = []
    with serving(tmp_path, f"--engine vllm --python {PYTHON}") as client:
        assert {llm.id for llm in client.models.list()} == set(FAMILIES)
        answers = {}
        for name in (*FAMILIES, "third"):
            began_s, first_s, answer = monotonic(), None, ""
            for chunk in client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "kalo mira"}],
                max_tokens=12,
                temperature=0,
                stream=True,
            ):
                if chunk.choices and chunk.choices[0].delta.content:
                    first_s = first_s or monotonic() - began_s
                    answer += chunk.choices[0].delta.content
            assert first_s is not None
            assert answers.setdefault(name, answer) == answer
            told.append(f"{name}: first token after {first_s:.2f} s")
        assert len(set(answers.values())) == 3
        journal = (tmp_path / "st/journal.jsonl").read_text()
        gone = [
            line["llm"]
            for line in map(json.loads, journal.splitlines())
            if line["event"] == "phase" and line["phase"] is None
        ]
        assert len(gone) == 1
        assert gone[0] in ("first", "second")
    record_property("measured", "\n".join(told))
