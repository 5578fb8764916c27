"""One run in virtual time: a trace, a policy, a cluster that does as the plan says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from foreserve.models.faults import Fault
from foreserve.models.outcome import Run
from foreserve.models.placement import Placement
from foreserve.models.problem import Fleet
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.controller import Controller, Policy
from foreserve.runtime.journal import Ended, Journal, Started
from foreserve.runtime.simulated.backend import SimulatedBackend
from foreserve.runtime.tally import Tally
from foreserve.traces.trace import Trace

FRAMES = 200
"""How often the progress is told."""
DRAIN_S = 600.0
"""How long after ``end_s`` the last requests may still end."""


def simulate(
    fleet: Fleet,
    trace: Trace,
    policy: Policy,
    *,
    start_s: float,
    end_s: float,
    seed: int,
    load_bin_s: float = 300.0,
    load_noise: float = 0.1,
    initial: Placement | None = None,
    faults: Sequence[Fault] = (),
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Run:
    """Serve the requests that arrive in [start_s, end_s) as ``policy`` decides.

    The cluster starts empty, or with ``initial`` in place, and ``faults`` happen to it.
    The run ends at ``end_s``, or when the last request has ended, at most `DRAIN_S` later.
    ``seed`` draws the load times (``load_noise``: standard deviation of their logarithm).
    ``journal`` is a file for all events; ``progress`` is called with the share of the time
    that has passed. Same arguments, same run, same bytes.
    """
    window = trace.between(start_s, end_s)
    first = int(np.searchsorted(trace.arrival_s, start_s, side="left"))

    def watch(now_s: float) -> None:
        if progress and now_s < end_s:
            progress((now_s - start_s) / (end_s - start_s))

    with ExitStack() as stack:
        file = stack.enter_context(Journal(journal)) if journal is not None else None
        tally = Tally(fleet, file)
        tally.record(
            Started(
                at_s=start_s,
                policy=policy.name,
                start_s=start_s,
                end_s=end_s,
                seed=seed,
                initial=initial or Placement(),
            )
        )
        clock = VirtualClock(start_s)
        backend = SimulatedBackend(
            fleet,
            window,
            clock,
            np.random.default_rng(seed),
            tally,
            first_request=first,
            load_noise=load_noise,
            initial=initial,
            faults=faults,
            watch=watch,
            watch_every_s=(end_s - start_s) / FRAMES,
        )
        controller = Controller(
            policy=policy, backend=backend, clock=clock, fleet=fleet, journal=tally
        )
        controller.run(end_s)
        while backend.in_system and clock.now_s() < end_s + DRAIN_S:
            controller.turn(end_s + DRAIN_S)
        backend.stop()
        tally.record(Ended(at_s=clock.now_s()))
    if progress:
        progress(1.0)
    return tally.run(load_bin_s)
