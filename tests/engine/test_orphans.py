"""Unlinked open files: the mount that unlinks may be the one that holds the file, or another."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, Handle
from ivshmemfs.engine.lifetimes import PINS
from ivshmemfs.engine.orphans import CHECKED_AT_ONCE
from ivshmemfs.errors import Busy, NoSpace, StaleHandle
from ivshmemfs.format.open_filter import index_of
from tests.engine.asking import fails, make_careful, release_meanwhile
from tests.support.checks import assert_adds_up, assert_empty
from tests.support.regions import ROOT, TestRegion, get, in_turns, put


def orphans(fs: Filesystem) -> int:
    return fs.view().root.record.orphans


def ticks(fs: Filesystem, count: int = 3) -> None:
    for _ in range(count):
        try:
            fs.tick()
        except Busy:
            pytest.fail("nobody else is working")


@pytest.mark.parametrize("unlinker", [0, 1])
@pytest.mark.parametrize("holders", [(0,), (1,), (0, 1), (1, 0)])
def test_open_files_outlive_their_names(
    made: TestRegion, unlinker: int, holders: tuple[int, ...]
) -> None:
    mounts = [made.mount(), made.mount()]
    used = mounts[0].view().root.record.used
    content = os.urandom(3 * mounts[0].block_size)
    attr = put(mounts[0], ROOT_INO, b"file", content)
    handles = {at: mounts[at].open(attr.ino, os.O_RDWR, ROOT) for at in holders}
    mounts[unlinker].unlink(ROOT_INO, b"file", ROOT)
    fails(errno.ENOENT, lambda: mounts[0].lookup(ROOT_INO, b"file"))
    for at in holders:
        for fs in mounts:
            ticks(fs)
        assert orphans(mounts[0]) == 1
        fs, handle = mounts[at], handles[at]
        assert bytes(fs.read(handle, 0, len(content))) == content
        assert fs.getattr(attr.ino).nlink == 0
        assert fs.write(handle, 0, b"still") == 5
        content = b"still" + content[5:]
        fs.setattr(attr.ino, ROOT, mtime_ns=5)
        fs.release(handle)
    for fs in mounts:
        ticks(fs)
    assert orphans(mounts[0]) == 0
    fails(errno.ESTALE, lambda: mounts[1].getattr(attr.ino))
    assert mounts[0].view().root.record.used == used
    assert_adds_up(mounts[0])


def test_the_last_close_frees_at_once(fs: Filesystem, other: Filesystem) -> None:
    used = fs.view().root.record.used
    attr = put(fs, ROOT_INO, b"file", b"x" * 3000)
    first = fs.open(attr.ino, os.O_RDONLY, ROOT)
    second = other.open(attr.ino, os.O_RDONLY, ROOT)
    fs.unlink(ROOT_INO, b"file", ROOT)
    fs.release(first)
    assert orphans(fs) == 1
    other.release(second)
    assert (orphans(fs), fs.view().root.record.used) == (0, used)


def test_a_file_that_nobody_holds_goes_with_its_name(fs: Filesystem, other: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"x")
    other.unlink(ROOT_INO, b"file", ROOT)
    assert orphans(fs) == 0
    fails(errno.ESTALE, lambda: fs.open(attr.ino, os.O_RDONLY, ROOT))


def test_rename_over_an_open_file(fs: Filesystem, other: Filesystem) -> None:
    put(fs, ROOT_INO, b"new", b"new")
    victim = put(fs, ROOT_INO, b"old", b"old content")
    handle = other.open(victim.ino, os.O_RDONLY, ROOT)
    fs.rename(ROOT_INO, b"new", ROOT_INO, b"old", 0, ROOT)
    assert bytes(other.read(handle, 0, 100)) == b"old content"
    other.release(handle)
    assert orphans(fs) == 0
    assert_adds_up(fs)


def test_unmounting_gives_back_what_was_open(made: TestRegion) -> None:
    fs, other = made.mount(), made.mount()
    used = fs.view().root.record.used
    for n in range(4):
        handle, _ = other.create(ROOT_INO, b"f%d" % n, 0o644, os.O_RDWR, ROOT)
        other.write(handle, 0, b"x" * 2000)
        fs.unlink(ROOT_INO, b"f%d" % n, ROOT)
    assert orphans(fs) == 4
    other.unmount()
    ticks(fs)
    assert (orphans(fs), fs.view().root.record.used) == (0, used)


def test_unmounting_beside_a_peer_that_leaves_orphans_all_the_time(roomy: TestRegion) -> None:
    """It frees what it finds, and does not wait for an end of what others leave."""
    fs, other, third = roomy.mount(), roomy.mount(), roomy.mount()
    leave_orphans(other, third, [1] * 5)
    made = [0]

    def leave_another() -> None:
        made[0] += 1
        assert made[0] < 300, "unmounting never ends"
        with suppress(Busy):
            leave_orphans(other, third, [1], b"later%d-" % made[0])
        fs.region.memory.trap(12, leave_another, loads=True)

    fs.region.memory.trap(0, leave_another, loads=True)
    fs.unmount()
    assert fs.peer_id == (0, 0)
    assert made[0] > 5


def test_hundreds_of_orphans(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    handles = []
    for n in range(400):
        handle, _ = fs.create(ROOT_INO, b"f%d" % n, 0o644, os.O_RDWR, ROOT)
        handles.append(handle)
        other.unlink(ROOT_INO, b"f%d" % n, ROOT)
    assert orphans(fs) == 400
    ticks(other)
    assert orphans(fs) == 400
    for handle in handles:
        assert bytes(fs.read(handle, 0, 1)) == b""
        fs.release(handle)
    ticks(other)
    assert orphans(fs) == 0
    assert_empty(fs)


def test_files_of_one_filter_bit(fs: Filesystem, other: Filesystem) -> None:
    """Two open files may share a bit of the open filter; a close of one keeps it set."""
    one = put(fs, ROOT_INO, b"one", b"1")
    assert fs._volume.member is not None
    index = index_of(one.ino)
    two = one
    while two.ino == one.ino or index_of(two.ino) != index:
        other.unlink(ROOT_INO, b"two", ROOT) if two.ino != one.ino else None
        two = fs.mknod(ROOT_INO, b"two", 0o100644, 0, ROOT)
    handles = [fs.open(ino, os.O_RDONLY, ROOT) for ino in (one.ino, two.ino)]
    fs.release(handles[0])
    other.unlink(ROOT_INO, b"two", ROOT)
    assert fs.getattr(two.ino).nlink == 0
    other.unlink(ROOT_INO, b"one", ROOT)  # the shared bit keeps it until it is cleared
    fs.release(handles[1])
    ticks(other)
    assert orphans(fs) == 0


def leave_orphans(fs: Filesystem, other: Filesystem, sizes: list[int], name: bytes = b"f") -> None:
    """Make orphans that no mount holds: at the last close of each, the region is busy."""
    handles = []
    for number, size in enumerate(sizes):
        attr = put(fs, ROOT_INO, name + b"%d" % number, b"x" * size)
        handles.append(other.open(attr.ino, os.O_RDONLY, ROOT))
        fs.unlink(ROOT_INO, name + b"%d" % number, ROOT)
    for handle in handles:
        release_meanwhile(fs, other, handle)
    assert orphans(fs) >= len(sizes)


def test_a_change_frees_orphans_before_it_finds_no_space(fs: Filesystem, other: Filesystem) -> None:
    """Without the upkeep of any mount: files that cannot be reached fill no region."""
    room = fs.statfs().blocks_avail
    size = room // 12 * fs.block_size
    leave_orphans(fs, other, [size] * 10)
    content = os.urandom(size * 8)
    put(fs, ROOT_INO, b"new", content)
    assert get(fs, ROOT_INO, b"new") == content
    ticks(fs)
    assert orphans(fs) == 0
    assert_adds_up(fs)


def test_space_is_promised_although_orphans_have_it(fs: Filesystem, other: Filesystem) -> None:
    size = fs.statfs().blocks_avail // 4 * fs.block_size
    leave_orphans(fs, other, [size] * 3)
    handle, _ = fs.create(ROOT_INO, b"new", 0o644, os.O_WRONLY, ROOT)
    in_turns(lambda: fs.fallocate(handle, 0, 0, 2 * size))
    fs.release(handle)
    assert orphans(fs) < 3


def test_orphans_that_somebody_holds_do_fill_the_region(fs: Filesystem, other: Filesystem) -> None:
    size = fs.statfs().blocks_avail // 12 * fs.block_size
    attr = put(fs, ROOT_INO, b"held", b"x" * size * 10)
    handle = other.open(attr.ino, os.O_RDONLY, ROOT)
    fs.unlink(ROOT_INO, b"held", ROOT)
    with pytest.raises(NoSpace):
        put(fs, ROOT_INO, b"new", b"y" * size * 4)
    assert bytes(other.read(handle, 0, 1)) == b"x"
    other.release(handle)
    put(fs, ROOT_INO, b"new", b"y" * size * 4)


def test_one_tick_and_its_work_reach_every_orphan(roomy: TestRegion) -> None:
    """Also one behind hundreds that are open, and in spite of another peer's commit."""
    fs, other = roomy.mount(), roomy.mount()
    for number in range(2 * CHECKED_AT_ONCE):
        other.create(ROOT_INO, b"held%d" % number, 0o644, os.O_RDWR, ROOT)
        fs.unlink(ROOT_INO, b"held%d" % number, ROOT)
    before = orphans(fs)
    attrs = [put(fs, ROOT_INO, b"f%d" % n, b"x") for n in range(40)]
    handles = [other.open(attr.ino, os.O_RDONLY, ROOT) for attr in attrs]
    for number in range(40):
        fs.unlink(ROOT_INO, b"f%d" % number, ROOT)
    for handle in handles:
        release_meanwhile(fs, other, handle)
    assert orphans(fs) == before + 40
    assert fs._committer.hint.take(fs.peer_id[0])
    assert other.tick(), "another peer commits: the work is left"
    fs._committer.hint.give()
    pieces = 0
    while other.work():
        pieces += 1
        assert pieces < 100
    assert orphans(fs) == before


