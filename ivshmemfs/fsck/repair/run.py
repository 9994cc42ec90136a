"""Repairs a region: shuts peers out, repairs in rounds, publishes the result, checks again.

Each round surveys the region, decides what to keep, rebuilds the trees and stores them.  A round
works on what the one before stored.  All rounds work under one mark, and one compare-and-swap
publishes the last.  `shm/repair.py` says how the mark shuts peers out, and what happens when a
repair dies.
"""

from __future__ import annotations

import struct

from ivshmemfs.errors import Busy, InUse, UnsupportedVersion
from ivshmemfs.format import peer, superblock, words
from ivshmemfs.fsck.check import StrictRun, check, check_image
from ivshmemfs.fsck.image import Image, Overtaken, Superblocks, read_superblocks
from ivshmemfs.fsck.repair.names import KeptNames
from ivshmemfs.fsck.repair.slots import SlotPlan
from ivshmemfs.fsck.repair.survey import RepairLog, Survey
from ivshmemfs.fsck.repair.trees import TreeBuilder
from ivshmemfs.fsck.repair.writer import RepairedTree, RepairWriter
from ivshmemfs.fsck.report import Report
from ivshmemfs.region import Memory, Region
from ivshmemfs.shm.exclusion import count_and_names, wait_for_transactions
from ivshmemfs.shm.repair import RepairSession
from ivshmemfs.shm.watch import Watch

ROUNDS = 3  # a repair may uncover violations that the damage hid
ATTEMPTS = 50  # surveys of one round, while peers claim and release blocks
TORN_READS = 5  # surveys that may fail because a block changes between two reads


def _joined(watch: Watch) -> list[peer.Occupant]:
    """Return the peers that keep their slots: live ones with a valid identity."""
    states = (words.IDLE, words.ACTIVE)
    return [p for p in watch.decide() if p.identity_valid and p.state in states]


def repair(region: Region | Memory, *, force: bool = False) -> Report:
    """Make the filesystem consistent; return the report of the check afterwards.

    Its `before` is the report of the check at the start.  Its `repairs` has a line for each
    repair, and is empty if the filesystem was consistent.  Raises InUse when peers or another
    repair may be alive (unless `force`).  Raises NoSpace when the region is too full.  Raises
    FormatError or Corrupt when the region has no filesystem that can be read.  Raises Busy.
    """
    memory = region if isinstance(region, Memory) else region.memory
    found = read_superblocks(memory)
    if found.usable.read_only:
        raise UnsupportedVersion(
            "the filesystem has features that this program may not write: repair it with a newer "
            "version of ivshmemfs"
        )
    turn = RepairSession(memory, found.usable.geometry)
    watch = Watch(memory, found.usable.geometry)
    before: Report | None = None
    if not turn.marks:
        if not force:
            _refuse_live(watch)
        before = _look(memory)
        occupied = Image(memory, found.usable).occupants()
        if before is not None and not (before.errors or before.notes):
            kept = {p.slot for p in _joined(watch)} if occupied else set()
            if all(p.slot in kept for p in occupied):
                before.before = before
                return before
    turn.take(force=force)
    work = _Repair(memory, found, turn, watch)
    try:
        if not force:
            _refuse_live(watch)  # a peer may have joined before the mark
        report = work.run(before)
        turn.publish(work.root_block)
    except BaseException:  # also a signal
        if not work.overwrites:  # otherwise the former root is damaged
            turn.give_up()
        raise
    work.release()
    after = _look(memory)
    if after is not None:  # otherwise mounts commit already
        after.before, after.repairs = report.before, work.log.text()
        return after
    report.repairs = work.log.text()
    return report


def _refuse_live(watch: Watch) -> None:
    if live := watch.decide():
        raise InUse(
            f"the region is in use by {count_and_names(live)}; unmount it there first, or let "
            "go of a machine that is gone with ivshmemfs evict (--force repairs it under them)"
        )


def _look(memory: Memory) -> Report | None:
    """Return a report; None when peers commit too fast, or another repair has begun."""
    try:
        return check(memory)
    except Busy:
        return None


class _Repair:
    """The rounds of one repair, between the mark and the commit."""

    def __init__(
        self, memory: Memory, found: Superblocks, turn: RepairSession, watch: Watch
    ) -> None:
        self._memory = memory
        self._found = found
        self._turn = turn
        self._watch = watch
        self._writer: RepairWriter | None = None  # of the last round
        self._commit = turn.former
        self.overwrites = False  # the repair writes over blocks of the former root
        self.log = RepairLog()

    @property
    def root_block(self) -> int:
        """The root block that the repair publishes."""
        return words.split_commit(self._commit)[1]

    def run(self, before: Report | None) -> Report:
        """Store a root that violates nothing; return the report of the check of it."""
        if self._turn.inherited:
            self.log.add("the repair goes on from an earlier one that did not end")
        self._wait_for_transactions()
        report = check_image(self._image(), self._found)
        before = before or report
        first = True
        for _ in range(ROUNDS):
            if not (report.errors or first):
                break
            first = False
            _repair_superblocks(self._memory, self._found, self.log)
            self._found = read_superblocks(self._memory)
            self._round()
            report = check_image(self._image(), self._found)
        report.before = before
        return report

    def release(self) -> None:
        """Free all blocks that the new root does not reach, after the commit."""
        freed = self._writer.release() if self._writer is not None else 0
        if freed:
            self.log.add(f"{freed} claimed blocks that no root reached are free again")

    def _image(self) -> Image:
        return Image(self._memory, self._found.usable, self._commit, self._turn)

    def _wait_for_transactions(self) -> None:
        wait_for_transactions(lambda: _joined(self._watch), self._turn.beat)

    def _round(self) -> None:
        torn = 0
        for _ in range(ATTEMPTS):
            log = RepairLog()
            try:
                tree, writer = self._build(log)
                self.overwrites |= tree.overwrites
                writer.store()
            except Overtaken:
                self._turn.beat()
                continue
            except (struct.error, ValueError, LookupError):
                # A hostile peer changed a block between two reads.  A bug of this program would
                # fail each time.
                torn += 1
                if torn >= TORN_READS:
                    raise
                self._turn.beat()
                continue
            for line in log.text():
                self.log.add(line)
            self._commit = tree.commit
            self._writer = writer
            return
        raise Busy("other peers claim and release blocks too fast: try again when it is quieter")

    def _build(self, log: RepairLog) -> tuple[RepairedTree, RepairWriter]:
        image = self._image()
        living = frozenset(p.slot for p in _joined(self._watch))
        strict = StrictRun(image, Report())
        strict.run()
        survey = Survey(image, strict.owners, log)
        survey.run()
        names = KeptNames(survey)
        names.run()
        pairs = zip(survey.tags, survey.owners, strict=True)
        slots = SlotPlan(image.states, (tag for tag, owner in pairs if owner), living)
        tree = TreeBuilder(names, slots, self._turn.tag).build()
        if tree.overwrites:
            log.add("the region is so full that replaced blocks were written over")
        return tree, RepairWriter(tree, survey, slots, self._turn)


def _repair_superblocks(memory: Memory, found: Superblocks, log: RepairLog) -> None:
    if found.raw != found.good:
        memory.write(superblock.OFFSET, found.good)
        log.add("the superblock is restored from its copy")
    if found.copy != found.good:
        memory.write(superblock.COPY_OFFSET, found.good)
        log.add("the copy of the superblock is restored from it")
    memory.fence()
