"""Simulated engines: real processes and real HTTP around the cost model.

All engines of a node live in one server process (`simulated_server`), so that a hundred
replicas fit on a small machine. The process is started with the node's first engine and
ends with whoever started it.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from foreserve.models.cost import IterationTime
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.runtime.engines.base import Capabilities, EngineFailed, EngineSettings
from foreserve.runtime.engines.batch import BLOCK_TOKENS
from foreserve.runtime.engines.hosted import HostedEngine, HostServer

SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "jo", "ki", "le", "mu", "na", "po")
WORDS = [f" {a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES[:7]]
QUESTION = "say what you always say"
ANSWER_TOKENS = 1

Failure = Literal["die", "hang", "gibberish", "slow"]


def words(seed: int, begin: int, end: int) -> str:
    """Tokens ``begin`` to ``end`` of the answer that has this seed."""
    return "".join(WORDS[(seed + 31 * i) % len(WORDS)] for i in range(begin, end))


def seed_of(served_name: str, prompt: str) -> int:
    """Of what an LLM answers to a prompt."""
    return zlib.crc32(f"{served_name}\n{prompt}".encode())


def answer_s(time: IterationTime) -> float:
    """What an engine that has nothing else to do takes for its known answer."""
    tokens = QUESTION.count(" ") + 1
    rest = range(tokens + 1, tokens + ANSWER_TOKENS)
    return time.prefill_s(tokens, tokens**2) + sum(time.decode_s(1, n) for n in rest)


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


class SimulatedNode(HostServer):
    """The server of one node's engines."""

    def __init__(self, settings: SimulatedSettings) -> None:
        super().__init__(
            "foreserve.runtime.engines.simulated_server",
            [
                *("--scale", str(settings.time_scale)),
                *("--tick-ms", str(1000 * settings.tick_s)),
            ],
            settings,
            name="simulated",
            answers_within_s=settings.answers_within_s,
        )

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


class SimulatedEngine(HostedEngine):
    """An engine of `node_of` its settings."""

    capabilities = Capabilities(real_sleep=True)

    def __init__(
        self, option: ReplicaOption, replica: ReplicaId, settings: SimulatedSettings
    ) -> None:
        super().__init__(option, replica, lambda: node_of(settings))
        self.settings = settings

    def start(self) -> None:
        self.begin(self._spec())
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

    def shrink(self) -> int:
        return int(self._call("POST", "shrink")["bytes"])

    def fail(self, kind: Failure, **how: float) -> None:
        """Make it fail: for tests of those who have to notice."""
        self._call("POST", "fail", {"kind": kind, **how})

    def _spec(self) -> dict[str, Any]:
        option = self.option
        return {
            "served_name": self.served_name,
            "time": asdict(option.time),
            "room_tokens": self.room_tokens,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.settings.max_num_batched_tokens,
            "load_s": option.load_s,
            # Until it serves, so with its known answer.
            "activate_s": max(0.0, option.activate_s - answer_s(option.time)),
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
