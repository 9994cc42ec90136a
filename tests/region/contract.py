"""What holds for every memory, made of a file or of a device's registers, and for blocks in it.

Test modules derive a class from each contract.  The fixtures `memory` and `blocks` of that module,
or of its folder, say on which memory it is tried.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmemfs.region import Blocks, Memory, crc32c
from tests.region.conftest import BLOCK, COUNT, DATA, PATIENT, SIZE, TAGS
from tests.region.model import NULL, TAG, ModelBlocks, make_node, pointer, table, unpack

PAGE = 4096
RUNS = [
    range(3, 43),  # one run
    [*range(30, 40), *range(5), *range(10, 30)],
    range(40, 4, -1),  # none longer than a block
]


class MemoryContract:
    """Words and ranges."""

    @pytest.mark.parametrize("value", [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
    @pytest.mark.parametrize("offset", [0, 8, 4096, SIZE - 8])
    def test_a_stored_word_is_loaded_little_endian(
        self, memory: Memory, offset: int, value: int
    ) -> None:
        memory.store(offset, value)
        assert memory.load(offset) == value
        assert memory.read(offset, 8) == value.to_bytes(8, "little")

    def test_cas_returns_what_was_there_and_stores_only_on_a_match(self, memory: Memory) -> None:
        memory.store(64, 5)
        assert memory.cas(64, 4, 9) == 5
        assert memory.load(64) == 5
        assert memory.cas(64, 5, 2**64 - 1) == 5
        assert memory.cas(64, 2**64 - 1, 0) == 2**64 - 1
        assert memory.load(64) == 0
        assert memory.is_zero(0, SIZE)

    def test_waiting_ends_when_another_thread_stores(self, memory: Memory) -> None:
        memory.store(64, 5)
        assert memory.await_change(64, 4, 1, 1 << 40) == 5  # it differs already
        assert memory.await_change(64, 5, 1, 3) == 5  # it never came
        storing = threading.Timer(0.02, memory.store, (64, 6))
        storing.start()
        assert memory.await_change(64, 5, 100_000, 1 << 40) == 6
        storing.join()

    @pytest.mark.parametrize("offset", [*range(17), SIZE - 100])
    @pytest.mark.parametrize("length", [*range(18), 31, 63, 64, 65, 96])
    def test_any_range_is_written_and_read_exactly(
        self, memory: Memory, offset: int, length: int
    ) -> None:
        data = bytes(range(1, length + 1))
        memory.write(offset, data)
        assert memory.read(offset, length) == data
        assert memory.is_zero(0, offset)
        assert memory.is_zero(offset + length, SIZE - offset - length)

    @pytest.mark.parametrize("offset", range(9))
    @pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 300, 5000])
    def test_zero_clears_exactly_its_range(self, memory: Memory, offset: int, length: int) -> None:
        memory.write(0, b"\xff" * 8192)
        memory.zero(offset, length)
        assert memory.read(0, 8192) == (b"\xff" * offset + bytes(length)).ljust(8192, b"\xff")

    @pytest.mark.parametrize("at", [0, 1, 4095, 4096, 9999])
    def test_is_zero_sees_a_single_bit(self, memory: Memory, at: int) -> None:
        memory.write(100 + at, b"\x80")
        assert not memory.is_zero(100, 10_000)
        assert memory.is_zero(100, at)
        assert memory.is_zero(101 + at, 10_000)

    def test_large_ranges_survive_releasing_the_lock(self, memory: Memory) -> None:
        data = os.urandom(SIZE - 13)
        memory.write(13, data)
        assert memory.read(13, len(data)) == data

    @settings(PATIENT, max_examples=60)
    @given(
        st.lists(
            st.tuples(st.integers(0, 200), st.binary(max_size=150), st.booleans()), max_size=20
        )
    )
    def test_writes_and_zeros_equal_a_bytearray(
        self, memory: Memory, steps: list[tuple[int, bytes, bool]]
    ) -> None:
        memory.zero(0, 400)
        model = bytearray(400)
        for offset, data, clear in steps:
            model[offset : offset + len(data)] = bytes(len(data)) if clear else data
            if clear:
                memory.zero(offset, len(data))
            else:
                memory.write(offset, data)
            assert memory.read(0, 400) == model
            assert memory.read(offset, len(data)) == model[offset : offset + len(data)]


# --- blocks against their model ---------------------------------------------------------------

SMALL = 8  # blocks, so that everything meets
SIZE_OF_SMALL = 64
tags = st.integers(1, 3).map(lambda n: (n << 56) | (n << 36) | n)
pointers = st.lists(
    st.one_of(st.just(NULL), st.builds(pointer, st.integers(0, SMALL - 1), tags)), max_size=6
).map(b"".join)
steps = st.one_of(
    st.tuples(st.just("claim"), st.integers(0, 10), tags, st.integers(0, SMALL - 1)),
    st.tuples(st.just("reclaim"), pointers, tags),
    st.tuples(st.just("release"), pointers),
    st.tuples(st.just("check"), pointers),
    st.tuples(st.just("gather"), pointers, st.integers(0, 200), st.integers(0, 200)),
    st.tuples(st.just("scatter"), pointers, st.binary(max_size=300)),
    st.tuples(st.just("node"), st.integers(0, SMALL - 1), tags, st.binary(max_size=32)),
    st.tuples(st.just("sweep"), st.lists(tags, min_size=SMALL, max_size=SMALL), st.booleans()),
)


def both_gather(blocks: Blocks, model: ModelBlocks, p: bytes, skip: int, length: int) -> None:
    available = len(p) // 16 * SIZE_OF_SMALL
    skip = min(skip, available)
    length = min(length, available - skip)
    into = bytearray(length)
    good = blocks.gather(p, skip, length, into)
    data, fresh = model.gather(p, skip, length)
    assert good == fresh
    assert into == data


def both_scatter(blocks: Blocks, model: ModelBlocks, p: bytes, data: bytes) -> None:
    full = b"".join(pointer(block, tag) for block, tag in unpack(p) if tag)
    data = data[: len(full) // 16 * SIZE_OF_SMALL]
    blocks.scatter(full, data)
    model.scatter(full, data)


def both_sweep(blocks: Blocks, model: ModelBlocks, marks: list[int], live: bool) -> None:
    limits = [0] * 256
    if live:
        limits[1:4] = [(9 << 56) | (i << 36) | n for i, n in ((1, 2), (1, 9), (3, 3))]
    expected = model.sweep(marks, limits, 1, SMALL)
    assert blocks.sweep(table(marks), table(limits), 1, SMALL) == expected


class BlocksContract:
    """Claims, copies, nodes and sweeps."""

    def test_a_full_region_gives_what_it_has(self, blocks: Blocks) -> None:
        got, cursor = blocks.claim(2**64 - 1, TAG, 5)
        assert len(got) == 16 * COUNT
        assert cursor == 5
        assert blocks.free_count() == 0
        assert blocks.claim(1, 9, 0) == (b"", 0)
        assert blocks.release(got) == COUNT
        assert blocks.free_count() == COUNT

    def test_a_stale_release_frees_nothing(self, blocks: Blocks) -> None:
        got, _ = blocks.claim(2, TAG, 0)
        assert blocks.release(got) == 2
        blocks.claim(2, TAG + 1, 0)
        assert blocks.release(got) == 0
        assert blocks.release(NULL + got) == 0
        assert blocks.tag(0) == TAG + 1

    def test_scatter_then_gather_gives_the_same_bytes(self, blocks: Blocks) -> None:
        got, _ = blocks.claim(5, TAG, 60)
        data = os.urandom(4 * BLOCK + 77)
        blocks.memory.write(DATA, b"\xff" * BLOCK * COUNT)
        blocks.scatter(got, data)
        into = bytearray(5 * BLOCK)
        assert blocks.gather(got, 0, 5 * BLOCK, into)
        assert into == data.ljust(5 * BLOCK, b"\0")
        untouched = blocks.memory.read(DATA + BLOCK, BLOCK * (COUNT - 5))
        assert untouched == b"\xff" * len(untouched)

    def test_gather_reads_holes_as_zeros_and_honours_at(self, blocks: Blocks) -> None:
        got, _ = blocks.claim(1, TAG, 0)
        blocks.scatter(got, b"a" * BLOCK)
        into = bytearray(b"." * (BLOCK + 10))
        assert blocks.gather(NULL + got, BLOCK - 4, 8, into, at=3)
        assert into == (b"..." + bytes(4) + b"aaaa").ljust(BLOCK + 10, b".")

    @pytest.mark.parametrize("order", RUNS, ids=["one", "three", "backwards"])
    @pytest.mark.parametrize("size", [0, 1, 4096, 40 * 4096, 40 * 4096 + 9])
    @pytest.mark.parametrize("armed", [False, True])
    def test_a_file_is_copied_over_blocks_and_back(
        self, memory: Memory, file: int, order: Sequence[int], size: int, armed: bool
    ) -> None:
        blocks = Blocks(memory, TAGS, DATA, PAGE, 48)
        got = b"".join(blocks.claim(1, TAG, block)[0] for block in order)
        content = os.urandom(size)
        os.pwrite(file, content, 100)
        memory.write(DATA, b"\xee" * 48 * PAGE)
        memory.trap(10**9, (lambda: None) if armed else None, loads=True)
        room = len(got) // 16 * PAGE
        length = min(size, room)
        assert blocks.fill(got, file, 100, room) == length
        used = -(-length // PAGE)
        into = bytearray(room)
        assert blocks.gather(got, 0, room, into)
        assert into == content[:length].ljust(used * PAGE, b"\0").ljust(room, b"\xee")
        for block in {*range(48)} - {*order}:
            assert memory.read(DATA + block * PAGE, PAGE) == b"\xee" * PAGE
        os.ftruncate(file, 0)
        assert blocks.drain(got, min(5, room), room - 5, file, 7)
        assert os.pread(file, 2 * room, 0) == bytes(7) + into[5:]

    def test_draining_writes_holes_as_zeros_and_notices_stale_blocks(
        self, blocks: Blocks, file: int
    ) -> None:
        got, _ = blocks.claim(2, TAG, 0)
        blocks.scatter(got, b"a" * BLOCK + b"b" * BLOCK)
        holes = NULL * (200_000 // BLOCK)
        os.pwrite(file, b"x" * 300_000, 0)
        assert blocks.drain(
            got[:16] + holes + got[16:], 0, 2 * BLOCK + len(holes) // 16 * BLOCK, file, 0
        )
        expected = b"a" * BLOCK + bytes(len(holes) // 16 * BLOCK) + b"b" * BLOCK
        assert os.pread(file, 300_000, 0) == expected.ljust(300_000, b"x")
        blocks.release(got[16:])
        assert blocks.drain(got, 0, BLOCK, file, 0)
        assert not blocks.drain(got, 0, BLOCK + 1, file, 0)
        assert blocks.drain(got, BLOCK, 0, file, 0)

    @pytest.mark.parametrize("size", [0, 1, 3, 8, 100, BLOCK - 32])
    def test_a_node_comes_back_with_its_checksum(self, blocks: Blocks, size: int) -> None:
        blocks.claim(1, TAG, 4)
        node = make_node(TAG, os.urandom(size))
        blocks.write_node(4, node)
        read = blocks.read_node(4, TAG)
        assert read is not None
        assert read[4:] == node[4:]
        assert read[:4] == struct.pack("<I", crc32c(node[4:]))

    def test_sweep_finds_settled_claims_that_are_not_marked(self, blocks: Blocks) -> None:
        kept, _ = blocks.claim(2, TAG, 0)
        lost, _ = blocks.claim(2, TAG, 2)
        marks = bytearray(8 * COUNT)
        blocks.mark(kept + NULL, marks)
        assert struct.unpack_from("<3Q", marks) == (TAG, TAG, 0)
        assert blocks.sweep(marks, bytes(2048), 0, COUNT) == lost
        assert blocks.sweep(marks, bytes(2048), 3, COUNT) == lost[16:]
        assert blocks.sweep(marks, bytes(2048), 5, 5) == b""

    @settings(PATIENT, max_examples=150)
    @given(st.lists(steps, max_size=25), st.booleans())
    def test_any_sequence_equals_the_model(
        self, memory: Memory, sequence: list[tuple[object, ...]], armed: bool
    ) -> None:
        memory.zero(0, 8192)
        memory.trap(10**9, (lambda: None) if armed else None, loads=True)
        blocks = Blocks(memory, 0, 4096, SIZE_OF_SMALL, SMALL)
        model = ModelBlocks(SIZE_OF_SMALL, SMALL)
        for step in sequence:
            match step:
                case ("claim", int(count), int(tag), int(cursor)):
                    assert blocks.claim(count, tag, cursor) == model.claim(count, tag, cursor)
                case ("reclaim", bytes(p), int(tag)):
                    assert blocks.reclaim(p, tag) == model.reclaim(p, tag)
                case ("release", bytes(p)):
                    assert blocks.release(p) == model.release(p)
                case ("check", bytes(p)):
                    assert blocks.check(p) == model.check(p)
                case ("gather", bytes(p), int(skip), int(length)):
                    both_gather(blocks, model, p, skip, length)
                case ("scatter", bytes(p), bytes(data)):
                    both_scatter(blocks, model, p, data)
                case ("node", int(block), int(tag), bytes(payload)):
                    blocks.write_node(block, make_node(tag, payload))
                    model.write_node(block, make_node(tag, payload))
                case ("sweep", list(marks), bool(live)):
                    both_sweep(blocks, model, marks, live)
                case other:
                    raise AssertionError(other)
            assert memory.read(4096, len(model.data)) == model.data
            assert memory.read(0, 8 * SMALL) == table(model.tags)
            assert blocks.free_count() == model.tags.count(0)
