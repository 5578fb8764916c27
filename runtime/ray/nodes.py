"""Node agents as Ray actors: one per node, which keeps its GPUs for as long as it lives.

An actor holds the same `NodeAgent` as a process of its own would (`runtime.live.host`), and
is called by threads of the controller. All actors of a cluster that serves have their
GPUs from one placement group with a bundle for each node, so that an actor that dies finds
them again. A machine of the cluster that has the resource ``foreserve-<node>`` is that
node; the others are dealt out, each to a machine of its own where there are enough.

Actors and group are detached: in a cluster that is not ours they outlive the controller,
which finds them again by their names in its namespace.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.models.specs import ClusterSpec, Node
from foreserve.runtime.live.binding import Binding
from foreserve.runtime.live.host import NodeSetup, dispatch, make_agent
from foreserve.runtime.live.messages import Link, LinkLost
from foreserve.runtime.ray.studies import LOCAL, connected

NAMESPACE = "foreserve"
GROUP_S = 30.0
"""A placement group may take so long to get its GPUs."""

Strategy = Literal["STRICT_SPREAD", "SPREAD"]


# --- where --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node of the Ray cluster, with what it has in all."""

    address: str
    gpus: int
    named: frozenset[str] = frozenset()
    """Nodes of the scenario that it is, by its resources."""


def machines_of(ray: Any) -> list[Machine]:
    """Those of the cluster that are alive and have GPUs."""
    found = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("GPU", 0) >= 1:
            head = f"{NAMESPACE}-"
            named = frozenset(
                name.removeprefix(head) for name in has if name.startswith(head)
            )
            address = node["NodeManagerAddress"]
            found.append(Machine(address=address, gpus=int(has["GPU"]), named=named))
    return found


def seats(cluster: ClusterSpec, machines: Sequence[Machine]) -> Strategy:
    """STRICT_SPREAD if every node can have a machine of its own, SPREAD if all fit at
    least; `InvalidInput` says which node misses what."""
    named = {name for machine in machines for name in machine.named}
    kinds = {node.gpu for node in cluster.nodes}
    lost = [node.name for node in cluster.nodes if node.name not in named]
    if len(kinds) > 1 and lost:
        raise InvalidInput(
            f"node {lost[0]!r}: which machines have which of the GPU types "
            f"{', '.join(sorted(kinds))} is not known",
            hint=f"ray start --resources='{{\"{NAMESPACE}-{lost[0]}\": 1}}' there",
        )
    if _fit(cluster.nodes, machines, named, alone=True) is None:
        return "STRICT_SPREAD"
    missing = _fit(cluster.nodes, machines, named, alone=False)
    if missing is None:
        return "SPREAD"
    own = [m for m in machines if missing.name in m.named]
    if own:
        have = ", ".join(f"{m.address} has {m.gpus}" for m in own)
        raise InvalidInput(f"node {missing.name!r} needs {missing.gpus} GPUs; {have}")
    have = ", ".join(f"{m.address} {m.gpus}" for m in machines) or "none"
    raise InvalidInput(
        f"node {missing.name!r} needs {missing.gpus} GPUs on one machine, and they are "
        f"not left beside the other nodes; GPUs by machine: {have}"
    )


def _fit(
    nodes: Iterable[Node], machines: Sequence[Machine], named: set[str], *, alone: bool
) -> Node | None:
    """The first node that finds no place, those with a machine of their own first, then
    the largest; None if all do. Each takes the smallest room that is enough."""
    left = [machine.gpus for machine in machines]
    order = sorted(nodes, key=lambda n: (n.name not in named, -n.gpus, n.name))
    for node in order:
        rooms = [
            (room, i)
            for i, (machine, room) in enumerate(zip(machines, left, strict=True))
            if room >= node.gpus
            and (node.name not in named or node.name in machine.named)
        ]
        if not rooms:
            return node
        _, i = min(rooms)
        left[i] = 0 if alone else left[i] - node.gpus
    return None


