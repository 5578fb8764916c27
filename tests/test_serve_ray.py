"""`plan serve` over Ray clusters whose machines are processes here, by real HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foreserve.models.errors import InvalidInput
from foreserve.models.specs import ClusterSpec, GpuType, Node
from foreserve.runtime.live.check import check
from foreserve.runtime.ray.nodes import Machine, seats
from tests.build import cluster

pytest.importorskip("uvicorn", reason="needs the extra `serve`")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"
)

ROOT = Path(__file__).parents[1]
SCENARIO = """
cluster:
  nodes:
    - {name: m0, gpu: h100, gpus: 2, host_ram: 1TiB}
    - {name: m1, gpu: h100, gpus: GPUS, host_ram: 1TiB}
models:
  - {name: small, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}
  - {name: other, llm: qwen2.5-7b, input_tokens: 500, output_tokens: 100}
  - {name: large, llm: llama-3.1-70b, input_tokens: 500, output_tokens: 100}
epoch: 60s
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
"""
WITHIN_S = 60.0
PAUSE = threading.Event()
"""Never set."""


class Machines:
    """`tests.ray_cluster` in a process."""

    def __init__(self, *gpus: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", *map(str, gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        self.address = self._line()

    def tell(self, what: str, word: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {word}\n")
        self.process.stdin.flush()
        assert self._line() == what

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30.0)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """Three of two GPUs each, and a head without any."""
    found = Machines(2, 2, 2)
    yield found
    found.end()


class Served:
    """A `plan serve` in ``folder``, with the state in ``folder/st``."""

    def __init__(self, folder: Path, *words: str, gpus: int = 2) -> None:
        self.folder, self.words = folder, words
        (folder / "s.yaml").write_text(SCENARIO.replace("GPUS", str(gpus)))
        self.log = folder / "serve.log"

    def start(self) -> None:
        common = "serve --scenario s.yaml --engine simulated --port 0 --state st"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "foreserve", *common.split(), *self.words],
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        path = self.folder / "st/admin.json"
        self.until(
            lambda: path.exists() and json.loads(path.read_text())["pid"] == self.pid
        )
        self.about = json.loads(path.read_text())

    @property
    def pid(self) -> int:
        return self.process.pid

    def until(self, done: Any) -> float:
        began_s = time.monotonic()
        while not done():
            assert time.monotonic() - began_s < WITHIN_S, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            PAUSE.wait(0.02)
        return time.monotonic() - began_s

    def ask(self, llm: str, url: str | None = None) -> tuple[int, Any]:
        body = {"model": llm, "prompt": "one two three", "max_tokens": 3}
        request = urllib.request.Request(
            f"{url or 'http://127.0.0.1:' + str(self.about['port'])}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def admin(self, path: str) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.about['admin_port']}/admin/v1/{path}",
            headers={"authorization": f"Bearer {self.about['token']}"},
        )
        with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
            return json.load(answer)

    def starts(self, node: str) -> list[dict[str, Any]]:
        """First lines of all lives of a node's agent."""
        lines = (self.folder / f"st/{node}.log").read_text().splitlines()
        found = [json.loads(line) for line in lines if '"event": "start"' in line]
        assert found
        return found

    def node_of(self, llm: str) -> str:
        rows = self.admin("status")["observed"]
        return next(r["gpus"][0].partition("/")[0] for r in rows if r["llm"] == llm)

    def back(self, node: str, llm: str) -> float:
        """Wait until the node is lost, then for an answer of the LLM; seconds in all."""

        def error() -> str:
            rows = self.admin("status")["nodes"]
            return str(next(row["error"] for row in rows if row["node"] == node))

        lost_s = self.until(error)
        return lost_s + self.until(lambda: not error() and self.ask(llm)[0] == 200)

    def loads(self, llm: str) -> int:
        lines = (self.folder / "st/journal.jsonl").read_text().splitlines()
        return sum('"LOADING"' in line and f'"{llm}"' in line for line in lines)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WITHIN_S) == 0, self.log.read_text()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0] == "Z"


@needs_ray
def test_over_machines_that_come_and_go(machines, tmp_path):
    """Two nodes on three machines. Each LLM is answered, by both nodes; an engine answers
    nobody who does not show its key. Then SIGKILL to one agent's process, to `plan serve`
    itself, and to a machine: the agent is back in its place; the next start finds all
    engines and loads nothing; the agent moves to the machine that was free. The books
    have no fault in any of it, and nothing is left in the end."""
    state = tmp_path / "st"
    words = ("--address", machines.address, "--node-folder", str(state))
    served = Served(tmp_path, *words)
    served.start()
    for llm in ("small", "other", "large"):
        code, answer = served.ask(llm)
        assert (code, answer["model"]) == (200, llm)
    assert {served.node_of(llm) for llm in ("small", "large")} == {"m0", "m1"}
    urls = {row["url"] for row in served.admin("engines")}
    assert not any("127.0.0.1" in url for url in urls)
    code, _ = served.ask("small", url=min(urls))
    assert code == 401
    node = served.node_of("large")
    books = [row for row in served.admin("ledger") if row["kind"] == "host"]
    assert {row["llm"] for row in books} == {"small", "other", "large", None}
    first = served.starts(node)[-1]
    assert sorted(first["devices"].values()) == [0, 1]

    os.kill(first["pid"], signal.SIGKILL)
    seconds = {"agent": served.back(node, "large")}
    second = served.starts(node)[-1]
    assert second["pid"] != first["pid"]
    assert second["devices"] == first["devices"]

    loads = served.loads("small")
    served.process.kill()
    served.process.wait()
    served.start()
    assert served.ask("small")[0] == 200
    assert served.loads("small") == loads

    machines.tell("lose", second["pid"])
    seconds["machine"] = served.back(node, "large")
    third = served.starts(node)[-1]
    assert gone(second["pid"])
    assert served.ask("small")[0] == 200
    served.end()
    assert gone(third["pid"])
    found = check(state)
    assert found.faults == []
    assert max(found.peak.values()) <= 1.0
    # Measured on two idle cores: 3 and 5 s, of which the load takes 2.
    assert seconds["agent"] < 20.0, seconds
    assert seconds["machine"] < 30.0, seconds


