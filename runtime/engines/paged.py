"""Our own engine: real LLMs over one pool of pages for each GPU, one process each.

All LLMs on the same GPU of a node live in one server process (`runtime.paged.server`),
which is started with the first of them; of an LLM with several GPUs each one's server
has a shard, and the first leads. It needs torch, which nothing here imports; with
the extra ``paged`` of another interpreter, that one may be named. What servers copy
weights from is in one more process, the node's store (`runtime.paged.shards`).
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.engines.base import Capabilities, EngineFailed, EngineSettings
from foreserve.runtime.engines.calls import known_question
from foreserve.runtime.engines.hosted import HostedEngine, HostServer
from foreserve.runtime.engines.process import Child
from foreserve.runtime.memory.node_store import RemoteStore, StoreGone, listen
from foreserve.runtime.paged.shards import keys_of

STORE = "store.sock"
"""In the settings' folder."""
START_S = 5.0
"""A store that was just started may take so much longer to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedSettings(EngineSettings):
    """All engines with the same ``folder`` and GPU share a server, and its first
    settings; all with the same ``folder`` share a store."""

    keeps_weights: ClassVar[bool] = True
    pool_bytes: int
    """Of each GPU's memory, for weights and KV caches."""
    page_bytes: int = 2 * 1024**2
    host_bytes: int = 64 * 1024**3
    """Most host memory of the node for weights that are, or were, copied from there."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "float32"
    """What weights and KV caches are kept and computed in."""
    policy: str = "db-mean"
    """Whose turn it is (`runtime.scheduler.POLICIES`)."""
    patience: float = math.inf
    """As the next two: of `runtime.turns.Rules`."""
    near: float = 0.1
    max_num_seqs: int = 256
    chunk_tokens: int = 512
    """Of prompts, in one iteration."""
    swap_bytes: int = 4 * 1024**3
    """Most host memory of a GPU's server for KV caches of requests that must leave it,
    beside that for weights; given as it is needed, on CUDA at the start. 0: they are
    computed again."""
    python: str = field(default_factory=lambda: sys.executable)
    """The interpreter that has torch and tokenizers."""
    load_loss: float = 0.05
    """Share of the time between tokens that loads may cost which nobody waits for;
    infinite: they are not held back."""
    room_within_s: float = 30.0
    """A load that nobody waits for waits so long for memory that requests do not need."""
    threads: int = 1
    """Of its arithmetic."""
    load_within_s: float = 600.0
    answers_within_s: float = 5.0


class PagedServer(HostServer):
    def __init__(self, settings: PagedSettings, gpu: GpuId) -> None:
        super().__init__(
            "foreserve.runtime.paged.server",
            [
                *("--pages", str(settings.pool_bytes // settings.page_bytes)),
                *("--page-bytes", str(settings.page_bytes)),
                *("--store", str(settings.folder.absolute() / STORE)),
                *("--device", settings.device),
                *("--dtype", settings.dtype),
                *("--policy", settings.policy),
                *("--patience", str(settings.patience)),
                *("--near", str(settings.near)),
                *("--max-num-seqs", str(settings.max_num_seqs)),
                *("--chunk-tokens", str(settings.chunk_tokens)),
                *("--swap-bytes", str(settings.swap_bytes)),
                *("--load-loss", str(settings.load_loss)),
                *("--room-within", str(settings.room_within_s)),
                *("--threads", str(settings.threads)),
            ],
            settings,
            name=f"paged-{gpu.index}",
            answers_within_s=settings.answers_within_s,
            python=settings.python,
            env=_environment(settings),
        )


def _environment(settings: PagedSettings) -> dict[str, str]:
    """A server sees its own GPU and no other."""
    if settings.device == "cpu" or not settings.devices:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, settings.devices))}


class NodeStore:
    """The process that reads weights into memory for all servers of a folder. If it ends,
    servers keep what they have mapped, and read checkpoints themselves until there is
    another one."""

    def __init__(self, settings: PagedSettings) -> None:
        settings.folder.mkdir(parents=True, exist_ok=True)
        path = settings.folder / STORE
        with listen(path) as listener:
            fd, num_bytes = listener.fileno(), settings.host_bytes
            # No torch: any interpreter that runs this.
            self.child = Child(
                [
                    *(sys.executable, "-m", "foreserve.runtime.paged.shards"),
                    *("--fd", str(fd), "--host-bytes", str(num_bytes)),
                ],
                settings.folder,
                "store",
                grace_s=settings.stop_grace_s,
                pass_fds=[fd],
            )
        self._link = RemoteStore(path)

    def keep(self, checkpoints: Sequence[Path]) -> None:
        """These go last. Returns at once."""
        with suppress(StoreGone):
            self._link.keep([keys_of(folder) for folder in checkpoints])

    def look(self, within_s: float) -> dict[str, int]:
        """As `RemoteStore.look`."""
        return self._link.look(within_s)


_servers: dict[tuple[Path, GpuId], PagedServer] = {}
_stores: dict[Path, NodeStore] = {}
_kept: dict[Path, Sequence[Path]] = {}
_lock = threading.Lock()
_store_lock = threading.Lock()


def store_of(settings: PagedSettings, *, ask: bool = False) -> NodeStore:
    """The store of that folder, started if there is none, or (``ask``) if the one there
    does not answer, for which this may wait."""
    store = _stores.get(settings.folder)
    if store is not None and not ask and store.child.running():
        return store
    with _store_lock:
        store = _stores.get(settings.folder)
        if store is not None and ask and store.child.running():
            try:
                store.look(START_S + settings.answers_within_s)
            except StoreGone:
                store.child.kill()
        if store is None or not store.child.running():
            if store is not None:
                store.child.stop()
            store = _stores[settings.folder] = NodeStore(settings)
            store.keep(_kept.get(settings.folder, ()))
        return store


def server_of(settings: PagedSettings, gpu: GpuId) -> PagedServer:
    """The server of that GPU, started if there is none."""
    with _lock:
        key = settings.folder, gpu
        server = _servers.get(key)
        if server is None or not server.child.running():
            if server is not None:
                server.child.stop()
            server = _servers[key] = PagedServer(settings, gpu)
        return server


def keep(settings: PagedSettings, llms: Collection[str]) -> None:
    """As `base.keep`; a store that is started later is told, too."""
    known = settings.checkpoints
    _kept[settings.folder] = [Path(known[llm]) for llm in llms if llm in known]
    store = _stores.get(settings.folder)
    if store is not None:
        store.keep(_kept[settings.folder])


def close_servers(folder: Path) -> None:
    """End the servers that belong to ``folder``, and all engines in them; its store."""
    with _lock:
        mine = [key for key in _servers if key[0] == folder]
        servers = [_servers.pop(key) for key in mine]
    for server in servers:
        server.child.stop()
    with _store_lock:
        store = _stores.pop(folder, None)
    if store is not None:
        store.child.stop()


class PagedEngine(HostedEngine):
    """An engine of `server_of` its GPUs."""

    capabilities = Capabilities(real_sleep=True)

    def __init__(
        self, option: ReplicaOption, replica: ReplicaId, settings: PagedSettings
    ) -> None:
        super().__init__(option, replica, lambda: self._servers()[0])
        self.settings = settings
        self._answer, self._urgent = "", False
        self._followers: list[PagedServer] = []

    def start(self) -> None:
        try:
            store_of(self.settings, ask=True)
            _, *self._followers = self._servers()
        except OSError as error:
            raise EngineFailed(f"no server: {error}") from error
        self.begin(self._spec() | {"followers": self._doors()})
        if self._urgent:
            self.hurry()
        self._call("POST", "load", wait_s=self.settings.load_within_s)
        self._call("POST", "wake_up")
        self._answer = self._ask()
        self.quiesce()

    def hurry(self) -> None:
        self._urgent = True
        with suppress(EngineFailed):  # Not made yet: `start` says so.
            self._call("POST", "hurry")

    def activate(self) -> None:
        with suppress(OSError):
            store_of(self.settings)
        self._call("POST", "wake_up", wait_s=self.settings.load_within_s)
        answer = self._ask()
        if answer != self._answer:
            raise EngineFailed(
                f"paged canary: answered {answer!r}, at its start {self._answer!r}"
            )

    def shrink(self) -> int:
        needed = int(self._call("GET", "needs")["bytes"])
        return max(0, self.option.kv_bytes - needed)

    def alive(self) -> bool:
        try:
            for server in self._followers:
                server.call("GET", "/health")
        except EngineFailed:
            return False
        running = (server.child.running() for server in self._followers)
        return all(running) and super().alive()

    def stop(self) -> None:
        for server in self._followers:
            if server.hangs():
                # Its leader waits for it, and ends when it does.
                server.child.kill()
        super().stop()

    def _servers(self) -> list[PagedServer]:
        """Of its GPUs, in their order, which is that of the ranks; the first one leads."""
        settings, gpus = self.settings, self.replica.gpus
        return [
            server_of(replace(settings, devices=settings.devices[i : i + 1]), gpus[i])
            for i in sorted(range(len(gpus)), key=lambda i: gpus[i].index)
        ]

    def _doors(self) -> list[int]:
        """Where its followers listen to their leader."""
        return [
            int(server.call("GET", "/pool", wait_s=30.0)["door"])
            for server in self._followers
        ]

    def _ask(self) -> str:
        """Its answer to the known question."""
        question = known_question(self.served_name)
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
