"""Memory: words, ranges, bounds, life."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
from pathlib import Path

import pytest

from ivshmemfs.native import _native
from ivshmemfs.region import DEVICE, NORMAL, Memory
from tests.region.conftest import SIZE, Place
from tests.region.contract import MemoryContract

FAR = 2**64 - 8
OUTSIDE = [-8, -1, 1, 4, 7, SIZE - 7, SIZE, SIZE + 8, FAR, 2**64, 2**200]


class TestContract(MemoryContract):
    pass


# --- words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OUTSIDE)
def test_words_outside_or_between_are_refused(memory: Memory, offset: int) -> None:
    for call in (
        lambda: memory.load(offset),
        lambda: memory.store(offset, 1),
        lambda: memory.cas(offset, 0, 1),
    ):
        with pytest.raises(ValueError, match="offset"):
            call()
    assert memory.is_zero(0, SIZE)
    assert memory.stores == 0


@pytest.mark.parametrize("value", [-1, 2**64])
def test_values_wider_than_a_word_are_refused(memory: Memory, value: int) -> None:
    for call in (
        lambda: memory.store(0, value),
        lambda: memory.cas(0, value, 1),
        lambda: memory.cas(0, 0, value),
    ):
        with pytest.raises(ValueError, match="out of range"):
            call()
    assert memory.load(0) == 0


def test_words_take_keywords_like_any_function(memory: Memory) -> None:
    memory.store(value=3, offset=8)
    assert memory.cas(8, new=4, expected=3) == 3
    assert memory.load(offset=8) == 4
    with pytest.raises(TypeError, match=r"multiple values for.* 'offset'"):
        memory.load(8, offset=8)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unexpected keyword argument 'where'"):
        memory.load(where=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"3 positional arguments \(2 given\)"):
        memory.cas(8, 4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"1 positional argument \(2 given\)"):
        memory.load(8, 9)  # type: ignore[call-arg]


def test_fence_returns(memory: Memory) -> None:
    memory.fence()
    assert memory.stores == 0


# --- ranges ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE + 1),
        (1, SIZE),
        (FAR, 16),
        (8, 2**64 - 4),
        (-1, 1),
        (0, -1),
    ],
)
def test_ranges_outside_are_refused(memory: Memory, offset: int, length: int) -> None:
    for call in (
        lambda: memory.read(offset, length),
        lambda: memory.zero(offset, length),
        lambda: memory.is_zero(offset, length),
        lambda: memory.write(offset, bytes(max(0, min(length, SIZE + 1)))) if length > 0 else 1 / 0,
    ):
        with pytest.raises((ValueError, ZeroDivisionError)):
            call()
    assert memory.stores == 0


def test_empty_ranges_at_the_end_are_fine(memory: Memory) -> None:
    assert memory.read(SIZE, 0) == b""
    memory.write(SIZE, b"")
    memory.zero(SIZE, 0)
    assert memory.is_zero(SIZE, 0)


def test_ordinary_memory_bears_unaligned_loads(memory: Memory) -> None:
    assert memory.unaligned_ok(0)
    assert memory.unaligned_ok(SIZE - 16)
    with pytest.raises(ValueError, match="outside"):
        memory.unaligned_ok(SIZE - 15)


# --- mapping --------------------------------------------------------------------------------


def test_two_mappings_of_one_file_share_every_store(place: Place) -> None:
    first, second = place.map(), place.map(access=DEVICE)
    first.store(8, 77)
    second.write(100, b"from the second")
    assert second.load(8) == 77
    assert first.read(100, 15) == b"from the second"
    assert place.path.read_bytes()[100:115] == b"from the second"


def test_an_offset_maps_from_there(place: Place) -> None:
    place.map().store(4096, 5)
    part = place.map(4096, 4096)
    assert part.load(0) == 5
    assert part.length == 4096
    with pytest.raises(ValueError, match="offset"):
        part.load(4096)


def test_attributes_say_how_it_is_mapped(place: Place) -> None:
    memory = place.map(access=DEVICE, writable=False)
    assert (memory.length, memory.access, memory.writable) == (SIZE, DEVICE, False)
    assert place.map().access == NORMAL
    for name in ("length", "access", "writable", "closed", "stores"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(memory, name, 1)


def test_a_readonly_mapping_refuses_every_store(place: Place) -> None:
    memory = place.map(writable=False)
    for call in (
        lambda: memory.store(0, 1),
        lambda: memory.cas(0, 0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.zero(0, 8),
    ):
        with pytest.raises(OSError, match="read-only") as caught:
            call()
        assert caught.value.errno == errno.EROFS
    assert memory.load(0) == 0


@pytest.mark.parametrize(
    "arguments",
    [(-1, 4096), (2**31, 4096), (2**32 + 3, 4096), (0, 0), (0, -1), (0, 2**63), (0, 2**64),
     (0, 4096, -1), (0, 4096, 2**63), (0, 2**62, 2**62 * 3), (0, 4096, 2**80)],
)  # fmt: skip
def test_impossible_mappings_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Memory(*arguments)


@pytest.mark.parametrize("access", [-1, 3, 2**40])
def test_unknown_access_is_refused(access: int) -> None:
    with pytest.raises(ValueError, match="access out of range"):
        Memory(0, 4096, access=access)


def test_the_kernels_refusals_are_oserrors(place: Place, tmp_path: Path) -> None:
    closed = os.open(place.path, os.O_RDONLY)
    os.close(closed)
    with pytest.raises(OSError) as caught:
        Memory(closed, 4096)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        place.map(4096, 100)
    assert caught.value.errno == errno.EINVAL
    with place.path.open("rb") as file, pytest.raises(PermissionError):
        Memory(file.fileno(), 4096, writable=True)


# --- life -----------------------------------------------------------------------------------


def test_closing_ends_every_access(memory: Memory) -> None:
    assert not memory.closed
    memory.close()
    memory.close()
    assert memory.closed
    for call in (
        lambda: memory.load(0),
        lambda: memory.store(0, 1),
        lambda: memory.cas(0, 0, 1),
        lambda: memory.read(0, 0),
        lambda: memory.write(0, b""),
        lambda: memory.zero(0, 0),
        lambda: memory.is_zero(0, 0),
        lambda: memory.unaligned_ok(0),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_dropped_memory_is_unmapped(place: Place) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(place.path))

    def map_with_a_cycle() -> None:
        with place.path.open("r+b") as file:
            memory = Memory(file.fileno(), SIZE)
        assert mappings() == before + 1
        memory.trap(0, lambda: memory.load(0))

    before = mappings()
    map_with_a_cycle()
    gc.collect()
    assert mappings() == before


def test_closing_while_threads_copy_waits_for_them(place: Place) -> None:
    place.path.write_bytes(bytes(16 << 20))
    memory = place.map(16 << 20)
    started = threading.Barrier(3)
    outcomes: list[str] = []

    def copy() -> None:
        started.wait()
        try:
            for _ in range(1000):
                assert memory.read(0, 16 << 20).count(0) == 16 << 20
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=copy) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait()
    memory.close()
    for thread in threads:
        thread.join()
    assert outcomes == ["the memory is closed"] * 2


def test_types_cannot_be_tampered_with(memory: Memory) -> None:
    with pytest.raises(TypeError):
        type("Sub", (Memory,), {})
    if ".abi3." not in str(_native.__file__):  # the limited API has no immutable types
        with pytest.raises(TypeError):
            Memory.load = None  # type: ignore[assignment, method-assign]
    with pytest.raises(AttributeError):
        memory.other = 1  # type: ignore[attr-defined]


def test_buffers_of_any_kind_are_written(memory: Memory) -> None:
    with mmap.mmap(-1, 4096) as area:
        area[:3] = b"abc"
        memory.write(0, area)
    memory.write(4096, memoryview(b"xdefx")[1:4])
    memory.write(8192, bytearray(b"ghi"))
    assert memory.read(0, 3) + memory.read(4096, 3) + memory.read(8192, 3) == b"abcdefghi"


def test_a_column_of_words(memory: Memory) -> None:
    for at in range(SIZE // 8):
        memory.store(8 * at, at)
    assert memory.load_column(16, 24, 4) == [2, 5, 8, 11]
    assert memory.load_column(0, 8, SIZE // 8) == list(range(SIZE // 8))
    assert memory.load_column(SIZE - 8, 1 << 40, 1) == [SIZE // 8 - 1]
    assert memory.indices_at_least(0, 8, 6, 3) == [3, 4, 5]
    memory.store(32, 2)
    assert memory.indices_at_least(0, 8, 6, 3) == [3, 5]
    assert memory.indices_at_least(0, 16, 4, 1) == [1, 2, 3]
    with pytest.raises(ValueError, match="least out of range"):
        memory.indices_at_least(0, 8, 6, 0)
    assert memory.load_column(0, 8, 0) == []


@pytest.mark.parametrize(
    ("offset", "stride", "count"),
    [(4, 8, 1), (SIZE, 8, 1), (0, 8, SIZE // 8 + 1), (SIZE - 8, 8, 2), (0, 12, 1), (0, 0, 1),
     (0, 1 << 63, 3), (0, 8, 2**64 - 1), (-8, 8, 1)],
)  # fmt: skip
def test_columns_outside_are_refused(memory: Memory, offset: int, stride: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"out of|leave the region"):
        memory.load_column(offset, stride, count)
    with pytest.raises(ValueError, match=r"out of|leave the region"):
        memory.indices_at_least(offset, stride, count, 1)
