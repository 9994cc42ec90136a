"""Blocks: claims, copies, nodes, marking and sweeping."""

from __future__ import annotations

import os
import platform
import re
import resource
import struct
import tempfile
from collections.abc import Sequence

import pytest

from ivshmemfs.format.words import MAX_BLOCKS
from ivshmemfs.native import packed_node
from ivshmemfs.region import Blocks, Memory
from tests.region.conftest import BLOCK, COUNT, DATA, SIZE, TAGS, Place
from tests.region.contract import PAGE, RUNS, BlocksContract
from tests.region.model import NULL, TAG, make_node, pointer, table, unpack


class TestContract(BlocksContract):
    pass


# --- claim and release ----------------------------------------------------------------------


def test_claims_are_packed_pointers_in_order(blocks: Blocks) -> None:
    got, cursor = blocks.claim(3, TAG, 10)
    assert got == pointer(10, TAG) + pointer(11, TAG) + pointer(12, TAG)
    assert cursor == 13
    assert blocks.tag(11) == TAG
    assert blocks.memory.load(TAGS + 8 * 12) == TAG
    assert blocks.free_count() == COUNT - 3


def test_free_blocks_are_counted_in_ranges(blocks: Blocks) -> None:
    blocks.claim(3, TAG, 10)
    assert [blocks.free_count(start, start + 2) for start in (8, 10, 12)] == [2, 0, 1]
    assert blocks.free_count(start=12) == COUNT - 13
    assert blocks.free_count(COUNT) == 0
    for start, stop in ((2, 1), (0, COUNT + 1), (COUNT + 1, COUNT + 1)):
        with pytest.raises(ValueError, match=f"the region has {COUNT}"):
            blocks.free_count(start, stop)
    for wrong in (-1, "1", None):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            blocks.free_count(wrong)  # type: ignore[arg-type]


def test_claims_wrap_around_and_skip_what_is_taken(blocks: Blocks) -> None:
    blocks.claim(1, 5, COUNT - 1)
    got, cursor = blocks.claim(3, TAG, COUNT - 2)
    assert [block for block, _ in unpack(got)] == [COUNT - 2, 0, 1]
    assert cursor == 2


def test_claiming_nothing_changes_nothing(blocks: Blocks) -> None:
    assert blocks.claim(0, TAG, 7) == (b"", 7)
    assert blocks.free_count() == COUNT


def test_reclaiming_takes_those_of_the_blocks_that_are_free(blocks: Blocks) -> None:
    blocks.claim(1, 5, 8)
    wanted = pointer(9, 1) + NULL + pointer(8, 1) + pointer(9, 2) + pointer(3, 1)
    assert blocks.reclaim(wanted, TAG) == pointer(9, TAG) + pointer(3, TAG)
    assert (blocks.tag(0), blocks.tag(3), blocks.tag(8), blocks.tag(9)) == (0, TAG, 5, TAG)
    assert blocks.reclaim(b"", TAG) == b""


def test_reclaiming_the_last_cuts_them_off(blocks: Blocks) -> None:
    blocks.claim(1, 5, 8)
    known = bytearray(pointer(4, 1) + pointer(9, 1) + NULL + pointer(8, 1) + pointer(3, 1))
    assert blocks.reclaim_last(known, 4, TAG) == [pointer(9, TAG), pointer(3, TAG)]
    assert known == pointer(4, 1)
    assert blocks.reclaim_last(known, 0, TAG) == []
    assert blocks.reclaim_last(known, 2**63, TAG) == [pointer(4, TAG)]
    assert blocks.reclaim_last(known, 1, TAG) == []
    with pytest.raises(TypeError):
        blocks.reclaim_last(b"", 1, TAG)  # type: ignore[arg-type]


@pytest.mark.parametrize("cursor", [-1, COUNT, 2**64])
def test_a_cursor_outside_is_refused(blocks: Blocks, cursor: int) -> None:
    with pytest.raises(ValueError, match=r"cursor|outside"):
        blocks.claim(1, TAG, cursor)
    assert blocks.free_count() == COUNT


@pytest.mark.parametrize("tag", [0, -1, 2**64])
def test_an_impossible_tag_is_refused(blocks: Blocks, tag: int) -> None:
    with pytest.raises(ValueError, match="tag"):
        blocks.claim(1, tag, 0)
    with pytest.raises(ValueError, match="tag"):
        blocks.reclaim(pointer(0, 1), tag)
    with pytest.raises(ValueError, match="tag"):
        blocks.reclaim_last(bytearray(pointer(0, 1)), 1, tag)


