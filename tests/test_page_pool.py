"""The page pool: books, slots and POSIX memory, by hand and by chance."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from foreserve.models.errors import InvalidInput
from foreserve.runtime.memory.books import Books, Pages, take_all
from foreserve.runtime.memory.cuda import CudaFailed, CudaMemory
from foreserve.runtime.memory.pool import InUse, Memory, PagePool, Slot
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.posix import _map as posix_map
from tests.fake_cuda import FakeCuda

PAGE = 4096


@pytest.fixture
def pool() -> Iterator[PagePool]:
    made = PagePool(PosixMemory(PAGE, 8))
    yield made
    gc.collect()
    made.close()


def _bytes(slot: Slot, offset: int, count: int) -> np.ndarray:
    return np.frombuffer(slot.view(offset, count), np.uint8)


def test_pages_come_from_either_end_and_are_never_had_twice():
    """Low numbers for some, high ones for others, in runs; what nobody has is free."""
    books = Books(10)
    low, high = books.take(3), books.take(3, top=True)
    assert low is not None
    assert high is not None
    assert (*low.numbers, *high.numbers) == (0, 1, 2, 7, 8, 9)
    assert books.take(5) is None
    part = low.split(1)
    low.release()
    again = books.take(3)
    assert again is not None
    assert list(again.numbers) == [0, 1, 3]
    assert list(again.runs()) == [(0, 2), (3, 1)]
    assert list(part.numbers) == [2]
    assert books.free + books.held == books.capacity
    assert books.held == 3 + 1 + 3


def test_pages_that_were_passed_on_are_gone_and_forgotten_ones_come_back():
    """A `Pages` is a right that moves: the giver has nothing left, and dropping it (or
    giving it back twice) neither loses pages nor frees another's."""
    books = Books(4)
    first, second = books.take(2), books.take(1)
    assert first is not None
    assert second is not None
    first.absorb(second)
    second.release()
    assert (len(first), len(second), books.free) == (3, 0, 1)
    with pytest.raises(ValueError, match="same ones"):
        first.absorb(first)
    del first
    assert books.free == 4


