"""Fixed files: shared memory of programs that has a name, an owner and a size in the filesystem.

    ordinary   a change takes new blocks and leaves the old ones; mkfs and programs make such files
    fixed      `make`: the data blocks follow each other in the region, and are changed in place
    ordinary   `release`: the same blocks; from now on a change takes new ones

A program may map the blocks of a fixed file and store to them at any time, unseen by all peers.  So
the blocks keep their places and tags while the file is fixed.  Its last name cannot be removed, and
its size stays: only `release` ends that, as swapoff(8) does for a swap file.  Nothing but a program
that goes on after the release can harm other files.

A write through a mount stores in place and commits new times.  It is not atomic.  A peer that was
declared gone stores nothing more: the guard of the blocks is checked as for private blocks.
"""

from __future__ import annotations

import errno
import stat
from typing import Final, NamedTuple

from ivshmemfs.engine import radix
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, SIZE, RadixTree
from ivshmemfs.engine.transaction import BlockCount, Transaction, View
from ivshmemfs.errors import Corrupt, FsError, InUse, NoSpace, Restart, StaleHandle
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import words
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.inode import INODE

_POINTER = words.POINTER
_MADE: Final = INODE.places("size", "blocks", "payload", "height", "payload_size", "fixed")
_WRITTEN: Final = INODE.places("mtime_ns", "ctime_ns")
#: Bytes: sizes of fixed files are multiples of it, and they begin at such an offset of the region.
PAGE: Final = 4096
LARGE_PAGE: Final = 64 << 10  # of some ARM64 kernels, which map no smaller ones
#: Preferred alignments: a huge page for large files, then pages of all kernels.
ALIGNMENTS: Final = (2 << 20, LARGE_PAGE, PAGE)
KEEPS_NAME: Final = (
    "programs may have this file mapped: 'ivshmemfs map --release' makes it an ordinary file"
)
RELEASED: Final = (
    "the mapped file was released as an ordinary one, and its place may be another file's: open it "
    "again"
)
KEEPS_SIZE: Final = "a file that programs may have mapped keeps its size"


class Extent(NamedTuple):
    """Where a fixed file lies in the region; bytes."""

    offset: int
    size: int


