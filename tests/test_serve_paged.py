"""`plan serve` on our own engine: tiny LLMs of different families that take turns."""

from __future__ import annotations

import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow]
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.paged.text import Words  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402
from tests.tiny_cluster import scenario, serving  # noqa: E402

FAMILIES = ("llama", "qwen", "mistral", "qwen3")


def test_real_llms_are_switched(tmp_path, record_property):
    """Four LLMs on two GPUs with room for one ACTIVE each, one of which takes both: twelve
    chats, up to eight at once, are answered with transformers' greedy tokens. Nothing is
    left behind."""
    llms = {family: Llm(tmp_path / family, family) for family in FAMILIES}
    folders = {name: llm.folder for name, llm in llms.items()}
    text = scenario(folders, memory_bytes=10**8, residue="0GiB", keep_alive="500ms")
    text = re.sub(r"(name: mistral, llm: [^,]*, tp: )\[1\]", r"\1[2]", text)
    assert "tp: [2]" in text
    (tmp_path / "s.yaml").write_text(text)
    told = []
    with serving(tmp_path, "--engine paged") as client:

        def ask(i: int) -> tuple[str, str, float]:
            name = FAMILIES[i % 4]
            began_s = monotonic()
            chunks = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": f"kalo {'mira ' * i}"}],
                temperature=0,
                max_tokens=16,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            text = ""
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
            return name, text, monotonic() - began_s

        for names in (range(4), range(8)):
            with ThreadPoolExecutor(12) as pool:
                for i, (name, text, took_s) in zip(
                    names, pool.map(ask, names), strict=True
                ):
                    words = Words(llms[name].folder)
                    prompt = words.chat(
                        [{"role": "user", "content": f"kalo {'mira ' * i}"}], {}
                    )
                    assert text == words.text(llms[name].told(prompt, 16))
                    told.append(f"{name}: {took_s:.2f} s")
    record_property("measured", ", ".join(told))
    # Guards end what was theirs when the agents have ended.
    until_s, pause = monotonic() + 10.0, threading.Event()
    while left := _running(tmp_path):
        assert monotonic() < until_s, left
        pause.wait(0.05)


def _running(folder: Path) -> list[str]:
    """Processes that name it."""
    found = subprocess.run(
        ["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False
    )
    return found.stdout.split()
