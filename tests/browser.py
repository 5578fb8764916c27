"""A headless browser that tests can drive: chromium by its debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""No network but what it is asked for."""
FLAGS = [*QUIET, "--hide-scrollbars", "--remote-debugging-port=0"]
LIMIT_S = 40.0


class Browser:
    """One page. An async context manager; ``problems``: what its console has complained
    of."""

    def __init__(self, folder: Path, width: int = 1400, height: int = 1900) -> None:
        assert CHROMIUM is not None
        self.profile, self.size = folder / "profile", (width, height)
        self.problems: list[str] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._loaded = asyncio.Event()

    async def __aenter__(self) -> Self:
        import aiohttp

        size = "--window-size={},{}".format(*self.size)
        words = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self.profile}", size]
        self._process = subprocess.Popen(
            [*words, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = self.profile / "DevToolsActivePort"
        async with asyncio.timeout(LIMIT_S):
            while not (port.exists() and len(port.read_text().split()) == 2):
                await asyncio.sleep(0.05)
        base = f"http://127.0.0.1:{port.read_text().split()[0]}"
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"{base}/json/list") as answer:
            pages = [p for p in await answer.json() if p["type"] == "page"]
        url = pages[0]["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(url, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        return self

    async def __aexit__(self, *ending: object) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._session.close()
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def send(self, method: str, **params: Any) -> Any:
        self._number += 1
        answer = asyncio.get_running_loop().create_future()
        self._answers[self._number] = answer
        await self._socket.send_json(
            {"id": self._number, "method": method, "params": params}
        )
        async with asyncio.timeout(LIMIT_S):
            return await answer

    async def open(self, url: str) -> None:
        """Returns when it is loaded, or at once where only what follows # is new."""
        self._loaded.clear()
        told = await self.send("Page.navigate", url=url)
        if "loaderId" in told:
            async with asyncio.timeout(LIMIT_S):
                await self._loaded.wait()

    async def ask(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it comes to."""
        told = await self.send(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str, within_s: float = LIMIT_S) -> Any:
        """The value of an expression once it is true."""
        try:
            async with asyncio.timeout(within_s):
                while not (value := await self.ask(script)):
                    await asyncio.sleep(0.05)
                return value
        except TimeoutError:
            text = await self.ask("document.body.innerText")
            raise AssertionError(f"never came true: {script}\n{text}") from None

    async def shot(self, path: Path) -> None:
        """A picture of what the window shows."""
        told = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(told["data"]))

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if "error" in told:
                    answer.set_exception(AssertionError(told["error"]))
                else:
                    answer.set_result(told["result"])
            elif told["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif told["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded":
                entry = told["params"]["entry"]
                if entry["level"] in ("error", "warning"):
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")
            else:
                await self.on_event(told["method"], told["params"])

    async def on_event(self, method: str, params: dict[str, Any]) -> None:
        """Anything else that the browser tells."""
