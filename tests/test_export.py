"""Models as files: another program reads them and finds the same optimum."""

from __future__ import annotations

import highspy
import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.solvers.base import SolveOptions, solve
from foreserve.solvers.export import write_model
from tests.build import fleet, option
from tests.problems import problem, tiny


@pytest.mark.parametrize("suffix", ["lp", "mps"])
def test_file_has_the_same_optimum(tmp_path, suffix):
    """Ten random problems, half of two epochs: HiGHS reads the file back and finds what
    the MILP finds, or finds nothing where that finds nothing."""
    file = str(tmp_path / f"m.{suffix}")
    for seed in range(10):
        p = tiny(np.random.default_rng(seed), epochs=1 + seed % 2)
        expected = solve(p, "milp", SolveOptions(gap=0.0, in_process=True))
        write_model(p, file)
        found = highspy.Highs()
        found.setOptionValue("output_flag", False)
        found.setOptionValue("mip_rel_gap", 0.0)
        assert found.readModel(file) == highspy.HighsStatus.kOk
        found.run()
        if expected.schedule is None:
            assert found.getModelStatus() == highspy.HighsModelStatus.kInfeasible
        else:
            cost = found.getInfo().objective_function_value
            assert cost == pytest.approx(expected.report.objective, abs=1e-6)


def test_names_are_readable_and_different(tmp_path):
    """Choices say LLM, GPUs and state; `a/b` and `a-b` stay two LLMs."""
    f = fleet(option("a/b"), option("a-b", tp=2))
    p = problem(f, [[0.5], [0.0]], [(1.0, [[9.0], [3.0]])])
    file = tmp_path / "m.mps"
    write_model(p, str(file))
    found = highspy.Highs()
    found.setOptionValue("output_flag", False)
    found.readModel(str(file))
    columns, rows = found.getLp().col_names_, found.getLp().row_names_
    assert {
        "x(a_b,n0.0,ACTIVE)",
        "x(a_b,n0.1,WARM)",
        "x(a_b_2,n0.0_1,ACTIVE)",
        "used(n0.0)",
        "served_rps(a_b,n0.0)",
        "activated(s0,a_b_2,n0.0_1)",
    } <= set(columns)
    assert {"C1_memory(n0.1)", "C5_demand(a_b)", "O2_cover(s0,a_b_2)"} <= set(rows)
    assert len(set(columns)) == len(columns)
    assert len(set(rows)) == len(rows)


def test_unknown_format_is_refused(tmp_path):
    """A .txt is neither, and the message says what is."""
    p = problem(fleet(option("a")), [[0.5]])
    with pytest.raises(InvalidInput, match=r"\.lp or \.mps"):
        write_model(p, str(tmp_path / "m.txt"))
