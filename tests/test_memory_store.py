"""Weights in host memory: files, the node's store, and what streams past it."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines import tiny
from foreserve.runtime.memory import filling, node_store
from foreserve.runtime.memory.cuda import CudaMemory
from foreserve.runtime.memory.filling import Fill, Stop
from foreserve.runtime.memory.loading import Link, Load, Source, Whole
from foreserve.runtime.memory.node_store import (
    RemoteStore,
    StoreGone,
    StoreServer,
    listen,
)
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.safetensors import (
    Checkpoint,
    Stopped,
    _as,
    fill,
    read_header,
)
from foreserve.runtime.memory.store import HostStore, Opened, Store, StoreFailed
from foreserve.runtime.memory.streaming import (
    WINDOW_BYTES,
    WINDOWS,
    Sources,
    Stream,
)
from foreserve.runtime.memory.weights import Weights
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.layout import Part, lay_out
from tests.fake_cuda import FakeCuda
from tests.waiting import SOON_S, until

PAGE = 4096


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


def test_a_checkpoint_is_read(tmp_path):
    """A tiny LLM as `plan models make-tiny` writes it: all tensors with their shapes, as
    many bytes as the file has behind its header, and the right ones in the right place; a
    file that has become shorter is an error."""
    folder = tiny.make(tmp_path / "llm", "llama")
    checkpoint = Checkpoint(folder)
    file = folder / "model.safetensors"
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert checkpoint.num_bytes == file.stat().st_size - 8 - length
    norm = checkpoint.read("model.norm.weight")
    assert norm.shape == (128,)
    assert (norm == 0x3F80).all()  # 1.0 as bfloat16.
    with pytest.raises(InvalidInput, match="no tensor 'x'"):
        checkpoint.read("x")
    file.write_bytes(file.read_bytes()[: length + 8])
    with pytest.raises(InvalidInput, match="ends before its numbers"):
        checkpoint.read("model.norm.weight")


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
    bytes between them are zero; a tensor that is too small is told."""
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
    assert memory[16:18].tolist() == memory[24:26].tolist() == [0, 0]
    assert memory[30:32].tolist() == [0, 0]
    assert memory[18:24].view(np.uint16).tolist() == [2, 6, 10]
    assert memory[26:30].view(np.uint16).tolist() == [100, 101]
    for piece in (Piece("wide", (0, 4), (0, 4), 0), Piece("norm", (0, 2), (0, 1), 0)):
        with pytest.raises(InvalidInput, match="is needed"):
            fill(Plan("bfloat16", (piece,), 32), checkpoint, memory)
    with pytest.raises(Stopped):
        fill(plan, checkpoint, memory, stop=lambda: True)


@pytest.mark.parametrize(
    ("dtype", "rank", "ranks"), [("float32", 0, 1), ("bfloat16", 3, 4)]
)
def test_a_shard_may_be_written_in_parts(tmp_path, dtype, rank, ranks):
    """Windows that begin and end anywhere, in the middle of a number, too: together they
    are the whole, converted or not, of all rows and of a quarter of them, whose columns are
    read one row at a time."""
    folder = tiny.make(tmp_path / "llm", "qwen", hidden=64)
    layout = lay_out(read_config(folder), dtype, Part(rank=rank, size=ranks))
    checkpoint = Checkpoint(folder)
    whole, parts = (np.zeros(layout.num_bytes, np.uint8) for _ in range(2))
    fill(layout, checkpoint, whole)
    assert np.count_nonzero(whole) > 0.4 * len(whole)
    for begin in range(0, len(parts), 10_007):
        window = np.zeros(10_007, np.uint8)
        fill(layout, checkpoint, window, begin=begin)
        there = parts[begin : begin + 10_007]
        there[:] = window[: len(there)]
        assert not window[len(there) :].any()
    assert (parts == whole).all()


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


def _shards(key: str) -> tuple[int, Fill]:
    """Key "a:100": 100 bytes of the letter a."""
    letter, _, size = key.partition(":")
    if not size:
        raise InvalidInput(f"no shard {key!r}")

    def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
        memory[: max(0, int(size) - begin)] = ord(letter)

    return int(size), read


