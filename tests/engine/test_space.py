"""Full regions: which operations work, which fail cleanly; every block is freed in the end."""

from __future__ import annotations

import errno
import os
import random
from contextlib import suppress

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.handle import Handle
from ivshmemfs.errors import NoSpace
from tests.engine.asking import fails, names, remove_all
from tests.support.checks import (
    assert_adds_up,
    assert_clean,
    assert_empty,
    detailed_tree,
    free_blocks,
)
from tests.support.regions import ROOT, TestRegion, get, new_region, put


def fill_with_data(fs: Filesystem, name: bytes = b"fill") -> int:
    """Write until the region is full; returns the size of the file."""
    handle, _ = fs.create(ROOT_INO, name, 0o644, os.O_WRONLY, ROOT)
    done = 0
    try:
        while True:
            done += fs.write(handle, done, os.urandom(1 << 17))
    except NoSpace:
        return done
    finally:
        fs.release(handle)


def fill_with_names(fs: Filesystem, prefix: bytes = b"name") -> int:
    count = 0
    try:
        while True:
            fs.mknod(ROOT_INO, prefix + b"%d" % count, 0o100644, 0, ROOT)
            count += 1
    except NoSpace:
        return count


def test_a_megabyte_region_holds_85_percent() -> None:
    with new_region(1 << 20) as made:
        fs = made.mount()
        assert fill_with_data(fs) >= (1 << 20) * 85 // 100
        assert_clean(made)


def make_directories(fs: Filesystem, count: int) -> None:
    for number in range(count):
        fs.mkdir(ROOT_INO, b"dir%d" % number, 0o755, ROOT)


def test_everything_comes_back(fs: Filesystem, other: Filesystem) -> None:
    for fill in (fill_with_data, fill_with_names):
        assert fill(fs) > 0
        with pytest.raises(NoSpace):  # a short name may still fit where a long one did not
            make_directories(other, 1000)
        assert_adds_up(fs)
        remove_all(other, ROOT_INO)
        assert_empty(fs)


def test_a_full_region_still_removes(fs: Filesystem, other: Filesystem) -> None:
    """Fill with names, data, attributes and open files, then remove them one by one."""
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    kept = put(fs, folder, b"open", b"x" * 5000)
    put(fs, ROOT_INO, b"fill", b"x" * 20000)
    count = 0
    with suppress(NoSpace):
        while True:
            put(fs, ROOT_INO, b"small%d" % count, b"x" * (count % 3000))
            count += 1
    assert count
    fill_with_names(other, b"other")
    handle = fs.open(kept.ino, os.O_RDONLY, ROOT)
    other.unlink(folder, b"open", ROOT)  # becomes an orphan: needs blocks
    assert bytes(fs.read(handle, 0, 10)) == b"x" * 10
    other.rename(ROOT_INO, b"small0", folder, b"moved", 0, ROOT)
    other.setattr(fs.lookup(ROOT_INO, b"fill").ino, ROOT, size=12345)
    for name in names(fs):
        if name != b"dir":
            fs.unlink(ROOT_INO, name, ROOT)
    fs.release(handle)
    other.unlink(folder, b"moved", ROOT)
    other.rmdir(ROOT_INO, b"dir", ROOT)
    assert_adds_up(fs)


def test_what_does_not_fit_changes_nothing(fs: Filesystem, other: Filesystem) -> None:
    put(fs, ROOT_INO, b"file", b"content")
    ino = fs.lookup(ROOT_INO, b"file").ino
    fs.symlink(ROOT_INO, b"link", b"to", ROOT)
    fill_with_data(fs)
    fill_with_names(fs)
    before, free = detailed_tree(other), free_blocks(fs)
    handle = fs.open(ino, os.O_RDWR, ROOT)
    long = b"n" * 250
    for call in (
        lambda: fs.mkdir(ROOT_INO, long, 0o755, ROOT),
        lambda: fs.create(ROOT_INO, long, 0o644, os.O_RDWR, ROOT),
        lambda: fs.symlink(ROOT_INO, long, b"x" * 4000, ROOT),
        lambda: fs.write(handle, 0, b"y" * fs.block_size),
        lambda: fs.setxattr(ino, b"user.x", bytes(9000), 0, ROOT),
    ):
        fails(errno.ENOSPC, call)
        assert detailed_tree(other) == before
        assert free_blocks(fs) == free
    fs.release(handle)


def test_a_short_write_leaves_no_room(fs: Filesystem) -> None:
    """Programs continue a write after the bytes that it returns."""
    handle = fs.open(put(fs, ROOT_INO, b"file", b"").ino, os.O_WRONLY, ROOT)
    content, done = os.urandom(1 << 16), 0
    while (got := fs.write(handle, done, content)) == len(content):
        done += got
    assert got % fs.block_size == 0
    with pytest.raises(NoSpace):
        fs.write(handle, done + got, content[: fs.block_size])
    assert get(fs, ROOT_INO, b"file")[done:] == content[:got]


def test_writes_become_short_before_they_fail(fs: Filesystem) -> None:
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    content, done, short = os.urandom(1 << 18), 0, 0
    with suppress(NoSpace):
        while True:
            got = fs.write(handle, done, content)
            assert 0 < got <= len(content)
            short += got < len(content)
            assert bytes(fs.read(handle, done, got)) == content[:got]
            done += got
            assert fs.getattr(attr.ino).size == done
    assert short
    fs.release(handle)


