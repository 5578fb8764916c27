"""The admin port: its own token, its few routes, and nothing of the public one."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.runtime.gateway.admin import Mode, NotThere, Refused, admin_app
from foreserve.runtime.gateway.app import public_app
from foreserve.runtime.gateway.feed import Feed
from foreserve.runtime.gateway.gateway import Gateway
from foreserve.runtime.gateway.keys import hashed
from foreserve.runtime.gateway.server import Server
from foreserve.runtime.gateway.table import RoutingTable
from foreserve.runtime.journal import Faulted, RequestEnd


class MadeUp:
    """An operator that remembers what it was told."""

    def __init__(self) -> None:
        self.now: Mode = "recommend"
        self.approved: list[str] = []
        self.ticks = 0
        self.changes = []
        self.slow = threading.Event()
        self.slow.set()

    def generation(self):
        return 3

    def status(self):
        return {"generation": 3}

    def plans(self):
        return {"current": "p1", "proposed": "p2"}

    def plan(self, plan_id):
        if plan_id != "p2":
            raise NotThere(f"no plan {plan_id}")
        return {"plan": plan_id}

    def diff(self, plan_id):
        return {"from": "p1", "to": plan_id}

    def hand_in(self, text, *, dry_run):
        if text != "{}":
            raise InvalidInput("no plan")
        return {"action": "h", "dry_run": dry_run}

    def reject(self, plan_id):
        return {"action": "r", "plan_id": plan_id}

    def approve(self, plan_id, *, dry_run):
        if plan_id != "p2":
            raise NotThere(f"no plan {plan_id}")
        if dry_run:
            return {"dry_run": True}
        self.approved.append(plan_id)
        return {"action": f"a{len(self.approved)}"}

    def mode(self):
        return self.now

    def set_mode(self, mode):
        self.now = mode
        return {"action": "m", "mode": mode}

    def change(self, change, *, dry_run):
        if change.subject == "pinned":
            raise Refused("it is pinned")
        self.slow.wait(10)
        self.changes.append((change.verb, change.subject, change.until_need, dry_run))
        return {"action": f"c{len(self.changes)}"}

    def action(self, action_id):
        return {"action": action_id, "state": "done"}

    def view(self, stays, after_s):
        return {"stays": stays, "after_s": after_s}

    def llms(self):
        return [{"llm": "a"}]

    def nodes(self):
        return [{"node": "n0"}]

    def drift(self):
        return {"epochs": []}

    def running(self):
        return [{"model": "a", "state": "ready"}]

    def engines(self):
        return [{"replica": "a@n0/0x1"}]

    def ledger(self):
        return []

    def tick(self):
        self.ticks += 1
        return {"action": "t"}


@pytest.fixture(scope="module")
def admin():
    """(operator, client with the operator's token, server)."""
    operator = MadeUp()
    table = RoutingTable(lambda: 0.0)
    gateway = Gateway(table=table, llms={}, rng=np.random.default_rng(0))
    feed = Feed()
    tokens = hashed("operator-token"), hashed("reader-token")
    app = admin_app(operator, *tokens, feed=feed)
    with ExitStack() as stack:
        server = Server(gateway, public_app(gateway), admin=app)
        server.start()
        stack.callback(server.stop, 0.1)
        operator.feed = feed
        client = stack.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1",
                headers={"Authorization": "Bearer operator-token"},
            )
        )
        yield operator, client, server


def test_reads(admin):
    """Each GET shows what the operator says."""
    _, client, _ = admin
    assert client.get("/status").json() == {"generation": 3}
    assert client.get("/plans").json() == {"current": "p1", "proposed": "p2"}
    assert client.get("/engines").json() == [{"replica": "a@n0/0x1"}]
    assert client.get("/ledger").json() == []
    assert client.get("/models").json() == [{"llm": "a"}]
    assert client.get("/nodes").json() == [{"node": "n0"}]
    assert client.get("/drift").json() == {"epochs": []}
    assert client.get("/plans/p2").json() == {"plan": "p2"}
    assert client.get("/plans/p9").status_code == 404
    assert client.get("/plans/p2/diff").json() == {"from": "p1", "to": "p2"}
    assert client.get("/actions/x").json()["state"] == "done"
    assert client.get("/view?stays=4&after_s=1.5").json() == {
        "stays": 4,
        "after_s": 1.5,
    }
    assert client.get("/view?after_s=nan").status_code == 400
    assert client.get("/status").headers["cache-control"] == "no-store"


