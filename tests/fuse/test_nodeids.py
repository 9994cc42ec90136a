"""The numbers that the kernel gets for what other machines move."""

from __future__ import annotations

import pytest

from ivshmemfs.errors import StaleHandle
from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.fuse.nodeids import NodeIds

A, B = b"a", b"b"


def test_a_directory_keeps_its_number_where_it_is() -> None:
    nodes = NodeIds()
    assert [nodes.found(7, 1, A) for _ in range(3)] == [7, 7, 7]
    assert nodes.found(7, 1, B) == 7  # renamed within its parent: the kernel needs no lock for that
    nodes.moved((1, B), (3, A), 7)
    assert nodes.found(7, 3, A) == 7


def test_a_directory_found_elsewhere_is_another_one() -> None:
    nodes = NodeIds()
    seen = [nodes.found(7, parent, A) for parent in (1, 2, 2, 1, 2)]
    assert len(set(seen)) == 4
    assert seen[1] == seen[2]
    assert [nodes.inode_of(node) for node in seen] == [7] * 5
    assert nodes.found(8, 1, B) == 8


def test_each_number_of_the_parent_is_a_place_of_its_own() -> None:
    nodes = NodeIds()
    parent = nodes.found(7, 1, A), nodes.found(7, 2, A)
    assert nodes.found(8, parent[0], B) == 8
    assert nodes.found(8, parent[1], B) != 8


def test_numbers_stay_positive_and_never_come_back() -> None:
    nodes = NodeIds()
    seen = [nodes.found(MAX_INO, parent, A) for parent in range(1, 600)]
    assert len(set(seen)) == len(seen)
    assert all(0 < node < 1 << 63 for node in seen)
    assert {nodes.inode_of(node) for node in seen} == {MAX_INO}


def test_forgetting() -> None:
    nodes = NodeIds()
    assert nodes.forget(5, 1)
    old, new = nodes.found(7, 1, A), nodes.found(7, 2, A)
    assert not nodes.forget(old, 1)
    assert nodes.found(7, 2, A) == new
    assert not nodes.forget(new, 1)  # told twice
    assert nodes.inode_of(new) == 7
    assert nodes.forget(new, 1)
    with pytest.raises(StaleHandle):
        nodes.inode_of(new)
    assert nodes.found(7, 3, A) == 7
    nodes.moved((3, B), (4, B), 99)
    assert nodes.found(99, 4, B) == 99


def test_the_latest_number_is_forgotten_before_an_older_one() -> None:
    """A process is still in the old place, so the plain number would have to move."""
    nodes = NodeIds()
    old, new = nodes.found(7, 1, A), nodes.found(7, 2, A)
    assert nodes.forget(new, 1)
    assert nodes.found(7, 2, A) not in (old, new)


def test_the_kernel_moved_another_directory_than_it_believed() -> None:
    """Between its look-up and its rename another machine replaced what was there."""
    nodes = NodeIds()
    believed, other = nodes.found(7, 1, A), nodes.found(8, 5, A)
    nodes.moved((1, A), (2, B), 8)
    assert nodes.found(7, 1, A) != believed
    assert nodes.found(8, 2, B) != other


def test_a_file_was_moved_where_the_kernel_believed_a_directory() -> None:
    nodes = NodeIds()
    believed = nodes.found(7, 1, A)
    nodes.moved((1, A), (2, B), 99)
    assert nodes.found(7, 1, A) != believed


def test_a_directory_that_was_moved_over() -> None:
    nodes = NodeIds()
    over, comes = nodes.found(7, 1, A), nodes.found(8, 2, B)
    nodes.moved((2, B), (1, A), 8)
    assert nodes.found(8, 1, A) == comes
    assert nodes.found(7, 1, A) != over


def test_an_exchange() -> None:
    nodes = NodeIds()
    one, two = nodes.found(7, 1, A), nodes.found(8, 2, B)
    nodes.moved((1, A), (2, B), 7, exchanged=8)
    assert (nodes.found(7, 2, B), nodes.found(8, 1, A)) == (one, two)


def test_an_exchange_with_a_file() -> None:
    nodes = NodeIds()
    one = nodes.found(7, 1, A)
    nodes.moved((1, A), (2, B), 7, exchanged=99)
    assert nodes.found(7, 2, B) == one


def test_a_directory_looked_up_by_itself() -> None:
    nodes = NodeIds()
    assert nodes.found_by_handle(7) == 7
    assert nodes.found_parent(3) == 3
    assert nodes.found(7, 3, A) == 7  # its place, at last
    assert nodes.found(3, 1, B) == 3
    moved = nodes.found(7, 4, A)
    assert moved != 7
    assert nodes.found_by_handle(7) == 7  # an older number stays valid
    assert nodes.found_by_handle(moved) == nodes.found_parent(7) == moved
    assert nodes.forget(7, 3) is False
    assert nodes.forget(moved, 3)
    with pytest.raises(StaleHandle):
        nodes.found_by_handle(moved)


def test_a_number_that_is_avoided() -> None:
    nodes = NodeIds()
    assert nodes.found(7, 1, A) == 7
    other = nodes.found(7, 1, B, avoided=7)
    assert other > MAX_INO
    assert nodes.found(7, 1, B, avoided=7) == nodes.found(7, 1, B) == other


def test_the_passing_number_of_a_file() -> None:
    nodes = NodeIds()
    passing = nodes.passing(7)
    assert passing > MAX_INO
    assert nodes.passing(7) == passing
    assert nodes.inode_of(passing) == 7
    assert nodes.found_by_handle(passing, file=True) == passing
    assert not nodes.forget(passing, 2)
    assert nodes.inode_of(passing) == 7
    assert not nodes.forget(passing, 1)
    with pytest.raises(StaleHandle):
        nodes.inode_of(passing)
    assert nodes.passing(7) not in (7, passing)
    assert nodes.found_by_handle(7, file=True) == 7
    assert nodes.forget(7, 1)
