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

import math
import os
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from ivshmemfs.errors import Busy, Fenced, TooManyPeers
from ivshmemfs.format import peer, words
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.peer import Occupant
from ivshmemfs.format.words import ACTIVE, DEAD, FREE, IDLE, JOINING
from ivshmemfs.region import Memory
from ivshmemfs.shm import identity, watch
from ivshmemfs.shm.control import Control
from ivshmemfs.shm.watch import Watch

_SLOT: Final = peer.SLOT_SIZE
_NEVER: Final = (1 << 64) - 1  # all bits of a word; no state word is ever this
_NOT_FREE: Final = 1 << words.SLOT_SHIFT  # state words of free slots are smaller
_LISTING: Final = (IDLE, ACTIVE, DEAD)  # states of slots whose open filter counts
DECIDED_AT_ONCE: Final = 8  # slots whose owners are looked for at once, in about 1 ms
JOIN_ATTEMPTS = 20
FILTER_SIZE = peer.FILTER_WORDS * words.FILTER_BITS


def _fresh_nonce() -> int:
    """Anything but 0 and the mark, and hardly ever the same twice."""
    return int.from_bytes(os.urandom(words.WORD), "little") % (peer.DOUBLED - 1) + 1


def _first_counter() -> int:
    """Where an incarnation begins to count: anywhere in the first half.

    The same incarnation comes back after 2^20 mounts of a slot.  Its tags do not, unless it counts
    through the same places.
    """
    return int.from_bytes(os.urandom(words.WORD), "little") % (words.COUNTER_MASK // 2)


class PeerTable:
    """All slots of one region, seen from outside."""

    def __init__(self, memory: Memory, geometry: Geometry, control: Control) -> None:
        self.memory = memory
        self.control = control
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
        self.control.fence()
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
        place, bit = index // words.FILTER_BITS, index % words.FILTER_BITS
        at = self.offset(1, peer.FILTER_OFFSET + place * words.WORD)
        mask = 1 << bit
        for number, listed in enumerate(self.memory.load_column(at, _SLOT, self.count)):
            if not listed & mask or number + 1 == own:
                continue
            word = self.state(number + 1)
            low = word >> words.INCARNATION_SHIFT & 0xFFFF
            if word >> words.SLOT_SHIFT in _LISTING and listed >> words.FILTER_BITS == low:
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
        self._here: identity.Here | None = None

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

    def _decide(self, slot: int, here: identity.Here) -> bool:
        table = self._table
        other = table.peer(slot)  # which may have moved on meanwhile
        gone = other.state == DEAD or self._is_left(other) or table.watch.absent(other, here)
        return gone and table.retire(slot, other.word)

    def _is_left(self, other: Occupant) -> bool:
        """Whether nobody needs a slot: it is silent without a claim under way, and its owner never
        settled in, or left it to a second owner of its identity.
        """
        doubled = other.state == IDLE and other.record.nonce == peer.DOUBLED
        left = other.state == JOINING or doubled
        return left and self._table.watch.silent(other.slot, other.word)


class Membership:
    """This mount's own slot.  Not thread-safe; one per mount."""

    def __init__(self, table: PeerTable) -> None:
        self.table = table
        self.slot = 0
        self.incarnation = 0
        self.counter = 0
        self._at = 0  # where the own slot, and so its state word, stands
        self._word = 0
        self._beat = 0
        self._nonce = 0  # as we stored it last
        self._proofs = peer.ALL_PROOFS  # what may prove our end
        self._record: peer.SlotRecord | None = None
        self._own = b""  # identity as it stands in the slot
        self._filter = [0] * peer.FILTER_WORDS
        self._opens = [0] * FILTER_SIZE
        self._intent = 0
        self._waiting: tuple[float, dict[int, tuple[int, int]]] | None = None
        self.must_collect = False
        self.doubled = False  # whether somebody else with our identity was met

    # --- joining and leaving ---

    def join(self, wait: float | None = None) -> None:
        """Take a slot; raises TooManyPeers when none falls free within `wait` seconds."""
        for _ in range(JOIN_ATTEMPTS):
            self._take_slot(watch.SILENCE if wait is None else wait)
            with suppress(Fenced):  # it took so long that somebody else has the slot now
                self._settle_in()
                return
        raise Busy("other peers take every slot before this one has settled in")

    def rejoin(self) -> None:
        """Take a slot without waiting for one: for a mount that serves others meanwhile.

        Raises Busy while somebody who is silent may still turn out to be, TooManyPeers after that.
        """
        if not self._join_at_once() and not self._join_who_stays_silent():
            raise self._no_slot()
        self._waiting = None
        with suppress(Fenced):
            self._settle_in()
            return
        raise Busy("another peer took the slot before this one had settled in")

    def _take_slot(self, wait: float) -> None:
        if not self._join_at_once() and not self._join_silent(wait):
            raise self._no_slot()

    def _no_slot(self) -> TooManyPeers:
        return TooManyPeers(
            f"all {self.table.count} peer slots are taken: unmount one, or see `ivshmemfs peers` "
            "and let go of a machine that will not come back with `ivshmemfs evict`"
        )

    def _join_at_once(self) -> bool:
        return self._join_free() or self._join_after_the_gone()

    def _join_after_the_gone(self) -> bool:
        self.table.watch.look()
        self.must_collect |= self.table.retire_gone()
        return self._join_free()

    def _join_free(self) -> bool:
        for slot in range(1, self.table.count + 1):
            word = self.table.state(slot)
            if word >> words.SLOT_SHIFT == FREE and self._claim(slot, word):
                return True
        return False

    def _join_silent(self, wait: float) -> bool:
        before = self.table.heartbeats()
        for _ in range(math.ceil(wait / watch.POLL)):
            time.sleep(min(watch.POLL, wait))
            self.table.watch.look()
            if self._join_free():
                return True
        return self._join_after_the_gone() or self._join_unchanged(before)

    def _join_who_stays_silent(self) -> bool:
        """The same in many calls, of which none waits: Busy until it has taken long enough."""
        now = time.monotonic()
        if self._waiting is None:
            self._waiting = now, self.table.heartbeats()
        since, before = self._waiting
        if abs(now - since) < watch.SILENCE:  # whichever way the clock goes
            raise Busy("all peer slots are taken; waiting for one whose owner is silent")
        self._waiting = None
        return self._join_unchanged(before)

    def _join_unchanged(self, before: dict[int, tuple[int, int]]) -> bool:
        for slot, seen in self.table.heartbeats().items():
            idle = seen[0] >> words.SLOT_SHIFT in (IDLE, JOINING)
            if idle and before.get(slot) == seen and self._claim(slot, seen[0]):
                self.must_collect = True  # its owner may have died while it released
                return True
        return False

    def _claim(self, slot: int, word: int) -> bool:
        incarnation = (words.split_state(word)[1] + 1) & words.INCARNATION_MASK
        joining = words.make_state(JOINING, incarnation, 0)
        if not self.table.swap(slot, word, joining):
            return False
        self.slot, self.incarnation, self.counter = slot, incarnation, 0
        self._at = self.table.offset(slot)
        self._word = joining
        self._nonce = self.table.memory.load(self._at + peer.NONCE_OFFSET)
        return True

    def _settle_in(self) -> None:
        self._identify(identity.current(self.incarnation))
        self._store(peer.IDENTITY_OFFSET, self._own)
        nonce = _fresh_nonce()
        self._store(peer.NONCE_OFFSET, nonce.to_bytes(words.WORD, "little"))
        self._nonce = nonce
        self._store(peer.INTENT_OFFSET, bytes(words.WORD))
        self._intent = 0
        self._beat = self.table.memory.load(self.table.offset(self.slot, peer.HEARTBEAT_OFFSET))
        base = (self.incarnation & 0xFFFF) << words.FILTER_BITS
        self._filter = [base | word & words.FILTER_MASK for word in self._filter]
        self._store(peer.FILTER_OFFSET, array("Q", self._filter).tobytes())
        self._move(IDLE, _first_counter())

    def _identify(self, record: peer.SlotRecord) -> None:
        self._record = record._replace(proofs=record.proofs & self._proofs)
        self._own = peer.encode_identity(self._record)

    def doubt_machine(self, machine: bytes) -> None:
        """Let nobody conclude anything from a UUID of ours that is not ours alone."""
        if self._record is not None and self._record.machine == machine:
            self._proofs &= ~peer.MACHINE_PROVES
            self._identify(self._record)  # stored with the next beat

    def _store(self, field: int, content: bytes) -> None:
        """Store words of the own slot, but not over those of whoever took it meanwhile: a value
        that was seen while the slot was ours is replaced, or nothing.  Raises Fenced.

        Filter words bear an incarnation, so those of the next owner are never equal to what was
        seen.  Words of its identity may be, and are set right with its next beat.
        """
        memory, at = self.table.memory, self.table.offset(self.slot, field)
        for word in memoryview(content).cast("Q"):
            seen = memory.load(at)
            while seen != word:
                if self.table.state(self.slot) != self._word:
                    raise self._lost("another peer took this mount's slot while it was silent")
                before, seen = seen, memory.cas(at, seen, word)
                if seen == before:
                    break
            at += words.WORD

    def leave(self) -> None:
        """Give the slot back; harmless when it was taken from us already."""
        if self.slot:
            with suppress(Fenced):
                self._sign()  # whoever has the same identity learns that we were here
                self._move(FREE, self.counter)
            self.slot = 0

    # --- transactions ---

    def _move(self, state: int, counter: int) -> None:
        new = words.make_state(state, self.incarnation, counter)
        if self.table.memory.cas(self._at, self._word, new) != self._word:
            raise self._lost("another peer declared this mount gone while it was silent")
        self._word, self.counter = new, counter

    def begin(self) -> int:
        """Start a transaction; returns the tag for its claims.  Raises Fenced, Busy."""
        if self.counter >= words.COUNTER_MASK - 1:
            self._renew()
        self._move(ACTIVE, self.counter + 1)
        if self.table.memory.load(self._at + peer.NONCE_OFFSET) != self._nonce:
            self._move(IDLE, self.counter)
            raise self._lost("another peer took this mount's slot while it was silent")
        return words.make_tag(self.slot, self.incarnation, self.counter)

    def _renew(self) -> None:
        """Become a new incarnation, because the counter is used up; Busy while that fails.

        In another slot if one is free, so that what is open here is listed throughout.
        """
        slot, word = self.slot, self._word
        if self._join_free():
            try:
                self._settle_in()
            finally:
                self.table.retire(slot, word)
        elif self._claim(slot, word):
            self._settle_in()
        else:
            raise self._lost("another peer took this mount's slot while it was silent")

    @property
    def stands(self) -> bool:
        """Whether nobody has declared this incarnation gone."""
        return self.table.memory.load(self._at) == self._word

    def check(self) -> None:
        """Raise Fenced unless the transaction is still under way; after loading the commit word."""
        if not (self.active and self.stands):
            raise self._lost("another peer declared this mount gone in the middle of a transaction")

    def end(self) -> None:
        """Everything claimed under the tag is settled.  Raises Fenced, also when this mount has
        joined again since: it was not us who ended that transaction.
        """
        if not self.active:
            raise Fenced("this mount was declared gone in the middle of a transaction")
        self._move(IDLE, self.counter)

    @property
    def standing(self) -> tuple[int, int]:
        """Where the own state word is, and what it says while this transaction is under way."""
        return self._at, self._word

    @property
    def active(self) -> bool:
        """Whether a transaction is under way."""
        return self._word >> words.SLOT_SHIFT == ACTIVE

    def beat(self) -> None:
        """Show life.  Raises Fenced when the slot is no longer ours."""
        self._sign()
        if not self.stands:
            raise self._lost("another peer declared this mount gone while it was silent")
        at = self.table.offset(self.slot, peer.HEARTBEAT_OFFSET)
        after = self._beat + 1 & _NEVER  # the region may say anything
        seen = self.table.memory.cas(at, self._beat, after)
        self._beat = after if seen == self._beat else seen
        self._store(peer.IDENTITY_OFFSET, self._own)

    # --- two owners of one identity ---

    def _lost(self, text: str) -> Fenced:
        """What to raise when a word of the own slot is not what was stored there last."""
        if not self._has_twin():
            return Fenced(text)
        self._part()
        return Fenced("another process goes by the identity of this mount")

    def _sign(self) -> None:
        """Store another nonce.  Raises Fenced if it is not ours that stands there.

        A beat signs first and looks at the state word then, a transaction begins and looks at the
        nonce then: of two owners that do so at once, one sees the other.
        """
        at, nonce = self._at + peer.NONCE_OFFSET, _fresh_nonce()
        if self.table.memory.cas(at, self._nonce, nonce) != self._nonce:
            raise self._lost("another peer declared this mount gone while it was silent")
        self._nonce = nonce

    def _has_twin(self) -> bool:
        """Whether somebody changes the own slot as only its owner may.

        Others end an incarnation as it stands; none of them begins a transaction in it, counts on,
        or stores another nonce before it has taken the slot.
        """
        word = self.table.state(self.slot)
        state, incarnation, counter = words.split_state(word)
        if incarnation != self.incarnation:
            return False
        if word == self._word or state in (IDLE, ACTIVE) or counter != self.counter:
            return True
        nonce = self.table.memory.load(self._at + peer.NONCE_OFFSET)
        return nonce != self._nonce and self.table.state(self.slot) == word

    def _part(self) -> None:
        """Leave the slot to the other one, and let nothing that we share with it prove our end.

        It finds the mark at its next beat and does the same.
        """
        memory, at = self.table.memory, self._at + peer.NONCE_OFFSET
        self.doubled, self._proofs = True, 0
        self._word = _NEVER
        while (seen := memory.load(at)) != peer.DOUBLED:  # the other may show life meanwhile
            if words.split_state(self.table.state(self.slot))[1] != self.incarnation:
                return
            if memory.cas(at, seen, peer.DOUBLED) == seen:  # a newcomer stores its own over it
                return

    # --- open inodes ---

    def _index(self, ino: int) -> int:
        return (ino * 0x9E3779B97F4A7C15 >> 20) % FILTER_SIZE

    def list_open(self, ino: int) -> None:
        """Tell everybody that `ino` is open here; ends with a fence.  Raises Fenced."""
        index = self._index(ino)
        self._opens[index] += 1
        if self._opens[index] == 1:
            place, bit = divmod(index, words.FILTER_BITS)
            try:
                self._filter_word(place, self._filter[place] | 1 << bit)
            except Fenced:
                self._filter[place] |= 1 << bit  # rejoining publishes it
                raise

    def unlist_open(self, ino: int) -> None:
        """One handle of `ino` less.  Ends with a fence; never raises."""
        index = self._index(ino)
        self._opens[index] -= 1
        if self._opens[index] == 0:
            place, bit = divmod(index, words.FILTER_BITS)
            new = self._filter[place] & ~(1 << bit)
            try:
                self._filter_word(place, new)
            except Fenced:
                self._filter[place] = new  # the next beat notices and rejoins

    def _filter_word(self, place: int, new: int) -> None:
        at = self.table.offset(self.slot, peer.FILTER_OFFSET + place * words.WORD)
        old = self._filter[place]
        if self._word == _NEVER or self.table.memory.cas(at, old, new) != old:
            raise self._lost("another peer took this mount's slot while it was silent")
        self._filter[place] = new
        if not self.stands:
            raise self._lost("another peer declared this mount gone while it was silent")

    def intend(self, ino: int) -> None:
        """Announce that `ino` is about to be freed, then fence.  Raises Fenced."""
        if self._intent == ino:
            return
        # A former owner of the slot may have left its own there, before it noticed.
        self._store(peer.INTENT_OFFSET, ino.to_bytes(words.WORD, "little"))
        self._intent = ino
        self.table.memory.fence()

    def withdraw(self) -> None:
        """Take back what was announced, if anything was."""
        if self._intent:
            at = self.table.offset(self.slot, peer.INTENT_OFFSET)
            self.table.memory.cas(at, self._intent, 0)
            self._intent = 0

    def listed_elsewhere(self, ino: int) -> bool:
        """Whether another peer may hold `ino` open."""
        return self.table.lists(self._index(ino), self.slot)

    def intended_elsewhere(self, ino: int) -> bool:
        """Whether another peer is about to free `ino`."""
        return self.table.intends(ino, self.slot)
