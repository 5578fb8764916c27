"""Malformed and hostile requests against the gateway's public port.

    PYTHONPATH=. python benchmarks/gateway_fuzz.py

10,000 of them, drawn from a seed, each on a connection of its own, 32 at a time: bytes that
are no HTTP, broken and mistyped JSON, bad UTF-8, bodies too large, too slow or cut off,
abused headers, request smuggling, tricks with paths and methods. Among them, every 50th is
a good one and must be answered. Wanted: no answer of 500 or above; nothing in the log of
the gateway's process (uvicorn's errors, all others' warnings, standard error); memory flat
from the 2,000th on; no request left at the engine. Limits of time are shorter than by
default, so that slow ones end. Writes benchmarks/results/gateway_fuzz.json; fails if
something is not as wanted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import uvloop
from numpy.random import Generator
from record import write_result

from foreserve.runtime.gateway import server
from foreserve.runtime.gateway.gateway import Settings
from tests.gateway_stand import stand

CHAT = "/v1/chat/completions"
BODY_BYTES = 64 << 10
GOOD = {
    "model": "a",
    "messages": [{"role": "user", "content": "hello"}],
    "stream": True,
}
KNOWN = ("model", "messages", "stream", "stream_options", "n", "max_tokens", "prompt")

Made = tuple[bytes, float]
"""What to send, and seconds to wait before its second half."""


def post(body: bytes, *headers: bytes, path: str = CHAT) -> bytes:
    """A POST with the right length, closing its connection."""
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"host: x", b"connection: close"]
    lines += [*headers, b"content-length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(path: bytes, method: bytes = b"GET", *headers: bytes) -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"host: x", b"connection: close"]
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n"


def noise(rng: Generator) -> Made:
    """Bytes that are no HTTP, or only begin as if."""
    data = rng.bytes(int(rng.integers(1, 2000)))
    start = rng.choice([b"", b"GET ", b"POST /v1/", b"PRI * HTTP/2.0\r\n\r\n", b"\r\n"])
    return bytes(start) + data + b"\r\n\r\n", 0.0


def broken_json(rng: Generator) -> Made:
    """A good body, cut off or with bytes changed."""
    body = bytearray(json.dumps(GOOD).encode())
    if rng.random() < 0.5:
        del body[int(rng.integers(len(body))) :]
    for _ in range(int(rng.integers(0, 6))):
        if body:
            body[int(rng.integers(len(body)))] = int(rng.integers(256))
    return post(bytes(body)), 0.0


def value(rng: Generator, depth: int = 0) -> Any:
    """Any JSON."""
    kind = int(rng.integers(10 if depth < 3 else 7))
    simple = (None, True, -1, 1e308, 2**63, "\ud800", "a" * int(rng.integers(300)))
    if kind < 7:
        return simple[kind]
    parts = [value(rng, depth + 1) for _ in range(int(rng.integers(4)))]
    return parts if kind < 9 else {f"k{i}": part for i, part in enumerate(parts)}


def wrong_types(rng: Generator) -> Made:
    """Fields that we read, with values they should not have."""
    fields = dict(GOOD)
    for _ in range(int(rng.integers(1, 4))):
        fields[str(rng.choice(KNOWN))] = value(rng)
    path = CHAT if rng.random() < 0.7 else "/v1/completions"
    return post(json.dumps(fields).encode(), path=path), 0.0


def odd_json(rng: Generator) -> Made:
    """What parsers differ on, or break on."""
    body = [
        b"[" * 50_000,
        b'{"a":' * 10_000,
        b'{"model": "a", "model": "b"}',
        b'{"model": "a", "messages": [{}], "seed": ' + b"9" * 6000 + b"}",
        b'{"model": "a", "messages": [{}], "temperature": -Infinity}',
        b'{"model": "a", "messages": [{}], "temperature": 1e99999}',
        b'\xef\xbb\xbf{"model": "a"}',
        json.dumps(GOOD).encode("utf-16"),
        json.dumps({**GOOD, "model": "x" * 60_000}).encode(),
        b'{"model": "\\ud800", "messages": [{}]}',
        b'{"model": "a\\u0000", "messages": [{}]}',
        b"\x1f\x8b\x08\x00" + rng.bytes(100),
        b"null",
        b"",
    ]
    return post(body[int(rng.integers(len(body)))]), 0.0


def large(rng: Generator) -> Made:
    """A body above the limit: announced, or only found out."""
    size = BODY_BYTES + int(rng.integers(1, BODY_BYTES))
    if rng.random() < 0.5:
        return post(b"x" * size), 0.0
    head = get(CHAT.encode(), b"POST", b"transfer-encoding: chunked")
    return head + b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n", 0.0


def slow(rng: Generator) -> Made:
    """Half of it, and the rest too late, or never."""
    return post(json.dumps(GOOD).encode()), float(rng.choice([0.6, 60.0]))


def cut_off(rng: Generator) -> Made:
    """A connection that ends somewhere in the middle."""
    whole = post(json.dumps(GOOD).encode())
    return whole[: int(rng.integers(1, len(whole)))], -1.0


def headers(rng: Generator) -> Made:
    """Names, values, numbers and sizes that headers should not have."""
    many = [b"x-%d: y" % i for i in range(3000)]
    kinds: list[list[bytes]] = [
        [b"x: " + b"y" * 100_000],
        many,
        [b"x-request-id: " + rng.bytes(20).replace(b"\n", b"")],
        [b"x-request-id: a\r\nset-cookie: b=c"],
        [b"x-foreserve-max-wait: -1"],
        [b"x-foreserve-max-wait: 1e400"],
        [b"x-foreserve-deadline: \xff"],
        [b"x-foreserve-deadline: 99999999999999"],
        [b"x-slo-ttft-ms: nan"],
        [b"prefer: wait=99999999999999999999"],
        [b"authorization: Bearer " + rng.bytes(50).replace(b"\n", b"")],
        [b"traceparent: \xe4\xf6\xfc"],
        [b"content-length: 5"],
        [b"content-length: -5"],
        [b"content-length: 99999999999999999999999"],
        [b"transfer-encoding: chunked"],
        [b"transfer-encoding: gzip, chunked"],
        [b"Transfer-Encoding : chunked"],
        [b"expect: 100-continue"],
        [b"upgrade: websocket", b"connection: upgrade"],
        [b"upgrade: h2c", b"http2-settings: x", b"connection: upgrade"],
        [b" folded: x", b"\tmore"],
        [b"na\x00me: x"],
        [b"name: a\x00b"],
        [b": no name"],
        [b"host: y", b"host: z"],
        [b"content-encoding: gzip"],
    ]
    chosen = kinds[int(rng.integers(len(kinds)))]
    return post(json.dumps(GOOD).encode(), *chosen), 0.0


def paths(rng: Generator) -> Made:
    """Ways to other places than there are."""
    kinds = [
        b"/v1/../admin/v1/status",
        b"/v1/models/../../admin/v1/plans",
        b"/%2e%2e/%2e%2e/etc/passwd",
        b"/v1/models/%00",
        b"/v1/models/%ff%fe",
        b"/v1/models/" + b"a" * 20_000,
        b"/v1/models/\xc3\xa4",
        b"//evil.example/v1/models",
        b"http://evil.example/v1/models",
        b"*",
        b"/v1/models?" + b"a=b&" * 2000,
        b"/v1/chat/completions/",
        b"/V1/MODELS",
        b"/v1/models;x=y",
        b"/sleep?level=1",
        b"/metrics/../admin",
        b"/" + rng.bytes(30).replace(b"\n", b"").replace(b" ", b""),
        b"",
    ]
    words = b"GET POST HEAD OPTIONS PUT DELETE TRACE CONNECT PATCH PROPFIND X \xff"
    methods = words.split()
    method = methods[int(rng.integers(len(methods)))]
    return get(kinds[int(rng.integers(len(kinds)))], method), 0.0


def smuggling(rng: Generator) -> Made:
    """Two requests where one of us might see one."""
    inner = get(b"/admin/v1/status")
    kinds = [
        post(inner, b"transfer-encoding: chunked"),
        get(CHAT.encode(), b"POST", b"content-length: 4\r\ncontent-length: 400")
        + inner,
        get(CHAT.encode(), b"POST", b"transfer-encoding: chunked")
        + b"0\r\n\r\n"
        + inner,
        get(CHAT.encode(), b"POST", b"transfer-encoding: chunked") + b"zz\r\n" + inner,
        get(CHAT.encode(), b"POST", b"transfer-encoding: chunked")
        + b"ffffffffffffffffff\r\n"
        + inner,
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 200) + inner,
    ]
    return kinds[int(rng.integers(len(kinds)))], 0.0


KINDS: tuple[tuple[Callable[[Generator], Made], float], ...] = (
    (noise, 0.1),
    (broken_json, 0.15),
    (wrong_types, 0.2),
    (odd_json, 0.1),
    (large, 0.05),
    (slow, 0.02),
    (cut_off, 0.08),
    (headers, 0.15),
    (paths, 0.1),
    (smuggling, 0.05),
)


async def send(port: int, made: Made) -> bytes:
    """All that comes back; nothing if the connection was just closed."""
    data, pause_s = made
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        half = len(data) // 2 if pause_s > 0 else len(data)
        writer.write(data[:half])
        if pause_s > 0:
            await asyncio.sleep(min(pause_s, 1.0))
            if pause_s < 1.0:
                writer.write(data[half:])
        if pause_s < 0:
            return b""
        async with asyncio.timeout(20):
            return await reader.read(-1)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def statuses(answer: bytes) -> list[int]:
    """Of each answer on a connection."""
    parts = answer.split(b"HTTP/1.1 ")[1:]
    return [int(part[:3]) for part in parts if part[:3].isdigit()]


def rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def serve(pipe: Connection, log: str) -> None:
    """The gateway's process, with an engine beside it in a thread."""
    logging.basicConfig(filename=log, level=logging.WARNING)
    sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  # for tracebacks
    server.HEADER_S = 0.5
    settings = Settings(body_bytes=BODY_BYTES, body_s=0.5, hold_s=0.1)
    with stand(1, settings=settings) as made:
        made.publish_all(cap=64)
        pipe.send(made.server.port)
        while pipe.recv() == "left":
            made.records.clear()
            made.engines[0].asked.clear()
            made.engines[0].headers.clear()
            pipe.send(sum(made.table.in_flight().values()))


