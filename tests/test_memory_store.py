"""Weights in host memory: files, the node's store, and what streams past it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.runtime.engines import tiny
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
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.layout import Part, lay_out

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