# --- pointers -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [COUNT, COUNT + 1, 2**31, 2**32 - 1])
def test_pointers_that_lead_outside_are_refused_by_value(blocks: Blocks, block: int) -> None:
    wrong = pointer(0, 1) + pointer(block, 1)
    for call in (
        lambda: blocks.reclaim(wrong, TAG),
        lambda: blocks.reclaim_last(bytearray(wrong), 2, TAG),
        lambda: blocks.release(wrong),
        lambda: blocks.check(wrong),
        lambda: blocks.gather(wrong, 0, 1, bytearray(1)),
        lambda: blocks.scatter(wrong, b"x"),
        lambda: blocks.fill(wrong, 0, 0, 1),
        lambda: blocks.drain(wrong, 0, 1, 0, 0),
        lambda: blocks.mark(wrong, bytearray(8 * COUNT)),
        lambda: blocks.tag(block),
        lambda: blocks.read_node(block, 1),
        lambda: blocks.write_node(block, make_node(1, b"")),
        lambda: blocks.overwrite(block, 0, b"x"),
    ):
        with pytest.raises(ValueError, match=f"block {block} is outside"):
            call()
    assert blocks.memory.is_zero(0, SIZE)


@pytest.mark.parametrize("length", [1, 15, 17])
def test_pointers_of_odd_length_are_refused(blocks: Blocks, length: int) -> None:
    for call in (
        lambda: blocks.release(bytes(length)),
        lambda: blocks.check(bytes(length)),
        lambda: blocks.gather(bytes(length), 0, 0, bytearray()),
        lambda: blocks.scatter(bytes(length), b""),
        lambda: blocks.mark(bytes(length), bytearray(8 * COUNT)),
    ):
        with pytest.raises(ValueError, match="16 bytes each"):
            call()


def test_null_pointers_may_hold_any_block_number(blocks: Blocks) -> None:
    odd = struct.pack("<IIQ", 2**32 - 1, 5, 0)
    into = bytearray(b"x" * BLOCK)
    assert blocks.check(odd)
    assert blocks.release(odd) == 0
    assert blocks.gather(odd, 0, BLOCK, into)
    assert into == bytes(BLOCK)


# --- changes in place -----------------------------------------------------------------------


def test_an_overwrite_changes_its_bytes_and_no_others(blocks: Blocks) -> None:
    everything = (bytes(range(1, 256)) * (COUNT * BLOCK))[: COUNT * BLOCK]
    blocks.claim(COUNT, TAG, 0)
    whole = b"".join(pointer(at, TAG) for at in range(COUNT))
    for skip, length in ((0, 1), (3, 2), (7, BLOCK), (BLOCK - 1, 2), (1, 5 * BLOCK), (0, 0)):
        for at in range(COUNT):
            blocks.overwrite(at, 0, everything[at * BLOCK : (at + 1) * BLOCK])
        start, new = 2 * BLOCK + skip, b"\0" * length
        assert blocks.overwrite(2, skip, new)
        got = bytearray(COUNT * BLOCK)
        assert blocks.gather(whole, 0, len(got), got)
        assert got == everything[:start] + new + everything[start + length :]


@pytest.mark.parametrize(
    ("block", "skip", "length"),
    [
        (COUNT - 1, 0, BLOCK + 1),
        (COUNT - 1, BLOCK, 1),
        (0, COUNT * BLOCK, 1),
        (0, COUNT * BLOCK + 1, 0),
        (COUNT - 1, 2**64 - BLOCK, BLOCK),
    ],
)
def test_an_overwrite_beyond_the_last_block_is_refused(
    blocks: Blocks, block: int, skip: int, length: int
) -> None:
    with pytest.raises(ValueError, match="leave the region"):
        blocks.overwrite(block, skip, bytes(length))
    assert blocks.memory.is_zero(0, SIZE)


def test_an_overwrite_stops_when_the_guard_changes(blocks: Blocks) -> None:
    blocks.guard(0, 7)
    assert not blocks.overwrite(0, 0, b"stale")
    blocks.memory.store(0, 7)
    assert blocks.overwrite(0, 0, b"good")
    blocks.guard(0, 0)


# --- gather and scatter ---------------------------------------------------------------------


