"""A region that vanishes under a mapping costs an error, never the process."""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

import pytest

from ivshmemfs.region import Blocks, Memory
from tests.region.conftest import BLOCK, COUNT, DATA, SIZE, TAGS, Place
from tests.region.model import make_node, pointer


def gone(place: Place, call: Callable[[], object], length: int = 0) -> OSError:
    """Truncate the file, then see the call fail with EIO."""
    os.truncate(place.path, length)
    with pytest.raises(OSError, match="bus error") as caught:
        call()
    assert caught.value.errno == errno.EIO
    return caught.value


WORDS_AND_RANGES: list[Callable[[Memory], object]] = [
    lambda m: m.load(8192),
    lambda m: m.store(8192, 1),
    lambda m: m.cas(8192, 0, 1),
    lambda m: m.read(8192, 10),
    lambda m: m.read(0, SIZE),
    lambda m: m.write(8192, b"abc"),
    lambda m: m.write(0, bytes(SIZE)),
    lambda m: m.zero(0, SIZE),
    lambda m: m.is_zero(0, SIZE),
]


@pytest.mark.parametrize("index", range(len(WORDS_AND_RANGES)))
def test_every_access_survives(place: Place, memory: Memory, index: int) -> None:
    call = WORDS_AND_RANGES[index]
    gone(place, lambda: call(memory))
    with pytest.raises(OSError, match="bus error"):
        call(memory)  # and again: nothing stays blocked
    os.truncate(place.path, SIZE)
    call(memory)
    assert memory.load(0) == 0


FILE = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - for all of them
FILE.write(bytes(BLOCK))
FILE.flush()

BLOCK_CALLS: list[Callable[[Blocks], object]] = [
    lambda b: b.claim(3, 5, 0),
    lambda b: b.reclaim(pointer(0, 5), 5),
    lambda b: b.release(pointer(0, 9)),
    lambda b: b.tag(0),
    lambda b: b.check(pointer(0, 9)),
    lambda b: b.gather(pointer(0, 9), 0, BLOCK, bytearray(BLOCK)),
    lambda b: b.scatter(pointer(0, 9), b"abc"),
    lambda b: b.fill(pointer(0, 9), FILE.fileno(), 0, BLOCK),
    lambda b: b.drain(pointer(0, 9), 0, BLOCK, FILE.fileno(), 0),
    lambda b: b.read_node(0, 9),
    lambda b: b.write_node(0, make_node(9, b"")),
    lambda b: b.write_nodes([pointer(0, 9)], [make_node(9, b"")]),
    lambda b: b.memory.load_column(TAGS, 8, 3),
    lambda b: b.memory.indices_at_least(TAGS, 8, 3, 1),
    lambda b: b.free_count(),
    lambda b: b.sweep(bytes(8 * COUNT), bytes(8 * 256), 0, COUNT),
]


@pytest.mark.parametrize("index", range(len(BLOCK_CALLS)))
def test_every_block_operation_survives(place: Place, blocks: Blocks, index: int) -> None:
    gone(place, lambda: BLOCK_CALLS[index](blocks))
    os.truncate(place.path, SIZE)
    BLOCK_CALLS[index](blocks)
    assert blocks.memory.load(0) == 0


def test_the_message_names_the_offset(place: Place) -> None:
    memory = place.map()
    assert "offset 0x3008" in str(gone(place, lambda: memory.load(0x3008), 4096))
    assert memory.load(4088) == 0  # what is left of the file still works


def test_trapped_stores_survive_as_well(place: Place) -> None:
    memory = place.map()
    seen: list[int] = []

    def vanish() -> None:
        seen.append(1)
        os.truncate(place.path, 0)

    memory.trap(0, vanish)
    with pytest.raises(OSError, match="bus error"):
        memory.write(4096, b"abc")
    assert seen == [1]
    memory.trap(100, lambda: None)
    with pytest.raises(OSError, match="bus error"):
        memory.write(4096, bytes(8192))


def test_a_blocks_data_can_vanish_while_its_tags_stay(place: Place) -> None:
    blocks = Blocks(place.map(), TAGS, DATA, BLOCK, COUNT)
    got, _ = blocks.claim(1, 7, 0)
    os.truncate(place.path, DATA)
    assert blocks.tag(0) == 7
    with pytest.raises(OSError, match=f"offset {DATA:#x}"):
        blocks.gather(got, 0, 8, bytearray(8))


def test_many_threads_fault_at_once(place: Place) -> None:
    memory = place.map()
    os.truncate(place.path, 0)
    caught: list[int] = []

    def fault() -> None:
        for _ in range(200):
            with pytest.raises(OSError, match="bus error"):
                memory.read(0, SIZE)
            with pytest.raises(OSError, match="bus error"):
                memory.load(0)
            caught.append(1)

    threads = [threading.Thread(target=fault) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caught) == 800


def test_a_fault_in_the_callers_buffer_is_survived(place: Place) -> None:
    memory = place.map()
    other = place.path.with_name("other")
    other.write_bytes(bytes(8192))
    with other.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as area:
        os.truncate(other, 0)
        with pytest.raises(OSError, match="outside the region"):
            memory.write(0, area)


CHILD = """
import mmap, os, sys, faulthandler, signal
mode, path = sys.argv[1:]
if mode == "early":
    faulthandler.enable()
from ivshmemfs.region import Memory
descriptor = os.open(path, os.O_RDWR)
memory = Memory(descriptor, 8192)
if mode == "late":
    faulthandler.enable()
    memory = Memory(descriptor, 8192)
if mode == "signal":
    os.kill(os.getpid(), signal.SIGBUS)
area = mmap.mmap(descriptor, 8192)
os.truncate(path, 0)
try:
    memory.load(0)
except OSError as error:
    print(error.errno, flush=True)
area[0]
"""


@pytest.mark.parametrize("mode", ["early", "late", "without", "signal"])
def test_a_foreign_fault_still_ends_the_process(place: Place, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode, str(place.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -7  # SIGBUS
    assert done.stdout == ("" if mode == "signal" else "5\n")
    if mode in ("early", "late"):
        assert "Bus error" in done.stderr


def test_faulthandler_may_come_after_us(place: Place) -> None:
    faulthandler.enable()
    memory = place.map()  # takes the signal back
    gone(place, lambda: memory.load(0))
