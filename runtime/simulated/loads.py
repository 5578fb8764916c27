"""All loads of a simulated cluster: each node's links, host memory and processes."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from foreserve.models.loading import HostCache
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.models.specs import ClusterSpec, GpuId, GpuType, Node
from foreserve.runtime.hostram import HostRam
from foreserve.runtime.links import Link, Links, ProcessPool, transfer

CACHED: tuple[HostCache, ...] = ("lru", "planned")
"""Host memory is a cache. A plan's choice of what it keeps is not enforced here: what was
loaded last stays, as far as there is room."""


@dataclass(frozen=True, slots=True, eq=False)
class NodeLoads:
    """What the loads onto one node's GPUs go through."""

    node: Node
    gpu: GpuType
    links: Links
    ram: HostRam
    pool: ProcessPool


class Loads:
    """Starts, ends and hurries loads. Mutable, for one owner, who calls `advance` for a
    node at each of its links' ``next_s``."""

    def __init__(self, fleet: Fleet, now_s: float) -> None:
        self.rules = fleet.loading
        self.by_node: Mapping[str, NodeLoads] = {
            node.name: self._fresh(fleet.cluster, node, now_s)
            for node in fleet.cluster.nodes
        }
        self.under_way: dict[ReplicaId, None] = {}

    def _fresh(self, cluster: ClusterSpec, node: Node, now_s: float) -> NodeLoads:
        return NodeLoads(
            node=node,
            gpu=cluster.type_by_name[node.gpu],
            links=Links(now_s),
            ram=HostRam(node.host_ram_bytes),
            pool=ProcessPool(self.rules),
        )

    def on(self, node: str) -> Iterator[ReplicaId]:
        """Loads onto that node, in the order in which they were asked for."""
        return (key for key in self.under_way if key.gpus[0].node == node)

    def begin(
        self,
        key: ReplicaId,
        option: ReplicaOption,
        now_s: float,
        noise: float,
    ) -> bool:
        """Ask for a load, its times multiplied by ``noise``; whether it reads storage."""
        own, cache = self.by_node[key.gpus[0].node], self.rules.host_cache
        pinned = cache == "all"
        if cache in CACHED:
            pinned = own.ram.open(key.llm, option.stored_bytes)
        moved = transfer(
            option,
            key.gpus,
            own.node,
            own.gpu,
            self.rules,
            pinned=pinned,
            noise=noise,
        )
        ready_s = own.pool.take(now_s)
        self.under_way[key] = None
        own.links.add(key, moved, now_s, ready_s=ready_s)
        return not pinned

    def cancel(self, key: ReplicaId, now_s: float) -> dict[Link, float]:
        """Give a load up; the bytes it has moved over each link."""
        own = self._end(key, done=False)
        return own.links.cancel(key, now_s)

    def advance(self, node: str, now_s: float) -> tuple[ReplicaId, ...]:
        """Loads onto that node that end now."""
        links = self.by_node[node].links
        ended = tuple(key for key in links.advance(now_s) if isinstance(key, ReplicaId))
        for key in ended:
            self._end(key, done=True)
        return ended

    def settle(
        self,
        node: str,
        waited: Collection[str],
        serving: Iterable[tuple[GpuId, ...]],
        now_s: float,
    ) -> float:
        """Requests wait for the LLMs ``waited``, whose loads go first from now on, and
        replicas serve on the GPUs ``serving``, beside which loads take their share; when
        something happens on the node's links next."""
        links, share = self.by_node[node].links, self.rules.share_beside_serving
        links.set_urgent([key for key in self.on(node) if key.llm in waited], now_s)
        if share < 1.0:
            busy = {gpu for gpus in serving for gpu in gpus}
            most: dict[Hashable, float] = {
                key: 1.0 if busy.isdisjoint(key.gpus) else share
                for key in self.on(node)
            }
            links.set_most(most, now_s)
        return links.next_s

    def restart(self, node: str, now_s: float) -> None:
        """The node has lost all it held, and starts its processes anew; nothing loads."""
        own = self.by_node[node]
        own.ram.clear()
        own.pool.restart(now_s)

    def _end(self, key: ReplicaId, *, done: bool) -> NodeLoads:
        del self.under_way[key]
        own = self.by_node[key.gpus[0].node]
        if self.rules.host_cache in CACHED:
            own.ram.close(key.llm, done=done)
        return own
