"""A cluster that serves, clients that ask it, and all that may be done to it: for the
small fault run of the tests and the long one of the benchmarks.

`Supervised` is `plan serve` in a process of its own, started again when it has been killed,
as a supervisor would. `Clients` send requests over HTTP and keep how each one ended.
`FAULTS` are what is done, by name; each returns the LLMs whose replicas it takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp

from foreserve.runtime.live.check import Found, check

STARTS_S = 30.0
LATE_S = 5.0
"""A request that goes on for so long after its deadline counts as hanging."""
IN_A_ROW = 3
"""Probes that must be answered before an LLM counts as recovered."""
PROBE_S = 2.0
"""What a probe is given, and so what counts as answered in time."""
PACE_S = 0.25
"""Between probes."""
LOST_S = 20.0
"""For how long a lost node is stopped."""
SLOW_S = 3.5
"""For how long an agent is stopped that only was slow."""


@dataclass(slots=True, kw_only=True)
class Sent:
    """One request, and what its client saw of it."""

    llm: str
    probe: bool
    sent_s: float
    first_s: float | None = None
    end_s: float = 0.0
    outcome: str = ""
    """``ok``; a status, or ``event``, with the error's code; ``broken`` or ``refused``: the
    connection. Never are to be: ``late`` (still nothing `LATE_S` after its deadline) and
    ``cut`` (a stream that ended well and was not whole)."""

    @property
    def silent(self) -> bool:
        """It ended without the client being told how."""
        return self.outcome in ("late", "cut", "")


class Clients:
    """All that is sent, on connections that are used again."""

    def __init__(self, port: int, deadline_s: float) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/completions"
        self.deadline_s = deadline_s
        self.sent: list[Sent] = []
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Clients:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(self, *ending: object) -> None:
        await self._session.close()

    async def ask(
        self, llm: str, prompt_tokens: int, tokens: int, *, probe: bool = False
    ) -> Sent:
        """A request, streamed."""
        found = Sent(llm=llm, probe=probe, sent_s=monotonic())
        self.sent.append(found)
        deadline_s = PROBE_S if probe else self.deadline_s
        body = {
            "model": llm,
            "prompt": [1] * prompt_tokens,
            "max_tokens": tokens,
            "stream": True,
        }
        headers = {"x-foreserve-deadline": f"{deadline_s:g}"}
        try:
            async with (
                asyncio.timeout(deadline_s + LATE_S),
                self._session.post(self.url, json=body, headers=headers) as answer,
            ):
                found.outcome = await _read(answer, found)
        except TimeoutError:
            found.outcome = "late"
        except aiohttp.ClientConnectorError:
            found.outcome = "refused"
        except (aiohttp.ClientError, ConnectionError):
            found.outcome = "broken"
        found.end_s = monotonic()
        return found

    async def outage(
        self, llm: str, since_s: float, seen: Callable[[], bool] = lambda: True
    ) -> float:
        """Seconds from ``since_s`` until ``llm`` was answered again, by the first probe
        after the last one that failed; 0 if none did. Probes go on until the fault has been
        ``seen`` by the cluster, and `IN_A_ROW` that were sent after that were answered."""
        probes: list[asyncio.Task[Sent]] = []
        seen_s: float | None = None
        while True:
            probes.append(asyncio.create_task(self.ask(llm, 1, 1, probe=True)))
            await asyncio.sleep(PACE_S)
            if seen_s is None and seen():
                seen_s = monotonic()
            good: list[Sent] = []
            failed = False
            for probe in probes:
                if not probe.done():
                    break
                if probe.result().outcome == "ok":
                    good.append(probe.result())
                else:
                    failed, good = True, []
            after = [p for p in good if seen_s is not None and p.sent_s > seen_s]
            if len(after) >= IN_A_ROW:
                await asyncio.gather(*probes)
                again_s = min(p.first_s or p.end_s for p in good)
                return again_s - since_s if failed else 0.0

    def outcomes(
        self, *, probes: bool = False, begin_s: float = 0.0, end_s: float = 1e12
    ) -> dict[str, int]:
        return dict(
            Counter(
                sent.outcome
                for sent in self.sent
                if sent.probe == probes and begin_s <= sent.end_s < end_s
            )
        )


async def _read(answer: aiohttp.ClientResponse, found: Sent) -> str:
    if answer.status != 200:
        error = (await answer.json())["error"]
        return f"{answer.status} {error['code']}"
    tail = b""
    async for data in answer.content.iter_any():
        if found.first_s is None:
            found.first_s = monotonic()
        tail = (tail + data)[-4096:]
    if tail.endswith(b"data: [DONE]\n\n"):
        return "ok"
    last = tail.rstrip().rpartition(b"data: ")[2]
    with suppress(ValueError, KeyError, TypeError):
        return f"event {json.loads(last)['error']['code']}"
    return "cut"


class Supervised:
    """`plan serve` over ``folder``."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        """``words``: of the command line, but for port and state."""
        self.folder, self.state = folder, folder / "st"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._words = [*words, "--state", "st", "--port", str(self.port)]
        self.starts = 0
        self._read = self._faults = 0
        self.start()

    def start(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "foreserve", "serve", *self._words],
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        self.starts += 1

    async def up(self) -> None:
        """Until it serves."""
        until_s = monotonic() + STARTS_S
        while self.about().get("pid") != self.process.pid:
            if self.process.poll() is not None or monotonic() > until_s:
                raise RuntimeError((self.folder / "serve.log").read_text())
            await asyncio.sleep(0.05)

    def about(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.state / "admin.json").read_text())
            return found
        return {}

    async def admin(self, path: str) -> Any:
        about = self.about()
        url = f"http://127.0.0.1:{about['admin_port']}/admin/v1/{path}"
        headers = {"authorization": f"Bearer {about['token']}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(url) as answer,
        ):
            answer.raise_for_status()
            return await answer.json()

    async def whole(self) -> None:
        """Until every node answers."""
        while any(row["error"] for row in (await self.admin("status"))["nodes"]):
            await asyncio.sleep(0.1)

    async def active(self) -> dict[str, list[str]]:
        """The nodes of the ACTIVE replicas of each LLM that has any."""
        found: dict[str, list[str]] = {}
        for row in (await self.admin("status"))["observed"]:
            if row["phase"] == "ACTIVE":
                node = row["gpus"][0].rpartition("/")[0]
                found.setdefault(row["llm"], []).append(node)
        return found

    async def single(self, llms: Sequence[str]) -> tuple[str, str]:
        """The first of ``llms`` that has just one ACTIVE replica, once there is one, and
        the node of that."""
        while True:
            active = await self.active()
            for llm in llms:
                if len(active.get(llm, ())) == 1:
                    return llm, active[llm][0]
            await asyncio.sleep(0.1)

    async def url_of(self, llm: str) -> str:
        """Of an ACTIVE replica's engine."""
        for row in await self.admin("engines"):
            of_llm = row["replica"].partition("@")[0] == llm
            if of_llm and row["phase"] == "ACTIVE":
                return str(row["url"])
        raise LookupError(llm)

    def faults(self) -> int:
        """How many the journal tells of."""
        with (self.state / "journal.jsonl").open("rb") as file:
            file.seek(self._read)
            text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            self._read += len(text)
        self._faults += text.count(b'"event":"fault"')
        return self._faults

    def failed_loads(self) -> list[str]:
        """The replicas."""
        lines = (self.state / "journal.jsonl").read_text().splitlines()
        faults = (json.loads(line) for line in lines if '"load-failure"' in line)
        return [fault["target"] for fault in faults]

    def stop(self) -> None:
        """As `plan stop` does it; agents and engines end as well."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60.0)

    # Processes.

    def agent(self, node: str) -> int:
        """The process of the node's agent: the last that its log tells of."""
        pid = 0
        for line in (self.state / f"{node}.log").read_text().splitlines():
            event = json.loads(line)
            pid = event["pid"] if event["event"] == "start" else pid
        return pid

    def guard(self, node: str) -> int:
        """Of the engine server; the store of weights has one of its own."""
        files = (self.state / node).glob("*.process.json")
        (record,) = (file for file in files if not file.name.startswith("store"))
        session: int = json.loads(record.read_text())["session"]
        return session

    def engines(self, node: str) -> list[int]:
        """The node's engine server, without its guard."""
        guard = self.guard(node)
        return [pid for pid, _, session in processes() if session == guard != pid]

    def engine_port(self, node: str) -> int:
        """Where the node's engine server listens."""
        (pid,) = self.engines(node)
        files = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in files:
                return int(fields[1].partition(":")[2], 16)
        raise LookupError(node)

    def nodes(self) -> list[str]:
        return sorted(path.stem for path in self.state.glob("*.setup"))

    def solver(self) -> int | None:
        for pid, parent, _ in processes():
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_text()
                if parent == self.process.pid and "solvers.child" in line:
                    return pid
        return None


