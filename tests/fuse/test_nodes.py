"""The numbers that the kernel gets for directories that other machines move."""

from __future__ import annotations

from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.fuse.nodes import Nodes, inode_of


def test_a_directory_keeps_its_number_where_it_is() -> None:
    nodes = Nodes()
    assert [nodes.found(7, 1) for _ in range(3)] == [7, 7, 7]
    nodes.moved(7, 3)
    assert nodes.found(7, 3) == 7


def test_a_directory_found_elsewhere_is_another_one() -> None:
    nodes = Nodes()
    seen = [nodes.found(7, parent) for parent in (1, 2, 2, 1, 2)]
    assert len(set(seen)) == 4
    assert seen[1] == seen[2]
    assert [inode_of(node) for node in seen] == [7] * 5
    assert nodes.found(8, 1) == 8


def test_numbers_stay_positive_and_unlike_the_one_before() -> None:
    nodes = Nodes()
    before = nodes.found(MAX_INO, 1)
    for parent in range(2, 600):
        node = nodes.found(MAX_INO, parent)
        assert node != before
        assert 0 < node < 1 << 63
        assert inode_of(node) == MAX_INO
        before = node


def test_forgetting() -> None:
    nodes = Nodes()
    assert nodes.forget(5)
    old, new = nodes.found(7, 1), nodes.found(7, 2)
    assert not nodes.forget(old)
    assert nodes.found(7, 2) == new
    assert nodes.forget(new)
    assert nodes.found(7, 3) == 7
    nodes.moved(99, 3)
    assert nodes.found(99, 4) == 99
