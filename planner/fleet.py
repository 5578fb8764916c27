"""What can run where: a scenario's LLMs on its cluster, priced by the cost model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.capacity import capacity, cold_loss_s
from foreserve.models.cost import PerfModel
from foreserve.models.errors import InvalidInput
from foreserve.models.footprint import EngineMemory, footprint
from foreserve.models.lengths import Lengths
from foreserve.models.llm import ModelSpec
from foreserve.models.perf.compact import decode_many, prefill_many
from foreserve.models.perf.model import Measured
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet, ReplicaOption, ServedLlm, round_rate
from foreserve.models.specs import ClusterSpec, GpuType
from foreserve.planner.scenario import LlmPart, Scenario
from foreserve.traces.trace import Demand, Trace

TYPICAL_BATCH = 8
"""Batch at which a request's time in flight is estimated when load is counted."""
USUAL_INPUT_TOKENS, USUAL_OUTPUT_TOKENS = 1155.0, 211.0
"""Means of Azure's conversations in 2023 (`sample:azure-2023`)."""
LONGEST_REQUEST_TOKENS = 16_384
"""KV an ACTIVE replica keeps at least, memory and the LLM's context permitting."""


def align(trace: Trace, names: tuple[str, ...]) -> Trace:
    """The trace with its LLMs in the order of ``names``; unknown ones are an error."""
    present = [trace.llms[i] for i in np.unique(trace.llm)]
    for name in present:
        if name not in names:
            raise InvalidInput(
                f"the trace asks for LLM {name!r}, which is not served here",
                field="llm",
                hint=f"serve it too, or leave it out; served: {', '.join(names)}",
            )
    index = {name: i for i, name in enumerate(names)}
    order = np.array([index.get(name, -1) for name in trace.llms], dtype=np.int32)
    return replace(trace, llm=order[trace.llm], llms=names)


def request_lengths(
    scenario: Scenario, trace: Trace, history: Demand | None
) -> dict[str, Lengths]:
    """Lengths of each LLM's requests: as stated, else from the history or the trace.

    What is stated, and a history, are means alone: all requests are alike then. The trace
    gives the distribution.
    """
    found = {}
    for index, llm in enumerate(scenario.models):
        rows = trace.llm == index
        inputs, outputs = trace.input_tokens[rows], trace.output_tokens[rows]
        means: list[float | None] = []
        for stated, column in (
            (llm.input_tokens, "input_tokens"),
            (llm.output_tokens, "output_tokens"),
        ):
            mean = stated
            if mean is None and history is not None:
                mean = _history_mean(history, llm.name, column)
            if mean is None and not len(inputs):
                raise InvalidInput(
                    f"no requests of {llm.name!r} to take its {column} from",
                    field=f"models.{index}.{column}",
                    hint=f"state {column} in the scenario",
                )
            means.append(mean)
        mean_input, mean_output = means
        if mean_input is not None and mean_output is not None:
            found[llm.name] = Lengths.fixed(mean_input, mean_output)
            continue
        seen = Lengths.of_requests(inputs, outputs)
        found[llm.name] = seen.scaled(
            seen.mean_input if mean_input is None else mean_input,
            seen.mean_output if mean_output is None else mean_output,
        )
    return found


def with_usual_lengths(
    scenario: Scenario, history: Demand | None
) -> tuple[Scenario, tuple[str, ...]]:
    """The scenario where each LLM that nothing is known of is taken to be asked as a chat
    service is (`USUAL_INPUT_TOKENS`, `USUAL_OUTPUT_TOKENS`); the names of those."""
    models = []
    guessed = []
    for llm in scenario.models:
        usual = replace(
            llm,
            input_tokens=_mean_or(USUAL_INPUT_TOKENS, llm, history, "input_tokens"),
            output_tokens=_mean_or(USUAL_OUTPUT_TOKENS, llm, history, "output_tokens"),
        )
        models.append(usual)
        if usual != llm:
            guessed.append(llm.name)
    return replace(scenario, models=tuple(models)), tuple(guessed)


def _mean_or(
    usual: float, llm: LlmPart, history: Demand | None, column: str
) -> float | None:
    """As stated, or None where the history knows it."""
    stated: float | None = getattr(llm, column)
    if stated is None and history is not None:
        return usual if _history_mean(history, llm.name, column) is None else None
    return usual if stated is None else stated