def test_blocks_are_filled_while_the_guard_stands(blocks: Blocks) -> None:
    """It is looked at before each block, and not at all without one."""
    memory, word = blocks.memory, 8
    got, _ = blocks.claim(4, TAG, 0)
    memory.store(word, 77)
    blocks.guard(word, 77)
    assert blocks.scatter(got, b"a" * 4 * BLOCK) is True
    memory.trap(3, lambda: memory.store(word, 78))  # a block is two events
    assert blocks.scatter(got, b"b" * 4 * BLOCK) is False
    assert [memory.read(DATA + BLOCK * at, 1) for at in range(4)] == [b"b", b"b", b"a", b"a"]
    node = make_node(TAG, b"node")
    assert blocks.write_node(2, node) is False
    assert memory.read(DATA + BLOCK * 2, 1) == b"a"
    memory.store(word, 77)
    assert blocks.write_node(2, node) is True
    memory.store(word, 78)
    blocks.guard(0, 0)
    assert blocks.scatter(got, b"c" * BLOCK) is True
    for offset in (3, SIZE, SIZE - 4, 2**64 - 8):
        with pytest.raises(ValueError, match="no word"):
            blocks.guard(offset, 1)


def test_scatter_leaves_blocks_it_does_not_need_alone(blocks: Blocks) -> None:
    got, _ = blocks.claim(3, TAG, 0)
    blocks.memory.write(DATA + BLOCK, b"\xff" * 2 * BLOCK)
    blocks.scatter(got, b"x" * BLOCK)
    blocks.scatter(got, b"")
    assert blocks.memory.read(DATA, 3 * BLOCK) == b"x" * BLOCK + b"\xff" * 2 * BLOCK


def test_scatter_refuses_nulls_and_what_does_not_fit(blocks: Blocks) -> None:
    with pytest.raises(ValueError, match="pointer 1 is null"):
        blocks.scatter(pointer(0, 1) + NULL, b"x")
    with pytest.raises(ValueError, match="do not fit"):
        blocks.scatter(pointer(0, 1), b"x" * (BLOCK + 1))
    assert blocks.memory.is_zero(0, SIZE)


def test_gather_notices_only_the_stale_blocks_it_touched(blocks: Blocks) -> None:
    got, _ = blocks.claim(3, TAG, 0)
    blocks.release(got[16:32])
    into = bytearray(3 * BLOCK)
    assert blocks.gather(got, 0, BLOCK, into)
    assert blocks.gather(got, 2 * BLOCK, BLOCK, into)
    assert not blocks.gather(got, BLOCK - 1, 2, into)
    assert not blocks.gather(got, 2 * BLOCK - 1, 1, into)
    assert blocks.gather(got, BLOCK, 0, into)
    assert not blocks.check(got)
    assert blocks.check(got[:16] + got[32:])


@pytest.mark.parametrize(
    ("skip", "length", "at"),
    [(BLOCK, 1, 0), (0, BLOCK + 1, 0), (2**64 - 1, 2, 0), (0, 2**64 - 1, 0), (0, 11, 0),
     (0, 1, 10), (0, 5, 2**64 - 1), (-1, 1, 0), (0, -1, 0), (0, 1, -1)],
)  # fmt: skip
def test_gather_outside_is_refused(blocks: Blocks, skip: int, length: int, at: int) -> None:
    into = bytearray(10)
    with pytest.raises(ValueError, match=r"more than|do not fit|out of range"):
        blocks.gather(pointer(0, 1), skip, length, into, at)
    assert into == bytes(10)


def test_gather_needs_a_writable_buffer(blocks: Blocks) -> None:
    with pytest.raises(BufferError):
        blocks.gather(pointer(0, 1), 0, 1, b"x")


@pytest.mark.parametrize("order", RUNS, ids=["one", "three", "backwards"])
@pytest.mark.parametrize("odd", [0, 1, 77])
def test_runs_of_blocks_are_copied_like_single_ones(
    memory: Memory, order: Sequence[int], odd: int
) -> None:
    blocks = Blocks(memory, TAGS, DATA, PAGE, 48)
    got = b"".join(blocks.claim(1, TAG, block)[0] for block in order)
    length = len(order) * PAGE - odd
    for _ in range(3):  # cold at first, warm later
        memory.write(DATA, b"\xee" * 48 * PAGE)
        source = memoryview(os.urandom(odd + length))[odd:]
        blocks.scatter(got, source)
        padded = bytes(source) + bytes(odd)
        for place, block in enumerate(order):
            piece = memory.read(DATA + block * PAGE, PAGE)
            assert piece == padded[place * PAGE : (place + 1) * PAGE]
        for block in {*range(48)} - {*order}:
            assert memory.read(DATA + block * PAGE, PAGE) == b"\xee" * PAGE
        into = bytearray(length)
        assert blocks.gather(got, 100, length - 100, into, at=odd)
        assert into[odd : odd + length - 100] == source[100:]


