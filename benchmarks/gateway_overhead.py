"""What the gateway adds: the same engine asked directly and through it, turn about.

    PYTHONPATH=. python benchmarks/gateway_overhead.py

Engine, gateway and client are processes of their own. ``paced``: the engine says a token
every 50 ms, 20 in all, and 1, 32 or 256 streams run at any time, each beginning anew at
once when it ends; their first beginnings are spread over one stream's length.
``unpaced``: as fast as it goes. Rounds of both ways alternate; the quantiles are over all
requests of a way, the difference is that of the quantiles. Writes
benchmarks/results/gateway_overhead.json.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from os import getloadavg
from statistics import fmean
from typing import Any

import aiohttp
import click
import numpy as np
import uvloop
from record import write_result

from foreserve.models.placement import replica_id
from foreserve.models.specs import GpuId
from foreserve.runtime.gateway.app import public_app
from foreserve.runtime.gateway.gateway import Gateway
from foreserve.runtime.gateway.job import ServedLlm
from foreserve.runtime.gateway.server import Server
from foreserve.runtime.gateway.table import Routable, RoutingTable
from tests.echo_engine import EchoEngine

TOKENS, GAP_S = 20, 0.05
STREAMS = (1, 32, 256)
WARM_UP_S = 1.0


def engine(pipe: Connection) -> None:
    """The engine's process; ends when it is terminated."""
    with EchoEngine() as served:
        pipe.send(served.port)
        pipe.recv()


def gateway(pipe: Connection, engine_port: int) -> None:
    """The gateway's process."""
    table = RoutingTable(time.monotonic)
    made = Gateway(table=table, llms={"a": ServedLlm()}, rng=np.random.default_rng(0))
    server = Server(made, public_app(made))
    server.start()
    table.publish(
        [
            Routable(
                id=replica_id("a", (GpuId(node="n0", index=0),)),
                url=f"http://127.0.0.1:{engine_port}",
                max_num_seqs=1024,
                room_tokens=1 << 20,
                served_name="a",
            )
        ]
    )
    pipe.send(server.port)
    pipe.recv()
    server.stop(0.1)


class Round:
    """What one way of asking did in one round."""

    def __init__(self) -> None:
        self.ttft_s: list[float] = []
        self.total_s: list[float] = []
        self.tokens = 0
        self.seconds = 0.0


async def ask(
    session: aiohttp.ClientSession, url: str, gap_s: float, seen: Round
) -> None:
    """One stream, read to its end."""
    body = {
        "model": "a",
        "messages": [{"role": "user", "content": "x" * 400}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "echo": {"tokens": TOKENS} | ({"gap_s": gap_s} if gap_s else {}),
    }
    began_s = time.perf_counter()
    first_s, last = 0.0, b""
    async with session.post(url + "/v1/chat/completions", json=body) as answer:
        async for part in answer.content.iter_any():
            first_s = first_s or time.perf_counter()
            last = part
    if not last.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"a stream ended with {last!r}")
    seen.ttft_s.append(first_s - began_s)
    seen.total_s.append(time.perf_counter() - began_s)
    seen.tokens += TOKENS


async def one_round(url: str, streams: int, gap_s: float, for_s: float) -> Round:
    """Keep ``streams`` running for a while; what began after the warm-up counts."""
    seen, unseen = Round(), Round()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        start_s = time.perf_counter()
        counted_s = start_s + WARM_UP_S
        end_s = counted_s + for_s

        async def keep(index: int) -> None:
            await asyncio.sleep(index / streams * TOKENS * gap_s)
            while (now_s := time.perf_counter()) < end_s:
                await ask(session, url, gap_s, seen if now_s >= counted_s else unseen)

        await asyncio.gather(*(keep(i) for i in range(streams)))
        seen.seconds = time.perf_counter() - counted_s
    return seen


def compare(
    ways: dict[str, str], streams: int, gap_s: float, for_s: float, rounds: int
) -> dict[str, Any]:
    """One row: both ways, turn about, with the difference."""
    seen: dict[str, list[Round]] = {way: [] for way in ways}
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for way in order:
            seen[way].append(uvloop.run(one_round(ways[way], streams, gap_s, for_s)))
    row: dict[str, Any] = {"streams": streams, "rounds": rounds}
    rates = {}
    for way, found in seen.items():
        ttft_ms = 1000 * np.concatenate([r.ttft_s for r in found])
        rates[way] = fmean(r.tokens / r.seconds for r in found)
        row[way] = {
            "requests": len(ttft_ms),
            "ttft_p50_ms": round(float(np.quantile(ttft_ms, 0.5)), 3),
            "ttft_p99_ms": round(float(np.quantile(ttft_ms, 0.99)), 3),
            "e2el_p50_ms": round(
                1000
                * float(np.quantile(np.concatenate([r.total_s for r in found]), 0.5)),
                2,
            ),
            "tokens_per_s": round(rates[way], 1),
        }
    for name in ("ttft_p50_ms", "ttft_p99_ms"):
        row[f"added_{name}"] = round(row["gateway"][name] - row["direct"][name], 3)
    row["throughput_ratio"] = round(rates["gateway"] / rates["direct"], 4)
    return row


@click.command()
@click.option("--seconds", default=5.0, help="Counted seconds of each round.")
@click.option("--rounds", default=6, help="Rounds of each way.")
@click.option("--write/--no-write", default=True)
def main(seconds: float, rounds: int, write: bool) -> None:
    """Measure, print and write down."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, ports = [], [], []
    for target in (engine, gateway):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=target, args=(theirs, *ports), daemon=True)
        process.start()
        ports.append(ours.recv())
        pipes.append(ours)
        processes.append(process)
    names = ("direct", "gateway")
    ways = {n: f"http://127.0.0.1:{p}" for n, p in zip(names, ports, strict=True)}
    found: dict[str, list[dict[str, Any]]] = {"paced": [], "unpaced": []}
    for kind, gap_s in (("paced", GAP_S), ("unpaced", 0.0)):
        for streams in STREAMS:
            row = compare(ways, streams, gap_s, seconds, rounds)
            row["load_average"] = round(getloadavg()[0], 1)
            click.echo(f"{kind} {row}")
            found[kind].append(row)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    if write:
        write_result("gateway_overhead", {"tokens": TOKENS, "gap_s": GAP_S, **found})


if __name__ == "__main__":
    main()
