"""Loads on shared links: by hand, and what must hold whatever happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models import catalog
from foreserve.models.loading import LoadRules, load_times
from foreserve.models.specs import Node
from foreserve.runtime.hostram import HostRam
from foreserve.runtime.links import Links, ProcessPool, Transfer, transfer
from tests.build import cluster, gpu, option


def load(
    seconds: float = 2.0, *gpus: int, size: int = 100, **shared: float
) -> Transfer:
    """``seconds`` alone on ``gpus``; ``shared`` are seconds of other links."""
    links = dict.fromkeys(map(gpu, gpus or (0,)), seconds) | shared
    return Transfer(
        alone_s=max(links.values()), uses_s=links, num_bytes=dict.fromkeys(links, size)
    )


def ends(links: Links) -> dict[str, float]:
    """Ends of all loads if nothing else happens."""
    found = {}
    while (now_s := links.next_s) < math.inf:
        found |= dict.fromkeys(links.advance(now_s), now_s)
    return found


def test_two_loads_from_one_storage_take_twice():
    """Each takes 2 s alone; together each has half of the storage, so both end at 4 s."""
    links = Links()
    links.add("a", load(1.0, 0, storage=2.0), 0.0)
    assert links.next_s == 2.0
    links.add("b", load(1.0, 1, storage=2.0), 0.0)
    assert ends(links) == {"a": 4.0, "b": 4.0}
    assert links.used_s["storage"] == pytest.approx(4.0)
    assert links.moved_bytes["storage"] == pytest.approx(200)


def test_two_loads_on_one_link_queue():
    """Loads of 2 s for one GPU: the first ends at 2 s, both are done after twice that."""
    links = Links()
    links.add("a", load(2.0, 0), 0.0)
    links.add("b", load(2.0, 0), 0.5)
    assert ends(links) == {"a": 2.0, "b": 4.0}


def test_what_one_load_leaves_goes_to_the_other():
    """Storage takes 10 s for a's 100 bytes and b's alike. b's own limit is 2 bytes/s, so
    a gets the other 8 until it ends at 12.5 s; b's 100 bytes take 50 s in any case."""
    links = Links()
    links.add("a", load(1.0, 0, storage=10.0), 0.0)
    slow = Transfer(
        alone_s=50.0,
        uses_s={gpu(1): 1.0, "storage": 10.0},
        num_bytes={gpu(1): 100, "storage": 100},
    )
    links.add("b", slow, 0.0)
    assert ends(links) == pytest.approx({"a": 12.5, "b": 50.0})


def test_a_shared_switch_divides():
    """Two GPUs behind a switch of one GPU's rate: 2 s alone, 4 s together."""
    links = Links()
    links.add("a", load(2.0, 0, host=2.0), 0.0)
    links.add("b", load(2.0, 1, host=2.0), 0.0)
    assert ends(links) == {"a": 4.0, "b": 4.0}


def test_urgent_loads_go_first():
    """At 1 s someone waits for b: a is interrupted on the GPU they share and goes on
    when b has ended; c has the storage that b leaves it, which is nothing."""
    links = Links()
    links.add("a", load(2.0, 0), 0.0)
    links.add("b", load(2.0, 0, storage=2.0), 0.0)
    links.add("c", load(1.0, 1, storage=2.0), 1.0)
    links.set_urgent(["b"], 1.0)
    assert (links.speed("a"), links.speed("b"), links.speed("c")) == (0.0, 1.0, 0.0)
    assert links.copying == {gpu(0)}
    assert ends(links) == {"b": 3.0, "a": 4.0, "c": 5.0}


def test_a_load_for_two_gpus_is_not_overtaken():
    """b waits for GPU 0 and holds its place on GPU 1: c, asked for later, goes after it."""
    links = Links()
    for key, gpus in (("a", (0,)), ("b", (0, 1)), ("c", (1,))):
        links.add(key, load(2.0, *gpus), 0.0)
    assert ends(links) == {"a": 2.0, "b": 4.0, "c": 6.0}


def test_the_link_is_free_while_a_process_starts():
    """a's process is there at 3 s; b, asked for later, does not wait for it."""
    links = Links()
    links.add("a", load(2.0, 0), 0.0, ready_s=3.0)
    links.add("b", load(2.0, 0), 0.0)
    assert ends(links) == {"b": 2.0, "a": 5.0}


def test_a_pool_has_processes_ready_and_replaces_them():
    """One ready process, 10 s to start another: the second load waits for it."""
    pool = ProcessPool(LoadRules(process_start_s=10.0, process_pool=1))
    assert [pool.take(now_s) for now_s in (5.0, 6.0, 40.0)] == [5.0, 15.0, 40.0]
    assert ProcessPool(LoadRules(process_start_s=10.0)).take(5.0) == 15.0


