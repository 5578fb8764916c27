"""Several LLMs on one group: the choice by hand, the engine against plain iterations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.cost import IterationTime
from foreserve.runtime.scheduler import (
    POLICIES,
    DoublingBudget,
    Fcfs,
    Policy,
    Profile,
    Progress,
    RoundRobin,
    Static,
    finished,
)
from foreserve.runtime.simulated.shared import Hosted, Pool, SharedEngine, SharedJob
from foreserve.runtime.turns import Bound, Rules, next_turn, rebalance, swaps

EIGHTH = 0.125


def iteration(
    prefill_s: float = 1.0, step_s: float = 1.0, token_s: float = 0.0
) -> IterationTime:
    """Of prompts and steps whatever their size, but for ``token_s`` per context token."""
    return IterationTime(
        prefill_base_s=prefill_s,
        prefill_s_per_token=0.0,
        prefill_s_per_token2=0.0,
        decode_base_s=step_s,
        decode_s_per_seq=0.0,
        decode_s_per_context_token=token_s,
        relative_error=0.0,
        source="test",
    )


def hosted(
    mean_s: float = 4.0,
    tokens_per_page: int = 1,
    rate_rps: float = 1.0,
    usual: int = 1,
    **times: float,
) -> Hosted:
    """Of requests that take ``mean_s`` alone; pages are of 60 bytes."""
    return Hosted(
        time=iteration(**times),
        kv_bytes_per_token=60 // tokens_per_page,
        profile=Profile(reference_s=mean_s, decode_s=mean_s, rate_rps=rate_rps),
        input_tokens=2,
        output_tokens=2,
        usual_output_tokens=usual,
    )


def pool(pages: int, link_bytes_per_s: float = 0.0) -> Pool:
    return Pool(num_bytes=60 * pages, page_bytes=60, link_bytes_per_s=link_bytes_per_s)


def job(request: int, service: int, at: float, prompt: int, output: int) -> SharedJob:
    return SharedJob(
        request=request,
        service=service,
        arrival_s=at,
        input_tokens=prompt,
        output_tokens=output,
    )


def run(engine: SharedEngine, jobs: Sequence[SharedJob]) -> dict[int, float]:
    """Ends by request. Pages balance after every event, and all are free at the end."""
    coming = sorted(jobs, key=lambda job: job.arrival_s)
    ends: dict[int, float] = {}
    while coming or engine.next_s < math.inf:
        if coming and coming[0].arrival_s <= engine.next_s:
            engine.submit(coming[0], coming.pop(0).arrival_s)
        else:
            now_s = engine.next_s
            ends |= {done.request: now_s for done in engine.advance()}
        assert engine.used == sum(job.pages for job in engine.jobs())
        assert engine.used <= engine.pool.pages
        assert all(job.resident is (job.pages > 0) for job in engine.jobs())
        assert sum(engine._quotas.values()) == pytest.approx(engine.pool.pages)
    assert (engine.used, engine.running, engine.waiting) == (0, 0, 0)
    return ends


# --- the choice -----------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Stands:
    progress: Progress
    prompt_tokens: int
    next_pages: int
    promise: int
    pages: int
    resident: bool

    @property
    def number(self) -> int:
        return self.progress.request


def stands(
    number: int, service: int = 0, *, here: int = 0, next_pages: int = 1, **more: int
) -> Stands:
    """Request ``number`` came at that second; it holds ``here`` pages, 0: it waits."""
    progress = Progress(
        request=number, service=service, arrival_s=number, prefill_s=1.0, size_s=4.0
    )
    return Stands(
        progress=progress,
        prompt_tokens=more.get("prompt_tokens", 0 if here else 2),
        next_pages=next_pages,
        promise=more.get("promise", max(here, next_pages)),
        pages=here,
        resident=here > 0,
    )


def choose(
    requests: Sequence[Stands],
    policy: Policy | None = None,
    *,
    pages: int = 100,
    means_s: Sequence[float] = (1.0, 2.0, 4.0),
    quotas: Sequence[float] = (100.0, 100.0, 100.0),
    now_s: float = 10.0,
    bounds: Sequence[Bound] = (),
    **rules: float,
) -> tuple[list[int], list[int], bool]:
    """(batch, evicted, whether prompts)."""
    turn = next_turn(
        requests,
        policy=policy or Fcfs(),
        rules=Rules(**rules),
        now_s=now_s,
        profiles=[Profile(reference_s=s, decode_s=s) for s in means_s],
        pages=pages,
        quotas=dict(enumerate(quotas)),
        bounds=bounds,
    )
    batch = [s.number for s in turn.batch]
    return batch, [s.number for s in turn.evicted], turn.prompts


def test_prompts_of_the_llm_go_first_while_its_batch_has_room():
    """0 decodes, 1 and 2 wait: they join in one iteration; with room for one only 1;
    without room, or not eager, the decodes go on. Another LLM's wait."""
    requests = [stands(0, here=1), stands(1), stands(2), stands(3, 1)]
    assert choose(requests) == ([1, 2], [], True)
    assert choose(requests, max_num_seqs=2) == ([1], [], True)
    assert choose(requests, max_num_seqs=1) == ([0], [], False)
    assert choose(requests, eager=False) == ([0], [], False)


