"""The live backend over a local Ray, in a program of its own: ``python -m tests.live_ray
FOLDER``. Prints one line of JSON: what a test looks at."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.ray.nodes import RayNode
from foreserve.runtime.ray.studies import connected
from tests.live_setup import key, live, on, setup, three

folder = Path(sys.argv[1])
seen: dict[str, object] = {}
clock = SystemClock()
ray = connected("local", num_gpus=4)
seen["ray_s"] = clock.now_s()
f = three(nodes=2)
nodes = {node: RayNode(ray, setup(folder, f, node)) for node in ("n0", "n1")}
clock = SystemClock()
with live(folder, f, nodes) as run:
    seen["agents_s"] = clock.now_s()
    seen["reach_s"] = run.reach(on("a", 0), on("b", 1), on("c", 0, node="n1"))
    seen["switch_s"] = run.reach(on("a", 0), on("c", 1), on("c", 0, node="n1"))
    os.kill(nodes["n0"].pid(), signal.SIGKILL)
    seen["lost_s"] = run.until(lambda: run.backend.observe().lost_gpus)
    seen["routable_then"] = [r.id.gpus[0].node for r in run.backend.published]
    seen["back_s"] = run.until(lambda: run.table.routable() == 3, within_s=20.0)
# Another controller on the same actors: everything is still there.
with live(folder, f, nodes) as run:
    seen["generation"] = run.backend.generation
    seen["still"] = sorted(str(replica) for replica in run.phases())
    seen["same"] = run.phases() == dict.fromkeys(
        [key("a", 0), key("c", 1), key("c", 0, "n1")], "ACTIVE"
    )
for node in nodes.values():
    node.end()
ray.shutdown()
sys.stdout.write(json.dumps(seen) + "\n")
