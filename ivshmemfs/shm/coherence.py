"""A check that this peer and each other one see the same memory, and count in it together.

Two machines may map one memory in ways that disagree: one cached, one not.  Then a peer's stores
stay in its cache, and compare-and-swap is not atomic between both.  No peer can see that by itself.
So each peer asks every living peer in turn:

    1. The asker stores a tally (round, 0) and a challenge (slot, incarnation, round) in its slot.
    2. It adds `PART` to the tally, by compare-and-swaps of 1.
    3. The other peer, at its next beat, sees the challenge and adds `PART` in the same way.
    4. The asker sees 2 * `PART`, and adds `PART` once more.
    5. At its next beat it sees 3 * `PART`: both AGREE.

The other's heartbeat in its own slot shows meanwhile that it is awake.  The asker counts
its beats.  After `PATIENCE` beats without the right tally the memories DIFFER: a store of one side
did not arrive, or an addition was lost.  A peer that is silent, that leaves, or that is of
an earlier version stays UNKNOWN.

States of the asker, for one peer at a time:

    idle      `turn` finds a living peer that it has not judged -> asked
    asked     2 * PART is there -> counted; out of patience -> DIFFERS; the peer is gone -> idle
    counted   at the next turn: 3 * PART is there -> AGREES, else DIFFERS

Each store goes to the own slot, but for the tally: the asked peer swaps that of the asker.  The
round in the tally makes a late swap fail.  All this takes below 1 ms of a tick, and no request
waits for it.
"""

from __future__ import annotations

import os
from typing import Final

from ivshmemfs.format import coherence, peer, words
from ivshmemfs.format.coherence import AGREES, DIFFERS
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.peers import PeerTable

PART: Final = 64  # compare-and-swaps that one addition makes
ANSWERS: Final = 16  # challenges that one turn answers
PATIENCE: Final = 4  # beats of the other peer until it must have answered, beside the queue there
_IN_USE: Final = (words.IDLE, words.ACTIVE)

_COUNTS: Final = range(coherence.COUNT_MASK)  # the last count cannot grow

Peer = tuple[int, int]  # slot, incarnation