def test_prompts_share_an_iteration_up_to_its_tokens():
    """2 + 2 of 5 tokens, the third would be too many; a longer one has one to itself."""
    requests = [stands(number) for number in range(3)]
    assert choose(requests, max_prompt_tokens=5) == ([0, 1], [], True)
    assert choose(requests, max_prompt_tokens=1) == ([0], [], True)


def test_who_does_not_fit_bars_those_behind():
    """One free page beside a resident: 1 wants two, and 2, which wants one, waits behind
    it, although it is another LLM's."""
    requests = [stands(0, here=1), stands(1, 1, next_pages=2), stands(2, 2)]
    assert choose(requests, pages=2) == ([0], [], False)
    assert choose(requests, Static(), means_s=(2, 9, 1), pages=2)[0] == [2]


def test_promises_count():
    """A page is free, but promised to the resident; a newcomer's own expected output
    counts too."""
    promised = [stands(0, here=1, promise=2), stands(1)]
    assert choose(promised, pages=2)[0] == [0]
    assert choose(promised, pages=3)[0] == [1]
    assert choose([stands(0, here=1), stands(1, promise=3)], pages=3)[0] == [0]


def test_the_first_evicts_the_lowest():
    """A request of the LLM of smallest mean finds no page: of the residents of means 2
    and 4 the last to come of the longest goes, but never an LLM's last; round robin,
    where ranks change with every turn, evicts nobody."""
    long = [stands(0, 2, here=1), stands(1, 2, here=1)]
    middle = [stands(2, 1, here=1), stands(3, 1, here=1)]
    short = stands(4)
    assert choose([*long, *middle, short], Static(), pages=4) == ([4], [1], True)
    assert choose([long[0], *middle, short], Static(), pages=3) == ([4], [3], True)
    lasts = [long[0], middle[0]]
    assert choose([*lasts, short], Static(), pages=2) == ([2], [], False)
    assert choose([*long, *middle, short], RoundRobin(), pages=4)[1] == []


def test_who_runs_gets_pages_from_the_lowest():
    """0 needs a second page and none is free: the last of its own LLM goes, and of LLMs
    with one request each only if there is nothing else."""
    grows = stands(0, here=1, next_pages=2)
    mate, other = stands(1, here=1, next_pages=1), stands(2, 1, here=1)
    assert choose([grows, mate, other], pages=3) == ([0], [1], False)
    assert choose([grows, other], pages=2) == ([0], [2], False)