def test_what_is_wrong_with_the_file_is_said(blocks: Blocks, file: int) -> None:
    got, _ = blocks.claim(1, TAG, 0)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="space"):
        blocks.drain(got, 0, BLOCK, full.fileno(), 0)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="seek"):
        blocks.fill(got, reader, 0, BLOCK)
    with pytest.raises(OSError, match="seek"):
        blocks.drain(got, 0, BLOCK, writer, 0)
    os.close(reader)
    os.close(writer)
    for wrong in (-1, 2**31, 2**64):
        with pytest.raises(ValueError, match="file"):
            blocks.fill(got, wrong, 0, 1)
        with pytest.raises(ValueError, match="at "):
            blocks.fill(got, file, wrong if wrong != 2**31 else 2**63, 1)
    with pytest.raises(ValueError, match="do not fit"):
        blocks.fill(got, file, 0, BLOCK + 1)
    with pytest.raises(ValueError, match="more than"):
        blocks.drain(got, 1, BLOCK, file, 0)
    with pytest.raises(ValueError, match="null"):
        blocks.fill(NULL, file, 0, 1)


def test_nothing_is_filled_once_the_guard_changed(blocks: Blocks, file: int) -> None:
    got, _ = blocks.claim(2, TAG, 0)
    os.pwrite(file, b"x" * BLOCK, 0)
    blocks.guard(0, 5)
    assert blocks.fill(got, file, 0, BLOCK) == -1
    assert blocks.memory.is_zero(DATA, 2 * BLOCK)
    blocks.memory.store(0, 5)
    assert blocks.fill(got, file, 0, BLOCK) == BLOCK
    assert blocks.memory.read(DATA, BLOCK) == b"x" * BLOCK


def test_a_long_run_in_a_fresh_mapping_takes_few_page_faults(place: Place) -> None:
    release = tuple(int(word) for word in re.findall(r"\d+", platform.release())[:2])
    if release < (5, 14):
        pytest.skip("this kernel cannot map pages ahead of their use")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(5 << 20))
        file.flush()
        blocks = Blocks(Memory(file.fileno(), 5 << 20), 0, 1 << 20, PAGE, 1024)
    got, _ = blocks.claim(1024, TAG, 0)
    data = os.urandom(1024 * PAGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks.scatter(got, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 512
    assert blocks.memory.read(1 << 20, 1024 * PAGE) == data


# --- nodes ----------------------------------------------------------------------------------


def test_a_node_longer_than_a_page_comes_back(place: Place) -> None:
    blocks = Blocks(place.map(), 4096, 65536, 65536, 2)
    blocks.claim(1, TAG, 1)
    node = make_node(TAG, os.urandom(60_000))
    blocks.write_node(1, node)
    assert (blocks.read_node(1, TAG) or b"")[4:] == node[4:]


def test_a_stale_node_is_none_whatever_it_holds(blocks: Blocks) -> None:
    assert blocks.read_node(4, TAG) is None
    blocks.claim(1, TAG + 1, 4)
    blocks.memory.write(DATA + 4 * BLOCK, b"\xff" * BLOCK)
    assert blocks.read_node(4, TAG) is None
    with pytest.raises(ValueError, match="tag 0"):
        blocks.read_node(4, 0)


@pytest.mark.parametrize("used", [0, 31, BLOCK + 1, 2**32 - 1])
def test_an_impossible_size_in_a_node_is_named(blocks: Blocks, used: int) -> None:
    blocks.claim(1, TAG, 4)
    blocks.write_node(4, make_node(TAG, bytes(50)))
    blocks.memory.write(DATA + 4 * BLOCK + 8, struct.pack("<I", used))
    with pytest.raises(ValueError, match=f"block 4: used size {used} is not"):
        blocks.read_node(4, TAG)


@pytest.mark.parametrize("at", [0, 3, 4, 12, 24, 32, 81])
def test_any_changed_byte_of_a_node_is_noticed(blocks: Blocks, at: int) -> None:
    blocks.claim(1, TAG, 4)
    blocks.write_node(4, make_node(TAG, bytes(50)))
    where = DATA + 4 * BLOCK + at
    blocks.memory.write(where, bytes([blocks.memory.read(where, 1)[0] ^ 1]))
    with pytest.raises(ValueError, match="block 4: checksum"):
        blocks.read_node(4, TAG)


def test_a_node_of_another_claim_is_noticed(blocks: Blocks) -> None:
    blocks.claim(1, TAG, 4)
    blocks.write_node(4, make_node(TAG + 1, b"abc"))
    with pytest.raises(ValueError, match="block 4: node names another claim"):
        blocks.read_node(4, TAG)


@pytest.mark.parametrize("size", [0, 31, BLOCK + 1])
def test_a_node_of_impossible_size_is_not_written(blocks: Blocks, size: int) -> None:
    with pytest.raises(ValueError, match="a node has 32 to 512 bytes"):
        blocks.write_node(0, bytes(size))
    assert blocks.memory.is_zero(0, SIZE)


# --- mark and sweep -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (0, True),  # there is no such slot
        ((1 << 56) | (2 << 36) | 1, False),  # number 1 is not below 1
        ((1 << 56) | (2 << 36) | 2, True),
        ((1 << 56) | (1 << 36) | 9, False),  # taken after the limits were read
        ((1 << 56) | (3 << 36) | 0, True),  # the slot has moved on
        ((1 << 56) | ((2 + 2**19 - 1) << 36), True),
        ((1 << 56) | ((2 + 2**19) << 36), False),  # incarnations count in a circle
        ((255 << 56) | (2 << 36) | 0, False),  # the state byte means nothing here
    ],
)
def test_a_limit_decides_what_is_settled(blocks: Blocks, limit: int, found: bool) -> None:
    got, _ = blocks.claim(1, TAG, 0)
    limits = [0] * 256
    limits[3] = limit
    swept = blocks.sweep(bytes(8 * COUNT), table(limits), 0, COUNT)
    assert swept == (got if found else b"")