def test_opening_and_unlinking_at_once(made: TestRegion) -> None:
    """At every point where the opener pauses: it gets ESTALE, or the file stays readable."""
    opened = refused = 0
    for after in range(60):
        fs, other = made.mount(), made.mount()
        attr = put(fs, ROOT_INO, b"file", b"content")

        def unlink() -> None:
            other.unlink(ROOT_INO, b"file", ROOT)  # noqa: B023

        fs.region.memory.trap(after, unlink, loads=True)
        try:
            handle = fs.open(attr.ino, os.O_RDONLY, ROOT)
        except StaleHandle:
            refused += 1
        else:
            fs.region.memory.trap(0, None)
            opened += 1
            assert bytes(fs.read(handle, 0, 100)) == b"content"
            if fs.getattr(attr.ino).nlink:
                other.unlink(ROOT_INO, b"file", ROOT)
            assert bytes(fs.read(handle, 0, 100)) == b"content"
            fs.release(handle)
        fs.unmount()
        other.unmount()
    assert opened
    assert refused


def test_unlinking_and_opening_at_once(made: TestRegion) -> None:
    """At every point where the unlinker pauses, the opener runs meanwhile."""
    opened = refused = 0
    for after in range(200):
        fs, other = made.mount(), made.mount()
        attr = put(fs, ROOT_INO, b"file", b"content")
        got: list[Handle | None] = []

        def open_it() -> None:
            try:
                got.append(other.open(attr.ino, os.O_RDONLY, ROOT))  # noqa: B023
            except StaleHandle:
                got.append(None)  # noqa: B023

        fs.region.memory.trap(after, open_it, loads=True)
        fs.unlink(ROOT_INO, b"file", ROOT)
        fs.region.memory.trap(0, None)
        if not got:
            break
        if got[0] is None:
            refused += 1
        else:
            opened += 1
            assert bytes(other.read(got[0], 0, 100)) == b"content"
            other.release(got[0])
        assert orphans(fs) == 0
        fs.unmount()
        other.unmount()
    else:
        pytest.fail("unlinking never ended without a stop")
    assert opened
    assert refused


