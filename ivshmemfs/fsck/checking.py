"""Checking one region, live or not, without storing anything."""

from __future__ import annotations

from ivshmemfs.errors import Busy
from ivshmemfs.format import superblock
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.image import Image, Overtaken, Superblocks, read_superblocks
from ivshmemfs.fsck.report import Place, Report
from ivshmemfs.fsck.walk import Walker
from ivshmemfs.region import Memory, Region

ATTEMPTS = 50  # images of a region in use before giving up


def check(region: Region | Memory) -> Report:
    """Ask all invariants about a region; `Report.clean` tells the outcome.

    Peers may go on working meanwhile: what was found on a state that they have replaced does not
    count, and the check starts again.  Raises FormatError (or Corrupt) when the region carries no
    filesystem that could be looked at, Busy when it changes too fast, UnderRepair.
    """
    memory = region if isinstance(region, Memory) else region.memory
    found = read_superblocks(memory)
    for _ in range(ATTEMPTS):
        try:
            return check_once(memory, found)
        except Overtaken:
            continue
    raise Busy("the filesystem changes faster than it can be checked: try again when it is quieter")


def check_once(memory: Memory, found: Superblocks) -> Report:
    """One pass over the present state; raises Overtaken when another peer commits meanwhile."""
    return check_image(Image(memory, found.usable), found)


def check_image(image: Image, found: Superblocks) -> Report:
    """The same of an image that is open already."""
    report = Report()
    check_superblocks(found, image.memory.length, report)
    report.before_adding = image.refuse_moved
    check_slots(image, report)
    walker = Walker(image, report)
    walker.run()
    inodes, used = len(walker.inodes.numbers), walker.used
    report.summary = (
        f"{inodes} inodes, {used} of {image.block_count} blocks in use, {image.tags.count(0)} free"
    )
    return report


def check_superblocks(found: Superblocks, region_size: int, report: Report) -> None:
    """The invariants about both copies of the superblock."""
    region = Place()
    if report.test(inv.check_superblock, region, found.raw):
        geometry = superblock.geometry_of(superblock.SUPERBLOCK.unpack(found.raw))
        report.test(inv.check_geometry, region, geometry, region_size)
    report.test(inv.check_superblock_copy, region, found.raw, found.copy)


def check_slots(image: Image, report: Report) -> None:
    """The invariants about the peer table."""
    for occupant in image.occupants():
        place = Place(slot=occupant.slot)
        report.test(inv.check_slot, place, occupant.state, occupant.identity_valid)
