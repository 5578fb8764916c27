"""The same simulation with many seeds, in processes of their own or on a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, NamedTuple

import click

from foreserve.cli.common import compile_simulator, progress_bar
from foreserve.models.errors import ForeserveError

if TYPE_CHECKING:
    from foreserve.models.faults import Fault
    from foreserve.models.outcome import Outcome, Run
    from foreserve.models.plan import Plan
    from foreserve.traces.trace import Trace

    _Found = tuple[Outcome, Run | None]


class _Common(NamedTuple):
    """What all runs share (checked already); sent to each worker once."""

    plan: Plan
    trace: Trace
    keep_alive_s: float
    faults: Sequence[Fault]


class _Task(NamedTuple):
    """One run; the whole of it comes back only where it is to be kept."""

    seed: int
    policy: str
    keep: bool


_common: list[_Common] = []
"""In a worker process: one entry."""


def run_seeds(
    plan: Plan,
    trace: Trace,
    policies: Sequence[str],
    seeds: Sequence[int],
    keep_alive_s: float,
    quiet: bool,
    workers: int | None = None,
    ray: str | None = None,
    faults: Sequence[Fault] = (),
) -> tuple[tuple[Run, ...], list[list[Outcome]]]:
    """The first seed's run of each policy in full, and all outcomes: [seed][policy].

    At most ``workers`` processes, one per CPU if None, never more; or on the cluster at
    the address ``ray``. What comes back does not depend on that. A run that fails is a
    `click.ClickException` of one line; the others are given up.
    """
    from foreserve.cli.simulate import check_policies

    trace = check_policies(plan, trace, policies, keep_alive_s)
    compile_simulator(quiet)
    common = _Common(plan, trace, keep_alive_s, faults)
    tasks = [
        _Task(seed, policy, seed == seeds[0]) for seed in seeds for policy in policies
    ]
    if ray is None:
        results = _in_processes(common, tasks, workers)
    else:
        from foreserve.runtime.ray.studies import in_cluster

        results = in_cluster(_work, common, tasks, ray)
    found: list[_Found] = []
    with progress_bar(f"simulating {len(seeds)} seeds", quiet) as update:
        try:
            # In turn, which is about how they end: the same failure is told each time.
            for result in results:
                found.append(result)
                update(len(found) // len(policies), len(seeds))
        except (click.ClickException, ForeserveError):
            raise
        except Exception as error:
            what = next(iter(str(error).splitlines()), "")
            seed, policy, _ = tasks[len(found)]
            raise click.ClickException(
                f"seed {seed} of policy {policy!r} failed: {what}"
            ) from None
        finally:
            results.close()
    runs = tuple(run for _, run in found if run is not None)
    outcomes = [outcome for outcome, _ in found]
    step = len(policies)
    return runs, [outcomes[i : i + step] for i in range(0, len(outcomes), step)]


def _in_processes(
    common: _Common, tasks: Sequence[_Task], workers: int | None
) -> Generator[_Found, None, None]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    processes = min(workers or len(tasks), cpus or os.cpu_count() or 1, len(tasks))
    others = set(active_children())
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(common,),
    )
    try:
        for future in [pool.submit(_one, task) for task in tasks]:
            yield future.result()
    except BaseException as error:
        for worker in set(active_children()) - others:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise click.ClickException(
                "a worker process ended suddenly (out of memory?); try fewer --workers"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(common: _Common) -> None:
    """Prepare a worker process."""
    # Ctrl-C goes to the whole group; the parent is the one to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _common.append(common)


def _one(task: _Task) -> _Found:
    """One run, in a worker process."""
    return _work(_common[0], task)


def _work(common: _Common, task: _Task) -> _Found:
    """One run, in a worker of any kind."""
    from foreserve.cli.simulate import run_policy

    plan, trace, keep_alive_s, faults = common
    try:
        run = run_policy(
            plan, trace, task.policy, task.seed, keep_alive_s, faults=faults
        )
    except Exception as error:
        # Not every error can be pickled; its one line can.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    return run.outcome, run if task.keep else None