def _opened(store: Store, key: str) -> Opened:
    """When all of it is there."""
    own = store.open(key)
    assert own is not None
    own.filling.wait(own.num_bytes - 1, SOON_S)
    assert own.filling.whole
    return own


def test_a_shard_is_read_once_and_goes_when_there_is_no_room():
    """Memory for 300 bytes: a and b are read once however often they are opened; c needs
    the room of the least recently used that nobody copies from. With all in use there is
    none, which is an answer and no error."""
    store = HostStore(300, _shards)
    a, b, again = (_opened(store, key) for key in ("a:100", "b:200", "a:100"))
    assert (bytes(again.array()), store.read_bytes) == (b"a" * 100, 300)
    assert store.open("c:100") is None
    b.close()
    c = _opened(store, "c:100")
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


def test_what_is_to_be_kept_goes_last():
    """Of a (kept, and the least recently used) and b, b makes room for c; d, which needs
    all of it, would need a's room: there is none, until a is kept no more."""
    store = HostStore(300, _shards)
    store.keep(["a:"])
    for key in ("a:100", "b:200", "c:200"):
        _opened(store, key).close()
    assert ("a:100" in store, "b:200" in store, "c:200" in store) == (True, False, True)
    assert store.open("d:300") is None
    store.keep([])
    _opened(store, "d:300").close()
    assert store.held_bytes == 300
    store.close()


def test_a_read_that_fails_leaves_nothing_and_is_tried_again():
    """Its room is free again, what is said is what the reader said, and a second read
    works."""
    fails = [True]

    def shards(key: str) -> tuple[int, Fill]:
        def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
            if fails.pop() if fails else False:
                raise InvalidInput("torn")
            memory[:] = 7

        return 100, read

    before = len(os.listdir("/proc/self/fd"))
    store = HostStore(100, shards)
    torn = store.open("a")
    assert torn is not None
    with pytest.raises(StoreFailed, match="torn"):
        torn.filling.wait(0, SOON_S)
    torn.close()
    assert store.held_bytes == 0
    assert len(os.listdir("/proc/self/fd")) == before
    one = _opened(store, "a")
    assert one.array()[0] == 7
    one.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_who_asks_during_a_read_waits_for_it():
    """Eight threads ask at once: storage is read once, and all have the bytes."""
    reading, go, reads = threading.Event(), threading.Event(), []

    def shards(key: str) -> tuple[int, Fill]:
        def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
            reads.append(key)
            reading.set()
            assert go.wait(SOON_S)
            memory[:] = 3

        return 64, read

    store = HostStore(64, shards)
    seen: list[int] = []

    def ask() -> None:
        own = _opened(store, "a")
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
from foreserve.runtime.memory.node_store import RemoteStore
store = RemoteStore(pathlib.Path(sys.argv[1]))
shared = store.open("a:100000")
shared.filling.wait(99999)
print(bytes(shared.array()) == b"a" * 100000, shared.num_bytes, flush=True)
print(store.open("b:100000"), flush=True)
sys.stdin.read()
"""


def test_other_processes_map_what_the_store_has(tmp_path, monkeypatch):
    """A second process sees the bytes of the one copy, over a socket of this user's own
    whose path may be long; there is no room for b while it has a. When it is killed, what
    it had open is given back, and a can go. Without a store, or with one that says nothing,
    that is what one is told; what was mapped stays."""
    path = tmp_path / ("long" * 30) / "store"
    path.parent.mkdir()
    store = HostStore(100000, _shards)
    server = StoreServer(store, listen(path))
    assert path.stat().st_mode & 0o077 == 0
    child = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(path)],
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
    remote = RemoteStore(path)
    with pytest.raises(StoreFailed, match="no shard 'x'"):
        remote.open("x")
    own = _opened(remote, "a:100000")
    assert remote.look(SOON_S) == {"held_bytes": 100000, "read_bytes": 300000}
    own.close()
    while (own := remote.open("b:100000")) is None:
        pause.wait(0.01)
    own.filling.wait(99999, SOON_S)
    server.close()
    assert bytes(own.array()) == b"b" * 100000
    with pytest.raises(StoreGone, match="gone"):
        remote.open("a:100000")
    own.close()
    monkeypatch.setattr(node_store, "SILENT_S", 0.05)
    with listen(path):
        for ask in (lambda: remote.look(0.01), lambda: remote.open("a:100000")):
            with pytest.raises(StoreGone, match="said nothing"):
                ask()
    child.stdin.close()
    child.stdout.close()
    remote.close()
    store.close()


def test_what_is_not_used_stays_open_until_the_store_wants_it(tmp_path):
    """What was closed is had again at the same address, still pinned, and without asking;
    the store learns that it was used. While it is in use there is no room for another that
    needs it all; unused, it is given back when somebody else asks, the least recently used
    first, or when the store ends: unpinned, then unmapped."""
    store = HostStore(300, _shards)
    server = StoreServer(store, listen(tmp_path / "store"))
    mine, other = (RemoteStore(tmp_path / "store") for _ in range(2))
    story: list[str] = []

    def use(key: str) -> int:
        own = _opened(mine, key)
        own.once(lambda: story.append(f"pin {key}"), lambda: story.append(f"un {key}"))
        own.close()
        own.close()
        return own.address

    where = use("a:100")
    use("b:200")
    assert use("a:100") == where
    assert story == ["pin a:100", "pin b:200"]
    until(lambda: list(store._ram.held) == ["b:200", "a:100"])
    c = _opened(other, "c:200")
    assert story == ["pin a:100", "pin b:200", "un b:200"]
    own = mine.open("a:100")
    assert own is not None
    until(lambda: store._uses["a:100"] == 1)
    assert other.open("d:100") is None
    own.close()
    until(lambda: store._uses["a:100"] == 0)
    d = _opened(other, "d:100")
    assert story[3:] == ["un a:100"]
    c.close()
    server.close()
    until(lambda: not other._held)
    assert bytes(d.array()) == b"d" * 100
    d.close()
    mine.close()
    other.close()
    store.close()


class Slow:
    """Shards of 64 bytes that are read a step at a time, as the test lets it."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.reads: list[str] = []
        """Keys of reads that were begun."""
        self.stopped = threading.Event()

    def shards(self, key: str) -> tuple[int, Fill]:
        def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
            self.reads.append(key)
            for i in range(len(memory)):
                while not self.steps.acquire(timeout=0.005):
                    if stop():
                        self.stopped.set()
                        raise Stopped(key)
                memory[i] = begin + i

        return 64, read


