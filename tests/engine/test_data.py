"""File data: inline, in blocks, with holes, at huge offsets, compared with a bytearray."""

from __future__ import annotations

import errno
import os
import random
import stat

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.inode import parse
from ivshmemfs.format import inode as fmt
from ivshmemfs.format.inode import INODE, MAX_FILE_SIZE
from ivshmemfs.format.node import HEADER_SIZE
from tests.engine.asking import fails
from tests.support.checks import assert_adds_up, free_blocks
from tests.support.regions import ROOT, TestRegion, get, put


def payload(fs: Filesystem, ino: int) -> tuple[int, int]:
    record = fs.view().inode(ino).record
    return record.payload, record.height


def edges(block: int) -> list[int]:
    """Return sizes on both sides of each limit of the representation."""
    inline = fmt.payload_capacity(block)
    around = (1, inline, block, 2 * block, 5 * block)
    return sorted({max(size + off, 0) for size in around for off in (-1, 0, 1)})


def test_written_is_read_on_every_mount(fs: Filesystem, other: Filesystem) -> None:
    for size in edges(fs.block_size):
        content = os.urandom(size)
        attr = put(fs, ROOT_INO, b"file", content)
        assert attr.size == size
        assert get(other, ROOT_INO, b"file") == content
        other.unlink(ROOT_INO, b"file", ROOT)


