"""Writes the named instances beside it: ``python -m tests.instances.make``.

GPUs hold 100 bytes and cost 1.0 for an epoch of 100 s; a replica takes 30 bytes (20 more
when ACTIVE), serves 1 request/s in 1 s each, loads in 2 s and counts as one instance of
8 requests in flight; a missing instance costs 10, a refused request 60. What differs is
said with each instance, with the sum that its optimum is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foreserve.models.codec import to_json, write_text
from foreserve.models.problem import Prices, Problem
from tests.build import cluster, fleet, option
from tests.problems import placement, problem, realistic

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A problem, its least cost, and why nothing costs less."""

    problem: Problem
    optimum: float
    about: str


def instances() -> dict[str, Instance]:
    """Name -> instance."""
    a, b = option("a"), option("b")
    tp2 = option("a", 2, exec_s=0.6)
    quiet, burst = [[0.0], [0.0]], [(0.5, [[0], [8]]), (0.5, [[8], [0]])]
    return {
        "serve-one": Instance(
            problem=problem(fleet(a), [[0.5]]),
            optimum=3.0,
            about="One LLM, two GPUs. Load 2 + rent 1; refusing 50 requests costs 3000.",
        ),
        "not-worth-it": Instance(
            problem=problem(fleet(a, unserved_s=0.05), [[0.5]]),
            optimum=2.5,
            about="Refusing 50 requests at 0.05 s each costs less than load and rent, 3.",
        ),
        "more-llms-than-gpus": Instance(
            problem=problem(fleet(a, b, on=cluster(1)), [[0.5], [0.4]]),
            optimum=2403.0,
            about="One GPU, two LLMs with demand: b's 40 requests are refused (2400), a "
            "is loaded (2) on the GPU (1).",
        ),
        "faster-on-two": Instance(
            problem=problem(fleet(a, tp2), [[0.5]]),
            optimum=4.0,
            about="TP 2 needs a second GPU (1) but saves 0.4 s for each of 50 requests.",
        ),
        "slower-on-one": Instance(
            problem=problem(
                fleet(a, tp2), [[0.5]], prices=Prices(usd_s=1.0, slower_s=0.004)
            ),
            optimum=2.18,
            about="Rent 0.1 a GPU, and a slower answer counts 0.004: TP 1 costs 20 x 0.004 "
            "= 0.08 of slowness and 0.1, TP 2 costs 0.2; both load in 2.",
        ),
        "bursts-apart": Instance(
            problem=problem(fleet(a, b), quiet, burst),
            optimum=5.0,
            about="Bursts of a and b never meet, so one GPU (1) holds both WARM (2 + 2).",
        ),
        "bursts-together": Instance(
            problem=problem(fleet(a, b), quiet, [(0.5, [[8], [8]]), (0.5, [[0], [0]])]),
            optimum=6.0,
            about="The same chances, but bursts meet: a second GPU (1) beats a miss (5).",
        ),
        "no-room-beside-kv": Instance(
            problem=problem(
                fleet(option("a", resident_bytes=60, kv_bytes=15), b, on=cluster(1)),
                [[0.5], [0.0]],
                [(1.0, [[0], [8]])],
            ),
            optimum=13.0,
            about="One GPU. a serves (3) with 75 bytes, b would need 30 more: its burst "
            "costs 10. It would not help anyway, under an ACTIVE replica.",
        ),
        "whole-set": Instance(
            problem=problem(
                fleet(option("a", 2), b, cold_loss_s=100.0, max_replicas=2),
                quiet,
                [(0.5, [[0], [16]]), (0.25, [[8], [0]]), (0.25, [[8], [16]])],
            ),
            optimum=2.0 + 4.0 + 2.0 + 25.0,
            about="a over both GPUs (2) and two b (4), WARM at a rent of 2. Where both "
            "burst, an activation of a would bar both b: a misses, 0.25 x 100.",
        ),
        "stay-put": Instance(
            problem=problem(
                fleet(a, b),
                [[0.5], [0.5]],
                initial=placement(("a", "n0/1", "ACTIVE"), ("b", "n0/0", "WARM")),
            ),
            optimum=2.0,
            about="a goes on where it is and b becomes ACTIVE where it is WARM: rent only.",
        ),
        "ride-out-a-dip": Instance(
            problem=problem(
                fleet(a, b, on=cluster(1), unserved_s=1.0),
                [[0.5, 0.0, 0.5], [0.0, 0.5, 0.0]],
            ),
            optimum=2.0 + 2.0 + 3.0 + 1.0 + 1.0,
            about="Three epochs, one GPU: a, b, a serve in turn. Each is loaded once (4), "
            "a stays WARM while b serves, two replicas are stopped (2), rent is 3. "
            "Refusing 50 requests in an epoch costs 50.",
        ),
        "rules": Instance(
            problem=problem(
                fleet(a, b, on=cluster(1, nodes=3), min_active=1, nodes=("n0", "n2")),
                quiet,
                initial=placement(("a", "n1/0", "ACTIVE"), ("b", "n2/0", "WARM")),
            ),
            optimum=1.0 + 2.0 + 2.0,
            about="Each must serve on n0 or n2. a leaves n1 (stop 1, load 2), b becomes "
            "ACTIVE where it is; rent 2.",
        ),
        "eight-by-eight": Instance(
            problem=realistic(np.random.default_rng(10), 8, [8], 6, busy=0.25),
            optimum=16.9753772436,
            about="Eight LLMs of 3 to 70 billion parameters on eight 80 GiB GPUs, half of "
            "them asked for only now and then; six scenarios (see `realistic`). HiGHS "
            "and CP-SAT agree, each with its own bound.",
        ),
        "sixteen-by-sixteen": Instance(
            problem=realistic(np.random.default_rng(104), 16, [8, 8], 4),
            optimum=653.8997105818,
            about="The same with sixteen LLMs on two nodes of eight, four scenarios.",
        ),
    }


def main() -> None:
    for name, instance in instances().items():
        write_text(FOLDER / f"{name}.json", to_json(instance.problem))


if __name__ == "__main__":
    main()
