"""This mount's own slot of the peer table.

States, as the state word says them (`shm/peers.py` has the whole table):

    (none)   -> JOINING   `join` or `rejoin` takes a slot
    JOINING  -> IDLE      the identity and the open filter are stored
    IDLE     -> ACTIVE    `begin`
    ACTIVE   -> IDLE      `end`
    IDLE     -> FREE      `leave`

Only this mount makes these changes.  Each compares with the last word that this mount stored, so
it fails with `Fenced` after another peer has changed the slot.  The caller then calls `rejoin`.
"""

from __future__ import annotations

import errno
import math
import os
import time
from array import array
from contextlib import suppress
from typing import Final

from ivshmemfs.errors import Busy, Fenced, FsError, TooManyPeers
from ivshmemfs.format import bell, open_filter, peer, words
from ivshmemfs.format.words import ACTIVE, FREE, IDLE, JOINING
from ivshmemfs.region import Turn
from ivshmemfs.shm import identity, watch
from ivshmemfs.shm.peers import PeerTable

_NEVER: Final = (1 << 64) - 1  # all bits of a word; never a state word
BEGUN: Final = 3  # steps of `Turn.begin` after which the transaction is under way
CHECKED: Final = 4  # ... after which the nonce is known to be the own one
JOIN_ATTEMPTS = 20  # slots that `join` takes and loses to other peers before it gives up


def _fresh_nonce() -> int:
    """Return a random nonce, neither 0 nor the mark."""
    return int.from_bytes(os.urandom(words.WORD), "little") % (peer.TWIN_MARK - 1) + 1


