"""Fixed files: one row of blocks, changed in place, until they are released."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import RENAME_EXCHANGE, ROOT_INO, Filesystem, contents, fixed, names
from ivshmemfs.errors import Corrupt, FsError, InUse, NoSpace
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import superblock, words
from ivshmemfs.format.geometry import HINT_OFFSET
from tests.support.checks import assert_adds_up, assert_clean, free_blocks
from tests.support.damage import Knife
from tests.support.regions import ROOT, TestRegion, get, new_region, put

SIZE = 3 * fixed.PAGE


@contextmanager
def failing(code: int) -> Iterator[None]:
    """Expect FsError with errno `code`."""
    with pytest.raises(FsError) as caught:
        yield
    assert caught.value.errno == code, os.strerror(caught.value.errno)


@pytest.fixture
def made() -> Iterator[TestRegion]:
    """A region of 2 MiB, in blocks of 1 KiB."""
    with new_region(2 << 20) as region:
        yield region
        assert_clean(region)


def make(fs: Filesystem, name: bytes = b"shared", size: int = SIZE) -> int:
    """Make a fixed file; return its inode."""
    ino, made = fs.change(lambda tx: names.make_fixed(tx, ROOT_INO, name, 0o640, size, ROOT))
    assert made
    return ino


def write(fs: Filesystem, ino: int, at: int, content: bytes) -> int:
    """Write to a file as a mount does."""
    handle = fs.open(ino, os.O_RDWR, ROOT)
    try:
        return fs.write(handle, at, content)
    finally:
        fs.release(handle)


def place(fs: Filesystem, ino: int) -> fixed.Extent:
    """Where a fixed file lies."""
    return fs.look(lambda view: fixed.extent(view, ino))


def test_it_lies_in_one_row_of_zeros(fs: Filesystem, other: Filesystem, made: TestRegion) -> None:
    put(fs, ROOT_INO, b"old", b"\xff" * (200 << 10))
    fs.unlink(ROOT_INO, b"old", ROOT)  # blocks that are free and not zero
    ino = make(fs)
    attr = other.getattr(ino)
    assert (attr.size, attr.mode, attr.nlink) == (SIZE, stat.S_IFREG | 0o640, 1)
    assert attr.blocks * 512 >= SIZE
    where = place(other, ino)
    assert where.size == SIZE
    assert where.offset % fixed.PAGE == 0
    assert made.region(readonly=True).memory.is_zero(where.offset, SIZE)
    assert get(other, ROOT_INO, b"shared") == bytes(SIZE)
    assert_adds_up(fs)


def test_large_ones_are_aligned_for_large_pages() -> None:
    with new_region(64 << 20) as made:
        fs = made.mount()
        make(fs, b"small", 10 << 12)
        for name, size, alignment in (
            (b"one", fixed.PAGE, fixed.LARGE_PAGE),
            (b"more", 1 << 20, fixed.LARGE_PAGE),
            (b"huge", 3 << 20, 2 << 20),
        ):
            assert place(fs, make(fs, name, size)).offset % alignment == 0


def test_a_write_changes_the_bytes_where_they_are(
    fs: Filesystem, other: Filesystem, made: TestRegion
) -> None:
    ino = make(fs)
    where, before = place(fs, ino), fs.getattr(ino)
    memory = made.region().memory
    memory.write(where.offset, b"by a program")
    assert get(other, ROOT_INO, b"shared")[:12] == b"by a program"
    content = os.urandom(2500)
    assert write(other, ino, 1000, content) == len(content)
    assert memory.read(where.offset + 1000, len(content)) == content
    assert memory.read(where.offset, 12) == b"by a program"
    assert place(fs, ino) == where
    assert fs.getattr(ino).mtime_ns > before.mtime_ns
    assert get(fs, ROOT_INO, b"shared")[1000:3500] == content


def test_a_write_leaves_the_bytes_beside_it_alone(fs: Filesystem, made: TestRegion) -> None:
    """A program may store to them at the same moment."""
    ino = make(fs)
    where = place(fs, ino)
    memory = made.region().memory
    handle = fs.open(ino, os.O_RDWR, ROOT)
    at_work = True

    def store() -> None:
        if at_work:
            memory.write(where.offset, b"A" * 100)
            memory.write(where.offset + 200, b"B" * 100)

    fs.region.memory.trap(3, store)
    fs.write(handle, 100, b"x" * 100)
    at_work = False
    fs.release(handle)
    assert memory.read(where.offset, 300) == b"A" * 100 + b"x" * 100 + b"B" * 100


def test_names_and_sizes_stay(fs: Filesystem, other: Filesystem) -> None:
    ino = make(fs)
    free = free_blocks(fs)
    put(other, ROOT_INO, b"else", b"content")
    with failing(errno.EPERM):
        other.unlink(ROOT_INO, b"shared", ROOT)
    with failing(errno.EPERM):
        other.rename(ROOT_INO, b"else", ROOT_INO, b"shared", 0, ROOT)
    for size in (0, 100, SIZE + 1):
        with failing(errno.ETXTBSY):
            fs.setattr(ino, ROOT, size=size)
    with failing(errno.ETXTBSY):
        fs.open(ino, os.O_RDWR | os.O_TRUNC, ROOT)
    with failing(errno.ETXTBSY):
        fs.change(lambda tx: contents.store(tx, ROOT_INO, b"shared", b"new", 0o600, ROOT))
    handle = fs.open(ino, os.O_RDWR, ROOT)
    with failing(errno.EFBIG):
        fs.write(handle, SIZE - 2, b"four")
    with failing(errno.EFBIG):
        fs.write(handle, 0, b"end", append=True)
    for mode in (3, 16, 17):  # holes, and ranges of zeros
        with failing(errno.ETXTBSY):
            fs.fallocate(handle, mode, 0, 100)
    with failing(errno.EFBIG):
        fs.fallocate(handle, 0, 0, SIZE + 1)
    fs.fallocate(handle, 0, 0, SIZE)
    assert fs.seek(handle, 0, os.SEEK_HOLE) == SIZE
    fs.release(handle)
    fs.setattr(ino, ROOT, size=SIZE)
    fs.unlink(ROOT_INO, b"else", ROOT)
    assert free_blocks(fs) == free
    assert place(other, ino).size == SIZE


def test_it_can_move_and_have_two_names(fs: Filesystem) -> None:
    ino = make(fs)
    where = place(fs, ino)
    fs.link(ino, ROOT_INO, b"second", ROOT)
    fs.unlink(ROOT_INO, b"shared", ROOT)
    fs.mkdir(ROOT_INO, b"d", 0o755, ROOT)
    fs.rename(ROOT_INO, b"second", ROOT_INO, b"third", 0, ROOT)
    fs.rename(ROOT_INO, b"third", ROOT_INO, b"d", RENAME_EXCHANGE, ROOT)
    fs.setxattr(ino, b"user.large", b"v" * 3000, 0, ROOT)
    fs.setattr(ino, ROOT, mode=0o600, uid=5)
    assert place(fs, ino) == where
    assert fs.lookup(ROOT_INO, b"d").ino == ino


def test_a_released_one_is_an_ordinary_file(
    fs: Filesystem, other: Filesystem, made: TestRegion
) -> None:
    free = free_blocks(fs)
    ino = make(fs)
    write(fs, ino, 0, b"kept")
    where = place(fs, ino)
    handle = other.open(ino, os.O_RDONLY, ROOT)
    with pytest.raises(InUse, match="has it open"):
        fs.change(lambda tx: fixed.release(tx, ino))
    other.release(handle)
    assert fs.change(lambda tx: fixed.release(tx, ino))
    assert not fs.change(lambda tx: fixed.release(tx, ino))
    with failing(errno.EINVAL):
        place(fs, ino)
    write(fs, ino, 0, b"new")  # to another block
    assert made.region(readonly=True).memory.read(where.offset, 4) == b"kept"
    assert get(other, ROOT_INO, b"shared")[:4] == b"newt"
    other.setattr(ino, ROOT, size=5)
    other.unlink(ROOT_INO, b"shared", ROOT)
    assert free_blocks(fs) == free


def test_force_releases_one_that_is_open(fs: Filesystem, other: Filesystem) -> None:
    ino = make(fs)
    other.open(ino, os.O_RDONLY, ROOT)
    assert fs.change(lambda tx: fixed.release(tx, ino, force=True))


def test_a_name_that_exists_is_not_made(fs: Filesystem) -> None:
    ino = make(fs)
    for size in (SIZE, fixed.PAGE):
        found = fs.change(lambda tx, s=size: names.make_fixed(tx, ROOT_INO, b"shared", 0, s, ROOT))  # type: ignore[misc]
        assert found == (ino, False)


def test_no_room(fs: Filesystem) -> None:
    with pytest.raises(NoSpace, match="no room for"):
        make(fs, size=2 << 20)
    for at in range(400):
        put(fs, ROOT_INO, b"f%d" % at, b"x" * 1500)
    for at in range(0, 400, 2):
        fs.unlink(ROOT_INO, b"f%d" % at, ROOT)
    with pytest.raises(NoSpace, match="follow each other"):
        make(fs, size=(free_blocks(fs) - 100) * fs.block_size & -fixed.PAGE)
    for at in range(1, 400, 2):
        fs.unlink(ROOT_INO, b"f%d" % at, ROOT)
    make(fs, size=400 << 10)


def test_a_lost_race_keeps_the_row(fs: Filesystem, other: Filesystem, made: TestRegion) -> None:
    free = free_blocks(fs)

    def come_first() -> None:
        made.region().memory.store(HINT_OFFSET, 0)
        put(other, ROOT_INO, b"first", b"x")

    fs.region.memory.trap(40, come_first)
    ino = make(fs)
    assert fs.lookup(ROOT_INO, b"first").ino < ino
    assert get(other, ROOT_INO, b"shared") == bytes(SIZE)
    assert fs.change(lambda tx: fixed.release(tx, ino))
    for name in (b"shared", b"first"):
        fs.unlink(ROOT_INO, name, ROOT)
    assert free_blocks(fs) == free


@pytest.mark.parametrize("event", range(1, 16))
def test_another_peer_takes_blocks_amid_the_row(
    fs: Filesystem, other: Filesystem, made: TestRegion, event: int
) -> None:
    def take_some() -> None:
        made.region().memory.store(HINT_OFFSET, 0)
        put(other, ROOT_INO, b"first", b"x" * 3000)

    free = free_blocks(fs)
    fs.region.memory.trap(event, take_some)
    ino = make(fs)
    assert get(other, ROOT_INO, b"shared") == bytes(SIZE)
    assert get(other, ROOT_INO, b"first") == b"x" * 3000
    assert fs.change(lambda tx: fixed.release(tx, ino))
    for name in (b"shared", b"first"):
        fs.unlink(ROOT_INO, name, ROOT)
    assert free_blocks(fs) == free


def test_a_file_without_room_for_its_name_gives_back_its_row(fs: Filesystem) -> None:
    free = free_blocks(fs)
    with failing(errno.ENOENT):
        fs.change(lambda tx: _failing(tx))
    assert free_blocks(fs) == free


def _failing(tx: object) -> None:
    names.make_fixed(tx, ROOT_INO, b"shared", 0o600, SIZE, ROOT)  # type: ignore[arg-type]
    raise FsError(errno.ENOENT)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_cannot_be(size: int) -> None:
    with failing(errno.EINVAL):
        fixed.whole_pages(size)


def test_a_filesystem_that_older_programs_may_write(made: TestRegion) -> None:
    made.mount().unmount()
    memory = made.region().memory
    for at in (superblock.OFFSET, superblock.COPY_OFFSET):
        raw = memory.read(at, 512)
        record = superblock.SUPERBLOCK.unpack(raw)
        kept = record.ro_compat & ~superblock.FIXED
        memory.write(at, superblock.seal(record._replace(ro_compat=kept)))
    with failing(errno.EOPNOTSUPP):
        make(made.mount())


@pytest.mark.parametrize("damage", ["hole", "swapped", "first", "behind", "moved"])
def test_a_damaged_row_is_never_stored_to(made: TestRegion, damage: str) -> None:
    fs = made.mount()
    ino = make(fs)
    innocent = put(fs, ROOT_INO, b"innocent", b"I" * 5000).ino
    fs.unmount()
    knife = Knife(made.region().memory)
    pointers = bytearray(knife.payload(ino))
    if damage == "hole":
        pointers[16:32] = bytes(16)
    elif damage == "swapped":
        pointers[0:16], pointers[16:32] = pointers[16:32], pointers[0:16]
    elif damage == "first":
        pointers[0:16] = knife.payload(innocent)[:16]
    elif damage == "moved":  # a row, but not its own
        start = words.POINTER.unpack(knife.payload(innocent)[:16])[0]
        tag = words.POINTER.unpack(pointers[:16])[2]
        count = len(pointers) // 16
        pointers[:] = b"".join(words.POINTER.pack(start + n, 1, tag) for n in range(count))
    else:
        pointers[-16:] = words.POINTER.pack(1 << 31, 1, 77)
    knife.set_payload(ino, bytes(pointers))
    fs = made.mount()
    with pytest.raises(Corrupt):
        write(fs, ino, 0, b"w" * SIZE)
    assert get(fs, ROOT_INO, b"innocent") == b"I" * 5000
    if damage in ("first", "behind", "moved"):
        with pytest.raises(Corrupt):
            place(fs, ino)
    fs.unmount()
    fsck.repair(made.region(), force=True)
    fs = made.mount()
    assert not fs.view().inode(ino).record.fixed
    fs.unlink(ROOT_INO, b"shared", ROOT)


def test_a_mark_on_a_file_without_blocks(made: TestRegion) -> None:
    fs = made.mount()
    ino = put(fs, ROOT_INO, b"small", b"inline").ino
    fs.unmount()
    Knife(made.region().memory).edit_inode(ino, fixed=1)
    fs = made.mount()
    with failing(errno.EUCLEAN):
        fs.getattr(ino)
    fs.unmount()
    fsck.repair(made.region(), force=True)
    fs = made.mount()
    assert get(fs, ROOT_INO, b"small") == b"inline"
    assert fs.view().inode(ino).record.payload == fmt.INLINE
