"""There is one controller: what is simulated is what would run.

The simulator brings a clock and a cluster of its own. Who is where, what to do about it,
who takes a request and who gets the next turn it must leave to the same code as any other
backend."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from foreserve.models.placement import Placement, Replica
from foreserve.runtime import controller, ledger, reconcile, router, states, turns
from foreserve.runtime.simulated import backend, flow, run, shared, simulate
from foreserve.traces.trace import Trace
from tests.build import cluster, fleet, gpu, option

RUNTIME = Path(__file__).parents[1] / "runtime"
SHARED = ("controller", "ledger", "reconcile", "router", "scheduler", "states", "turns")
"""What every backend shares."""
WORDS = ("controller", "reconcile", "router", "scheduler")
"""What no class or function of the simulator is called."""
Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def owners() -> dict[str, set[str]]:
    """Public functions and classes of the shared modules: name -> modules."""
    found = defaultdict(set)
    for module in SHARED:
        for node in tree(RUNTIME / f"{module}.py").body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                found[node.name].add(f"foreserve.runtime.{module}")
    return dict(found)


def faults(text: str) -> list[str]:
    """What a module of the simulator has that is not its to have."""
    found, own, module = [], owners(), ast.parse(text)
    # A method that hands on to the function of its name is no second one.
    classes = [node for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
    methods = {id(node) for each in classes for node in each.body}
    for node in ast.walk(module):
        if isinstance(node, Definition):
            name = node.name.lstrip("_").lower()
            second = (
                name in {known.lower() for known in own} and id(node) not in methods
            )
            if second or any(word in name for word in WORDS):
                found.append(f"defines {node.name}")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name, source = alias.name, node.module or ""
                if name in own and source not in own[name]:
                    found.append(f"{name} from {source}")
                if name in own and alias.asname:
                    found.append(f"{name} as {alias.asname}")
                if source.startswith("foreserve.planner"):
                    found.append(f"{name} from {source}")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node in module.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            found += [f"sets {name}" for name in sorted(names & {*own})]
    return found


SIMULATED = sorted((RUNTIME / "simulated").rglob("*.py"))


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_the_simulator_has_no_second_one(path):
    """No module of the simulator defines, renames or takes from elsewhere what the shared
    modules define, and none is called as they are."""
    assert faults(path.read_text(encoding="utf-8")) == []
    assert path.stem not in SHARED


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def choose(jobs): ...", "defines choose"),
        ("class MyController: ...", "defines MyController"),
        ("def _reconcile_quickly(): ...", "defines _reconcile_quickly"),
        ("def f():\n    def pick(): ...", "defines pick"),
        (
            "from foreserve.runtime.simulated.core import choose",
            "choose from foreserve",
        ),
        ("from foreserve.runtime.router import choose as c", "choose as c"),
        ("choose = lambda jobs: 0", "sets choose"),
        ("from foreserve.planner.policies import get_policy", "get_policy from"),
    ],
)
def test_a_second_one_would_be_found(text, found):
    """What the test above is there for, in made-up modules."""
    (fault,) = faults(text)
    assert fault.startswith(found)


def test_the_names_are_those_meant():
    """The shared modules still have what this is about."""
    assert {"Controller", "Policy", "reconcile", "choose", "pick", "next_turn"} <= {
        *owners()
    }
    assert {"backend", "core", "run", "shared"} <= {path.stem for path in SIMULATED}


def test_the_simulator_has_the_same_objects():
    """By identity; the compiled router is the router's function."""
    assert run.Controller is controller.Controller
    assert controller.reconcile is reconcile.reconcile
    assert backend.Ledger is ledger.Ledger
    assert backend.check_action is states.check_action
    assert flow.choose is router.choose
    assert flow._choose.py_func is router.choose
    assert (shared.next_turn, shared.swaps) == (turns.next_turn, turns.swaps)


class Wants:
    """The policy of one replica of ``a``, ACTIVE."""

    name = "wants"

    def decide(self, now_s, observed):
        replica = Replica(llm="a", gpus=(gpu(0),), state="ACTIVE", traffic_share=1.0)
        return Placement(replicas=(replica,))

    def next_review_s(self, now_s):
        return now_s + 100.0


def test_a_run_goes_through_them(monkeypatch):
    """In a run that loads, activates and serves, every action was reconcile's and every
    decision the policy's, through the controller's step."""
    seen = defaultdict(list)

    def noted(kind, function):
        def wrapper(*args, **kwargs):
            found = function(*args, **kwargs)
            seen[kind].append(found)
            return found

        return wrapper

    for kind, owner, name in (
        ("reconcile", controller, "reconcile"),
        ("step", controller.Controller, "step"),
        ("decide", Wants, "decide"),
        ("apply", backend.SimulatedBackend, "apply"),
    ):
        monkeypatch.setattr(owner, name, noted(kind, getattr(owner, name)))
    trace = Trace(
        arrival_s=np.array([1.0, 2.0]),
        llm=np.zeros(2, np.int32),
        llms=("a",),
        input_tokens=np.array([10, 10], np.int32),
        output_tokens=np.array([5, 5], np.int32),
    )
    served = simulate(
        fleet(option("a"), on=cluster(1)),
        trace,
        Wants(),
        start_s=0.0,
        end_s=60.0,
        seed=0,
    )
    assert served.outcome.total.finished == 2
    assert (served.outcome.loads, served.outcome.activations) == (1, 1)
    assert len(seen["step"]) == len(seen["decide"]) >= 3
    kinds = [action.kind for actions in seen["reconcile"] for action in actions]
    assert kinds == ["load", "activate"]
    assert len(seen["apply"]) <= len(seen["reconcile"])
