"""Holes in files: where they are, making them, and filling them.

A hole is a block that a file's map has no pointer for; it reads as zeros.  Files that stand in
their inode have none.
"""

from __future__ import annotations

import errno

from ivshmemfs.engine import data, radix
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, RadixTree
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import FsError
from ivshmemfs.format import inode as fmt

PIECES = 32  # holes that one call of `fill` fills


def _tree(inode: Inode) -> RadixTree:
    return RadixTree(inode.record.height, inode.data)


def next_data(view: View, inode: Inode, offset: int) -> int:
    """Where data begins at or behind `offset`; raises ENXIO when there is none."""
    record = inode.record
    if offset >= record.size or record.payload == fmt.EMPTY:
        raise FsError(errno.ENXIO)
    if record.payload == fmt.INLINE:
        return offset
    first = offset // view.block_size
    found = radix.next_leaf(view.nodes, _tree(inode), inode.ino, first, present=True)
    start = max(offset, found * view.block_size)
    if found < 0 or start >= record.size:
        raise FsError(errno.ENXIO)
    return start


def next_hole(view: View, inode: Inode, offset: int) -> int:
    """Where a hole begins at or behind `offset`, the end of the file at the latest.

    Raises ENXIO from the end on.
    """
    record = inode.record
    if offset >= record.size:
        raise FsError(errno.ENXIO)
    if record.payload == fmt.EMPTY:
        return offset
    if record.payload == fmt.INLINE:
        return record.size
    first = offset // view.block_size
    found = radix.next_leaf(view.nodes, _tree(inode), inode.ino, first, present=False)
    return min(max(offset, found * view.block_size), record.size)


def punch(tx: Transaction, inode: Inode, offset: int, length: int) -> Inode:
    """The file with zeros in place of `length` bytes; whole blocks among them become holes.

    What that means for its times, the caller knows.
    """
    size, block = inode.record.size, tx.block_size
    end = min(offset + length, size)
    if offset >= end or inode.record.payload == fmt.EMPTY:
        return inode
    if inode.record.payload == fmt.INLINE:
        return data.write(tx, inode, offset, bytes(end - offset))
    first = -(-offset // block)
    last = -(-end // block) if end == size else end // block
    if first > last:  # within one block
        return _blank(tx, inode, offset, end)
    inode = _blank(tx, inode, offset, min(first * block, end))
    inode = _blank(tx, inode, max(last * block, offset), end)
    return _without(tx, inode, first, last)


def _blank(tx: Transaction, inode: Inode, start: int, end: int) -> Inode:
    """Zeros in a part of one block; nothing to do in a hole."""
    if start >= end:
        return inode
    if radix.find(tx.space, _tree(inode), inode.ino, start // tx.block_size) == NULL:
        return inode
    return data.write(tx, inode, start, bytes(end - start))


def _without(tx: Transaction, inode: Inode, first: int, last: int) -> Inode:
    """No pointers to the blocks from `first` up to `last`, which is not one of them."""
    before = tx.space.balance
    tree = radix.clear(tx.space, _tree(inode), inode.ino, first, last)
    return inode.evolve(
        data=tree.slots,
        height=tree.height,
        blocks=inode.record.blocks + tx.space.balance - before,
    )


def fill(tx: Transaction, inode: Inode, offset: int, end: int, most: int) -> tuple[Inode, int]:
    """The file with blocks of zeros in place of holes from `offset` on, up to `end`.

    Fills at most `most` bytes in PIECES pieces; returns where it is to go on, too: at `end` when
    nothing is left.  The file may grow to `end`.
    """
    at, stop = offset, end
    for _ in range(PIECES):
        size = inode.record.size
        hole = next_hole(tx, inode, at) if at < size else at
        if hole >= stop:
            return inode, min(hole, end)
        if stop == end:
            stop = min(hole + most, end)
        at = stop
        if hole < size:
            try:
                at = min(next_data(tx, inode, hole), stop)
            except FsError as error:
                if error.errno != errno.ENXIO:
                    raise
        inode = data.write(tx, inode, hole, bytes(at - hole))
        if at >= stop:
            break
    return inode, at
