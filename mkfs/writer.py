"""Stores a new filesystem, and refuses if that destroys something without --force.

The order protects live mounts under --force, and covers a death of mkfs half-way:

1. mkfs sets the commit word to 0: peers find no filesystem, and no earlier plan can commit;
2. peers get GRACE seconds to end their transactions;
3. mkfs stores tags, blocks, the peer table, the superblock and its copy;
4. mkfs swaps the commit word in, unless another program changed it.  Until then there is nothing
   to mount.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from ivshmemfs.errors import ForeignFormat, InUse
from ivshmemfs.format import peer, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET, PEERS_OFFSET, Geometry
from ivshmemfs.region import Found, Memory, Region, find_data
from ivshmemfs.shm.exclusion import count_and_names, wait_for_transactions
from ivshmemfs.shm.repair import RepairSession, describe
from ivshmemfs.shm.watch import living
from mkfs.initial import InitialFilesystem, Parameters, initial_filesystem

FIRST_PAGE = 4096


class Existing(NamedTuple):
    """What a region has before mkfs formats it."""

    identity: tuple[str, str] | None  # label and UUID text of an ivshmemfs filesystem
    data: Found  # where mkfs found other data
    live: tuple[peer.Occupant, ...]  # peers that may be alive
    repair: str  # a line about the repair in progress; empty: none


_UNSEARCHED = Found(None, whole=True)


def _old_geometry(page: bytes, region_size: int) -> Geometry | None:
    """Return the geometry of a filesystem of any version, if its peer table is in the region."""
    for offset in (superblock.OFFSET, superblock.COPY_OFFSET):
        raw = page[offset : offset + superblock.SUPERBLOCK.size]
        if superblock.identify(raw) is None:
            continue
        geometry = superblock.geometry_of(superblock.SUPERBLOCK.unpack(raw))
        if geometry.problem() is None and geometry.tags_offset <= region_size:
            return geometry
    return None


def identity_of(memory: Memory) -> tuple[str, str] | None:
    """Return label and UUID text of the filesystem on a region; None without one.

    Looks at the superblock and at its copy.
    """
    page = memory.read(0, min(FIRST_PAGE, memory.length))
    return superblock.identify(page) or superblock.identify(page[superblock.COPY_OFFSET :])


def describe_identity(label: str, uuid: str) -> str:
    """Return label and UUID of a filesystem as text for a message."""
    return f"label {label!r}, UUID {uuid}" if label else f"UUID {uuid}"


def examine(region: Region) -> Existing:
    """Return what a region has; stores nothing."""
    memory = region.memory
    page = memory.read(0, min(FIRST_PAGE, memory.length))
    known = identity_of(memory)
    if known is None:
        return Existing(None, find_data(region), (), "")
    geometry = _old_geometry(page, memory.length)
    if geometry is None:
        return Existing(known, _UNSEARCHED, (), "")
    repair = describe(memory) if RepairSession(memory, geometry).contested else ""
    return Existing(known, _UNSEARCHED, living(memory, geometry), repair)


def refuse_used(existing: Existing, spec: str, force: int = 0) -> None:
    """Raise InUse or ForeignFormat if formatting destroys something.

    `force` counts --force: one permits the loss of data, two also the loss under live peers.
    """
    if existing.repair and force < 2:
        raise InUse(f"{spec}: {existing.repair}")
    if existing.live and force < 2:
        raise InUse(
            f"{spec} is mounted now by {count_and_names(existing.live)}; unmount it there "
            "first (only --force given twice formats it under them, and what is on it is lost)"
        )
    if existing.identity and not force:
        named = describe_identity(*existing.identity)
        raise InUse(
            f"{spec} already carries an ivshmemfs filesystem ({named}): if all that is on it "
            "may be lost, use --force"
        )
    if existing.data.offset is not None and not force:
        raise ForeignFormat(
            f"{spec} carries something that is not an ivshmemfs filesystem (not all is zero at "
            f"byte {existing.data.offset}): if it may be overwritten, use --force"
        )


def _occupants(memory: Memory, geometry: Geometry) -> list[peer.Occupant]:
    table = memory.read(geometry.peers_offset, geometry.peer_count * peer.SLOT_SIZE)
    return list(peer.occupants(table, geometry.peer_count))


def _store(memory: Memory, geometry: Geometry, new: InitialFilesystem, fresh: bool) -> None:
    if not fresh:
        memory.zero(geometry.tags_offset, geometry.block_count * words.WORD)
    for block, raw in new.blocks.items():
        memory.write(geometry.data_offset + block * geometry.block_size, raw)
        memory.store(geometry.tags_offset + block * words.WORD, new.tag)
    memory.write(PEERS_OFFSET, new.peer_table)
    memory.store(HINT_OFFSET, 0)
    memory.write(superblock.COPY_OFFSET, new.superblock)
    memory.write(superblock.OFFSET, new.superblock)
    memory.fence()
    if memory.cas(COMMIT_OFFSET, 0, new.commit):
        raise InUse("another program formats or repairs the region now: run mkfs again after it")
    memory.fence()


def format_region(
    memory: Memory,
    geometry: Geometry,
    parameters: Parameters,
    *,
    fresh: bool = False,
    chance: random.Random | None = None,
) -> None:
    """Make a new filesystem; the region loses what it had.

    `fresh` promises that every byte of the region is zero.  Then mkfs does not clear the tag
    table, and a sparse file stays sparse.  Raises ValueError when the label is too long,
    OSError when the region fails, InUse when another program formats or repairs it.
    """
    new = initial_filesystem(geometry, parameters, chance or random.SystemRandom())
    if not fresh:
        old = _old_geometry(memory.read(0, min(FIRST_PAGE, memory.length)), memory.length)
        memory.store(COMMIT_OFFSET, 0)
        memory.fence()
        if old:
            wait_for_transactions(lambda: _occupants(memory, old))
    _store(memory, geometry, new, fresh)