def _history_mean(history: Demand, llm: str, column: str) -> float | None:
    if llm not in history.llms:
        return None
    row = history.llms.index(llm)
    weight = history.rate_rps[row]
    if weight.sum() <= 0:
        return None
    return float(np.average(getattr(history, column)[row], weights=weight))


def build_fleet(
    scenario: Scenario, lengths: Mapping[str, Lengths], perf: PerfModel | None = None
) -> Fleet:
    """What can run where: one option per (LLM, GPU type, TP) that holds its SLO."""
    perf = perf or Measured()
    cluster = scenario.cluster.cluster()
    options = [
        option
        for llm in scenario.models
        for option in _options(scenario, llm, cluster, lengths[llm.name], perf)
    ]
    served = []
    for llm in scenario.models:
        own = [option for option in options if option.llm == llm.name]
        if not own:
            raise InvalidInput(_why_nowhere(scenario, llm, cluster))
        unit = min(option.concurrency for option in own)
        exec_s = min(option.exec_s for option in own)
        # A cold start is priced at the quickest one the operator allows.
        cold_s = min(option.load_s + option.activate_s for option in own)
        slowest_s = max(option.exec_s for option in own)
        served.append(
            ServedLlm(
                name=llm.name,
                weight=llm.weight,
                slo=(llm.slo or scenario.slo).slo(),
                # Refusing a request must never look better than serving it slowly.
                unserved_s=max(scenario.objective.unserved, 2 * slowest_s),
                cold_loss_s=cold_loss_s(unit, cold_s, exec_s),
                instance_concurrency=unit,
                min_active=llm.min_active,
                max_replicas=llm.max_replicas,
                nodes=llm.nodes,
                min_after_loss=llm.min_after_loss,
            )
        )
    part = scenario.sharing
    return Fleet(
        cluster=cluster,
        llms=tuple(served),
        options=tuple(options),
        loading=scenario.runtime.loading(),
        serving=scenario.runtime.serving(),
        sharing=None if part is None else part.sharing(scenario.runtime.max_load),
        rules=scenario.rules.rules(),
    )


def _options(
    scenario: Scenario,
    llm: LlmPart,
    cluster: ClusterSpec,
    lengths: Lengths,
    perf: PerfModel,
) -> Iterator[ReplicaOption]:
    spec = llm.model_spec()
    input_tokens, output_tokens = lengths.mean_input, lengths.mean_output
    storage = _storage_bytes_per_s(scenario, cluster)
    rules = scenario.runtime.loading()
    start_s = 0.0 if rules.process_pool else rules.process_start_s
    for gpu in cluster.gpu_types:
        largest = max(node.gpus for node in cluster.nodes if node.gpu == gpu.name)
        for tp in (tp for tp in spec.tp if tp <= largest):
            weights, residue, activation = _engine_bytes(scenario, spec, gpu, tp)
            resident = weights + residue
            free = _usable_bytes(cluster, gpu) - resident - activation
            per_token = spec.kv_bytes_per_token_per_gpu(tp)
            state = spec.kv_bytes_fixed_per_sequence_per_gpu(tp) / per_token
            time = perf.iteration(spec, gpu, tp)
            held = capacity(
                time,
                (llm.slo or scenario.slo).slo(),
                lengths,
                kv_tokens=free / per_token,
                max_num_seqs=scenario.runtime.max_num_seqs,
                state_tokens=state,
            )
            if held is None:
                continue
            kv_tokens = held.concurrency * (input_tokens + output_tokens + state)
            # One request of the longest allowed context must fit, memory permitting.
            kv_tokens = max(
                kv_tokens, min(spec.max_context_tokens, LONGEST_REQUEST_TOKENS)
            )
            yield ReplicaOption(
                llm=llm.name,
                gpu_type=gpu.name,
                tp=tp,
                resident_bytes=resident,
                kv_bytes=min(free, math.ceil(kv_tokens * per_token)),
                kv_token_bytes=per_token,
                concurrency=held.concurrency,
                rate_rps=round_rate(held.rate_rps * scenario.runtime.max_load),
                exec_s=time.isolated_s(input_tokens, output_tokens),
                load_s=start_s + perf.load_s(spec, gpu, tp, storage),
                copy_s=perf.load_s(spec, gpu, tp),
                start_s=start_s,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                weight_bytes=spec.weight_bytes,
                activate_s=perf.activate_s(spec, gpu, tp),
                ttft_s=held.ttft_s,
                tpot_s=held.tpot_s,
                time=time,
                residue_bytes=residue,
                activation_bytes=activation,
            )


