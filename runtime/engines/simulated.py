"""Simulated engines: real processes and real HTTP around the cost model.

All engines of a node live in one server process (`simulated_server`), so that a hundred
replicas fit on a small machine. The process is started with the node's first engine and
ends with whoever started it.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.runtime.engines.base import Capabilities, EngineFailed, EngineSettings
from foreserve.runtime.engines.batch import BLOCK_TOKENS
from foreserve.runtime.engines.calls import NoAnswer, call
from foreserve.runtime.engines.process import Child

SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "jo", "ki", "le", "mu", "na", "po")
WORDS = [f" {a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES[:7]]
QUESTION = "say what you always say"
ANSWER_TOKENS = 3
KEY = "FORESERVE_ENGINE_KEY"
"""Variable that tells the server its key: others may read command lines."""

Failure = Literal["die", "hang", "gibberish", "slow"]


def words(seed: int, begin: int, end: int) -> str:
    """Tokens ``begin`` to ``end`` of the answer that has this seed."""
    return "".join(WORDS[(seed + 31 * i) % len(WORDS)] for i in range(begin, end))


def seed_of(served_name: str, prompt: str) -> int:
    """Of what an LLM answers to a prompt."""
    return zlib.crc32(f"{served_name}\n{prompt}".encode())


def gibberish(seed: int) -> int:
    """The seed of an answer that is wrong."""
    return seed + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSettings(EngineSettings):
    """All engines with the same ``folder`` share a server, and its first settings."""

    time_scale: float = 1.0
    """Seconds of the cost model that pass in a real one."""
    tick_s: float = 0.001
    """Real seconds at least between two chunks of a stream; what comes sooner is said
    together. First and last tokens do not wait for it."""
    answers_within_s: float = 2.0
    """Real seconds after which an engine that does not answer is not alive."""


class SimulatedNode:
    """The server of one node's engines."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self.settings = settings
        listener = socket.create_server((settings.host, 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        with listener:
            self.child = Child(
                [
                    *(
                        sys.executable,
                        "-m",
                        "foreserve.runtime.engines.simulated_server",
                    ),
                    *("--fd", str(listener.fileno())),
                    *("--scale", str(settings.time_scale)),
                    *("--tick-ms", str(1000 * settings.tick_s)),
                ],
                settings.folder,
                "simulated",
                grace_s=settings.stop_grace_s,
                env={KEY: settings.key},
                pass_fds=[listener.fileno()],
            )

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        wait_s: float = 0.0,
    ) -> Any:
        """What the server answers, from JSON; raises `EngineFailed` if it does not within
        ``wait_s`` and its usual time."""
        settings = self.settings
        within_s = wait_s + settings.answers_within_s
        host, key = settings.host, settings.key
        try:
            return json.loads(
                call(
                    self.port, method, path, body, within_s=within_s, host=host, key=key
                )
            )
        except NoAnswer as error:
            what = str(error)
            if not self.child.running():
                what = f"the server has ended: {self.child.why()}"
            raise EngineFailed(f"simulated engine: {what}") from error

    def fail_loads(self, llm: str, times: int = 1) -> None:
        """The next loads of the LLM fail, at their end."""
        self.call("POST", "/fail", {"llm": llm, "times": times})


_nodes: dict[Path, SimulatedNode] = {}
_lock = threading.Lock()


def node_of(settings: SimulatedSettings) -> SimulatedNode:
    """The server that goes with the settings' folder, started if there is none."""
    with _lock:
        node = _nodes.get(settings.folder)
        if node is None or not node.child.running():
            if node is not None:
                node.child.stop()
            node = _nodes[settings.folder] = SimulatedNode(settings)
        return node


def prepare(settings: EngineSettings) -> None:
    """Have the node's server running, so that its first load does not wait for it."""
    if not isinstance(settings, SimulatedSettings):
        raise TypeError("simulated engines need SimulatedSettings")
    node_of(settings).call("GET", "/health", wait_s=30.0)


def close_node(folder: Path) -> None:
    """End the server of the node, and all engines in it."""
    with _lock:
        node = _nodes.pop(folder, None)
    if node is not None:
        node.child.stop()


class SimulatedEngine:
    """An engine of `node_of` its settings."""

    capabilities = Capabilities(real_sleep=True)

    def __init__(
        self, option: ReplicaOption, replica: ReplicaId, settings: SimulatedSettings
    ) -> None:
        self.option, self.replica, self.settings = option, replica, settings
        self._node: SimulatedNode | None = None
        self._number: int | None = None
        self._stopped = False
        self._guard = threading.Lock()

    @property
    def url(self) -> str:
        node, number = self._made()
        return f"http://{node.settings.host}:{node.port}/r/{number}"

    @property
    def served_name(self) -> str:
        return self.replica.llm

    @property
    def max_num_seqs(self) -> int:
        return self.option.concurrency

    @cached_property
    def room_tokens(self) -> int:
        return self.option.kv_bytes // self.option.kv_token_bytes

    def start(self) -> None:
        try:
            node = node_of(self.settings)
        except OSError as error:
            raise EngineFailed(f"simulated engine: {error}") from error
        with self._guard:
            if self._stopped:
                raise EngineFailed("stopped before it was started")
            self._node = node
            made = node.call("POST", "/engines", self._spec(), wait_s=30.0)
            self._number = made["number"]
        load_s = self.option.load_s / self.settings.time_scale
        self._call("POST", "load", wait_s=10 * load_s + 60)

    def activate(self) -> None:
        activate_s = self.option.activate_s / self.settings.time_scale
        self._call("POST", "wake_up", wait_s=10 * activate_s)
        question = {
            "model": self.served_name,
            "prompt": QUESTION,
            "max_tokens": ANSWER_TOKENS,
        }
        told = self._call("POST", "v1/completions", question)["choices"][0]["text"]
        expected = words(seed_of(self.served_name, QUESTION), 0, ANSWER_TOKENS)
        if told != expected:
            raise EngineFailed(f"canary: answered {told!r}, expected {expected!r}")

    def quiesce(self) -> None:
        self._call("POST", "sleep?level=1")

    def shrink(self) -> int:
        return int(self._call("POST", "shrink")["bytes"])

    def stop(self) -> None:
        with self._guard:
            self._stopped = True
            node, number = self._node, self._number
        if node is not None and number is not None:
            # One that has died already, or all of them, is as stopped as can be.
            with suppress(EngineFailed):
                node.call("DELETE", f"/r/{number}/")

    def alive(self) -> bool:
        # Without its guard the server would outlive its owner: that counts as dead, too.
        try:
            self._call("GET", "health")
            return self._made()[0].child.running()
        except EngineFailed:
            return False

    def memory_bytes(self) -> int | None:
        with suppress(EngineFailed):
            return int(self._call("GET", "memory")["bytes"])
        return None

    def fail(self, kind: Failure, **how: float) -> None:
        """Make it fail: for tests of those who have to notice."""
        self._call("POST", "fail", {"kind": kind, **how})

    def _made(self) -> tuple[SimulatedNode, int]:
        if self._node is None or self._number is None or self._stopped:
            raise EngineFailed("simulated engine: not started, or stopped")
        return self._node, self._number

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        wait_s: float = 0.0,
    ) -> Any:
        node, number = self._made()
        return node.call(method, f"/r/{number}/{path}", body, wait_s)

    def _spec(self) -> dict[str, Any]:
        option = self.option
        return {
            "served_name": self.served_name,
            "time": asdict(option.time),
            "room_tokens": self.room_tokens,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.settings.max_num_batched_tokens,
            "load_s": option.load_s,
            "activate_s": option.activate_s,
            "resident_bytes": option.resident_bytes,
            "active_bytes": option.active_bytes,
            "block_bytes": BLOCK_TOKENS * option.kv_token_bytes,
            "output_tokens": option.output_tokens,
        }


def make(
    option: ReplicaOption, replica: ReplicaId, settings: EngineSettings
) -> SimulatedEngine:
    if not isinstance(settings, SimulatedSettings):
        raise TypeError("simulated engines need SimulatedSettings")
    return SimulatedEngine(option, replica, settings)
