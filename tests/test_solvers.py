"""The seam to the solvers: child process, hard limits, and the referee's judgement."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from time import perf_counter

import pytest

from foreserve.models import referee
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers import base
from foreserve.solvers.base import SolveOptions, SolverPool, solve, version
from tests.build import cluster, fleet, option
from tests.problems import placement, problem

QUICK = SolveOptions(time_limit_s=0.3)
HERE = SolveOptions(time_limit_s=5.0, in_process=True)


@pytest.fixture
def one() -> Problem:
    """One LLM on two GPUs; serving it costs 2.0 (load) + 1.0 (rent)."""
    return problem(fleet(option("a")), [[0.5]])


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "GRACE_S", 0.3)


def fake(name: str) -> str:
    return f"tests.fake_solvers:{name}"


@pytest.mark.parametrize("name", base.SOLVERS)
def test_every_solver_in_its_child(name: str, one: Problem) -> None:
    """By name, out of process: refereed answer, honest report, nothing imported here."""
    solved = solve(one, name, SolveOptions(time_limit_s=20.0, seed=3))
    report = solved.report
    assert solved.schedule is not None
    assert referee.violations(one, solved.schedule) == ()
    assert report.objective == referee.cost(one, solved.schedule).total
    assert report.objective == pytest.approx(3.0)
    assert report.bound <= report.objective
    assert (report.seed, report.threads) == (3, 1)
    assert report.time_to_first_s is not None
    assert 0 <= report.time_to_first_s <= report.wall_s
    assert report.version
    if name != "greedy":
        assert report.status is Status.OPTIMAL
        assert report.gap == pytest.approx(0.0, abs=1e-6)


def test_the_parent_imports_no_solver_library() -> None:
    """A program that solves has neither Pyomo, HiGHS nor OR-Tools in its own process."""
    code = (
        "import sys; from foreserve.solvers.base import solve; "
        "from tests.test_solvers import problem, fleet, option; "
        "p = problem(fleet(option('a')), [[0.5]]); "
        "assert solve(p, 'milp').schedule and solve(p, 'cpsat').schedule; "
        "bad = {'pyomo', 'highspy', 'ortools'} & {m.split('.')[0] for m in sys.modules}; "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(), timeout=60)


@pytest.mark.parametrize(
    "code",
    [
        "import highspy; from ortools.sat.python import cp_model",
        "from ortools.sat.python import cp_model; import highspy",
    ],
)
def test_highs_and_ortools_load_in_either_order(code: str) -> None:
    """The pinned versions may share a process; newer HiGHS may not."""
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(), timeout=60)


def test_hard_time_limit(one: Problem, short_grace: None) -> None:
    """A solver that ignores its limit is killed; the greedy start stands in for it."""
    began_s = perf_counter()
    solved = solve(one, fake("sleepy"), QUICK)
    assert perf_counter() - began_s < 10
    assert solved.report.status is Status.FEASIBLE
    assert solved.report.objective == pytest.approx(3.0)
    assert "killed" in solved.report.message


def test_a_child_that_is_killed_between_solves_is_replaced(one: Problem) -> None:
    """Idle, and gone when it is asked again: nobody notices but by its number."""
    with SolverPool("greedy", QUICK) as pool:
        first = pool.solve(one)
        assert pool._child is not None
        killed = pool._child[0]
        killed.kill()
        killed.wait()
        again = pool.solve(one)
        assert pool._child[0].pid != killed.pid
    assert again.schedule == first.schedule
    assert again.report.status is first.report.status


def test_killed_child_is_replaced(one: Problem, short_grace: None) -> None:
    """One pool: an answer, a kill, and an answer again from a new process."""
    stuck = replace(one, initial=placement(("a", "n0/0", "WARM")))
    with SolverPool(fake("sleepy_once"), QUICK) as pool:
        reports = [pool.solve(p).report for p in (one, stuck, one)]
    assert [bool(report.message) for report in reports] == [False, True, False]
    assert all(report.status is Status.FEASIBLE for report in reports)


def test_one_child_for_many_solves(one: Problem) -> None:
    """The pool pays the start of a process once."""
    with SolverPool("greedy", QUICK) as pool:
        pool.solve(one)
        first = pool._child
        pool.solve(one)
        assert pool._child is first
    assert pool._child is None


def test_crash_is_a_status(one: Problem) -> None:
    """A segmentation fault, in words; the pool goes on."""
    with SolverPool(fake("dying"), QUICK) as pool:
        for _ in range(2):
            solved = pool.solve(one)
            assert solved.schedule is None
            assert solved.report.status is Status.ERROR
            assert "SIGSEGV" in solved.report.message


def test_exception_is_a_status(one: Problem) -> None:
    """An error inside a solver is reported with its text."""
    report = solve(one, fake("raising"), QUICK).report
    assert report.status is Status.ERROR
    assert report.message == "ZeroDivisionError: by nought"


def test_import_error_is_a_status(one: Problem) -> None:
    """So is a solver that cannot be imported."""
    report = solve(one, "tests.no_such_module:solve", QUICK).report
    assert report.status is Status.ERROR
    assert "no_such_module" in report.message


def test_memory_cap(one: Problem) -> None:
    """4 GiB do not fit into 1 GiB of address space."""
    options = replace(QUICK, memory_bytes=2**30)
    report = solve(one, fake("greedy_for_memory"), options).report
    assert report.status is Status.ERROR
    assert "MemoryError" in report.message


def test_the_child_steps_back(one: Problem) -> None:
    """Five steps nicer than who asked; the parent stays as it is."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    options = replace(QUICK, niceness=5)
    report = solve(one, fake("telling_niceness"), options).report
    assert report.message == str(min(19, before + 5))
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_solver_libraries_work_under_a_memory_cap(one: Problem) -> None:
    """6 GiB of address space is enough for either library to load and solve."""
    for name in ("milp", "cpsat"):
        options = SolveOptions(time_limit_s=20.0, memory_bytes=6 * 2**30)
        assert solve(one, name, options).report.status is Status.OPTIMAL