def test_a_shard_can_be_copied_while_it_is_read(tmp_path, monkeypatch):
    """Two processes' stores, and one in this process, have one shard open that is read by
    windows of 8 bytes: each sees the bytes of whole windows as they come, and storage is
    read once. Who asked first leaves: the read goes on. When all have left it ends, and its
    room is free; the next one reads anew, and has all of it."""
    monkeypatch.setattr(filling, "WINDOW_BYTES", 8)
    slow = Slow()
    store = HostStore(64, slow.shards)
    server = StoreServer(store, listen(tmp_path / "store"))
    remotes = [RemoteStore(tmp_path / "store") for _ in range(2)]
    own = [opener.open("a") for opener in (*remotes, store)]
    slow.steps.release(19)
    for one in own:
        assert one is not None
        until(lambda one=one: one.filling.ready_bytes == 16)
        assert one.array()[:16].tolist() == list(range(16))
        assert (one.filling.ahead(10), one.filling.ahead(16)) == (6, 0)
    own[0].close()
    assert len(slow.reads) == 3
    until(lambda: store._uses["a"] == 2)
    assert (slow.stopped.is_set(), store.held_bytes) == (False, 64)
    own[1].close()
    own[2].close()
    assert slow.stopped.wait(SOON_S)
    until(lambda: store.held_bytes == 0)
    slow.steps.release(64)
    again = _opened(remotes[0], "a")
    assert again.array().tolist() == list(range(64))
    assert store.read_bytes == 64
    again.close()
    for remote in remotes:
        remote.close()
    server.close()
    store.close()


