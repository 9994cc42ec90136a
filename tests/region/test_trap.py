"""Stores as events: the hook that lets a test stop a peer before any of them."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from itertools import pairwise

import pytest

from ivshmemfs.region import Blocks, Memory
from tests.region.conftest import BLOCK, COUNT, DATA, SIZE, TAGS
from tests.region.model import make_node, pointer


class Stop(BaseException):
    """What a test's callback raises; like an exit, nothing should catch it by chance."""


def stop() -> None:
    raise Stop


FILE = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - for all of them
FILE.write(b"f" * (BLOCK + 100))
FILE.flush()
TWO = [make_node(7, bytes(100)), make_node(7, b"")]
FOUR = b"".join(pointer(block, 7) for block in range(4))

# What each operation does, and how many store events it is.
STORES: list[tuple[str, Callable[[Blocks], object], int]] = [
    ("store", lambda b: b.memory.store(0, 1), 1),
    ("cas that fits", lambda b: b.memory.cas(0, 0, 1), 1),
    ("cas that fails", lambda b: b.memory.cas(0, 1, 2), 1),
    ("write of nothing", lambda b: b.memory.write(0, b""), 0),
    ("small write", lambda b: b.memory.write(3, b"abc"), 2),
    ("one chunk", lambda b: b.memory.write(0, b"x" * 4096), 2),
    ("two chunks", lambda b: b.memory.write(0, b"x" * 4104), 4),
    ("zero", lambda b: b.memory.zero(DATA, 8192), 4),
    ("claim", lambda b: b.claim(5, 9, 10), 5),
    ("claim all", lambda b: b.claim(1000, 9, 10), COUNT - 4),
    ("reclaim", lambda b: b.reclaim(FOUR + bytes(16) + pointer(9, 7) + pointer(8, 7), 9), 2),
    ("release", lambda b: b.release(FOUR + bytes(16)), 4),
    ("release stale", lambda b: b.release(pointer(0, 8)), 1),
    ("scatter one", lambda b: b.scatter(FOUR, b"y"), 2),
    ("scatter all", lambda b: b.scatter(FOUR, b"y" * (4 * BLOCK)), 8),
    ("fill", lambda b: b.fill(FOUR, FILE.fileno(), 0, 2 * BLOCK), 4),
    ("write_node", lambda b: b.write_node(3, make_node(7, bytes(100))), 2),
    ("write_nodes", lambda b: b.write_nodes([FOUR[:16], FOUR[48:]], TWO), 4),
]
IDS = [name for name, _, _ in STORES]
CALLS = [(call, events) for _, call, events in STORES]


@pytest.fixture
def prepared(blocks: Blocks) -> Blocks:
    blocks.claim(4, 7, 0)
    blocks.memory.write(DATA, b"\xee" * BLOCK * COUNT)
    return blocks


def snapshot(memory: Memory) -> bytes:
    return memory.read(0, SIZE)


@pytest.mark.parametrize(("call", "events"), CALLS, ids=IDS)
def test_events_are_counted_without_a_trap(
    prepared: Blocks, call: Callable[[Blocks], object], events: int
) -> None:
    before = prepared.memory.stores
    call(prepared)
    assert prepared.memory.stores - before == events


@pytest.mark.parametrize(("call", "events"), CALLS, ids=IDS)
def test_an_armed_trap_changes_neither_count_nor_result(
    prepared: Blocks, call: Callable[[Blocks], object], events: int
) -> None:
    memory = prepared.memory
    start = snapshot(memory)
    plain = call(prepared)
    after = snapshot(memory)
    memory.write(0, start)
    memory.trap(10**6, stop)
    before = memory.stores
    assert call(prepared) == plain
    assert memory.stores - before == events
    assert snapshot(memory) == after


@pytest.mark.parametrize(("call", "events"), CALLS, ids=IDS)
def test_each_event_is_a_different_moment(
    prepared: Blocks, call: Callable[[Blocks], object], events: int
) -> None:
    memory = prepared.memory
    start = snapshot(memory)
    moments = []
    for after in range(events):
        memory.write(0, start)
        memory.trap(after, lambda: moments.append(snapshot(memory)))
        call(prepared)
    assert len(moments) == events
    if events:
        assert moments[0] == start
    storing = [b for a, b in pairwise(moments) if a == b]
    assert storing == []  # something was stored between any two of them