def processes() -> Iterable[tuple[int, int, int]]:
    """Process, parent and session of all that are there."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            text = Path(f"/proc/{name}/stat").read_bytes()
            fields = text.rpartition(b")")[2].split()
            if fields[0] not in (b"Z", b"X"):
                yield int(name), int(fields[1]), int(fields[3])


@dataclass(slots=True)
class Scene:
    """Where a fault happens."""

    run: Supervised
    node: str
    """For faults of a node."""
    llm: str
    """For faults of an engine: has one ACTIVE replica."""
    seen: Callable[[], bool]
    """Whether the cluster has seen it."""
    later: list[asyncio.Task[None]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    """Processes that were stopped for so long that others take their place."""
    lost_s: float = 0.0

    async def of_node(self) -> list[str]:
        return [llm for llm, at in (await self.run.active()).items() if self.node in at]

    async def ended(self) -> float:
        """Seconds until none of the lost was left; `LOST_S` if they went on instead."""
        while set(self.lost) & {pid for pid, _, _ in processes()}:
            if monotonic() > self.lost_s + LOST_S:
                return LOST_S
            await asyncio.sleep(0.05)
        return monotonic() - self.lost_s if self.lost else 0.0


Fault = Callable[[Scene], Awaitable[list[str]]]


async def engine_server_killed(scene: Scene) -> list[str]:
    hit = await scene.of_node()
    for pid in scene.run.engines(scene.node):
        os.kill(pid, signal.SIGKILL)
    return hit


async def guard_killed(scene: Scene) -> list[str]:
    hit = await scene.of_node()
    os.kill(scene.run.guard(scene.node), signal.SIGKILL)
    return hit


async def agent_killed(scene: Scene) -> list[str]:
    hit = await scene.of_node()
    os.kill(scene.run.agent(scene.node), signal.SIGKILL)
    return hit


async def agent_slow(scene: Scene) -> list[str]:
    """Stopped for less than an agent may be silent: it comes back as it was."""
    hit = await scene.of_node()
    _stop_for(scene, [scene.run.agent(scene.node)], SLOW_S)
    return hit


async def node_lost(scene: Scene) -> list[str]:
    """Agent, guard and engines are stopped; what is left of them goes on `LOST_S` later."""
    run, node = scene.run, scene.node
    hit = await scene.of_node()
    _lose(scene, [run.agent(node), run.guard(node), *run.engines(node)])
    return hit


async def engine_server_hangs(scene: Scene) -> list[str]:
    """The node's engine server is stopped, under a guard that goes on."""
    hit = await scene.of_node()
    _lose(scene, scene.run.engines(scene.node))
    return hit