def test_every_size_to_every_size(fs: Filesystem) -> None:
    """A truncation and a growth between any two sizes keep bytes and read zeros."""
    sizes = edges(fs.block_size)
    content = os.urandom(max(sizes))
    for old in sizes:
        for new in sizes:
            attr = put(fs, ROOT_INO, b"file", content[:old])
            changed = fs.setattr(attr.ino, ROOT, size=new)
            assert changed.size == new
            kept = content[: min(old, new)]
            assert get(fs, ROOT_INO, b"file") == kept + bytes(new - len(kept))
            grown = max(old, new)
            fs.setattr(attr.ino, ROOT, size=grown)
            assert get(fs, ROOT_INO, b"file") == kept + bytes(grown - len(kept))
    fs.unlink(ROOT_INO, b"file", ROOT)
    assert_adds_up(fs)


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_match_a_bytearray(made: TestRegion, seed: int) -> None:
    mounts = [made.mount(), made.mount()]
    chance, model = random.Random(seed), bytearray()
    block = mounts[0].block_size
    room = mounts[0].statfs().blocks_avail
    limit = min(block * room // 3, 40 * block)
    handles = []
    for fs in mounts:
        handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
        handles.append(handle)
    for _ in range(150):
        at = chance.randrange(2)
        fs, handle = mounts[at], handles[at]
        offset = chance.choice(
            (0, len(model), chance.randrange(limit), block * chance.randrange(9))
        )
        length = chance.choice((1, 10, block, block + 1, chance.randrange(1, limit // 2)))
        length = min(length, limit - offset) if offset < limit else 0
        action = chance.random()
        if action < 0.15:
            size = chance.randrange(limit)
            fs.setattr(attr.ino, ROOT, size=size)
            model = model[:size] + bytes(max(size - len(model), 0))
        elif action < 0.7 and length > 0:
            data = chance.randbytes(length)
            assert fs.write(handle, offset, data) == length
            model += bytes(max(offset - len(model), 0))
            model[offset : offset + length] = data
        else:
            assert bytes(fs.read(handle, offset, length)) == model[offset : offset + length]
        assert fs.getattr(attr.ino).size == len(model)
    assert get(mounts[0], ROOT_INO, b"file") == model
    for fs, handle in zip(mounts, handles, strict=True):
        fs.release(handle)
    assert_adds_up(mounts[0])


def test_append_goes_to_the_end_wherever_that_is(fs: Filesystem, other: Filesystem) -> None:
    one, _ = fs.create(ROOT_INO, b"log", 0o644, os.O_WRONLY | os.O_APPEND, ROOT)
    two, _ = other.create(ROOT_INO, b"log", 0o644, os.O_WRONLY | os.O_APPEND, ROOT)
    expected = b""
    for n in range(40):
        line = b"line %d of mount one or two\n" % n
        if n % 2:
            other.write(two, 0, line)
        else:
            fs.write(one, 3, line)
        expected += line
    assert get(other, ROOT_INO, b"log") == expected


# --- holes ----------------------------------------------------------------------------------


def test_holes_cost_nothing_and_read_as_zeros(fs: Filesystem) -> None:
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    free = free_blocks(fs)
    fs.setattr(attr.ino, ROOT, size=MAX_FILE_SIZE)
    assert free_blocks(fs) == free
    assert bytes(fs.read(handle, MAX_FILE_SIZE - 10, 100)) == bytes(10)
    assert bytes(fs.read(handle, 1 << 40, 3000)) == bytes(3000)
    fs.setattr(attr.ino, ROOT, size=0)
    assert free_blocks(fs) == free


OFFSETS = [1 << shift for shift in (12, 16, 20, 24, 31, 32, 40, 50, 61)] + [MAX_FILE_SIZE - 5]


def test_writes_at_huge_offsets(fs: Filesystem, other: Filesystem) -> None:
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    before = free_blocks(fs)
    for offset in OFFSETS:
        fs.setattr(attr.ino, ROOT, size=0)
        assert free_blocks(fs) == before
        assert fs.write(handle, offset, b"there") == 5
        assert other.getattr(attr.ino).size == offset + 5
        reading = other.open(attr.ino, os.O_RDONLY, ROOT)
        assert bytes(other.read(reading, offset - 3, 100)) == b"\0\0\0there"
        assert bytes(other.read(reading, 0, 4)) == bytes(4)
        other.release(reading)
    fs.setattr(attr.ino, ROOT, size=0)
    for offset in OFFSETS:  # all at once in one tree
        fs.write(handle, offset, b"there")
    for offset in reversed(OFFSETS):
        assert bytes(fs.read(handle, offset, 5)) == b"there"
        fs.setattr(attr.ino, ROOT, size=offset)
    fs.setattr(attr.ino, ROOT, size=0)
    assert free_blocks(fs) == before


def test_an_inode_beyond_the_largest_size_is_refused() -> None:
    record = INODE.unpack(bytes(INODE.size))._replace(mode=stat.S_IFREG, nlink=1, blocks=1)
    for size, code in ((MAX_FILE_SIZE, 0), (MAX_FILE_SIZE + 1, errno.EUCLEAN)):
        block = bytes(HEADER_SIZE) + INODE.pack(record._replace(size=size))
        if code:
            fails(code, lambda block=block: parse(9, block, 1024))  # type: ignore[misc]
        else:
            assert parse(9, block, 1024).record.size == size


def test_beyond_the_largest_size(fs: Filesystem) -> None:
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    fails(errno.EFBIG, lambda: fs.write(handle, MAX_FILE_SIZE - 2, b"abc"))
    fails(errno.EFBIG, lambda: fs.setattr(attr.ino, ROOT, size=MAX_FILE_SIZE + 1))
    assert fs.getattr(attr.ino).size == 0


def test_maps_grow_and_are_cut(roomy: TestRegion) -> None:
    """A file of thousands of blocks, cut at and beside node boundaries."""
    fs = roomy.mount()
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    free, block = free_blocks(fs), fs.block_size
    content = random.Random(5).randbytes(4500 * block)
    for at in range(0, len(content), 300 * block):
        fs.write(handle, at, content[at : at + 300 * block])
    assert payload(fs, attr.ino) == (fmt.MAP, 2)
    fanout = (block - 32) // 16
    for blocks in (fanout * fanout + 1, fanout * fanout, 3 * fanout + 1, fanout, 53, 52, 7, 1):
        for size in (blocks * block + 5, blocks * block):
            fs.setattr(attr.ino, ROOT, size=size)
            middle = size // 2
            assert bytes(fs.read(handle, middle, size)) == content[middle:size]
            record = fs.view().inode(attr.ino).record
            assert record.blocks <= 2 + -(-size // block) + size // block // fanout + 3
    fs.setattr(attr.ino, ROOT, size=0)
    assert payload(fs, attr.ino) == (fmt.EMPTY, 0)
    assert free_blocks(fs) == free


def test_sparse_blocks_come_and_go(roomy: TestRegion) -> None:
    fs = roomy.mount()
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    free, chance, model = free_blocks(fs), random.Random(9), dict[int, bytes]()
    for _ in range(400):
        index = chance.randrange(200_000)
        model[index] = chance.randbytes(fs.block_size)
        fs.write(handle, index * fs.block_size, model[index])
    for index, content in model.items():
        assert bytes(fs.read(handle, index * fs.block_size, fs.block_size)) == content
    size = fs.getattr(attr.ino).size
    while size:
        size //= 2
        fs.setattr(attr.ino, ROOT, size=size)
        for index in chance.sample(sorted(model), 20):
            expected = model[index][: max(size - index * fs.block_size, 0)]
            assert bytes(fs.read(handle, index * fs.block_size, fs.block_size)) == expected
    assert free_blocks(fs) == free


def test_a_read_is_of_one_moment(fs: Filesystem, other: Filesystem) -> None:
    """A read returns the file of one moment, even while another mount rewrites it."""
    size = 6 * fs.block_size
    put(fs, ROOT_INO, b"file", b"a" * size)
    handle = other.open(other.lookup(ROOT_INO, b"file").ino, os.O_RDONLY, ROOT)
    writer = fs.open(handle.ino, os.O_WRONLY, ROOT)

    def rewrite() -> None:
        fs.write(writer, 0, b"b" * size)

    for after in range(40):
        fs.write(writer, 0, b"a" * size)
        other.region.memory.trap(after, rewrite, loads=True)
        got = bytes(other.read(handle, 0, size))
        other.region.memory.trap(0, None)
        assert got in (b"a" * size, b"b" * size)


def test_stat_counts_what_a_file_holds(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"x" * (4 * fs.block_size))
    assert attr.blocks * 512 == 4 * fs.block_size
    assert put(fs, ROOT_INO, b"small", b"x").blocks > 0
    assert put(fs, ROOT_INO, b"none", b"").blocks == 0
