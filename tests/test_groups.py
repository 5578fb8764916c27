"""LLMs that share GPUs, and memory that is lent, in whole simulated runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.observed import Observed
from foreserve.models.outcome import Run
from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Fleet
from foreserve.models.serving import ServingRules
from foreserve.runtime.journal import PhaseChange, read_journal
from foreserve.traces.prefixes import Prefixes
from foreserve.traces.trace import Trace
from tests.build import cluster, fleet, gpu, option
from tests.test_simulated import go, place, requests, roomy

SMALL_PAGES = ServingRules(page_bytes=64, scheduler="round-robin")


def sharing(*names: str, **changes: object) -> Fleet:
    """GPUs of 10,000 bytes; each LLM has 30 bytes of weights and 4000 KV tokens."""
    return replace(roomy(*names), serving=replace(SMALL_PAGES, **changes))


def both(*names: str) -> Placement:
    return place(*((name, 0, "ACTIVE") for name in names))


def test_two_llms_on_one_gpu_take_turns():
    """a's prompt (10 + 3 ms) and b's (10 + 2 ms) at once: the second starts when the first
    has ended. Then each step of either (10.1 ms) waits for the other's."""
    goal = both("a", "b")
    trace = requests((1.0, "a", 300, 3), (1.0, "b", 200, 3))
    run = go(sharing("a", "b"), trace, (0.0, goal), initial=goal)
    np.testing.assert_allclose(run.first_token_s, [1.013, 1.025])
    np.testing.assert_allclose(run.finish_s, [1.025 + 0.0303, 1.025 + 0.0404])
    assert run.outcome.total.itl.count == 4


def test_alone_in_a_group_is_as_fast_as_alone():
    """b shares a's GPU and has no requests: a's take what they take on a GPU of its own."""
    trace = requests((1.0, "a", 300, 20), (5.0, "a", 300, 20))
    shared, alone = (
        go(sharing("a", "b"), trace, (0.0, goal), initial=goal)
        for goal in (both("a", "b"), both("a"))
    )
    np.testing.assert_allclose(shared.finish_s, alone.finish_s)
    np.testing.assert_allclose(shared.first_token_s, alone.first_token_s)


def test_a_newcomer_takes_turns_with_what_runs():
    """b becomes ACTIVE beside a at 10.05 s, when a's request has 3 tokens: those and its
    KV stay, the iteration under way is lost, and nothing is computed again."""
    trace = requests((10.0, "a", 300, 30), (10.1, "b", 300, 1))
    warm = place(("a", 0, "ACTIVE"), ("b", 0, "WARM"))
    run = go(
        sharing("a", "b"), trace, (0.0, warm), (10.0, both("a", "b")), initial=warm
    )
    assert run.first_token_s[0] == pytest.approx(10.013)
    # 29 steps of 10.1 ms from 10.013 on; 6.7 ms of one lost at 10.05, b's prompt 13 ms.
    lost_s = 10.05 - (10.013 + 3 * 0.0101)
    assert run.finish_s[0] == pytest.approx(10.013 + 29 * 0.0101 + lost_s + 0.013)
    assert run.outcome.total.finished == 2
    assert run.outcome.total.itl.count == 29


def test_a_member_that_drains_leaves_the_group():
    """b is demoted at 10 s amid 20 tokens: it ends them, becomes WARM, and a goes on."""
    trace = requests((9.9, "b", 10, 20), (11.0, "a", 10, 5), (11.0, "b", 10, 5))
    run = go(
        sharing("a", "b"),
        trace,
        (0.0, both("a", "b")),
        (10.0, place(("a", 0, "ACTIVE"), ("b", 0, "WARM"))),
        initial=both("a", "b"),
    )
    phases = [(r.llm, r.phase) for r in run.residency if r.llm == "b"]
    assert phases == [("b", "ACTIVE"), ("b", "DRAINING"), ("b", "WARM")]
    assert run.finish_s[0] == pytest.approx(9.9 + 0.0101 + 19 * 0.0101)
    assert np.isnan(run.finish_s[2])
    assert run.outcome.total.finished == 2


class Shuffled:
    """Wants others of its LLMs to serve on its two GPUs, together, every few seconds."""

    name = "shuffled"

    def __init__(self, f: Fleet, rng: np.random.Generator) -> None:
        self.names, self.rng = [llm.name for llm in f.llms], rng
        self.until_s, self.goal = 0.0, Placement()

    def decide(self, now_s: float, observed: Observed) -> Placement:
        if now_s >= self.until_s:
            self.until_s = now_s + float(self.rng.exponential(3.0))
            states = ("ACTIVE", "ACTIVE", "WARM", None)
            self.goal = Placement(
                replicas=tuple(
                    Replica(llm=name, gpus=(gpu(index),), state=state)
                    for name in self.names
                    for index in (0, 1)
                    if (state := states[int(self.rng.integers(4))]) is not None
                )
            )
        return self.goal

    def next_review_s(self, now_s: float) -> float:
        return max(self.until_s, now_s + 0.5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scheduler=st.sampled_from(["fcfs", "db-mean"]))
