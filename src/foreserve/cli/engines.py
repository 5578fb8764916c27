"""Which kind of engine `plan serve` runs, and what its agents need to know for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.problem import Fleet
    from foreserve.planner.scenario import Scenario
    from foreserve.runtime.engines.base import EngineSettings
    from foreserve.runtime.engines.paged import PagedSettings

LEAST_PAGE_BYTES, MOST_PAGE_BYTES = 64 * 1024, 2 * 1024**2
PAGES = 1024
"""At least so many in a pool, as far as pages get that small."""
MOST_SWAP_BYTES = 4 * 1024**3
"""For each GPU: of host memory, for KV caches of requests that must leave."""
SWAP_SHARE = 8
"""All of them together get an eighth of a node's host memory at most."""


def usual(python: str | None) -> str:
    """vLLM where it is installed, else our own engine."""
    from foreserve.runtime.engines.vllm import VllmSettings, device_of

    try:
        device_of(python or VllmSettings(folder=Path()).python)
    except InvalidInput:
        if find_spec("torch") is None:
            raise InvalidInput(
                "neither vLLM nor torch is installed here",
                hint="pip install 'foreserve[paged]', or --engine simulated",
            ) from None
        return "paged"
    return "vllm"


def engine_settings(
    scenario: Scenario,
    fleet: Fleet,
    engine: str,
    folder: Path,
    time_scale: float,
    python: str | None,
) -> EngineSettings:
    """What the agents need to make engines of this kind."""
    from foreserve.runtime.engines.simulated import SimulatedSettings
    from foreserve.runtime.engines.vllm import VllmSettings, device_of

    if engine == "simulated":
        return SimulatedSettings(folder=folder, time_scale=time_scale)
    if time_scale != 1:
        raise InvalidInput("only simulated engines have a --time-scale")
    checkpoints = _checkpoints(scenario)
    if engine == "paged":
        return _paged(scenario, fleet, folder, checkpoints, python)
    settings = VllmSettings(folder=folder, checkpoints=checkpoints)
    if python is not None:
        settings = replace(settings, python=python)
    device_of(settings.python)  # `InvalidInput` where there is no vLLM
    return settings


def sleeps(settings: EngineSettings) -> bool:
    """Whether WARM engines hold no KV memory: vLLM's do on GPUs only."""
    from foreserve.runtime.engines.vllm import VllmSettings, device_of

    if isinstance(settings, VllmSettings):
        return device_of(settings.python) == "cuda"
    return True


def _checkpoints(scenario: Scenario) -> dict[str, str]:
    """By LLM: its folder, or the name that is all there is."""
    from foreserve.models import catalog

    found = {}
    for part in scenario.models:
        source = part.llm or part.name
        if catalog.is_path(source):
            path = Path(source)
            source = str((path if path.is_dir() else path.parent).resolve())
        found[part.name] = source
    return found


def _paged(
    scenario: Scenario,
    fleet: Fleet,
    folder: Path,
    checkpoints: Mapping[str, str],
    python: str | None,
) -> PagedSettings:
    """The pool is as large as the least of the GPUs; on CPUs twice that, since plans book
    numbers of two bytes, and there it computes with four. What servers may swap comes out
    of the node's host memory; the rest is the store's."""
    from foreserve.runtime.engines.paged import PagedSettings

    for llm, checkpoint in checkpoints.items():
        if not (Path(checkpoint) / "config.json").exists():
            raise InvalidInput(
                f"{llm}: the paged engine needs the folder of a checkpoint",
                hint="llm: path/to/folder, as `plan models make-tiny` writes them",
            )
    cluster, runtime = fleet.cluster, scenario.runtime
    on_gpu = which("nvidia-smi") is not None
    pool_bytes = min(cluster.usable_bytes(gpu) for gpu in cluster.gpus)
    pool_bytes *= 1 if on_gpu else 2
    page_bytes = MOST_PAGE_BYTES
    while (
        not on_gpu and page_bytes > LEAST_PAGE_BYTES and pool_bytes < PAGES * page_bytes
    ):
        page_bytes //= 2
    host_bytes = min(node.host_ram_bytes for node in cluster.nodes)
    swap_bytes = 0
    if fleet.serving.swapping:
        gpus = max(node.gpus for node in cluster.nodes)
        swap_bytes = min(MOST_SWAP_BYTES, host_bytes // SWAP_SHARE // gpus)
        host_bytes -= gpus * swap_bytes
    settings = PagedSettings(
        folder=folder,
        device="cuda" if on_gpu else "cpu",
        dtype="bfloat16" if on_gpu else "float32",
        pool_bytes=pool_bytes,
        page_bytes=page_bytes,
        host_bytes=host_bytes,
        swap_bytes=swap_bytes,
        checkpoints=checkpoints,
        policy=runtime.scheduler,
        patience=math.inf if runtime.patience is None else runtime.patience,
        near=runtime.near,
        max_num_seqs=runtime.max_num_seqs,
    )
    if python is not None:
        return replace(settings, python=python)
    if find_spec("torch") is None or find_spec("tokenizers") is None:
        raise InvalidInput(
            "the paged engine needs torch and tokenizers",
            hint="pip install 'foreserve[paged]', or --python",
        )
    return settings
