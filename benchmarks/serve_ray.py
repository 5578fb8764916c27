"""How soon `plan serve` is back over a Ray cluster that loses processes and machines.

    PYTHONPATH=. python benchmarks/serve_ray.py

Three machines of two GPUs each (raylets on this one) and a head without any; two nodes,
simulated engines at real pace, a 70B on one node and an 8B on the other. From the blow
until the 70B that was lost is answered again, over HTTP:

- ``agent_s``: SIGKILL to the actor's process;
- ``machine_leaves_s``: its machine leaves in order;
- ``machine_lost_s``: its raylet is killed, so that Ray has to notice by itself.

Each with Ray's own health checks (every 3 s, dead after 5 failures) and with quicker ones
(every second, 3). Loading the 70B alone takes ``load_s`` by the plan.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

from record import write_result

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.live.check import check
from tests.test_serve_ray import Machines, Served

LOOKS = {
    "as Ray comes": {"period_ms": "3000", "failure_threshold": "5"},
    "quicker": {"period_ms": "1000", "failure_threshold": "3"},
}
ROUNDS = 3


def measured(folder: Path) -> dict[str, object]:
    clock = SystemClock()
    machines = Machines(2, 2, 2)
    found: dict[str, object] = {"cluster_s": clock.now_s()}
    served = Served(
        folder, "--address", machines.address, "--node-folder", str(folder / "st")
    )
    try:
        clock = SystemClock()
        served.start()
        found["serve_s"] = clock.now_s()
        for llm in ("small", "large"):
            assert served.ask(llm)[0] == 200
        node = served.node_of("large")
        for what in ("agent_s", "machine_leaves_s", "machine_lost_s"):
            times = []
            for _ in range(ROUNDS):
                pid = served.starts(node)[-1]["pid"]
                clock = SystemClock()
                if what == "agent_s":
                    os.kill(pid, signal.SIGKILL)
                else:
                    machines.tell("leave" if "leaves" in what else "lose", pid)
                told_s = clock.now_s()
                times.append(told_s + served.back(node, "large"))
                if what != "agent_s":
                    machines.tell("join", 2)
            found[what] = times
        plan = json.loads((folder / "st/plan.json").read_text())
        options = plan["fleet"]["options"]
        found["load_s"] = min(o["load_s"] for o in options if o["llm"] == "large")
        served.end()
        found["faults"] = check(folder / "st").faults
    finally:
        served.process.kill()
        machines.end()
    return found


def main() -> None:
    runs = {}
    for name, looks in LOOKS.items():
        os.environ |= {f"RAY_health_check_{key}": looks[key] for key in looks}
        with TemporaryDirectory() as folder:
            runs[name] = measured(Path(folder))
    write_result("serve_ray", {"runs": runs})


if __name__ == "__main__":
    main()