def test_gpus_that_some_llms_use():
    """LLM 0 has a second GPU, with two pages that 0 and 1 hold. 2 and 3 do not fit there,
    but 4 of LLM 1 joins, which does not use it. With three pages there 2 joins. 0 grows
    there when 1 goes, and not 2, whose LLM is not there, though it ranks lower."""
    here, mate = stands(0, here=1), stands(1, here=1)
    both = [here, mate, stands(2), stands(3), stands(4, 1)]
    two, three = ([Bound(services=frozenset({0}), pages=n)] for n in (2, 3))
    joins = choose(both, Static(), means_s=(2, 1), pages=9, bounds=two)
    assert joins == ([4], [], True)
    assert choose(both, pages=9, bounds=two)[0] == [0, 1]
    assert choose(both, pages=9, bounds=three)[0] == [2]
    grows, other = stands(0, here=1, next_pages=2), stands(2, 1, here=1)
    assert choose([grows, mate, other], pages=9, bounds=two) == ([0], [1], False)
    assert choose([grows, other], pages=9, bounds=three)[1] == []


def test_near_costs_go_to_the_larger_batch():
    """Means 1.05 and 1: one request of the shorter against two of the longer one is near
    by 10 %, not by 1 %; not where keys are no costs."""
    requests = [stands(0, 0, here=1), stands(1, 1, here=1), stands(2, 1, here=1)]
    means = (1.0, 1.05)
    assert choose(requests, Static(), means_s=means)[0] == [1, 2]
    assert choose(requests, Static(), means_s=means, near=0.01)[0] == [0]
    assert choose(requests, Fcfs(), means_s=means)[0] == [0]


def test_quotas_bind_while_others_want():
    """LLM 0 holds its quota of 1 page. Its next request waits while LLM 1 has none here
    and one waiting, and joins when nobody else waits."""
    requests = [stands(0, here=1), stands(1), stands(2, 1)]
    quotas = (1.0, 9.0)
    assert choose(requests, Static(), means_s=(1, 2), quotas=quotas)[0] == [0]
    assert choose(requests[:2], Static(), means_s=(1, 2), quotas=quotas)[0] == [1]


def test_the_overdue_go_first():
    """At 10, unserved since 2, with a patience of 1 and e = 4: before the short ones."""
    requests = [stands(2, 2, here=1), stands(9, 0, here=1)]
    assert choose(requests, Static())[0] == [9]
    assert choose(requests, Static(), patience=1.0)[0] == [2]


def test_quotas_move_to_the_full():
    """60 full and waiting asks for 6; 30 idle offers 3, 10 offers 1, but keeps 10: 3 move.
    Nothing moves when nobody waits; the sum stays."""
    quotas, used = {0: 60.0, 1: 30.0, 2: 10.0}, {0: 58, 1: 5, 2: 0}
    least = {0: 10, 1: 10, 2: 10}
    after = rebalance(quotas, used, {0}, least=least)
    assert after == pytest.approx({0: 63.0, 1: 27.0, 2: 10.0})
    assert rebalance(quotas, used, (), least=least) == quotas


def test_swap_or_recompute():
    """13B on one GPU: 500 tokens are 391 MiB, 17 ms each way at 24 GB/s, against 77 ms."""
    assert swaps(391 * 2**20, 24e9, 0.077)
    assert not swaps(391 * 2**20, 24e9, 0.030)
    assert not swaps(1, 0.0, 9.0)


# --- the engine -----------------------------------------------------------------------


def test_turns_by_hand():
    """Prompt and two steps of 1 s each. FCFS: 0 ends at 3, then 1. Round robin: turns,
    0 at 5, 1 at 6."""

    def ends(policy: Policy) -> dict[int, float]:
        engine = SharedEngine([hosted(), hosted()], pool(20), policy)
        return run(engine, [job(0, 0, 0.0, 2, 3), job(1, 1, 0.0, 2, 3)])

    assert ends(Fcfs()) == {0: 3.0, 1: 6.0}
    assert ends(RoundRobin()) == {0: 5.0, 1: 6.0}


