"""A new filesystem as bytes.  Pure: the caller passes the clock and the random numbers.

The initial tree has three blocks under one tag of slot 1.  The tag is of the incarnation before
the first one that a mount gets:

    block 0   root block, inode table of three pointers (null, 1, 2)
    block 1   inode 1, the root directory
    block 2   inode 2, the hidden directory of inodes without links
"""

from __future__ import annotations

import random
import stat
from typing import NamedTuple

from ivshmemfs import __version__
from ivshmemfs.format import inode, node, peer, superblock, words
from ivshmemfs.format.geometry import Geometry

ROOT_BLOCK = 0
_INITIAL_SLOT = 1
_INITIAL_COUNTER = 1


class Parameters(NamedTuple):
    """What two new filesystems of one geometry may differ in."""

    uuid: bytes
    label: str = ""
    uid: int = 0
    gid: int = 0
    now_ns: int = 0
    maker: str = __version__


class InitialFilesystem(NamedTuple):
    """The parts of a new filesystem; `writer` stores them, in the order that is safe."""

    superblock: bytes
    peer_table: bytes
    tag: int  # of every block below
    blocks: dict[int, bytes]
    commit: int


def _node(kind: int, owner: int, tag: int, body: bytes) -> bytes:
    return node.seal(node.HeaderRecord(0, kind, 0, 0, 0, owner, tag), body)


def _directory(ino: int, permissions: int, tag: int, parameters: Parameters) -> bytes:
    now = parameters.now_ns
    record = inode.InodeRecord(
        mode=stat.S_IFDIR | permissions,
        nlink=2,
        uid=parameters.uid,
        gid=parameters.gid,
        size=0,
        blocks=1,
        atime_ns=now,
        mtime_ns=now,
        ctime_ns=now,
        btime_ns=now,
        rdev=0,
        parent=ino,
        entries=0,
        payload=inode.EMPTY,
        height=0,
        xattr_height=0,
        fixed=0,
        payload_size=0,
        xattr_size=0,
        xattr_inline=0,
        xattr_pointer=words.NULL,
    )
    return _node(node.INODE, ino, tag, inode.INODE.pack(record))


def _root(sequence: int, tag: int, parameters: Parameters) -> bytes:
    pointers = words.NULL + words.POINTER.pack(1, 1, tag) + words.POINTER.pack(2, 1, tag)
    record = node.RootRecord(
        fsid=superblock.fsid_of(parameters.uuid),
        sequence=sequence,
        next_ino=inode.FIRST_INO,
        used=3,
        inodes=2,
        orphans=0,
        time_ns=parameters.now_ns,
        height=0,
        slots=3,
    )
    return _node(node.ROOT, 0, tag, node.ROOT_RECORD.pack(record) + pointers)


def _peer_table(incarnations: list[int]) -> bytes:
    slots = (words.make_state(words.FREE, incarnation, 0) for incarnation in incarnations)
    return b"".join(word.to_bytes(peer.SLOT_SIZE, "little") for word in slots)


def initial_filesystem(
    geometry: Geometry, parameters: Parameters, chance: random.Random
) -> InitialFilesystem:
    """Return a new filesystem for `geometry`.

    `chance` gives the first commit sequence and the first incarnation of each slot.  So the commit
    words and tags of an earlier filesystem on the region do not come back.  Raises ValueError
    when the label is too long.
    """
    sequence = chance.randrange(1, words.SEQUENCE_MASK)
    incarnations = [chance.randrange(words.INCARNATION_MASK) for _ in range(geometry.peer_count)]
    before = (incarnations[_INITIAL_SLOT - 1] - 1) & words.INCARNATION_MASK
    tag = words.make_tag(_INITIAL_SLOT, before, _INITIAL_COUNTER)
    return InitialFilesystem(
        superblock.encode(
            parameters.uuid, parameters.label, geometry, parameters.now_ns, parameters.maker
        ),
        _peer_table(incarnations),
        tag,
        {
            ROOT_BLOCK: _root(sequence, tag, parameters),
            1: _directory(inode.ROOT_INO, 0o755, tag, parameters),
            2: _directory(inode.ORPHANS_INO, 0o700, tag, parameters),
        },
        words.make_commit(sequence, ROOT_BLOCK),
    )