def test_a_read_that_nobody_waits_for_makes_room():
    """A store for one shard. Who had a read leaves, and comes back when the read has seen
    it: it goes on. When he has left for good, who asks for b at once has its room as soon
    as that read has ended."""
    slow = Slow()
    store = HostStore(64, slow.shards)
    a = store.open("a")
    assert a is not None
    with store._changed:
        a.close()
        assert slow.stopped.wait(SOON_S)
        a = store.open("a")
        assert a is not None
    until(lambda: len(slow.reads) == 2)
    assert not a.filling.failed
    slow.stopped.clear()
    a.close()
    b = store.open("b")
    assert b is not None
    assert slow.stopped.is_set()
    slow.steps.release(64)
    b.filling.wait(63, SOON_S)
    assert (b.array().tolist(), store.held_bytes) == (list(range(64)), 64)
    b.close()
    store.close()


@pytest.mark.parametrize("how", ["goes", "hangs", "fails", "is cancelled"])
def test_a_load_copies_while_the_store_reads(tmp_path, link, monkeypatch, how):
    """A shard of 64 bytes, read by windows of 8: when the store has 24, so has the load.
    If the store ends then, or says nothing any more, the load reads the rest itself, and no
    byte before; if its reader fails, the load ends with what he said; if the load is
    cancelled, the read ends."""
    monkeypatch.setattr(filling, "WINDOW_BYTES", 8)
    monkeypatch.setattr(node_store, "SILENT_S", 0.1)
    slow, begun = Slow(), []

    def shards(key: str) -> tuple[int, Fill]:
        def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
            begun.append(begin)
            _numbers(memory, begin, stop)

        return 64, read

    def torn(key: str) -> tuple[int, Fill]:
        _, slowly = slow.shards(key)

        def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
            slowly(memory, begin, stop)
            if begin == 24:
                raise InvalidInput("torn")

        return 64, read

    store = HostStore(64, torn if how == "fails" else slow.shards)
    server = StoreServer(store, listen(tmp_path / "store"))
    remote = RemoteStore(tmp_path / "store")
    pool = PagePool(PosixMemory(PAGE, 1))
    sources, weights = Sources(remote, shards, pool.memory), Weights(pool, 64)
    with sources.open("a", link.look, lambda: False) as source:
        load = _load(weights, link, source)
        slow.steps.release(25)
        until(lambda: load.copied_bytes == 24)
        if how == "goes":
            server.close()
        elif how == "hangs":

            def gone(within_s: float) -> dict[str, int]:
                raise StoreGone("it said nothing")

            assert remote._watch is not None
            monkeypatch.setattr(remote._watch, "_look", gone)
        elif how == "fails":
            slow.steps.release(7)
        else:
            link.cancel(load)
        assert load.ended.wait(SOON_S)
    ended = {"fails": ("failed", "torn"), "is cancelled": ("cancelled", "")}
    assert (load.end, load.error) == ended.get(how, ("done", ""))
    weights.settle()
    there = np.frombuffer(weights.slot.view(0, load.copied_bytes), np.uint8)
    assert there.tolist() == list(range(64 if load.end == "done" else 24))
    assert begun == ([24] if load.end == "done" else [])
    # Nobody has it any more: the read has ended, or ends.
    until(lambda: store.held_bytes == 0)
    assert not remote._held
    del there
    gc.collect()
    weights.close()
    pool.close()
    sources.close()
    server.close()
    store.close()


# --- streams ---------------------------------------------------------------------------


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link(SystemClock(), chunk_bytes=3000, map_bytes=2 * PAGE)
    yield made
    made.close()


def _numbers(memory: np.ndarray, begin: int, stop: Stop) -> None:
    memory[:] = (np.arange(begin, begin + len(memory)) % 251).astype(np.uint8)


def _load(weights: Weights, link: Link, source: Source) -> Load:
    pages = weights.pool.books.take(weights.missing_pages, top=True)
    assert pages is not None
    return weights.load(link, source, pages)


