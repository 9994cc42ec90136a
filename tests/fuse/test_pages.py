"""Of which files the kernel is told to drop pages: those that other machines changed, alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.fuse.nodeids import NodeIds
from ivshmemfs.fuse.pages import COMPARED_AT_ONCE, Invalidation, Pages
from tests.support.regions import ROOT, TestRegion, new_region

FLAGS = os.O_RDWR | os.O_CREAT


class Mounted:
    """An engine, its open files, and what the kernel was told."""

    def __init__(self, made: TestRegion) -> None:
        self.fs: Filesystem = made.mount()
        self.told: list[Invalidation] = []
        self.node_ids = NodeIds()
        self.pages = Pages(self.fs, self.node_ids.of_file, self.told.extend)

    def write(self, name: bytes, offset: int, content: bytes) -> int:
        handle, attr = self.fs.create(ROOT_INO, name, 0o644, FLAGS, ROOT)
        self.fs.write(handle, offset, content)
        self.fs.release(handle)
        return attr.ino

    def told_nodes(self) -> list[int]:
        """What the kernel is told now."""
        del self.told[:]
        for _ in self.pages.check():
            pass
        return [told.node for told in self.told]


@pytest.fixture
def mounts() -> Iterator[tuple[Mounted, Mounted]]:
    with new_region(8 << 20) as made:
        here, there = Mounted(made), Mounted(made)
        yield here, there
        here.fs.unmount()
        there.fs.unmount()


def _watched(here: Mounted, name: bytes = b"a", content: bytes = b"x" * 100) -> int:
    """A file that is open here, and watched."""
    ino = here.write(name, 0, content)
    here.fs.open(ino, os.O_RDONLY, ROOT)
    here.pages.note(ino)
    return ino


def test_a_change_of_another_machine_is_told_once(mounts: tuple[Mounted, Mounted]) -> None:
    here, there = mounts
    ino = _watched(here)
    assert here.told_nodes() == []
    there.write(b"a", 0, b"y")
    assert here.told_nodes() == [ino]
    assert here.told_nodes() == []


def test_own_changes_are_not_told(mounts: tuple[Mounted, Mounted]) -> None:
    """The kernel knows of them, and would drop what a program has just mapped."""
    here, there = mounts
    ino = _watched(here)
    for number in range(5):
        here.write(b"a", number, b"own")
        assert here.told_nodes() == []
    there.write(b"other", 0, b"y")
    assert here.told_nodes() == []
    here.write(b"a", 0, b"own")
    assert here.told_nodes() == []
    there.write(b"a", 0, b"y")
    here.write(b"a", 1, b"own")
    assert here.told_nodes() == [ino], "an own change on top hides nothing"


def test_a_file_is_told_with_its_size_and_last_byte(mounts: tuple[Mounted, Mounted]) -> None:
    """Also one that grew after it was cut, which is smaller than at the last look here."""
    here, there = mounts
    ino = _watched(here)
    there.write(b"a", 5000, b"end")
    assert here.told_nodes() == [ino]
    assert here.told == [Invalidation(ino, 5003, b"d")]
    there.fs.setattr(ino, ROOT, size=10)
    assert here.told_nodes() == [ino]
    assert here.told == [Invalidation(ino, 10, b"x")]
    there.fs.setattr(ino, ROOT, size=2)
    there.write(b"a", 7, b"new")
    assert here.told_nodes() == [ino]
    assert here.told == [Invalidation(ino, 10, b"w")]
    there.fs.setattr(ino, ROOT, size=0)
    assert here.told_nodes() == [ino]
    assert here.told == [Invalidation(ino, 0, b"")]


def test_every_number_by_which_the_kernel_knows_a_file(mounts: tuple[Mounted, Mounted]) -> None:
    here, there = mounts
    ino = _watched(here)
    passing = here.node_ids.passing(ino)
    there.write(b"a", 0, b"y")
    assert here.told_nodes() == [ino, passing]


def test_closed_and_removed_files_are_watched_no_more(mounts: tuple[Mounted, Mounted]) -> None:
    here, there = mounts
    ino = here.write(b"a", 0, b"x")
    handle = here.fs.open(ino, os.O_RDONLY, ROOT)
    here.pages.note(ino)
    there.fs.unlink(ROOT_INO, b"a", ROOT)
    assert here.told_nodes() == [ino]  # its link count changed
    here.fs.release(handle)
    here.pages.tidy()
    there.write(b"b", 0, b"y")
    assert here.told_nodes() == []
    here.pages.note(ino)  # it has gone
    there.write(b"b", 0, b"z")
    assert here.told_nodes() == []


def test_many_files_are_compared_in_pieces(mounts: tuple[Mounted, Mounted]) -> None:
    here, there = mounts
    inodes = [_watched(here, b"%d" % number, b"") for number in range(COMPARED_AT_ONCE + 1)]
    there.write(b"0", 0, b"y")
    there.write(b"%d" % COMPARED_AT_ONCE, 0, b"y")
    assert sum(1 for _ in here.pages.check()) == 2
    assert [told.node for told in here.told] == [inodes[0], inodes[-1]]
