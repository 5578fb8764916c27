"""The scenario: what a person writes down before the first solve.

YAML (or JSON) with ``apiVersion: foreserve/v1alpha1``, ``kind: Scenario`` and the keys
below under ``spec``; a flat file with only the spec keys is accepted too. Quantities take
units (``80GiB``, ``500ms``, ``5m``); everything is SI once it is a `Scenario`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from foreserve.models import catalog
from foreserve.models.codec import did_you_mean, read_text, read_yaml, structure
from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.loading import HostCache, LoadRules
from foreserve.models.problem import Prices
from foreserve.models.quantities import Bytes, BytesPerSecond, Seconds
from foreserve.models.record import Record
from foreserve.models.rules import Held, Rules, Sharing
from foreserve.models.serving import Scheduler, ServingRules
from foreserve.models.specs import ClusterSpec, GpuId, GpuType, Node, Slo

API_VERSION = "foreserve/v1alpha1"
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSpec(Record):
    """99th-percentile targets of a request."""

    ttft: Seconds = 2.0
    tpot: Seconds = 0.1

    def slo(self) -> Slo:
        return Slo(ttft_s=self.ttft, tpot_s=self.tpot)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec(Record):
    """One server, or ``count`` equal ones named ``name``0, ``name``1, ..."""

    name: str
    gpu: str
    gpus: int = 8
    count: int = 1
    host_ram: Bytes = 2 * 1024**4
    storage: BytesPerSecond = 3e9
    host_link: BytesPerSecond | None = None
    """To all GPUs of the node together; None: each GPU's own link is the only limit."""
    domain: str = "default"

    def nodes(self) -> tuple[Node, ...]:
        names = [f"{self.name}{i}" for i in range(self.count)]
        return tuple(
            Node(
                name=name,
                gpu=self.gpu,
                gpus=self.gpus,
                host_ram_bytes=self.host_ram,
                storage_bytes_per_s=self.storage,
                host_link_bytes_per_s=self.host_link,
                domain=self.domain,
            )
            for name in (names if self.count > 1 else [self.name])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPart(Record):
    """Nodes, the GPU types they use, and what a GPU-hour costs here."""

    nodes: tuple[NodeSpec, ...]
    gpu_types: tuple[GpuType, ...] = ()
    """Types that are not in the catalogue, or replace one of it by name."""
    price_usd_per_h: Mapping[str, float] = field(default_factory=dict)
    """Your price per GPU-hour, by GPU type; the catalogue's list price otherwise."""
    usable_fraction: float = 0.95

    def cluster(self) -> ClusterSpec:
        own = {gpu.name: gpu for gpu in self.gpu_types}
        names = dict.fromkeys(node.gpu for node in self.nodes)
        types = [own[name] if name in own else catalog.gpu(name) for name in names]
        priced = tuple(
            replace(gpu, price_usd_per_h=self.price_usd_per_h[gpu.name])
            if gpu.name in self.price_usd_per_h
            else gpu
            for gpu in types
        )
        nodes = tuple(node for spec in self.nodes for node in spec.nodes())
        return ClusterSpec(
            nodes=nodes, gpu_types=priced, usable_fraction=self.usable_fraction
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmPart(Record):
    """One LLM to serve: its name in requests, what it is, and the rules for it."""

    name: str
    llm: str | None = None
    """Catalogue name, where it differs from ``name``; or a path, relative to the scenario,
    of a catalogue file or a ``config.json``."""
    spec: ModelSpec | None = None
    """Full description, for an LLM that is not in the catalogue."""
    tp: tuple[int, ...] | None = None
    """Allowed TP sizes; one entry fixes it."""
    weight: float = 1.0
    slo: SloSpec | None = None
    min_active: int = 0
    max_replicas: int | None = None
    nodes: tuple[str, ...] | None = None
    min_after_loss: int = 0
    """ACTIVE replicas that are left whichever failure domain is lost."""
    input_tokens: float | None = None
    output_tokens: float | None = None
    """Mean lengths to plan with; taken from the history or the trace otherwise."""

    def model_spec(self) -> ModelSpec:
        spec = self.spec or catalog.llm(self.llm or self.name)
        return replace(spec, tp=self.tp) if self.tp else spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastPart(Record):
    """How tomorrow is guessed from the past."""

    method: str = "auto"
    scenarios: int = 20
    history: str | None = None
    """Demand table of the time before the trace (path relative to this file)."""
    occasional_load: float = 0.5
    """An LLM with fewer requests in flight on average than this needs no ACTIVE replica
    of its own: its requests are left to WARM replicas (O2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverPart(Record):
    """Which solver, and its limits per epoch."""

    name: Literal["auto", "milp", "highs", "cpsat", "scale", "greedy"] = "auto"
    time_limit: Seconds = 2.0
    gap: float = 0.001
    seed: int = 0
    threads: int = 1
    lexicographic: bool = False
    """Terms of the objective one after another, unserved demand first (milp)."""
    horizon: int = 1
    """Epochs that each solve looks ahead; of more than one, only the first is carried out
    (docs/rolling.md)."""

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InvalidInput("solver.horizon: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePart(Record):
    """How replicas are run."""

    max_num_seqs: int = 64
    """Most requests one replica works on at once."""
    max_load: float = 0.8
    """rho_max: share of a replica's rate that a plan may book."""
    residue: Bytes | None = None
    """Per GPU and resident replica, beside its weights; None: as measured of vLLM
    processes (context, NCCL, graphs), by TP size."""
    keep_alive: Seconds = 30.0
    """How long a replica that was started on demand stays ACTIVE without requests."""
    host_cache: HostCache = "all"
    """Weights in pinned host memory: ``all`` (loads take the plan's time), ``lru``
    (what was loaded last and fits ``host_ram``), ``none`` (loads read storage)."""
    process_start: Seconds = 0.0
    """Start of an engine process, before a load that finds none ready."""
    process_pool: int = 0
    """Engine processes that each node keeps ready."""
    load_share_beside_serving: float = 1.0
    """Share of its rate that a load gets where a replica serves (assumed, not measured)."""
    slowdown_beside_loading: float = 0.0
    """By how much iterations take longer beside a load: 0.05 is 5 % (assumed)."""

    max_num_batched_tokens: int = 8192
    """Tokens of one iteration, prompts and answers together."""
    prefix_caching: bool = True
    """Prompts that begin alike are computed once, where the trace tells what they share."""
    lending: bool = True
    """Draining replicas lend KV memory to weights that are loaded, until they need it."""
    scheduler: Scheduler = "db-mean"
    """Whose turn it is where several LLMs are ACTIVE on the same GPUs."""
    page: Bytes = 2 * 1024**2
    """Of the KV cache that they share."""
    swapping: bool = True
    """Their requests give way to host memory where that is faster than computing again."""
    near: float = 0.1
    """A turn changes hands only for a cost lower by this share."""
    patience: float | None = None
    """Who was not served for this many times its LLM's usual time goes first."""

    tenure: float = 1.0
    """A replica that begins to serve keeps its GPUs for this many times what it would take
    to have it back: its activation, and its load where its weights would go."""
    turn: Seconds = 30.0
    """After so long one that works gives way to an LLM that has no replica at all."""

    def serving(self) -> ServingRules:
        return ServingRules(
            max_num_batched_tokens=self.max_num_batched_tokens,
            prefix_caching=self.prefix_caching,
            lending=self.lending,
            scheduler=self.scheduler,
            page_bytes=self.page,
            swapping=self.swapping,
            near=self.near,
            patience=self.patience,
            tenure=self.tenure,
            turn_s=self.turn,
        )

    def loading(self) -> LoadRules:
        return LoadRules(
            host_cache=self.host_cache,
            process_start_s=self.process_start,
            process_pool=self.process_pool,
            share_beside_serving=self.load_share_beside_serving,
            slowdown_beside_loading=self.slowdown_beside_loading,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectivePart(Record):
    """Exchange rates of the objective (seconds of delay)."""

    usd_s: float = 10.0
    load_s: float = 1.0
    demote_s: float = 1.0
    slower_s: float = 0.05
    unserved: Seconds = 60.0
    replan_s: float = 0.0
    """Of every epoch in which anything changes place or state."""

    def prices(self) -> Prices:
        return Prices(
            replan_s=self.replan_s,
            usd_s=self.usd_s,
            load_s=self.load_s,
            demote_s=self.demote_s,
            slower_s=self.slower_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingPart(Record):
    """LLMs may be ACTIVE on the same GPUs; see `foreserve.models.rules.Sharing`."""

    most: int = 4
    levels: tuple[float, ...] | None = None
    """None: 0.2, 0.4, 0.55, 0.7 as far as they are below ``max_load``, and that."""
    idle_lends: bool = True

    def sharing(self, max_load: float) -> Sharing:
        below = tuple(v for v in (0.2, 0.4, 0.55, 0.7) if v < max_load)
        return Sharing(
            most=self.most,
            booked_load=max_load,
            levels=self.levels or (*below, max_load),
            idle_lends=self.idle_lends,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesPart(Record):
    """Rules for the whole cluster; see `foreserve.models.rules.Rules`."""

    max_llms_per_gpu: int | None = None
    apart: tuple[tuple[str, str], ...] = ()
    closed: tuple[GpuId, ...] = ()
    held: tuple[Held, ...] = ()
    load_window: Seconds | None = None
    keep_serving: bool = False

    def rules(self) -> Rules:
        return Rules(
            max_llms_per_gpu=self.max_llms_per_gpu,
            apart=self.apart,
            closed=self.closed,
            held=self.held,
            load_window_s=self.load_window,
            keep_serving=self.keep_serving,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario(Record):
    """Everything `plan solve` needs beside the trace."""

    cluster: ClusterPart
    models: tuple[LlmPart, ...]
    epoch: Seconds = 300.0
    slo: SloSpec = field(default_factory=SloSpec)
    forecast: ForecastPart = field(default_factory=ForecastPart)
    solver: SolverPart = field(default_factory=SolverPart)
    runtime: RuntimePart = field(default_factory=RuntimePart)
    objective: ObjectivePart = field(default_factory=ObjectivePart)
    sharing: SharingPart | None = None
    """None: every ACTIVE replica has its GPUs to itself."""
    rules: RulesPart = field(default_factory=RulesPart)

    def __post_init__(self) -> None:
        names = [llm.name for llm in self.models]
        if not names:
            raise InvalidInput("models: at least one LLM is needed")
        if twice := [name for name in names if names.count(name) > 1]:
            raise InvalidInput(f"models: {twice[0]!r} is listed twice")
        if self.epoch <= 0:
            raise InvalidInput("epoch: must be positive")
        # Build all now, so that an unknown GPU or LLM is reported with its file.
        parts: dict[str, Callable[[], object]] = {
            "runtime": lambda: (self.runtime.loading(), self.runtime.serving()),
            "sharing": lambda: (
                self.sharing and self.sharing.sharing(self.runtime.max_load)
            ),
            "rules": self.rules.rules,
        }
        for name, build in parts.items():
            try:
                build()
            except InvalidInput as error:
                raise error.at(field=name) from None
        cluster = self.cluster.cluster()
        self._check_rules(cluster)
        for index, llm in enumerate(self.models):
            self._check_tp(index, llm, cluster)

    def _check_rules(self, cluster: ClusterSpec) -> None:
        known = {llm.name for llm in self.models}
        rules = self.rules
        for field_, name in (
            *(("apart", name) for pair in rules.apart for name in pair),
            *(("held", held.llm) for held in rules.held),
        ):
            if name not in known:
                hint = did_you_mean(name, sorted(known))
                raise InvalidInput(
                    f"unknown LLM {name!r}", field=f"rules.{field_}", hint=hint
                )
        gpus = [*rules.closed, *(gpu for held in rules.held for gpu in held.gpus)]
        for gpu in gpus:
            if not cluster.has(gpu):
                raise InvalidInput(f"the cluster has no GPU {gpu}", field="rules")

    def _check_tp(self, index: int, llm: LlmPart, cluster: ClusterSpec) -> None:
        try:
            spec = llm.model_spec()
        except InvalidInput as error:
            raise error.at(field=f"models.{index}.llm") from None
        largest = max(node.gpus for node in cluster.nodes)
        if min(spec.tp) > largest:
            raise InvalidInput(
                f"{llm.name!r}: TP {list(spec.tp)} fits no node, the largest has "
                f"{largest} GPUs",
                field=f"models.{index}.tp",
                hint=f"allow a TP size of at most {largest}",
            )
        for name in llm.nodes or ():
            if name not in cluster.node_by_name:
                raise InvalidInput(
                    f"{llm.name!r}: unknown node {name!r}",
                    field=f"models.{index}.nodes",
                    hint="one of " + ", ".join(cluster.node_by_name),
                )


def load_scenario(path: str | os.PathLike[str]) -> Scenario:
    """Read a scenario file; each fault is an `InvalidInput` with line and field."""
    file, text = os.fspath(path), read_text(path)
    return parse_scenario(text, file)


def parse_scenario(text: str, file: str | None = None) -> Scenario:
    """Read a scenario from YAML or JSON text."""
    if len(text) > MAX_BYTES:
        raise InvalidInput(f"larger than {MAX_BYTES} bytes", file=file)
    plain = read_yaml(text, file)
    if not isinstance(plain, dict):
        raise InvalidInput(
            "empty file" if plain is None else "a mapping of keys is expected",
            file=file,
            hint="`plan init` writes a commented scenario to start from",
        )
    _resolve_paths(plain.get("spec", plain), file)
    if "spec" in plain:
        envelope: _Envelope = structure(_Envelope, plain, text=text, file=file)
        return envelope.spec
    return structure(Scenario, plain, text=text, file=file)


def _resolve_paths(spec: object, file: str | None) -> None:
    """Make the paths of LLMs, which are relative to ``file``, paths from here."""
    parts = spec.get("models") if isinstance(spec, dict) else None
    for part in parts if isinstance(parts, list) else ():
        llm = part.get("llm") if isinstance(part, dict) else None
        if isinstance(llm, str) and catalog.is_path(llm):
            part["llm"] = os.path.join(os.path.dirname(file or ""), llm)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope(Record):
    apiVersion: Literal["foreserve/v1alpha1"]
    kind: Literal["Scenario"]
    spec: Scenario
    metadata: Mapping[str, str] = field(default_factory=dict)
