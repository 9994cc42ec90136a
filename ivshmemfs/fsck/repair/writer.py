"""Stores a repaired filesystem: claims, then new blocks; after the commit it frees the rest.

A block never gets other contents under the tag that it had, since mounts cache nodes by block and
tag.  Peers that live keep their slots, and the blocks of a transaction in flight.  The writer
changes tags and slots by compare-and-swap from what the survey saw.  If a peer was faster, it
raises Overtaken, and the repair surveys again.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from ivshmemfs.format import words
from ivshmemfs.format.geometry import REPAIR_OFFSET
from ivshmemfs.format.peer import INTENT_OFFSET, SLOT_SIZE
from ivshmemfs.fsck.image import Image, Overtaken
from ivshmemfs.fsck.repair.slots import SlotPlan, incarnations_ahead
from ivshmemfs.fsck.repair.survey import RepairLog, Survey
from ivshmemfs.shm.repair import RepairSession


class Tail(NamedTuple):
    """The last block of a file that is not zero beyond the end of the file."""

    ino: int
    block: int
    kept: int  # bytes before the end of the file


class RepairedTree(NamedTuple):
    """A repaired filesystem in memory, ready to be stored."""

    commit: int  # the commit word that publishes it
    tags: array[int]  # of every block that the new root reaches; 0 elsewhere
    nodes: dict[int, bytes]  # new metadata blocks
    tails: list[Tail]
    overwrites: bool  # it needs blocks of the tree that it replaces


class RepairWriter:
    """Stores one repaired tree."""

    def __init__(
        self, tree: RepairedTree, survey: Survey, slots: SlotPlan, turn: RepairSession
    ) -> None:
        self._tree = tree
        self._slots = slots
        self._turn = turn
        self._image: Image = survey.image
        self._owners = survey.owners
        self._log: RepairLog = survey.log

    def store(self) -> None:
        """Claim and write everything; no root reaches it yet.

        Raises Overtaken when a peer was faster at a tag or a slot, InUse when another repair took
        over.
        """
        self._claim()
        self._free_slots()
        memory, geometry = self._image.memory, self._image.geometry
        for block, raw in self._tree.nodes.items():
            self._turn.check()
            memory.write(geometry.data_offset + block * geometry.block_size, raw)
        for tail in self._tree.tails:
            self._turn.check()
            at = geometry.data_offset + tail.block * geometry.block_size
            memory.zero(at + tail.kept, geometry.block_size - tail.kept)
            self._log.add(f"inode {tail.ino}: the bytes beyond its end are zeros again")
        memory.fence()

    def _swap(self, offset: int, old: int, new: int) -> None:
        if old != new and self._image.memory.cas(offset, old, new) != old:
            raise Overtaken

    def _claim(self) -> None:
        base, corrected = self._image.geometry.tags_offset, 0
        for block, tag in enumerate(self._tree.tags):
            if tag and tag != self._image.tags[block]:
                self._turn.check()
                self._swap(base + block * words.WORD, self._image.tags[block], tag)
                corrected += block not in self._tree.nodes
        if corrected:
            self._log.add(f"{corrected} entries of the tag table are corrected")

    def _free_slots(self) -> None:
        memory = self._image.memory
        states = zip(self._image.states, self._slots.states, strict=True)
        for slot, (old, new) in enumerate(states):
            if slot in self._slots.living:
                continue
            at = REPAIR_OFFSET + slot * SLOT_SIZE
            ahead = incarnations_ahead(words.split_state(new)[1], words.split_state(old)[1])
            self._swap(at, old, new)
            if old >> words.SLOT_SHIFT != words.FREE:
                self._log.add(f"peer slot {slot} is free again")
            elif ahead > 1:  # every repair moves a slot on by one
                self._log.add(f"peer slot {slot} moves {ahead} incarnations on, past the tags")
            memory.cas(at + INTENT_OFFSET, memory.load(at + INTENT_OFFSET), 0)

    def release(self) -> int:
        """Free all that the commit does not reach; return how many of these blocks had leaked."""
        memory, base, freed = self._image.memory, self._image.geometry.tags_offset, 0
        for block, tag in enumerate(self._image.tags):
            if tag and not self._tree.tags[block] and tag not in self._slots.in_flight:
                gone = memory.cas(base + block * words.WORD, tag, 0) == tag
                freed += gone and not self._owners[block] and tag != self._turn.tag
        return freed
