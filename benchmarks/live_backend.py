"""What the live backend itself costs, over engines that take no time.

    python benchmarks/live_backend.py [--rounds N]

Four logical nodes of eight GPUs, agents in processes of their own and, alternating, in this
one; 64 replicas ACTIVE and 32 WARM. Engines answer at once (the option's times are 0), so
what is left is ours:

- ``promotion_s``: from the order to activate a WARM replica until the routing table has it
  (log on disk, socket, thread, log on disk, report, publish);
- ``demotion_s``: from the order to demote until the replica is WARM again;
- ``observe_s`` with all 96 replicas, and ``apply_s`` of one action;
- ``start_s``: from a controller that starts over living agents until it has seen them all;
- ``log_s``: one line forced to the disk;
- ``agent_killed_s``: from SIGKILL of an agent until its node is lost, and until all that
  was on it serves again (engines that take no time: a process start and 24 loads).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import click
import numpy as np
from record import write_result

from foreserve.models.placement import Action, Kind, ReplicaId, replica_id
from foreserve.models.problem import Fleet
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.gateway.table import RoutingTable
from foreserve.runtime.journal import Journal
from foreserve.runtime.live.backend import LiveBackend
from foreserve.runtime.live.host import Hosted, Local, Open, make_agent, setups
from foreserve.runtime.live.intents import IntentLog

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for the agents

from tests.build import cluster, fleet, gpu, option
from tests.live_engines import Waiting


def scene() -> Fleet:
    """Three LLMs on 32 GPUs that hold two ACTIVE and one WARM each."""
    options = (
        option(llm, load_s=0.0, activate_s=0.0, resident_bytes=10) for llm in "abc"
    )
    return fleet(*options, on=cluster(gpus=8, nodes=4))


class Run:
    """A backend over agents, and no controller: orders come from the benchmark."""

    def __init__(self, folder: Path, f: Fleet, nodes: Mapping[str, Open]) -> None:
        self.clock = SystemClock()
        self.table = RoutingTable(self.clock.now_s)
        self.log = IntentLog(folder / "controller.log")
        self.backend = LiveBackend(
            fleet=f,
            clock=self.clock,
            table=self.table,
            nodes=nodes,
            log=self.log,
            journal=Journal(),
        )
        self.backend.start()

    def close(self, *, stop_engines: bool = False) -> None:
        self.backend.close(stop_engines=stop_engines)
        self.log.close()

    def order(self, kind: Kind, *keys: ReplicaId) -> None:
        actions = [Action(kind=kind, llm=key.llm, gpus=key.gpus) for key in keys]
        self.backend.apply(actions)

    def until(self, done: Callable[[], bool]) -> float:
        """Seconds; looked at each time something has changed."""
        begin = perf_counter()
        while not done():
            if perf_counter() - begin > 60.0:
                raise TimeoutError(self.backend.status())
            self.clock.wait(self.clock.now_s() + 0.05)
        return perf_counter() - begin

    def phases(self) -> dict[ReplicaId, str]:
        return {r.id: r.phase for r in self.backend.observe().replicas}

    def fill(self, f: Fleet) -> None:
        """a and b ACTIVE, c WARM, on every GPU."""
        every = {llm: [replica_id(llm, (g,)) for g in f.cluster.gpus] for llm in "abc"}
        keys = [key for llm in "abc" for key in every[llm]]
        there = self.phases()
        self.order("load", *(key for key in keys if key not in there))
        self.until(
            lambda: all(self.phases().get(k) not in (None, "LOADING") for k in keys)
        )
        serve = [*every["a"], *every["b"]]
        there = self.phases()
        self.order("activate", *(key for key in serve if there[key] == "WARM"))
        self.until(lambda: all(self.phases()[key] == "ACTIVE" for key in serve))


def quantiles(found: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(found, [0.5, 0.99])
    return {"p50_s": float(p50), "p99_s": float(p99), "max_s": max(found)}


def measure(run: Run, rounds: int) -> dict[str, list[float]]:
    """Orders one after the other, to a c on each node in turn."""
    found: dict[str, list[float]] = {
        name: [] for name in ("promotion_s", "demotion_s", "observe_s", "apply_s")
    }
    for i in range(rounds):
        key = replica_id("c", (gpu(i % 8, f"n{i % 4}"),))
        begin = perf_counter()
        run.order("activate", key)
        found["apply_s"].append(perf_counter() - begin)
        run.until(lambda key=key: any(r.id == key for r in run.backend.published))
        found["promotion_s"].append(perf_counter() - begin)
        begin = perf_counter()
        run.order("demote", key)
        run.until(lambda key=key: run.phases()[key] == "WARM")
        found["demotion_s"].append(perf_counter() - begin)
        begin = perf_counter()
        run.backend.observe()
        found["observe_s"].append(perf_counter() - begin)
    return found


@click.command()
@click.option("--rounds", default=100)
def main(rounds: int) -> None:
    """Measure and write benchmarks/results/live_backend.json."""
    f = scene()
    found: dict[str, object] = {"rounds": rounds, "load_average": os.getloadavg()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        made = {}
        for kind in ("here", "hosted"):
            (folder / kind).mkdir()
            settings = Waiting(folder=folder)
            own = setups(f, folder / kind, "tests.live_engines:make", settings)
            if kind == "here":
                nodes: dict[str, Open] = {n: Local(make_agent(own[n])) for n in own}
            else:
                nodes = {n: Hosted(own[n]) for n in own}
            made[kind] = (nodes, Run(folder / kind, f, nodes))
            made[kind][1].fill(f)
        times: dict[str, dict[str, list[float]]] = {kind: {} for kind in made}
        for _ in range(4):
            for kind, (_, run) in made.items():
                for what, more in measure(run, rounds // 4).items():
                    times[kind].setdefault(what, []).extend(more)
        for kind, by_name in times.items():
            found[kind] = {what: quantiles(some) for what, some in by_name.items()}
        nodes, run = made["hosted"]
        run.close()
        begin = perf_counter()
        run = Run(folder / "hosted", f, nodes)
        found["start_s"] = perf_counter() - begin
        with (folder / "hosted" / "n0.log").open() as file:
            pid = json.loads(file.readline())["pid"]
        begin = perf_counter()
        os.kill(pid, signal.SIGKILL)
        run.until(lambda: bool(run.backend.observe().lost_gpus))
        lost_s = perf_counter() - begin
        run.until(lambda: not run.backend.observe().lost_gpus)
        run.fill(f)
        again_s = perf_counter() - begin
        found["agent_killed_s"] = {"lost": lost_s, "serves_again": again_s}
        log = IntentLog(folder / "x.log")
        some = []
        for i in range(rounds):
            begin = perf_counter()
            log.append("intent", number=i, kind="activate", llm="a", gpus=["n0/0"])
            some.append(perf_counter() - begin)
        log.close()
        found["log_s"] = quantiles(some)
        run.close(stop_engines=True)
        made["here"][1].close(stop_engines=True)
    write_result("live_backend", found)


if __name__ == "__main__":
    main()
