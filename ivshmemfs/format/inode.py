"""The inode block: header, record, payload, small extended attributes.

    0    node header (kind INODE, owner = inode number)
    32   inode record
    192  payload (`payload_size` bytes), then extended attributes (`xattr_inline` bytes)

Field `payload` says what the payload is:

    empty    nothing
    inline   the file's bytes (small files, symlink targets)
    map      the top of the block map (16-byte pointers)
    dirleaf  the directory entries themselves
    dirtree  the top of the directory tree

So one block holds a whole small file, symlink or small directory.

A *fixed* file is shared memory of programs.  Its payload is a map.  Its data blocks follow each
other in the region, without holes, and fill it up to its size.  They keep their places and tags,
and are changed in place, until the file becomes an ordinary one.
"""

import stat
from typing import Annotated, Final, NamedTuple

from ivshmemfs.format import node
from ivshmemfs.format.record import At, Layout

ROOT_INO: Final = 1
ORPHANS_INO: Final = 2  # hidden directory of the inodes without links that a peer may hold open
FIRST_INO: Final = 3
MAX_INO: Final = (1 << 56) - 1
# Bytes of a file.  Requests end far below 2^63, so no sum of an offset and a length overflows
# off_t, in the kernel or in a program.
MAX_FILE_SIZE: Final = (1 << 62) - 1

EMPTY: Final = 0
INLINE: Final = 1
MAP: Final = 2
DIRLEAF: Final = 3
DIRTREE: Final = 4
PAYLOAD_NAMES = ("empty", "inline", "map", "dirleaf", "dirtree")
# The payloads that an inode of each file type may have.
ALLOWED_PAYLOADS = {
    stat.S_IFREG: (EMPTY, INLINE, MAP),
    stat.S_IFDIR: (EMPTY, DIRLEAF, DIRTREE),
    stat.S_IFLNK: (INLINE, MAP),
    stat.S_IFIFO: (EMPTY,),
    stat.S_IFSOCK: (EMPTY,),
    stat.S_IFCHR: (EMPTY,),
    stat.S_IFBLK: (EMPTY,),
}
TARGET_MAX: Final = 4095  # bytes of a symlink's target


class InodeRecord(NamedTuple):
    """Attributes of one file, directory, symlink or special file."""

    mode: Annotated[int, At(0, "I", "type and permissions as in stat(2)")]
    nlink: Annotated[int, At(4, "I", "links; 0: only open handles keep it")]
    uid: Annotated[int, At(8, "I", "owner")]
    gid: Annotated[int, At(12, "I", "group")]
    size: Annotated[int, At(16, "Q", "bytes")]
    blocks: Annotated[int, At(24, "Q", "blocks of this inode, the inode block included")]
    atime_ns: Annotated[int, At(32, "q", "last access, ns since 1970")]
    mtime_ns: Annotated[int, At(40, "q", "last change of the contents")]
    ctime_ns: Annotated[int, At(48, "q", "last change of the inode")]
    btime_ns: Annotated[int, At(56, "q", "creation")]
    rdev: Annotated[int, At(64, "Q", "device number of a device node")]
    parent: Annotated[int, At(72, "Q", "directories: the directory that holds it")]
    entries: Annotated[int, At(80, "Q", "directories: names in it")]
    payload: Annotated[int, At(88, "B", "0 empty, 1 inline, 2 map, 3 dirleaf, 4 dirtree")]
    height: Annotated[int, At(89, "B", "levels below the payload's pointers")]
    xattr_height: Annotated[int, At(90, "B", "levels below the extended attributes' pointer")]
    fixed: Annotated[int, At(91, "B", "1: a fixed file; its blocks are one row, changed in place")]
    payload_size: Annotated[int, At(92, "I", "bytes of payload at byte 192")]
    xattr_size: Annotated[int, At(96, "I", "bytes of all extended attributes as one string")]
    xattr_inline: Annotated[int, At(100, "I", "the same if they are in this block, else 0")]
    xattr_pointer: Annotated[bytes, At(104, "16s", "pointer to them if they do not")]


INODE = Layout(InodeRecord, 160)
PAYLOAD_OFFSET = node.HEADER_SIZE + INODE.size


def payload_capacity(block_size: int) -> int:
    """Return the bytes that payload and inline extended attributes may take together."""
    return block_size - PAYLOAD_OFFSET


def orphan_name(ino: int) -> bytes:
    """Return the name of inode `ino` in the list of inodes without links."""
    return b"%016x" % ino