def test_overwriting_in_a_full_region(fs: Filesystem) -> None:
    """Copy on write needs free blocks for the copies, and writers cannot use the reserve."""
    size = fill_with_data(fs)
    handle = fs.open(fs.lookup(ROOT_INO, b"fill").ino, os.O_RDWR, ROOT)
    done = 0
    for offset in range(0, size, 5 * fs.block_size):
        try:
            done += fs.write(handle, offset, b"z" * 10)
        except NoSpace:
            break
    fs.setattr(handle.ino, ROOT, size=size // 2)
    assert fs.write(handle, 0, b"z" * 10) == 10
    fs.release(handle)


def test_statfs_adds_up(fs: Filesystem, other: Filesystem) -> None:
    geometry = fs.superblock.geometry
    before = fs.statfs()
    assert before.block_size == geometry.block_size
    assert before.blocks == geometry.block_count
    assert before.blocks_free == free_blocks(fs)
    assert before.files_free == before.blocks_free - geometry.reserve
    assert before.blocks_avail < before.files_free
    put(fs, ROOT_INO, b"file", b"x" * 7 * fs.block_size)
    after = other.statfs()
    assert before.blocks_free - after.blocks_free == 8
    assert after.files - after.files_free == before.files - before.files_free + 1
    fill_with_names(fs)
    full = fs.statfs()
    assert 0 <= full.blocks_avail <= 4
    assert full.blocks_free >= geometry.reserve


@pytest.mark.parametrize("block_size", [1024, 4096, 16384, 65536])
@pytest.mark.parametrize("megabytes", [1, 3, 8, 40])
def test_what_statfs_promises_can_be_written(megabytes: int, block_size: int) -> None:
    """`blocks_avail` excludes the file's block map and the reserve, and little else."""
    if megabytes << 20 < block_size * 64:
        pytest.skip("too few blocks for a filesystem")
    with new_region(megabytes << 20, block_size=block_size) as made:
        fs = made.mount()
        handle, _ = fs.create(ROOT_INO, b"fill", 0o644, os.O_WRONLY, ROOT)
        for share in (3, 2, 1):  # the promise holds while the file grows
            done = fs.getattr(handle.ino).size
            promised = done + fs.statfs().blocks_avail // share * block_size
            piece = memoryview(bytes(1 << 20))
            while done < promised:
                done += fs.write(handle, done, piece[: promised - done])
        assert done == promised
        assert fs.statfs().blocks_avail <= 1
        assert fill_more(fs, handle, done) <= 2 * block_size
        fs.release(handle)
        remove_all(fs, ROOT_INO)
        fs.unmount()  # which releases what was cut off
        assert_clean(made)


def fill_more(fs: Filesystem, handle: Handle, at: int) -> int:
    """Return how many bytes can be appended."""
    done = 0
    with suppress(NoSpace):
        while True:
            done += fs.write(handle, at + done, bytes(fs.block_size))
    return done


@pytest.mark.parametrize("seed", range(3))
def test_churn_in_a_nearly_full_region(made: TestRegion, seed: int) -> None:
    mounts = [made.mount(), made.mount()]
    chance, model = random.Random(seed), dict[bytes, bytes]()
    room = mounts[0].statfs().blocks_avail * mounts[0].block_size
    refused = 0
    for _ in range(200):
        fs, name = chance.choice(mounts), b"f%d" % chance.randrange(12)
        if name in model and chance.random() < 0.4:
            fs.unlink(ROOT_INO, name, ROOT)
            del model[name]
            continue
        content = chance.randbytes(chance.randrange(max(room // 5, 1)))
        try:
            put(fs, ROOT_INO, name, content)
            model[name] = content
        except NoSpace:
            refused += 1
            model.pop(name, None)
            if name in names(fs):
                fs.unlink(ROOT_INO, name, ROOT)
    assert refused
    for name, content in model.items():
        assert get(mounts[0], ROOT_INO, name) == content
    remove_all(mounts[1], ROOT_INO)
    assert_empty(mounts[0])


def used_blocks(fs: Filesystem) -> set[int]:
    """Return the numbers of all blocks that are not free."""
    blocks = fs.store.blocks
    return {block for block in range(blocks.block_count) if blocks.tag(block)}


@pytest.mark.parametrize("size", [4096, 5 * 4096, 40 * 4096, 1 << 20])
def test_what_was_just_freed_is_used_next(size: int) -> None:
    with new_region(64 << 20) as made:
        fs = made.mount()
        handle, _ = fs.create(ROOT_INO, b"over", 0o644, os.O_WRONLY, ROOT)
        fs.write(handle, 0, bytes(4 << 20))
        fs.write(handle, 1 << 20, bytes(size))
        touched = used_blocks(fs)
        start = len(touched)
        for number in range(30):
            fs.write(handle, (number % 3) << 20, bytes([number]) * size)
            touched |= used_blocks(fs)
        assert len(touched) <= start + size // 4096 + 16  # one write's blocks, and its nodes
        fs.release(handle)
        remove_all(fs, ROOT_INO)
        put(fs, ROOT_INO, b"again", bytes(3 << 20))
        assert len(used_blocks(fs) | touched) <= len(touched) + 16
        assert_clean(made)