def test_tokens(admin):
    """None or a wrong one: 401; the reader's may read and change nothing."""
    operator, client, _ = admin
    wrong = {"Authorization": "Bearer nonsense"}
    reader = {"Authorization": "Bearer reader-token"}
    assert client.get("/status", headers=wrong).status_code == 401
    assert client.get("/status", headers={"Authorization": ""}).status_code == 401
    assert client.get("/status", headers=reader).status_code == 200
    before = operator.ticks
    refused = client.post("/tick", headers=reader)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "not_allowed"
    assert client.put("/mode", headers=reader, json={}).status_code == 403
    assert operator.ticks == before


def test_approve(admin):
    """202 with a receipt; an unknown plan is 404, a stale caller 409, and the same
    Idempotency-Key acts once."""
    operator, client, _ = admin
    assert client.post("/plans/p9/approve").status_code == 404
    stale = client.post("/plans/p2/approve", headers={"If-Match": '"2"'})
    assert stale.status_code == 409
    assert (
        client.post("/plans/p2/approve", headers={"If-Match": "x"}).status_code == 400
    )
    once = {"Idempotency-Key": "k", "If-Match": "3"}
    answers = [client.post("/plans/p2/approve", headers=once) for _ in range(2)]
    assert [a.status_code for a in answers] == [202, 202]
    assert answers[0].json() == answers[1].json() == {"action": "a1"}
    assert operator.approved == ["p2"]


def test_mode(admin):
    """Read and changed; anything else is refused with the choices."""
    operator, client, _ = admin
    assert client.get("/mode").json() == {"mode": "recommend"}
    assert client.put("/mode", json={"mode": "automatic"}).status_code == 202
    assert operator.now == "automatic"
    for body in ({"mode": "fast"}, {}, {"mode": ["observe"]}):
        refused = client.put("/mode", json=body)
        assert refused.status_code == 400
        assert "observe, recommend, automatic" in refused.json()["error"]["message"]
    assert client.put("/mode", content=b"x" * 100_000).status_code == 413


def test_ports_are_apart(admin):
    """No route of one is on the other."""
    _, client, server = admin
    base = f"http://127.0.0.1:{server.admin_port}"
    token = client.headers["authorization"]
    for path in ("/v1/models", "/metrics", "/health"):
        answer = httpx.get(base + path, headers={"Authorization": token})
        assert answer.status_code == 404
    public = f"http://127.0.0.1:{server.port}/admin/v1/status"
    assert httpx.get(public, headers={"Authorization": token}).status_code == 404


def test_changes_by_hand(admin):
    """Each verb reaches the operator with its subject, names with a slash too; what a rule
    forbids is 409, a stale caller changes nothing, and a dry run says so."""
    operator, client, _ = admin
    operator.changes.clear()
    for verb in ("wake", "sleep", "unload", "pin", "unpin"):
        assert client.post(f"/models/org/a/{verb}").status_code == 202
    for verb in ("drain", "resume"):
        assert client.post(f"/nodes/n0/{verb}").status_code == 202
    client.post("/models/a/unload?until=request")
    assert client.post("/models/a/sleep?dry_run=true").status_code == 200
    verbs = ("wake", "sleep", "unload", "pin", "unpin")
    assert operator.changes == [
        *((verb, "org/a", False, False) for verb in verbs),
        ("drain", "n0", False, False),
        ("resume", "n0", False, False),
        ("unload", "a", True, False),
        ("sleep", "a", False, True),
    ]
    operator.changes.clear()
    refused = client.post("/models/pinned/sleep")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "refused")
    assert client.post("/models/a/sleep?until=noon").status_code == 400
    assert client.post("/models/a/sleep?dry_run=maybe").status_code == 400
    stale = client.post("/nodes/n0/drain", headers={"If-Match": "2"})
    assert stale.json()["error"]["code"] == "stale_generation"
    assert client.post("/models/a/dance").status_code == 404
    assert operator.changes == []


