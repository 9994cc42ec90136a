"""The peer table: the slots of all peers, as any peer sees them.

Each change of a slot's state is a compare-and-swap of the state word.  That word also carries the
incarnation and the counter, so a peer never changes a slot that has moved on.  States:

    FREE     -> JOINING   a newcomer takes the slot, with the next incarnation
    JOINING  -> IDLE      the owner has stored its identity
    IDLE     -> ACTIVE    the owner begins a transaction: counter + 1, which its claims carry
    ACTIVE   -> IDLE      the owner ends it: all its claims are settled (published, or garbage that
                          the owner releases next)
    IDLE     -> FREE      the owner leaves
    IDLE     -> JOINING   a newcomer takes the slot of a peer that is gone, or that is silent while
                          the table is full.  Safe at any time: all claims of an idle peer are
                          settled, and its next compare-and-swap of the state word fails
    IDLE     -> JOINING   the owner has used up its counter and takes the next incarnation
    IDLE     -> FREE      any peer, when the slot is silent and its owner left it to a twin; safe as
                          above
    JOINING  -> FREE      any peer, when the slot is silent: its owner died while it joined, or will
                          start again; safe as above
    ACTIVE   -> DEAD      a peer that knows that the owner is gone (`Watch.absent`), or that an
                          administrator told so
    DEAD     -> FREE      any peer, after a fence of the commit word: the owner cannot publish its
                          plans any more, so its claims are settled and may be collected

A settled claim stays reachable from the root, or stays garbage.  A claim is settled if the slot has
moved on to a newer incarnation or a higher counter.  So is every claim of a slot that is neither
ACTIVE nor DEAD.  A silent ACTIVE peer keeps its claims (quarantine): it may still be writing.

An owner that finds its state word changed was declared gone: `Fenced`.  It joins again as a new
incarnation.  A **twin** is a second owner of one slot: the machine was cloned, or put back into an
older state.  An owner has a twin if a word has changed that only the owner may change.  It marks
the slot, leaves it to the twin, and joins again under an identity that proves nothing.  The twin
finds the mark and does the same.

The open filter (`format/open_filter.py`) lists the inodes that the owner may hold open.  A peer
that opens an inode lists it and fences.  Then it checks whether a peer intends to free the inode
(if so, it fences the commit word), and whether the inode still exists.  A peer that frees an inode
stores its intent, fences, and then checks that no other peer lists it.  So of two peers that do
both at once, one sees the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from ivshmemfs.format import open_filter, peer, words
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.peer import Occupant
from ivshmemfs.format.words import ACTIVE, DEAD, FREE, IDLE, JOINING
from ivshmemfs.region import Memory
from ivshmemfs.shm import identity
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.watch import Watch

_SLOT: Final = peer.SLOT_SIZE
_NOT_FREE: Final = 1 << words.SLOT_SHIFT  # state words of free slots are smaller
_EVERY_BIT: Final = (1 << 64) - 1
_LISTING: Final = (IDLE, ACTIVE, DEAD)  # states of slots whose open filter counts
DECIDED_AT_ONCE: Final = 8  # slots that one step of a `Retirement` decides, in about 1 ms


class PeerTable:
    """All slots of one region, as any peer sees them."""

    def __init__(self, memory: Memory, geometry: Geometry, commit_word: CommitWord) -> None:
        self.memory = memory
        self.commit_word = commit_word
        self.count = geometry.peer_count
        self.watch = Watch(memory, geometry)
        self._base = geometry.peers_offset

    def offset(self, slot: int, field: int = 0) -> int:
        """Return the byte offset in the region of byte `field` of a slot (from 1)."""
        return self._base + (slot - 1) * peer.SLOT_SIZE + field

    def state(self, slot: int) -> int:
        """Return a slot's state word."""
        return self.memory.load(self.offset(slot))

    def swap(self, slot: int, old: int, new: int) -> bool:
        """Change a slot's state word from `old` to `new`; return False if it was not `old`."""
        return self.memory.cas(self.offset(slot), old, new) == old

    def peer(self, slot: int) -> Occupant:
        """Return the contents of a slot."""
        return peer.occupant(slot, self.memory.read(self.offset(slot), peer.SLOT_SIZE))

    def peers(self) -> Iterator[Occupant]:
        """Yield the contents of all slots that are not free."""
        for number in self.memory.indices_at_least(self._base, _SLOT, self.count, _NOT_FREE):
            yield self.peer(number + 1)

    def states(self) -> list[int]:
        """Return the state words of all slots, from slot 1 on."""
        return self.memory.load_column(self._base, _SLOT, self.count)

    def limits(self) -> array[int]:
        """Return, for each slot number, the first claim that is not settled; 0 for no such slot.

        An entry is a word (incarnation, counter).  Claims of an older incarnation, or of this one
        with a lower counter, are settled.  Claims of a newer incarnation are not: the slot moved
        on since.  Slot 0 is the repair slot; repairs claim as peers do.
        """
        limits = array("Q", bytes(256 * words.WORD))
        for slot in range(self.count + 1):
            state, incarnation, counter = words.split_state(self.state(slot))
            settled = counter if state in (ACTIVE, DEAD) else counter + 1
            limits[slot] = words.make_state(state, incarnation, settled)
        return limits

    def heartbeats(self) -> dict[int, tuple[int, int]]:
        """Return (state word, heartbeat) by slot number, for all slots that are not free."""
        found = {}
        for slot in range(1, self.count + 1):
            word = self.state(slot)
            if word >> words.SLOT_SHIFT != FREE:
                beat = self.memory.load(self.offset(slot, peer.HEARTBEAT_OFFSET))
                found[slot] = (word, beat)
        return found

    def retire(self, slot: int, word: int) -> bool:
        """Declare the owner of a slot gone, which the caller must know.

        Returns whether this call freed the slot.  Then the caller should collect: the peer may
        have left claims, or have owed a collection itself.  Two callers may do this at once.
        """
        state, incarnation, counter = words.split_state(word)
        free = words.make_state(FREE, incarnation, counter)
        if state in (IDLE, JOINING):
            return self.swap(slot, word, free)
        dead = words.make_state(DEAD, incarnation, counter)
        if state == ACTIVE and not self.swap(slot, word, dead):
            return False
        if state not in (ACTIVE, DEAD):
            return False
        self.commit_word.fence()
        self.swap(slot, dead, free)
        return True

    def retire_gone(self, own: int = 0) -> bool:
        """Retire all peers that are surely gone; return whether there may be garbage.

        The caller must have called `watch.look` repeatedly: silence counts from the first look.
        """
        retirement = Retirement(self)
        retirement.begin(own)
        return retirement.step(self.count)

    def lists(self, index: int, own: int) -> bool:
        """Return whether any slot but `own` lists filter index `index` as open."""
        place, mask = open_filter.split_index(index)
        at = self.offset(1, peer.FILTER_OFFSET + place * words.WORD)
        for number in self.memory.indices_where(at, _SLOT, self.count, mask, mask):
            if number + 1 == own:
                continue
            listed = self.memory.load(at + number * _SLOT)
            word = self.state(number + 1)
            state, incarnation, _ = words.split_state(word)
            stamped = open_filter.has_stamp(listed, incarnation)
            if listed & mask and stamped and state in _LISTING:
                return True
        return False

    def intends(self, ino: int, own: int) -> bool:
        """Return whether any slot but `own` announces that it frees inode `ino`."""
        at = self.offset(1, peer.INTENT_OFFSET)
        found = self.memory.indices_where(at, _SLOT, self.count, _EVERY_BIT, ino)
        return any(number + 1 != own for number in found)