def whole_pages(size: int) -> int:
    """Return `size` rounded up to whole pages; raises EINVAL unless it is positive, EFBIG."""
    if size <= 0:
        raise FsError(errno.EINVAL, "a mapped file has at least one byte")
    if size > fmt.MAX_FILE_SIZE:
        raise FsError(errno.EFBIG)
    return -(-size // PAGE) * PAGE


def make(tx: Transaction, inode: Inode, size: int, head: bytes = b"") -> Inode:
    """Return an empty new file as a fixed one of `size` bytes, a multiple of PAGE.

    It begins with `head`, of at most a block; zeros follow.

    Raises NoSpace when so many blocks are not free, or do not follow each other; EOPNOTSUPP on a
    filesystem that older programs may write.
    """
    if not tx.store.superblock.keeps_fixed:
        raise FsError(
            errno.EOPNOTSUPP,
            "the filesystem was made by an older version, whose programs would move such a file: "
            "make a new filesystem",
        )
    geometry = tx.store.geometry
    count = -(-size // tx.block_size)
    if tx.root.used + count > geometry.block_count - geometry.reserve:
        raise NoSpace(f"the region has no room for {size} more bytes")
    blocks = BlockCount(tx.space, inode)
    pointers = tx.space.claim_row(count, _steps(geometry, size))
    if head:
        tx.space.fill(pointers[:SIZE], head)
    room = fmt.payload_capacity(tx.block_size) // SIZE
    tree = radix.store(tx.space, RadixTree(0, b""), inode.ino, 0, pointers, room)
    values = (size, blocks.total(), fmt.MAP, tree.height, len(tree.slots), 1)
    return Inode(inode.ino, INODE.placed(inode.record, _MADE, values), tree.slots, inode.xattr)


def _steps(geometry: Geometry, size: int) -> list[tuple[int, int]]:
    """Return (first block, step in blocks) for each alignment that suits a file of `size`."""
    block_size, steps = geometry.block_size, list[tuple[int, int]]()
    for alignment in ALIGNMENTS:
        if alignment <= max(size, LARGE_PAGE):
            step = max(alignment // block_size, 1)
            steps.append((-(geometry.data_offset // block_size) % step, step))
    return steps


def extent(view: View, ino: int) -> Extent:
    """Return where a fixed file lies; of the row it checks both ends.

    Raises EISDIR, EINVAL for any other file, Corrupt, StaleHandle.
    """
    inode = view.inode(ino)
    record = inode.record
    if not record.fixed:
        raise _not_fixed(record.mode)
    count = -(-record.size // view.block_size)
    tree = RadixTree(record.height, inode.data)
    ends = b"".join(radix.find_range(view.nodes, tree, ino, at, 1) for at in (0, count - 1))
    first, last = _POINTER.iter_unpack(ends)
    geometry = view.store.geometry
    if not first[2] or last[0] - first[0] != count - 1 or last[0] >= geometry.block_count:
        raise Corrupt(f"inode {ino}: a fixed file whose blocks do not follow each other")
    if not view.store.blocks.check(ends):
        raise Restart(f"blocks of inode {ino} are another file's")
    return Extent(geometry.data_offset + first[0] * view.block_size, record.size)


def expect(view: View, ino: int, place: Extent) -> None:
    """Raise StaleHandle unless the file is still a fixed one, at `place`; Corrupt."""
    try:
        found = extent(view, ino)
    except Corrupt:
        raise
    except FsError:  # ordinary, or removed
        found = None
    if found != place:
        raise StaleHandle(RELEASED)


def _not_fixed(mode: int) -> FsError:
    if stat.S_ISDIR(mode):
        return FsError(errno.EISDIR)
    if stat.S_ISLNK(mode):
        return FsError(errno.EINVAL, "it is a symbolic link: name the file that it leads to")
    if not stat.S_ISREG(mode):
        return FsError(errno.EINVAL, "it is a special file, which has no contents")
    return FsError(
        errno.EINVAL,
        "it is an ordinary file: 'ivshmemfs map --create SIZE' makes a mapped file, under a new "
        "name",
    )


def write(tx: Transaction, inode: Inode, offset: int, content: bytes | bytearray | memoryview,
) -> Inode:  # fmt: skip
    """Store `content` at `offset` in place, and return the file with new times.

    Raises EFBIG beyond the end of the file, Fenced, Corrupt.
    """
    record = inode.record
    if offset + len(content) > record.size:
        raise FsError(errno.EFBIG, KEEPS_SIZE)
    if content:
        size = tx.block_size
        first, skip = divmod(offset, size)
        count = (skip + len(content) - 1) // size + 1
        tree = RadixTree(record.height, inode.data)
        pointers = radix.find_range(tx.nodes, tree, inode.ino, first, count)
        if NULL in (pointers[at : at + SIZE] for at in range(0, len(pointers), SIZE)):
            raise Corrupt(f"inode {inode.ino}: a fixed file with a hole")
        blocks = [block for block, _, _ in _POINTER.iter_unpack(pointers)]
        if blocks != list(range(blocks[0], blocks[0] + count)):
            raise Corrupt(f"inode {inode.ino}: a fixed file whose blocks do not follow each other")
        if not tx.store.blocks.check(pointers):
            raise Restart(f"blocks of inode {inode.ino} are another file's")
        tx.space.overwrite(blocks[0], skip, content)
    now = tx.modified(record.mtime_ns)
    return Inode(inode.ino, INODE.placed(record, _WRITTEN, (now, now)), inode.data, inode.xattr)


def release(tx: Transaction, ino: int, *, force: bool = False) -> bool:
    """Make a fixed file an ordinary one, with the same contents; whether it was fixed.

    The caller vouches that no program stores to it by its offset any more.  Raises InUse when a
    peer has it open, unless `force`; ENOENT, EISDIR.
    """
    inode = tx.inode(ino)
    if not inode.record.fixed:
        return False
    if tx.in_use(ino) and not force:
        raise InUse("a peer has it open or mapped (--force releases it all the same)")
    tx.put(inode.evolve(fixed=0, ctime_ns=tx.now))
    return True


def refuse(inode: Inode) -> None:
    """Raise EPERM if `inode` is a regular file whose name must stay."""
    if inode.record.fixed and stat.S_ISREG(inode.record.mode):
        raise FsError(errno.EPERM, KEEPS_NAME)


def keep_blocks(inode: Inode) -> None:
    """Raise ETXTBSY if the blocks of `inode` must stay."""
    if inode.record.fixed:
        raise FsError(errno.ETXTBSY, "a file that programs may have mapped keeps its blocks")


def keep_size(inode: Inode, size: int) -> None:
    """Raise ETXTBSY if `inode` is fixed and has another size than `size`."""
    if inode.record.fixed and size != inode.record.size:
        raise FsError(errno.ETXTBSY, KEEPS_SIZE)
