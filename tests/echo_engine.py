"""A real HTTP server that speaks as an engine does, and misbehaves on demand.

What it does is in the request's own ``echo`` field: ``tokens`` and ``gap_s`` between them,
``wait_s`` before the first, ``die_after`` so many tokens, ``error_after``, ``status``,
``pieces`` (bytes per write, to cut events anywhere), ``once`` (only the first request of
this name misbehaves, whichever engine gets it). It keeps what it was asked, and
counts who left.

    python -m tests.echo_engine PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import ClassVar

import uvloop


class EchoEngine:
    """Serves on ``port`` in a thread of its own."""

    _once: ClassVar[set[str]] = set()
    """Of all engines together."""

    def __init__(self, name: str = "echo", port: int = 0) -> None:
        self.name = name
        self.port = port
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.working = 0
        self.left = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> EchoEngine:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if killed: all connections are gone at once."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self.serve())

    async def serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(self, reader, writer) -> None:
        self._writers.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _request(self, reader, writer) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        path = lines[0].split()[1]
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.asked.append(body)
        self.headers.append(headers)
        how = body.get("echo") or {}
        if "once" in how:
            first = how["once"] not in self._once
            self._once.add(how["once"])
            how = how if first else {"tokens": how.get("tokens", 3)}
        self.working += 1
        answer = asyncio.ensure_future(self._answer(path, body, how, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.left += 1
                return False
            return answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            self.working -= 1

    async def _answer(self, path, body, how, writer) -> bool:
        """Whether the connection goes on."""
        await asyncio.sleep(how.get("wait_s", 0))
        if "status" in how:
            error = {"message": "as asked", "type": "X", "param": None, "code": 1}
            self._whole(writer, how["status"], {"error": error})
            return True
        tokens = how.get("tokens", 3)
        chat = path.endswith("/chat/completions")
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": tokens,
            "total_tokens": 7 + tokens,
        }
        kind = "chat.completion" if chat else "text_completion"
        base = {"id": "e-1", "created": 1, "model": self.name}
        if not body.get("stream"):
            await asyncio.sleep(tokens * how.get("gap_s", 0))
            if "die_after" in how:
                writer.transport.abort()
                return False
            text = "".join(f"t{i} " for i in range(tokens))
            piece = (
                {"message": {"role": "assistant", "content": text}}
                if chat
                else {"text": text}
            )
            choice = {"index": 0, "finish_reason": "length", **piece}
            plain = {**base, "object": kind, "choices": [choice], "usage": usage}
            self._whole(writer, 200, plain)
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        base["object"] = "chat.completion.chunk" if chat else kind
        for i in range(tokens):
            if i == how.get("die_after"):
                await asyncio.sleep(0.05)
                writer.transport.abort()
                return False
            if i == how.get("error_after"):
                await self._event(writer, how, {"error": {"message": "out of memory"}})
                await self._raw(writer, how, b"data: [DONE]\n\n")
                break
            piece = {"delta": {"content": f"t{i} "}} if chat else {"text": f"t{i} "}
            ended = "length" if i == tokens - 1 else None
            choice = {"index": 0, "finish_reason": ended, **piece}
            await self._event(writer, how, {**base, "choices": [choice]})
            if i < tokens - 1 and "gap_s" in how:
                await asyncio.sleep(how["gap_s"])
        else:
            if (body.get("stream_options") or {}).get("include_usage"):
                await self._event(writer, how, {**base, "choices": [], "usage": usage})
            await self._raw(writer, how, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _event(self, writer, how, plain) -> None:
        await self._raw(writer, how, b"data: " + json.dumps(plain).encode() + b"\n\n")

    async def _raw(self, writer, how, data: bytes) -> None:
        size = how.get("pieces", len(data))
        for start in range(0, len(data), size):
            part = data[start : start + size]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            if size < len(data):
                await asyncio.sleep(0)

    def _whole(self, writer, status, plain) -> None:
        body = json.dumps(plain).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (status, len(body), body)
        )


if __name__ == "__main__":
    uvloop.run(EchoEngine(port=int(sys.argv[1])).serve())
