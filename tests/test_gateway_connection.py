"""Connections to engines: what is an answer, what is none, and what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from foreserve.runtime.gateway.connection import (
    MOST_UNREAD,
    Connection,
    Connections,
    EngineLost,
    place_of,
)

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"


class Scripted:
    """Says the next of ``answers`` to each request; None in one ends the connection."""

    def __init__(self, *answers: list[bytes | None]) -> None:
        self.answers = list(answers)
        self.connections = 0

    async def serve(self, reader, writer) -> None:
        self.connections += 1
        try:
            while self.answers:
                await reader.readuntil(b"\r\n\r\n")
                for piece in self.answers.pop(0):
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def ask(pool: Connections, port: int, silence_s: float | None = 5.0) -> bytes:
    """The body of the answer to one request."""
    one = await pool.open("127.0.0.1", port)
    try:
        one.begin(b"POST /x HTTP/1.1\r\nhost: h\r\n\r\n", silence_s)
        await one.head()
        assert (one.status, one.kind) == (200, b"text/plain")
        return await one.read()
    finally:
        one.end()


def talk(script: Scripted, how: Callable[[Connections, int], object]) -> object:
    """What ``how`` comes to, against a server of ``script``."""

    async def run() -> object:
        server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
        pool = Connections()
        async with server:
            try:
                return await how(pool, server.sockets[0].getsockname()[1])
            finally:
                pool.close()
                await asyncio.sleep(0)

    return asyncio.run(run())


def test_a_connection_is_used_again():
    """Three answers, with a length, in chunks, and after an announcement (103), come over
    one connection."""
    script = Scripted(
        [HEAD + b"content-length: 2\r\n\r\nab"],
        [HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n", b"0\r\n\r\n"],
        [
            b"HTTP/1.1 103 Early Hints\r\n\r\n",
            HEAD + b"content-length: 1\r\n\r\n",
            b"c",
        ],
    )

    async def thrice(pool, port):
        return [await ask(pool, port) for _ in range(3)]

    assert talk(script, thrice) == [b"ab", b"a", b"c"]
    assert script.connections == 1


@pytest.mark.parametrize(
    "first",
    [
        [HEAD + b"connection: close\r\ncontent-length: 1\r\n\r\na"],
        [HEAD + b"content-length: 1\r\n\r\na", None],
        [HEAD + b"content-length: 1\r\n\r\na", b"and more"],
        [HEAD + b"\r\n", b"a", None],
    ],
    ids=["said so", "closed", "spoke unasked", "ended by its end"],
)
def test_a_connection_is_not_used_again(first):
    """The engine closes it, said that it would, or speaks when nobody has asked: the
    next request has one of its own, and does not fail."""
    script = Scripted(first, [HEAD + b"content-length: 1\r\n\r\nb"])

    async def twice(pool, port):
        one = await ask(pool, port)
        await asyncio.sleep(0.05)
        return one + await ask(pool, port)

    assert talk(script, twice) == b"ab"
    assert script.connections == 2


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([None], "no answer"),
        ([b"HTTP/1.1 200"], "silent"),
        ([HEAD + b"content-length: 9\r\n\r\nab", None], "broke off"),
        ([HEAD + b"content-length: 9\r\n\r\nab"], "silent"),
        ([b"SSH-2.0-x\r\n"], "no HTTP"),
        ([b"HTTP/1.1 101 X\r\nupgrade: y\r\nconnection: upgrade\r\n\r\n"], "no HTTP"),
    ],
)
def test_what_is_no_answer(said, why):
    """It raises, and says why."""

    async def once(pool, port):
        with pytest.raises(EngineLost, match=why):
            await ask(pool, port, 0.1)

    talk(Scripted(said), once)


def test_nobody_listens():
    """A port that is closed is an engine that is lost."""

    async def run() -> None:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        with pytest.raises(EngineLost, match="ConnectionRefusedError"):
            await Connections().open("127.0.0.1", port)

    asyncio.run(run())


def test_a_slow_reader_stops_the_engine():
    """What nobody takes stays at the engine, but for a bounded part, and all of it comes
    once it is taken, silence or not."""
    size = 40 * MOST_UNREAD
    script = Scripted([HEAD + b"content-length: %d\r\n\r\n" % size, bytes(size)])

    async def slowly(pool, port):
        one: Connection = await pool.open("127.0.0.1", port)
        one.begin(b"POST /x HTTP/1.1\r\n\r\n", 0.2)
        await one.head()
        await asyncio.sleep(0.5)
        held = len(await one.more())
        assert held < 4 * MOST_UNREAD
        assert held + len(await one.read()) == size
        one.end()

    talk(script, slowly)


def test_places():
    """Address and path of an engine; with IPv6, too."""
    assert place_of("http://h:8/r/1") == ("h", 8, b"h:8", b"/r/1")
    assert place_of("http://[::1]:8") == ("::1", 8, b"[::1]:8", b"")
    with pytest.raises(ValueError, match="no http"):
        place_of("https://h")