def test_the_middle_event_finds_half_a_block(prepared: Blocks) -> None:
    memory = prepared.memory
    seen: list[bytes] = []
    memory.trap(3, lambda: seen.append(memory.read(DATA, 2 * BLOCK)))
    prepared.scatter(FOUR, b"\xaa" * (2 * BLOCK))
    assert seen == [b"\xaa" * (BLOCK + BLOCK // 2) + b"\xee" * (BLOCK // 2)]


def test_a_partly_filled_block_is_cut_in_its_middle_too(prepared: Blocks) -> None:
    memory = prepared.memory
    seen: list[bytes] = []
    memory.trap(1, lambda: seen.append(memory.read(DATA, BLOCK)))
    prepared.scatter(FOUR, b"\xaa" * 100)
    half = BLOCK // 2
    assert seen == [(b"\xaa" * 100).ljust(half, b"\0") + b"\xee" * half]
    assert memory.read(DATA, BLOCK) == (b"\xaa" * 100).ljust(BLOCK, b"\0")


@pytest.mark.parametrize(("call", "events"), CALLS, ids=IDS)
def test_a_raising_callback_kills_the_memory_there(
    prepared: Blocks, call: Callable[[Blocks], object], events: int
) -> None:
    if not events:
        return
    memory = prepared.memory
    memory.trap(events - 1, stop)
    with pytest.raises(Stop):
        call(prepared)
    frozen, count = snapshot(memory), memory.stores
    for _, other, other_events in STORES:
        with pytest.raises(Stop, match="dead"):
            other(prepared)
        assert other_events >= 0
    assert snapshot(memory) == frozen  # loads still work, nothing was stored
    assert memory.stores == count


class Picky(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(one, two)


def test_an_exception_that_cannot_be_made_again_becomes_runtime_error(memory: Memory) -> None:
    def raise_picky() -> None:
        raise Picky(1, 2)

    memory.trap(0, raise_picky)
    with pytest.raises(Picky):
        memory.store(0, 1)
    with pytest.raises(RuntimeError, match="the memory is dead"):
        memory.store(0, 1)
    assert memory.load(0) == 0


def test_the_callback_runs_once_and_before_the_store(memory: Memory) -> None:
    seen: list[int] = []
    memory.trap(1, lambda: seen.append(memory.load(8)))
    for value in range(1, 5):
        memory.store(8, value)
    assert seen == [1]
    assert memory.load(8) == 4


def test_a_callback_may_store_and_rearm(memory: Memory) -> None:
    seen: list[int] = []

    def again() -> None:
        seen.append(memory.load(8))
        memory.store(16, 99)
        memory.trap(0, again)

    memory.trap(0, again)
    memory.store(8, 1)
    memory.store(8, 2)
    memory.trap(0, None)
    memory.store(8, 3)
    assert seen == [0, 1]
    assert (memory.load(8), memory.load(16)) == (3, 99)


def test_a_callback_may_close_the_memory(blocks: Blocks) -> None:
    memory = blocks.memory
    memory.trap(1, memory.close)
    blocks.scatter(pointer(0, 7), b"x" * BLOCK)  # what was begun ends
    assert memory.closed
    with pytest.raises(ValueError, match="closed"):
        memory.load(0)


def test_a_callback_may_take_the_block_that_was_about_to_be_claimed(blocks: Blocks) -> None:
    blocks.memory.trap(0, lambda: blocks.claim(1, 8, 0))
    got, cursor = blocks.claim(2, 9, 0)
    assert got == pointer(1, 9) + pointer(2, 9)
    assert cursor == 3
    assert [blocks.tag(block) for block in range(4)] == [8, 9, 9, 0]


# --- loads ----------------------------------------------------------------------------------

LOADS: list[tuple[str, Callable[[Blocks], object], int]] = [
    ("load", lambda b: b.memory.load(0), 1),
    ("load_column", lambda b: b.memory.load_column(0, 64, 3), 3),
    ("indices_at_least", lambda b: b.memory.indices_at_least(0, 64, 3, 1), 3),
    ("read", lambda b: b.memory.read(0, 10_000), 1),
    ("tag", lambda b: b.tag(0), 1),
    ("check", lambda b: b.check(FOUR), 1),
    ("gather", lambda b: b.gather(FOUR, 10, 2 * BLOCK, bytearray(4 * BLOCK)), 4),
    ("read_node", lambda b: b.read_node(3, 7), 2),
    ("free_count", lambda b: b.free_count(), 1),
]


@pytest.mark.parametrize(
    ("call", "events"), [(c, e) for _, c, e in LOADS], ids=[name for name, _, _ in LOADS]
)
def test_loads_are_events_only_when_asked(
    prepared: Blocks, call: Callable[[Blocks], object], events: int
) -> None:
    prepared.write_node(3, make_node(7, b"abc"))
    memory = prepared.memory
    stores = memory.stores
    memory.trap(0, stop)
    plain = call(prepared)
    assert memory.stores == stores
    seen = []
    for after in range(events + 1):
        memory.trap(after, lambda: seen.append(1), loads=True)
        assert call(prepared) == plain
        memory.trap(0, None)
    assert len(seen) == events


def test_a_gather_that_is_overtaken_before_its_check_is_stale(prepared: Blocks) -> None:
    into = bytearray(2 * BLOCK)
    prepared.memory.trap(2, lambda: prepared.release(FOUR), loads=True)
    assert not prepared.gather(FOUR, 0, 2 * BLOCK, into)


def test_a_node_that_is_overtaken_between_header_and_rest_is_stale(prepared: Blocks) -> None:
    prepared.write_node(0, make_node(7, bytes(64)))
    prepared.memory.trap(1, lambda: prepared.release(FOUR), loads=True)
    assert prepared.read_node(0, 7) is None


def test_a_node_that_grows_between_header_and_rest_is_judged_by_its_first_size(
    prepared: Blocks,
) -> None:
    prepared.write_node(0, make_node(7, bytes(64)))

    def grow() -> None:
        prepared.memory.write(DATA + 8, struct.pack("<I", 10**9))

    prepared.memory.trap(1, grow, loads=True)
    node = prepared.read_node(0, 7)
    assert node is not None
    assert len(node) == 96
    assert node[8:12] == struct.pack("<I", 96)


def test_bad_arguments_do_not_disarm(memory: Memory) -> None:
    seen: list[int] = []
    memory.trap(0, lambda: seen.append(1))
    with pytest.raises(TypeError, match="callable"):
        memory.trap(0, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="after"):
        memory.trap(-1, stop)
    memory.store(0, 1)
    assert seen == [1]


def test_blocks_share_their_memorys_trap(memory: Memory) -> None:
    one = Blocks(memory, TAGS, DATA, BLOCK, COUNT)
    memory.trap(1, stop)
    memory.store(0, 1)
    with pytest.raises(Stop):
        one.claim(1, 5, 0)
    assert one.free_count() == COUNT
