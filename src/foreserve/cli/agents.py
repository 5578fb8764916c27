"""Where the agents of a cluster that serves live: processes of this machine, or actors of
a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from foreserve.models.problem import Fleet
from foreserve.runtime.engines.base import ENGINES, EngineSettings
from foreserve.runtime.live.binding import Binding
from foreserve.runtime.live.host import Hosted, NodeSetup, Open, setups
from foreserve.runtime.live.remote import NodeStatus


class Agents(Protocol):
    """Agents by node; `close` after the backend's."""

    @property
    def nodes(self) -> Mapping[str, Open]: ...

    def close(self, *, stop: bool) -> None:
        """``stop``: they have been told to end; nothing of them is to stay."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """Processes of this machine, which go by themselves."""

    nodes: Mapping[str, Open]

    def close(self, *, stop: bool) -> None:
        """Nothing is left to be done."""


def agents_of(
    fleet: Fleet,
    made_with: Fleet,
    folder: Path,
    engine: str,
    settings: EngineSettings | None,
    address: str | None = None,
    node_folder: Path | None = None,
) -> Agents:
    """Not started yet, but for Ray. ``address``: of a Ray cluster, None for processes of
    this machine. ``node_folder``: of the agents' logs, on their machines."""
    if address is None:
        return Here(nodes=_here(_setups(fleet, made_with, folder, engine, settings)))
    from foreserve.runtime.ray.nodes import RayAgents, namespace_of
    from foreserve.runtime.ray.studies import LOCAL

    namespace = namespace_of(folder)
    if node_folder is None:
        own = address == LOCAL
        node_folder = folder.resolve() if own else Path("~/.foreserve") / namespace
    made = _setups(fleet, made_with, node_folder, engine, settings)
    return RayAgents(made, address=address, namespace=namespace)


def shared_machines(nodes: tuple[NodeStatus, ...]) -> Iterator[tuple[str, list[str]]]:
    """Machines that are several nodes of the scenario, which a plan takes to fail apart."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        machine = "" if node.report is None else node.report.place.binding.machine
        found.setdefault(machine, []).append(node.node)
    for machine, names in found.items():
        if machine and len(names) > 1:
            yield machine, names


def _setups(
    fleet: Fleet,
    made_with: Fleet,
    folder: Path,
    engine: str,
    settings: EngineSettings | None,
) -> dict[str, NodeSetup]:
    chosen = settings or EngineSettings(folder=folder)
    return setups(fleet, folder, ENGINES[engine], chosen, made_with=made_with)


def _here(made: Mapping[str, NodeSetup]) -> dict[str, Hosted]:
    """This machine's devices are dealt out in order."""
    found, begin = {}, 0
    for name, setup in made.items():
        node = setup.fleet.cluster.node_by_name[name]
        binding = Binding.of_node(node, range(begin, begin + node.gpus))
        found[name] = Hosted(replace(setup, binding=binding))
        begin += node.gpus
    return found
