"""The peer table: who has the region mounted, and what each is doing.

States of a slot, and who may change them (always by compare-and-swap of the state word, which
also carries incarnation and counter, so that nobody acts on a slot that has moved on):

    FREE     -> JOINING   a newcomer, with the next incarnation
    JOINING  -> IDLE      its owner, once its identity stands
    IDLE     -> ACTIVE    its owner, counter + 1: a transaction begins, and claims bear that counter
    ACTIVE   -> IDLE      its owner, when everything it claimed is settled: published, or garbage
                          that it releases next
    IDLE     -> FREE      its owner leaves
    IDLE     -> JOINING   a newcomer takes the slot of a peer that is gone, or silent when the
                          table is full; safe at any time, since all claims of an idle peer are
                          settled and it cannot begin a transaction any more
    IDLE     -> JOINING   its owner, with the next incarnation: its counter is used up
    IDLE     -> FREE      anybody, when it is silent and was left to a second owner of its identity;
                          safe, as above
    JOINING  -> FREE      anybody, when it stays so for seconds: its owner died before it could say
                          who it is, or will start again; safe, as above
    ACTIVE   -> DEAD      whoever knows that the owner is gone (`Watch.absent`), or was told so by
                          an administrator
    DEAD     -> FREE      anybody, after a fence of the commit word: what the owner planned can no
                          longer be published, so its claims are settled and may be collected

Settled claims are reachable from the root or garbage for ever.  Claims are settled that bear an
older incarnation of their slot, a counter below the slot's, or any counter of a slot that is not
ACTIVE or DEAD.  A silent peer in ACTIVE keeps its claims (quarantine): it may still be writing.

An owner that finds its state word changed was declared gone: `Fenced`.  It joins again, as a new
incarnation, and goes on.  One that finds a word of its slot changed as only its owner may change it
has a twin (its machine was cloned): it marks the slot, leaves it to the other, and joins again
under an identity that proves nothing.  The other finds the mark and does the same.

The open filter lists, coarsely, which inodes the owner holds open (a set bit may stand for
several).  Opening: list, fence, look whether the inode still exists, and whether anybody intends
to free it.  Freeing: store the intent, fence, look whether anybody lists it.  One of two that do
so at once sees the other.
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
_LISTING: Final = (IDLE, ACTIVE, DEAD)  # states of slots whose open filter counts
DECIDED_AT_ONCE: Final = 8  # slots whose owners are looked for at once, in about 1 ms


class PeerTable:
    """All slots of one region, seen from outside."""

    def __init__(self, memory: Memory, geometry: Geometry, commit_word: CommitWord) -> None:
        self.memory = memory
        self.commit_word = commit_word
        self.count = geometry.peer_count
        self.watch = Watch(memory, geometry)
        self._base = geometry.peers_offset

    def offset(self, slot: int, field: int = 0) -> int:
        """Byte offset in the region of a slot (from 1) and a place in it."""
        return self._base + (slot - 1) * peer.SLOT_SIZE + field

    def state(self, slot: int) -> int:
        """A slot's state word."""
        return self.memory.load(self.offset(slot))

    def swap(self, slot: int, old: int, new: int) -> bool:
        """Change a slot's state word if it is still `old`."""
        return self.memory.cas(self.offset(slot), old, new) == old

    def peer(self, slot: int) -> Occupant:
        """What stands in a slot."""
        return peer.occupant(slot, self.memory.read(self.offset(slot), peer.SLOT_SIZE))

    def peers(self) -> Iterator[Occupant]:
        """All slots that are not free."""
        for number in self.memory.indices_at_least(self._base, _SLOT, self.count, _NOT_FREE):
            yield self.peer(number + 1)

    def states(self) -> list[int]:
        """The state words of all slots, from slot 1 on."""
        return self.memory.load_column(self._base, _SLOT, self.count)

    def limits(self) -> array[int]:
        """For each slot number, what is not yet settled; 0 where there is no such slot.

        A word (incarnation, counter): claims of an older incarnation, or of this one with a lower
        counter, are settled; those of a newer incarnation are not (the slot moved on since).
        Slot 0 is that of repairs, which claim as peers do.
        """
        limits = array("Q", bytes(256 * words.WORD))
        for slot in range(self.count + 1):
            state, incarnation, counter = words.split_state(self.state(slot))
            settled = counter if state in (ACTIVE, DEAD) else counter + 1
            limits[slot] = words.make_state(state, incarnation, settled)
        return limits

    def heartbeats(self) -> dict[int, tuple[int, int]]:
        """(state word, heartbeat) by slot, of all that are not free."""
        found = {}
        for slot in range(1, self.count + 1):
            word = self.state(slot)
            if word >> words.SLOT_SHIFT != FREE:
                beat = self.memory.load(self.offset(slot, peer.HEARTBEAT_OFFSET))
                found[slot] = (word, beat)
        return found

    def retire(self, slot: int, word: int) -> bool:
        """Declare the owner of a slot gone; the caller answers for that being true.

        Returns whether it was this call that did it; then the caller should collect, since the
        peer may have left claims, or have owed the collection of what another left.  Safe against
        anybody else who does the same at once.
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
        """Retire all who are surely gone; whether there may be something to collect.

        That takes somebody who looks again and again (`watch.look`): silence counts from the
        first look.
        """
        retirement = Retirement(self)
        retirement.begin(own)
        return retirement.step(self.count)

    def lists(self, index: int, own: int) -> bool:
        """Whether any slot but `own` lists filter index `index` as open."""
        place, mask = open_filter.split_index(index)
        at = self.offset(1, peer.FILTER_OFFSET + place * words.WORD)
        for number, listed in enumerate(self.memory.load_column(at, _SLOT, self.count)):
            if not listed & mask or number + 1 == own:
                continue
            word = self.state(number + 1)
            state, incarnation, _ = words.split_state(word)
            if state in _LISTING and open_filter.has_stamp(listed, incarnation):
                return True
        return False

    def intends(self, ino: int, own: int) -> bool:
        """Whether any slot but `own` is about to free inode `ino`."""
        intents = self.memory.load_column(self.offset(1, peer.INTENT_OFFSET), _SLOT, self.count)
        if 0 < own <= self.count:
            intents[own - 1] = 0
        return ino in intents


class Retirement:
    """A round over the slots that may be retired, some at a time: each costs system calls.

    idle -> `begin` queues who is silent, or declared dead -> `step` decides some -> idle
    """

    def __init__(self, table: PeerTable) -> None:
        self._table = table
        self._queue: list[int] = []
        self._here: identity.Surroundings | None = None

    @property
    def pending(self) -> bool:
        """Whether a round is under way."""
        return bool(self._queue)

    def begin(self, own: int = 0) -> None:
        """Begin a round, without the slot `own`; a round under way is left alone."""
        if not self._queue:
            silent = self._table.watch.silent
            for slot, word in enumerate(self._table.states(), 1):
                state = word >> words.SLOT_SHIFT
                if state == DEAD or (state != FREE and slot != own and silent(slot, word)):
                    self._queue.append(slot)
            self._here = None

    def step(self, most: int = DECIDED_AT_ONCE) -> bool:
        """Decide the next `most`, and retire who is surely gone.

        Returns whether there may be something to collect.
        """
        found = False
        for _ in range(min(most, len(self._queue))):
            if self._here is None:
                self._here = identity.surroundings()
            found |= self._decide(self._queue.pop(), self._here)
        return found

    def _decide(self, slot: int, here: identity.Surroundings) -> bool:
        table = self._table
        other = table.peer(slot)  # which may have moved on meanwhile
        gone = other.state == DEAD or self._is_left(other) or table.watch.absent(other, here)
        return gone and table.retire(slot, other.word)

    def _is_left(self, other: Occupant) -> bool:
        """Whether nobody needs a slot: it is silent without a claim under way, and its owner never
        settled in, or left it to a second owner of its identity.
        """
        doubled = other.state == IDLE and other.record.nonce == peer.TWIN_MARK
        left = other.state == JOINING or doubled
        return left and self._table.watch.silent(other.slot, other.word)
