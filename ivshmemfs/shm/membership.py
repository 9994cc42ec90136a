"""This mount's own slot of the peer table: join, begin and end transactions, beat, leave."""

from __future__ import annotations

import math
import os
import time
from array import array
from contextlib import suppress
from typing import Final

from ivshmemfs.errors import Busy, Fenced, TooManyPeers
from ivshmemfs.format import open_filter, peer, words
from ivshmemfs.format.words import ACTIVE, FREE, IDLE, JOINING
from ivshmemfs.shm import identity, watch
from ivshmemfs.shm.peers import PeerTable

_NEVER: Final = (1 << 64) - 1  # all bits of a word; no state word is ever this
JOIN_ATTEMPTS = 20


def _fresh_nonce() -> int:
    """Anything but 0 and the mark, and hardly ever the same twice."""
    return int.from_bytes(os.urandom(words.WORD), "little") % (peer.TWIN_MARK - 1) + 1


def _first_counter() -> int:
    """Where an incarnation begins to count: anywhere in the first half.

    The same incarnation comes back after 2^20 mounts of a slot.  Its tags do not, unless it counts
    through the same places.
    """
    return int.from_bytes(os.urandom(words.WORD), "little") % (words.COUNTER_MASK // 2)


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
        self._filter = [0] * open_filter.WORDS
        self._opens = [0] * open_filter.SIZE
        self._intent = 0
        self._waiting: tuple[float, dict[int, tuple[int, int]]] | None = None
        self.must_collect = False
        self.twin_seen = False  # whether somebody else with our identity was met

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
        self._filter = [open_filter.stamped(word, self.incarnation) for word in self._filter]
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
    def owns_slot(self) -> bool:
        """Whether nobody has declared this incarnation gone."""
        return self.table.memory.load(self._at) == self._word

    def check(self) -> None:
        """Raise Fenced unless the transaction is still under way; after loading the commit word."""
        if not (self.active and self.owns_slot):
            raise self._lost("another peer declared this mount gone in the middle of a transaction")

    def end(self) -> None:
        """Everything claimed under the tag is settled.  Raises Fenced, also when this mount has
        joined again since: it was not us who ended that transaction.
        """
        if not self.active:
            raise Fenced("this mount was declared gone in the middle of a transaction")
        self._move(IDLE, self.counter)

    @property
    def own_state(self) -> tuple[int, int]:
        """Where the own state word is, and what it says while this transaction is under way."""
        return self._at, self._word

    @property
    def active(self) -> bool:
        """Whether a transaction is under way."""
        return self._word >> words.SLOT_SHIFT == ACTIVE

    def beat(self) -> None:
        """Show life.  Raises Fenced when the slot is no longer ours."""
        self._sign()
        if not self.owns_slot:
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
        self.twin_seen, self._proofs = True, 0
        self._word = _NEVER
        while (seen := memory.load(at)) != peer.TWIN_MARK:  # the other may show life meanwhile
            if words.split_state(self.table.state(self.slot))[1] != self.incarnation:
                return
            if memory.cas(at, seen, peer.TWIN_MARK) == seen:  # a newcomer stores its own over it
                return

    # --- open inodes ---

    def list_open(self, ino: int) -> None:
        """Tell everybody that `ino` is open here; ends with a fence.  Raises Fenced."""
        index = open_filter.index_of(ino)
        self._opens[index] += 1
        if self._opens[index] == 1:
            place, mask = open_filter.split_index(index)
            try:
                self._filter_word(place, self._filter[place] | mask)
            except Fenced:
                self._filter[place] |= mask  # rejoining publishes it
                raise

    def unlist_open(self, ino: int) -> None:
        """One handle of `ino` less.  Ends with a fence; never raises."""
        index = open_filter.index_of(ino)
        self._opens[index] -= 1
        if self._opens[index] == 0:
            place, mask = open_filter.split_index(index)
            new = self._filter[place] & ~mask
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
        if not self.owns_slot:
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
        return self.table.lists(open_filter.index_of(ino), self.slot)

    def intended_elsewhere(self, ino: int) -> bool:
        """Whether another peer is about to free `ino`."""
        return self.table.intends(ino, self.slot)