def test_a_pin_ends_when_the_file_is_open(fs: Filesystem, other: Filesystem) -> None:
    """Careful look-ups of files that are opened and closed keep nothing from being freed."""
    make_careful(fs, other)
    for _ in range(10):
        put(fs, ROOT_INO, b"new", b"content")
        fs.rename(ROOT_INO, b"new", ROOT_INO, b"file", 0, ROOT)
        attr = other.lookup(ROOT_INO, b"file")
        assert attr.ino in other._lifetimes.pins
        handle = other.open(attr.ino, os.O_RDONLY, ROOT)
        assert not other._lifetimes.pins
        fs.unlink(ROOT_INO, b"file", ROOT)
        assert bytes(other.read(handle, 0, 100)) == b"content"
        other.release(handle)
        assert orphans(fs) == 0


@pytest.mark.parametrize("size", [300, 20_000])
def test_careful_look_ups_do_not_fill_the_region(made: TestRegion, size: int) -> None:
    """One mount looks up carefully while another one replaces the file many times."""
    fs, other = made.mount(), made.mount()
    gone = put(fs, ROOT_INO, b"gone", b"")
    fs.unlink(ROOT_INO, b"gone", ROOT)
    used = fs.view().root.record.used
    fails(errno.ESTALE, lambda: other.open(gone.ino, os.O_RDONLY, ROOT))
    for number in range(200):
        put(fs, ROOT_INO, b"new", b"%03d" % number * (size // 3))
        fs.rename(ROOT_INO, b"new", ROOT_INO, b"file", 0, ROOT)
        attr = other.lookup(ROOT_INO, b"file")
        if number % 2:
            fs.unlink(ROOT_INO, b"file", ROOT)
            assert other.getattr(attr.ino).nlink == 0, "what was looked up stays for a moment"
        assert orphans(fs) <= 2 * PINS
    other.unmount()
    ticks(fs)
    assert orphans(fs) == 0
    assert fs.view().root.record.used <= used + 1  # the inode table may be one level higher
    assert_adds_up(fs)
