"""Bells: a peer that waits sleeps until a commit rings its doorbell.

States of a bell word (`format/bell.py`); all changes are compare-and-swaps:

    quiet      0: a commit costs one load more
    announced  waiters put the numbers of their doorbells into it
    taken      a peer that has committed swaps it to 0, and then rings these numbers

Any peer may announce, with or without a slot.  Each commit takes what is announced, so an
announcement rings once.  One that a dead waiter left costs the next commit one ring.

Order of a waiter: forget old rings, announce, load the commit word again, sleep.  Order of a
committer: swap the commit word, load the bell word.  Swaps are full fences.  So the waiter sees the
new commit word, or the committer sees the announcement.

A ring may be lost: the committer dies before it rings, or a server was started anew.  So no sleep
takes longer than `SAFETY`.  A peer without a doorbell cannot ring.  So no waiter sleeps while the
peer table has one: each owner states in its slot whether it rings.

The words may hold anything.  A commit rings at most `BELL_WORDS * LANES` numbers, each of which the
device or the server's list knows; it ignores all others.  A ring without a commit costs a waiter no
more than a nap, because the next wait naps.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from typing import Final, Protocol

from ivshmemfs.format import bell, peer, words
from ivshmemfs.region import Memory
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.peers import PeerTable

SAFETY: Final = 1.0  # longest sleep in seconds; a lost ring delays a waiter as long
DEAF_SECONDS: Final = 1.0  # between two looks at peers that do not ring
ATTEMPTS: Final = 8  # swaps of one bell word before its announcement or its ring is given up


class Doorbell(Protocol):
    """What this process rings with, and is rung by.  Nothing here waits, or raises OSError."""

    @property
    def number(self) -> int:
        """The number by which others ring it, or -1 when they cannot."""

    def keep(self) -> bool:
        """Read what the server says of others; return whether it reaches them.

        Call it once a second.  False for ever after its server ended.
        """

    def ring(self, numbers: Iterable[int]) -> None:
        """Ring these numbers; ignore those that the device or the server does not know."""

    def fileno(self) -> int:
        """Return a descriptor that is readable after a ring."""

    def quiet(self) -> None:
        """Forget the rings so far."""

    def close(self) -> None:
        """Give everything back; closing twice is harmless."""


class Bells:
    """The bell words of one region, and this process's doorbell.  Not thread-safe."""

    def __init__(self, memory: Memory, table: PeerTable, doorbell: Doorbell) -> None:
        self.doorbell = doorbell
        self.rung = 0  # numbers that this process has rung
        self._memory = memory
        self._table = table
        self._commit_word = CommitWord(memory)
        self._ringing: dict[int, int] = {}  # incarnation by slot, of peers that state that they do
        self._deaf_until = 0.0  # some peer does not ring, as the last look found
        self._distrusted = False  # the last ring came without a commit

    # --- the committer ------------------------------------------------------------------------

    def ring(self) -> None:
        """Ring all that have announced themselves.

        Call it after a commit if the first bell word is not 0.
        """
        found: list[int] = []
        for at in bell.BELL_OFFSETS:
            word = self._take(at)
            found += bell.numbers(word)
            if not bell.is_full(word):
                break
        if found:
            self.rung += len(found)
            self.doorbell.ring(found)

    def _take(self, at: int) -> int:
        """Return a bell word after it was swapped to 0; 0 when another peer was faster."""
        for _ in range(ATTEMPTS):
            word = self._memory.load(at)
            if not word or self._memory.cas(at, word, 0) == word:
                return word
        return 0

    # --- the waiter ---------------------------------------------------------------------------

    def announce(self) -> bool:
        """Let the next commit ring; whether it will.

        The caller has forgotten old rings, and loads the commit word again before it sleeps.
        """
        number = self.doorbell.number
        if not 0 <= number <= bell.LARGEST_NUMBER or not self._memory.writable:
            return False
        return self._everybody_rings() and any(self._add(at, number) for at in bell.BELL_OFFSETS)

    def _add(self, at: int, number: int) -> bool:
        for _ in range(ATTEMPTS):
            word = self._memory.load(at)
            new = bell.added(word, number)
            if new is None:
                return False
            if new == word or self._memory.cas(at, word, new) == word:
                return True
        return False

    def sleep(self, word: int, seconds: float) -> bool:
        """Sleep until a ring, `SAFETY`, or `seconds`, while the commit word is `word`.

        Returns False at once where a bell cannot be relied on: then the caller naps, and looks.
        Signal handlers run meanwhile, and may raise.
        """
        if not self.prepare():
            return False
        if self._commit_word.load() == word:
            self.judge(word, self.await_ring(seconds))
        return True

    def prepare(self) -> bool:
        """Forget old rings and announce; whether a sleep may follow."""
        if self._distrusted:
            self._distrusted = False
            return False
        self.doorbell.quiet()
        return self.announce()

    def judge(self, word: int, rang: bool) -> None:
        """Note whether a ring came without a commit: then the next sleep is refused."""
        self._distrusted = rang and self._commit_word.load() == word

    def await_ring(self, seconds: float) -> bool:
        """Sleep until a ring, `SAFETY`, or `seconds`; whether it rang."""
        poll = select.poll()
        poll.register(self.doorbell.fileno(), select.POLLIN)
        return bool(poll.poll(max(0.0, min(seconds, SAFETY)) * 1000))

    def _everybody_rings(self) -> bool:
        """Return whether each peer in the table states that it rings.

        Costs one load a slot while no peer joins.
        """
        now = time.monotonic()
        if now < self._deaf_until <= now + DEAF_SECONDS:
            return False
        for slot, word in enumerate(self._table.states(), 1):
            state, incarnation, _ = words.split_state(word)
            if state == words.FREE or self._ringing.get(slot) == incarnation:
                continue
            if not rings(self._table.peer(slot)):
                self._deaf_until = now + DEAF_SECONDS
                return False
            self._ringing[slot] = incarnation
        return True


def rings(other: peer.Occupant) -> bool:
    """Return whether a peer states that it rings after each commit."""
    return other.identity_valid and bool(other.record.capabilities & bell.RINGS)