# --- the actor ----------------------------------------------------------------------------


class NodeActor:
    """What runs in the actor."""

    def __init__(self, setup: NodeSetup, *, bind: bool, reachable: bool) -> None:
        """``bind``: to the GPUs that Ray has given the actor, in place of the setup's.
        ``reachable``: engines listen where other machines reach them, with a key that
        each life of the actor makes anew."""
        import ray

        node = setup.fleet.cluster.node_by_name[setup.node]
        address: str = ray.util.get_node_ip_address()
        binding, settings = setup.binding, setup.settings
        if bind:
            given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            binding = Binding.of_node(node, _indices(given))
        if reachable:
            key = secrets.token_urlsafe(24)
            settings = replace(settings, host=address, key=key)
        self._agent = make_agent(
            replace(
                setup,
                folder=setup.folder.expanduser(),
                settings=replace(settings, folder=settings.folder.expanduser()),
                binding=replace(binding, machine=address),
            )
        )

    def call(self, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
        """As over a socket: (True, the answer) or (False, the error)."""
        try:
            return True, dispatch(self._agent, name, args)
        except Exception as error:  # raised again where it was called
            return False, error

    def pid(self) -> int:
        return os.getpid()


def _indices(given: Iterable[str]) -> tuple[int, ...]:
    found = tuple(given)
    if not all(name.isdecimal() for name in found):
        raise InvalidInput(f"Ray calls the GPUs {', '.join(found)}: numbers are needed")
    return tuple(map(int, found))


class RayNode:
    """Opens links to the actor of one node; makes it where there is none."""

    def __init__(
        self,
        ray: Any,
        setup: NodeSetup,
        *,
        bind: bool = True,
        reachable: bool = False,
        namespace: str = NAMESPACE,
        seat: Any = None,
        mark: str = "",
    ) -> None:
        """``ray``: the module, connected to a cluster; ``seat``: a scheduling strategy,
        None for wherever so many GPUs are free; ``mark``: of the actor's name."""
        self._ray, self._setup, self._seat = ray, setup, seat
        self._name = "-".join(filter(None, (NAMESPACE, setup.node, mark)))
        self._how = {"bind": bind, "reachable": reachable}
        self._namespace = namespace

    def __call__(self) -> Link:
        """A link; whether anybody answers shows when it is used. `LinkLost` if the cluster
        itself does not."""
        try:
            return _ActorLink(self._ray, self._actor())
        except Exception as error:  # of many kinds, by what of Ray is broken
            raise LinkLost(_line(error)) from None

    def pid(self) -> int:
        """The process that the actor lives in."""
        pid: int = self._ray.get(self._actor().pid.remote(), timeout=10.0)
        return pid

    def end(self) -> None:
        """Have the actor gone for good, and all its engines with it."""
        self._ray.kill(self._actor(), no_restart=True)

    def _actor(self) -> Any:
        setup = self._setup
        node = setup.fleet.cluster.node_by_name[setup.node]
        kind = self._ray.remote(NodeActor).options(
            name=self._name,
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=node.gpus,
            max_restarts=-1,
            max_concurrency=8,
            **({} if self._seat is None else {"scheduling_strategy": self._seat}),
        )
        return kind.remote(setup, **self._how)


class _ActorLink:
    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def call(self, name: str, *args: Any, timeout_s: float) -> Any:
        try:
            promise = self._actor.call.remote(name, args)
            good, answer = self._ray.get(promise, timeout=timeout_s)
        except Exception as error:  # of many kinds, by what of Ray is broken
            raise LinkLost(_line(error)) from None
        if not good:
            raise answer
        return answer

    def close(self) -> None:
        """The actor goes on."""


# --- all of them --------------------------------------------------------------------------


class RayAgents:
    """The agents of a cluster that serves, on a Ray of its own or on another one."""

    def __init__(
        self, setups: Mapping[str, NodeSetup], *, address: str, namespace: str
    ) -> None:
        """Connects, and has the GPUs given; no actor is made yet. ``address`` as in
        `connected`; ``namespace`` tells clusters that serve on the same Ray apart. Engines
        are reachable from other machines unless Ray is our own. Errors in one line."""
        cluster = next(iter(setups.values())).fleet.cluster
        mark = _mark(setups)
        self._names = [node.name for node in cluster.nodes]
        self.own = address == LOCAL
        """Whether this Ray ends with us."""
        total = sum(node.gpus for node in cluster.nodes)
        self._ray = connected(address, namespace=namespace, num_gpus=total)
        _hush()
        try:
            self.group = self._group(cluster, f"{NAMESPACE}-{mark}")
        except BaseException:
            self._ray.shutdown()
            raise
        self.nodes = {
            name: RayNode(
                self._ray,
                setups[name],
                reachable=not self.own,
                namespace=namespace,
                seat=self._seat(index),
                mark=mark,
            )
            for index, name in enumerate(self._names)
        }

    def close(self, *, stop: bool) -> None:
        """Let go of Ray; ``stop``: of the actors and their GPUs as well."""
        if stop or self.own:
            for node in self.nodes.values():
                with suppress(Exception):  # gone already, in one of many ways
                    node.end()
            with suppress(Exception):
                self._ray.util.remove_placement_group(self.group)
        self._ray.shutdown()

    def _seat(self, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=index
        )

    def _group(self, cluster: ClusterSpec, name: str) -> Any:
        """The one that an earlier start has made, or a new one. Those of other fleets in
        this namespace end, and what they are the seats of: a scenario has changed."""
        util = self._ray.util
        for row in list(util.placement_group_table().values()):
            other = row["name"]
            if other != name and other.startswith(f"{NAMESPACE}-") and row["bundles"]:
                with suppress(ValueError):  # of another namespace, or gone
                    util.remove_placement_group(util.get_placement_group(other))
        with suppress(ValueError):
            return util.get_placement_group(name)
        machines = machines_of(self._ray)
        named = {name for machine in machines for name in machine.named}
        bundles = [
            {"GPU": float(node.gpus)}
            | ({f"{NAMESPACE}-{node.name}": 0.001} if node.name in named else {})
            for node in cluster.nodes
        ]
        strategy = seats(cluster, machines)
        group = util.placement_group(
            bundles, strategy=strategy, name=name, lifetime="detached"
        )
        if not group.wait(GROUP_S):
            util.remove_placement_group(group)
            wanted = ", ".join(f"{n.name} {n.gpus}" for n in cluster.nodes)
            raise ForeserveError(
                f"Ray did not give the GPUs within {GROUP_S:g} s (wanted: {wanted}; free: "
                f"{self._free()}): somebody else has them"
            )
        return group

    def _free(self) -> str:
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return ", ".join(
            f"{node['NodeManagerAddress']} "
            f"{int(free.get(node['NodeID'], {}).get('GPU', 0))}"
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("GPU")
        )


def _mark(setups: Mapping[str, NodeSetup]) -> str:
    """Of the fleets that agents' books and engines are of."""
    known = [(s.fleet, s.made_with) for _, s in sorted(setups.items())][:1]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def _hush() -> None:
    """Ray prints pages on each process and machine that is lost, of which status and
    journal tell in a line."""
    with suppress(ImportError):
        import ray._private.worker as worker

        worker.print_to_stdstream = lambda *told, **how: None


def namespace_of(folder: Path) -> str:
    """Of the cluster that serves from ``folder``: the same at each start."""
    path = folder / "ray-namespace"
    if not path.exists():
        path.write_text(f"{NAMESPACE}-{secrets.token_hex(6)}\n")
    return path.read_text().strip()


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # What an actor's start raised stands at the end of a traceback.
    return lines[-1 if "creation task" in lines[0] else 0].strip()