def test_a_short_one_preempts_between_iterations():
    """A decode of 100 steps of 1 s is one stretch; a request of a shorter LLM that comes
    at 9.5 has its prompt from 10 on and ends at 12; the long one ends 2 s later."""
    engine = SharedEngine([hosted(2.0), hosted(100.0)], pool(200), Static())
    ends = run(engine, [job(0, 1, 0.0, 2, 101), job(1, 0, 9.5, 2, 2)])
    assert ends == {1: 12.0, 0: 103.0}


def test_switches_take_their_time():
    """Round robin with 0.5 s a switch: prompts at 1, 2.5, steps at 4 and 5.5."""
    engine = SharedEngine([hosted(), hosted()], pool(9), RoundRobin(), switch_s=0.5)
    assert run(engine, [job(0, 0, 0.0, 2, 2), job(1, 1, 0.0, 2, 2)]) == {
        0: 4.0,
        1: 5.5,
    }
    assert engine.turns == 4


@pytest.mark.parametrize(("link", "end_s"), [(0.0, 7.0), (480.0, 6.5)])
def test_memory_pressure(link, end_s):
    """4 pages of one token. Both prompts (2 tokens each) are there at 2; 1 gives way to 0,
    which ends at 4. Computed again (2 s, and it gives the next token) 1 ends at 7. Swapped:
    120 bytes at 480 a second are 0.25 s each way, so 0 ends at 4.25, and 1 two steps and
    0.25 s later."""
    engine = SharedEngine([hosted(prefill_s=2.0)], pool(4, link), Fcfs())
    jobs = [job(0, 0, 0.0, 2, 3), job(1, 0, 0.0, 2, 3)]
    ends = run(engine, jobs)
    assert ends[1] == end_s
    assert (engine.preemptions, engine.swaps) == (1, int(link > 0))
    assert jobs[1].preemptions == 1


def test_members_come_and_go():
    """LLM 1 joins at 1 with 5 more pages and its request is served beside; LLM 0 leaves at
    2.5, in an iteration of its own, which is lost; what it had comes back."""
    engine = SharedEngine([hosted()], pool(12), Fcfs())
    first = job(0, 0, 0.0, 2, 9)
    engine.submit(first, 0.0)
    engine.advance()
    assert engine.add(hosted(), pool(17), 1.0) == 1
    second = job(1, 1, 1.5, 2, 2)
    engine.submit(second, 1.5)
    assert engine.advance() == ()
    assert (first.given, engine.used) == (2, 3)
    assert engine.remove(0, pool(5), 2.5) == (first,)
    assert (first.pages, first.given, engine.used) == (0, 2, 0)
    assert engine.next_s == 3.5
    assert run(engine, []) == {1: 4.5}
    with pytest.raises(ValueError, match="has left"):
        engine.submit(job(2, 0, 5.0, 1, 1), 5.0)


def test_a_pool_that_shrinks_evicts():
    """Two requests of 2 pages, then 3 each. Of 20 pages 5 are left when a member joins at
    1.5: the iteration under way still takes its 6, the next one evicts the later one."""
    engine = SharedEngine([hosted()], pool(20), Fcfs())
    for number in (0, 1):
        engine.submit(job(number, 0, 0.0, 2, 4), 0.0)
    engine.advance()
    engine.add(hosted(), pool(5), 1.5)
    engine.advance()
    assert (engine.used, engine.running) == (6, 2)
    engine.advance()
    assert (engine.used, engine.running, engine.waiting) == (4, 1, 1)
    assert run(engine, [])[1] > 4.0
    assert engine.preemptions == 1
    engine.submit(job(2, 0, 9.0, 2, 4), 9.0)
    with pytest.raises(ValueError, match="no longer holds"):
        engine.add(hosted(), pool(4), 9.0)


