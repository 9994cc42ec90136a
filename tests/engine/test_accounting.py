"""What a change of an inode adds to its number of blocks, and what it frees."""

from __future__ import annotations

import os

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.transaction import BlockCount, Transaction
from tests.support.regions import ROOT, put


def test_claims_and_replacements_count(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", bytes(20 * fs.block_size))

    def plan(tx: Transaction) -> None:
        inode = tx.inode(attr.ino)
        blocks = inode.record.blocks
        count = BlockCount(tx.space, inode)
        assert count.total() == blocks
        claimed = tx.space.claim(3)
        assert count.total() == blocks + 3
        tx.space.replace(claimed[:16])  # an own block goes back to the pool
        assert count.total() == blocks + 2
        later = BlockCount(tx.space, inode)
        tx.space.replace(tx.pointer_to(ROOT_INO))  # a published one
        assert count.total() == blocks + 1
        assert later.total() == blocks - 1  # what came before it belongs to another change

    fs.change(plan)


def test_an_inode_counts_only_its_own_blocks(fs: Filesystem) -> None:
    """Two inodes that change in one transaction; fsck compares both with their trees."""
    size = 3 * fs.block_size
    one = put(fs, ROOT_INO, b"one", bytes(size))
    other = put(fs, ROOT_INO, b"other", bytes(size))
    handle = fs.open(one.ino, os.O_RDWR, ROOT)
    before = fs.getattr(other.ino).blocks
    fs.write(handle, size, bytes(size))
    assert fs.getattr(one.ino).blocks == 2 * before
    fs.rename(ROOT_INO, b"one", ROOT_INO, b"other", 0, ROOT)
    fs.setattr(one.ino, ROOT, size=fs.block_size)
    assert fs.getattr(one.ino).blocks == before // 3
    fs.release(handle)
