"""The operator's hand on a cluster that serves: real processes, real HTTP."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from tests.test_serve import Served, plan

SCENARIO = """
cluster: {nodes: [{name: m, gpu: h100, gpus: 1, host_ram: 1TiB},
                  {name: n, gpu: h100, gpus: 2, host_ram: 1TiB}]}
models:
  - {name: small, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}
  - {name: other, llm: qwen2.5-7b, input_tokens: 500, output_tokens: 100}
epoch: 600s
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
"""


class Operated(Served):
    """A cluster of two nodes, and its operator."""

    scenario = SCENARIO

    def call(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any]:
        about = json.loads((self.folder / "st/admin.json").read_text())
        base = f"http://127.0.0.1:{about['admin_port']}"
        request = urllib.request.Request(
            base + (path if path.startswith("/") else f"/admin/v1/{path}"),
            data=body,
            method=method,
            headers={"authorization": f"Bearer {about['token']}", **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=30.0) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> Any:
        code, told = self.call("GET", path)
        assert code == 200, told
        return told

    def do(self, path: str, **headers: str) -> dict[str, Any]:
        code, told = self.call("POST", path, b"", **headers)
        assert code in (200, 202), told
        found: dict[str, Any] = told
        return found

    def done(self, action: str) -> dict[str, Any]:
        """The receipt, once it is done."""
        receipt: dict[str, Any] = {}

        def is_done() -> bool:
            receipt.update(self.get(f"actions/{action}"))
            return bool(receipt["state"] == "done")

        until(is_done, lambda: str(receipt))
        return receipt

    def phases(self) -> set[tuple[str, str, str]]:
        """(LLM, node, phase) of all replicas."""
        rows = self.get("status")["observed"]
        return {(r["llm"], r["gpus"][0].split("/")[0], r["phase"]) for r in rows}


def until(
    holds: Callable[[], object], told: Callable[[], str] = str, within_s: float = 30.0
) -> None:
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, told()
        threading.Event().wait(0.02)


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    path = tmp_path_factory.mktemp("op")
    # A socket's name must be short.
    folder = Path(os.path.relpath(path))
    cluster = Operated(folder if len(str(folder)) < len(str(path)) else path)
    yield cluster
    if cluster.process.poll() is None:
        cluster.end()


@pytest.fixture(autouse=True)
def nothing_is_wished_for(operated: Operated) -> None:
    """Each test begins with a free hand."""
    wishes = operated.get("status")["wishes"]
    for node in wishes["drained"]:
        operated.do(f"nodes/{node}/resume")
    for llm in wishes["pinned"]:
        operated.do(f"models/{llm}/unpin")
    for hold in wishes["holds"]:
        operated.done(operated.do(f"models/{hold['llm']}/wake")["action"])


def states(operated: Operated) -> dict[str, str]:
    return {row["llm"]: row["state"] for row in operated.get("models")}


def test_sleep_wake_and_unload(operated: Operated) -> None:
    """An LLM that serves goes to sleep: its weights stay, requests are told so and not
    waited for. Woken it serves without a request; unloaded nothing of it is left, with the
    bytes in the receipt; llama-swap's unload ends with the next request."""
    assert operated.ask("small")[0] == 200
    operated.done(operated.do("models/small/sleep")["action"])
    assert {p for llm, _, p in operated.phases() if llm == "small"} == {"WARM"}
    assert states(operated)["small"] == "held"
    code, answer = operated.ask("small")
    assert (code, answer["error"]["code"]) == (503, "no_capacity")
    assert "operator" in answer["error"]["message"]
    operated.done(operated.do("models/small/wake")["action"])
    assert states(operated)["small"] == "active"
    gone = operated.done(operated.do("models/small/unload")["action"])
    assert gone["gpu_bytes"] == 0 < gone["gpu_bytes_before"]
    assert not [p for llm, _, p in operated.phases() if llm == "small"]
    operated.done(operated.do("models/small/wake")["action"])
    operated.done(operated.do("/api/models/unload/small")["action"])
    assert "small" not in str(operated.get("/running"))
    assert operated.ask("small")[0] == 200
    assert {"model": "small", "state": "ready"}.items() <= next(
        row.items()
        for row in operated.get("/running")["running"]
        if row["model"] == "small"
    )