def _engine_bytes(
    scenario: Scenario, spec: ModelSpec, gpu: GpuType, tp: int
) -> tuple[int, int, int]:
    """Weights, residue and activation peak of an engine process on each of its GPUs."""
    runtime = scenario.runtime
    found = footprint(spec, gpu, tp, EngineMemory(max_num_seqs=runtime.max_num_seqs))
    residue = found.residue_bytes[1] if runtime.residue is None else runtime.residue
    return found.num_bytes("weights"), residue, found.num_bytes("activation")


def _usable_bytes(cluster: ClusterSpec, gpu: GpuType) -> int:
    return int(gpu.memory_bytes * cluster.usable_fraction)


def _storage_bytes_per_s(scenario: Scenario, cluster: ClusterSpec) -> float | None:
    """None where every node can pin all weights in host memory, else storage's rate."""
    weights = sum(llm.model_spec().weight_bytes for llm in scenario.models)
    cached = scenario.runtime.host_cache != "none"
    if cached and all(weights <= node.host_ram_bytes for node in cluster.nodes):
        return None
    return min(node.storage_bytes_per_s for node in cluster.nodes)


def _why_nowhere(scenario: Scenario, llm: LlmPart, cluster: ClusterSpec) -> str:
    spec = llm.model_spec()
    gpu = max(cluster.gpu_types, key=lambda gpu: gpu.memory_bytes)
    tp = max(spec.tp)
    need_gib = sum(_engine_bytes(scenario, spec, gpu, tp)) / 2**30
    have_gib = _usable_bytes(cluster, gpu) / 2**30
    slo = (llm.slo or scenario.slo).slo()
    return (
        f"{llm.name!r} fits nowhere: at TP {tp} it needs {need_gib:.1f} GiB per GPU "
        f"beside its KV cache, {gpu.name} has {have_gib:.1f} GiB usable, and one request "
        f"must meet TTFT {slo.ttft_s} s and TPOT {slo.tpot_s} s"
    )


def busy_s(fleet: Fleet, trace: Trace) -> NDArray[np.float64]:
    """Estimated time in flight of each request: [request], seconds."""
    seconds = np.zeros(len(trace))
    for index, name in enumerate(trace.llms):
        time = min(
            (o for o in fleet.options if o.llm == name), key=lambda o: (o.tp, o.exec_s)
        ).time
        mask = trace.llm == index
        tokens = trace.input_tokens[mask].astype(np.float64)
        output = trace.output_tokens[mask].astype(np.float64)
        context = TYPICAL_BATCH * (tokens + output / 2)
        step_s = decode_many([time], TYPICAL_BATCH, context)[0]
        prefill_s = prefill_many(time, tokens)
        seconds[mask] = prefill_s + output * step_s
    return seconds


def perfect_system_gpus(plan: Plan) -> tuple[float, float]:
    """GPUs a system without integrality, packing or switching would need: peak, mean.

    Sum over LLMs of rate over the best rate per GPU (lambda / mu), per epoch's forecast.
    """
    per_gpu = {
        llm.name: max(
            o.rate_rps / o.tp for o in plan.fleet.options if o.llm == llm.name
        )
        for llm in plan.fleet.llms
    }
    gpus = [
        sum(row.rate_rps / per_gpu[row.llm] for row in epoch.demand)
        for epoch in plan.epochs
    ]
    return max(gpus), sum(gpus) / len(gpus)


def gpu_hours(plan: Plan) -> tuple[float, float]:
    """GPU-hours of GPUs that hold anything in the plan, and their price in dollars."""
    hours = usd = 0.0
    for epoch in plan.epochs:
        epoch_h = (epoch.end_s - epoch.start_s) / 3600
        for gpu in epoch.placement.by_gpu:
            hours += epoch_h
            usd += epoch_h * plan.fleet.cluster.type_of(gpu).price_usd_per_h
    return hours, usd
