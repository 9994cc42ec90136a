"""Where one mount finds free blocks, and how many there are.

A count of free blocks has these states.  Only `FreeList.free` and `FreeList.lacking` move it on:

    none     -> (free) -> counting -> (free, in turns) -> known
    known    -> (after its age, or `recount`) -> none
    counting -> (`ABANDONED` seconds without a turn) -> none
"""

from __future__ import annotations

import time
from array import array
from contextlib import suppress
from typing import Final

from ivshmemfs.errors import Unfinished
from ivshmemfs.format import words
from ivshmemfs.format.geometry import REPAIR_OFFSET
from ivshmemfs.native import split_pointers
from ivshmemfs.shm.published import Store

SIZE: Final = words.POINTER_SIZE
WORD: Final = words.WORD
BULK: Final = 8  # smallest claim, in blocks, that is kept packed and together
COUNTED_ALWAYS: Final = 1 << 16  # largest region, in blocks, that is counted each time: 0.2 ms
COUNTED_AT_ONCE: Final = 1 << 16  # blocks that one turn counts
COUNTED_COST: Final = 128  # cost of one such turn, in visited nodes
ABANDONED: Final = 10.0  # seconds without a turn after which a count begins anew
RECOUNT: Final = 0.5  # longest age, in seconds, of a count that shows enough free blocks
USUAL: Final = 6  # blocks that the first ordinary transaction claims at once
FRESH: Final = 0.05  # longest age, in seconds, of a count that shows too few
FEW_KEPT = 4096  # most single released blocks that are remembered
BULK_KEPT = 16384  # most blocks of bulk releases that are remembered


def row(first: int, count: int, tag: int) -> bytes:
    """Return packed pointers to `count` blocks that follow each other, all with one tag."""
    pointers = array("Q", bytes(count * SIZE))
    pointers[0::2] = array("Q", range(first | 1 << 32, (first | 1 << 32) + count))
    pointers[1::2] = array("Q", [tag]) * count
    return pointers.tobytes()


