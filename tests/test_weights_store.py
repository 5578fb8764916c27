"""Weights: files, the node's store, copies into slots, what is kept and what is revoked."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from foreserve.models.errors import InvalidInput
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines import tiny
from foreserve.runtime.memory.books import Books
from foreserve.runtime.memory.cuda import CudaMemory
from foreserve.runtime.memory.kv import KvNeeds, KvSpace
from foreserve.runtime.memory.loading import Link, Load
from foreserve.runtime.memory.pacing import Pacer, TokenBucket, next_rate
from foreserve.runtime.memory.pool import Copying, InUse, PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.safetensors import (
    Checkpoint,
    Stopped,
    _as,
    fill,
    read_header,
)
from foreserve.runtime.memory.store import (
    HostStore,
    RemoteStore,
    StoreFailed,
    StoreServer,
)
from foreserve.runtime.memory.weights import NotResident, Shelf, Weights
from tests.fake_cuda import FakeCuda

PAGE = 4096
SOON_S = 20.0
"""No test waits so long unless it fails."""


# --- files -----------------------------------------------------------------------------


def _write(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@dataclass(frozen=True)
class Piece:
    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    offset_bytes: int


@dataclass(frozen=True)
class Plan:
    dtype: str
    pieces: tuple[Piece, ...]
    num_bytes: int


def test_a_checkpoint_is_read_in_place(tmp_path):
    """A tiny LLM as `plan models make-tiny` writes it: all tensors with their shapes, as
    many bytes as the file has behind its header, and the right ones in the right place."""
    folder = tiny.make(tmp_path / "llm", "llama")
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert checkpoint.num_bytes == file.stat().st_size - 8 - length
    norm = checkpoint.raw("model.norm.weight")
    assert norm.shape == (128,)
    assert (norm == 0x3F80).all()  # 1.0 as bfloat16.
    with pytest.raises(InvalidInput, match="no tensor 'x'"):
        checkpoint.raw("x")
    with pytest.raises(ValueError, match="read-only"):
        norm[0] = 0


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            "bytes 0 to 4 for F32",
        ),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "bytes 4 to 12"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "bytes 8 to 0"),
        ({"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}, "type F33"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        ([], "not a safetensors file"),
    ],
)
def test_files_that_lie_are_refused(tmp_path, about, said):
    """Whatever a header claims beyond the file's eight bytes of numbers is one line."""
    with pytest.raises(InvalidInput, match=said):
        read_header(_write(tmp_path / "x.safetensors", {"a": about}, bytes(8)))


def test_files_that_are_none_are_refused(tmp_path):
    """Empty, cut off, no JSON, no object, and no file at all."""
    for text in (
        b"",
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
        struct.pack("<Q", 9) + b"{}",
    ):
        file = tmp_path / "x.safetensors"
        file.write_bytes(text)
        with pytest.raises(InvalidInput, match="not a safetensors"):
            read_header(file)
    for header in (b"{{", b"[1]", b"\xff"):
        with pytest.raises(InvalidInput, match="not a safetensors"):
            read_header(_write(tmp_path / "x.safetensors", header))
    with pytest.raises(InvalidInput, match=r"no \*.safetensors"):
        Checkpoint(tmp_path / "nowhere")


def test_a_shard_is_its_cuts_of_the_checkpoint(tmp_path):
    """Rows of one matrix, columns of another and a whole vector, at the offsets asked for;
    bytes between them are not touched; a tensor that is too small is told."""
    numbers = np.arange(12, dtype=np.uint16)
    header = {
        "wide": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]},
        "norm": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    }
    data = numbers.tobytes() + np.array([100, 101], np.uint16).tobytes()
    _write(tmp_path / "a.safetensors", header, data)
    checkpoint = Checkpoint(tmp_path)
    memory = np.full(32, 255, np.uint8)
    plan = Plan(
        "bfloat16",
        (
            Piece("wide", (1, 3), (0, 4), 0),
            Piece("wide", (0, 3), (2, 3), 18),
            Piece("norm", (0, 2), None, 26),
        ),
        32,
    )
    fill(plan, checkpoint, memory)
    assert memory[:16].view(np.uint16).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert memory[16:18].tolist() == [255, 255]
    assert memory[18:24].view(np.uint16).tolist() == [2, 6, 10]
    assert memory[26:30].view(np.uint16).tolist() == [100, 101]
    for piece in (Piece("wide", (0, 4), (0, 4), 0), Piece("norm", (0, 2), (0, 1), 0)):
        with pytest.raises(InvalidInput, match="is needed"):
            fill(Plan("bfloat16", (piece,), 32), checkpoint, memory)
    with pytest.raises(Stopped):
        fill(plan, checkpoint, memory, stop=lambda: True)


