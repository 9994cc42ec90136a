"""Storing a new filesystem, and refusing to when something would be harmed.

The order matters to mounts that are still alive when --force was given, and to a death half-way:

1. the commit word becomes 0: whoever looks at the region from now on finds no filesystem, and no
   commit planned before can succeed;
2. transactions that were under way get a moment to notice and end;
3. tags, blocks, peer table, superblock and its copy are stored;
4. the commit word is swapped in last, unless another program was at it meanwhile.  Until then
   there is nothing to mount.
"""

from __future__ import annotations

import random
import time
from typing import NamedTuple

from ivshmemfs.errors import ForeignFormat, InUse
from ivshmemfs.format import peer, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET, PEERS_OFFSET, Geometry
from ivshmemfs.region import Found, Memory, Region, find_data
from ivshmemfs.shm.repair import RepairSession, describe
from ivshmemfs.shm.watch import living
from mkfs.image import Image, Parameters, make_image

FIRST_PAGE = 4096
GRACE = 1.0  # seconds that transactions under way get to end


class Existing(NamedTuple):
    """What stands on a region before it is formatted."""

    identity: tuple[str, str] | None  # label and UUID text, if it is a filesystem of ours
    data: Found  # where anything else was found
    live: tuple[peer.Occupant, ...]  # peers that are not surely gone
    repair: str  # who repairs it at this moment, if anybody does


_UNSEARCHED = Found(None, whole=True)


def _old_geometry(page: bytes, region_size: int) -> Geometry | None:
    """That of a filesystem of any version and size whose peer table can be looked at."""
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
    """Look at what a region carries, storing nothing."""
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
    """Raise InUse or ForeignFormat if formatting would destroy something.

    `force` is how often --force was given: once for what lies there, twice for who is there.
    """
    if existing.repair and force < 2:
        raise InUse(f"{spec}: {existing.repair}")
    if existing.live and force < 2:
        peers = ", ".join(occupant.describe() for occupant in existing.live)
        raise InUse(
            f"{spec} is mounted now by {len(existing.live)} peer(s): {peers}; unmount it there "
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


def _wait_for_transactions(memory: Memory, geometry: Geometry) -> None:
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        table = memory.read(geometry.peers_offset, geometry.peer_count * peer.SLOT_SIZE)
        used = peer.occupants(table, geometry.peer_count)
        if not any(p.state == words.ACTIVE for p in used):
            return
        time.sleep(0.01)


def _store(memory: Memory, geometry: Geometry, image: Image, fresh: bool) -> None:
    if not fresh:
        memory.zero(geometry.tags_offset, geometry.block_count * words.WORD)
    for block, raw in image.blocks.items():
        memory.write(geometry.data_offset + block * geometry.block_size, raw)
        memory.store(geometry.tags_offset + block * words.WORD, image.tag)
    memory.write(PEERS_OFFSET, image.peer_table)
    memory.store(HINT_OFFSET, 0)
    memory.write(superblock.COPY_OFFSET, image.superblock)
    memory.write(superblock.OFFSET, image.superblock)
    memory.fence()
    if memory.cas(COMMIT_OFFSET, 0, image.commit):
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
    """Make a new filesystem; what stood on the region is lost.

    `fresh` promises that every byte of the region is zero, so that the tag table need not be
    cleared (and a sparse file stays sparse).  Raises ValueError when the label is too long,
    OSError when the region fails, InUse when another program formats or repairs it.
    """
    image = make_image(geometry, parameters, chance or random.SystemRandom())
    if not fresh:
        old = _old_geometry(memory.read(0, min(FIRST_PAGE, memory.length)), memory.length)
        memory.store(COMMIT_OFFSET, 0)
        memory.fence()
        if old:
            _wait_for_transactions(memory, old)
    _store(memory, geometry, image, fresh)
