"""Who keeps its GPUs for how long, and that nobody waits for ever: in `reconcile`, in the
on-demand rule, and in whole runs of more LLMs than the GPUs hold."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Fleet
from foreserve.models.serving import ServingRules
from foreserve.planner.policies import get_policy
from foreserve.planner.policies.on_demand import OnDemand
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.journal import Journal, PhaseChange, RequestEnd, parse
from foreserve.runtime.reconcile import kept_for_now, reconcile
from foreserve.runtime.simulated.backend import SimulatedBackend
from foreserve.traces.trace import Trace
from tests.build import cluster, fleet, gpu, option, small_plan

LOAD_S, ACTIVATE_S, ANSWER_S = 2.0, 0.05, 1.1
"""Of `tests.build.option`, and of the longest answer here."""


def of(
    count: int,
    gpus: int,
    *,
    turn_s: float = 4.0,
    tenure: float = 1.0,
    resident_bytes: int = 6000,
) -> Fleet:
    """LLMs a, b, ... of which each GPU (10,000 bytes, 4,000 of them for the KV memory of
    one that serves) holds one; with 2,000 ``resident_bytes``, the weights of three."""
    options = [
        option(llm, resident_bytes=resident_bytes, kv_bytes=4000)
        for llm in "abcdef"[:count]
    ]
    made = fleet(*options, on=cluster(gpus, memory_bytes=10_000))
    return replace(made, serving=ServingRules(tenure=tenure, turn_s=turn_s))


def seen(llm: str, phase: Phase, served_since_s: float | None) -> ObservedReplica:
    return ObservedReplica(
        llm=llm, gpus=(gpu(0),), phase=phase, served_since_s=served_since_s
    )


@pytest.mark.parametrize(
    ("phase", "wanted", "since_s", "until_s"),
    [
        ("ACTIVE", "WARM", 9.98, 10.03),  # one activation would bring it back
        ("ACTIVE", None, 9.0, 11.05),  # a load and an activation
        ("ACTIVE", "WARM", 9.0, None),
        ("ACTIVE", None, 7.0, None),
        ("ACTIVE", "ACTIVE", 9.99, None),
        ("WARM", None, 9.0, 11.05),
        ("WARM", None, None, None),  # never served: foreseen, gives way at once
        ("ACTIVE", None, None, None),
    ],
)
def test_what_has_begun_to_serve_stays_as_long_as_it_takes_to_have_it_back(
    phase, wanted, since_s, until_s
):
    """At 10 s, with a load of 2 s and an activation of 0.05 s: nothing is done about a
    replica within its tenure, and it is known when that ends."""
    on = of(2, 1)
    goal = [Replica(llm="a", gpus=(gpu(0),), state=wanted)] if wanted else []
    desired = Placement(replicas=tuple(goal))
    observed = Observed(now_s=10.0, replicas=(seen("a", phase, since_s),))
    kept = [end_s for _, end_s in kept_for_now(desired, observed, on)]
    assert kept == ([pytest.approx(until_s)] if until_s else [])
    acts = reconcile(desired, observed, on)
    assert bool(acts) == (until_s is None and wanted != phase)


# --- whole runs -----------------------------------------------------------------------


@dataclass
class Watched:
    """The on-demand rule, and how long LLMs have had nobody when it was asked."""

    rule: OnDemand
    longest_s: float = 0.0
    asked_s: list[float] = field(default_factory=list)
    name: str = "watched"

    def decide(self, now_s: float, observed: Observed) -> Placement:
        self.asked_s.append(now_s)
        for since_s in observed.unserved_since_s.values():
            self.longest_s = max(self.longest_s, now_s - since_s)
        return self.rule.decide(now_s, observed)

    def next_review_s(self, now_s: float) -> float:
        return self.rule.next_review_s(now_s)


def trace_of(arrivals: list[tuple[float, str, int]], llms: str) -> Trace:
    arrivals = sorted(arrivals)
    return Trace(
        arrival_s=np.array([at_s for at_s, _, _ in arrivals]),
        llm=np.array([llms.index(llm) for _, llm, _ in arrivals], np.int32),
        llms=tuple(llms),
        input_tokens=np.full(len(arrivals), 5, np.int32),
        output_tokens=np.array([tokens for _, _, tokens in arrivals], np.int32),
    )


def served(
    on: Fleet, arrivals: list[tuple[float, str, int]], end_s: float, name: str
) -> tuple[Watched, Journal]:
    """A run of the policy from an empty cluster; ``planned`` plans a on GPU 0."""
    clock, journal = VirtualClock(), Journal()
    plan = small_plan()
    epoch = replace(
        plan.epochs[0],
        end_s=1e6,
        placement=Placement(
            replicas=(Replica(llm="a", gpus=(gpu(0),), state="ACTIVE"),)
        ),
    )
    policy = get_policy(name, replace(plan, fleet=on, epochs=(epoch,)), 30.0)
    assert isinstance(policy, OnDemand)
    watched = Watched(policy)
    llms = "".join(llm.name for llm in on.llms)
    backend = SimulatedBackend(
        on,
        trace_of(arrivals, llms),
        clock,
        np.random.default_rng(0),
        journal,
        load_noise=0.0,
    )
    controller = Controller(
        policy=watched, backend=backend, clock=clock, fleet=on, journal=journal
    )
    controller.run(end_s)
    while backend.in_system:
        controller.turn(end_s + 1e4)
    backend.stop()
    return watched, journal


def stints(journal: Journal) -> list[tuple[str, float, float, bool]]:
    """(LLM, since, until, whether its weights went after it) of each time that a replica
    served and ceased to: until it ceased, or its weights went."""
    since: dict[object, float] = {}
    ended: dict[object, tuple[float, float]] = {}
    found = []
    for event in parse(journal.lines):
        if not isinstance(event, PhaseChange):
            continue
        key = event.llm, event.gpus
        if event.phase == "ACTIVE":
            since[key] = event.at_s
            if key in ended:
                found.append((event.llm, *ended.pop(key), False))
        elif event.phase == "DRAINING":
            ended[key] = since.pop(key), event.at_s
        elif event.phase is None and key in ended:
            begun_s, _ = ended.pop(key)
            found.append((event.llm, begun_s, event.at_s, True))
    return found


def waits(journal: Journal) -> dict[str, list[float]]:
    """From the arrival to the first token."""
    found = defaultdict(list)
    for event in parse(journal.lines):
        if isinstance(event, RequestEnd):
            assert event.first_token_s is not None
            found[event.llm].append(event.first_token_s - event.arrival_s)
    return found


@pytest.mark.parametrize("name", ["planned", "reactive"])
def test_who_falls_idle_wakes_who_waits(name):
    """One GPU. a answers until 13.0 s, b has waited for it since 12.3: it is looked at when
    a's last answer ends, not at the next review (every 5 s), and served a load and an
    activation later."""
    arrivals = [(0.0, "a", 5), (12.0, "a", 100), (12.3, "b", 5)]
    watched, journal = served(of(2, 1, turn_s=1e6), arrivals, 30.0, name)
    ends = [e.at_s for e in parse(journal.lines) if isinstance(e, RequestEnd)]
    assert ends[1] == pytest.approx(13.0, abs=0.2)
    assert ends[1] in watched.asked_s
    (b_s,) = waits(journal)["b"]
    assert b_s + 12.3 == pytest.approx(ends[1] + LOAD_S + ACTIVATE_S, abs=0.05)


def test_within_its_tenure_an_idle_replica_stays():
    """One GPU, tenure 5: a serves from 2.05 s on and is idle from 2.1; b, which comes at
    3 s, is begun with at 2.05 + 5 * 2.05 s, when that is over, and not at a review."""
    _, journal = served(
        of(2, 1, tenure=5.0), [(0.0, "a", 5), (3.0, "b", 5)], 30.0, "reactive"
    )
    stint, *_ = stints(journal)
    assert stint == ("a", pytest.approx(2.05), pytest.approx(2.05 + 10.25), True)
    (b_s,) = waits(journal)["b"]
    assert 3.0 + b_s == pytest.approx(12.3 + 2.05, abs=0.05)


def test_who_works_gives_way_after_its_turn():
    """One GPU, a is never without work; b waits from 10 s on. Without turns b waits until
    a's last request has ended; with turns of 4 s (long over) a's work is ended and b comes,
    and a is back a turn later."""
    always = [(0.5 * i, "a", 100) for i in range(120)]
    arrivals = [*always, (10.0, "b", 100)]
    _, journal = served(of(2, 1, turn_s=1e6), arrivals, 60.0, "reactive")
    (b_s,) = waits(journal)["b"]
    assert b_s > 50.0
    _, journal = served(of(2, 1), arrivals, 60.0, "reactive")
    (b_s,) = waits(journal)["b"]
    assert b_s < ANSWER_S + LOAD_S + ACTIVATE_S + 0.1
    assert max(waits(journal)["a"]) < 2 * (ANSWER_S + LOAD_S + ACTIVATE_S) + 4.0


demands = st.lists(
    st.tuples(
        st.floats(0.3, 6.0),  # seconds between requests
        st.sampled_from([0.0, 20.0]),  # of a period, of which half has none
        st.sampled_from([5, 40, 100]),  # output tokens: 10 ms each
    ),
    min_size=2,
    max_size=5,
)


@given(
    demand=demands,
    gpus=st.integers(1, 2),
    tenure=st.sampled_from([0.5, 1.0, 3.0]),
    resident_bytes=st.sampled_from([2000, 6000]),
    name=st.sampled_from(["planned", "reactive", "reactive-keep"]),
)
@settings(max_examples=25, deadline=None)
def test_change_is_bounded_and_nobody_starves(
    demand, gpus, tenure, resident_bytes, name
):
    """Constant and oscillating demand, of more LLMs than the GPUs hold: whoever has begun
    to serve stays for its tenure, so there are no more loads and changes than that allows;
    and an LLM that has nobody is served after the turns of those before it at most."""
    on = of(len(demand), gpus, tenure=tenure, resident_bytes=resident_bytes)
    llms = "abcdef"[: len(demand)]
    arrivals = [
        (at_s, llm, tokens)
        for llm, (gap_s, period_s, tokens) in zip(llms, demand, strict=True)
        for at_s in np.arange(0.1, 60.0, gap_s)
        if not period_s or at_s % period_s < period_s / 2
    ]
    watched, journal = served(on, arrivals, 60.0, name)
    for llm, begun_s, ended_s, gone in stints(journal):
        back_s = ACTIVATE_S + (LOAD_S if gone else 0.0)
        assert ended_s - begun_s >= tenure * back_s - 1e-6, llm
    answered = waits(journal)
    assert sum(map(len, answered.values())) == len(arrivals)
    turn_s = max(4.0, tenure * (LOAD_S + ACTIVATE_S))
    each_s = turn_s + ANSWER_S + LOAD_S + ACTIVATE_S
    assert watched.longest_s <= len(demand) * each_s