def test_a_grant_on_several_pools_is_whole_or_none():
    """With 3 and 1 pages free, two of each are nobody's; one of each are. Eight threads
    that ask for the same two pools in both orders end, and never have more than is."""
    one, two = Books(3, order=0), Books(1, order=1)
    assert take_all((one, two), 2) is None
    assert (one.free, two.free) == (3, 1)
    granted = take_all((two, one), 1)
    assert granted is not None
    assert [len(pages) for pages in granted] == [1, 1]
    assert granted[0].books is two
    one, two = Books(5, order=0), Books(5, order=1)
    counts: list[int] = []

    def ask(pools: tuple[Books, Books]) -> None:
        for _ in range(300):
            pages = take_all(pools, 1)
            if pages is not None:
                counts.append(max(one.held, two.held))
                for own in pages:
                    own.release()

    threads = [
        threading.Thread(target=ask, args=((one, two) if i % 2 else (two, one),))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert max(counts) <= 5
    assert (one.free, two.free) == (5, 5)


def test_a_slot_keeps_its_address_and_its_bytes(pool: PagePool):
    """What is written through a slot is in its pages, at the same address whichever they
    are: taken off and mapped again elsewhere, the bytes are there; the window shows them
    under the pages' numbers."""
    first, second = pool.reserve(3 * PAGE), pool.reserve(2 * PAGE)
    assert pool.map(first, 3)
    _bytes(first, 0, 3 * PAGE)[:] = np.repeat([1, 2, 3], PAGE)
    window = np.frombuffer(pool.window_span(), np.uint8).reshape(8, PAGE)
    assert [int(window[n, 5]) for n in first.numbers] == [1, 2, 3]
    del window
    moved = first.unmap(2)
    second.map(moved)
    assert len(moved) == 0
    assert _bytes(second, 0, 2 * PAGE)[[0, PAGE]].tolist() == [2, 3]
    assert _bytes(first, 0, PAGE)[7] == 1
    assert (pool.mapped, pool.free) == (3, 5)


def test_memory_in_use_is_not_unmapped(pool: PagePool):
    """While a tensor made of a span lives, its pages stay; below it they may go."""
    slot = pool.reserve(4 * PAGE)
    assert pool.map(slot, 4)
    made = _bytes(slot, PAGE, PAGE)
    part = made[10:20]
    del made
    pool.unmap(slot, 2)
    with pytest.raises(InUse):
        pool.unmap(slot, 1)
    with pytest.raises(InUse):
        slot.release()
    assert part[3] == 0
    del part
    pool.unmap(slot, 1)
    with slot.using(0, 1), pytest.raises(InUse):
        pool.unmap(slot, 1)
    slot.release()
    slot.release()
    assert (pool.mapped, pool.free) == (0, 8)
    with pytest.raises(ValueError, match="0 of 4"):
        slot.map(pool.books.take(1))


def test_what_does_not_fit_changes_nothing(pool: PagePool):
    """Too many pages for the slot, for the pool, of another pool; bytes not mapped."""
    slot = pool.reserve(2 * PAGE)
    pages = pool.books.take(3)
    assert pages is not None
    with pytest.raises(ValueError, match="3 pages behind 0 of 2"):
        slot.map(pages)
    assert len(pages) == 3
    assert not pool.map(slot, 6)
    foreign = Books(8).take(1)
    with pytest.raises(ValueError, match="another pool"):
        slot.map(foreign)
    with pytest.raises(ValueError, match="are mapped"):
        slot.view(0, 1)
    with pytest.raises(ValueError, match="of 0 pages"):
        slot.unmap(1)
    pages.release()
    assert pool.free == 8
    with pytest.raises(InvalidInput):
        PosixMemory(1000, 4)
    with pytest.raises(InvalidInput):
        PosixMemory(PAGE, 0)
    with pytest.raises(InvalidInput):
        pool.reserve(0)


def test_a_mapping_that_fails_is_undone(pool: PagePool, monkeypatch):
    """The machine refuses the second run: the pages are still the caller's, and nothing
    of the slot is mapped."""
    slot, memory = pool.reserve(4 * PAGE), pool.memory
    pages = pool.books.take(4)
    assert pages is not None
    odd = pages.split(1)
    gap = pages.split(1)
    pages.absorb(odd)
    assert list(pages.runs()) == [(0, 2), (3, 1)]

    def second_fails(address, size, access, flags, fd, offset, real=posix_map):
        if fd >= 0 and offset == 3 * PAGE:
            raise OSError(12, "no more mappings")
        return real(address, size, access, flags, fd, offset)

    monkeypatch.setattr("foreserve.runtime.memory.posix._map", second_fails)
    with pytest.raises(OSError, match="no more"):
        slot.map(pages)
    assert (len(pages), len(gap), slot.mapped, pool.free) == (3, 1, 0, 4)
    assert _mapped_of_file(memory) == 0


def _mapped_of_file(memory: PosixMemory) -> int:
    """Bytes of the memory's file that this process maps."""
    inode = os.fstat(memory.fd).st_ino
    found = 0
    with open("/proc/self/maps") as file:
        for line in file:
            fields = line.split()
            if int(fields[4]) == inode and "foreserve-pages" in line:
                begin, end = (int(part, 16) for part in fields[0].split("-"))
                found += end - begin
    return found


def test_unmapped_memory_cannot_be_touched():
    """A process that reads where nothing is mapped any more ends by the signal of the
    machine, and never reads another's bytes."""
    code = f"""
import ctypes
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
pool = PagePool(PosixMemory({PAGE}, 2))
slot = pool.reserve({PAGE})
pool.map(slot, 1)
assert ctypes.string_at(slot.address, 1) == bytes(1)
pool.unmap(slot, 1)
ctypes.string_at(slot.address, 1)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (-11, b"")


def test_another_process_maps_the_same_pages(pool: PagePool):
    """The file descriptor is all that another process needs; numbers mean the same."""
    slot = pool.reserve(PAGE)
    assert pool.map(slot, 1)
    memory = pool.memory
    assert isinstance(memory, PosixMemory)
    code = f"""
import numpy as np
from foreserve.runtime.memory.posix import PosixMemory
memory = PosixMemory({PAGE}, 8, fd={memory.fd})
address = memory.reserve({PAGE})
memory.map(address, [({slot.numbers[0]}, 1)])
np.frombuffer(memory.span(address, {PAGE}), np.uint8)[:] = 77
memory.close()
"""
    subprocess.run([sys.executable, "-c", code], pass_fds=[memory.fd], check=True)
    assert (_bytes(slot, 0, PAGE) == 77).all()


def test_the_machine_gets_the_memory_of_free_pages_back(pool: PagePool):
    """Eight pages are there after they were written, the three in use after `trim`; the
    others are zeros when they are used again."""
    memory = pool.memory
    assert isinstance(memory, PosixMemory)
    memory.create()
    assert memory.resident_bytes == 8 * PAGE
    slot = pool.reserve(8 * PAGE)
    assert pool.map(slot, 8)
    _bytes(slot, 0, 8 * PAGE)[:] = 9
    pool.unmap(slot, 5)
    assert pool.trim() == 5
    assert memory.resident_bytes == 3 * PAGE
    assert pool.map(slot, 5)
    content = _bytes(slot, 0, 8 * PAGE)
    assert (content[: 3 * PAGE] == 9).all()
    assert not content[3 * PAGE :].any()


class Pool(RuleBasedStateMachine):
    """Slots come and go, are mapped and unmapped, and pages are in hands in between; the
    bytes of every page are known. The same for host memory and the made-up GPU, by copies
    from and to the host."""

    def make(self) -> Memory:
        return PosixMemory(PAGE, 12)

    def mapped_bytes(self) -> int:
        """As the machine sees it."""
        return _mapped_of_file(self.pool.memory)

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.make())
        self.window = self.pool.window()
        self.slots: list[tuple[Slot, list[int]]] = []
        self.hands: list[tuple[Pages, list[int]]] = []
        self.marks = 0

    def write(self, number: int, mark: int) -> None:
        page = np.full(PAGE, mark, np.uint8)
        address = self.window + number * PAGE
        self.pool.memory.copy(address, page.ctypes.data, PAGE).wait()

    def read(self, address: int, pages: int) -> np.ndarray:
        found = np.zeros((pages, PAGE), np.uint8)
        memory = self.pool.memory
        memory.fetch(found.ctypes.data, address, pages * PAGE).wait()
        return found

    @rule(size=st.integers(1, 6))
    def reserve(self, size: int) -> None:
        if len(self.slots) < 5:
            self.slots.append((self.pool.reserve(size * PAGE - 7), []))

    @rule(count=st.integers(0, 13), top=st.booleans())
    def take(self, count: int, top: bool) -> None:
        free = self.pool.free
        pages = self.pool.books.take(count, top=top)
        assert (pages is None) == (count > free)
        if pages is not None:
            marks = []
            for number in pages.numbers:
                self.marks += 1
                self.write(number, self.marks % 251)
                marks.append(self.marks % 251)
            self.hands.append((pages, marks))

    @precondition(lambda self: self.hands and self.slots)
    @rule(data=st.data())
    def map(self, data: st.DataObject) -> None:
        slot, content = self.slots[data.draw(st.integers(0, len(self.slots) - 1))]
        hand, marks = self.hands[data.draw(st.integers(0, len(self.hands) - 1))]
        if slot.mapped + len(hand) <= slot.num_pages:
            slot.map(hand)
            content += marks
            marks.clear()
        else:
            with pytest.raises(ValueError, match="behind"):
                slot.map(hand)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        slot, content = self.slots[data.draw(st.integers(0, len(self.slots) - 1))]
        count = data.draw(st.integers(0, slot.mapped))
        cut = len(content) - count
        self.hands.append((slot.unmap(count), content[cut:]))
        del content[cut:]

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), how=st.sampled_from(["release", "forget", "split"]))
    def part(self, data: st.DataObject, how: str) -> None:
        at = data.draw(st.integers(0, len(self.hands) - 1))
        pages, marks = self.hands[at]
        if how == "split":
            count = data.draw(st.integers(0, len(pages)))
            cut = len(pages) - count
            self.hands.append((pages.split(count), marks[cut:]))
            del marks[cut:]
            return
        if how == "release":
            pages.release()
        del self.hands[at], pages

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.slots) - 1))
        self.slots.pop(at)[0].release()

    @rule()
    def trim(self) -> None:
        assert self.pool.trim() == self.pool.free

    @invariant()
    def balanced(self) -> None:
        """Each page is free, in one slot, or in one hand."""
        owned = [n for slot, _ in self.slots for n in slot.numbers]
        owned += [n for pages, _ in self.hands for n in pages.numbers]
        assert len(set(owned)) == len(owned)
        assert self.pool.free + len(owned) == self.pool.capacity
        assert self.pool.mapped == sum(slot.mapped for slot, _ in self.slots)
        assert self.mapped_bytes() == PAGE * (12 + self.pool.mapped)

    @invariant()
    def bytes_stay(self) -> None:
        for slot, content in self.slots:
            if slot.mapped:
                with slot.using(0, slot.mapped_bytes) as address:
                    seen = self.read(address, slot.mapped)
                assert seen[:, 0].tolist() == seen[:, -1].tolist() == content
        for pages, marks in self.hands:
            for number, mark in zip(pages.numbers, marks, strict=True):
                assert self.read(self.window + number * PAGE, 1)[0, 7] == mark

    def teardown(self) -> None:
        self.hands.clear()
        self.pool.close()


class CudaPool(Pool):
    def make(self) -> Memory:
        self.driver = FakeCuda()
        return CudaMemory(PAGE, 12, driver=self.driver)

    def mapped_bytes(self) -> int:
        return self.driver.mapped_bytes

    def teardown(self) -> None:
        super().teardown()
        left = (self.driver.handles, self.driver.reserved, self.driver.mapped)
        assert left == ({}, {}, {})
        assert (self.driver.events, self.driver.streams) == (0, 0)


CHANCE = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase
TestPool.settings = CHANCE
TestCudaPool = CudaPool.TestCase
TestCudaPool.settings = CHANCE


def test_the_driver_is_asked_once_for_rights_and_to_unmap():
    """Creating 4 pages are 4 calls, mapping 3 of them 3 calls and one for their rights,
    unmapping is one; nothing is created or released before the end."""
    driver = FakeCuda()
    pool = PagePool(CudaMemory(PAGE, 4, driver=driver))
    slot = pool.reserve(4 * PAGE)
    assert driver.calls.count("cuMemCreate") == 4
    driver.calls.clear()
    assert pool.map(slot, 3)
    assert driver.calls == ["cuMemMap"] * 3 + ["cuMemSetAccess"]
    driver.calls.clear()
    pool.unmap(slot, 2)
    assert driver.calls == ["cuCtxSynchronize", "cuMemUnmap"]
    span = slot.view(16, 100)
    assert span.__cuda_array_interface__["data"] == (slot.address + 16, False)
    assert span.__cuda_array_interface__["shape"] == (100,)
    with pytest.raises(InUse):
        pool.unmap(slot, 1)
    del span
    pool.close()
    assert driver.calls.count("cuMemRelease") == 4


def test_what_the_driver_refuses_leaves_the_books_as_they_were():
    """Too little memory for all pages: those made are released, and it says so. Rights
    that are refused: nothing stays mapped, and the pages are free again."""
    small = FakeCuda(memory_bytes=3 * PAGE)
    with pytest.raises(CudaFailed, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        CudaMemory(PAGE, 4, driver=small)
    assert (small.handles, small.streams) == ({}, 0)
    with pytest.raises(InvalidInput, match="multiple of 4096"):
        CudaMemory(PAGE + 1, 4, driver=FakeCuda())
    driver = FakeCuda()
    pool = PagePool(CudaMemory(PAGE, 4, driver=driver))
    slot = pool.reserve(4 * PAGE)
    driver.fail_at = "cuMemSetAccess"
    with pytest.raises(OSError, match="cuMemSetAccess"):
        pool.map(slot, 3)
    assert (driver.mapped_bytes, slot.mapped, pool.free) == (0, 0, 4)
    pool.close()


def test_each_thread_says_which_gpu_it_means():
    """The driver refuses calls of a thread without a context; the pool sets it."""
    pool = PagePool(CudaMemory(PAGE, 2, driver=FakeCuda()))
    slots: list[Slot] = []

    def work() -> None:
        slots.append(pool.reserve(PAGE))
        assert pool.map(slots[0], 1)
        pool.unmap(slots[0], 1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert len(slots) == 1
    assert pool.free == 2
    pool.close()


def _gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "gpu_page_pool.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("gpu_page_pool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_for_gpus_runs_where_there_is_a_driver(monkeypatch, tmp_path):
    """All its parts run through the made-up driver and leave nothing there; what they
    measure of it means nothing."""
    module = _gpu_benchmark(monkeypatch)
    monkeypatch.setattr(module, "REPEATS", 2)
    driver, record = FakeCuda(), module.Record("x", tmp_path)
    found = module.measure(driver, 64 * PAGE - 5, PAGE, record)
    assert len(found["mapping_us_per_page"]) == 4
    assert found["loading_gb_per_s"]["plain pinned copy"]["median"] > 0
    assert found["bytes_arrive"].startswith("0 bytes differ")
    assert len(found["switching_ms"]) == 3
    assert set(found["swapping_gb_per_s"]) == {"out", "back"}
    left = (driver.handles, driver.reserved, driver.mapped, driver.pinned)
    assert left == ({}, {}, {}, {})
    assert record.errors == 0


def test_a_part_of_a_benchmark_that_fails_loses_itself_alone(monkeypatch, tmp_path):
    """The driver refuses rights once: the first part's error is in the file, and the
    numbers of the others are."""
    module = _gpu_benchmark(monkeypatch)
    monkeypatch.setattr(module, "REPEATS", 1)
    driver, record = FakeCuda(), module.Record("x", tmp_path)

    class Failing(module.PagePool):
        def window(self) -> int:
            address = super().window()
            driver.fail_at = "cuMemSetAccess"
            return address

    monkeypatch.setattr(module, "PagePool", Failing)
    module.measure(driver, 64 * PAGE, PAGE, record)
    written = json.loads((tmp_path / "x.json").read_text())
    assert "cuMemSetAccess" in written["mapping_us_per_page"]["error"]
    assert written["loading_gb_per_s"]["plain pinned copy"]["median"] > 0
    assert record.errors == 1


def test_the_benchmark_for_gpus_says_that_there_is_none(monkeypatch, capsys, tmp_path):
    """One line, no file, and no failure."""

    def none() -> None:
        raise CudaFailed("no CUDA driver: not here")

    module = _gpu_benchmark(monkeypatch)
    monkeypatch.setattr(module, "load_driver", none)
    assert module.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said == "skipped, no GPU to measure on: no CUDA driver: not here\n"
    assert not list(tmp_path.iterdir())
