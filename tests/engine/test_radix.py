"""Trees of pointers, beyond what files and the inode table show of them."""

from __future__ import annotations

import pytest

from ivshmemfs.engine import Filesystem, radix
from ivshmemfs.engine.radix import RadixTree
from ivshmemfs.errors import Corrupt
from ivshmemfs.format import words


def test_a_damaged_node_that_ends_within_a_slot_has_its_whole_slots(fs: Filesystem) -> None:
    tree = RadixTree(0, b"\xff" * (2 * radix.SIZE + 1))
    assert radix.next_leaf(fs.store, tree, 5, 0, present=False) == 2
    assert radix.next_leaf(fs.store, tree, 5, 1, present=True) == 1


def test_a_block_is_no_hole_although_its_weight_says_so(fs: Filesystem) -> None:
    """`fallocate` would fill it for ever."""
    forged = words.POINTER.pack(5, 0, 7)
    tree = RadixTree(0, forged)
    assert radix.next_leaf(fs.store, tree, 9, 0, present=True) == 0
    with pytest.raises(Corrupt, match="inode 9: the pointer to a block has weight 0"):
        radix.next_leaf(fs.store, tree, 9, 0, present=False)