def test_a_load_may_stream_past_a_store_without_room(link):
    """A shard of ten pages through a store of none: it is read while it is copied, by
    windows of no round size, and every byte arrives. A load that goes on behind a prefix
    reads no byte of the prefix."""
    pool, begun = PagePool(PosixMemory(PAGE, 10)), []
    size = 10 * PAGE - 100

    def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
        begun.append(begin)
        _numbers(memory, begin, stop)

    weights = Weights(pool, size)
    for prefix in (0, 4 * PAGE):
        stream = Stream(read, size, link.look, window_bytes=5001, windows=3)
        load = _load(weights, link, stream)
        assert load.ended.wait(SOON_S)
        stream.close()
        weights.settle()
        assert (load.end, begun[0]) == ("done", prefix)
        begun.clear()
        weights.pin()
        wanted = np.arange(size) % 251
        assert (np.frombuffer(weights.view(), np.uint8) == wanted).all()
        gc.collect()
        weights.unpin()
        weights.drop(6)
    weights.close()
    pool.close()


def test_a_stream_reads_no_more_than_its_buffers(link):
    """Beside a link that copies nothing, three windows are read and no more; when it is
    closed while it reads, it stops, and the load can be cancelled."""
    slow = Slow()
    _, fill = slow.shards("a")
    stream = Stream(fill, 64, link.look, window_bytes=8, windows=3)
    assert stream.at(0)[1] == 0
    slow.steps.release(24)
    until(lambda: stream.at(16)[1] == 8)
    assert [stream.at(n)[1] for n in (0, 7, 12, 24)] == [8, 1, 4, 0]
    assert slow.reads == ["a"] * 3
    slow.steps.release(2)
    stream.copied(8)
    until(lambda: len(slow.reads) == 4 and slow.steps._value == 0)
    stream.close()
    assert slow.stopped.is_set()


def test_a_stream_that_fails_makes_its_load_fail(link):
    """What the reader says is what the load says, and nothing that was not read is there;
    the link goes on with others, also while a stream has nothing for it."""
    pool, slow = PagePool(PosixMemory(PAGE, 8)), Slow()

    def read(memory: np.ndarray, begin: int, stop: Stop) -> None:
        if begin:
            raise InvalidInput("cut off")
        _numbers(memory, begin, stop)

    torn = Stream(read, 3 * PAGE, link.look, window_bytes=PAGE)
    first = Weights(pool, 3 * PAGE)
    load = _load(first, link, torn)
    assert load.ended.wait(SOON_S)
    torn.close()
    first.settle()
    assert (load.end, load.error) == ("failed", "cut off")
    assert first.resident_bytes <= PAGE
    waiting, other = Weights(pool, 64), Weights(pool, 2 * PAGE)
    stream = Stream(slow.shards("a")[1], 64, link.look)
    held = _load(waiting, link, stream)
    source = np.arange(2 * PAGE, dtype=np.uint8)
    after = _load(other, link, Whole(source.ctypes.data, len(source)))
    assert after.ended.wait(SOON_S)
    assert (after.end, held.end) == ("done", None)
    link.cancel(held)
    assert held.ended.wait(SOON_S)
    stream.close()
    for weights in (first, waiting, other):
        weights.settle()
        weights.close()
    pool.close()


@pytest.mark.parametrize(
    ("room", "pinned"),
    [(20_000, [20_000]), (0, [WINDOWS * WINDOW_BYTES]), (20_000, [])],
)
def test_what_a_gpu_copies_from_is_pinned_meanwhile(link, room, pinned):
    """Of a store that has it, it is the shard, without room the stream's buffers; what
    arrives is the same, and nothing stays pinned. Where the driver refuses to pin, loads
    work without."""
    driver = FakeCuda(fail_at=None if pinned else "cuMemHostRegister")
    memory = CudaMemory(2 * 1024**2, 2, driver=driver)
    pool = PagePool(memory)
    store = HostStore(room, _shards)
    sources = Sources(store, _shards, memory)
    if room:
        _opened(store, "a:20000").close()
    weights = Weights(pool, 20_000)
    with sources.open("a:20000", link.look, lambda: False) as source:
        assert list(driver.pinned.values()) == pinned
        load = _load(weights, link, source)
        assert load.ended.wait(SOON_S)
    assert (load.end, driver.pinned) == ("done", {})
    seen = np.zeros(20_000, np.uint8)
    memory.fetch(seen.ctypes.data, weights.slot.address, len(seen)).wait()
    assert bytes(seen) == b"a" * 20_000
    weights.settle()
    weights.close()
    pool.close()
    sources.close()