class Coherence:
    """The checks of one membership.  Not thread-safe; `turn` is called after each beat."""

    def __init__(self, table: PeerTable, member: Membership) -> None:
        self._table = table
        self._member = member
        self._own: Peer = (0, 0)
        self._judged: dict[int, Peer] = {}  # by slot: the incarnation that agreed
        self._answered: dict[int, tuple[int, int]] = {}  # by slot: challenge, and what was added
        self._next = 0  # slot from which on the next turn answers
        self._asked: Peer | None = None
        self._challenge = 0
        self._counted = False
        self._beat = 0  # of the asked peer, as seen last
        self._beats = 0
        self._patience = 0

    def turn(self) -> None:
        """Answer other peers, and go on with the own question.  Raises Fenced."""
        own = (self._member.slot, self._member.incarnation)
        if own != self._own:  # the slot is new, and so is all that this peer has seen through it
            self._own, self._asked = own, None
            self._judged, self._answered = {}, {}
            self._member.store_word(coherence.CHALLENGE_OFFSET, 0)
            self._member.store_word(coherence.VERDICT_OFFSET, 0)
        states = self._table.states()
        self._answer(states)
        if self._asked is None:
            self._ask(states)
        else:
            self._judge(states)

    # --- answering ------------------------------------------------------------------------

    def _answer(self, states: list[int]) -> None:
        at = self._table.offset(1, coherence.CHALLENGE_OFFSET)
        challenges = self._table.memory.load_column(at, peer.SLOT_SIZE, self._table.count)
        left, count = ANSWERS, self._table.count
        for step in range(count):
            slot = (self._next + step) % count + 1
            challenge = challenges[slot - 1]
            mine = coherence.is_for(challenge, *self._own) and slot != self._own[0]
            if not mine or states[slot - 1] >> words.SLOT_SHIFT not in _IN_USE:
                continue
            done = self._answered.get(slot, (0, 0))
            added = done[1] if done[0] == challenge else 0
            if added < PART:
                added += self._add(slot, challenge, PART - added)
                self._answered[slot] = challenge, added
                left -= 1
                if not left:
                    self._next = slot
                    break

    def _add(self, slot: int, challenge: int, times: int) -> int:
        """Add to the tally of a slot while it is of this round; returns how often it did."""
        memory, at = self._table.memory, self._table.offset(slot, coherence.TALLY_OFFSET)
        first = coherence.make_tally(challenge, 0)
        seen, added = memory.load(at), 0
        for _ in range(4 * times):  # a hostile peer may change it all the time
            if added == times or seen - first not in _COUNTS:
                break
            before, seen = seen, memory.cas(at, seen, seen + 1)
            if seen == before:
                seen, added = before + 1, added + 1
        return added

    # --- asking ---------------------------------------------------------------------------

    def _ask(self, states: list[int]) -> None:
        for slot, word in enumerate(states, 1):
            state, incarnation, _counter = words.split_state(word)
            known = self._judged.get(slot) == (slot, incarnation)
            if state not in _IN_USE or slot == self._own[0] or known:
                continue
            if not self._table.watch.beats(slot):
                continue
            other = self._table.peer(slot)
            if other.identity_valid and other.record.capabilities & coherence.CHECKS:
                self._begin(slot, incarnation, states)
                return

    def _begin(self, slot: int, incarnation: int, states: list[int]) -> None:
        round_ = int.from_bytes(os.urandom(4), "little")
        self._asked, self._counted, self._beats = (slot, incarnation), False, 0
        self._beat = self._heartbeat(slot)
        in_use = sum(word >> words.SLOT_SHIFT in _IN_USE for word in states)
        self._patience = PATIENCE + in_use // ANSWERS
        self._challenge = coherence.make_challenge(slot, incarnation, round_)
        self._member.store_word(coherence.TALLY_OFFSET, coherence.make_tally(self._challenge, 0))
        self._table.memory.fence()  # a peer that sees the challenge sees its tally
        self._member.store_word(coherence.CHALLENGE_OFFSET, self._challenge)
        self._add(self._own[0], self._challenge, PART)

    def _heartbeat(self, slot: int) -> int:
        return self._table.memory.load(self._table.offset(slot, peer.HEARTBEAT_OFFSET))

    def _judge(self, states: list[int]) -> None:
        assert self._asked is not None
        slot, incarnation = self._asked
        tally = self._table.memory.load(self._table.offset(self._own[0], coherence.TALLY_OFFSET))
        beat = self._heartbeat(slot)
        state, now, _counter = words.split_state(self._table.state(slot))
        if state not in _IN_USE or now != incarnation:
            self._finish()
            return
        self._beats += beat != self._beat
        self._beat = beat
        expected = coherence.make_tally(self._challenge, (3 if self._counted else 2) * PART)
        if self._counted:
            self._conclude(tally == expected)
        elif tally == expected:
            self._add(self._own[0], self._challenge, PART)
            self._counted = True
        elif self._beats > self._patience:
            self._conclude(False)

    def _conclude(self, agrees: bool) -> None:
        assert self._asked is not None
        slot = self._asked[0]
        if agrees:
            self._judged[slot] = self._asked
            self._member.store_word(coherence.VERDICT_OFFSET, coherence.make_verdict(AGREES))
        else:
            other = self._table.peer(slot).describe()
            self._member.store_word(coherence.VERDICT_OFFSET, coherence.make_verdict(DIFFERS, slot))
            self._member.unfit = (
                f"this machine and {other} do not see the same memory, so writing would destroy "
                "data; unmount here, and map the device cached as well (a kernel driver, or a "
                "processor with forced write-back), or mount it with -o ro"
            )
        self._finish()

    def _finish(self) -> None:
        self._asked = None
        self._member.store_word(coherence.CHALLENGE_OFFSET, 0)
