"""Repairing a region: shut everybody else out, survey, decide, build, store, publish, check again.

`shm/repair.py` says how others are shut out, and what becomes of a repair that dies.  All rounds
work under one mark, each on what the one before built; one compare-and-swap publishes the last.
"""

from __future__ import annotations

import struct
import time

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
from ivshmemfs.shm.repair import Turn
from ivshmemfs.shm.watch import Watch

ROUNDS = 3  # a repair may bring to light what hid behind the damage
ATTEMPTS = 50  # surveys of one round, when peers claim and release blocks meanwhile
NONSENSE = 5  # surveys that may come to contents that cannot be
GRACE = 1.0  # seconds that transactions under way get to end


def _joined(watch: Watch) -> list[peer.Occupant]:
    """Peers that keep their slots: they are not surely gone, and say who they are."""
    states = (words.IDLE, words.ACTIVE)
    return [p for p in watch.decide() if p.identity_valid and p.state in states]


def repair(region: Region | Memory, *, force: bool = False) -> Report:
    """Make the filesystem consistent; the report is of the check afterwards.

    Its `before` has what was found at first; its `repairs` tell what was done, and are empty when
    there was nothing to do.  Raises InUse when peers, or another repair, may be alive (unless
    `force`), NoSpace when the region is too full, FormatError or Corrupt when there is no
    filesystem to be seen, Busy.
    """
    memory = region if isinstance(region, Memory) else region.memory
    found = read_superblocks(memory)
    if found.usable.read_only:
        raise UnsupportedVersion(
            "the filesystem has features that this program may not write: repair it with a newer "
            "version of ivshmemfs"
        )
    turn = Turn(memory, found.usable.geometry)
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
            _refuse_live(watch)  # who has joined before the mark was there
        report = work.run(before)
        turn.publish(work.root_block)
    except BaseException:  # a signal as well
        if not work.overwrites:  # else the former root is not fit to be given back
            turn.give_up()
        raise
    work.release()
    after = _look(memory)
    if after is not None:  # else mounts are at work already
        after.before, after.repairs = report.before, work.log.text()
        return after
    report.repairs = work.log.text()
    return report


def _refuse_live(watch: Watch) -> None:
    if live := watch.decide():
        peers = ", ".join(p.describe() for p in live)
        raise InUse(
            f"the region is in use by {len(live)} peer(s): {peers}; unmount it there first, or let "
            "go of a machine that is gone with ivshmemfs evict (--force repairs it under them)"
        )


def _look(memory: Memory) -> Report | None:
    """A check; None when the region changes too fast for it, or another has begun to repair it."""
    try:
        return check(memory)
    except Busy:
        return None


class _Repair:
    """What happens between the mark and the commit."""

    def __init__(self, memory: Memory, found: Superblocks, turn: Turn, watch: Watch) -> None:
        self._memory = memory
        self._found = found
        self._turn = turn
        self._watch = watch
        self._writer: RepairWriter | None = None  # of the last round
        self._commit = turn.former
        self.overwrites = False  # whether blocks of the former root are being written over
        self.log = RepairLog()

    @property
    def root_block(self) -> int:
        """The block of the root that is to be published."""
        return words.split_commit(self._commit)[1]

    def run(self, before: Report | None) -> Report:
        """Build a root without contradictions; the report is of the check of it."""
        if self._turn.inherited:
            self.log.add("a repair that did not come to its end is done with")
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
        """After the commit: free all that it does not reach."""
        freed = self._writer.release() if self._writer is not None else 0
        if freed:
            self.log.add(f"{freed} claimed blocks that nobody reached are free again")

    def _image(self) -> Image:
        return Image(self._memory, self._found.usable, self._commit, self._turn)

    def _wait_for_transactions(self) -> None:
        """None can be published any more; peers that end theirs release what they claimed."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            if not any(p.state == words.ACTIVE for p in _joined(self._watch)):
                return
            self._turn.beat()
            time.sleep(0.01)

    def _round(self) -> None:
        nonsense = 0
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
                # A peer that stores to what it must not changed a block between two reads of it;
                # a fault of this program would come back each time.
                nonsense += 1
                if nonsense >= NONSENSE:
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
        log.add("the copy of the superblock is made anew")
    memory.fence()
