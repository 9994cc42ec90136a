"""A queue of records that many peers put and many take, in the memory of a fixed file.

States of a cell (`format/queue.py`), each changed by one compare-and-swap:

    EMPTY(lap)  -> FULL(lap, buffer)       `put`: the record is there, whole, for everybody
    FULL(lap)   -> EMPTY(lap + 1)          work: the reader that wins has taken the record
    FULL(lap)   -> FULL(lap + 1, buffer)   broadcast: `put`, over the oldest record

States of a buffer, as its tag says:

    free       0
    claimed    `put` took it, under the tag of its peer's transaction; private
    published  a cell names it; nobody stores to it
    free       the peer whose swap replaced the cell released it, or `collect` did

So a peer that dies or pauses at any instant holds up no other.  A peer that wakes up tears no
record.  It stores only to a buffer that it claimed, and such a buffer is in quarantine as a block
is (docs/protocol.md, section 8).  Only an eviction ends that; so `publish` checks the state word of
the own slot last.  `collect` finds what a death leaves claimed, as among blocks: first it loads the
limits of settled claims, then the cells, then the tags.

`tail` and `head` are hints.  A peer that finds the cell there filled or taken moves them on.  A
cell never goes back.  So these hold when the hint is loaded first and the cell last, and a region
where they do not is damaged:

    `tail` is beyond n    cell n has record n, or had it
    `head` is beyond n    cell n had record n, and was taken

The caller begins and ends the transaction around `put` and `collect` (`engine/messages.py`).  To
take and to look needs none.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable
from typing import Final, Protocol

from ivshmemfs.errors import Busy, Corrupt, Fenced
from ivshmemfs.format import queue as fmt
from ivshmemfs.format.queue import BUFFER_MASK, FULL, QueueGeometry, empty, full, laps_ahead
from ivshmemfs.format.words import POINTER, WORD
from ivshmemfs.native import Blocks, Memory
from ivshmemfs.shm.commit import LOOKS

ATTEMPTS: Final = 256  # looks at a place that other peers change meanwhile
_CLAIM: Final = 1  # buffers of one `put`
_FENCED: Final = "another peer declared this one gone in the middle of a message"
_UNUSABLE: Final = "its programs cannot go on with it: make another under a new name"

_BILLION: Final = 10**9
#: Seconds of a wait in which looks follow each other without a nap.
SPIN: Final = 0.0002
#: (seconds of waiting up to which a nap lasts so long, seconds of the nap).
_NAPS: Final = ((SPIN, 0.0), (0.02, 0.00005), (1.0, 0.0005), (float("inf"), 0.002))


def nap_after(waited: float) -> tuple[float, float]:
    """Return (seconds of a nap, seconds of waiting up to which naps are so long)."""
    return next((nap, until) for until, nap in _NAPS if waited < until)


def await_cell(
    memory: Memory, at: int, word: int, began: float, end: float, clock: Callable[[], float]
) -> None:
    """Wait until the word at `at` is not `word`, until `end`, or until naps become longer.

    The caller loaded the word before its last look, and began to wait at `began`.
    """
    now = clock()
    nap, longer = nap_after(now - began)
    until = min(began + longer, end)
    while now < until:
        looks = min(int((until - now) / nap) + 1, LOOKS) if nap else LOOKS
        if memory.await_change(at, word, int(nap * _BILLION), looks) != word:
            return
        now = clock()


class Ring:
    """The queue in the memory of one fixed file, at `offset` of the region.  Thread-safe.

    Every method raises Corrupt when the memory contradicts itself.  It raises OSError when the
    region is gone.  Busy means that other peers were faster ATTEMPTS times.
    """

    def __init__(self, memory: Memory, offset: int, size: int) -> None:
        """Read the header; raises ValueError when it is none of a queue."""
        raw = memory.read(offset, fmt.QUEUE.size)
        self.geometry: Final[QueueGeometry] = fmt.decode(raw, size)
        self._memory: Final = memory
        self._tail_at: Final = offset + fmt.TAIL_OFFSET
        self._head_at: Final = offset + fmt.HEAD_OFFSET
        self._cells_at: Final = offset + fmt.CELLS_OFFSET
        self._tags_at: Final = offset + self.geometry.tags_offset
        self._data_at: Final = offset + self.geometry.data_offset
        self._cells: Final = self.geometry.cells
        self._stride: Final = self.geometry.stride
        self.is_broadcast: Final = self.geometry.kind == fmt.BROADCAST
        self._blocks: Final = Blocks(
            memory, self._tags_at, self._data_at, self._stride, self.geometry.buffers
        )
        self._cursor = 0  # the buffer where the next search for a free one begins

    def cell_at(self, number: int) -> int:
        """Return the place in the region of the cell of a record."""
        return self._cells_at + number % self._cells * WORD

    # --- putting ------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether the next record fits; in a broadcast it always does."""
        if self.is_broadcast:
            return True
        for _ in range(ATTEMPTS):
            number = self._memory.load(self._tail_at)
            lap = number // self._cells
            at = self.cell_at(number)
            cell = self._memory.load(at)
            if cell == empty(lap):
                return True
            if self._is_full(cell, number):
                return False
            self._pass(self._tail_at, number, cell)
        raise Busy("other peers put records faster than this one can look")

    def _is_full(self, cell: int, number: int) -> bool:
        """Whether `cell`, that of record `number`, still has the record of the lap before."""
        before = number - self._cells
        if not cell & FULL or laps_ahead(cell, number // self._cells) != -1:
            return False
        if self._memory.load(self._head_at) > before and not self._has_moved(number, cell):
            raise self._damaged(f"record {before} was taken, and is there: {_UNUSABLE}")
        return True

    def claim(self, tag: int) -> int:
        """Claim a buffer under `tag`; returns its number, or -1 when none is free."""
        got, self._cursor = self._blocks.claim(_CLAIM, tag, self._cursor)
        if not got:
            return -1
        block: int = POINTER.unpack(got)[0]
        return block

    def fill(self, buffer: int, parts: bytes, guard: tuple[int, int]) -> None:
        """Store a record, its length before it, into a claimed buffer; raises Fenced.

        `guard` is the place and value of the own state word while the claim is ours.
        """
        self._blocks.guard(*guard)
        if not self._blocks.overwrite(buffer, 0, parts):
            raise Fenced(_FENCED)

    def publish(self, buffer: int, guard: tuple[int, int]) -> bool:
        """Put a filled buffer into the next cell; False when the queue is full.

        Raises Fenced when the claim is not ours any more: then another peer may have the buffer.
        """
        memory = self._memory
        for _ in range(ATTEMPTS):
            number = memory.load(self._tail_at)
            lap, at = number // self._cells, self.cell_at(number)
            cell = memory.load(at)
            over = bool(cell & FULL) and self.is_broadcast and laps_ahead(cell, lap) == -1
            if over or cell == empty(lap):
                tag = self._tag_of(cell) if over else 0
                if memory.load(guard[0]) != guard[1]:
                    raise Fenced(_FENCED)
                if memory.cas(at, cell, full(lap, buffer)) == cell:
                    self._help(self._tail_at, number)
                    self._release(cell & BUFFER_MASK, tag)
                    return True
            elif not self.is_broadcast and self._is_full(cell, number):
                return False
            else:
                self._pass(self._tail_at, number, cell)
        raise Busy("other peers put records faster than this one")

    def give_back(self, buffer: int, tag: int) -> None:
        """Release a buffer that was claimed under `tag` and not published."""
        self._release(buffer, tag)

    # --- taking -------------------------------------------------------------------------------

    def take(self) -> bytes | None:
        """Take the oldest record of a work queue; None when it is empty."""
        memory = self._memory
        for _ in range(ATTEMPTS):
            number = memory.load(self._head_at)
            lap, at = number // self._cells, self.cell_at(number)
            cell = memory.load(at)
            if cell == empty(lap):
                self._expect_no_record(cell, number)
                return None
            if cell & FULL and laps_ahead(cell, lap) == 0:
                tag, record = self._tag_of(cell), self._copy(cell)
                if memory.cas(at, cell, empty(lap + 1)) != cell:
                    continue
                self._help(self._head_at, number)
                self._release(cell & BUFFER_MASK, tag)
                if record is None:
                    raise self._damaged(f"record {number} was impossible, and was dropped")
                return record
            self._pass(self._head_at, number, cell)
        raise Busy("other peers take records faster than this one")

    @property
    def head(self) -> int:
        """The number of the next record to take; work queues only."""
        return self._memory.load(self._head_at)

    @property
    def tail(self) -> int:
        """The number of the next record that a peer puts."""
        return self._memory.load(self._tail_at)

    def peek(self, number: int) -> tuple[bytes | None, int]:
        """Look at a record of a broadcast; returns (the record, its number).

        The record is None while it is not there yet.  The number is a later one when the record
        and those before it were replaced already.
        """
        memory = self._memory
        for _ in range(ATTEMPTS):
            lap, at = number // self._cells, self.cell_at(number)
            cell = memory.load(at)
            ahead = laps_ahead(cell, lap)
            if cell == 0 == lap or (ahead == -1 and cell & FULL):
                self._expect_no_record(cell, number)
                return None, number
            if ahead < 0 or not cell & FULL:
                raise self._misplaced(cell, number)
            if ahead > 0:
                latest = number + ahead * self._cells  # this cell has it
                if memory.load(self._tail_at) < latest:
                    raise self._misplaced(cell, number)
                # Leave out some records that exist still: writers go on meanwhile.
                number = min(latest - self._cells + 1 + self._cells // 4, latest)
                continue
            record = self._copy(cell)
            if memory.load(at) == cell:
                if record is None:
                    raise self._damaged(f"record {number} is impossible")
                return record, number
        raise Busy("other peers put records faster than this one can read")

    def _copy(self, cell: int) -> bytes | None:
        """Copy the record of a cell; None for an impossible one.  The caller checks the cell."""
        buffer = cell & BUFFER_MASK
        if buffer >= self.geometry.buffers:
            return None
        start = self._data_at + buffer * self._stride
        length = self._memory.load(start)
        if length > self.geometry.record:
            return None
        return self._memory.read(start + WORD, length)

    # --- buffers and hints --------------------------------------------------------------------

    def _tag_of(self, cell: int) -> int:
        """Return the tag of the buffer that a cell names; 0 if there is no such buffer."""
        buffer = cell & BUFFER_MASK
        if buffer >= self.geometry.buffers:
            return 0
        return self._memory.load(self._tags_at + buffer * WORD)

    def _release(self, buffer: int, tag: int) -> None:
        if tag:
            self._memory.cas(self._tags_at + buffer * WORD, tag, 0)

    def _help(self, at: int, number: int) -> None:
        """Move a hint on from `number`, unless another peer has done so."""
        self._memory.cas(at, number, number + 1)

    def _pass(self, at: int, number: int, cell: int) -> None:
        """Move a hint on from `number`, whose cell has its record, or had it.

        A cell is never more than one lap ahead of a hint, or behind it by more: others would have
        moved the hint first.  Raises Corrupt when the hint is still there.
        """
        ahead = laps_ahead(cell, number // self._cells)
        taken = not self.is_broadcast and ahead == 1 and not cell & (FULL | BUFFER_MASK)
        if taken or (cell & FULL and 0 <= ahead <= 1):
            self._help(at, number)
        elif self._memory.load(at) == number and not self._has_moved(number, cell):
            raise self._misplaced(cell, number)

    def _expect_no_record(self, cell: int, number: int) -> None:
        """Raise Corrupt if `cell` has not had record `number`, and `tail` says that it was put."""
        if self._memory.load(self._tail_at) > number and not self._has_moved(number, cell):
            raise self._damaged(f"record {number} was put, and is not there: {_UNUSABLE}")

    def _has_moved(self, number: int, cell: int) -> bool:
        """Whether the cell of record `number` is not `cell` any more."""
        return self._memory.load(self.cell_at(number)) != cell

    def collect(self, limits: array[int]) -> int:
        """Release buffers with settled claims that no cell names; returns how many.

        `limits` are those of the peer table, loaded before this call.
        """
        self._memory.fence()
        count = self.geometry.buffers
        marks = memoryview(mmap.mmap(-1, count * WORD)).cast("Q")
        for at in range(self._cells):
            cell = self._memory.load(self._cells_at + at * WORD)
            if cell & FULL and cell & BUFFER_MASK < count:
                marks[cell & BUFFER_MASK] = self._tag_of(cell)
        return self._blocks.release(self._blocks.sweep(marks, limits, 0, count))

    def _misplaced(self, cell: int, number: int) -> Corrupt:
        return self._damaged(
            f"cell {number % self._cells} is {cell:#x}, impossible for record {number}: {_UNUSABLE}"
        )

    def _damaged(self, why: str) -> Corrupt:
        return Corrupt(f"the queue is damaged: {why}")


class Records(Protocol):
    """What a `Reader` reads from: a `Ring`, or what contains its errors."""

    def take(self) -> bytes | None:
        """Take the oldest record of a work queue; see `Ring.take`."""

    def peek(self, number: int) -> tuple[bytes | None, int]:
        """Look at record `number` of a broadcast; see `Ring.peek`."""


class Reader:
    """The place of one reader in a queue.  Not thread-safe.

    A reader of a broadcast begins with what is put from now on; with `replay`, with the oldest
    record that is there.  A work queue has one place for all its readers, the head.
    """

    def __init__(self, ring: Ring, *, replay: bool) -> None:
        self._ring: Final = ring
        self._next = max(ring.tail - ring.geometry.cells, 0) if replay else ring.tail
        #: Records of a broadcast that this reader missed, because it was too slow.
        self.lost = 0

    @property
    def number(self) -> int:
        """The number of the record that it waits for."""
        return self._next if self._ring.is_broadcast else self._ring.head

    def next(self, source: Records) -> bytes | None:
        """Return the next record; None when there is none.  Raises what `source` raises."""
        if not self._ring.is_broadcast:
            return source.take()
        record, number = source.peek(self._next)
        self.lost += number - self._next
        self._next = number if record is None else number + 1
        return record

    def skip(self) -> None:
        """Go on behind a damaged record of a broadcast, but not ahead of the writers."""
        if self._ring.tail > self._next:
            self._next += 1
