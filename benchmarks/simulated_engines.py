"""How true and how fast the server of simulated engines is.

    PYTHONPATH=. python benchmarks/simulated_engines.py

One server on one core, its clients in this process on another (what others took of the
server's core meanwhile is told in each row), all streams by raw HTTP
over kept connections. Pacing: the time from sending a request to its first token, and the
mean time between its tokens, as the client saw them, against the cost model's (which the
server tells with each answer), at real time. Capacity: engines whose cost model asks for
more than a core can say, each token in a chunk of its own where it keeps up (tokens that
are late are said together, so tokens per second go on rising where chunks do not); then
whole answers of one token, for requests per second. Then the same with a minute of the cost
model in a second. Writes benchmarks/results/simulated_engines.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from record import write_result

from foreserve.cli.common import read_traces
from foreserve.models.cost import IterationTime
from foreserve.models.placement import replica_id
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.engines.simulated import (
    SimulatedEngine,
    SimulatedSettings,
    close_node,
    node_of,
)
from foreserve.runtime.simulated.engine import EngineLimits
from foreserve.runtime.simulated.replay import replay

# About Llama 3.1 8B on an H100.
TIME = IterationTime(
    prefill_base_s=6e-3,
    prefill_s_per_token=2.5e-5,
    prefill_s_per_token2=1e-10,
    decode_base_s=6e-3,
    decode_s_per_seq=5e-5,
    decode_s_per_context_token=2e-8,
    relative_error=0.0,
    source="made up",
)
TIMES = re.compile(
    rb'"arrival_s": ([\d.e-]+), "joined_s": [\d.e-]+, '
    rb'"first_token_s": ([\d.e-]+), "end_s": ([\d.e-]+)'
)


@dataclass(slots=True)
class Seen:
    """What clients saw."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    model_ttft_s: list[float] = field(default_factory=list)
    model_tpot_s: list[float] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    chunks: int = 0


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered, while it may."""

    def __init__(self, request: bytes, tokens: int, until_s: float, seen: Seen) -> None:
        self.request, self.tokens, self.until_s, self.seen = (
            request,
            tokens,
            until_s,
            seen,
        )
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.sent_s, self.first_s, self.tail = time.perf_counter(), 0.0, b""
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now_s, seen = time.perf_counter(), self.seen
        said = data.count(b'"text":"')
        if said and not self.first_s:
            self.first_s = now_s
        seen.chunks += said
        self.tail = self.tail[-600:] + data
        if b'"end_s"' not in self.tail or not self.tail.endswith((b"}", b"0\r\n\r\n")):
            return
        times = TIMES.search(self.tail)
        assert times is not None
        arrival_s, first_s, end_s = map(float, times.groups())
        gaps = self.tokens - 1
        seen.requests += 1
        seen.tokens += self.tokens
        seen.ttft_s.append(self.first_s - self.sent_s)
        seen.model_ttft_s.append(first_s - arrival_s)
        if gaps:
            seen.tpot_s.append((now_s - self.first_s) / gaps)
            seen.model_tpot_s.append((end_s - first_s) / gaps)
        if now_s < self.until_s:
            self.ask()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)


async def load(
    engines: list[SimulatedEngine],
    streams: int,
    tokens: int,
    stream: bool,
    prompt_tokens: int,
    seconds: float,
) -> Seen:
    """``streams`` connections, spread over the engines, for so long."""
    loop, seen, until_s = (
        asyncio.get_running_loop(),
        Seen(),
        time.perf_counter() + seconds,
    )
    waits = []
    for number in range(streams):
        engine = engines[number % len(engines)]
        request, host, port = asking(engine, prompt_tokens, tokens, stream)
        _, client = await loop.create_connection(
            lambda request=request: Client(request, tokens, until_s, seen),
            host,
            port,
        )
        waits.append(client.done)
        await asyncio.sleep(min(0.003, 0.5 / streams))  # Not all in step.
    await asyncio.gather(*waits)
    return seen


class OpenLoop(asyncio.Protocol):
    """One request on a connection of its own, at its time."""

    def __init__(self, request: bytes) -> None:
        self.request, self.tail = request, b""
        self.first_s = self.last_s = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.last_s = time.perf_counter()
        if not self.first_s and b'"text":"' in data:
            self.first_s = self.last_s
        self.tail = self.tail[-600:] + data
        if self.tail.endswith(b"0\r\n\r\n"):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)


async def send_all(
    engines: list[SimulatedEngine], rows: list[tuple[float, int, int]], scale: float
) -> NDArray[np.float64]:
    """By request: TTFT and end as the client saw them, then as the engine says; all in
    seconds of the trace, from the request's arrival."""
    begin_s, waits, sent = time.perf_counter(), [], []
    loop = asyncio.get_running_loop()
    for number, (arrival_s, given, asked) in enumerate(rows):
        pause_s = begin_s + arrival_s / scale - time.perf_counter()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        engine = engines[number % len(engines)]
        request, host, port = asking(engine, given, asked, True)
        due_s = begin_s + arrival_s / scale
        waits.append(
            loop.create_task(
                loop.create_connection(lambda r=request: OpenLoop(r), host, port)
            )
        )
        sent.append(due_s)
    clients = [client for _, client in await asyncio.gather(*waits)]
    await asyncio.gather(*(client.done for client in clients))
    found = []
    for client, due_s in zip(clients, sent, strict=True):
        times = TIMES.search(client.tail)
        assert times is not None
        arrival_s, first_s, end_s = map(float, times.groups())
        seen = [scale * (client.first_s - due_s), scale * (client.last_s - due_s)]
        found.append([*seen, first_s - arrival_s, end_s - arrival_s])
    return np.array(found)


