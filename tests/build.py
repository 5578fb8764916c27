"""Small fleets and plans that can be checked by hand, for all tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from foreserve.models.codec import to_json
from foreserve.models.cost import IterationTime
from foreserve.models.placement import Placement, Replica
from foreserve.models.plan import (
    Certificate,
    Epoch,
    LlmDemand,
    Plan,
    SolverInfo,
    Status,
)
from foreserve.models.problem import Fleet, ReplicaOption, ServedLlm
from foreserve.models.specs import ClusterSpec, GpuId, GpuType, Node

TIME = IterationTime(
    prefill_base_s=0.01,
    prefill_s_per_token=1e-5,
    prefill_s_per_token2=0.0,
    decode_base_s=0.01,
    decode_s_per_seq=1e-4,
    decode_s_per_context_token=0.0,
    relative_error=0.4,
    source="test",
)


def gpu(index: int, node: str = "n0") -> GpuId:
    return GpuId(node=node, index=index)


def cluster(gpus: int = 2, nodes: int = 1, memory_bytes: int = 100) -> ClusterSpec:
    """Nodes n0, n1, ... of equal GPUs at 3.60 dollars an hour, all memory usable."""
    kind = GpuType(
        name="g",
        memory_bytes=memory_bytes,
        hbm_bytes_per_s=1e12,
        bf16_flop_per_s=1e14,
        gpu_link_bytes_per_s=1e11,
        host_link_bytes_per_s=5e10,
        price_usd_per_h=3.6,
    )
    return ClusterSpec(
        nodes=tuple(
            Node(name=f"n{i}", gpu="g", gpus=gpus, host_ram_bytes=10**12)
            for i in range(nodes)
        ),
        gpu_types=(kind,),
        usable_fraction=1.0,
    )


def option(llm: str, tp: int = 1, **changes: object) -> ReplicaOption:
    """30 bytes resident, 20 bytes of KV, 8 at a time, 1 request/s, 2 s to load."""
    values: dict[str, object] = {
        "llm": llm,
        "gpu_type": "g",
        "tp": tp,
        "resident_bytes": 30,
        "kv_bytes": 20,
        "kv_token_bytes": 1,
        "concurrency": 8,
        "rate_rps": 1.0,
        "exec_s": 1.0,
        "load_s": 2.0,
        "activate_s": 0.05,
        "ttft_s": 0.1,
        "tpot_s": 0.02,
        "time": TIME,
    }
    return ReplicaOption(**(values | changes))  # type: ignore[arg-type]


def fleet(
    *options: ReplicaOption, on: ClusterSpec | None = None, **changes: object
) -> Fleet:
    """A fleet of the options' LLMs; ``changes`` go into each `ServedLlm`."""
    names = dict.fromkeys(o.llm for o in options)
    values: dict[str, object] = {"cold_loss_s": 10.0, "instance_concurrency": 8}
    return Fleet(
        cluster=on or cluster(),
        llms=tuple(
            ServedLlm(name=name, **(values | changes))  # type: ignore[arg-type]
            for name in names
        ),
        options=options,
    )


def small_plan() -> Plan:
    """Two epochs on two GPUs: a serves on n0/0, b is WARM on n0/1 in the second."""
    active = Replica(llm="a", gpus=(gpu(0),), state="ACTIVE", traffic_share=1.0)
    warm = Replica(llm="b", gpus=(gpu(1),), state="WARM")
    placements = (Placement(replicas=(active,)), Placement(replicas=(active, warm)))
    return Plan(
        foreserve_version="0.1.0",
        fleet=fleet(option("a"), option("b")),
        epochs=tuple(
            Epoch(
                start_s=300.0 * i,
                end_s=300.0 * (i + 1),
                placement=placement,
                demand=(
                    LlmDemand(
                        llm="a",
                        rate_rps=0.5,
                        mean_load=1.0,
                        peak_load=3.0,
                        peak_high=5.0,
                    ),
                ),
                certificate=Certificate(
                    status=Status.OPTIMAL,
                    objective=5.0,
                    bound=4.0,
                    terms={"O1": 2.0, "O5": 3.0},
                    without_warm=6.0,
                ),
            )
            for i, placement in enumerate(placements)
        ),
        solver=SolverInfo(
            name="milp", version="1", seed=0, threads=1, time_limit_s=2.0, gap=0.0
        ),
        forecaster="last",
        inputs={"trace t.csv": "00"},
    )


def ten_minutes(folder: Path, **changes: object) -> None:
    """Write `small_plan` with room for requests (``changes`` of its options) as p.json, and
    as t.csv a request every 3 s: ten minutes of two LLMs on two GPUs."""
    plan = small_plan()
    values = {"kv_bytes": 4000, "resident_bytes": 3000} | changes
    options = tuple(
        replace(option, **values)  # type: ignore[arg-type]
        for option in plan.fleet.options
    )
    on = cluster(memory_bytes=10_000)
    roomy = replace(plan.fleet, options=options, cluster=on)
    (folder / "p.json").write_text(to_json(replace(plan, fleet=roomy)))
    rows = (f"{3 * i},{'ab'[i % 7 == 0]},40,{5 + i % 9}" for i in range(200))
    head = "arrival_s,llm,input_tokens,output_tokens\n"
    (folder / "t.csv").write_text(head + "\n".join(rows) + "\n")
