"""Node agents as Ray actors: one per node, which keeps its GPUs for as long as it lives.

An actor holds the same `NodeAgent` as a process of its own would (`runtime.live.host`), and
is called by a thread of the controller. It is detached: in a cluster that is not ours it
outlives the controller, which finds it again by its name. Where the cluster has a resource
``foreserve-<node>``, the actor is placed there and nowhere else; else wherever so many GPUs
are free.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

from foreserve.runtime.live.binding import Binding
from foreserve.runtime.live.host import NodeSetup, dispatch, make_agent
from foreserve.runtime.live.messages import Link, LinkLost

NAMESPACE = "foreserve"


class NodeActor:
    """What runs in the actor."""

    def __init__(self, setup: NodeSetup, *, bind: bool) -> None:
        """``bind``: to the GPUs that Ray has given the actor, in place of the setup's."""
        if bind:
            node = setup.fleet.cluster.node_by_name[setup.node]
            setup = replace(setup, binding=Binding.of_node(node, _own_gpus()))
        self._agent = make_agent(setup)

    def call(self, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
        """As over a socket: (True, the answer) or (False, the error)."""
        try:
            return True, dispatch(self._agent, name, args)
        except Exception as error:  # raised again where it was called
            return False, error

    def pid(self) -> int:
        return os.getpid()


class RayNode:
    """Opens links to the actor of one node; makes it where there is none."""

    def __init__(
        self,
        ray: Any,
        setup: NodeSetup,
        *,
        bind: bool = True,
        namespace: str = NAMESPACE,
    ) -> None:
        """``ray``: the module, connected to a cluster."""
        self._ray, self._setup, self._bind = ray, setup, bind
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
        own = f"{NAMESPACE}-{setup.node}"
        pinned = {own: 0.001} if own in self._ray.cluster_resources() else {}
        kind = self._ray.remote(NodeActor).options(
            name=own,
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=node.gpus,
            resources=pinned,
            max_restarts=-1,
            max_concurrency=8,
        )
        return kind.remote(setup, bind=self._bind)


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


def _own_gpus() -> tuple[int, ...]:
    """GPUs of this actor, as Ray says in its environment."""
    return tuple(
        map(int, re.findall(r"\d+", os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    )


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