def test_a_change_under_way_is_not_done_twice(admin):
    """Two callers send it with one key while it is still being done: one act, one answer
    for both. What was refused is tried again."""
    operator, client, _ = admin
    operator.changes.clear()
    operator.slow.clear()
    once = {"Idempotency-Key": "same"}
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(client.post, "/models/b/wake", headers=once) for _ in range(2)
        ]
        operator.slow.set()
        answers = [call.result().json() for call in calls]
    assert answers == [{"action": "c1"}] * 2
    assert len(operator.changes) == 1
    for _ in range(2):
        refused = client.post("/models/pinned/sleep", headers=once)
        assert refused.status_code == 409


def test_plans_by_hand(admin):
    """A plan is handed in as its file's text, a bad one is 400; reject is a change."""
    _, client, _ = admin
    assert client.post("/plans", content=b"{}").status_code == 202
    dry = client.post("/plans?dry_run=true", content=b"{}")
    assert (dry.status_code, dry.json()["dry_run"]) == (200, True)
    bad = client.post("/plans", content=b"[")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_plan")
    assert client.post("/plans", content=b"\xff").status_code == 400
    assert client.post("/plans/p2/reject").json()["action"] == "r"


def test_llama_swap(admin):
    """Its two routes, at its paths, with our token."""
    operator, client, server = admin
    operator.changes.clear()
    base = f"http://127.0.0.1:{server.admin_port}"
    token = {"Authorization": client.headers["authorization"]}
    assert httpx.get(f"{base}/running").status_code == 401
    running = httpx.get(f"{base}/running", headers=token).json()
    assert running == {"running": [{"model": "a", "state": "ready"}]}
    httpx.post(f"{base}/api/models/unload", headers=token)
    httpx.post(f"{base}/api/models/unload/a", headers=token)
    assert operator.changes == [
        ("unload", None, True, False),
        ("unload", "a", True, False),
    ]


def test_events(admin):
    """A stream of what is told after it began, numbered; a listener who comes back with the
    last number misses nothing; requests only where asked for."""
    operator, client, _ = admin
    request = RequestEnd(
        at_s=1.0,
        request=0,
        llm="a",
        arrival_s=0.0,
        input_tokens=1,
        output_tokens=1,
        result="finished",
    )

    def read(count, **headers):
        told = []
        with client.stream("GET", "/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith(": events"):
                    operator.feed.record(request)
                    operator.feed.record(
                        Faulted(at_s=2.0, kind="node-loss", target="n0")
                    )
                if line.startswith(("id:", "event:")):
                    told.append(line)
                if len(told) == 2 * count:
                    return told
        return told

    assert read(1) == ["id: 2", "event: fault"]
    assert read(1, **{"Last-Event-ID": "2"}) == ["id: 4", "event: fault"]


def test_a_stream_of_events_ends_with_the_feed():
    """So that listeners do not hold up a shutdown."""
    feed = Feed()

    async def listen():
        stream = feed.stream(0)
        assert (await anext(stream)).startswith(b": ")
        waiting = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        threading.Thread(target=feed.close).start()
        return await asyncio.wait_for(waiting, 5.0)

    assert asyncio.run(listen()) is None


def test_the_page_holds_nothing_and_may_fetch_nothing_else(admin):
    """It comes without a token, with a policy that allows its own script and style, by
    their hashes, and connections to its own port alone."""
    _, _, server = admin
    answer = httpx.get(f"http://127.0.0.1:{server.admin_port}/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    for word in ("http://", "https://", "//cdn", "@import", "src="):
        found = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert word not in found