def _first_counter() -> int:
    """Return the first counter of an incarnation: random, from the lower half of all counters.

    The same incarnation comes back after 2^20 mounts of a slot.  Its tags come back only if it
    also counts through the same numbers.
    """
    return int.from_bytes(os.urandom(words.WORD), "little") % (words.COUNTER_MASK // 2)


class Membership:
    """This mount's own slot.  Not thread-safe; one per mount."""

    def __init__(self, table: PeerTable, *, rings: bool = False) -> None:
        self.table = table
        self._rings = rings  # whether this mount rings after each commit (`shm/bells.py`)
        self.slot = 0
        self.incarnation = 0
        self.counter = 0
        self._at = 0  # byte offset of the own slot, and so of its state word
        self._word = 0  # state word, as this mount stored it last; _NEVER after it left to a twin
        self._beat = 0
        self._nonce = 0  # as this mount stored it last
        self._proofs = peer.ALL_PROOFS  # facts that may prove this mount's end
        self._record: peer.SlotRecord | None = None
        self._own = b""  # identity, as stored in the slot
        self._filter = [0] * open_filter.WORDS
        self._opens = [0] * open_filter.SIZE
        self._intent = 0
        self._statistics = bytes(peer.STATISTICS_SIZE)  # published last, or to be published
        self._mount_point = bytes(peer.MOUNT_POINT_SIZE)
        self._waiting: tuple[float, dict[int, tuple[int, int]]] | None = None
        self.must_collect = False
        self.unfit = ""  # why this mount may not write (`shm/coherence.py`)
        self.twin_seen = False  # whether another process with this identity was met

    # --- joining and leaving ---

    def join(self, wait: float | None = None) -> None:
        """Take a slot; raises TooManyPeers when no slot becomes free within `wait` seconds."""
        for _ in range(JOIN_ATTEMPTS):
            self._take_slot(watch.SILENCE if wait is None else wait)
            with suppress(Fenced):  # this took so long that another peer has the slot now
                self._settle_in()
                return
        raise Busy("other peers take every slot before this mount has stored its identity there")

    def rejoin(self) -> None:
        """Take a slot without waiting, for a mount that serves requests meanwhile.

        Raises Busy while a peer may still turn out to be silent, TooManyPeers after that.
        """
        if not self._join_at_once() and not self._join_who_stays_silent():
            raise self._no_slot()
        self._waiting = None
        with suppress(Fenced):
            self._settle_in()
            return
        raise Busy("another peer took the slot before this mount had stored its identity there")

    def _take_slot(self, wait: float) -> None:
        if not self._join_at_once() and not self._join_silent(wait):
            raise self._no_slot()

    def _no_slot(self) -> TooManyPeers:
        return TooManyPeers(
            f"all {self.table.count} peer slots are taken: unmount one, or find a machine that "
            "will not come back with `ivshmemfs peers` and remove it with `ivshmemfs evict`"
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
        """Take a silent peer's slot, in many calls that do not wait; Busy until it is silent."""
        now = time.monotonic()
        if self._waiting is None:
            self._waiting = now, self.table.heartbeats()
        since, before = self._waiting
        if abs(now - since) < watch.SILENCE:  # also when the clock goes backwards
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
        self._store(peer.STATISTICS_OFFSET, self._statistics)
        self._store(peer.MOUNT_POINT_OFFSET, self._mount_point)
        self._move(IDLE, _first_counter())

    def _identify(self, record: peer.SlotRecord) -> None:
        able = record.capabilities & ~bell.RINGS | (bell.RINGS if self._rings else 0)
        self._record = record._replace(proofs=record.proofs & self._proofs, capabilities=able)
        self._own = peer.encode_identity(self._record)

    def state_rings(self, rings: bool) -> None:
        """State whether this mount rings; the next beat stores it."""
        if self._rings != rings:
            self._rings = rings
            if self._record is not None:
                self._identify(self._record)

    def doubt_machine(self, machine: bytes) -> None:
        """Withdraw the proof by hardware UUID if `machine`, seen on two machines, is this one's."""
        if self._record is not None and self._record.machine == machine:
            self._proofs &= ~peer.MACHINE_PROVES
            self._identify(self._record)  # stored with the next beat

    def _store(self, field: int, content: bytes) -> None:
        """Store words of the own slot by compare-and-swap.  Raises Fenced if the slot is taken.

        Each word replaces a value that this mount saw while it owned the slot.  So a store after a
        take-over fails if the new owner has changed the word.  A new owner's filter words always
        differ, by their stamp.  A word of its identity may be equal; its next beat corrects it.
        """
        for word in memoryview(content).cast("Q"):
            self._store_word(field, word)
            field += words.WORD

    def _store_word(self, field: int, word: int) -> None:
        """Do the same with one word."""
        memory, at = self.table.memory, self.table.offset(self.slot, field)
        if not memory.replace(at, word, self._at, self._word):
            raise self._lost("another peer took this mount's slot while it was silent")

    def store_word(self, field: int, word: int) -> None:
        """Store one word at byte `field` of the own slot.  Raises Fenced if the slot is taken."""
        self._store(field, word.to_bytes(words.WORD, "little"))

    def leave(self) -> None:
        """Give the slot back; harmless after another peer has taken it."""
        if self.slot:
            with suppress(Fenced):
                self._sign()  # a twin learns of this mount by the nonce
                self._move(FREE, self.counter)
            self.slot = 0

    # --- transactions ---

    def _move(self, state: int, counter: int) -> None:
        new = words.make_state(state, self.incarnation, counter)
        if self.table.memory.cas(self._at, self._word, new) != self._word:
            raise self._lost("another peer declared this mount gone while it was silent")
        self._word, self.counter = new, counter

    def begin(self) -> int:
        """Begin a transaction; return the tag for its claims.  Raises Fenced, Busy, EROFS."""
        if self.unfit:
            raise FsError(errno.EROFS, self.unfit)
        if self.counter >= words.COUNTER_MASK - 1:
            self._renew()
        self._move(ACTIVE, self.counter + 1)
        if self.table.memory.load(self._at + peer.NONCE_OFFSET) != self._nonce:
            self.abandon()
            raise self._lost("another peer took this mount's slot while it was silent")
        return self.tag

    def abandon(self) -> None:
        """End a transaction that has claimed nothing."""
        self._move(IDLE, self.counter)

    def begin_with(self, turn: Turn, hint: int, repairs: int) -> int:
        """Take the hint, begin, load the commit word and check, in one call of C.

        Returns the commit word, or -1 when a word was not the expected one.  Either the hint is not
        free, or the repair slot's state is not `repairs`, or the own slot has changed.
        `turn.passed` says how far this went.
        """
        counter = self.counter + 1
        active = words.make_state(ACTIVE, self.incarnation, counter)
        try:
            return turn.begin(self._at, hint, repairs, self._word, active, self._nonce)
        finally:
            if turn.passed >= BEGUN:
                self._word, self.counter = active, counter

    @property
    def is_plain(self) -> bool:
        """Whether the next transaction is an ordinary one of this incarnation."""
        return not self.unfit and self.counter < words.COUNTER_MASK - 1

    @property
    def tag(self) -> int:
        """The tag for the claims of the transaction that is under way."""
        return words.make_tag(self.slot, self.incarnation, self.counter)

    def _renew(self) -> None:
        """Become a new incarnation, because the counter is used up.  Raises Busy, Fenced.

        It takes another slot if one is free, and leaves its own afterwards.  So its open files are
        listed all the time.
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
        """Whether the slot is still this incarnation's: no peer has declared it gone."""
        return self.table.memory.load(self._at) == self._word

    def check(self) -> None:
        """Raise Fenced unless the transaction is under way.

        The caller loads the commit word first.
        """
        if not (self.active and self.owns_slot):
            raise self._lost("another peer declared this mount gone in the middle of a transaction")

    def end(self) -> None:
        """End the transaction: everything claimed under its tag is settled.

        Raises Fenced if another peer declared this mount gone, also if it has joined again since.
        """
        if not self.active:
            raise Fenced("this mount was declared gone in the middle of a transaction")
        self._move(IDLE, self.counter)

    def end_with(self, turn: Turn, repairs: int, pointers: bytes, hint: int) -> bool:
        """End, free blocks, and give the hint back unless it is 0, in one call of C.

        Returns False when a word was not the expected one.  If `turn.passed` is not 0 then, the
        transaction has ended, and the repair slot's state is not `repairs`.
        """
        idle = words.make_state(IDLE, self.incarnation, self.counter)
        try:
            return turn.end(self._at, self._word, idle, repairs, pointers, hint)
        finally:
            if turn.passed:
                self._word = idle

    @property
    def intends(self) -> bool:
        """Whether this mount announces that it is about to free an inode."""
        return self._intent != 0

    @property
    def own_state(self) -> tuple[int, int]:
        """(byte offset of the own state word, its value while this transaction is under way)."""
        return self._at, self._word

    @property
    def active(self) -> bool:
        """Whether a transaction is under way."""
        return self._word >> words.SLOT_SHIFT == ACTIVE

    def beat(self) -> None:
        """Show life: store a new nonce and heartbeat.  Raises Fenced if the slot is taken."""
        self._sign()
        if not self.owns_slot:
            raise self._lost("another peer declared this mount gone while it was silent")
        at = self.table.offset(self.slot, peer.HEARTBEAT_OFFSET)
        after = self._beat + 1 & _NEVER  # a damaged region may hold any number
        seen = self.table.memory.cas(at, self._beat, after)
        self._beat = after if seen == self._beat else seen
        self._store(peer.IDENTITY_OFFSET, self._own)

    def publish_statistics(self, *counts: int) -> None:
        """Store the statistics in the order of `SlotRecord`.  Raises Fenced."""
        self._statistics = array("Q", [count & _NEVER for count in counts]).tobytes()
        self._store(peer.STATISTICS_OFFSET, self._statistics)

    def state_mount_point(self, path: bytes) -> None:
        """Store where this mount is, as far as it fits.  Raises Fenced."""
        self._mount_point = path[: peer.MOUNT_POINT_SIZE].ljust(peer.MOUNT_POINT_SIZE, b"\0")
        self._store(peer.MOUNT_POINT_OFFSET, self._mount_point)

    # --- two owners of one identity ---

    def _lost(self, text: str) -> Fenced:
        """Return the error for a word of the own slot that another process has changed."""
        if not self._has_twin():
            return Fenced(text)
        self._part()
        return Fenced("another process uses the identity of this mount")

    def _sign(self) -> None:
        """Store another nonce.  Raises Fenced if another process has stored one.

        A beat stores the nonce and then checks the state word.  A transaction stores the state word
        and then checks the nonce.  So of two owners that do both at once, one sees the other.
        """
        at, nonce = self._at + peer.NONCE_OFFSET, _fresh_nonce()
        if self.table.memory.cas(at, self._nonce, nonce) != self._nonce:
            raise self._lost("another peer declared this mount gone while it was silent")
        self._nonce = nonce

    def _has_twin(self) -> bool:
        """Return whether a word of the own slot has changed that only the owner may change.

        Other peers end an incarnation with the counter that it has.  They never begin a transaction
        in it, increase its counter, or store a nonce before they have taken the slot.
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
        """Mark the slot and leave it to the twin, which finds the mark at its next beat.

        From now on nothing that both share may prove this mount's end.
        """
        memory, at = self.table.memory, self._at + peer.NONCE_OFFSET
        self.twin_seen, self._proofs = True, 0
        self._word = _NEVER
        while (seen := memory.load(at)) != peer.TWIN_MARK:  # the twin may show life meanwhile
            if words.split_state(self.table.state(self.slot))[1] != self.incarnation:
                return
            if memory.cas(at, seen, peer.TWIN_MARK) == seen:  # a newcomer stores its own over it
                return

    # --- open inodes ---

    def list_open(self, ino: int) -> None:
        """List `ino` as open here, then fence.  Raises Fenced."""
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
        """Drop one handle of `ino`; unlist it with the last one, then fence.  Never raises."""
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
        if self._word == _NEVER:
            raise self._lost("another peer took this mount's slot while it was silent")
        old = self._filter[place]
        passed = self.table.memory.swap_then_see(at, old, new, self._at, self._word)
        if passed == 0:
            raise self._lost("another peer took this mount's slot while it was silent")
        self._filter[place] = new
        if passed == 1:
            raise self._lost("another peer declared this mount gone while it was silent")

    def intend(self, ino: int) -> None:
        """Announce that this mount is about to free `ino`, then fence.  Raises Fenced."""
        if self._intent == ino:
            return
        # A former owner may have stored its own intent here before it noticed the take-over.
        self._store_word(peer.INTENT_OFFSET, ino)
        self._intent = ino
        self.table.memory.fence()

    def withdraw(self) -> None:
        """Withdraw the announced intent, if there is one."""
        if self._intent:
            at = self.table.offset(self.slot, peer.INTENT_OFFSET)
            self.table.memory.cas(at, self._intent, 0)
            self._intent = 0

    def listed_elsewhere(self, ino: int) -> bool:
        """Return whether another peer may hold `ino` open."""
        return self.table.lists(open_filter.index_of(ino), self.slot)

    def intended_elsewhere(self, ino: int) -> bool:
        """Return whether another peer is about to free `ino`."""
        return self.table.intends(ino, self.slot)
