"""Storing a new filesystem, and refusing to when something would be harmed.

The order matters to mounts that are still alive when --force was given, and to a death half-way:

1. the commit word becomes 0: whoever looks at the region from now on finds no filesystem, and no
   commit planned before can succeed;
2. transactions that were under way get a moment to notice and end;
3. tags, blocks, peer table, superblock and its copy are stored;
4. the commit word is stored last.  Until then there is nothing to mount.
"""

from __future__ import annotations

import random
import time
from typing import NamedTuple

from ivshmemfs.errors import ForeignFormat, InUse, IvshmemfsError
from ivshmemfs.format import peer, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET, PEERS_OFFSET, Geometry
from ivshmemfs.region import Memory
from ivshmemfs.shm import identity
from mkfs.image import Image, Parameters, make_image

FIRST_PAGE = 4096  # what must be zero on a region that nobody uses
GRACE = 1.0  # seconds that transactions under way get to end


class Existing(NamedTuple):
    """What stands on a region before it is formatted."""

    identity: tuple[str, str] | None  # label and UUID text, if it is a filesystem of ours
    foreign: bool
    geometry: Geometry | None  # of the filesystem, if its superblock is whole
    live: tuple[peer.Occupant, ...]  # peers that are not surely gone


def _old_geometry(page: bytes, region_size: int) -> Geometry | None:
    for offset in (superblock.OFFSET, superblock.COPY_OFFSET):
        try:
            return superblock.decode(page[offset:], region_size).geometry
        except IvshmemfsError:
            continue
    return None


def live_peers(memory: Memory, geometry: Geometry) -> tuple[peer.Occupant, ...]:
    """Slots in use whose owner is not surely gone."""
    table = memory.read(geometry.peers_offset, geometry.peer_count * peer.SLOT_SIZE)
    return tuple(
        occupant
        for occupant in peer.occupants(table, geometry.peer_count)
        if not (occupant.identity_valid and identity.gone(occupant.record))
    )


def examine(memory: Memory) -> Existing:
    """Look at what a region carries, storing nothing."""
    page = memory.read(0, min(FIRST_PAGE, memory.length))
    known = superblock.identify(page) or superblock.identify(page[superblock.COPY_OFFSET :])
    geometry = _old_geometry(page, memory.length)
    live = live_peers(memory, geometry) if geometry else ()
    return Existing(known, known is None and any(page), geometry, live)


def refuse_used(existing: Existing, spec: str) -> None:
    """Raise InUse or ForeignFormat if formatting would destroy something."""
    if existing.live:
        peers = ", ".join(occupant.describe() for occupant in existing.live)
        raise InUse(
            f"{spec} is mounted now by {len(existing.live)} peer(s): {peers}; unmount it there "
            "first (--force formats it under them, and all that is on it is lost)"
        )
    if existing.identity:
        label, uuid = existing.identity
        named = f"label {label!r}, UUID {uuid}" if label else f"UUID {uuid}"
        raise InUse(
            f"{spec} already carries an ivshmemfs filesystem ({named}): if all that is on it "
            "may be lost, use --force"
        )
    if existing.foreign:
        raise ForeignFormat(
            f"{spec} carries something that is not an ivshmemfs filesystem (its first page is "
            "not empty): if it may be overwritten, use --force"
        )


def _wait_for_transactions(memory: Memory, geometry: Geometry) -> None:
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        if not any(p.state == words.ACTIVE for p in live_peers(memory, geometry)):
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
    memory.store(COMMIT_OFFSET, image.commit)
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
    OSError when the region fails.
    """
    image = make_image(geometry, parameters, chance or random.SystemRandom())
    if not fresh:
        old = examine(memory).geometry
        memory.store(COMMIT_OFFSET, 0)
        memory.fence()
        if old:
            _wait_for_transactions(memory, old)
    _store(memory, geometry, image, fresh)