def test_a_pin_serves_without_requests_and_forbids_sleep(operated: Operated) -> None:
    """Until it is unpinned; an unknown LLM is 404."""
    operated.done(operated.do("models/other/unload")["action"])
    operated.done(operated.do("models/other/pin")["action"])
    assert states(operated)["other"] == "active"
    code, told = operated.call("POST", "models/other/sleep", b"")
    assert (code, told["error"]["code"]) == (409, "refused")
    operated.do("models/other/unpin")
    assert operated.call("POST", "models/nobody/pin", b"")[0] == 404


def test_a_node_is_drained_without_a_gap(operated: Operated) -> None:
    """The only replica of small is on m, and has a stream in flight. Drained, small serves
    on n before its replica on m is gone, the stream ends whole, and nothing new comes to
    m; all that while the LLM is never without a replica that takes requests. With n
    drained as well there is room nowhere: resumed, all is as before."""
    operated.done(operated.do("nodes/n/drain")["action"])
    assert operated.ask("small")[0] == 200
    assert ("small", "m", "ACTIVE") in operated.phases()
    operated.do("nodes/n/resume")
    answers: list[tuple[int, Any]] = []
    stream = threading.Thread(target=lambda: answers.append(operated.ask("small", 150)))
    stream.start()
    until(lambda: any(row["in_flight"] for row in operated.get("nodes")))
    steps = operated.do("nodes/m/drain?dry_run=true")
    kinds = [(s["kind"], s["llm"], s["gpus"][0][0]) for s in steps["steps"]]
    assert kinds.index(("activate", "small", "n")) < kinds.index(
        ("demote", "small", "m")
    )
    assert steps["outages"] == 0
    booked = {row["device"]: row["booked_bytes"] for row in steps["ledger"]}
    assert booked["m/0"] == 0
    assert ("small", "m", "ACTIVE") in operated.phases()  # nothing was done
    action = operated.do("nodes/m/drain")["action"]
    while operated.get(f"actions/{action}")["state"] == "running":
        assert states(operated)["small"] == "active"
    receipt = operated.done(action)
    assert receipt["gpu_bytes"] == 0 < receipt["gpu_bytes_before"]
    stream.join()
    code, answer = answers[0]
    assert code == 200
    assert answer["usage"]["completion_tokens"] == 150
    assert {node for _, node, _ in operated.phases()} == {"n"}
    for llm in ("small", "other"):
        assert operated.ask(llm)[0] == 200
    assert {node for _, node, _ in operated.phases()} == {"n"}
    drained = {row["node"]: row["drained"] for row in operated.get("nodes")}
    assert drained == {"m": True, "n": False}


def test_wishes_survive_a_crash(operated: Operated) -> None:
    """After SIGKILL the next start still keeps off the drained node, and still holds."""
    operated.done(operated.do("nodes/m/drain")["action"])
    operated.done(operated.do("models/other/sleep")["action"])
    operated.process.send_signal(signal.SIGKILL)
    operated.process.wait(10.0)
    operated.start()
    assert operated.get("status")["wishes"]["drained"] == ["m"]
    assert operated.ask("small")[0] == 200
    assert {node for _, node, _ in operated.phases()} == {"n"}
    assert operated.ask("other")[0] == 503