def test_numbers_are_rounded_to_nearest_even():
    """float32 to bfloat16 keeps the upper half: 1 + 1/256 is half way between 1 and
    1 + 1/128 and goes to the even one, 1 + 3/256 up; back and forth nothing is lost."""
    values = np.array([1.0, 1 + 1 / 256, 1 + 3 / 256, -2.5, np.inf, np.nan], np.float32)
    half = _as(values.view(np.uint32), "F32", "BF16")
    assert half[:3].tolist() == [0x3F80, 0x3F80, 0x3F82]
    wide = _as(half, "BF16", "F32").view(np.float32)
    assert wide[3:5].tolist() == [-2.5, np.inf]
    assert np.isnan(wide[5])
    f16 = np.array([0.5, 65504.0], np.float16)
    assert _as(f16.view(np.uint16), "F16", "F32").view(np.float32).tolist() == [
        0.5,
        65504.0,
    ]
    assert _as(_as(f16.view(np.uint16), "F16", "F32"), "F32", "F16").tolist() == (
        f16.view(np.uint16).tolist()
    )
    with pytest.raises(InvalidInput, match="I32 cannot become BF16"):
        _as(np.zeros(1, np.uint32), "I32", "BF16")


# --- the node's store ------------------------------------------------------------------


def _shards(key: str) -> tuple[int, Callable[[np.ndarray], None]]:
    """Key "a:100": 100 bytes of the letter a."""
    letter, _, size = key.partition(":")
    if not size:
        raise InvalidInput(f"no shard {key!r}")

    def read(memory: np.ndarray) -> None:
        memory[:] = ord(letter)

    return int(size), read


def test_a_shard_is_read_once_and_goes_when_there_is_no_room():
    """Memory for 300 bytes: a and b are read once however often they are opened; c needs
    the room of the least recently used that nobody copies from. With all in use there is
    none, which is an answer and no error."""
    store = HostStore(300, _shards)
    a, b = store.open("a:100"), store.open("b:200")
    assert a is not None
    assert b is not None
    again = store.open("a:100")
    assert again is not None
    assert (bytes(again.array()), store.read_bytes) == (b"a" * 100, 300)
    assert store.open("c:100") is None
    b.close()
    c = store.open("c:100")
    assert c is not None
    assert bytes(c.array()) == b"c" * 100
    assert ("b:200" in store, "a:100" in store, store.held_bytes) == (False, True, 200)
    assert bytes(a.array()) == b"a" * 100
    for own in (a, again, c):
        own.close()
        own.close()
    assert store.open("d:301") is None
    with pytest.raises(InvalidInput, match="no shard 'x'"):
        store.open("x")
    store.close()


