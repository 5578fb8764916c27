"""Several LLMs of one group, turn by turn over one pool of pages."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.models.cost import IterationTime  # noqa: E402
from foreserve.runtime.memory.kv import Keeper, KvNeeds, KvSpace  # noqa: E402
from foreserve.runtime.memory.pool import PagePool  # noqa: E402
from foreserve.runtime.memory.posix import PosixMemory  # noqa: E402
from foreserve.runtime.memory.swap import Swap  # noqa: E402
from foreserve.runtime.paged.group import Group, Hosted  # noqa: E402
from foreserve.runtime.paged.jobs import Job, TooLong  # noqa: E402
from foreserve.runtime.paged.loading import tensor  # noqa: E402
from foreserve.runtime.paged.sampling import GREEDY, Sampling, choose  # noqa: E402
from foreserve.runtime.paged.text import Speech, Words  # noqa: E402
from foreserve.runtime.scheduler import POLICIES  # noqa: E402
from foreserve.runtime.turns import Rules  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402
from tests.test_unified_kv import Loan  # noqa: E402

TIME = IterationTime(
    prefill_base_s=0.01,
    prefill_s_per_token=1e-4,
    prefill_s_per_token2=0.0,
    decode_base_s=0.01,
    decode_s_per_seq=1e-3,
    decode_s_per_context_token=0.0,
    relative_error=0.0,
    source="test",
)
FAMILIES = ("llama", "qwen3", "mixtral", "gemma2")
PAGE_BYTES = 4096
ANSWER = 14


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return [Llm(folder / family, family) for family in FAMILIES]


class Stand:
    """A group over a pool of its own, and what its listeners heard."""

    def __init__(
        self, llms, pages, policy="db-mean", swap=None, borrower=None, usual=1, **rules
    ):
        """``swap``: pages on the host, and what copying takes at a time."""
        self.pool = PagePool(PosixMemory(PAGE_BYTES, pages))
        self.wanted = []
        self.swap = None
        if swap is not None:
            count, copy_s = swap
            clock = itertools.count()
            self.swap = Swap(
                self.pool, count * PAGE_BYTES, lambda: next(clock) * copy_s
            )
        self.space = KvSpace([self.pool.books], PAGE_BYTES, borrower=borrower)
        seconds = itertools.count()
        self.group = Group(
            self.space,
            tensor(self.pool.window_span()).view(pages, PAGE_BYTES),
            POLICIES[policy].make(),
            lambda: next(seconds) / 1000,
            Rules(**rules),
            self.swap,
            self.wanted.append,
        )
        self.services = {llm.folder: self.group.add(hosted(llm, usual)) for llm in llms}

    def ask(self, llm, prompt, tokens=ANSWER, stop_after=None, **how):
        heard = Heard(stop_after)
        job = Job(
            service=self.services[llm.folder],
            prompt=prompt,
            most_tokens=tokens,
            listener=heard,
            arrival_s=0.0,
            **how,
        )
        self.group.submit(job)
        heard.job = job
        return heard

    def run(self):
        while self.group.step():
            pass
        assert self.pool.free == self.pool.capacity
        if self.swap is not None:
            assert self.swap.host.free == self.swap.host.capacity


class Heard:
    def __init__(self, stop_after):
        self.tokens, self.reason, self.stop_after = [], None, stop_after

    def token(self, token):
        assert self.reason is None
        self.tokens.append(token)
        return len(self.tokens) == self.stop_after

    def end(self, reason):
        assert self.reason is None
        self.reason = reason


def hosted(llm, usual=1) -> Hosted:
    return Hosted(
        llm=llm.config.family,
        decoder=llm.decoder,
        weights=llm.weights,
        dtype="float32",
        time=TIME,
        needs=KvNeeds(
            llm=llm.config.family,
            token_bytes=llm.config.kv_token_bytes(4),
            input_tokens=30.0,
            output_tokens=ANSWER,
            usual_output_tokens=usual,
        ),
        reference_s=0.02 if llm.config.family == "llama" else 0.2,
    )


def until(happened):
    pause = threading.Event()
    while not happened():
        pause.wait(0.001)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 540, rng.integers(1, 80)).tolist() for _ in range(count)]


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "db-mean", "mlfq"])
def test_answers_are_those_of_each_llm_alone(llms, policy):
    """Twenty requests of four LLMs, four of which 26 pages hold; prompts in chunks of 32;
    hardly any output is expected, so pages run out. Whoever was preempted, each answer is
    transformers'; all pages are free again."""
    stand = Stand(llms, 26, policy, max_prompt_tokens=32, max_num_seqs=8)
    asked = []
    for i, prompt in enumerate(prompts(20)):
        llm = llms[1 + i % 3] if i < 14 else llms[0]
        asked.append((llm, prompt, stand.ask(llm, prompt)))
        if i >= 11:
            stand.group.step()
    stand.run()
    for llm, prompt, heard in asked:
        assert heard.tokens == llm.after_each(prompt, heard.tokens)
        assert heard.reason == "length"
    totals = stand.group.totals.values()
    assert sum(total.given_tokens for total in totals) == 20 * ANSWER
    assert sum(total.preemptions for total in totals) > 0
    assert stand.group.switches >= 3