def test_plans_are_handed_in_compared_and_approved(operated: Operated) -> None:
    """The current plan with another placement is a proposal in mode automatic too: it is
    listed, its diff names what appears, a stale caller cannot approve it, and approved it
    is in force. Another is rejected. One that no GPU can hold is refused by name."""
    until(lambda: operated.get("plans")["current"]["id"])
    current = operated.get("plans")["current"]["id"]
    whole = operated.get(f"plans/{current}")["plan"]

    def with_replicas(*replicas: dict[str, Any]) -> bytes:
        epoch = {**whole["epochs"][0], "transition": None, "certificate": None}
        epoch["placement"] = {"replicas": list(replicas), "hosted": []}
        return json.dumps({**whole, "epochs": [epoch]}).encode()

    gpu = ["n/1"]
    one = {"llm": "other", "gpus": gpu, "state": "ACTIVE", "traffic_share": 1.0}
    code, told = operated.call("POST", "plans", with_replicas(one, {**one, "llm": "x"}))
    assert (code, told["error"]["code"]) == (400, "invalid_plan")
    assert "unknown LLM 'x'" in told["error"]["message"]
    for bad in (b"[" * 100_000, b"9" * 10_000, b"{}", b"null", b""):
        code, told = operated.call("POST", "plans", bad)
        assert (code, told["error"]["code"]) == (400, "invalid_plan"), bad[:9]
    code, told = operated.call("POST", "plans?dry_run=true", with_replicas(one))
    assert code == 200
    assert operated.get("plans")["proposed"] is None
    code, told = operated.call("POST", "plans", with_replicas(one))
    assert code == 202
    plan_id = told["plan_id"]
    proposed = operated.get("plans")["proposed"]
    assert (proposed["id"], proposed["fate"]) == (plan_id, "pending")
    diff = operated.get(f"plans/{plan_id}/diff")
    changes = [c for epoch in diff["epochs"] for c in epoch["changes"]]
    assert ("other", "ACTIVE") in [(c["llm"], c["now"]) for c in changes]
    generation = operated.get("status")["generation"]
    stale = {"If-Match": str(generation + 1)}
    assert operated.call("POST", f"plans/{plan_id}/approve", b"", **stale)[0] == 409
    operated.done(
        operated.do(f"plans/{plan_id}/approve", **{"If-Match": str(generation)})[
            "action"
        ]
    )
    assert operated.get("plans")["current"]["id"] == plan_id
    until(lambda: ("other", "n", "ACTIVE") in operated.phases())
    another = {**one, "llm": "small", "gpus": ["n/0"], "traffic_share": 0.5}
    unwanted = operated.call("POST", "plans", with_replicas(another))[1]["plan_id"]
    done = plan("reject", unwanted, "--state", "st", cwd=operated.folder)
    assert done.returncode == 0, done.stderr
    history = operated.get("plans")["history"]  # the latest first

    def fate(plan_id: str) -> str:
        return str(next(row["fate"] for row in history if row["id"] == plan_id))

    assert (fate(unwanted), fate(plan_id)) == ("rejected", "carried out")
    assert operated.call("POST", f"plans/{unwanted}/approve", b"")[0] == 404


def test_drain_on_the_command_line(operated: Operated) -> None:
    """`plan drain` takes a node or an LLM, shows the steps, waits, and undoes; a name that
    is neither is one line with the nearest one."""
    assert operated.ask("small")[0] == 200

    def run(*words: str) -> tuple[int, str]:
        done = plan("drain", *words, "--state", "st", cwd=operated.folder)
        return done.returncode, (done.stdout + done.stderr).strip()

    code, text = run("small", "--dry-run")
    assert code == 0
    assert "demote small" in text
    code, text = run("small", "--wait")
    assert code == 0, text
    assert "small is drained" in text
    assert not [p for llm, _, p in operated.phases() if llm == "small"]
    assert run("small", "--resume") == (0, "small is resumed")
    code, text = run("smal")
    assert code == 2
    assert text.splitlines() == [text]
    assert "did you mean 'small'" in text


def test_status_on_the_command_line(operated: Operated) -> None:
    """No terminal: once, with every GPU and LLM; --json is the admin port's document.
    The reader's token sees it too, and changes nothing."""
    assert operated.ask("small")[0] == 200
    done = plan("status", "--state", "st", cwd=operated.folder)
    assert done.returncode == 0, done.stderr
    for word in ("m/0", "n/1", "small", "other", "active", "GiB", "mode automatic"):
        assert word in done.stdout
    about = json.loads((operated.folder / "st/admin.json").read_text())
    reader = {"authorization": f"Bearer {about['reader_token']}"}
    assert operated.call("GET", "view", None, **reader)[0] == 200
    assert operated.call("POST", "nodes/m/drain", b"", **reader)[0] == 403
    seen = operated.status()
    assert {row["node"] for row in seen["nodes"]} == {"m", "n"}


def test_events_tell_of_decisions(operated: Operated) -> None:
    """A listener hears of the steps that a change leads to, as they are decided."""
    about = json.loads((operated.folder / "st/admin.json").read_text())
    request = urllib.request.Request(
        f"http://127.0.0.1:{about['admin_port']}/admin/v1/events",
        headers={"authorization": f"Bearer {about['token']}"},
    )
    assert operated.ask("small")[0] == 200
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        operated.do("models/small/unload")
        for line in answer:
            if line.startswith(b"data:") and b'"drop"' in line and b"small" in line:
                assert json.loads(line[5:])["event"] == "decision"
                break
