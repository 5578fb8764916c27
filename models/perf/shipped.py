"""The corrections that the package ships, and those to judge them by.

``data/corrections.json`` (written by `benchmarks/fit_corrections.py`) holds one set for
dense LLMs and one for mixtures of experts (by engine), fitted on all deployments there
are, and for each (GPU, LLM) pair the sets fitted *without* that pair. Whoever compares a
prediction with a measurement of such a pair takes those, so nothing is judged by what it
was fitted on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from foreserve.models.codec import structure
from foreserve.models.llm import ModelSpec
from foreserve.models.perf.measured import Corrections

Family = Literal["dense", "moe"]


def family(llm: ModelSpec) -> Family:
    return "dense" if llm.moe is None else "moe"


def pair_name(gpu: str, llm: str) -> str:
    """Key of a (GPU, LLM) pair, by catalogue names."""
    return f"{gpu}/{llm}"


def shipped(llm: ModelSpec, engine: str, without: str | None = None) -> Corrections:
    """Corrections for ``llm`` on ``engine``; fitted without the pair ``without``.

    An engine that was not measured gets what vLLM adds.
    """
    sets = _sets()
    for name in (without or "", "all"):
        engines = sets.get(name, {}).get(family(llm), {})
        if engines:
            return engines.get(engine) or engines.get("vllm") or Corrections()
    return Corrections()


@cache
def _sets() -> Mapping[str, Mapping[str, Mapping[str, Corrections]]]:
    file = files("foreserve.models.perf").joinpath("data/corrections.json")
    if not file.is_file():
        return {}
    plain = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: {
            kind: {
                engine: structure(Corrections, values, text="", file=str(file))
                for engine, values in engines.items()
            }
            for kind, engines in kinds.items()
        }
        for name, kinds in plain["sets"].items()
    }