def test_cancelling_frees_the_link_and_tells_what_moved():
    """Half of a's 100 bytes have gone when it is cancelled at 1 s; b starts there."""
    links = Links()
    links.add("a", load(2.0, 0), 0.0)
    links.add("b", load(2.0, 0), 0.0)
    assert links.cancel("a", 1.0) == {gpu(0): 50.0}
    assert ends(links) == {"b": 3.0}
    assert links.moved_bytes[gpu(0)] == 150.0
    assert links.used_s[gpu(0)] == 3.0


def test_beside_serving_and_on_a_slow_node():
    """2 s alone: 4 s at half its rate; from 1 s on all takes twice as long again."""
    links = Links()
    links.add("a", load(2.0, 0), 0.0, most=0.5)
    assert links.next_s == 4.0
    links.set_factor(2.0, 1.0)
    assert links.next_s == 7.0
    links.set_most({"a": 1.0}, 3.0)  # 0.5 + 0.5 done, half speed from now on
    assert links.next_s == 5.0


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_lone_load_takes_what_the_plan_says(tp: int, pinned: bool):
    """From storage and from host memory, as `load_times`, to the last bit."""
    llm, h100 = catalog.llm("qwen2.5-32b"), catalog.gpu("h100")
    node = Node(name="n0", gpu="h100", gpus=2, host_ram_bytes=10**12)
    rate = None if pinned else node.storage_bytes_per_s
    planned = load_times(llm, h100, tp, storage_bytes_per_s=rate).total_s
    own = option(
        llm.name,
        tp,
        resident_bytes=llm.weight_bytes_per_gpu(tp),
        weight_bytes=llm.weight_bytes,
        copy_s=load_times(llm, h100, tp).total_s,
        load_s=planned,
    )
    for cache in ("lru", "all"):
        rules = LoadRules(host_cache=cache)
        found = transfer(own, node.gpu_ids()[:tp], node, h100, rules, pinned=pinned)
        links = Links()
        links.add("a", found, 0.0)
        assert links.next_s == planned


