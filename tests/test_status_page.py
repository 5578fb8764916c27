"""The status page in a real browser, over a cluster that serves."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")

from tests.browser import CHROMIUM, Browser
from tests.test_serve_admin import Operated, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[Operated]:
    folder = Path(os.path.relpath(tmp_path))
    cluster = Operated(folder if len(str(folder)) < len(str(tmp_path)) else tmp_path)
    yield cluster
    if cluster.process.poll() is None:
        cluster.end()


def test_the_page_shows_the_cluster_and_takes_orders(
    operated: Operated, tmp_path: Path
) -> None:
    """Without a token it asks for one and shows nothing. With it: an LLM that serves is on
    its GPU in the residency map, its requests are in the queues, and the token is gone
    from the address. The node's button shows the steps before it drains; the mode's
    button changes the mode. Nothing breaks the policy, at the width of a phone either."""
    assert operated.ask("small")[0] == 200
    about = json.loads((operated.folder / "st/admin.json").read_text())
    url = f"http://127.0.0.1:{about['admin_port']}/"
    busy = threading.Thread(target=lambda: operated.ask("small", 400))
    busy.start()
    until(lambda: any(row["in_flight"] for row in operated.get("nodes")))

    async def look() -> None:
        async with Browser(tmp_path) as page:
            await page.open(url)
            await page.until("!document.getElementById('login').hidden")
            assert (
                await page.ask("document.querySelectorAll('tr[data-llm]').length") == 0
            )
            await page.open(f"{url}#token={about['token']}")
            box = "#map g[data-llm=small][data-phase=ACTIVE][data-planned=false]"
            await page.until(f"document.querySelector('{box}') !== null")
            assert await page.ask("location.hash") == ""
            work = "document.querySelector('#llms tr[data-llm=small]').innerText"
            svg = "document.querySelector('#llms tr[data-llm=small] td:nth-child(4) text')"
            await page.until(f"{svg}.textContent.startsWith('1 / ')")
            assert "active" in await page.ask(work)
            await page.ask("document.querySelector('[data-node=m] button').click()")
            await page.until("document.getElementById('ask').open")
            assert "Drain m?" in await page.ask(
                "document.getElementById('ask').innerText"
            )
            assert not operated.get("status")["wishes"]["drained"]
            await page.ask("document.querySelector('#ask button.main').click()")
            await page.until(
                "document.querySelector('[data-node=m]').innerText.includes('drained')"
            )
            await page.ask("document.querySelectorAll('#modes button')[0].click()")
            await page.until(
                "document.querySelector('#modes [aria-pressed=true]')"
                ".textContent === 'observe'"
            )
            await page.send(
                "Emulation.setDeviceMetricsOverride",
                width=390,
                height=844,
                deviceScaleFactor=1,
                mobile=True,
            )
            await page.until("document.body.scrollWidth <= 390")
            assert page.problems == []

    asyncio.run(look())
    assert operated.get("status")["wishes"]["drained"] == ["m"]
    assert operated.get("mode") == {"mode": "observe"}
    busy.join()
