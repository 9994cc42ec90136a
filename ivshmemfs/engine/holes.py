"""Holes in files: find them, make them and fill them.

A hole is a block without a pointer in the file's block map; it reads as zeros.  INLINE files have
no holes.
"""

from __future__ import annotations

import errno

from ivshmemfs.engine import data, fixed, radix
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, RadixTree
from ivshmemfs.engine.transaction import BlockCount, Transaction, View
from ivshmemfs.errors import FsError
from ivshmemfs.format import inode as fmt

PIECES = 32  # holes that one call of `fill` fills at most


def _tree(inode: Inode) -> RadixTree:
    return RadixTree(inode.record.height, inode.data)


def next_data(view: View, inode: Inode, offset: int) -> int:
    """Return the first offset of data from `offset` on; raises ENXIO when there is none."""
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
    """Return the first offset of a hole from `offset` on; the end of the file counts as a hole.

    Raises ENXIO for an offset at the end or behind it.
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
    """Return the file with zeros in place of `length` bytes; whole blocks become holes.

    The caller sets the times of the file.  Raises ETXTBSY for a fixed file.
    """
    fixed.keep_blocks(inode)
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
    """Return the file with zeros in a part of one block; a hole stays one."""
    if start >= end:
        return inode
    if radix.find(tx.space, _tree(inode), inode.ino, start // tx.block_size) == NULL:
        return inode
    return data.write(tx, inode, start, bytes(end - start))


def _without(tx: Transaction, inode: Inode, first: int, last: int) -> Inode:
    """Return the file without blocks `first` to `last - 1`."""
    count = BlockCount(tx.space, inode)
    tree = radix.clear(tx.space, _tree(inode), inode.ino, first, last)
    return inode.evolve(
        data=tree.slots,
        height=tree.height,
        blocks=count.total(),
    )


def fill(tx: Transaction, inode: Inode, offset: int, end: int, most: int) -> tuple[Inode, int]:
    """Return (the file with blocks of zeros in its holes from `offset` up to `end`, next offset).

    Fills at most `most` bytes in PIECES holes.  The caller goes on at the next offset; it is `end`
    when no hole is left.  The file may grow to `end`.  Raises NoSpace, EFBIG.
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