@pytest.mark.parametrize(
    ("swap", "least", "most"),
    [((400, 1e-6), 1.0, 1.0), ((16, 1e-6), 0.1, 0.9), ((400, 1.0), 0.0, 0.0)],
)
def test_swapped_or_computed_again(llms, swap, least, most):
    """Far longer answers than promised, with room on the host for all pages, for those of
    one or two, and with a link that takes a second a copy: all who are preempted are
    swapped, some, or none. Answers are transformers'; both memories are free again."""
    stand = Stand(llms[:2], 24, "round-robin", swap, max_num_seqs=8)
    asked = []
    for i, prompt in enumerate(prompts(9)):
        llm = llms[i % 2]
        asked.append((llm, prompt[:20], stand.ask(llm, prompt[:20], tokens=40)))
    stand.run()
    for llm, prompt, heard in asked:
        assert heard.tokens == llm.after_each(prompt, heard.tokens)
    assert stand.group.preemptions > 10
    assert least <= stand.group.swaps / stand.group.preemptions <= most


def test_who_is_swapped(llms):
    """Two prompts of forty tokens and what was answered: on the host they have as many
    pages, and decode next. One is cancelled, the other's LLM leaves: nothing stays there. A
    third, amid its prompt, goes on where it was, in other pages."""
    first, second = llms[:2]
    stand = Stand([first, second], 40, "round-robin", (40, 1e-6), max_prompt_tokens=32)
    heard = [stand.ask(llm, [5] * 40) for llm in (first, second)]
    while min(len(one.tokens) for one in heard) < 3:
        stand.group.step()
    held = [one.job.pages for one in heard]
    computed = [one.job.computed for one in heard]
    for one in heard:
        stand.group._evict(one.job)
    assert stand.swap.host.books.held == sum(held)
    for one, pages, tokens in zip(heard, held, computed, strict=True):
        job = one.job
        assert (job.pages, job.prompt_tokens, job.computed) == (0, 0, tokens)
        assert job.next_pages in (pages, pages + 1)
    stand.group.cancel(heard[0].job)
    assert stand.swap.host.books.held == held[1]
    stand.group.remove(stand.services[second.folder])
    assert stand.swap.host.books.held == 0
    third = stand.ask(first, [7] * 70)
    stand.group.step()
    stand.group._evict(third.job)
    taken = stand.pool.books.take(3)
    assert third.job.computed == 32
    stand.group.step()
    assert third.job.computed == 64
    taken.release()
    stand.run()
    assert third.tokens == first.told([7] * 70, ANSWER)


@pytest.mark.parametrize("policy", ["fcfs", "round-robin", "db-mean", "mlfq"])
def test_a_burst_leaves_another_llm_its_floor(llms, policy):
    """Ten requests of one LLM are promised eleven pages each of 40; its quota is 22. Three
    have joined when another LLM is asked for as much, which is its floor. Whoever of the
    burst joins from then on leaves it that, and it is never preempted. (Whose turn it is
    remains the policy's.)"""
    crowd, small = llms[:2]
    stand = Stand([crowd, small], 40, policy, usual=ANSWER)
    burst = [stand.ask(crowd, [7 + n] * 30) for n in range(10)]
    for _ in range(4):
        stand.group.step()
    crowded, other = (stand.services[llm.folder] for llm in (crowd, small))
    assert (stand.space.floor(other), stand.space.used()) == (11, 27)
    assert stand.space.quotas[crowded] == pytest.approx(22)
    heard = stand.ask(small, [5] * 30)
    before = {one for one in burst if one.job.resident}
    while heard.reason is None:
        stand.group.step()
        now = {one for one in burst if one.job.resident}
        if now - before:
            assert sum(max(one.job.pages, one.job.promise) for one in now) <= 22
        before = now
    assert heard.job.preemptions == 0
    stand.run()
    for llm, one in ((small, heard), *((crowd, one) for one in burst)):
        assert one.tokens == llm.after_each(one.job.prompt, one.tokens)