def _lose(scene: Scene, pids: list[int]) -> None:
    scene.lost, scene.lost_s = pids, monotonic()
    _stop_for(scene, pids, LOST_S)


def _stop_for(scene: Scene, pids: list[int], seconds: float) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    async def go_on() -> None:
        await asyncio.sleep(seconds)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    scene.later.append(asyncio.create_task(go_on()))


async def engine_hangs(scene: Scene) -> list[str]:
    await _post(f"{await scene.run.url_of(scene.llm)}/fail", {"kind": "hang"})
    return [scene.llm]


async def load_fails(scene: Scene) -> list[str]:
    """The engine dies, and the next load of the LLM fails at its end, wherever it is."""
    run, llm = scene.run, scene.llm
    roots = {node: f"http://127.0.0.1:{run.engine_port(node)}" for node in run.nodes()}
    before = len(run.failed_loads())
    for root in roots.values():
        await _post(f"{root}/fail", {"llm": llm, "times": 1})
    await _post(f"{await run.url_of(llm)}/fail", {"kind": "die"})

    async def spare_the_others() -> None:
        while len(run.failed_loads()) == before:
            await asyncio.sleep(0.1)
        failed = run.failed_loads()[before].partition("@")[2].partition("/")[0]
        for node, root in roots.items():
            if node != failed:
                await _post(f"{root}/fail", {"llm": llm, "times": -1})

    scene.seen = lambda: len(run.failed_loads()) > before
    scene.later.append(asyncio.create_task(spare_the_others()))
    return [llm]