def test_a_read_that_fails_leaves_nothing_and_is_tried_again():
    """Its room is free again, the error is the reader's own, and a second read works."""
    fails = [True]

    def shards(key: str) -> tuple[int, Callable[[np.ndarray], None]]:
        def read(memory: np.ndarray) -> None:
            if fails.pop() if fails else False:
                raise InvalidInput("torn")
            memory[:] = 7

        return 100, read

    before = len(os.listdir("/proc/self/fd"))
    store = HostStore(100, shards)
    with pytest.raises(InvalidInput, match="torn"):
        store.open("a")
    assert store.held_bytes == 0
    assert len(os.listdir("/proc/self/fd")) == before
    one = store.open("a")
    assert one is not None
    assert one.array()[0] == 7
    one.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_who_asks_during_a_read_waits_for_it():
    """Eight threads ask at once: storage is read once, and all have the bytes."""
    reading, go, reads = threading.Event(), threading.Event(), []

    def shards(key: str) -> tuple[int, Callable[[np.ndarray], None]]:
        def read(memory: np.ndarray) -> None:
            reads.append(key)
            reading.set()
            assert go.wait(SOON_S)
            memory[:] = 3

        return 64, read

    store = HostStore(64, shards)
    seen: list[int] = []

    def ask() -> None:
        own = store.open("a")
        assert own is not None
        seen.append(int(own.array().sum()))
        own.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert reading.wait(SOON_S)
    go.set()
    for thread in threads:
        thread.join(SOON_S)
    assert (seen, reads) == ([192] * 8, ["a"])
    store.close()


CLIENT = """
import sys, pathlib
from foreserve.runtime.memory.store import RemoteStore
store = RemoteStore(pathlib.Path(sys.argv[1]))
shared = store.open("a:100000")
print(bytes(shared.array()) == b"a" * 100000, shared.num_bytes, flush=True)
print(store.open("b:100000"), flush=True)
sys.stdin.read()
"""


def test_other_processes_map_what_the_store_has(tmp_path):
    """A second process sees the bytes of the one copy; there is no room for b while it
    has a. When it is killed, what it had open is given back, and a can go."""
    store = HostStore(100000, _shards)
    server = StoreServer(store, tmp_path / "store")
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
    child = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "True 100000\n"
    assert child.stdout.readline() == "None\n"
    assert store.read_bytes == 100000
    child.send_signal(signal.SIGKILL)
    child.wait(SOON_S)
    pause = threading.Event()
    other = None
    while other is None:
        other = store.open("b:100000")
        pause.wait(0.01)
    other.close()
    remote = RemoteStore(tmp_path / "store")
    with pytest.raises(StoreFailed, match="no shard 'x'"):
        remote.open("x")
    own = remote.open("a:100000")
    assert own is not None
    own.close()
    assert remote.open("b:100000") is not None
    remote.close()
    server.close()
    assert not (tmp_path / "store").exists()
    with pytest.raises(StoreFailed, match="gone"):
        remote.open("a:100000")
    child.stdin.close()
    child.stdout.close()
    store.close()


# --- copies ----------------------------------------------------------------------------


class Gate:
    """A copy that ends when it is let through."""

    def __init__(self, memory: Gated, done: Copying) -> None:
        self._memory, self._done = memory, done

    def wait(self) -> None:
        assert self._memory.tickets.acquire(timeout=SOON_S)
        self._done.wait()
        self._memory.story.append("copied")


