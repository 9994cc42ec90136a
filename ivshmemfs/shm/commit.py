"""The commit word and the hint word.

The **commit word** (sequence, root block) defines the filesystem: all blocks that its root reaches.
A peer changes it by compare-and-swap only, from the value that its change was planned on.  One of
several planners wins; the others plan again.  `fence` increments the sequence and keeps the root,
so every commit that was planned before the fence fails.  A word that says "under repair" fails
those commits too; only the repair replaces it (`repair`).

The **hint word** is advice: 0, or (slot, need, progress) of the peer that is about to commit.
A writer takes it before it plans; otherwise writers often plan in vain.  It protects nothing.
A waiting peer takes the word over from a holder that shows no progress.  The patience is
`PATIENCE`, or four times the need that the holder states, at most `LONGEST`.  (A guest under
emulation is slow.)  The former holder then commits all the same, or plans again.
"""

from __future__ import annotations

import time
from typing import Final

from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET
from ivshmemfs.region import Memory

PATIENCE = 0.005  # shortest time without progress before a take-over of the hint, in seconds
LONGEST = 0.08  # longest such time, in seconds
#: Naps between two looks at the clock while a peer waits: each may take much longer than it should.
LOOKS: Final = 16


class CommitWord:
    """The commit word of one region."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def load(self) -> int:
        """Return the commit word; 0 while the region is being formatted."""
        return self._memory.load(COMMIT_OFFSET)

    def await_other(self, word: int, nap: float, naps: int) -> int:
        """Wait until the commit word is not `word`, for `naps` times `nap` seconds at most.

        Returns the commit word.  Signal handlers run meanwhile, and may raise.
        """
        return self._memory.await_change(COMMIT_OFFSET, word, int(nap * 1e9), naps)

    def publish(self, planned_on: int, root_block: int) -> int:
        """Make `root_block` the root if the commit word still is `planned_on`.

        Returns the new commit word, or 0 when another peer committed first.
        """
        sequence = words.next_sequence(planned_on >> words.BLOCK_BITS)
        new = words.make_commit(sequence, root_block)
        won = self._memory.cas(COMMIT_OFFSET, planned_on, new) == planned_on
        return new if won else 0

    def fence(self) -> None:
        """Make every commit fail that was planned before this call."""
        while (word := self.load()) and not words.under_repair(word):
            if self.publish(word, word & words.BLOCK_MASK):
                return


class Hint:
    """This peer's view of the hint word.

    FREE -> (take) -> HELD -> (give) -> FREE.  Another peer may take the hint over at any time.
    Then `give` changes nothing, and `retake` queues up again.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.mine = 0  # the word that this mount stored, while it holds the hint
        self._progress = time.monotonic_ns()
        self._taken_at = 0.0
        self._need = 0.0  # seconds that this mount usually holds it
        self._seen = 0  # the last word seen of another holder
        self._since = 0.0  # when that word was seen first

    def next_word(self, slot: int) -> int:
        """Return the word that takes the hint for `slot`."""
        self._progress += 1
        return words.make_hint(slot, int(self._need * 1000), self._progress)

    def take(self, slot: int) -> bool:
        """Take the hint for `slot`; return False when another peer holds it and makes progress."""
        mine = self.next_word(slot)
        seen = self._memory.cas(HINT_OFFSET, 0, mine)
        if seen and not self._outwaited(seen):
            return False
        if seen and self._memory.cas(HINT_OFFSET, seen, mine) != seen:
            return False
        self.taken(mine)
        return True

    def taken(self, mine: int) -> None:
        """Note that this mount stored `mine` into the free hint word."""
        self.mine = mine
        self._taken_at = time.monotonic()

    @property
    def held(self) -> bool:
        """Whether any peer holds the hint."""
        return self._memory.load(HINT_OFFSET) != 0

    def retake(self, slot: int) -> bool:
        """Keep the hint, or take it again; return whether this mount holds it."""
        return self._memory.load(HINT_OFFSET) == self.mine or self.take(slot)

    def _outwaited(self, seen: int) -> bool:
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
            return False
        patience = max(PATIENCE, min(words.hint_need(seen) * 0.004, LONGEST))
        return abs(now - self._since) > patience  # also when the clock goes backwards

    def give(self) -> None:
        """Give the hint back, and update the stated need."""
        if self.mine:
            self._memory.cas(HINT_OFFSET, self.mine, 0)
            self.given()

    def given(self) -> None:
        """Note that this mount gave the hint back, and update the stated need."""
        self.mine = 0
        held = time.monotonic() - self._taken_at
        self._need = max(held, self._need * 0.9) if held < 1.0 else self._need
