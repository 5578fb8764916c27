"""An agent in a process of its own, behind a Unix socket: it outlives the controller.

`Hosted` is the controller's end. It starts the process where none answers, so a restarted
controller finds the agents, and the engines, that the last one left.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines.base import (
    Engine,
    EngineSettings,
    MakeEngine,
    keep,
    prepare,
)
from foreserve.runtime.engines.process import reap
from foreserve.runtime.live.agent import NodeAgent
from foreserve.runtime.live.binding import Binding
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.messages import Link, LinkLost, Place
from foreserve.runtime.live.patience import Patience

HUNG_S = 5.0
"""An agent that answers nothing for so long is ended, and another one started."""
START_S = 20.0
"""A process may take so long until it answers."""
PEER = struct.Struct("3i")
"""Process, user and group at the other end of a Unix socket."""
CALLS = ("hello", "order", "report", "forgive", "keep", "close")
"""All that comes over a link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSetup:
    """All that an agent needs to know when it starts."""

    node: str
    folder: Path
    """For logs and sockets; of this agent's machine."""
    fleet: Fleet
    make: str
    """``module:function`` of the engines' factory, a `MakeEngine`."""
    settings: EngineSettings
    """For the factory; the devices are filled in for each replica. Its folder is of this
    agent alone: processes that are on record there are ended when it starts."""
    binding: Binding = field(default_factory=Binding)
    patience: Patience = field(default_factory=Patience)
    made_with: Fleet | None = None
    """Whose options the engines are made with; None: ``fleet``, by which is booked."""


def setups(
    fleet: Fleet,
    folder: Path,
    make: str,
    settings: EngineSettings,
    patience: Patience | None = None,
    made_with: Fleet | None = None,
) -> dict[str, NodeSetup]:
    """One setup for each node of ``fleet``, all logs in ``folder``, the engines' folders in
    there by node; bound to nothing."""
    return {
        node.name: NodeSetup(
            node=node.name,
            folder=folder,
            fleet=fleet,
            make=make,
            settings=replace(settings, folder=folder / node.name),
            patience=patience or Patience(),
            made_with=made_with,
        )
        for node in fleet.cluster.nodes
    }


def make_agent(setup: NodeSetup) -> NodeAgent:
    """The agent, after what an earlier one of this log has left running was ended."""
    setup.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = IntentLog(setup.folder / f"{setup.node}.log")
    reap(setup.settings.folder)
    module, _, name = setup.make.partition(":")
    factory: MakeEngine = getattr(importlib.import_module(module), name)
    prepare(module, setup.settings)

    def make(option: ReplicaOption, key: ReplicaId) -> Engine:
        if setup.made_with is not None:
            real = setup.made_with.option_of(key.llm, key.gpus)
            option = replace(real, load_s=option.load_s)
        devices = setup.binding.of(key.gpus)
        return factory(option, key, replace(setup.settings, devices=devices))

    binding, pid = setup.binding, os.getpid()
    return NodeAgent(
        fleet=setup.fleet,
        node=setup.node,
        make=make,
        log=log,
        patience=setup.patience,
        place=Place(pid=pid, binding=binding, key=setup.settings.key),
        files=partial(weights_of, setup.settings),
        keep=partial(keep, module, setup.settings),
        facts={
            "date": datetime.now(UTC).isoformat(),
            "pid": pid,
            "machine": binding.machine,
            "devices": {str(gpu): i for gpu, i in binding.index_of.items()},
        },
    )


def weights_of(settings: EngineSettings, llm: str) -> tuple[Path, ...]:
    """Files of an LLM's weights on this machine, where its engine is told a folder; none
    where engines have their own copies, or there would be two."""
    if settings.keeps_weights:
        return ()
    folder = Path(settings.checkpoints.get(llm, ""))
    if llm not in settings.checkpoints or not folder.is_dir():
        return ()
    return tuple(sorted(folder.glob("*.safetensors")))


def dispatch(agent: NodeAgent, name: str, args: tuple[Any, ...]) -> Any:
    """Call the agent's method ``name``, if it is one of `CALLS`."""
    if name not in CALLS:
        raise ForeserveError(f"{name!r} is no call of an agent")
    return getattr(agent, name)(*args)


# --- the process -------------------------------------------------------------------------


def serve(file: Path) -> None:
    """Be the agent of a pickled setup, until the call `close`."""
    os.umask(0o077)  # nobody else may write to the socket, and so connect
    setup: NodeSetup = pickle.loads(file.read_bytes())
    agent = make_agent(setup)
    address = _socket_of(setup)
    address.unlink(missing_ok=True)
    closed = threading.Event()
    with Listener(str(address), "AF_UNIX", backlog=16) as listener:
        threading.Thread(
            target=_accept, args=(listener, agent, closed), daemon=True
        ).start()
        closed.wait()
    address.unlink(missing_ok=True)


def _accept(listener: Listener, agent: NodeAgent, closed: threading.Event) -> None:
    while not closed.is_set():
        with suppress(OSError):  # a caller that has gone already
            caller = listener.accept()
            threading.Thread(
                target=_answer, args=(caller, agent, closed), daemon=True
            ).start()


def _answer(
    caller: Connection[Any, Any], agent: NodeAgent, closed: threading.Event
) -> None:
    with caller, suppress(EOFError, OSError):
        while True:
            name, args = caller.recv()
            try:
                answer = (True, dispatch(agent, name, args))
            except Exception as error:  # raised again where it was called
                answer = (False, error)
            caller.send(answer)
            if name == "close":
                closed.set()