class Retirement:
    """A round over the slots that may be retired, in steps: each decision costs system calls.

    States: idle -> `begin` queues the silent and the dead slots -> `step` decides some -> idle.
    """

    def __init__(self, table: PeerTable) -> None:
        self._table = table
        self._queue: list[int] = []
        self._here: identity.Surroundings | None = None

    @property
    def pending(self) -> bool:
        """Whether slots are queued."""
        return bool(self._queue)

    def begin(self, own: int = 0) -> None:
        """Begin a round over all slots but `own`, unless a round is under way."""
        if not self._queue:
            silent = self._table.watch.silent
            for slot, word in enumerate(self._table.states(), 1):
                state = word >> words.SLOT_SHIFT
                if state == DEAD or (state != FREE and slot != own and silent(slot, word)):
                    self._queue.append(slot)
            self._here = None

    def step(self, most: int = DECIDED_AT_ONCE) -> bool:
        """Decide the next `most` slots, and retire the peers that are surely gone.

        Returns whether there may be garbage.
        """
        found = False
        for _ in range(min(most, len(self._queue))):
            if self._here is None:
                self._here = identity.surroundings()
            found |= self._decide(self._queue.pop(), self._here)
        return found

    def _decide(self, slot: int, here: identity.Surroundings) -> bool:
        table = self._table
        other = table.peer(slot)  # it may have moved on since `begin`
        gone = other.state == DEAD or self._is_left(other) or table.watch.absent(other, here)
        return gone and table.retire(slot, other.word)

    def _is_left(self, other: Occupant) -> bool:
        """Return whether a slot is abandoned: silent and JOINING, or silent, IDLE and marked.

        Such a slot has no claim under way.
        """
        marked = other.state == IDLE and other.record.nonce == peer.TWIN_MARK
        abandoned = other.state == JOINING or marked
        return abandoned and self._table.watch.silent(other.slot, other.word)
