"""Our own engine: real LLMs over one pool of pages, one process per GPU group.

All LLMs on the same GPUs of a node live in one server process (`runtime.paged.server`),
which is started with the first of them. It needs torch, which nothing here imports; with
the extra ``paged`` of another interpreter, that one may be named.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.engines.base import Capabilities, EngineFailed, EngineSettings
from foreserve.runtime.engines.hosted import HostedEngine, HostServer

QUESTION = "Count from one to ten:"
ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedSettings(EngineSettings):
    """All engines with the same ``folder`` and GPUs share a server, and its first
    settings."""

    pool_bytes: int
    """Of each GPU's memory, for weights and KV caches."""
    page_bytes: int = 2 * 1024**2
    host_bytes: int = 64 * 1024**3
    """Most host memory of a server for weights that are, or were, copied from there."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "float32"
    """What weights and KV caches are kept and computed in."""
    policy: str = "db-mean"
    """Whose turn it is (`runtime.scheduler.POLICIES`)."""
    chunk_tokens: int = 512
    """Of prompts, in one iteration."""
    python: str = field(default_factory=lambda: sys.executable)
    """The interpreter that has torch and tokenizers."""
    threads: int = 0
    """Of its arithmetic; 0: one for each of its devices."""
    load_within_s: float = 600.0
    answers_within_s: float = 5.0


class PagedServer(HostServer):
    def __init__(self, settings: PagedSettings, gpus: tuple[GpuId, ...]) -> None:
        self.gpus = gpus
        super().__init__(
            "foreserve.runtime.paged.server",
            [
                *("--pages", str(settings.pool_bytes // settings.page_bytes)),
                *("--page-bytes", str(settings.page_bytes)),
                *("--host-bytes", str(settings.host_bytes)),
                *("--device", settings.device),
                *("--dtype", settings.dtype),
                *("--policy", settings.policy),
                *("--chunk-tokens", str(settings.chunk_tokens)),
                *("--threads", str(settings.threads or len(gpus))),
            ],
            settings,
            name="paged-" + "-".join(str(gpu.index) for gpu in gpus),
            answers_within_s=settings.answers_within_s,
            python=settings.python,
            env=_environment(settings),
        )


def _environment(settings: PagedSettings) -> dict[str, str]:
    """A server sees its own GPU and no other."""
    if settings.device == "cpu" or not settings.devices:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, settings.devices))}


_servers: dict[tuple[Path, tuple[GpuId, ...]], PagedServer] = {}
_lock = threading.Lock()


def server_of(settings: PagedSettings, gpus: tuple[GpuId, ...]) -> PagedServer:
    """The server of these GPUs, started if there is none."""
    with _lock:
        key = settings.folder, gpus
        server = _servers.get(key)
        if server is None or not server.child.running():
            if server is not None:
                server.child.stop()
            server = _servers[key] = PagedServer(settings, gpus)
        return server


def close_servers(folder: Path) -> None:
    """End the servers that belong to ``folder``, and all engines in them."""
    with _lock:
        mine = [key for key in _servers if key[0] == folder]
        servers = [_servers.pop(key) for key in mine]
    for server in servers:
        server.child.stop()


class PagedEngine(HostedEngine):
    """An engine of `server_of` its GPUs."""

    capabilities = Capabilities(real_sleep=True)

    def __init__(
        self, option: ReplicaOption, replica: ReplicaId, settings: PagedSettings
    ) -> None:
        super().__init__(option, replica, lambda: server_of(settings, replica.gpus))
        self.settings = settings
        self._answer = ""

    def start(self) -> None:
        if len(self.replica.gpus) > 1:
            raise EngineFailed("paged engine: one GPU per replica, not several")
        self.begin(self._spec())
        self._call("POST", "load", wait_s=self.settings.load_within_s)
        self._call("POST", "wake_up")
        self._answer = self._ask()
        self.quiesce()

    def activate(self) -> None:
        self._call("POST", "wake_up", wait_s=self.settings.load_within_s)
        answer = self._ask()
        if answer != self._answer:
            raise EngineFailed(
                f"paged canary: answered {answer!r}, at its start {self._answer!r}"
            )

    def shrink(self) -> int:
        needed = int(self._call("GET", "needs")["bytes"])
        return max(0, self.option.kv_bytes - needed)

    def _ask(self) -> str:
        """Its answer to the known question."""
        question = {
            "model": self.served_name,
            "prompt": QUESTION,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        within_s = 10 * self.settings.answers_within_s
        told = self._call("POST", "v1/completions", question, wait_s=within_s)
        return str(told["choices"][0]["text"])

    def _spec(self) -> dict[str, Any]:
        option, settings = self.option, self.settings
        checkpoint = settings.checkpoints.get(self.replica.llm)
        if checkpoint is None:
            raise EngineFailed(f"no checkpoint is known of {self.replica.llm!r}")
        return {
            "served_name": self.served_name,
            "checkpoint": checkpoint,
            "time": asdict(option.time),
            "room_tokens": self.room_tokens,
            "exec_s": option.exec_s,
            "input_tokens": option.input_tokens,
            "output_tokens": option.output_tokens,
            "rate_rps": option.rate_rps,
        }


def make(
    option: ReplicaOption, replica: ReplicaId, settings: EngineSettings
) -> PagedEngine:
    if not isinstance(settings, PagedSettings):
        raise TypeError("paged engines need PagedSettings")
    return PagedEngine(option, replica, settings)
