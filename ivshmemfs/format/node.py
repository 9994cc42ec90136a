"""Metadata blocks: the header that they all begin with, and the root block.

A mount writes a metadata block once, before the commit that publishes it.  No peer modifies it
afterwards.  Its checksum covers bytes 4 to `used`.  `tag` repeats the claim, and `owner` the inode,
so a reader detects a pointer to the wrong block.
"""

from typing import Annotated, Final, NamedTuple

from ivshmemfs.format import words
from ivshmemfs.format.record import At, Layout
from ivshmemfs.native import crc32c

ROOT: Final = 1
INODE: Final = 2
INDEX: Final = 3
DIRLEAF: Final = 4
DIRNODE: Final = 5
KIND_NAMES = {
    ROOT: "root",
    INODE: "inode",
    INDEX: "index",
    DIRLEAF: "dirleaf",
    DIRNODE: "dirnode",
}

HEADER_SIZE: Final = 32
MAX_HEIGHT: Final = 12  # of any tree; 2^64 leaves need fewer levels at the smallest block size


class HeaderRecord(NamedTuple):
    """The first 32 bytes of every metadata block."""

    crc: Annotated[int, At(0, "I", "CRC32C of bytes 4 to `used`")]
    kind: Annotated[int, At(4, "B", "1 root, 2 inode, 3 index, 4 dirleaf, 5 dirnode")]
    level: Annotated[int, At(5, "B", "height above the leaves of its tree")]
    count: Annotated[int, At(6, "H", "entries (directory nodes)")]  # type: ignore[assignment]
    used: Annotated[int, At(8, "I", "bytes in use, header included")]
    owner: Annotated[int, At(16, "Q", "inode that it belongs to; 0 root and inode table")]
    tag: Annotated[int, At(24, "Q", "tag of the claim that wrote it")]


HEADER = Layout(HeaderRecord, HEADER_SIZE)


def seal(header: HeaderRecord, body: bytes) -> bytes:
    """Return the bytes of a metadata block up to `used`, with `used` and the checksum set."""
    raw = HEADER.pack(header._replace(used=HEADER_SIZE + len(body))) + body
    covered = raw[HEADER.offset("crc") + 4 :]
    return crc32c(covered).to_bytes(4, "little") + covered


class RootRecord(NamedTuple):
    """The record after the header of a root block; the inode table's pointers are at byte 128."""

    fsid: Annotated[int, At(0, "Q", "first eight bytes of the superblock's seed")]
    sequence: Annotated[int, At(8, "Q", "low 36 bits: of the commit word that published it")]
    next_ino: Annotated[int, At(16, "Q", "next inode number; numbers are never used twice")]
    used: Annotated[int, At(24, "Q", "blocks reachable from this root, itself included")]
    inodes: Annotated[int, At(32, "Q", "inodes in the table, both of mkfs included")]
    orphans: Annotated[int, At(40, "Q", "inodes without links that some peer may hold open")]
    time_ns: Annotated[int, At(48, "q", "when, ns since 1970 by the committer's clock")]
    height: Annotated[int, At(56, "I", "levels of index blocks between root and inode blocks")]
    slots: Annotated[int, At(60, "I", "pointers that follow")]


ROOT_RECORD = Layout(RootRecord, 96)
ROOT_POINTERS = HEADER_SIZE + ROOT_RECORD.size
_FSID = HEADER_SIZE + ROOT_RECORD.offset("fsid")


def fsid_bytes(root: bytes) -> bytes:
    """Return the bytes of field `fsid` of a root block: the start of the seed."""
    return root[_FSID : _FSID + words.WORD]


def index_fanout(block_size: int) -> int:
    """Return the number of pointers in an index block."""
    return (block_size - HEADER_SIZE) // words.POINTER_SIZE


def root_capacity(block_size: int) -> int:
    """Return the most inode table pointers in a root block."""
    return (block_size - ROOT_POINTERS) // words.POINTER_SIZE