@needs_ray
def test_a_node_that_no_machine_can_be_is_named(machines, tmp_path):
    """Four GPUs on one machine where all have two: one line, exit code 2."""
    served = Served(tmp_path, "--address", machines.address, gpus=4)
    with pytest.raises(AssertionError) as failed:
        served.start()
    assert served.process.wait() == 2
    (line,) = str(failed.value).strip().splitlines()[:1]
    assert "'m1' needs 4 GPUs on one machine" in line


@needs_ray
def test_a_ray_of_its_own_ends_with_it(tmp_path):
    """--ray: both nodes here; after SIGKILL to `plan serve` its agents end as well, and
    the logs are as they should be."""
    served = Served(tmp_path, "--ray")
    served.start()
    assert served.ask("small")[0] == 200
    pids = [served.starts(node)[-1]["pid"] for node in ("m0", "m1")]
    served.process.kill()
    served.process.wait()
    until_s = time.monotonic() + WITHIN_S
    while not all(map(gone, pids)):
        assert time.monotonic() < until_s
        PAUSE.wait(0.05)
    assert check(tmp_path / "st").faults == []


def test_wrong_addresses_and_no_ray_take_one_line(tmp_path):
    """Nobody at the address; both kinds of Ray at once; Ray not installed."""
    (tmp_path / "s.yaml").write_text(SCENARIO.replace("GPUS", "2"))
    main = (
        "import sys; sys.modules['ray'] = None; from foreserve.cli import main; main()"
    )
    serve = ["serve", "--scenario", "s.yaml", "--engine", "simulated"]
    for code, words, expected in (
        (1, "--address 127.0.0.1:9", "no Ray at '127.0.0.1:9'"),
        (2, "--address 127.0.0.1:9 --ray", "--ray or --address"),
        (2, "--ray", "Ray is not installed"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", main, *serve, *words.split()],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1


def of(*gpus: int, named: dict[int, str] | None = None) -> list[Machine]:
    """Machines 10.0.0.0, 10.0.0.1, ... with so many GPUs."""
    return [
        Machine(
            address=f"10.0.0.{i}",
            gpus=count,
            named=frozenset([named[i]] if named and i in named else []),
        )
        for i, count in enumerate(gpus)
    ]


def test_seats():
    """n0 and n1 have two GPUs each. A machine for each if there are enough; else they
    share; else the one that finds no room is named. A machine that is n1 is nobody
    else's n1, whatever room there is elsewhere."""
    two = cluster(gpus=2, nodes=2)
    assert seats(two, of(2, 8)) == "STRICT_SPREAD"
    assert seats(two, of(8, 1)) == "SPREAD"
    assert seats(two, of(2, 2, named={1: "n0"})) == "STRICT_SPREAD"
    for machines, message in (
        (of(3), "'n1' needs 2 GPUs on one machine.*10.0.0.0 3"),
        ([], "'n0' needs 2 GPUs on one machine.*none"),
        (of(8, 1, named={1: "n1"}), "'n1' needs 2 GPUs; 10.0.0.1 has 1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            seats(two, machines)


def test_seats_of_mixed_types_have_to_be_named():
    """Which machine has which type of GPU cannot be told from their number."""
    kind = cluster().gpu_types[0]
    other = GpuType(
        name="h",
        memory_bytes=kind.memory_bytes,
        hbm_bytes_per_s=1e12,
        bf16_flop_per_s=1e14,
        gpu_link_bytes_per_s=1e11,
        host_link_bytes_per_s=5e10,
        price_usd_per_h=1.0,
    )
    mixed = ClusterSpec(
        nodes=tuple(
            Node(name=name, gpu=gpu, gpus=1, host_ram_bytes=1)
            for name, gpu in (("n0", "g"), ("n1", "h"))
        ),
        gpu_types=(kind, other),
    )
    with pytest.raises(InvalidInput, match="'n1': which machines"):
        seats(mixed, of(1, 1, named={0: "n0"}))
    assert seats(mixed, of(1, 1, named={0: "n0", 1: "n1"})) == "STRICT_SPREAD"