def test_no_child_is_left_after_ctrl_c() -> None:
    """An interrupted program takes the solving child with it."""
    # A background job of a shell inherits an ignored SIGINT; a terminal's does not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from foreserve.solvers.base import SolverPool, SolveOptions\n"
        "from tests.test_solvers import problem, fleet, option\n"
        "pool = SolverPool('tests.fake_solvers:sleepy', SolveOptions(time_limit_s=60))\n"
        "with pool:\n"
        "    pool._pipe()\n"
        "    print(pool._child[0].pid, flush=True)\n"
        "    pool.solve(problem(fleet(option('a')), [[0.5]]))\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        env=_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert program.stdout is not None
    child = int(program.stdout.readline())
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=20)
    assert program.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_start_is_never_lost(one: Problem) -> None:
    """A start better than solver and greedy comes back; without replicas the solver's
    answer of 3000 refused requests loses against it."""
    before = placement(("a", "n0/0", "ACTIVE"))
    p = replace(one, initial=before)
    start = (replace(before, replicas=before.replicas),)
    solved = solve(p, fake("empty"), HERE, start)
    assert solved.report.objective == pytest.approx(1.0)
    assert solved.schedule is not None
    assert [r.id for r in solved.schedule[0].replicas] == [before.replicas[0].id]
    solved = solve(p, fake("nothing"), HERE, start)
    assert solved.report.objective == pytest.approx(1.0)


def test_start_is_split_afresh(one: Problem) -> None:
    """Shares of a start that overbook a replica after demand rose are made anew."""
    busy = replace(one, demand_rps=((2.0,),))
    replica = placement(("a", "n0/0", "ACTIVE")).replicas[0]
    start = (Placement(replicas=(replace(replica, traffic_share=1.0),)),)
    assert referee.violations(busy, start)
    assert solve(busy, fake("nothing"), HERE, start).schedule is not None


def test_unsuitable_start_is_ignored(one: Problem) -> None:
    """Too many epochs, or a GPU that is gone: no error, greedy starts instead."""
    for start in [(Placement(),) * 3, (placement(("a", "gone/0", "ACTIVE")),)]:
        assert solve(one, "greedy", HERE, start).report.objective == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("flattering", "the referee finds"),
        ("overbound", "claims bound"),
        ("overbound_without_plan", "claims bound"),
        ("overloaded", "broke a rule: (C"),
        ("pessimist", "claims infeasible"),
    ],
)
def test_false_claims_are_errors(name: str, complaint: str, one: Problem) -> None:
    """Whatever a solver says is held against the referee, and never passed on."""
    solved = solve(one, fake(name), HERE)
    assert solved.schedule is None
    assert solved.report.status is Status.ERROR
    assert complaint in solved.report.message


def test_contradictory_rules(one: Problem) -> None:
    """Two must serve on one node with one GPU: infeasible for all, though greedy, which
    only sees the plain contradictions, may merely find nothing."""
    rules = fleet(option("a"), option("b"), on=cluster(1), min_active=1, unserved_s=1.0)
    p = problem(rules, [[0.0], [0.0]])
    for name in base.SOLVERS:
        solved = solve(p, name, SolveOptions(time_limit_s=20.0))
        assert solved.schedule is None
        assert solved.report.status is Status.INFEASIBLE


def test_unknown_solver(one: Problem) -> None:
    """A misspelt name is an input error with a hint."""
    with pytest.raises(InvalidInput, match="did you mean 'cpsat'"):
        solve(one, "cp-sat")


@pytest.mark.parametrize(
    "bad", [{"time_limit_s": 0.0}, {"gap": 1.0}, {"threads": 0}, {"seed": -1}]
)
def test_bad_options(bad: dict[str, float]) -> None:
    """Limits that mean nothing are input errors."""
    with pytest.raises(InvalidInput):
        SolveOptions(**bad)  # type: ignore[arg-type]


def test_versions_name_the_libraries() -> None:
    """`version` reads package metadata, without an import."""
    assert version("milp").startswith("highspy 1.13.1")
    assert "ortools 9.15" in version("cpsat")


def test_progress_leads_to_the_answer(one: Problem) -> None:
    """Times do not fall, objectives never rise, and the last point is the answer."""
    for name in ("milp", "cpsat"):
        report = solve(one, name, SolveOptions(time_limit_s=20.0)).report
        times = [point.elapsed_s for point in report.progress]
        found = [p.objective for p in report.progress if p.objective is not None]
        assert times == sorted(times)
        assert found == sorted(found, reverse=True)
        assert math.isclose(found[-1], 3.0, rel_tol=1e-6)


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
