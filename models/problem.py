"""All that a solver may know: what can run where, and what one plan has to cover.

`Fleet` is static over a plan: cluster, LLMs, and one `ReplicaOption` per (LLM, GPU type,
TP size) that is possible at all. `Problem` adds demand, scenarios, the placement before,
and the prices of the objective. Symbols in the docs are those of docs/formulation.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from foreserve.models.cost import IterationTime
from foreserve.models.errors import InvalidInput
from foreserve.models.loading import LOADERS, LoadRules
from foreserve.models.placement import Placement, Replica, ReplicaId, State
from foreserve.models.record import Record
from foreserve.models.rules import Rules, Sharing
from foreserve.models.serving import ServingRules
from foreserve.models.specs import ClusterSpec, GpuId, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLlm(Record):
    """One LLM as the objective sees it, and the operator's rules for it (C10)."""

    name: str
    weight: float = 1.0
    """omega_m: how much a second of this LLM's delay counts."""
    slo: Slo = field(default_factory=Slo)
    unserved_s: float = 60.0
    """Delay booked for each request of the mean demand that no ACTIVE replica serves."""
    cold_loss_s: float = 0.0
    """loss_m: waiting-seconds of one missing instance in a burst (O2)."""
    instance_concurrency: int = 32
    """B_m: requests in flight that count as one instance when the need is rounded up."""
    min_active: int = 0
    max_replicas: int | None = None
    nodes: tuple[str, ...] | None = None
    """Nodes it may be placed on; None: any."""
    min_after_loss: int = 0
    """ACTIVE replicas that are left after the loss of any one failure domain (C9)."""
    storage_loss_s: float = 0.0
    """Of one missing instance on top of ``cold_loss_s``, where no node keeps its weights
    in host memory (C6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOption(Record):
    """What one replica of ``llm`` on ``tp`` GPUs of ``gpu_type`` takes and gives."""

    llm: str
    gpu_type: str
    tp: int
    resident_bytes: int
    """w_mk: per GPU while resident: the weight shard and ``residue_bytes``."""
    kv_bytes: int
    """Per GPU while ACTIVE: KV for ``concurrency`` requests of mean length."""
    kv_token_bytes: int
    """KV bytes per token per GPU (kappa_mk)."""
    concurrency: int
    """B_mk: requests in flight within the SLO."""
    rate_rps: float
    """mu_mk times rho_max: the rate a plan may book on it; a multiple of 1e-6."""
    exec_s: float
    """e_mk: isolated execution time of a mean request."""
    load_s: float
    activate_s: float
    ttft_s: float
    """Predicted at full concurrency."""
    tpot_s: float
    time: IterationTime
    """Compact cost model, for the simulator and for reports."""
    residue_bytes: int = 0
    """What the process of a resident replica keeps on a GPU beside its weights."""
    activation_bytes: int = 0
    """Per GPU while ACTIVE: peak of a forward pass."""
    load_extra_bytes: int = 0
    """Per GPU while LOADING, on top of ``resident_bytes``: of an engine that allocates its
    KV memory at its start and only then can sleep. Placements do not know of it."""
    weight_bytes: int | None = None
    """Of the LLM, as storage and host memory hold it; None: as its GPUs do."""
    copy_s: float | None = None
    """Of ``load_s``, from pinned host memory alone; None: all of it."""
    start_s: float = 0.0
    """Of ``load_s``: the start of the engine process, before anything moves."""
    demote_s: float = 0.0
    """From its last answer to WARM, while it still holds its KV memory. Solvers do not know
    of it."""
    input_tokens: float = 1.0
    """Mean lengths of the requests that it was made for."""
    output_tokens: float = 1.0

    @property
    def shard_bytes(self) -> int:
        """Weights on each GPU."""
        return self.resident_bytes - self.residue_bytes

    @property
    def stored_bytes(self) -> int:
        """Weights in storage and host memory."""
        stated = self.weight_bytes
        return self.shard_bytes * self.tp if stated is None else stated

    @property
    def moving_s(self) -> float:
        """Of ``load_s``, from host memory to the GPUs."""
        return self.load_s - self.start_s if self.copy_s is None else self.copy_s

    @property
    def active_bytes(self) -> int:
        """v_mk: per GPU while ACTIVE, on top of ``resident_bytes``."""
        return self.kv_bytes + self.activation_bytes

    @property
    def reserved_tokens(self) -> float:
        """Tokens that the KV reserve holds."""
        return self.kv_bytes / self.kv_token_bytes

    def held_tokens(self, rate_rps: float, slowdown: float) -> float:
        """Tokens in flight on average at ``rate_rps`` on a group that slows it down
        (Little's law); an answer is half there on average."""
        tokens = self.input_tokens + self.output_tokens / 2
        return rate_rps * self.exec_s * slowdown * tokens

    def instances(self, unit: int) -> int:
        """How many instances of ``unit`` concurrency it counts for in a burst."""
        return max(1, self.concurrency // unit)


@dataclass(frozen=True, kw_only=True)
class Fleet(Record):
    """What can run where: the static part of every problem and every plan."""

    cluster: ClusterSpec
    llms: tuple[ServedLlm, ...]
    options: tuple[ReplicaOption, ...]
    loading: LoadRules = field(default_factory=LoadRules)
    serving: ServingRules = field(default_factory=ServingRules)
    sharing: Sharing | None = None
    """None: every ACTIVE replica has its GPUs to itself."""
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        names = [llm.name for llm in self.llms]
        if len(set(names)) < len(names):
            raise InvalidInput("the same LLM is listed twice")
        for option in self.options:
            if option.llm not in names:
                raise InvalidInput(f"option of unknown LLM {option.llm!r}")
        for name in names:
            if not any(option.llm == name for option in self.options):
                raise InvalidInput(
                    f"LLM {name!r} fits nowhere: no TP size on any GPU type holds it"
                )

    @cached_property
    def llm_by_name(self) -> Mapping[str, ServedLlm]:
        return {llm.name: llm for llm in self.llms}

    @cached_property
    def number_of(self) -> Mapping[str, int]:
        """Of each LLM: its row in demand and loads."""
        return {llm.name: number for number, llm in enumerate(self.llms)}

    @cached_property
    def _option_by_key(self) -> Mapping[tuple[str, str, int], ReplicaOption]:
        return {(o.llm, o.gpu_type, o.tp): o for o in self.options}

    def option_on(self, llm: str, gpus: tuple[GpuId, ...]) -> ReplicaOption | None:
        """The option a replica of ``llm`` on ``gpus`` uses; None if there is none."""
        node = self.cluster.node_by_name.get(gpus[0].node)
        if node is None:
            return None
        return self._option_by_key.get((llm, node.gpu, len(gpus)))

    def option_of(self, llm: str, gpus: tuple[GpuId, ...]) -> ReplicaOption:
        """As `option_on`, for replicas known to be possible."""
        option = self.option_on(llm, gpus)
        if option is None:
            raise InvalidInput(f"{llm!r} cannot run on {len(gpus)} GPUs at {gpus[0]}")
        return option

    def candidates(self) -> Iterator[tuple[ReplicaOption, tuple[GpuId, ...]]]:
        """Every (option, aligned block) a plan may use: nodes an LLM may be on and GPUs
        that are closed (C10) are seen to here."""
        closed = frozenset(self.rules.closed)
        for option in self.options:
            allowed = self.llm_by_name[option.llm].nodes
            for block in self.cluster.blocks(option.tp, option.gpu_type):
                if allowed is not None and block[0].node not in allowed:
                    continue
                if closed.isdisjoint(block):
                    yield option, block

    def is_candidate(self, key: ReplicaId) -> bool:
        """Whether `candidates` has this LLM on this block."""
        llm = self.llm_by_name.get(key.llm)
        if llm is None or not all(map(self.cluster.has, key.gpus)):
            return False
        node, tp = self.cluster.node_by_name[key.gpus[0].node], len(key.gpus)
        first = key.gpus[0].index
        aligned = first % tp == 0 and key.gpus == node.gpu_ids()[first : first + tp]
        allowed = llm.nodes is None or node.name in llm.nodes
        allowed = allowed and not any(gpu in self.rules.closed for gpu in key.gpus)
        return aligned and allowed and self.option_on(key.llm, key.gpus) is not None

    def reference_s(self, llm: str) -> float:
        """e_m: the least isolated execution time over all options, fixed once."""
        return min(option.exec_s for option in self.options if option.llm == llm)

    @cached_property
    def places(self) -> frozenset[tuple[str, str]]:
        """(node, LLM) where a replica may be."""
        pairs = ((block[0].node, option.llm) for option, block in self.candidates())
        return frozenset(pairs)

    @cached_property
    def stored_bytes(self) -> Mapping[str, int]:
        """Weights of each LLM in host memory."""
        stored: dict[str, int] = {}
        for option in self.options:
            stored[option.llm] = max(stored.get(option.llm, 0), option.stored_bytes)
        return stored

    def storage_s(self, option: ReplicaOption, node: str) -> float:
        """By how much a load takes longer on a node that does not keep the weights in
        host memory, where the plan decides that: the slower stage sets the pace."""
        if self.loading.host_cache != "planned":
            return 0.0
        known = LOADERS["fast"]
        rate = known.storage_share * self.cluster.node_by_name[node].storage_bytes_per_s
        rate = min(rate, known.readers_bytes_per_s(option.tp))
        return max(0.0, option.stored_bytes / rate - option.moving_s)

    def least_storage_s(self, option: ReplicaOption) -> float:
        """`storage_s` on the node of its type with the fastest storage."""
        own = [n.name for n in self.cluster.nodes if n.gpu == option.gpu_type]
        return min((self.storage_s(option, node) for node in own), default=0.0)

    def read_s(self, llm: str, node: str) -> float:
        """The storage of ``node`` is busy so long with the weights of ``llm``."""
        rate = self.cluster.node_by_name[node].storage_bytes_per_s
        return self.stored_bytes[llm] / (LOADERS["fast"].storage_share * rate)

    def host_link_s(self, option: ReplicaOption, node: str) -> float:
        """The host link of ``node``, if its GPUs share one, with a load of ``option``."""
        rate = self.cluster.node_by_name[node].host_link_bytes_per_s
        if rate is None:
            return 0.0
        return option.shard_bytes * option.tp / (LOADERS["fast"].link_share * rate)

    def bytes_on_gpu(self, replica: Replica) -> int:
        """Bytes ``replica`` takes on each of its GPUs in its state."""
        option = self.option_of(replica.llm, replica.gpus)
        return held_bytes(option, replica.state)


def held_bytes(option: ReplicaOption, state: State) -> int:
    """Bytes per GPU of a replica in ``state``: the one rule of (C1)."""
    return option.resident_bytes + (option.active_bytes if state == "ACTIVE" else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices(Record):
    """Exchange rates of the objective, whose unit is a weighted second of delay."""

    usd_s: float = 10.0
    """Seconds of delay that one dollar is worth (O5)."""
    load_s: float = 1.0
    """Seconds of delay charged per second of loading weights (O4)."""
    demote_s: float = 1.0
    """Seconds of delay charged for stopping one ACTIVE replica (O4)."""
    replan_s: float = 0.0
    """Seconds of delay charged for every epoch whose replicas, or their states, differ
    from those of the epoch before (O4)."""
    slower_s: float = 1.0
    """Seconds of delay charged per second that an answer takes longer than on the LLM's
    fastest option (O3); below 1 where a slower answer within the SLO hurts less than
    waiting for it to begin."""


@dataclass(frozen=True, kw_only=True)
class Problem(Record):
    """One solve: epochs ``0..H-1`` of ``epoch_s`` seconds each."""

    fleet: Fleet
    epoch_s: float
    demand_rps: tuple[tuple[float, ...], ...]
    """lambda: [llm][epoch], mean arrivals per second that ACTIVE replicas must cover."""
    scenario_probability: tuple[float, ...] = ()
    """pi: [scenario], sums to 1 (or empty: no bursts)."""
    peak_load: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """L: [scenario][llm][epoch], peak number of requests in flight."""
    initial: Placement = field(default_factory=Placement)
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        llms, scenarios = len(self.fleet.llms), len(self.scenario_probability)
        if not (math.isfinite(self.epoch_s) and self.epoch_s > 0):
            raise InvalidInput(f"epoch_s={self.epoch_s}: expected a positive number")
        if len(self.demand_rps) != llms or self.num_epochs < 1:
            raise InvalidInput("demand_rps: one row per LLM, one column per epoch")
        if len(self.peak_load) != scenarios or any(
            len(rows) != llms for rows in self.peak_load
        ):
            raise InvalidInput("peak_load: [scenario][llm][epoch] is expected")
        rows = [*self.demand_rps, *(row for rows in self.peak_load for row in rows)]
        if any(len(row) != self.num_epochs for row in rows):
            raise InvalidInput("demand_rps, peak_load: unequal numbers of epochs")
        values = [v for row in rows for v in row] + list(self.scenario_probability)
        if not all(math.isfinite(v) and v >= 0 for v in values):
            raise InvalidInput("demand and loads must be finite and not negative")
        if scenarios and not math.isclose(sum(self.scenario_probability), 1.0):
            raise InvalidInput("scenario_probability must sum to 1")

    @property
    def num_epochs(self) -> int:
        return len(self.demand_rps[0]) if self.demand_rps else 0

    def slower_s(self, option: ReplicaOption, slowdown: float = 1.0) -> float:
        """Delay booked for one request served by ``option`` (e_mk - e_m, priced), on a
        group that slows it down."""
        reference_s = self.fleet.reference_s(option.llm)
        return self.prices.slower_s * (option.exec_s * slowdown - reference_s)

    def served_rps(self, replica: Replica, epoch: int) -> float:
        """What ``replica`` is planned to serve of its LLM's demand."""
        row = self.demand_rps[self.fleet.number_of[replica.llm]]
        return row[epoch] * replica.traffic_share

    def need(self, scenario: int, llm: int, epoch: int) -> int:
        """Instances in all that the peak of ``scenario`` asks for (before ACTIVE ones)."""
        unit = self.fleet.llms[llm].instance_concurrency
        return math.ceil(self.peak_load[scenario][llm][epoch] / unit - 1e-9)

    def moments(
        self, epoch: int
    ) -> Sequence[tuple[Mapping[str, int], Mapping[str, float]]]:
        """Of each scenario by LLM: instances needed in all, and requests in flight."""
        if epoch not in self._moments:
            names = [llm.name for llm in self.fleet.llms]
            self._moments[epoch] = [
                (
                    {name: self.need(s, m, epoch) for m, name in enumerate(names)},
                    {name: loads[m][epoch] for m, name in enumerate(names)},
                )
                for s, loads in enumerate(self.peak_load)
            ]
        return self._moments[epoch]

    @cached_property
    def _moments(
        self,
    ) -> dict[int, Sequence[tuple[Mapping[str, int], Mapping[str, float]]]]:
        return {}


def round_rate(rate_rps: float) -> float:
    """Rates in problems are multiples of 1e-6, so integer solvers hold them exactly."""
    return round(rate_rps * 1e6) / 1e6


OPTIONAL: Mapping[str, str] = {
    "sharing": "several LLMs ACTIVE on the same GPUs (C3)",
    "host": "what nodes keep in host memory (C6)",
    "window": "a time in which loads must be done (C7)",
    "keep_serving": "moves without a break (C8)",
    "min_after_loss": "replicas left after the loss of a failure domain (C9)",
    "rules": "pins, LLMs that stay apart, most LLMs on a GPU (C10)",
    "replan": "a price of every change of the placement (O4)",
}
"""What a problem may ask for beyond the rows that are always there."""


def asks_for(problem: Problem) -> frozenset[str]:
    """Keys of `OPTIONAL` that ``problem`` makes use of."""
    fleet = problem.fleet
    rules = fleet.rules
    asked = {
        "sharing": fleet.sharing is not None,
        "host": fleet.loading.host_cache == "planned",
        "window": rules.load_window_s is not None,
        "keep_serving": rules.keep_serving,
        "min_after_loss": any(llm.min_after_loss for llm in fleet.llms),
        "rules": bool(rules.max_llms_per_gpu or rules.apart or rules.held),
        "replan": problem.prices.replan_s > 0,
    }
    return frozenset(key for key, is_asked in asked.items() if is_asked)