class Gated(PosixMemory):
    """Copies end one by one, as the test lets them; what happens is written down."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(PAGE, num_pages)
        self.tickets = threading.Semaphore(0)
        self.story: list[str] = []
        self.copied: list[int] = []
        self.fail_at_page: int | None = None

    def copy(self, address: int, source: int, num_bytes: int) -> Copying:
        self.copied.append(num_bytes)
        return Gate(self, super().copy(address, source, num_bytes))

    def map(self, address: int, pages, *, filled: bool = False) -> None:
        if self.fail_at_page is not None:
            listed = list(pages)
            if any(first + count > self.fail_at_page for first, count in listed):
                raise OSError(12, "no more mappings")
            pages = listed
        super().map(address, pages, filled=filled)

    def unmap(self, address: int, num_bytes: int) -> None:
        if num_bytes:
            self.story.append("unmapped")
        super().unmap(address, num_bytes)

    def let(self, copies: int) -> None:
        for _ in range(copies):
            self.tickets.release()


class Still:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now_s(self) -> float:
        return self.seconds

    def wait(self, until_s: float) -> None: ...

    def wake(self) -> None: ...


@pytest.fixture
def gated() -> Iterator[tuple[Gated, PagePool, Link]]:
    """Chunks of one page, mapped two at a time."""
    memory = Gated(8)
    pool = PagePool(memory)
    link = Link(SystemClock(), chunk_bytes=PAGE, map_bytes=2 * PAGE)
    yield memory, pool, link
    memory.let(1000)
    link.close()
    pool.close()


def _source(num_bytes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, num_bytes, np.uint8)


def _begin(link: Link, weights: Weights, source: np.ndarray, **how) -> Load:
    pages = weights.pool.books.take(weights.missing_pages, top=True)
    assert pages is not None
    return weights.load(link, source.ctypes.data, pages, **how)


def _until(happened: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(SOON_S / 0.001)):
        if happened():
            return
        pause.wait(0.001)
    raise AssertionError("it never happened")


def test_a_load_brings_every_byte_and_says_how_far_it_is(gated):
    """Three pages and a bit arrive chunk by chunk; then they can be pinned and seen, and
    not before."""
    memory, pool, link = gated
    source = _source(3 * PAGE + 100)
    weights = Weights(pool, len(source))
    load = _begin(link, weights, source)
    memory.let(2)
    _until(lambda: load.copied_bytes == 2 * PAGE)
    assert (load.end, weights.complete) == (None, False)
    with pytest.raises(NotResident, match="8192 of 12388"):
        weights.pin()
    memory.let(2)
    assert load.ended.wait(SOON_S)
    assert (load.end, load.copied_bytes, weights.complete) == (
        "done",
        len(source),
        True,
    )
    assert memory.copied == [PAGE, PAGE, PAGE, 100]
    weights.pin()
    assert bytes(weights.view()) == source.tobytes()
    weights.unpin()
    with pytest.raises(NotResident):
        weights.view()
    assert pool.free == 4


def test_a_cancelled_load_keeps_its_prefix_and_goes_on_behind_it(gated):
    """Of six pages two are there and two under way when it is cancelled: these arrive,
    pages that got nothing are free at once, and the next load copies the last two only."""
    memory, pool, link = gated
    source = _source(6 * PAGE)
    weights = Weights(pool, len(source))
    load = _begin(link, weights, source)
    memory.let(2)
    _until(lambda: load.copied_bytes == 2 * PAGE and len(memory.copied) == 4)
    link.cancel(load)
    memory.let(2)
    assert load.ended.wait(SOON_S)
    weights.settle()
    assert (load.end, weights.resident_bytes, pool.free) == ("cancelled", 4 * PAGE, 4)
    assert weights.missing_pages == 2
    again = _begin(link, weights, source)
    memory.let(2)
    assert again.ended.wait(SOON_S)
    assert memory.copied == [PAGE] * 6
    weights.pin()
    assert bytes(weights.view()) == source.tobytes()


def test_pages_are_unmapped_behind_the_copies_into_them(gated):
    """Dropping weights that are on their way waits for the copies under way: no page is
    unmapped, let alone free, before the last of them has ended."""
    memory, pool, link = gated
    source = _source(4 * PAGE)
    weights = Weights(pool, len(source))
    _begin(link, weights, source)
    _until(lambda: len(memory.copied) == 2)
    dropping = threading.Thread(target=weights.drop, args=(4,))
    dropping.start()
    assert memory.story == []
    memory.let(1)
    _until(lambda: memory.story == ["copied"])
    assert dropping.is_alive()
    assert pool.free <= 6
    memory.let(1)
    dropping.join(SOON_S)
    assert memory.story[:2] == ["copied", "copied"]
    assert set(memory.story[2:]) == {"unmapped"}
    assert (pool.free, weights.resident_bytes) == (8, 0)


def test_urgent_loads_overtake_at_the_next_chunk(gated):
    """Loads go one after the other, as they were asked for; one that requests wait for
    takes over behind the two chunks under way, and then the first goes on."""
    memory, pool, link = gated
    sources = [_source(3 * PAGE, seed) for seed in (1, 2)]
    first, second = (Weights(pool, 3 * PAGE) for _ in range(2))
    slow = _begin(link, first, sources[0])
    _until(lambda: len(memory.copied) == 2)
    fast = _begin(link, second, sources[1], urgent=True)
    _until(lambda: second.slot.mapped > 0)
    memory.let(4)
    _until(lambda: fast.copied_bytes == 2 * PAGE)
    assert (slow.copied_bytes, slow.end) == (2 * PAGE, None)
    memory.let(1)
    assert fast.ended.wait(SOON_S)
    link.hurry(slow)
    memory.let(1)
    assert slow.ended.wait(SOON_S)
    assert (fast.end, slow.end) == ("done", "done")


def test_a_load_that_fails_says_why_and_holds_nothing_more_than_it_got(gated):
    """The machine refuses to map the second pair of pages: of the first pair stays what
    was copied by then."""
    memory, pool, link = gated
    source = _source(4 * PAGE)
    weights = Weights(pool, len(source))
    memory.fail_at_page = 6
    memory.let(10)
    load = _begin(link, weights, source)
    assert load.ended.wait(SOON_S)
    weights.settle()
    assert (load.end, "no more mappings" in load.error) == ("failed", True)
    kept = weights.resident_bytes // PAGE
    assert kept <= 2
    assert (weights.slot.mapped, pool.free) == (kept, 8 - kept)


def test_a_load_without_its_pages_fails_at_once(gated):
    """KV took two of the slot's pages after it was asked how many are missing: the load
    ends before it begins, and its page is free. Of too many the rest is free, too. A
    closed link takes nothing."""
    memory, pool, link = gated
    memory.let(100)
    source = _source(4 * PAGE)
    weights = Weights(pool, len(source))
    assert _begin(link, weights, source).ended.wait(SOON_S)
    weights.settle()
    weights.drop(1)
    pages = pool.books.take(weights.missing_pages)
    assert pages is not None
    weights.drop(2)
    load = weights.load(link, source.ctypes.data, pages)
    assert (load.end, load.error) == ("failed", "1 pages where 3 are missing")
    assert (pool.free, weights.resident_bytes) == (7, PAGE)
    pages = pool.books.take(6)
    assert pages is not None
    load = weights.load(link, source.ctypes.data, pages)
    assert load.ended.wait(SOON_S)
    assert (load.end, pool.free) == ("done", 4)
    link.close()
    weights.drop(4)
    assert _begin(link, weights, source).error == "the link is closed"
    assert pool.free == 8


def test_a_throttled_link_lets_bytes_through_as_time_passes():
    """At a page a second: the first goes at once, the next when the clock says so; when
    the throttle is lifted the rest follows."""
    clock, memory = Still(), PosixMemory(PAGE, 8)
    pool = PagePool(memory)
    bucket = TokenBucket(burst_bytes=PAGE, bytes_per_s=PAGE)
    link = Link(clock, chunk_bytes=PAGE, throttle=bucket)
    source = _source(5 * PAGE)
    weights = Weights(pool, len(source))
    load = _begin(link, weights, source)
    _until(lambda: load.copied_bytes == PAGE)
    clock.seconds = 1.0
    link.hurry(load)
    _until(lambda: load.copied_bytes == 2 * PAGE)
    clock.seconds = 1.5
    link.hurry(load)
    assert bucket.wait_s(1.5) == pytest.approx(0.5)
    assert load.copied_bytes == 2 * PAGE
    link.set_rate(float("inf"))
    assert load.ended.wait(SOON_S)
    assert load.end == "done"
    link.close()
    pool.close()


@given(
    gaps_s=st.lists(st.floats(0, 3), min_size=1, max_size=40),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_a_bucket_never_lets_more_through_than_its_rate(gaps_s, sizes):
    """Whoever waits as told sends at most rate x time + burst + one chunk of 50."""
    bucket, now_s, sent = TokenBucket(burst_bytes=30, bytes_per_s=10), 0.0, 0
    for gap_s, size in zip(gaps_s, sizes, strict=False):
        now_s += gap_s
        now_s += bucket.wait_s(now_s)
        bucket.spend(size, now_s)
        sent += size
        assert sent <= 10 * now_s + 30 + 50 + 1e-6


def test_copies_beside_serving_stay_within_the_loss_that_is_allowed():
    """A machine on which copies at full speed make iterations 40 % longer, in proportion
    to their rate; 5 % are allowed. The rate settles where it costs that: it never costs
    more than a tenth above after the first steps, and on average less, while copies get
    more than half of what would cost exactly 5 %."""
    rate, most, losses = 100.0, 100.0, []
    rates = []
    for _ in range(200):
        tpot_s = 0.01 * (1 + 0.4 * rate / most)
        rate = next_rate(
            rate,
            tpot_s,
            0.01,
            most_loss=0.05,
            least_bytes_per_s=0.1,
            most_bytes_per_s=most,
        )
        losses.append(tpot_s / 0.01 - 1)
        rates.append(rate)
    assert max(losses[5:]) <= 0.05 * 1.1 + 1e-9
    assert np.mean(losses[5:]) <= 0.05
    assert np.mean(rates[5:]) >= 0.5 * 12.5
    slow = next_rate(
        0.1, 1.0, 0.01, most_loss=0.05, least_bytes_per_s=0.1, most_bytes_per_s=9
    )
    assert slow == 0.1


def test_iterations_set_the_rate_of_the_copies_beside_them(gated):
    """Iterations of two sizes take what the model says without copies; with copies under
    way they lose in proportion to the rate, 40 % at the most it may be. The rate begins
    where it is told to, climbs while less than 5 % is lost and is halved above; it is
    lifted when nobody is served, and where it was when somebody is again."""
    _, pool, link = gated
    bucket, most = link.throttle, 1e9
    pacer = Pacer(
        link, least_bytes_per_s=1e6, first_bytes_per_s=1e7, most_bytes_per_s=most
    )
    for _ in range(5):
        pacer.ran(0.02, 0.02)
    assert bucket.bytes_per_s == float("inf")
    load = _begin(link, Weights(pool, 3 * PAGE), _source(3 * PAGE))
    losses = []
    for number in range(1600):
        expected_s = (0.01, 0.04)[number % 2]
        rate = min(bucket.bytes_per_s, most)
        losses.append(0.4 * rate / most)
        pacer.ran(expected_s * (1 + losses[-1]), expected_s)
    # The first was under way before anything was known of copies.
    assert (losses[0], losses[1]) == (0.4, 0.004)
    assert max(losses[1:]) <= 0.05 * 1.1 + 1e-9
    assert np.mean(losses[800:]) <= 0.05
    assert np.mean(losses[800:]) >= 0.025
    last = bucket.bytes_per_s
    pacer.idle()
    assert bucket.bytes_per_s == float("inf")
    pacer.ran(0.01, 0.01)
    assert bucket.bytes_per_s == last
    link.cancel(load)


def test_loading_is_the_same_code_on_a_gpu():
    """Through the made-up driver: every byte arrives in the pages' memory, copies are
    asynchronous and waited for, and unmapping is refused while a span is alive."""
    driver = FakeCuda()
    pool = PagePool(CudaMemory(PAGE, 6, driver=driver))
    link = Link(SystemClock(), chunk_bytes=3000, map_bytes=2 * PAGE)
    source = _source(5 * PAGE - 10)
    weights = Weights(pool, len(source))
    pool.memory.pin(source.ctypes.data, len(source))
    load = _begin(link, weights, source)
    assert load.ended.wait(SOON_S)
    assert load.end == "done"
    back = np.zeros_like(source)
    with weights.slot.using(0, len(source)) as address:
        pool.memory.fetch(back.ctypes.data, address, len(back)).wait()
    assert (back == source).all()
    weights.pin()
    span = weights.view()
    weights.unpin()
    with pytest.raises(InUse):
        weights.drop(1)
    del span
    assert weights.drop(2) == 2
    assert weights.resident_bytes == 3 * PAGE
    pool.memory.unpin(source.ctypes.data)
    link.close()
    pool.close()
    assert (driver.handles, driver.pinned, driver.events) == ({}, {}, 0)


# --- loans -----------------------------------------------------------------------------


def _resident(pool: PagePool, pages: int, seed: int = 0) -> tuple[Weights, np.ndarray]:
    source = _source(pages * PAGE, seed)
    weights = Weights(pool, len(source))
    link = Link(SystemClock(), chunk_bytes=PAGE)
    assert _begin(link, weights, source).ended.wait(SOON_S)
    link.close()
    weights.settle()
    assert weights.complete
    return weights, source


def test_kv_gets_its_pages_back_from_the_least_valuable_weights():
    """12 pages: three LLMs' weights have 4, 3 and 3. The one that serves is pinned; a
    request that needs 5 pages gets the 2 free ones and the last 3 of the LLM worth least.
    What that kept is resident, and its next load brings the rest."""
    pool, shelf = PagePool(PosixMemory(PAGE, 12)), Shelf()
    active, _ = _resident(pool, 4, 1)
    cheap, source = _resident(pool, 3, 2)
    dear, _ = _resident(pool, 3, 3)
    shelf.put("active", [active])
    shelf.put("cheap", [cheap], score=1.0)
    shelf.put("dear", [dear], score=2.0)
    shelf.pin("active")
    space = KvSpace([pool.books], PAGE, borrower=shelf)
    service = space.add(
        KvNeeds(
            llm="active",
            token_bytes=PAGE,
            input_tokens=1.0,
            output_tokens=1.0,
            usual_output_tokens=1,
        )
    )
    assert space.pages() == 8
    table = space.open(service)
    assert table.grow(4)
    assert (cheap.resident_bytes, dear.complete) == (PAGE, True)
    assert table.grow(7)
    assert (cheap.resident_bytes, dear.resident_bytes) == (0, PAGE)
    assert not table.grow(9)
    assert table.grow(8)
    assert (pool.free, shelf.revoked_pages) == (0, 6)
    table.release()
    link = Link(SystemClock())
    load = _begin(link, cheap, source)
    assert load.ended.wait(SOON_S)
    link.close()
    shelf.pin("cheap")
    assert bytes(cheap.view()) == source.tobytes()
    with pytest.raises(NotResident):
        shelf.pin("dear")
    shelf.unpin("active")
    for llm in ("active", "dear", "cheap"):
        shelf.take(llm)
    assert pool.free == 12
    assert "active" not in shelf
    pool.close()


def test_shards_of_an_llm_lose_alike_and_are_pinned_together():
    """Weights on two GPUs: what KV needs on one of them is dropped on both, so no shard
    is kept without the other; if one is not whole, neither is pinned."""
    pools = [PagePool(PosixMemory(PAGE, 4), order=n) for n in (0, 1)]
    shelf = Shelf()
    shards = [_resident(pool, 3, n)[0] for n, pool in enumerate(pools)]
    shelf.put("wide", shards)
    assert shelf.revocable(pools[0].books) == 3
    assert shelf.revoke(pools[0].books, 2) == 2
    assert [pool.free for pool in pools] == [3, 3]
    assert [own.resident_bytes for own in shards] == [PAGE, PAGE]
    with pytest.raises(NotResident):
        shelf.pin("wide")
    assert not any(own.pinned for own in shards)
    with pytest.raises(ValueError, match="wide is here"):
        shelf.put("wide", shards)
    shelf.take("wide")
    for pool in pools:
        pool.close()


def test_what_is_kept_is_not_on_loan():
    """Weights that a plan gave their memory, or that requests wait for, stay whatever KV
    asks for, also while they are only there in part; others go before them."""
    pool, shelf = PagePool(PosixMemory(PAGE, 6)), Shelf()
    planned, _ = _resident(pool, 3, 1)
    lent, _ = _resident(pool, 2, 2)
    shelf.put("planned", [planned], score=1.0)
    shelf.put("lent", [lent], score=9.0)
    shelf.keep("planned")
    shelf.keep("planned")
    assert shelf.revoke(pool.books, 5) == 2
    assert (planned.complete, lent.resident_bytes) == (True, 0)
    shelf.lend("planned")
    assert shelf.revocable(pool.books) == 0
    shelf.lend("planned")
    assert shelf.revoke(pool.books, 1) == 1
    with pytest.raises(ValueError, match="planned is on loan"):
        shelf.lend("planned")
    pool.close()


def test_a_load_under_way_is_on_loan_too(gated):
    """Revoking counts the pages a load has not used yet, and takes those first."""
    memory, pool, link = gated
    shelf = Shelf()
    weights = Weights(pool, 6 * PAGE)
    source = _source(6 * PAGE)
    shelf.put("llm", [weights])
    load = _begin(link, weights, source)
    memory.let(1)
    _until(lambda: load.copied_bytes == PAGE)
    assert shelf.revocable(pool.books) == 6
    memory.let(10)
    freed = shelf.revoke(pool.books, 2)
    assert freed >= 2
    assert pool.free == 2 + freed
    assert load.end in ("cancelled", "done")
    assert weights.resident_bytes == (6 - freed) * PAGE


class Loans(RuleBasedStateMachine):
    """Weights of three LLMs are loaded, cancelled, pinned, dropped and taken back by KV in
    any order, with copies under way: what is resident is right, the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PosixMemory(PAGE, 10))
        self.link = Link(SystemClock(), chunk_bytes=1000, map_bytes=PAGE)
        self.shelf = Shelf()
        self.sources = [_source(size, size) for size in (3 * PAGE, 4 * PAGE - 1, 9000)]
        self.weights = [Weights(self.pool, len(source)) for source in self.sources]
        for number, own in enumerate(self.weights):
            self.shelf.put(str(number), [own], score=number)
        self.kv: list = []

    @rule(which=st.integers(0, 2), urgent=st.booleans())
    def load(self, which: int, urgent: bool) -> None:
        own = self.weights[which]
        own.settle()
        if not own.pinned:
            pages = self.pool.books.take(own.missing_pages, top=True)
            if pages is not None:
                source = self.sources[which].ctypes.data
                own.load(self.link, source, pages, urgent=urgent)

    @rule(which=st.integers(0, 2))
    def stop(self, which: int) -> None:
        self.weights[which].stop()

    @rule(which=st.integers(0, 2))
    def pin(self, which: int) -> None:
        own = self.weights[which]
        own.settle()
        if own.pinned:
            own.unpin()
        elif own.complete:
            own.pin()

    @rule(count=st.integers(1, 8))
    def kv_grows(self, count: int) -> None:
        """As `KvSpace` does: what is missing is taken back if all of it can be."""
        books = self.pool.books
        missing = count - books.free
        if missing > 0:
            could = self.shelf.revocable(books)
            freed = self.shelf.revoke(books, missing)
            assert freed >= min(missing, could)
        enough = books.free >= count
        pages = books.take(count)
        assert (pages is not None) == enough
        if pages is not None:
            self.kv.append(pages)

    @rule()
    def kv_ends(self) -> None:
        # No precondition: how much is there depends on how far cancelled loads came, and
        # what is drawn must not.
        if self.kv:
            self.kv.pop().release()

    @invariant()
    def right(self) -> None:
        for own, source in zip(self.weights, self.sources, strict=True):
            if own._load is None or own._load[1].ended.is_set():
                own.settle()
                size = own.resident_bytes
                assert own.slot.mapped == self.pool.pages_for(size)
                if size:
                    seen = bytes(own.slot.view(0, size))
                    assert seen == source[:size].tobytes()

    def teardown(self) -> None:
        for own in self.weights:
            own.stop()
        held = sum(own.slot.mapped for own in self.weights)
        held += sum(len(pages) for pages in self.kv)
        assert self.pool.free + held == self.pool.capacity
        self.link.close()
        self.pool.close()


TestLoans = Loans.TestCase
TestLoans.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_books_of_pools_are_told_apart():
    """Revoking from one GPU asks nothing of another."""
    shelf = Shelf()
    pool = PagePool(PosixMemory(PAGE, 3))
    own, _ = _resident(pool, 2)
    shelf.put("llm", [own])
    other = Books(3)
    assert (shelf.revocable(other), shelf.revoke(other, 2)) == (0, 0)
    assert own.complete
    pool.close()