def same_trace(scale: float, cores: list[int], span_s: float = 600.0) -> dict[str, Any]:
    recorded = read_traces(["sample:azure-2023"], {})
    own = recorded.llm == recorded.llms.index("conv")
    arrivals = recorded.arrival_s[own]
    count = int(np.searchsorted(arrivals, arrivals[0] + span_s))
    rows = [
        (float(a - arrivals[0]), int(i), int(o))
        for a, i, o in zip(
            arrivals[:count],
            recorded.input_tokens[own][:count],
            recorded.output_tokens[own][:count],
            strict=True,
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = SimulatedSettings(
            folder=Path(folder), time_scale=scale, tick_s=0.005
        )
        engines, _ = started(settings, 4, cores)
        found = asyncio.run(send_all(engines, rows, scale))
        close_node(settings.folder)
    room = engines[0].room_tokens
    limits = EngineLimits(max_num_seqs=256)
    simulated = replay(TIME, room, limits, rows, replicas=4)
    arrival_s = np.array([row[0] for row in rows])
    first_s = simulated.first_token_s - arrival_s
    columns = {
        "clients": found[:, :2],
        "engines": found[:, 2:],
        "simulator": np.stack([first_s, simulated.end_s - arrival_s], 1),
    }
    row: dict[str, Any] = {"scale": scale, "requests": count}
    for who, values in columns.items():
        for what, each in zip(("ttft", "e2e"), values.T, strict=True):
            for q in (50, 99):
                row[f"{who}_{what}_p{q}_s"] = round(float(np.percentile(each, q)), 4)
    return row


def started(
    settings: SimulatedSettings, replicas: int, cores: list[int]
) -> tuple[list[SimulatedEngine], int]:
    """Engines that serve, and their server's process, alone on the first core."""
    engines = []
    for number in range(replicas):
        name = f"llm-{number}"
        replica = replica_id(name, (GpuId(node="n0", index=number),))
        engine = SimulatedEngine(option(name), replica, settings)
        engine.start()
        engine.activate()
        engines.append(engine)
    child = node_of(settings).child
    (server,) = (pid for pid in child.pids() if pid != child.session)
    os.sched_setaffinity(server, {cores[0]})
    return engines, server


def asking(
    engine: SimulatedEngine, prompt_tokens: int, tokens: int, stream: bool
) -> tuple[bytes, str, int]:
    """A request as bytes, and where it goes."""
    where = re.match(r"http://([\d.]+):(\d+)(.*)", engine.url)
    assert where is not None
    body: dict[str, Any] = {"model": engine.served_name, "prompt": [1] * prompt_tokens}
    body |= {"max_tokens": tokens, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    text = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {where[3]}/v1/completions HTTP/1.1\r\nhost: x\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    return head.encode() + text, where[1], int(where[2])


def option(llm: str) -> ReplicaOption:
    return ReplicaOption(
        llm=llm,
        gpu_type="h100",
        tp=1,
        resident_bytes=16 * 2**30,
        kv_bytes=40 * 2**30,
        kv_token_bytes=2**17,
        concurrency=256,
        rate_rps=10.0,
        exec_s=1.0,
        load_s=0.01,
        activate_s=0.01,
        ttft_s=0.1,
        tpot_s=0.01,
        time=TIME,
    )


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_core_s(core: int) -> float:
    """Seconds that a core has worked, for whomever."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            user, nice, system, _, _, irq, soft = map(int, line.split()[1:8])
            return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    raise ValueError(f"no core {core}")


def measure(
    replicas: int,
    streams: int,
    *,
    tokens: int = 64,
    stream: bool = True,
    prompt_tokens: int = 200,
    scale: float = 1.0,
    tick_ms: float = 1.0,
    seconds: float,
    cores: list[int],
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = SimulatedSettings(
            folder=Path(folder), time_scale=scale, tick_s=tick_ms / 1000
        )
        engines, server = started(settings, replicas, cores)
        core_s = busy_core_s(cores[0])
        busy_s, begin_s = cpu_s(server), time.perf_counter()
        seen = asyncio.run(
            load(engines, streams, tokens, stream, prompt_tokens, seconds)
        )
        wall_s = time.perf_counter() - begin_s
        busy_s = cpu_s(server) - busy_s
        core_s = busy_core_s(cores[0]) - core_s
        rss = Path(f"/proc/{server}/status").read_text()
        close_node(settings.folder)
    row: dict[str, Any] = {
        "replicas": replicas,
        "streams": streams,
        "tokens": tokens,
        "streamed": stream,
        "scale": scale,
        "tick_ms": tick_ms,
        "requests": seen.requests,
        "requests_per_s": round(seen.requests / wall_s, 1),
        "tokens_per_s": round(seen.tokens / wall_s),
        "chunks_per_s": round(seen.chunks / wall_s),
        "server_core_share": round(busy_s / wall_s, 3),
        "others_core_share": round(max(0.0, core_s - busy_s) / wall_s, 3),
        "server_us_per_chunk": round(1e6 * busy_s / max(1, seen.chunks), 1),
        "server_mib": round(int(re.findall(r"VmRSS:\s+(\d+)", rss)[0]) / 1024),
    }
    late = 1000 * (np.array(seen.ttft_s) - np.array(seen.model_ttft_s) / scale)
    row |= {"ttft_late_ms_p50": late, "ttft_late_ms_p99": late}
    row["ttft_late_ms_p50"], row["ttft_late_ms_p99"] = (
        round(float(np.percentile(late, q)), 2) for q in (50, 99)
    )
    row["model_ttft_ms_p50"] = round(
        1000 / scale * float(np.median(seen.model_ttft_s)), 2
    )
    if seen.tpot_s:
        model = np.array(seen.model_tpot_s) / scale
        error = np.abs(np.array(seen.tpot_s) / model - 1)
        row["model_tpot_ms_p50"] = round(1000 * float(np.median(model)), 3)
        row["tpot_error_p50"] = round(float(np.percentile(error, 50)), 4)
        row["tpot_error_p99"] = round(float(np.percentile(error, 99)), 4)
    return row


@click.command()
@click.option("--seconds", default=5.0, show_default=True, help="Of each row.")
@click.option("--write/--no-write", default=True)
def main(seconds: float, write: bool) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {cores[-1]})
    plans: dict[str, list[dict[str, Any]]] = {
        "pacing": [
            {"replicas": 1, "streams": 1},
            {"replicas": 1, "streams": 32},
            {"replicas": 16, "streams": 64},
            {"replicas": 100, "streams": 100},
        ],
        "capacity": [
            {"replicas": 100, "streams": 200},
            {"replicas": 100, "streams": 500},
            {"replicas": 100, "streams": 500, "tick_ms": 20.0},
            {"replicas": 16, "streams": 64, "tokens": 1, "stream": False, "scale": 1e3},
        ],
        "a minute in a second": [
            {"replicas": 16, "streams": 32, "scale": 60.0, "tick_ms": 20.0},
            {"replicas": 32, "streams": 128, "scale": 60.0, "tick_ms": 20.0},
        ],
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for part, rows in plans.items():
        found[part] = []
        for asked in rows:
            row = measure(**asked, seconds=seconds, cores=cores)
            found[part].append(row)
            click.echo(f"{part}: {json.dumps(row)}")
    found["same trace"] = []
    for scale in (20.0, 60.0):
        row = same_trace(scale, cores)
        found["same trace"].append(row)
        click.echo(f"same trace: {json.dumps(row)}")
    if write:
        write_result("simulated_engines", {"seconds": seconds, **found})


if __name__ == "__main__":
    main()
