"""Engines that share a server process: engine ``n`` answers under ``/r/n`` of its port."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.runtime.engines.base import EngineFailed, EngineSettings, NoRoom
from foreserve.runtime.engines.calls import NoAnswer, NotInTime, call
from foreserve.runtime.engines.process import Child

KEY = "FORESERVE_ENGINE_KEY"
"""Variable that tells the server its key: others may read command lines."""
NO_ROOM = 507
"""Status of a load that found no room for now."""


class HostServer:
    """A server process; started at once."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        settings: EngineSettings,
        *,
        name: str,
        answers_within_s: float,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """``python -m module --fd N arguments``; ``name``: of its log."""
        self.settings, self._name = settings, name
        self._answers_within_s = answers_within_s
        listener = socket.create_server((settings.host, 0), backlog=1024)
        self.port: int = listener.getsockname()[1]
        with listener:
            fd = listener.fileno()
            self.child = Child(
                [python or sys.executable, "-m", module, "--fd", str(fd), *arguments],
                settings.folder,
                name,
                grace_s=settings.stop_grace_s,
                env={**(env or {}), KEY: settings.key},
                pass_fds=[fd],
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
        within_s = wait_s + self._answers_within_s
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
            kind = NoRoom if error.status == NO_ROOM else EngineFailed
            raise kind(f"{self._name} engine: {what}") from error

    def hangs(self) -> bool:
        """Whether it runs, and does not say so in time."""
        try:
            self.call("GET", "/health")
        except EngineFailed as error:
            return isinstance(error.__cause__, NotInTime)
        return False


class HostedEngine:
    """An engine of a `HostServer`; kinds add how it starts and is woken."""

    def __init__(
        self,
        option: ReplicaOption,
        replica: ReplicaId,
        server: Callable[[], HostServer],
    ) -> None:
        """``server``: the one it belongs to, started if there is none."""
        self.option, self.replica = option, replica
        self._server = server
        self._node: HostServer | None = None
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

    def begin(self, spec: dict[str, Any]) -> None:
        """Have an engine of the server's, which has nothing loaded."""
        try:
            node = self._server()
        except OSError as error:
            raise EngineFailed(f"no server: {error}") from error
        with self._guard:
            if self._stopped:
                raise EngineFailed("stopped before it was started")
            self._node = node
            made = node.call("POST", "/engines", spec, wait_s=30.0)
            self._number = made["number"]

    def hurry(self) -> None:
        """Nothing to do: loads do not wait for each other."""

    def quiesce(self) -> None:
        self._call("POST", "sleep?level=1")

    def stop(self) -> None:
        with self._guard:
            self._stopped = True
            node, number = self._node, self._number
        if node is None or number is None:
            return
        if node.hangs():
            # What it holds is free only when it has ended, and all engines with it.
            node.child.kill()
        else:
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

    def _made(self) -> tuple[HostServer, int]:
        if self._node is None or self._number is None or self._stopped:
            raise EngineFailed("not started, or stopped")
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
