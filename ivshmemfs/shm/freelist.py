"""Where one mount finds free blocks."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from ivshmemfs.errors import Unfinished
from ivshmemfs.format import words
from ivshmemfs.format.geometry import REPAIR_OFFSET
from ivshmemfs.shm.published import Store

SIZE: Final = words.POINTER_SIZE
BULK: Final = 8  # blocks from which on claims are kept packed, and together
COUNTED_ALWAYS: Final = 1 << 16  # blocks of a region whose free ones are counted in 0.2 ms
COUNTED_AT_ONCE: Final = 1 << 16  # blocks that one turn counts
COUNTED_COST: Final = 128  # of that, in nodes
ABANDONED: Final = 10.0  # seconds without a turn after which a count begins anew
RECOUNT: Final = 0.5  # seconds for which a count is good enough to say that there is room
FRESH: Final = 0.05  # seconds for which a count is good enough to say that there is none
FEW_KEPT = 4096  # released blocks that are remembered
BULK_KEPT = 16384


class FreeList:
    """Where one mount finds free blocks: those that it released last, else on from a cursor.

    What was released last is still in a cache and mapped already, while a block that nobody has
    touched yet must first be given memory.  Blocks of data that were released together stay
    together, so that copies of what is put into them go in long runs.  All this is a guess at
    which blocks are free: others may have claimed them.

    A repair may have found a use for what a commit before it replaced.  So nothing is released any
    more that a transaction left which began before the last repair; it is `owed`, and collected.
    """

    def __init__(self, store: Store, cursor: int = 0) -> None:
        self._store = store
        self._repairs = store.memory.load(REPAIR_OFFSET)
        self.owed = False  # whether something was left to a collection
        self._cursor = cursor
        self._few = bytearray()  # packed pointers, the last released at the end
        self._bulk = bytearray()
        self._counted_at = float("-inf")  # when the last count ended
        self._settled = 0  # blocks free when they were counted, and those in use by that commit
        self._sure = True  # whether nobody changed how many are in use during that count
        self._counting_at = float("-inf")  # when the last turn of a count under way ended
        self._counted = 0  # blocks that it has looked at, so many of them were free
        self._found = 0
        self._took = self._taking = 0.0  # seconds that the last count took, and this one so far
        self._used_first = 0  # blocks in use when it began, and the most since
        self._used_most = 0

    def begin(self) -> int:
        """A transaction begins: before it loads the commit word.

        Returns the state word of the repair slot; what commits before another one left must not be
        released any more.
        """
        self._repairs = self._store.memory.load(REPAIR_OFFSET)
        return self._repairs

    def claim(self, count: int, tag: int) -> bytes:
        """Packed pointers to `count` blocks, or to as many as there are."""
        blocks, missing = self._store.blocks, count * SIZE
        got = b""
        for known in (self._bulk, self._few) if count >= BULK else (self._few, self._bulk):
            if missing and known:
                last = bytes(known[-missing:])
                del known[-missing:]
                got += blocks.reclaim(last, tag)
                missing = count * SIZE - len(got)
        if missing:
            more, self._cursor = blocks.claim(missing // SIZE, tag, self._cursor)
            got += more
        return got

    def free(self, used: int, age: float = FRESH) -> int:
        """About how many blocks are free under a root that uses `used`.

        Counting those of a large region takes longer than a commit: 8 ms for 16 GiB, seconds where
        the mapping is not cached.  So it takes turns, and raises Unfinished after each but the
        last.  A count serves for `age` seconds, or four times what it took, corrected by what
        commits used or freed since; claims that others hold for a moment are as they were then.
        """
        if self._store.geometry.block_count <= COUNTED_ALWAYS:
            return self._store.blocks.free_count()
        if not 0 <= time.monotonic() - self._counted_at <= max(age, 4 * self._took):
            self._count_on(used)
        return max(self._settled - used, 0)

    def recount(self) -> None:
        """Forget the last count: lost blocks were collected since."""
        self._counted_at = float("-inf")

    def lacking(self, used: int) -> bool:
        """Whether blocks are neither free nor in use, or may be so: lost, or claims of a moment.

        Raises Unfinished, as `free` does.
        """
        return self.free(used) < self._store.geometry.block_count - used or not self._sure

    def _count_on(self, used: int) -> None:
        """Go on with a count, or begin one; Unfinished until it ends.

        Commits between its turns move blocks that it counted, or was going to count.  It takes the
        most blocks in use that it saw, so it may tell of some that are not free, but hides none.
        """
        now, count = time.monotonic(), self._store.geometry.block_count
        if not self._counted or not 0 <= now - self._counting_at <= ABANDONED:
            self._counted, self._found, self._taking = 0, 0, 0.0
            self._used_first = self._used_most = used
        self._used_most = max(self._used_most, used)
        stop = min(self._counted + COUNTED_AT_ONCE, count)
        self._found += self._store.blocks.free_count(self._counted, stop)
        self._store.work += COUNTED_COST
        self._counted, self._counting_at = stop, time.monotonic()
        self._taking += self._counting_at - now
        if stop < count:
            raise Unfinished("free blocks are being counted")
        self._settled = min(self._found + self._used_most, count)
        self._sure = used == self._used_first == self._used_most
        self._counted, self._counted_at, self._took = 0, self._counting_at, self._taking

    def release(self, pointers: bytes | bytearray, *, bulk: bool = False) -> None:
        """Free the blocks that still bear their pointers' tags; null pointers are skipped."""
        if self._store.memory.load(REPAIR_OFFSET) != self._repairs:
            self.owed = True
            return
        try:
            self._store.blocks.release(pointers)
        except ValueError:  # a damaged tree led to a block that does not exist
            for at in range(0, len(pointers), SIZE):
                with suppress(ValueError):
                    self._store.blocks.release(pointers[at : at + SIZE])
            return
        known, most = (self._bulk, BULK_KEPT) if bulk else (self._few, FEW_KEPT)
        known += pointers
        if len(known) > most * SIZE:
            del known[: -most * SIZE]