def test_a_mark_of_an_older_claim_does_not_save_a_block(blocks: Blocks) -> None:
    got, _ = blocks.claim(1, TAG, 0)
    marks = bytearray(8 * COUNT)
    blocks.mark(pointer(0, TAG - 1), marks)
    assert blocks.sweep(marks, bytes(2048), 0, COUNT) == got


def test_wrong_tables_and_ranges_are_refused(blocks: Blocks) -> None:
    marks, limits = bytes(8 * COUNT), bytes(2048)
    for arguments in (
        (marks[:-8], limits, 0, 1),
        (marks, limits + b"x", 0, 1),
        (marks, limits, 0, COUNT + 1),
        (marks, limits, 2, 1),
        (marks, limits, -1, 1),
    ):
        with pytest.raises(ValueError, match=r"must be|outside|out of range"):
            blocks.sweep(*arguments)
    with pytest.raises(ValueError, match="marks must be"):
        blocks.mark(b"", bytearray(8))
    with pytest.raises(BufferError):
        blocks.mark(b"", marks)


# --- where the tables are -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((4, DATA, BLOCK, COUNT), "tags_offset"),
        ((SIZE, DATA, BLOCK, COUNT), "tags_offset"),
        ((SIZE - 8 * COUNT + 8, DATA, BLOCK, COUNT), "tags_offset"),
        ((2**64 - 8, DATA, BLOCK, COUNT), "tags_offset"),
        ((TAGS, DATA + 4, BLOCK, COUNT), "data_offset"),
        ((TAGS, SIZE - 8, BLOCK, COUNT), "data_offset"),
        ((TAGS, DATA, 2**63, COUNT), "data_offset"),
        ((TAGS, DATA, 2**64 - 8, 3), "data_offset"),
        ((TAGS, DATA, 0, COUNT), "block_size"),
        ((TAGS, DATA, 24, COUNT), "block_size"),
        ((TAGS, DATA, 33, COUNT), "block_size"),
        ((TAGS, DATA, -512, COUNT), "block_size"),
        ((TAGS, DATA, BLOCK, 0), "block_count"),
        ((TAGS, DATA, BLOCK, MAX_BLOCKS + 1), "block_count"),
        ((TAGS, DATA, BLOCK, MAX_BLOCKS), "tags_offset"),
        ((TAGS, DATA, BLOCK, 2**64), "block_count"),
    ],
)
def test_impossible_tables_are_refused(
    place: Place, arguments: tuple[int, int, int, int], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        Blocks(place.map(), *arguments)


def test_tables_may_fill_the_region_to_its_last_byte(place: Place) -> None:
    blocks = Blocks(place.map(), SIZE - 8 * COUNT, 0, 512, COUNT)
    got, _ = blocks.claim(COUNT, TAG, 0)
    blocks = Blocks(place.map(), 0, SIZE - 512 * COUNT, 512, COUNT)
    blocks.scatter(got, b"z" * 512 * COUNT)
    assert blocks.memory.read(SIZE - 1, 1) == b"z"


def test_blocks_need_a_memory_and_keep_it(place: Place) -> None:
    with pytest.raises(TypeError):
        Blocks("memory", TAGS, DATA, BLOCK, COUNT)  # type: ignore[arg-type]
    blocks = Blocks(place.map(), TAGS, DATA, BLOCK, COUNT)
    assert isinstance(blocks.memory, Memory)
    assert (blocks.block_size, blocks.block_count) == (BLOCK, COUNT)
    blocks.memory.close()
    for call in (
        lambda: blocks.claim(1, TAG, 0),
        lambda: blocks.free_count(),
        lambda: blocks.read_node(0, TAG),
        lambda: blocks.tag(0),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_readonly_memory_lets_blocks_be_read_only(place: Place) -> None:
    Blocks(place.map(), TAGS, DATA, BLOCK, COUNT).claim(1, TAG, 0)
    blocks = Blocks(place.map(writable=False), TAGS, DATA, BLOCK, COUNT)
    got = pointer(0, TAG)
    for call in (
        lambda: blocks.claim(1, TAG, 0),
        lambda: blocks.release(got),
        lambda: blocks.scatter(got, b"x"),
        lambda: blocks.write_node(0, make_node(TAG, b"")),
    ):
        with pytest.raises(OSError, match="read-only"):
            call()
    assert blocks.check(got)
    assert blocks.gather(got, 0, BLOCK, bytearray(BLOCK))


# --- several nodes --------------------------------------------------------------------------


def test_several_nodes_are_written_in_one_call(blocks: Blocks) -> None:
    places = [pointer(block, TAG) for block in (5, 2, 9)]
    sizes = (0, 7, BLOCK - 32)
    nodes = [packed_node(at, 2, 0, 7, 0, bytes(n)) for at, n in zip(places, sizes, strict=True)]
    blocks.claim(COUNT, TAG, 0)
    assert blocks.write_nodes(places, nodes) is True
    for place, node in zip((5, 2, 9), nodes, strict=True):
        assert blocks.read_node(place, TAG) == node
    assert blocks.write_nodes([], []) is True


def test_nodes_stop_where_the_guard_changes(blocks: Blocks) -> None:
    memory, word = blocks.memory, 8
    memory.store(word, 77)
    blocks.guard(word, 77)
    memory.write(DATA, bytes(BLOCK * 3))
    memory.trap(3, lambda: memory.store(word, 78))  # a block is two events
    places = [pointer(block, TAG) for block in range(3)]
    assert blocks.write_nodes(places, [make_node(TAG, b"")] * 3) is False
    assert [memory.is_zero(DATA + BLOCK * at, BLOCK) for at in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("pointers", "nodes"),
    [
        ([pointer(COUNT, TAG)], [make_node(TAG, b"")]),
        ([NULL], [make_node(TAG, b"")]),
        ([pointer(0, TAG) * 2], [make_node(TAG, b"")]),
        ([b""], [make_node(TAG, b"")]),
        ([pointer(0, TAG)], [bytes(31)]),
        ([pointer(0, TAG)], [bytes(BLOCK + 1)]),
    ],
)
def test_nodes_that_do_not_fit_are_refused(
    blocks: Blocks, pointers: list[bytes], nodes: list[bytes]
) -> None:
    before = blocks.memory.read(0, SIZE)
    with pytest.raises(ValueError, match=r"block|pointer|node"):
        blocks.write_nodes(pointers, nodes)
    assert blocks.memory.read(0, SIZE) == before


def test_nodes_come_in_lists_of_one_length(blocks: Blocks) -> None:
    for pointers, nodes in (([NULL], []), (b"", []), ([], None)):
        with pytest.raises(TypeError, match="lists of one length"):
            blocks.write_nodes(pointers, nodes)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        blocks.write_nodes([pointer(0, TAG)], ["text"])  # type: ignore[list-item]