def random_load(rng: np.random.Generator) -> Transfer:
    first, tp = int(rng.integers(4)), int(rng.choice([1, 1, 2]))
    gpus = [first] if tp == 1 else [first // 2 * 2, first // 2 * 2 + 1]
    uses = dict.fromkeys(map(gpu, gpus), float(rng.uniform(0.1, 5)))
    for link in ("storage", "host"):
        if rng.random() < 0.6:
            uses[link] = float(rng.uniform(0.1, 5))
    alone_s = max(uses.values()) * float(rng.choice([1.0, 1.0, 1.7]))
    sizes = {link: int(rng.integers(1, 1000)) for link in uses}
    return Transfer(alone_s=alone_s, uses_s=uses, num_bytes=sizes)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_bytes_and_seconds_balance_at_every_event(seed: int):
    """Whatever is asked for, cancelled, hurried and slowed: no link is ever filled for
    longer than time has passed, each has moved just what the loads have, each GPU's link
    has one load, nothing is faster than alone, somebody moves if anybody could, and who
    moves is at its own limit or has a link that is full."""
    rng = np.random.default_rng(seed)
    links, now_s, number = Links(), 0.0, 0
    known: dict[int, tuple[Transfer, float, float, float]] = {}
    moved: dict[object, float] = {}
    took: dict[int, float] = {}
    factor = 1.0

    def book(transfer: Transfer, over: dict[object, float]) -> None:
        for link, size in over.items():
            assert -1e-9 <= size <= transfer.num_bytes[link] * (1 + 1e-9)
            moved[link] = moved.get(link, 0.0) + size

    for _ in range(40):
        later_s = now_s + float(rng.exponential(1.0))
        while links.next_s <= later_s:
            now_s = links.next_s
            for key in links.advance(now_s):
                one, asked_s, most, _ = known.pop(key)
                took[key] = now_s - asked_s
                assert took[key] >= one.alone_s / most * (1 - 1e-9)
                book(one, dict(one.num_bytes))
        now_s = later_s
        kind = rng.integers(6)
        if kind <= 2:
            most = float(rng.choice([1.0, 0.5]))
            ready_s = now_s + float(rng.choice([0.0, 0.0, 1.0]))
            one = random_load(rng)
            known[number] = (one, now_s, most, ready_s)
            links.add(number, one, now_s, ready_s=ready_s, most=most)
            number += 1
        elif kind == 3 and known:
            key = int(rng.choice(list(known)))
            one, *_ = known.pop(key)
            book(one, links.cancel(key, now_s))
        elif kind == 4:
            links.set_urgent([k for k in known if rng.random() < 0.3], now_s)
        elif kind == 5:
            factor = float(rng.choice([1.0, 1.0, 2.0]))
            links.set_factor(factor, now_s)
        busy: list[object] = []
        filled: dict[object, float] = {}
        for key, (one, _, most, _) in known.items():
            assert links.speed(key) <= most / factor * (1 + 1e-9)
            if links.speed(key):
                busy += one.gpus
            for link, seconds in one.uses_s.items():
                rate = seconds / one.alone_s * links.speed(key)
                filled[link] = filled.get(link, 0.0) + rate
        assert len(busy) == len(set(busy))
        assert all(share <= (1 + 1e-9) / factor for share in filled.values())
        full = {link for link, share in filled.items() if share >= (1 - 1e-9) / factor}
        for key, (one, _, most, _) in known.items():
            if 0 < links.speed(key) < most / factor * (1 - 1e-9):
                assert not full.isdisjoint(one.uses_s)
        assert busy or all(ready_s > now_s for *_, ready_s in known.values())
        assert all(seconds <= now_s + 1e-6 for seconds in links.used_s.values())
    for key in list(known):
        book(known.pop(key)[0], links.cancel(key, now_s))
    assert links.next_s == math.inf
    assert moved == pytest.approx(links.moved_bytes)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_loads_share_evenly(count: int):
    """Loads of 3 s from one storage onto GPUs of their own all end at 3 s each."""
    links = Links()
    for index in range(count):
        links.add(index, load(1.0, index, storage=3.0), 0.0)
    assert ends(links) == pytest.approx(dict.fromkeys(range(count), 3.0 * count))


# --- host memory ------------------------------------------------------------------------


def test_the_first_load_pins_and_the_next_copies():
    """100 bytes of room: a comes from storage once, then from here."""
    ram = HostRam(100)
    assert not ram.open("a", 60)
    assert ram.held_bytes == 60
    assert ram.pinned == {}
    ram.close("a", done=True)
    assert ram.pinned == {"a": 60}
    assert ram.open("a", 60)


def test_the_least_recently_used_goes_first():
    """a, b, then a again: c needs the room of one, and b is it."""
    ram = HostRam(100)
    for llm in ("a", "b", "a"):
        ram.open(llm, 50)
        ram.close(llm, done=True)
    ram.open("c", 40)
    ram.close("c", done=True)
    assert ram.pinned == {"a": 50, "c": 40}


def test_nobody_goes_while_it_is_copied_from():
    """a is being copied: c finds no room, streams through, and pins nothing."""
    ram = HostRam(100)
    ram.open("a", 80)
    ram.close("a", done=True)
    assert ram.open("a", 80)
    assert not ram.open("c", 40)
    ram.close("c", done=True)
    assert ram.pinned == {"a": 80}
    ram.close("a", done=False)
    ram.open("c", 40)
    ram.close("c", done=True)
    assert ram.pinned == {"c": 40}


def test_a_cancelled_first_load_leaves_nothing():
    """Unless another one of the same LLM goes on and fills the room."""
    ram = HostRam(100)
    ram.open("a", 60)
    ram.close("a", done=False)
    assert ram.held_bytes == 0
    ram.open("a", 60)
    ram.open("a", 60)
    ram.close("a", done=False)
    ram.close("a", done=True)
    assert ram.pinned == {"a": 60}


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_host_memory_is_never_overcommitted(seed: int):
    """Random loads of random sizes: what is held fits, and what is copied from stays."""
    rng = np.random.default_rng(seed)
    sizes = {f"m{i}": int(rng.integers(1, 80)) for i in range(6)}
    ram, under_way = HostRam(100), []
    for _ in range(60):
        if under_way and rng.random() < 0.5:
            llm, _ = under_way.pop(int(rng.integers(len(under_way))))
            ram.close(llm, done=bool(rng.random() < 0.7))
        else:
            llm = str(rng.choice(list(sizes)))
            under_way.append((llm, ram.open(llm, sizes[llm])))
        assert ram.held_bytes <= ram.num_bytes
        assert all(llm in ram.pinned for llm, pinned in under_way if pinned)
    for llm, _ in under_way:
        ram.close(llm, done=True)
    assert ram.held_bytes == sum(ram.pinned.values())


def test_the_cluster_of_tests_has_a_storage_link():
    """A transfer on the tests' fleet: 30 bytes a GPU, 60 bytes from storage for two."""
    on = cluster()
    found = transfer(
        option("a", 2),
        on.gpus,
        on.nodes[0],
        on.gpu_types[0],
        LoadRules(host_cache="none"),
        pinned=False,
    )
    assert found.num_bytes == {gpu(0): 30, gpu(1): 30, "storage": 60}
    assert found.alone_s == 2.0