async def run(port: int, pid: int, requests: int, seed: int, pipe: Connection) -> dict:
    rng = np.random.default_rng(seed)
    makers, weights = zip(*KINDS, strict=True)
    seen: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    bad: list[str] = []
    memory = []
    gate = asyncio.Semaphore(32)
    good = post(json.dumps(GOOD).encode())

    async def one(name: str, made: Made) -> None:
        async with gate:
            try:
                answer = await send(port, made)
            except TimeoutError:
                bad.append(f"{name}: no end")
                return
        found = statuses(answer)
        codes.update(found or [0])
        if any(code >= 500 for code in found):
            bad.append(f"{name}: {found} for {made[0][:300]!r}")
        if name == "good" and not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            bad.append(f"good: {answer[-200:]!r}")

    for start in range(0, requests, 1000):
        tasks = []
        for number in range(start, min(requests, start + 1000)):
            if number % 50 == 0:
                name, made = "good", (good, 0.0)
            else:
                maker = makers[int(rng.choice(len(makers), p=weights))]
                name, made = maker.__name__, maker(rng)
            seen[name] += 1
            tasks.append(asyncio.create_task(one(name, made)))
        await asyncio.gather(*tasks)
        pipe.send("left")
        left = pipe.recv()
        memory.append(rss_mib(pid))
        click.echo(f"{start + 1000}: {memory[-1]} MiB, {left} at the engine")
    return {
        "requests": dict(seen),
        "answers": {str(code): count for code, count in sorted(codes.items())},
        "rss_mib": memory,
        "left_at_engine": left,
        "not_as_wanted": bad,
    }


@click.command()
@click.option("--requests", default=10_000)
@click.option("--seed", default=0)
@click.option("--write/--no-write", default=True)
def main(requests: int, seed: int, write: bool) -> None:
    """Send them, and judge."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, str(log)), daemon=True)
        process.start()
        assert process.pid is not None
        began_s = time.monotonic()
        port = pipe.recv()
        found = uvloop.run(run(port, process.pid, requests, seed, pipe))
        found["seconds"] = round(time.monotonic() - began_s, 1)
        pipe.send("end")
        process.join()
        found["log"] = log.read_text()
    bad, memory = found["not_as_wanted"], found["rss_mib"]
    if found["log"]:
        bad.append("there is something in the log")
    if found["left_at_engine"]:
        bad.append("requests are left at the engine")
    if len(memory) > 2 and memory[-1] > memory[1] + 4:
        bad.append("memory grew by more than 4 MiB")
    click.echo(json.dumps(found, indent=1))
    if write:
        write_result("gateway_fuzz", {"seed": seed, **found})
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
