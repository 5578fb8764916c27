"""What requests do to logits, and the log probabilities that they are told."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="the paged engine needs torch")

from foreserve.models.errors import InvalidInput  # noqa: E402
from foreserve.runtime.paged.sampling import (  # noqa: E402
    GREEDY,
    Sampling,
    choose,
    score,
)

VOCABULARY = 40
ENDS = (3, 7)


def plainly(logits, how, prompt, answer):
    """One row's logits after bias, penalties; number by number."""
    out = [float(value) for value in logits]
    for token, value in how.bias.items():
        out[token] += value
    if len(answer) < how.min_tokens:
        for token in ENDS:
            out[token] = -math.inf
    for token in {*prompt, *answer} if how.repetition_penalty != 1 else ():
        factor = how.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in Counter(answer).items():
        out[token] -= how.presence_penalty + how.frequency_penalty * count
    return out


def test_rows_are_bent_as_each_alone():
    """Answers of 150 tokens of 48 requests in one batch, each with wishes of its own or
    none: in each step each one's token is the likeliest after what a plain loop over
    tokens makes of its logits. What the decoder gave is left as it was."""
    rng = np.random.default_rng(4)
    hows, prompts = [], []
    for i in range(48):
        wishes = {
            "presence_penalty": float(rng.uniform(-2, 2)),
            "frequency_penalty": float(rng.uniform(-0.5, 2)),
            "repetition_penalty": float(rng.uniform(0.5, 2)),
            "bias": {int(t): float(rng.uniform(-9, 9)) for t in rng.integers(0, 40, 5)},
            "min_tokens": int(rng.integers(1, 150)),
        }
        kept = [name for name in wishes if rng.random() < 0.5] if i % 6 else []
        how = Sampling(temperature=0.0, **{name: wishes[name] for name in kept})
        hows.append(how)
        prompts.append(rng.integers(0, 40, 9).tolist())
    bends = [h.bend(p, ENDS) for h, p in zip(hows, prompts, strict=True)]
    assert sum(bend is None for bend in bends) >= 8
    answers = [[] for _ in hows]
    for _ in range(150):
        logits = torch.tensor(rng.normal(0, 3, (48, VOCABULARY)), dtype=torch.float32)
        before = logits.clone()
        with torch.inference_mode():
            given = logits.clone()
        chosen = choose(given, hows, [None] * 48, bends)
        assert torch.equal(given, before)
        for i, token in enumerate(chosen):
            wanted = plainly(logits[i], hows[i], prompts[i], answers[i])
            assert wanted[token] == pytest.approx(max(wanted), abs=1e-4)
            answers[i].append(token)
            if bends[i] is not None:
                bends[i].add(token)


def test_who_wishes_nothing_is_not_looked_at():
    """Neither greedy requests nor drawn ones have anything bent."""
    assert GREEDY.bend([1], [2]) is None
    assert Sampling(top_k=3, top_p=0.5, min_p=0.1, seed=1).bend([1], [2]) is None


def test_unlikely_tokens_are_left_out():
    """Shares 0.5, 0.3, 0.15, 0.05: min-p 0.25 leaves what has 0.125 or more, with top-p 0.6
    (of what is left: 0.57 of all) the first two. By 20,000 draws."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rng = np.random.default_rng(0)

    def shares(**how):
        n = 20_000
        found = choose(logits.expand(n, 4), [Sampling(**how)] * n, [rng] * n)
        return np.bincount(found, minlength=4) / n

    three = np.array([0.5, 0.3, 0.15, 0]) / 0.95
    np.testing.assert_allclose(shares(min_p=0.25), three, atol=0.015)
    two = [0.625, 0.375, 0, 0]
    np.testing.assert_allclose(shares(min_p=0.25, top_p=0.6), two, atol=0.015)
    np.testing.assert_allclose(shares(min_p=1.0), [1, 0, 0, 0])


def test_log_probabilities():
    """Those of the whole vocabulary, from the logits as they were given; only of rows that
    ask, each with as many of the likeliest as it asks for."""
    logits = torch.tensor(np.random.default_rng(1).normal(0, 2, (3, 6))).float()
    logs = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    none, two, zero = score(logits, [4, 1, 0], [None, 2, 0])
    assert none is None
    assert (two.token, zero.token, zero.top) == (1, 0, ())
    assert two.own == pytest.approx(float(logs[1, 1]), abs=1e-5)
    best = logs[1].sort(descending=True)
    assert [token for token, _ in two.top] == best.indices[:2].tolist()
    wanted = best.values[:2].tolist()
    assert [value for _, value in two.top] == pytest.approx(wanted, abs=1e-5)
    (all_of_them,) = score(logits[:1], [0], [20])
    assert len(all_of_them.top) == 6
    assert score(logits, [1, 2, 3], [None] * 3) == [None] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("bias", {1: 101.0}),
        ("bias", {1: math.nan}),
        ("min_tokens", -1),
        ("logprobs", 21),
    ],
)
def test_what_cannot_be(name, value):
    """One line says which field is wrong."""
    with pytest.raises(InvalidInput, match="must be"):
        Sampling(**{name: value})
