"""The admin port: its own token, its few routes, and nothing of the public one."""

from __future__ import annotations

from contextlib import ExitStack

import httpx
import numpy as np
import pytest

from foreserve.runtime.gateway.admin import Mode, NotThere, Stale, admin_app
from foreserve.runtime.gateway.app import public_app
from foreserve.runtime.gateway.gateway import Gateway
from foreserve.runtime.gateway.keys import hashed
from foreserve.runtime.gateway.server import Server
from foreserve.runtime.gateway.table import RoutingTable


class MadeUp:
    """An operator that remembers what it was told."""

    def __init__(self) -> None:
        self.now: Mode = "recommend"
        self.approved: list[str] = []
        self.ticks = 0

    def status(self):
        return {"generation": 3}

    def plans(self):
        return {"current": "p1", "proposed": "p2"}

    def approve(self, plan_id, generation):
        if plan_id != "p2":
            raise NotThere(f"no plan {plan_id}")
        if generation not in (None, 3):
            raise Stale("the generation is 3")
        self.approved.append(plan_id)
        return {"action": f"a{len(self.approved)}"}

    def mode(self):
        return self.now

    def set_mode(self, mode):
        self.now = mode

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
    app = admin_app(operator, hashed("operator-token"), hashed("reader-token"))
    with ExitStack() as stack:
        server = Server(gateway, public_app(gateway), admin=app)
        server.start()
        stack.callback(server.stop, 0.1)
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
    assert client.put("/mode", json={"mode": "automatic"}).status_code == 200
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
