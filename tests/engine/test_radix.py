"""Trees of pointers, beyond what files and the inode table show of them."""

from __future__ import annotations

from ivshmemfs.engine import Filesystem, radix
from ivshmemfs.engine.radix import RadixTree


def test_a_damaged_node_that_ends_within_a_slot_has_its_whole_slots(fs: Filesystem) -> None:
    tree = RadixTree(0, b"\xff" * (2 * radix.SIZE + 1))
    assert radix.next_leaf(fs.store, tree, 5, 0, present=False) == 2
    assert radix.next_leaf(fs.store, tree, 5, 1, present=True) == 1