class FreeList:
    """The free blocks that one mount knows: those that it released last, then from a cursor on.

    Blocks that were released last are still cached and mapped; the system must first give memory to
    an untouched block.  Data blocks that were released together stay together, so copies into them
    go in long runs.  The list is a guess: other peers may have claimed these blocks.

    A repair may use blocks that an earlier commit replaced.  So a transaction that began before the
    last repair releases nothing; it sets `owed`, and a collection frees the blocks.
    """

    def __init__(self, store: Store, cursor: int = 0) -> None:
        self._store = store
        self.repairs = store.memory.load(REPAIR_OFFSET)  # the repair slot's state word
        self.owed = False  # whether blocks were left to a collection
        self.usual = USUAL  # blocks that the next ordinary transaction claims at once
        self._cursor = cursor
        self._few = bytearray()  # packed pointers, the last released at the end
        self._bulk = bytearray()  # the same, of bulk releases
        self._counted_at = float("-inf")  # when the last count ended
        self._settled = 0  # its result: blocks free then, plus blocks in use then
        self._sure = True  # whether the number of blocks in use was constant during that count
        self._counting_at = float("-inf")  # when the last turn of a count under way ended
        self._counted = 0  # blocks that the count under way has looked at
        self._found = 0  # free blocks among them
        self._took = self._taking = 0.0  # seconds that the last count took, and this one so far
        self._used_first = 0  # blocks in use when the count under way began
        self._used_most = 0  # most blocks in use since then

    def begin(self) -> int:
        """Note the state word of the repair slot, and return it.

        A transaction calls this before it loads the commit word.  When the word changes, a repair
        has run: blocks that earlier commits replaced must not be released any more.
        """
        self.repairs = self._store.memory.load(REPAIR_OFFSET)
        return self.repairs

    def note_use(self, count: int) -> None:
        """Note that a transaction used `count` of its claims: the next one may need as many."""
        self.usual = min(max(count, self.usual - 1), BULK - 1)

    def claim_few(self, count: int, tag: int) -> list[bytes]:
        """Claim fewer than BULK blocks; return a list of their packed pointers."""
        got = self._store.blocks.reclaim_last(self._few, count, tag)
        if len(got) < count:
            got += split_pointers(self.claim(count - len(got), tag))
        return got

    def claim(self, count: int, tag: int) -> bytes:
        """Claim `count` blocks, or as many as are free; return packed pointers."""
        blocks, missing = self._store.blocks, count * SIZE
        first, second = (self._bulk, self._few) if count >= BULK else (self._few, self._bulk)
        got = self._reclaim(first, missing, tag)
        missing -= len(got)
        if missing:
            got += self._reclaim(second, missing, tag)
            missing = count * SIZE - len(got)
        if missing:
            more, self._cursor = blocks.claim(missing // SIZE, tag, self._cursor)
            got += more
        return got

    def _reclaim(self, known: bytearray, most: int, tag: int) -> bytes:
        """Claim those of the last blocks in `known` that are free; they take `most` bytes."""
        if not known:
            return b""
        last = known[-most:]
        del known[-most:]
        return self._store.blocks.reclaim(last, tag)

    def claim_row(self, count: int, step: int, first: int, tag: int) -> tuple[bytes, bytes]:
        """Claim `count` blocks that follow each other; return packed pointers to (row, strays).

        The row begins at block `first` or a multiple of `step` blocks behind it; b"" if there is
        none.  Strays were claimed for a row that another peer broke.  The caller settles them with
        its other claims: an earlier state of this machine may have published them.
        """
        blocks, geometry, strays = self._store.blocks, self._store.geometry, b""
        while first + count <= geometry.block_count:
            at = geometry.tags_offset + first * WORD
            taken = len(self._store.memory.read(at, count * WORD).rstrip(b"\0"))
            if taken:
                first += -(-taken // (WORD * step)) * step  # behind the last that is taken
                continue
            got = blocks.reclaim(row(first, count, tag), tag)
            if len(got) == count * SIZE:
                return got, strays
            strays += got
            first += step  # so that the search ends, also on hostile memory
        return b"", strays

    def free(self, used: int, age: float = FRESH) -> int:
        """Return about how many blocks are free under a root that uses `used`.

        Counting a large region takes longer than a commit: 8 ms for 16 GiB, seconds on an uncached
        mapping.  So a count takes turns, and raises Unfinished after each but the last.
        A count is valid for `age` seconds, or four times the time that it took.  `used` corrects it
        for later commits.  Claims of other peers' transactions stay as they were at the count.
        """
        if self._store.geometry.block_count <= COUNTED_ALWAYS:
            return self._store.blocks.free_count()
        if not 0 <= time.monotonic() - self._counted_at <= max(age, 4 * self._took):
            self._count_on(used)
        return max(self._settled - used, 0)

    def recount(self) -> None:
        """Forget the last count, because a collection has freed blocks since."""
        self._counted_at = float("-inf")

    def lacking(self, used: int) -> bool:
        """Return whether some blocks may be neither free nor in use: garbage, or claims in flight.

        Raises Unfinished, as `free` does.
        """
        return self.free(used) < self._store.geometry.block_count - used or not self._sure

    def _count_on(self, used: int) -> None:
        """Continue a count, or begin one; raises Unfinished until it ends.

        Commits between its turns use and free blocks, counted or not.  The result takes the largest
        number of blocks in use, so it may report too many free blocks, but never too few.
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
        """Free the blocks that still have their pointers' tags; skip null pointers."""
        if self._store.memory.load(REPAIR_OFFSET) != self.repairs:
            self.owed = True
            return
        try:
            self._store.blocks.release(pointers)
        except ValueError:  # a damaged tree led to a block beyond the region
            for at in range(0, len(pointers), SIZE):
                with suppress(ValueError):
                    self._store.blocks.release(pointers[at : at + SIZE])
            return
        self.released(pointers, bulk=bulk)

    def released(self, pointers: bytes | bytearray, *, bulk: bool = False) -> None:
        """Note the blocks that this mount has just freed."""
        known, most = (self._bulk, BULK_KEPT) if bulk else (self._few, FEW_KEPT)
        known += pointers
        if len(known) > most * SIZE:
            del known[: -most * SIZE]
