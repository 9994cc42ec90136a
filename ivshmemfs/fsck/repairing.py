"""Repairing a region that nobody uses: survey, decide, build, store, and check again."""

from __future__ import annotations

from ivshmemfs.errors import InUse, UnsupportedVersion
from ivshmemfs.format import superblock
from ivshmemfs.fsck.checking import check_once
from ivshmemfs.fsck.graph import Graph
from ivshmemfs.fsck.image import Image, Superblocks, read_superblocks
from ivshmemfs.fsck.rebuild import Builder
from ivshmemfs.fsck.report import Report
from ivshmemfs.fsck.survey import Log, Survey
from ivshmemfs.fsck.walk import Walker
from ivshmemfs.region import Memory, Region
from ivshmemfs.shm.watch import living

ROUNDS = 3  # a repair may bring to light what hid behind the damage


def repair(region: Region | Memory, *, force: bool = False) -> Report:
    """Make the filesystem consistent; the report is of the check afterwards.

    Its `before` has what was found at first; its `repairs` tell what was done, and are empty when
    there was nothing to do.  Raises InUse when peers
    may be alive (unless `force`), NoSpace when the region is too full, FormatError or Corrupt
    when there is no filesystem to be seen.
    """
    memory = region if isinstance(region, Memory) else region.memory
    found = read_superblocks(memory)
    if found.usable.read_only:
        raise UnsupportedVersion(
            "the filesystem has features that this program may not write: repair it with a newer "
            "version of ivshmemfs"
        )
    image = Image(memory, found.usable)
    live = () if force else living(memory, image.geometry)
    if live:
        peers = ", ".join(p.describe() for p in live)
        raise InUse(
            f"the region is in use by {len(live)} peer(s): {peers}; unmount it there first, or let "
            "go of a machine that is gone with ivshmemfs evict (--force repairs it under them)"
        )
    log = Log()
    before = report = check_once(memory, found)
    for _ in range(ROUNDS):
        if not (report.errors or report.notes or image.occupants()):
            break
        _repair_superblocks(memory, found, log)
        _repair_once(image, log)
        found = read_superblocks(memory)
        image = Image(memory, found.usable)
        report = check_once(memory, found)
    report.before, report.repairs = before, log.text()
    return report


def _repair_superblocks(memory: Memory, found: Superblocks, log: Log) -> None:
    if found.raw != found.good:
        memory.write(superblock.OFFSET, found.good)
        log.add("the superblock is restored from its copy")
    if found.copy != found.good:
        memory.write(superblock.COPY_OFFSET, found.good)
        log.add("the copy of the superblock is made anew")
    memory.fence()


def _repair_once(image: Image, log: Log) -> None:
    scratch = Report()
    walker = Walker(image, scratch)
    walker.run()
    survey = Survey(image, walker.refs, log)
    survey.run()
    graph = Graph(survey)
    graph.run()
    builder = Builder(graph)
    commit = builder.build()
    if builder.crowded:
        log.add("the region is so full that replaced blocks were written over")
    builder.store(commit)
