"""The recourse of (O2): exact against enumeration, and right on cases done by hand."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.recourse import Spare, covered_instances, covered_value
from tests.build import gpu

NODE = [gpu(i) for i in range(4)]
BLOCKS = [
    *((g,) for g in NODE),
    (NODE[0], NODE[1]),
    (NODE[2], NODE[3]),
    tuple(NODE),
]


def enumerated(
    spare: list[Spare], value: dict[str, float], need: dict[str, int]
) -> float:
    """Best over all sets of WARM replicas that share no GPU."""
    best = 0.0
    for size in range(len(spare) + 1):
        for chosen in combinations(spare, size):
            gpus = [g for _, block, _ in chosen for g in block]
            if len(set(gpus)) < len(gpus):
                continue
            total = 0.0
            for llm, wanted in need.items():
                units = sum(count for name, _, count in chosen if name == llm)
                total += value[llm] * min(wanted, units)
            best = max(best, total)
    return best


spares = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(BLOCKS), st.integers(1, 3)),
    max_size=8,
    unique_by=lambda spare: (spare[0], spare[1]),
)
values = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 1.0, 2.5]) for name in "abc"}
)
needs = st.fixed_dictionaries({name: st.integers(0, 4) for name in "abc"})


@given(spare=spares, value=values, some=st.lists(needs, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_equals_enumeration(
    spare: list[Spare], value: dict[str, float], some: list[dict[str, int]]
) -> None:
    """The dynamic programme finds the best of all disjoint sets, for every scenario."""
    for need, covered in zip(some, covered_value(spare, value, some), strict=True):
        assert abs(covered - enumerated(spare, value, need)) < 1e-9


def test_an_activation_takes_its_whole_gpu_set() -> None:
    """b on both GPUs (worth 5) bars the two a (worth 3 each): 6 beats 5, until only one
    a is needed."""
    spare: list[Spare] = [("a", BLOCKS[0], 1), ("a", BLOCKS[1], 1), ("b", BLOCKS[4], 1)]
    value = {"a": 3.0, "b": 5.0}
    needs = [{"a": 2, "b": 1}, {"a": 1, "b": 1}]
    assert covered_value(spare, value, needs) == [6.0, 5.0]


def test_nothing_beyond_the_need() -> None:
    """A replica that counts for three covers the two that are needed."""
    assert covered_value([("a", BLOCKS[0], 3)], {"a": 1.0}, [{"a": 2}]) == [2.0]


@given(spare=spares, value=values, some=st.lists(needs, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_covered_instances_are_worth_the_covered_value(
    spare: list[Spare], value: dict[str, float], some: list[dict[str, int]]
) -> None:
    """By LLM within the need, and in sum exactly what the dynamic programme says."""
    found = covered_instances(spare, value, some)
    worth = covered_value(spare, value, some)
    for need, covered, total in zip(some, found, worth, strict=True):
        assert all(count <= need[llm] for llm, count in covered.items())
        assert abs(sum(value[k] * n for k, n in covered.items()) - total) < 1e-9
