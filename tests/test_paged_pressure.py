"""LLMs of several leaders on the same GPUs, asked for more than their memory holds."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.memory.books import Books  # noqa: E402
from foreserve.runtime.memory.kv import KvNeeds, KvSpace  # noqa: E402
from foreserve.runtime.paged import away, worker  # noqa: E402
from foreserve.runtime.paged.jobs import TooLong  # noqa: E402
from foreserve.runtime.paged.line import Claim, Line  # noqa: E402
from foreserve.runtime.paged.loads import LoadFailed  # noqa: E402
from tests.paged_gpus import Gpus, weight_pages  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402

PAGE = 16384
FAMILIES = ("qwen", "llama", "qwen3")


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return {family: Llm(folder / family, family) for family in FAMILIES}


class Place:
    """A GPU of so many pages, one for each token, and what is heard of requests there."""

    def __init__(self, pages: int) -> None:
        self.space = KvSpace([Books(pages)], 1)
        self.service = self.space.add(
            KvNeeds(
                llm="x",
                token_bytes=1,
                input_tokens=1.0,
                output_tokens=1.0,
                usual_output_tokens=1,
            )
        )
        self.claims: list[Claim] = []
        self.heard: list[str] = []
        self.line = Line(
            self.space,
            lambda table, tokens: table.grow(tokens),
            lambda: [claim for claim in self.claims if claim.table.pages],
        )

    def claim(self, age, leader, *, at_once=False, promise=0):
        """``at_once``: it gives way as soon as it is told to."""
        name = f"{leader}{age}"
        table = self.space.open(self.service)
        table.promise = promise

        def give_way():
            self.heard.append(f"{name} gives way")
            if at_once:
                self.leaves(claim)
            return at_once

        claim = Claim(
            age=(age, leader, 0),
            table=table,
            met=lambda: self.heard.append(f"{name} comes"),
            give_way=give_way,
        )
        self.claims.append(claim)
        return claim

    def leaves(self, claim):
        self.line.leave(claim)
        claim.table.release()
        self.claims.remove(claim)

    def ask(self, claim, tokens, waits=True):
        """What it has heard when all who wait were served, too."""
        self.heard.clear()
        has = self.line.ask(claim, tokens, waits=waits)
        self.line.serve()
        return has, list(self.heard)


def test_the_older_make_the_younger_give_way():
    """Ten pages: a1 and c3 have four each, b2 two. b2 wants two more: c3 is told, and not
    twice; a1, which is older, never. d4 wants one more and waits behind b2. When c3 has
    gone, b2 has its pages and then d4."""
    place = Place(11)
    a, b, c, d = (place.claim(i, x) for i, x in enumerate("abcd", 1))
    for claim, tokens in ((a, 4), (b, 2), (c, 4), (d, 1)):
        assert place.ask(claim, tokens) == (True, [])
    assert place.ask(d, 2) == (False, [])
    assert place.ask(b, 5) == (False, ["d4 gives way", "c3 gives way"])
    assert place.ask(a, 4) == (True, [])
    assert place.ask(b, 5) == (False, [])
    place.leaves(c)
    place.line.serve()
    assert place.heard == ["b2 comes", "d4 comes"]
    assert (b.table.pages, d.table.pages) == (5, 2)


def test_own_ones_give_way_at_once():
    """a1 wants what b2 has, which is led here: it has it without waiting for a message."""
    place = Place(4)
    a, b = place.claim(1, "a"), place.claim(2, "b", at_once=True)
    place.ask(a, 2)
    place.ask(b, 2)
    assert place.ask(a, 4) == (False, ["b2 gives way", "a1 comes"])
    assert a.table.pages == 4


def test_who_has_none_makes_nobody_give_way():
    """Of six pages b2 has three and is promised five. a1, older, has none and wants one: it
    waits, for its promise does not fit beside b2's. b2 grows meanwhile; c3 would fit, and
    waits behind a1. Another one of a's, which fits, comes in a1's place."""
    place = Place(6)
    a, b, c = place.claim(1, "a", promise=2), place.claim(2, "b"), place.claim(3, "c")
    b.table.promise = 5
    place.ask(b, 3)
    assert place.ask(a, 1) == (False, [])
    assert place.ask(c, 1) == (False, [])
    assert place.ask(b, 4) == (True, [])
    assert set(place.line.waiting) == {a, c}
    mate = place.claim(4, "a", promise=1)
    assert place.ask(mate, 1) == (True, [])
    assert set(place.line.waiting) == {c}
    assert place.ask(a, 1, waits=False) == (False, [])
    place.leaves(b)
    place.line.serve()
    assert place.heard == ["c3 comes"]
    assert place.ask(c, 1) == (True, [])


def test_one_leader_does_not_thrash(llms):
    """Six requests to an LLM of two GPUs that hold three of them: hardly anybody gives up
    pages, as would be on one GPU; all answers are transformers'."""
    llm = llms["qwen"]
    need = [weight_pages(llm, PAGE, 2, rank) + 12 for rank in range(2)]
    gpus = Gpus(need, PAGE, "db-mean", max_prompt_tokens=512)
    resident = gpus.have(llm, 0, 1)
    for i in range(6):
        gpus.ask(0, resident, llm, [(7 * i + n) % 500 for n in range(60)], 40)
    gpus.wait()
    assert 0 < gpus.workers[0].group.preemptions < 12
    gpus.check()
    gpus.close()