def _socket_of(setup: NodeSetup) -> Path:
    path = setup.folder.resolve() / f"{setup.node}.sock"
    if len(os.fsencode(path)) > 100:
        raise InvalidInput(f"{path}: too long for a socket's name")
    return path


# --- the controller's end ----------------------------------------------------------------


class _Pulse:
    """When an agent has answered last, over whichever link."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self.answered_s = 0.0
        self.owes = False
        """It did not answer in time, and not since."""

    def note(self, answered: bool) -> None:
        self.owes = not answered
        if answered:
            self.answered_s = self._clock.now_s()

    def silent_s(self) -> float:
        return self._clock.now_s() - self.answered_s


class _SocketLink:
    def __init__(self, connection: Connection[Any, Any], pulse: _Pulse) -> None:
        self._connection, self._pulse = connection, pulse

    def call(self, name: str, *args: Any, timeout_s: float) -> Any:
        try:
            self._connection.send((name, args))
            if not self._connection.poll(timeout_s):
                self._pulse.note(False)
                raise LinkLost(f"no answer to {name!r} within {timeout_s:g} s")
            good, answer = self._connection.recv()
        except (OSError, EOFError) as error:
            raise LinkLost(str(error) or type(error).__name__) from None
        self._pulse.note(True)
        if not good:
            raise answer
        return answer

    def close(self) -> None:
        self._connection.close()

    def pid(self) -> int:
        """The process at the other end. It is there for as long as the connection is."""
        with socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            told = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
        pid: int = PEER.unpack(told)[0]
        return pid

    def ended(self, within_s: float) -> bool:
        """Whether the other end is gone, or goes in time."""
        with suppress(OSError, EOFError):
            while self._connection.poll(within_s):
                self._connection.recv()
            return False
        return True


class Hosted:
    """Opens links to the agent of one node, in a process of this machine."""

    def __init__(self, setup: NodeSetup) -> None:
        self._setup, self._lock = setup, threading.Lock()
        self._pid: int | None = None
        self._pulse, self._known = _Pulse(), False
        folder = setup.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._address = _socket_of(setup)
        self._file = folder / f"{setup.node}.setup"
        self._out = folder / f"{setup.node}.out"

    def __call__(self) -> Link:
        """A new link; the process is started where nobody answers, or has not for
        `HUNG_S`. `LinkLost` if it does not come up."""
        with self._lock:
            link = self._connect()
            if link is not None and (
                self._of_others() or (self._pulse.owes and not self._answers(link))
            ):
                self._end(link)
                link = None
            if link is None:
                self._start()
                link = self._wait()
            return link

    def _connect(self) -> _SocketLink | None:
        try:
            return _SocketLink(Client(str(self._address), "AF_UNIX"), self._pulse)
        except OSError:
            return None

    def _of_others(self) -> bool:
        """Whether the agent that was found first has another fleet's books: it was started
        for an earlier scenario."""
        if self._known:
            return False
        self._known = True
        own = self._setup
        try:
            there: NodeSetup = pickle.loads(self._file.read_bytes())
            return (there.fleet, there.made_with) != (own.fleet, own.made_with)
        except OSError:
            return False
        except Exception:  # written by another version of this code
            return True

    def _answers(self, link: _SocketLink) -> bool:
        """Whether it says anything before it has been silent for `HUNG_S`."""
        try:
            link.call("report", timeout_s=max(0.5, HUNG_S - self._pulse.silent_s()))
        except LinkLost:
            return False
        return True

    def _end(self, link: _SocketLink) -> None:
        """End the agent behind a link. Its engines end with it, or, if those hang as well,
        when the next agent starts."""
        with suppress(ProcessLookupError):
            os.kill(link.pid(), signal.SIGKILL)
        last: _SocketLink | None = link
        while last is not None:  # its door may close a little later than this link
            if not last.ended(START_S):
                raise LinkLost(
                    f"the agent of {self._setup.node!r} hangs, and does not end"
                )
            last.close()
            last = self._connect()
        self._pulse.note(True)

    def _start(self) -> None:
        self._ended()
        if self._pid is not None:
            return  # on its way, or hanging
        temporary = self._file.with_suffix(".tmp")
        temporary.write_bytes(pickle.dumps(self._setup))
        temporary.replace(self._file)
        write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        # Not `subprocess`, which takes it for a fault that the child goes on without us.
        self._pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "foreserve.runtime.live", str(self._file)],
            os.environ,
            file_actions=(
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self._out), write, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ),
            setsid=True,
        )

    def _ended(self) -> int | None:
        """Exit code of the process that was started here, once it has ended."""
        if self._pid is None:
            return None
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return None
        self._pid = None
        return os.waitstatus_to_exitcode(status)

    def _wait(self) -> _SocketLink:
        clock, code = SystemClock(), None
        while code is None and clock.now_s() < START_S:
            link = self._connect()
            if link is not None:
                return link
            clock.wait(clock.now_s() + 0.05)
            code = self._ended()
        how = "does not answer" if code is None else f"ended with code {code}"
        raise LinkLost(f"the agent of {self._setup.node!r} {how}: see {self._out}")


class Local:
    """Opens links to an agent in this process."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    def __call__(self) -> Link:
        return self

    def call(self, name: str, *args: Any, timeout_s: float) -> Any:
        return dispatch(self._agent, name, args)

    def close(self) -> None:
        """Nothing to close."""


Open = Callable[[], Link]