def test_what_cannot_fit_is_refused():
    """4 tokens in 3 pages of one."""
    engine = SharedEngine([hosted()], pool(3), Fcfs())
    assert engine.can_hold(job(0, 0, 0.0, 2, 2))
    with pytest.raises(ValueError, match="more tokens"):
        engine.submit(job(0, 0, 0.0, 2, 3), 0.0)


def test_profiles_are_learnt():
    """Three decode steps of 1 s, first guess 4 s counted once: mean 3.5."""
    engine = SharedEngine([hosted()], pool(9), DoublingBudget())
    run(engine, [job(0, 0, 0.0, 2, 4)])
    assert engine.profile(0).decode_s == 3.5


# --- against plain iterations ---------------------------------------------------------


def by_iterations(
    services: Sequence[Hosted],
    of: Pool,
    policy: Policy,
    rules: Rules,
    jobs: Sequence[SharedJob],
    switch_s: float,
) -> tuple[dict[int, float], dict[int, float], int]:
    """Each iteration on its own, one token at a time. (first tokens, ends, preemptions)."""
    coming = sorted(jobs, key=lambda job: job.arrival_s)
    here: list[Stands] = []
    profiles = [h.profile for h in services]
    per_page = [60 // h.kv_bytes_per_token for h in services]
    least = {
        s: -(-(2 + h.usual_output_tokens) // per_page[s])
        for s, h in enumerate(services)
    }
    inflow = [h.profile.rate_rps * h.kv_bytes_per_token * 4 for h in services]
    spare = of.pages - sum(least.values())
    quotas = {s: least[s] + spare * inflow[s] / sum(inflow) for s in least}
    if spare <= 0:
        quotas = {s: of.pages / sum(least.values()) * least[s] for s in least}
    facts = {job.request: job for job in jobs}
    given = dict.fromkeys(facts, 0)
    stored = dict.fromkeys(facts, 0)
    decode_s = dict.fromkeys(facts, 0.0)
    firsts: dict[int, float] = {}
    ends: dict[int, float] = {}
    running: frozenset[int] = frozenset()
    now_s = tick_s = 0.0
    preemptions, last = 0, None

    def update(s: Stands) -> None:
        of_job, page = facts[s.number], per_page[s.progress.service]
        known = of_job.input_tokens + given[s.number]
        s.prompt_tokens = 0 if stored[s.number] else known
        s.next_pages = -(-(stored[s.number] + 1 if stored[s.number] else known) // page)
        if s.resident:
            s.pages = -(-stored[s.number] // page)
        else:
            usual = services[s.progress.service].usual_output_tokens
            expected = of_job.input_tokens + max(usual, 1) - 1
            s.pages, s.promise = 0, max(-(-expected // page), s.next_pages)

    def arrive() -> None:
        while coming and coming[0].arrival_s <= now_s:
            new = coming.pop(0)
            time = services[new.service].time
            progress = Progress(
                request=new.request,
                service=new.service,
                arrival_s=new.arrival_s,
                prefill_s=time.prefill_s(new.input_tokens, 0.0),
                size_s=time.isolated_s(new.input_tokens, new.output_tokens),
            )
            here.append(Stands(policy.arrive(progress, profiles), 0, 0, 0, 0, False))
            update(here[-1])

    while coming or here:
        if not here:
            now_s = max(now_s, coming[0].arrival_s)
            arrive()
        turn = next_turn(
            here,
            policy=policy,
            rules=rules,
            now_s=now_s,
            profiles=profiles,
            pages=of.pages,
            quotas=quotas,
            running=running,
        )
        time = services[turn.service].time
        seconds = 0.0
        for s in turn.evicted:
            preemptions += 1
            service = services[s.progress.service]
            kv_bytes = stored[s.number] * service.kv_bytes_per_token
            s.resident = False
            if swaps(kv_bytes, of.link_bytes_per_s, service.time.prefill_base_s):
                seconds += kv_bytes / of.link_bytes_per_s
            else:
                stored[s.number] = 0
            update(s)
        for s in turn.batch:
            if stored[s.number] and not s.resident:
                kv_bytes = stored[s.number] * services[turn.service].kv_bytes_per_token
                seconds += kv_bytes / of.link_bytes_per_s
        if last not in (None, turn.service):
            seconds += switch_s
        if turn.prompts:
            seconds += time.prefill_s(0, 0)
        else:
            context = sum(stored[s.number] + 1 for s in turn.batch)
            seconds += time.decode_s(len(turn.batch), context)
        now_s += seconds
        arrive()
        last, running = turn.service, frozenset(s.number for s in turn.batch)
        for s in turn.batch:
            number = s.number
            stored[number] = (
                facts[number].input_tokens + given[number]
                if turn.prompts
                else stored[number] + 1
            )
            decode_s[number] += 0.0 if turn.prompts else seconds
            given[number] += 1
            s.resident = True
            firsts.setdefault(number, now_s)
            s.progress = policy.ran(s.progress, seconds, now_s)
            if policy.foresees:
                left = facts[number].output_tokens - given[number]
                context = facts[number].input_tokens + given[number] + left / 2
                size_s = s.progress.attained_s + left * time.decode_s(1, context)
                s.progress = dataclasses.replace(s.progress, size_s=size_s)
            update(s)
            if given[number] == facts[number].output_tokens:
                ends[number] = now_s
                here.remove(s)
                profile = profiles[turn.service]
                profiles[turn.service] = finished(profile, decode_s[number])
        assert sum(s.pages for s in here) <= of.pages
        if now_s >= tick_s:
            used = {
                service: sum(
                    s.promise
                    for s in here
                    if s.resident and s.progress.service == service
                )
                for service in quotas
            }
            waiting = {s.progress.service for s in here if not s.resident}
            quotas = rebalance(quotas, used, waiting, least=least)
            tick_s = (now_s // rules.quota_every_s + 1) * rules.quota_every_s
    return firsts, ends, preemptions


SERVICE = st.builds(
    hosted,
    mean_s=st.sampled_from([1.0, 4.0, 16.0]),
    tokens_per_page=st.sampled_from([1, 2, 3, 5]),
    rate_rps=st.sampled_from([0.5, 2.0]),
    usual=st.integers(1, 12),
    prefill_s=st.sampled_from([0.25, 2.0]),
    step_s=st.sampled_from([0.125, 0.5]),
    token_s=st.sampled_from([0.0, 2.0**-8]),
)


@given(
    services=st.lists(SERVICE, min_size=1, max_size=3),
    sizes=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(0, 90), st.integers(1, 6), st.integers(1, 30)
        ),
        min_size=1,
        max_size=12,
    ),
    pages=st.integers(36, 80),
    link=st.sampled_from([0.0, 1024.0]),
    name=st.sampled_from(list(POLICIES)),
    rules=st.builds(
        Rules,
        max_num_seqs=st.integers(1, 5),
        max_prompt_tokens=st.integers(2, 16),
        near=st.sampled_from([0.0, 0.25]),
        patience=st.sampled_from([math.inf, 2.0]),
        eager=st.booleans(),
    ),
    switch_s=st.sampled_from([0.0, EIGHTH]),
)
@settings(max_examples=300, deadline=None)
def test_as_iteration_by_iteration(services, sizes, pages, link, name, rules, switch_s):
    """First tokens, ends and preemptions to the last bit (times are sums of powers of
    two), under every policy, with a pool that is often too small."""
    jobs = [
        job(number, service % len(services), at / 4, prompt, output)
        for number, (service, at, prompt, output) in enumerate(sizes)
    ]
    of, policy = pool(pages, link), POLICIES[name].make()
    firsts, ends, preemptions = by_iterations(
        services, of, policy, rules, jobs, switch_s
    )
    engine = SharedEngine(services, of, policy, rules, switch_s)
    assert run(engine, jobs) == ends
    assert {job.request: job.first_token_s for job in jobs} == firsts
    assert engine.preemptions == preemptions