def test_the_younger_of_two_leaders_gives_way(llms, monkeypatch):
    """GPU 2 has 12 pages for LLMs that GPUs 0 and 1 lead. The first request grows to three
    pages there, the second one, which came when that had begun, has nine and grows: it
    gives way, and waits until the older one has ended, which never does. Both are told by
    messages, for no time would be long enough."""
    monkeypatch.setattr(worker, "RETRY_S", 1e6)
    llm = llms["qwen"]
    need = [40, 40, 12]
    for lead in (0, 1):
        need[lead] += weight_pages(llm, PAGE, 2, 0)
        need[2] += weight_pages(llm, PAGE, 2, 1)
    gpus = Gpus(need, PAGE, "fcfs", max_prompt_tokens=512)
    residents = [gpus.have(llm, lead, 2) for lead in (0, 1)]
    per_page = PAGE // residents[0].token_bytes
    older = gpus.ask(0, residents[0], llm, [5, 6], 3 * per_page - 4)
    older.begun.wait(60)
    long = [i % 500 for i in range(8 * per_page + 1)]
    younger = gpus.ask(1, residents[1], llm, long, 2 * per_page + 16)
    gpus.wait()
    assert older.job.preemptions == 0 < younger.job.preemptions
    assert older.job.last_s < younger.job.last_s
    assert gpus.waits > 0
    gpus.check()
    gpus.close()


def test_what_a_follower_could_never_hold(llms):
    """GPU 1 has four pages beside a shard of an LLM that GPU 0 leads, and those of a WARM
    one. A request that needs one more is refused at once. Room for one that needs all is
    kept as soon as it is asked for, before anything of it is computed: the WARM LLM cannot
    wake; when there was another request and it has ended, it can."""
    llm, other = llms["qwen"], llms["llama"]
    room = weight_pages(other, PAGE) + 4
    shards = [weight_pages(llm, PAGE, 2, rank) for rank in range(2)]
    gpus = Gpus([shards[0] + 2 * room, shards[1] + room], PAGE, "fcfs")
    leader, follower = gpus.workers
    resident, warm = gpus.have(llm, 0, 1), gpus.have(other, 1)
    follower.sleep(warm)
    tokens = room * (PAGE // resident.token_bytes)
    with pytest.raises(TooLong, match=f"{tokens} prompt .* do not fit into {tokens}"):
        gpus.ask(0, resident, llm, [5] * tokens, 2)
    reserve = leader.group.leading.reserve
    assert leader.ask(lambda: reserve(resident.number, room)).result() == room
    with pytest.raises(LoadFailed, match="a request in flight would not fit"):
        follower.wake(warm)
    gpus.ask(0, resident, llm, [5, 6, 7], 4)
    gpus.wait()
    gpus.check()
    follower.wake(warm)
    gpus.close()


def test_who_was_swapped_comes_back_where_others_have_pages(llms, monkeypatch):
    """GPU 1 has an LLM of its own and follows another one. A request that was swapped when
    it had filled a page just so comes back to that page and to one for what is next; its
    answer is transformers'."""
    monkeypatch.setattr(away, "swaps", lambda *_: True)
    llm, other = llms["qwen"], llms["llama"]
    need = [weight_pages(other, PAGE, 2, rank) + 8 for rank in range(2)]
    need[1] += weight_pages(llm, PAGE)
    gpus = Gpus(need, PAGE, "fcfs", 4 * PAGE)
    gpus.have(other, 0, 1)
    resident, group = gpus.have(llm, 1), gpus.workers[1].group
    prompt = [7 * i % 500 for i in range(PAGE // resident.token_bytes)]

    def swap(job):
        group.step()
        assert job.computed == len(prompt)
        group._evict(job)

    gpus.ask(1, resident, llm, prompt, 6, swap)
    gpus.wait()
    assert group.swaps == 1
    gpus.check()
    gpus.close()


@pytest.mark.parametrize("policy", ["fcfs", "db-mean"])
def test_three_leaders_are_flooded(llms, policy, monkeypatch):
    """An LLM on each pair of three GPUs and one on each alone, four times what the KV
    caches hold: all requests end, each answer is transformers', all pages are free, and
    nobody waited for a time to pass."""
    monkeypatch.setattr(worker, "RETRY_S", 1e6)
    kinds = [((0, 1), "qwen"), ((1, 2), "llama"), ((0, 2), "qwen3")]
    kinds += [((0,), "llama"), ((1,), "qwen3"), ((2,), "qwen")]
    need = [10, 10, 10]
    for where, family in kinds:
        for rank, gpu in enumerate(where):
            need[gpu] += weight_pages(llms[family], PAGE, len(where), rank)
    gpus = Gpus(need, PAGE, policy, max_prompt_tokens=64)
    residents = [gpus.have(llms[family], *where) for where, family in kinds]
    rng = np.random.default_rng(3)
    for i in range(18):
        where, family = kinds[i % 6]
        prompt = rng.integers(0, 500, rng.integers(4, 100)).tolist()
        tokens = int(rng.integers(8, 40))
        llm = llms[family]
        gpus.ask(where[0], residents[i % 6], llm, prompt, tokens)
    gpus.wait()
    gpus.check()
    gpus.close()
