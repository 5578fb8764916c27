"""Independent pieces of work on the CPUs of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from foreserve.models.errors import ForeserveError, InvalidInput

Common = TypeVar("Common")
Task = TypeVar("Task")
Found = TypeVar("Found")

LOCAL, AUTO = "local", "auto"
TIMEOUT_S = 5.0
"""How long an address may take to answer at all."""
ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0"}
QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
OF_OTHERS = {
    "RAY_gcs_server_port_wait_time_s": "1",
    "RAY_py_gcs_connect_timeout_s": "5",
}
"""For a cluster that is not ours: some seconds, not minutes, until another service at its
port is told from Ray. What is set already stays."""


def in_cluster(
    work: Callable[[Common, Task], Found],
    common: Common,
    tasks: Sequence[Task],
    address: str,
) -> Generator[Found, None, None]:
    """``work(common, task)`` of each task, in their order, one CPU each.

    ``address``: `LOCAL` starts Ray here and ends it afterwards; `AUTO` is the cluster that
    this machine belongs to (or the one that RAY_ADDRESS names); else ``HOST:PORT`` of a
    head node. ``work`` is a function of a module, and the cluster has the same packages.
    What it raises is raised here; `ForeserveError` if there is no cluster or it loses a
    task, `InvalidInput` if Ray is not installed. However it ends, no task goes on.
    """
    ray = connected(address)
    try:
        shared = ray.put(common)
        remote = ray.remote(num_cpus=1, max_retries=1)(work)
        for promise in [remote.remote(shared, task) for task in tasks]:
            yield _result(ray, promise)
    finally:
        # Its tasks end with the connection, or with Ray itself where it is ours.
        with contextlib.suppress(Exception), _no_stderr():
            ray.shutdown()


@contextlib.contextmanager
def _no_stderr() -> Generator[None, None, None]:
    """Ray's core tells of each task that it ends, past Python, on the descriptor."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _result(ray: Any, promise: Any) -> Any:
    try:
        return ray.get(promise)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ForeserveError(f"Ray lost a task: {_line(error)}") from None


def connected(address: str, namespace: str | None = None, **resources: Any) -> Any:
    """The module ``ray``, connected to what `in_cluster` calls ``address``; ``resources``
    are those of a Ray that is started here. Errors as there."""
    if address not in (LOCAL, AUTO):
        _check_answers(address)
    # Read when Ray is imported, and by what it starts.
    others = {} if address == LOCAL else OF_OTHERS
    os.environ.update({**QUIET, **others, **os.environ, **ALWAYS})
    try:
        import ray
    except ImportError:
        raise InvalidInput(
            "Ray is not installed", hint="pip install 'foreserve[ray]'"
        ) from None
    try:
        ray.init(
            address=address,
            namespace=namespace,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **(resources if address == LOCAL else {}),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ForeserveError(
            f"no Ray at {address!r}: {_line(error)} (if it asks for a token, and HOST:PORT "
            "is given: RAY_AUTH_MODE=token)"
        ) from None
    return ray


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InvalidInput(
            f"{address!r} is no address of a Ray cluster",
            hint="auto, local, or HOST:PORT of its head node",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ForeserveError(f"no Ray at {address!r}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
