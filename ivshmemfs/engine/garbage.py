"""Free space for one mount: it releases what its commits cut off, and collects what leaked.

    in use     the root reaches the block, or a transaction under way has claimed it
    cut off    a commit of this mount replaced or removed it; `Dropped` queues its subtree
    leaked     its owner died, or left it, before it published or released the block
    free       released: by `Dropped`, or by a `Collector`

A commit queues a subtree and releases its first piece (`take`).  Upkeep does the remaining pieces
(`work`).  A change that finds no free block does a piece itself (`make_room`): it releases first,
because a collection costs more.

There is at most one collection at a time.  `make_room` or `work` begins it and either goes on with
it, in pieces of COLLECTED_AT_ONCE nodes.  `Membership.must_collect` says that leaked blocks are
known or likely.
"""

from __future__ import annotations

import time
from typing import Final

from ivshmemfs.engine.collect import Collector
from ivshmemfs.engine.dropped import Dropped
from ivshmemfs.engine.volume import DAMAGE, Volume
from ivshmemfs.errors import Busy, Unfinished
from ivshmemfs.format import words
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.published import ENDLESS

COLLECTED_AT_ONCE: Final = 128  # nodes that one piece of a collection reads, in about 5 ms
COLLECT_PAUSE: Final = 1.0  # seconds between two collections that failed allocations begin
TIGHT: Final = 0.05  # seconds that a change in a full region waits for the claims of other peers


class Garbage:
    """The blocks that one mount can make free."""

    def __init__(self, volume: Volume) -> None:
        self._volume: Final = volume
        self.dropped: Final = Dropped(volume.store, volume.supply)
        self.collector: Collector | None = None  # the collection under way
        self.suspects_death = False  # a dead peer may hold blocks: upkeep decides at its next tick
        self._collected_at = float("-inf")  # the time when the last collection ended
        self._tight_since = 0.0  # the time when the last failed allocation began a collection

    def make_room(self, member: Membership) -> bool:
        """Release or collect a piece after a failed allocation; whether it freed any block.

        Raises Busy for TIGHT seconds while peers have transactions under way, because those give
        claims back.  Raises Unfinished after each piece of a collection but the last.
        """
        if self.dropped.pending:
            return self.release_piece()
        if self.collector is not None and self.collect_piece():
            return True
        if not self._volume.is_leaking():
            return False
        self.suspects_death = True
        now = time.monotonic()
        if member.must_collect or now - self._collected_at > COLLECT_PAUSE:
            member.must_collect = False
            self._tight_since = now
            self.collector = Collector(self._volume.store, self._volume.table)
            if self.collect_piece():
                return True
        at_work = any(
            word >> words.SLOT_SHIFT == words.ACTIVE and slot != member.slot
            for slot, word in enumerate(self._volume.table.states(), 1)
        )
        if at_work and now - self._tight_since < TIGHT:
            raise Busy("other peers hold the last free blocks")
        return False

    # --- releasing ----------------------------------------------------------------------------

    def take(self, subtrees: list[tuple[bytes, int, int, int]]) -> None:
        """Queue the subtrees that a commit cut off, and release a first piece of them."""
        self.dropped.add(subtrees)
        self.release_piece()

    def release_piece(self) -> bool:
        """Release some blocks of what was cut off; whether there were any."""
        self._volume.store.begin_turn(ENDLESS)  # `step` counts nodes instead
        return self.dropped.step()

    def release_all(self) -> None:
        """Release everything that was cut off."""
        while self.dropped.pending:
            self.release_piece()

    # --- collecting ---------------------------------------------------------------------------

    def collect_piece(self) -> bool:
        """End the collection with its last piece; whether it freed any block.

        Raises Unfinished after every other piece, UnderRepair.
        """
        collector, self.collector = self.collector, None
        assert collector is not None
        try:
            done = collector.step(COLLECTED_AT_ONCE)
        except Busy:  # a repair: the collection starts again after it
            self.collector = collector
            raise
        if not done:
            self.collector = collector
            raise Unfinished("lost blocks are being collected")
        self._note_collection(collector)
        return collector.released > 0

    def _note_collection(self, collector: Collector) -> None:
        self._collected_at = time.monotonic()
        if collector.released:
            self._volume.supply.recount()

    def collect(self) -> int:
        """Do a whole collection now; returns how many blocks it freed.  Raises Corrupt, EIO."""
        collector = Collector(self._volume.store, self._volume.table)
        try:
            collector.step()
        except DAMAGE as error:
            raise self._volume.contained(error) from error
        return collector.released

    # --- for the upkeep -----------------------------------------------------------------------

    def work(self, member: Membership) -> None:
        """Do the next piece: of releasing if anything was cut off, else of a collection."""
        if self.dropped.pending:
            self._volume.check_identity()
            self.release_piece()
        elif self.collector is not None or member.must_collect:
            if self.collector is None:
                self.collector = Collector(self._volume.store, self._volume.table)
                member.must_collect = False
            if self.collector.step(COLLECTED_AT_ONCE):
                self._note_collection(self.collector)
                self.collector = None

    def has_work(self, member: Membership) -> bool:
        """Whether `work` has another piece to do."""
        return self.dropped.pending or self.collector is not None or member.must_collect
