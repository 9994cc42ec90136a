"""The commit word and the hint word.

The **commit word** (sequence, root block) is the whole truth: what is reachable from its root is
the filesystem.  It changes by compare-and-swap only, from the value that a change was planned on,
so of several planners one wins and the others plan again.  `fence` moves the sequence on without
a new root: every commit planned before then fails, and nothing else happens.  A word that says
"under repair" has failed them already, and only the repair replaces it (`repair`).

The **hint word** is advice: 0 = nobody is committing, else (slot, need, progress) of who is.
Writers take it before they plan so that they do not plan in vain.  It protects nothing.  A holder
that makes no progress for `PATIENCE` seconds, or four times what it says that it usually needs (a
guest under emulation is slow), but never longer than `LONGEST`, loses it to whoever waited; what
the holder was doing then either still commits or is planned again.
"""

from __future__ import annotations

import time

from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET
from ivshmemfs.region import Memory

PATIENCE = 0.005  # seconds without progress after which the hint is taken over at the earliest
LONGEST = 0.08  # and at the latest


class CommitWord:
    """The two words of one region."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def load(self) -> int:
        """The commit word; 0 while the region is being formatted."""
        return self._memory.load(COMMIT_OFFSET)

    def publish(self, planned_on: int, root_block: int) -> int:
        """Make `root_block` the root if nobody committed since `planned_on`.

        Returns the new commit word, or 0 when somebody was faster.
        """
        sequence = words.next_sequence(planned_on >> words.BLOCK_BITS)
        new = words.make_commit(sequence, root_block)
        won = self._memory.cas(COMMIT_OFFSET, planned_on, new) == planned_on
        return new if won else 0

    def fence(self) -> None:
        """Let every commit that was planned before this call fail."""
        while (word := self.load()) and not words.under_repair(word):
            if self.publish(word, word & words.BLOCK_MASK):
                return


class Hint:
    """This peer's view of the hint word.

    FREE -> (take) -> HELD -> (give) -> FREE; another peer may take it from us at any time, which
    `give` notices and does not mind, and after which `retake` has to queue up again.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._mine = 0
        self._progress = time.monotonic_ns()
        self._taken_at = 0.0
        self._need = 0.0  # seconds that we usually hold it
        self._seen = 0
        self._since = 0.0

    def take(self, slot: int) -> bool:
        """Try to become the one who commits; False: somebody else is at it and makes progress."""
        self._progress += 1
        mine = words.make_hint(slot, int(self._need * 1000), self._progress)
        seen = self._memory.cas(HINT_OFFSET, 0, mine)
        if seen and not self._outwaited(seen):
            return False
        if seen and self._memory.cas(HINT_OFFSET, seen, mine) != seen:
            return False
        self._mine = mine
        self._taken_at = time.monotonic()
        return True

    @property
    def held(self) -> bool:
        """Whether anybody is committing."""
        return self._memory.load(HINT_OFFSET) != 0

    def retake(self, slot: int) -> bool:
        """Show progress, or try again to become the one who commits."""
        return self._memory.load(HINT_OFFSET) == self._mine or self.take(slot)

    def _outwaited(self, seen: int) -> bool:
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
            return False
        patience = max(PATIENCE, min(words.hint_need(seen) * 0.004, LONGEST))
        return abs(now - self._since) > patience  # whichever way the clock goes

    def give(self) -> None:
        """Stop committing."""
        if self._mine:
            self._memory.cas(HINT_OFFSET, self._mine, 0)
            self._mine = 0
            held = time.monotonic() - self._taken_at
            self._need = max(held, self._need * 0.9) if held < 1.0 else self._need
