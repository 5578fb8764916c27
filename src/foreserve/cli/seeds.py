"""The same simulation with many seeds, in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, NamedTuple

import click

from foreserve.cli.common import progress_bar

if TYPE_CHECKING:
    from foreserve.models.outcome import Outcome, Run
    from foreserve.models.plan import Plan
    from foreserve.traces.trace import Trace

    _Found = tuple[Outcome, Run | None]


class _Common(NamedTuple):
    """What all runs share (checked already); sent to each worker once."""

    plan: Plan
    trace: Trace
    keep_alive_s: float


_common: list[_Common] = []
"""In a worker: one entry."""


def run_seeds(
    plan: Plan,
    trace: Trace,
    policies: Sequence[str],
    seeds: Sequence[int],
    keep_alive_s: float,
    quiet: bool,
    workers: int | None = None,
) -> tuple[tuple[Run, ...], list[list[Outcome]]]:
    """The first seed's run of each policy in full, and all outcomes: [seed][policy].

    At most ``workers`` processes, one per CPU if None, never more. What comes back does
    not depend on their number. A run that fails is a `click.ClickException` of one line;
    the others are given up.
    """
    from foreserve.cli.simulate import check_policies

    trace = check_policies(plan, trace, policies, keep_alive_s)
    tasks = [(seed, policy) for seed in seeds for policy in policies]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    processes = min(workers or len(tasks), cpus or os.cpu_count() or 1, len(tasks))
    others = set(active_children())
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(_Common(plan, trace, keep_alive_s),),
    )
    found = []
    try:
        with progress_bar(f"simulating {len(seeds)} seeds", quiet) as update:
            futures = [
                pool.submit(_one, policy, seed, keep=index < len(policies))
                for index, (seed, policy) in enumerate(tasks)
            ]
            # In turn, which is about how they end: the same failure is told each time.
            for future, (seed, policy) in zip(futures, tasks, strict=True):
                found.append(_result(future, seed, policy))
                update(len(found) // len(policies), len(seeds))
    except BaseException:
        for worker in set(active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    runs = tuple(run for _, run in found if run is not None)
    outcomes = [outcome for outcome, _ in found]
    step = len(policies)
    return runs, [outcomes[i : i + step] for i in range(0, len(outcomes), step)]


def _result(future: Future[_Found], seed: int, policy: str) -> _Found:
    try:
        return future.result()
    except BrokenProcessPool:
        raise click.ClickException(
            "a worker process ended suddenly (out of memory?); try fewer --workers"
        ) from None
    except Exception as error:
        what = next(iter(str(error).splitlines()), "")
        raise click.ClickException(
            f"seed {seed} of policy {policy!r} failed: {what}"
        ) from None


def _begin(common: _Common) -> None:
    """Prepare a worker."""
    # Ctrl-C goes to the whole group; the parent is the one to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _common.append(common)


def _one(policy: str, seed: int, *, keep: bool) -> _Found:
    """One run, in a worker; the whole of it only where asked for."""
    from foreserve.cli.simulate import run_policy

    plan, trace, keep_alive_s = _common[0]
    try:
        run = run_policy(plan, trace, policy, seed, keep_alive_s)
    except Exception as error:
        # Not every error can be pickled; its one line can.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    return run.outcome, run if keep else None
