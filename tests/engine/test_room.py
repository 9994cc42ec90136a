"""A change that finds no space: it frees what is unused, and ends in any case."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, Handle, directory
from ivshmemfs.engine.transaction import Transaction
from ivshmemfs.errors import NoSpace
from ivshmemfs.format.inode import ORPHANS_INO
from tests.engine.asking import make_careful, release_meanwhile
from tests.support.regions import ROOT, TestRegion, in_turns, new_region, put

TARGET = b"t" * 900  # of a symbolic link, which takes a block of its own


@pytest.fixture
def third(roomy: TestRegion) -> Filesystem:
    return roomy.mount()


@pytest.fixture
def one(roomy: TestRegion) -> Filesystem:
    return roomy.mount()


@pytest.fixture
def two(roomy: TestRegion) -> Filesystem:
    return roomy.mount()


def fill(fs: Filesystem, left: int = 0) -> None:
    """Take all free blocks but about `left`."""
    handle, _ = fs.create(ROOT_INO, b"ballast", 0o644, os.O_WRONLY, ROOT)
    at, size = 0, 1 << 20
    while size >= fs.block_size:
        if (fs.statfs().blocks_avail - left) * fs.block_size <= size:
            size //= 2
        else:
            at += in_turns(lambda: fs.write(handle, at, b"z" * size))  # noqa: B023
    fs.release(handle)


def hold(fs: Filesystem, holder: Filesystem, count: int) -> list[Handle]:
    """Make orphans that `holder` holds open."""
    handles = []
    for number in range(count):
        handle, _ = holder.create(ROOT_INO, b"held%d" % number, 0o644, os.O_RDWR, ROOT)
        handles.append(handle)
        fs.unlink(ROOT_INO, b"held%d" % number, ROOT)
    return handles


def links(fs: Filesystem) -> None:
    for number in range(3):
        in_turns(lambda: fs.symlink(ROOT_INO, b"link%d" % number, TARGET, ROOT))  # noqa: B023


@pytest.mark.parametrize("count", [200, 600])
def test_a_write_in_pieces_ends_beside_many_held_orphans(
    one: Filesystem, two: Filesystem, count: int
) -> None:
    handle, _ = one.create(ROOT_INO, b"new", 0o644, os.O_RDWR, ROOT)
    hold(one, two, count)
    fill(one, left=8)
    written = in_turns(lambda: one.write(handle, 0, b"y" * (1 << 20)), 100)
    assert 0 < written < 1 << 20


def test_a_write_ends_beside_peers_that_leave_orphans_all_the_time(
    one: Filesystem, two: Filesystem, third: Filesystem
) -> None:
    handle, _ = one.create(ROOT_INO, b"new", 0o644, os.O_RDWR, ROOT)
    fill(one, left=40)

    def attempt() -> int:
        [left] = hold(two, third, 1)
        release_meanwhile(two, third, left)
        return one.write(handle, 0, b"y" * (1 << 20))

    assert in_turns(attempt, 100)


@pytest.mark.parametrize("remover", ["the mount itself", "another"])
def test_pins_go_for_space(one: Filesystem, two: Filesystem, remover: str) -> None:
    """Also the last one, although its time is not over."""
    make_careful(one, two)
    put(one, ROOT_INO, b"big", b"x" * (one.statfs().blocks_avail // 2 * one.block_size))
    two.lookup(ROOT_INO, b"big")
    assert two._lifetimes.pins
    (two if remover == "the mount itself" else one).unlink(ROOT_INO, b"big", ROOT)
    fill(one)
    links(two)
    assert not two._lifetimes.pins
    two.unmount()  # releases the rest of it


def test_a_pass_of_the_upkeep_hides_no_orphan(one: Filesystem, two: Filesystem) -> None:
    """What a tick has seen as held may be free when space is needed."""
    handles = hold(one, two, 256)
    size = one.statfs().blocks_avail // 2 * one.block_size
    in_turns(lambda: two.fallocate(handles[0], 0, 0, size))
    fill(one)
    one._orphans.reap_piece()
    release_meanwhile(one, two, handles[0])
    links(one)


def test_a_commit_of_another_peer_makes_the_upkeep_skip_nothing(
    one: Filesystem, two: Filesystem
) -> None:
    [handle] = hold(one, two, 1)
    release_meanwhile(one, two, handle)
    assert two._committer.hint.take(two.peer_id[0])
    more = one.tick()
    two._committer.hint.give()
    for _ in range(5):
        more = more and one.work()
    assert one.view().root.orphans == 0


def test_a_pin_of_two_callers_outlives_the_opening_of_one(one: Filesystem, two: Filesystem) -> None:
    make_careful(one, two)
    put(one, ROOT_INO, b"file", b"content")
    first, second = two.lookup(ROOT_INO, b"file"), two.lookup(ROOT_INO, b"file")
    two.release(two.open(first.ino, os.O_RDONLY, ROOT))
    one.unlink(ROOT_INO, b"file", ROOT)
    handle = two.open(second.ino, os.O_RDONLY, ROOT)
    assert bytes(two.read(handle, 0, 9)) == b"content"
    two.release(handle)


def test_pins_end_on_a_mount_that_may_not_write(one: Filesystem, two: Filesystem) -> None:
    make_careful(one, two)
    put(one, ROOT_INO, b"file", b"content")
    pinned = two.lookup(ROOT_INO, b"file")
    two._lifetimes.pins[pinned.ino] = 0.0, 1
    assert two._volume.member is not None
    two._volume.member.unfit = "it sees other memory"
    two.tick()
    assert not two._lifetimes.pins


def misname(ino: int) -> Callable[[Transaction], None]:
    def plan(tx: Transaction) -> None:
        tx.put(tx.inode(ino).evolve(nlink=0))
        orphans = tx.inode(ORPHANS_INO)
        place = directory.locate(tx, orphans, b"strange")
        tx.put(directory.insert(tx, orphans, place, ino, 8))
        tx.orphans += 1

    return plan


def lose_the_directory(tx: Transaction) -> None:
    tx.orphans += 1
    tx.remove(tx.inode(ORPHANS_INO))


@pytest.mark.parametrize("damage", ["a name", "the directory"])
def test_damaged_orphans_leave_the_error_as_it_is(damage: str) -> None:
    with new_region(2 << 20) as made:  # no fsck looks at it
        fs = made.mount()
        attr = put(fs, ROOT_INO, b"victim", b"x" * 3000)
        handle, _ = fs.create(ROOT_INO, b"new", 0o644, os.O_WRONLY, ROOT)
        fill(fs)
        fs.change(misname(attr.ino) if damage == "a name" else lose_the_directory, removal=True)
        with pytest.raises(NoSpace):
            put_many(fs)
        with pytest.raises(NoSpace):
            fs.fallocate(handle, 0, 0, 1 << 30)


def put_many(fs: Filesystem) -> None:
    for number in range(40):
        put(fs, ROOT_INO, b"more%d" % number, b"y" * 4000)
