"""A Ray cluster whose machines are processes here: ``python -m tests.ray_cluster GPUS...``

Prints its address. Then obeys lines of its standard input: ``lose PID`` takes away, without
a word to anybody, the machine that has the worker process PID; ``leave PID`` has it leave
in order; ``join GPUS`` adds one. Each is answered by a line. Ends with its input.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
LOOKS = {"health_check_period_ms": "1000", "health_check_failure_threshold": "3"}
"""Ray takes a machine that does not answer for dead after 3 s, not after 15."""
for name, value in LOOKS.items():
    os.environ.setdefault(f"RAY_{name}", value)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parent(pid: str) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])


def main() -> None:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)

    def join(gpus: str) -> None:
        cluster.add_node(wait=False, num_cpus=0, num_gpus=int(gpus))

    def raylet(node: Any) -> int:
        processes = node.all_processes["raylet"]
        return int(processes[0].process.pid)

    for gpus in sys.argv[1:]:
        join(gpus)
    cluster.wait_for_nodes()
    say(str(cluster.address))
    for line in sys.stdin:
        what, word = line.split()
        if what == "join":
            join(word)
            cluster.wait_for_nodes()
        else:
            home = parent(word)
            node = next(n for n in cluster.worker_nodes if raylet(n) == home)
            cluster.remove_node(node, allow_graceful=what == "leave")
        say(what)
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    cluster.shutdown()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