def test_requests_are_conserved_in_groups(seed, scheduler):
    """Members come and go all the time: every request ends once, after its first token,
    gaps add up to the time between first and last tokens of all that have ended without a
    restart, and the same seed gives the same run."""
    f = sharing("a", "b", "c", scheduler=scheduler, lending=False)

    def once() -> Run:
        rng = np.random.default_rng(seed)
        count = 150
        trace = Trace(
            arrival_s=np.cumsum(rng.exponential(0.15, count)),
            llm=rng.integers(0, 3, count).astype(np.int32),
            llms=("a", "b", "c"),
            input_tokens=rng.integers(1, 600, count).astype(np.int32),
            output_tokens=rng.integers(1, 60, count).astype(np.int32),
        )
        return go_with(f, trace, Shuffled(f, rng))

    run, again = once(), once()
    assert run.outcome == again.outcome
    np.testing.assert_array_equal(run.finish_s, again.finish_s)
    done = ~np.isnan(run.finish_s)
    assert done.sum() == run.outcome.total.finished > 0
    assert (run.arrival_s[done] < run.first_token_s[done]).all()
    assert (run.first_token_s[done] <= run.finish_s[done]).all()
    if done.all():
        waited = run.finish_s - run.first_token_s
        assert run.itl.sum() == (run.output_tokens - 1).sum()
        assert run.itl_s.sum() == pytest.approx(waited.sum())


def go_with(f: Fleet, trace: Trace, policy: Shuffled) -> Run:
    from foreserve.runtime.simulated import simulate

    return simulate(f, trace, policy, start_s=0.0, end_s=60.0, seed=1)


def test_shared_prefixes_are_found_again():
    """Turns of 64, 96 and 96 tokens in blocks of 32: the second repeats the first's two
    blocks and the third the second's three, of which the last token is computed again (so
    one block of 32); without the cache nothing is found."""
    goal = place(("a", 0, "ACTIVE"))
    prompts = [[0, 1], [0, 1, 2], [0, 1, 2]]
    trace = replace(
        requests((1.0, "a", 64, 2), (2.0, "a", 96, 2), (3.0, "a", 96, 2)),
        prefixes=Prefixes(
            starts=np.cumsum([0, *map(len, prompts)]),
            ids=np.concatenate(prompts).astype(np.int32),
            block_tokens=32,
        ),
    )
    for caching, expected in ((True, 64 + 64), (False, 0)):
        f = replace(roomy("a"), serving=ServingRules(prefix_caching=caching))
        run = go(f, trace, (0.0, goal), initial=goal)
        assert run.outcome.found_tokens == expected
        # 10 ms and 10 us for each token that is computed.
        computed = np.array([64, 96, 96]) - ([0, 64, 64] if caching else 0)
        ttft_s = run.first_token_s - run.arrival_s
        np.testing.assert_allclose(ttft_s, 0.01 + 1e-5 * computed)


# --- lending ----------------------------------------------------------------------------


def lender_and_heavy(*, lending: bool = True) -> Fleet:
    """GPUs of 10,000 bytes: a with 30 bytes and 4000 KV tokens (250 blocks), 8 at a time;
    b with 8,000 bytes, which do not fit beside a's KV."""
    return replace(
        fleet(
            option("a", kv_bytes=4000),
            option("b", resident_bytes=8000),
            on=cluster(memory_bytes=10_000),
        ),
        serving=ServingRules(lending=lending),
    )


@pytest.mark.parametrize("lending", [True, False])
def test_a_draining_replica_lends_its_memory(lending):
    """Demoted at 5 s amid 400 tokens of one request (until 9.04 s), a keeps 20 blocks and
    an eighth of its 250, and lends what b's load of 2 s needs: b is WARM at 7 s. Without
    lending it begins when a has drained. a's request takes as long either way."""
    run = go(
        lender_and_heavy(lending=lending),
        requests((5.0, "a", 10, 400)),
        (0.0, place(("a", 0, "ACTIVE"))),
        (5.1, place(("b", 0, "WARM"))),
        initial=place(("a", 0, "ACTIVE")),
    )
    drained_s = 5.0 + 0.0101 + 399 * 0.0101
    assert run.finish_s[0] == pytest.approx(drained_s)
    (load,) = [r for r in run.residency if (r.llm, r.phase) == ("b", "LOADING")]
    assert load.start_s == pytest.approx(5.1 if lending else drained_s)
    assert load.end_s == pytest.approx(load.start_s + 2.0)


def test_what_is_lent_is_taken_back(tmp_path):
    """As above with 3,500 tokens: at 5.1 s a needs 2 blocks and keeps some 30 more; once
    it has used them up, b, WARM by then, is thrown out, and a's request waits for nothing.
    b is loaded again when a has drained."""
    path = tmp_path / "run.jsonl"
    run = go(
        lender_and_heavy(),
        requests((5.0, "a", 10, 3500)),
        (0.0, place(("a", 0, "ACTIVE"))),
        (5.1, place(("b", 0, "WARM"))),
        initial=place(("a", 0, "ACTIVE")),
        journal=path,
    )
    drained_s = 5.0 + 3500 * 0.0101
    assert run.finish_s[0] == pytest.approx(drained_s)
    story = [
        (e.phase, e.lost)
        for e in read_journal(path)
        if isinstance(e, PhaseChange) and e.llm == "b"
    ]
    assert story == [
        ("LOADING", False),
        ("WARM", False),
        (None, True),
        ("LOADING", False),
        ("WARM", False),
    ]
    loads = [r for r in run.residency if (r.llm, r.phase) == ("b", "LOADING")]
    assert loads[1].start_s == pytest.approx(drained_s)
    assert (run.outcome.revoked, run.outcome.effort["b"].revoked) == (1, 1)
    assert run.outcome.wasted_bytes == 8000
