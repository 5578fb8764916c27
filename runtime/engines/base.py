"""What every engine is: one replica's server on fixed GPUs of one node.

Calls block and are made by the threads of the node that owns the engine. The life is that
of `runtime.states`: `start` ends WARM, `activate` ends ACTIVE, `quiesce` ends WARM again,
and `stop` may come at any time, also while another call is under way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Protocol, cast

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption


class EngineFailed(ForeserveError):
    """An engine did not do what it was asked to; one line says why. Stop it then."""


class NoRoom(EngineFailed):
    """What nobody waits for found no room, for now; nothing is wrong with the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can really do here, never what its server says of itself."""

    real_sleep: bool
    """While WARM it holds no KV memory. False: WARM is a running engine that nobody is
    routed to, and what it holds then is to be booked as if ACTIVE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the node knows; kinds of engines add what is theirs."""

    keeps_weights: ClassVar[bool] = False
    """Engines of this kind keep weights in host memory themselves: nobody else need."""
    folder: Path
    """Logs, and records of the processes that were started."""
    devices: tuple[int, ...] = ()
    """Physical GPUs, or cores where there are none: one per shard, in order."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """By LLM: the folder of its weights, for engines that read any."""
    max_num_batched_tokens: int = 8192
    host: str = "127.0.0.1"
    """Where engines listen: loopback, or an address of this machine that the gateway
    reaches."""
    key: str = field(default="", repr=False)
    """What their callers have to show (``Authorization: Bearer``); empty: nothing."""
    stop_grace_s: float = 5.0
    """After being asked to end, and before being killed."""


class Engine(Protocol):
    """One replica's engine. Calls raise `EngineFailed`, also when `stop` cut them short."""

    @property
    def replica(self) -> ReplicaId: ...

    @property
    def url(self) -> str:
        """Base of its OpenAI API, without ``/v1``; known once `start` has returned."""
        ...

    @property
    def served_name(self) -> str:
        """What requests have to call the LLM."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Requests it is to have at a time."""
        ...

    @property
    def room_tokens(self) -> int:
        """Tokens that its KV cache holds; a longer request never fits."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """Measured by `start` where they depend on the machine."""
        ...

    def start(self) -> None:
        """Process up, weights loaded, a known answer recorded: WARM, not routable."""
        ...

    def hurry(self) -> None:
        """Requests wait for it: `start`, under way or to come, may take from others what
        else it would wait for. Any number of calls from any thread; quick."""
        ...

    def activate(self) -> None:
        """Wake it if it sleeps, and have it give the known answer: ACTIVE."""
        ...

    def quiesce(self) -> None:
        """Back to WARM. Whoever routes has seen to it that nothing is in flight."""
        ...

    def shrink(self) -> int:
        """While it drains: give up the KV memory that its requests cannot need any more.
        Bytes that it has given up on each of its GPUs; it has them again when it is next
        activated. 0 where an engine cannot do that. Quick, may be called often."""
        ...

    def stop(self) -> None:
        """End it and all its processes: asked first, killed after the grace. Never fails;
        any number of calls from any thread."""
        ...

    def alive(self) -> bool:
        """Whether its process is there and it answers; quick, may be called often."""
        ...

    def memory_bytes(self) -> int | None:
        """Bytes that it holds now on each of its GPUs, or of the host's memory where there
        are no GPUs; as measured, None where that cannot be."""
        ...


class MakeEngine(Protocol):
    def __call__(
        self, option: ReplicaOption, replica: ReplicaId, settings: EngineSettings
    ) -> Engine: ...


ENGINES: Mapping[str, str] = {
    "paged": "foreserve.runtime.engines.paged:make",
    "simulated": "foreserve.runtime.engines.simulated:make",
    "vllm": "foreserve.runtime.engines.vllm:make",
}
"""Kinds of engines, by dotted name; imported when used."""


def prepare(module: str, settings: EngineSettings) -> None:
    """Have ready what the node's engines share, if their module has something of that kind
    (its own ``prepare``). What fails now will fail the first load, too."""
    ahead = getattr(import_module(module), "prepare", None)
    if ahead is not None:
        with suppress(EngineFailed, OSError):
            ahead(settings)


def keep(module: str, settings: EngineSettings, llms: Collection[str]) -> None:
    """Have the weights of these stay in host memory before others, where engines of that
    module keep any there themselves (its own ``keep``). Returns at once."""
    told = getattr(import_module(module), "keep", None)
    if told is not None:
        told(settings, llms)


def maker(kind: str) -> MakeEngine:
    """What makes engines of ``kind``; nothing is started by making one."""
    if kind not in ENGINES:
        raise InvalidInput(f"engine {kind!r}: expected one of {', '.join(ENGINES)}")
    module, _, name = ENGINES[kind].partition(":")
    return cast(MakeEngine, getattr(import_module(module), name))