async def weights_gone(scene: Scene) -> list[str]:
    """The file of an LLM's weights is away when its node's engine server is killed, and
    comes back once a load has failed for it. The LLM's checkpoint lies in a folder of its
    name beside the scenario."""
    run, file = scene.run, scene.run.folder / scene.llm / "model.safetensors"
    before = len(run.failed_loads())
    away = file.with_suffix(".away")
    file.rename(away)
    hit = await engine_server_killed(scene)
    scene.seen = lambda: len(run.failed_loads()) > before

    async def put_back() -> None:
        try:
            while not scene.seen():
                await asyncio.sleep(0.05)
        finally:
            away.rename(file)

    scene.later.append(asyncio.create_task(put_back()))
    return hit


async def solver_killed(scene: Scene) -> list[str]:
    until_s = monotonic() + 30.0
    while (pid := scene.run.solver()) is None:
        if monotonic() > until_s:
            raise RuntimeError("no solver")
        await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return []


async def serve_killed(scene: Scene) -> list[str]:
    """Controller, gateway and planner at once; started again at once."""
    hit = list(await scene.run.active())
    scene.run.process.kill()
    scene.run.process.wait()
    scene.run.start()
    scene.seen = lambda: True
    return hit


async def _post(url: str, body: Mapping[str, Any]) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body) as answer,
    ):
        answer.raise_for_status()


FAULTS: Mapping[str, Fault] = {
    "engine server killed": engine_server_killed,
    "guard of engines killed": guard_killed,
    "agent killed": agent_killed,
    "agent stopped for 3.5 s": agent_slow,
    "engine hangs": engine_hangs,
    "engine dies, its load fails": load_fails,
    "solver killed": solver_killed,
    "plan serve killed": serve_killed,
    "node stopped for 20 s": node_lost,
}


REAL: Mapping[str, Fault] = {
    "engine server hangs": engine_server_hangs,
    "weights gone for a load": weights_gone,
}
"""Only of engines that have a process and weights to read."""


async def inflict(
    run: Supervised, clients: Clients, kind: str, node: str, llm: str
) -> tuple[Scene, dict[str, float]]:
    """Do it, and wait until it is over: the scene, and the outage of each LLM it took."""
    before = run.faults()
    scene = Scene(run, node, llm, seen=lambda: run.faults() > before)
    begin_s = monotonic()
    hit = await {**FAULTS, **REAL}[kind](scene)
    _, *outages = await asyncio.gather(
        run.up(), *(clients.outage(llm, begin_s, scene.seen) for llm in hit)
    )
    return scene, dict(zip(hit, outages, strict=True))


async def one_after_the_other(
    served: Supervised,
    clients: Clients,
    kinds: Sequence[str],
    llms: Sequence[str],
    asked: Callable[[str], Awaitable[object]],
    every_s: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """The faults under load, each LLM ``asked`` every so many seconds. By fault: the
    longest outage, and after how long the processes that were lost in it had been ended.
    All that was asked has ended, and so has ``served``, when this returns."""
    took_s: dict[str, float] = {}
    ended_s: dict[str, float] = {}
    await served.up()
    ended = asyncio.Event()

    async def ask_on() -> None:
        async with asyncio.TaskGroup() as group:
            while not ended.is_set():
                for llm in llms:
                    group.create_task(asked(llm))
                await asyncio.sleep(every_s)

    load = asyncio.create_task(ask_on())
    try:
        await asyncio.gather(*(clients.outage(llm, monotonic()) for llm in llms))
        for kind in kinds:
            await served.whole()
            llm, node = await served.single(llms)
            scene, outages = await inflict(served, clients, kind, node, llm)
            took_s[kind] = max(outages.values())
            ended_s[kind] = await scene.ended()
            for task in scene.later:
                task.cancel()
            await asyncio.gather(*scene.later, return_exceptions=True)
    finally:
        ended.set()
        await load
        served.stop()
    return took_s, ended_s


def conserved(clients: Clients, state: Path) -> Found:
    """What the logs say, once it is checked: in them no GPU was over-committed at any
    line, and each accepted request has one end. Every client heard how its request ended,
    breaks in a connection come from a killed gateway alone, and there are as many requests
    as clients saw."""
    assert not [sent for sent in clients.sent if sent.silent]
    found = check(state)
    assert found.faults == []
    assert found.unfinished == 0
    assert max(found.peak.values()) <= 1.0
    ok = sum(sent.outcome == "ok" for sent in clients.sent)
    gone = sum(sent.outcome in ("broken", "refused") for sent in clients.sent)
    assert ok <= found.ends["finished"] <= ok + gone
    assert len(clients.sent) - gone <= found.requests <= len(clients.sent)
    assert found.ends["gateway_lost"] <= gone
    return found
