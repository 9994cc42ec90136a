"""File data: reads, writes and truncations within one view or one transaction.

    EMPTY   no bytes, or a hole of `size` bytes
    INLINE  all bytes are in the inode block; the payload is as long as the file
    MAP     a radix tree of data blocks; missing blocks are holes

Fixed files (`engine/fixed.py`) are MAP; their blocks are changed in place.

Bytes of the last block behind the end of the file are zero, so a longer file reads zeros there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ivshmemfs.engine import fixed, radix
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, SIZE, RadixTree
from ivshmemfs.engine.transaction import BlockCount, Transaction, View
from ivshmemfs.errors import FsError
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import node as node_format
from ivshmemfs.format.inode import INODE

_WRITTEN: Final = INODE.places(
    "size", "blocks", "mtime_ns", "ctime_ns", "payload", "height", "payload_size"
)
_PAYLOAD: Final = fmt.PAYLOAD_OFFSET  # read without a look-up
Buffer = bytes | bytearray | memoryview


def read(
    view: View, inode: Inode, offset: int, length: int, into: memoryview | None = None
) -> Buffer:
    """Return up to `length` bytes from `offset`; fewer at the end of the file.

    `into` is a buffer of at least `length` bytes.  The result is a part of it, or other bytes.
    """
    record = inode.record
    length = min(length, record.size - offset)
    if length <= 0:
        return b""
    if record.payload == fmt.INLINE:
        return inode.data[offset : offset + length]
    if record.payload == fmt.EMPTY:
        return bytes(length)
    size = view.block_size
    first, skip = divmod(offset, size)
    count = (skip + length - 1) // size + 1
    tree = RadixTree(record.height, inode.data)
    pointers = radix.find_range(view.nodes, tree, inode.ino, first, count)
    return view.store.gather(pointers, skip, length, into)


def read_to(view: View, inode: Inode, offset: int, length: int, file: int) -> int:
    """Copy up to `length` bytes to the same offset in an open local file; return their number.

    After an error, the file's contents there are undefined.  Raises FsError for errors of the file
    as well.
    """
    record = inode.record
    length = max(min(length, record.size - offset), 0)
    if record.payload == fmt.MAP and length:
        first, skip = divmod(offset, view.block_size)
        count = (skip + length - 1) // view.block_size + 1
        tree = RadixTree(record.height, inode.data)
        pointers = radix.find_range(view.nodes, tree, inode.ino, first, count)
        view.store.drain(pointers, skip, length, file, offset)
        return length
    piece = memoryview(read(view, inode, offset, length))
    with _about_file():
        while piece:
            done = os.pwrite(file, piece, offset)
            piece, offset = piece[done:], offset + done
    return length


@contextmanager
def _about_file() -> Iterator[None]:
    """Turn an OSError of the local file into FsError, which does not blame the region."""
    try:
        yield
    except OSError as error:
        raise FsError(error.errno or errno.EIO, error.strerror or "") from None


def _capacity(tx: Transaction, inode: Inode) -> int:
    """Return how many bytes of payload the inode block holds."""
    return tx.block_size - _PAYLOAD - len(inode.xattr)


def slots(tx: Transaction, inode: Inode) -> int:
    """Return how many top slots of a block map the inode block holds."""
    return _capacity(tx, inode) // SIZE


def write(tx: Transaction, inode: Inode, offset: int, data: Buffer) -> Inode:
    """Return the file with `data` at `offset`; raises NoSpace, EFBIG."""
    end = offset + len(data)
    if end > fmt.MAX_FILE_SIZE:
        raise FsError(errno.EFBIG)
    record = inode.record
    if record.fixed:
        return fixed.write(tx, inode, offset, data)
    had, kind = record.size, record.payload
    size = max(had, end)
    small = kind == fmt.INLINE or (kind == fmt.EMPTY and not had)
    if small and size <= _capacity(tx, inode):
        old = inode.data
        if len(old) < offset:
            old += bytes(offset - len(old))
        new = b"".join((old[:offset], data, old[end:]))
        now = tx.modified(record.mtime_ns)
        values = (size, record.blocks, now, now, fmt.INLINE, 0, len(new))
        return Inode(inode.ino, INODE.placed(record, _WRITTEN, values), new, inode.xattr)
    count = BlockCount(tx.space, inode)
    inode = _as_map(tx, inode)
    buffer = _whole_blocks(tx, inode, offset, data, had)
    pointers = tx.space.claim(-(-len(buffer) // tx.block_size))
    tx.space.fill(pointers, buffer)
    return _with_blocks(tx, inode, offset // tx.block_size, pointers, size, count)


def write_from(
    tx: Transaction, inode: Inode, offset: int, length: int, file: int
) -> tuple[Inode, int]:
    """Write up to `length` bytes from the same offset in an open local file.

    Returns (the file, number of bytes).  Whole blocks behind the end of the file are read from the
    local file into the region without a copy.  Raises NoSpace, EFBIG, FsError for errors of the
    local file.
    """
    end, record = offset + length, inode.record
    if end > fmt.MAX_FILE_SIZE:
        raise FsError(errno.EFBIG)
    if (
        record.fixed
        or offset % tx.block_size
        or offset < record.size
        or end <= _capacity(tx, inode)
    ):
        with _about_file():
            content = os.pread(file, length, offset)
        return write(tx, inode, offset, content) if content else inode, len(content)
    count = BlockCount(tx.space, inode)
    inode = _as_map(tx, inode)
    pointers = tx.space.claim(-(-length // tx.block_size))
    got = tx.space.fill_from(pointers, file, offset, length)
    pointers = pointers[: -(-got // tx.block_size) * SIZE]
    if not got:
        return inode, 0
    first = offset // tx.block_size
    inode = _with_blocks(tx, inode, first, pointers, offset + got, count)
    return inode, got


def _with_blocks(
    tx: Transaction, inode: Inode, first: int, pointers: bytes, size: int, count: BlockCount
) -> Inode:
    """Return the file with filled blocks from block `first` on; `count` began before them."""
    record = inode.record
    tree = RadixTree(record.height, inode.data)
    tree = radix.store(tx.space, tree, inode.ino, first, pointers, slots(tx, inode))
    now, data = tx.modified(record.mtime_ns), tree.slots
    values = (size, count.total(), now, now, fmt.MAP, tree.height, len(data))
    return Inode(inode.ino, INODE.placed(record, _WRITTEN, values), data, inode.xattr)


def _as_map(tx: Transaction, inode: Inode) -> Inode:
    """Return the same file with its bytes in a block; the caller counts the block."""
    if inode.record.payload == fmt.MAP:
        return inode
    pointer = b""
    if inode.data:
        pointer = tx.space.claim(1)
        tx.space.fill(pointer, inode.data)
    return inode.evolve(data=pointer, payload=fmt.MAP, height=0)


def _whole_blocks(tx: Transaction, inode: Inode, offset: int, data: Buffer, had: int) -> Buffer:
    """Return `data` completed to whole blocks by the old contents of the file, `had` bytes.

    The last block may end with the file.
    """
    size = tx.block_size
    skip, end = offset % size, offset + len(data)
    rest = min(-end % size, max(had - end, 0))
    if not skip and not rest:
        return data
    head = _old_bytes(tx, inode, offset - skip, skip) if skip else b""
    tail = _old_bytes(tx, inode, end, rest) if rest else b""
    return b"".join((head, data, tail))


def _old_bytes(tx: Transaction, inode: Inode, offset: int, length: int) -> Buffer:
    """Return `length` bytes within one block, zeros where the file has none."""
    got = _read_map(tx, inode, offset, min(length, max(inode.record.size - offset, 0)))
    return got if len(got) == length else bytes(got) + bytes(length - len(got))


def _read_map(tx: Transaction, inode: Inode, offset: int, length: int) -> Buffer:
    """Return `length` bytes within one block of a MAP file."""
    if length <= 0:
        return b""
    tree = RadixTree(inode.record.height, inode.data)
    first, skip = divmod(offset, tx.block_size)
    pointer = radix.find(tx.space, tree, inode.ino, first)
    return tx.store.gather(pointer, skip, length)


def modified(tx: Transaction, inode: Inode) -> Inode:
    """Return the file with a new mtime and ctime, and the same contents."""
    now = tx.modified(inode.record.mtime_ns)
    return inode.evolve(mtime_ns=now, ctime_ns=now)


def truncate(tx: Transaction, inode: Inode, size: int) -> Inode:
    """Return the file cut or extended to `size` bytes; raises NoSpace, EFBIG."""
    if size > fmt.MAX_FILE_SIZE:
        raise FsError(errno.EFBIG)
    record = inode.record
    fixed.keep_size(inode, size)
    now = tx.modified(record.mtime_ns)
    times: dict[str, Any] = {"mtime_ns": now, "ctime_ns": now, "size": size}
    count = BlockCount(tx.space, inode)
    if record.payload == fmt.INLINE:
        if size <= _capacity(tx, inode):
            data = inode.data[:size] + bytes(max(size - record.size, 0))
            kind = fmt.INLINE if size else fmt.EMPTY
            return inode.evolve(data=data, payload=kind, **times)
        inode = _as_map(tx, inode)
    elif record.payload == fmt.MAP and size < record.size:
        inode = _cut(tx, inode, size)
    blocks = count.total()
    if not size:
        return inode.evolve(data=b"", payload=fmt.EMPTY, height=0, blocks=blocks, **times)
    return inode.evolve(blocks=blocks, **times)


def _cut(tx: Transaction, inode: Inode, size: int) -> Inode:
    """Return a MAP file without blocks behind `size`, and zeros behind it in its last block."""
    block_size, ino = tx.block_size, inode.ino
    tree = RadixTree(inode.record.height, inode.data)
    tree = radix.cut(tx.space, tree, ino, -(-size // block_size))
    last, rest = divmod(size, block_size)
    if rest:
        pointer = radix.find(tx.space, tree, ino, last)
        if pointer != NULL:
            kept = tx.store.gather(pointer, 0, rest)
            fresh = tx.space.claim(1)
            tx.space.fill(fresh, kept)
            tree = radix.store(tx.space, tree, ino, last, fresh, slots(tx, inode))
    return inode.evolve(data=tree.slots, height=tree.height)


def _held(block_size: int, count: int) -> int:
    """Return how many blocks a new file with `count` data blocks takes: with map and inode."""
    tops = fmt.payload_capacity(block_size) // SIZE
    fanout = node_format.index_fanout(block_size)
    total = level = count
    while level > tops:
        level = -(-level // fanout)
        total += level
    return total + 1


def most_blocks(block_size: int, room: int) -> int:
    """Return how many data blocks one new file can have when `room` blocks are free."""
    low, high = 0, max(room, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if _held(block_size, middle) <= room:
            low = middle
        else:
            high = middle - 1
    return low