class Slow(Loan):
    """Gives back what it has when the test lets it."""

    def __init__(self):
        super().__init__()
        self.asked, self.let = threading.Event(), threading.Event()
        self.threads = set()

    def revoke(self, pool, count):
        self.threads.add(threading.current_thread().name)
        self.asked.set()
        assert self.let.wait(20)
        return super().revoke(pool, count)


def test_iterations_go_on_while_loans_come_back(llms):
    """Of 40 pages 30 are lent when a request of 20 tokens asks for 60 more. Before its ten
    pages are used up more are wanted; while whoever has them does not give them back it
    gets tokens all the same, and when it needs them they are there: no iteration took one
    back itself. Who has enough free wants none."""
    (llm, *_) = llms
    loan = Slow()
    stand = Stand([llm], 40, borrower=loan)
    loan.take(stand.pool.books, 30)
    keeper = Keeper(stand.space)
    heard = stand.ask(llm, [5] * 20, tokens=60)
    while len(heard.tokens) < 7:
        stand.group.step()
    assert not stand.wanted
    while heard.reason is None:
        stand.group.step()
        if stand.wanted:
            count = stand.wanted.pop()
            keeper.want(count)
            assert loan.asked.wait(20)
            told = len(heard.tokens)
            while not loan.let.is_set() and len(heard.tokens) < told + 4:
                stand.group.step()
            loan.let.set()
            keeper.want(count)
            until(lambda: stand.pool.free >= count)  # noqa: B023
    keeper.close()
    assert loan.threads == {"keeper"}
    assert heard.tokens == llm.after_each([5] * 20, heard.tokens)
    assert loan.revocable(stand.pool.books) + stand.pool.free == 40


def test_what_ends_an_answer(llms):
    """A token of the LLM's that means the end is not part of it; a listener that has heard
    enough; the most tokens; and who is cancelled hears no more."""
    (llm, *_) = llms
    (prompt,) = prompts(1)
    whole = llm.told(prompt, ANSWER)
    stand = Stand([llm], 40)
    by_token = stand.ask(llm, prompt, ends=frozenset(whole[5:6]))
    by_listener = stand.ask(llm, prompt, stop_after=3)
    by_length = stand.ask(llm, prompt, tokens=1)
    cancelled = stand.ask(llm, prompt)
    for _ in range(3):
        stand.group.step()
    stand.group.cancel(cancelled.job)
    stand.run()
    assert (by_token.tokens, by_token.reason) == (
        whole[: whole.index(whole[5])],
        "stop",
    )
    assert (by_listener.tokens, by_listener.reason) == (whole[:3], "stop")
    assert (by_length.tokens, by_length.reason) == (whole[:1], "length")
    assert cancelled.tokens == whole[: len(cancelled.tokens)]
    assert cancelled.reason == "abort"


def test_what_would_never_fit(llms):
    """Ten pages hold 40 tokens: 39 and an answer of two (whose last one never gets there)
    do, 40 and two are refused, and nothing of them stays."""
    (llm, *_) = llms
    stand = Stand([llm], 10)
    fits = stand.ask(llm, [5] * 39, tokens=2)
    with pytest.raises(TooLong, match="40 prompt tokens and 2 more"):
        stand.ask(llm, [5] * 40, tokens=2)
    stand.run()
    assert fits.tokens == llm.after_each([5] * 39, fits.tokens)


def test_an_llm_leaves_and_comes_back(llms):
    """What it was asked is aborted and its pages are free; its neighbour's answer is as if
    nothing had happened, and so is its own when it is asked again."""
    first, second = llms[:2]
    stand = Stand([first, second], 40)
    lost, kept = stand.ask(first, [5] * 40), stand.ask(second, [5] * 40)
    for _ in range(6):
        stand.group.step()
    stand.group.remove(stand.services[first.folder])
    assert lost.reason == "abort"
    stand.services[first.folder] = stand.group.add(hosted(first))
    again = stand.ask(first, [5] * 40)
    stand.run()
    assert kept.tokens == second.told([5] * 40, ANSWER)
    assert again.tokens == first.told([5] * 40, ANSWER)


