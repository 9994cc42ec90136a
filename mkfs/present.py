"""Whether a region already carries a filesystem that can be mounted as it is."""

from __future__ import annotations

from ivshmemfs.errors import IvshmemfsError
from ivshmemfs.format import node, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.native import crc32c
from ivshmemfs.region import Memory

#: Reads of the root block before the filesystem counts as alive: each failed one saw a new commit.
TRIES = 100


def problem(memory: Memory) -> str:
    """Return why the filesystem on a region cannot be mounted as it is, or "".

    Reads the superblock, the commit word and the root block; fsck.ivshmemfs checks the rest.
    """
    try:
        found = superblock.decode(memory.read(0, superblock.SUPERBLOCK.size), memory.length)
    except IvshmemfsError as error:
        return str(error)
    for _try in range(TRIES):
        word = memory.load(COMMIT_OFFSET)
        wrong = _root_problem(memory, found, word)
        if not wrong or memory.load(COMMIT_OFFSET) == word:
            return wrong
    return ""


def _root_problem(memory: Memory, found: superblock.Superblock, word: int) -> str:
    sequence, block = words.split_commit(word)
    if not word:
        return "it was being formatted when that was interrupted"
    if words.under_repair(word):
        return "its repair was interrupted: run fsck.ivshmemfs -y"
    geometry = found.geometry
    damaged = "its root block is damaged: run fsck.ivshmemfs"
    if block >= geometry.block_count:
        return damaged
    raw = memory.read(geometry.data_offset + block * geometry.block_size, geometry.block_size)
    header = node.HEADER.unpack(raw)
    root = node.ROOT_RECORD.unpack(raw[node.HEADER_SIZE :])
    sound = (
        header.kind == node.ROOT
        and node.ROOT_POINTERS <= header.used <= geometry.block_size
        and header.crc == crc32c(raw[4 : header.used])
        and root.fsid == found.fsid
        and not 0 < (root.sequence - sequence) & words.SEQUENCE_MASK < words.SEQUENCE_MASK // 2
    )
    return "" if sound else damaged