def test_a_seed_fixes_the_answer(llms):
    """Drawn at temperature 1.5 with a seed: the same in company, preempted now and then, as
    alone; another seed says something else."""
    (llm, *_) = llms
    (prompt,) = prompts(1)
    how = Sampling(temperature=1.5, top_p=0.95, top_k=50, seed=3)

    def ask(stand, seed):
        return stand.ask(llm, prompt, sampling=how, chance=np.random.default_rng(seed))

    alone = Stand([llm], 40)
    wanted, other = ask(alone, 3), ask(alone, 4)
    alone.run()
    crowd = Stand([llm], 30, "round-robin", max_num_seqs=8)
    heard = ask(crowd, 3)
    for more in prompts(12):
        crowd.ask(llm, more)
    crowd.run()
    assert heard.tokens == wanted.tokens != other.tokens
    assert crowd.group.totals[0].preemptions > 0


def test_choosing():
    """Shares 0.5, 0.3, 0.15, 0.05. By 20,000 draws: all of them at temperature 1; half and
    three tenths renormalised under top-p 0.6 and under top-k 2; only the first under top-p
    0.4; and no chance is asked for at temperature 0."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    rng = np.random.default_rng(0)

    def shares(**how):
        n = 20_000
        found = choose(logits.expand(n, 4), [Sampling(**how)] * n, [rng] * n)
        return np.bincount(found, minlength=4) / n

    np.testing.assert_allclose(shares(), [0.05, 0.5, 0.15, 0.3], atol=0.015)
    two = [0, 0.625, 0, 0.375]
    np.testing.assert_allclose(shares(top_p=0.6), two, atol=0.015)
    np.testing.assert_allclose(shares(top_k=2), two, atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.4), [0, 1, 0, 0])
    hot = np.array([0.05, 0.5, 0.15, 0.3]) ** 0.5
    np.testing.assert_allclose(shares(temperature=2.0), hot / hot.sum(), atol=0.015)
    assert choose(logits[None], [GREEDY], [None]) == [1]


def test_speech(llms):
    """Characters are said whole, a stop string never, nor what may become one; what ends
    inside a character is said at the end."""
    words = Words(llms[0].folder)
    text = "kalo é 😀 so STOP it"
    tokens = words.tokens(text)
    assert words.text(tokens) == text

    def said(stops, count=None, **how):
        speech = Speech(words, stops, **how)
        pieces = [speech.add(token) for token in tokens[:count]]
        return [*pieces, speech.end()], speech.stopped

    pieces, stopped = said([])
    assert "".join(pieces) == text
    assert pieces.count("😀") == 1
    assert not stopped
    pieces, stopped = said(["STOP", "it"])
    assert "".join(pieces) == "kalo é 😀 so "
    assert stopped
    assert "".join(said(["STOP"], keep_stop=True)[0]) == "kalo é 😀 so STOP"
    pieces, stopped = said(["STOPPED"])
    assert "".join(pieces) == text  # Held back, and said when it was another word.
    assert not stopped
    cut = len(words.tokens("kalo é ")) + 2
    assert "".join(said([], cut)[0]) == "kalo é \ufffd"


def test_speech_without_a_stream(llms):
    """A tokenizer whose stream gives up is asked for the whole text instead."""
    words = Words(llms[0].folder)
    tokens = words.tokens("kalo é 😀 so")

    class Fails:
        def step(self, tokenizer, token):
            raise RuntimeError("invalid prefix")

    speech = Speech(words)
    pieces = [speech.add(token) for token in tokens[:3]]
    speech._stream = Fails()
    pieces += [speech.add(token) for token in tokens[3:]]
    assert "".join([*pieces, speech.end()]) == "kalo é 😀 so"
    assert "😀" in pieces


def test_chat_template(llms):
    """As the tiny LLMs' template has it: who speaks, and whose turn it is."""
    words = Words(llms[0].folder)
    told = words.chat([{"role": "user", "content": " kalo"}], {})
    number = words.tokenizer.token_to_id
    user, assistant = number("<|user|>"), number("<|assistant|>")
    assert told == [user, number("\u0120kalo"), assistant]
