"""A repair excludes all other peers, by words in the region itself.

Every peer loads the commit word first.  A repair puts a mark there in place of the root block: a
block number that no region has.  A peer that loads the mark gets `UnderRepair`, and every
transaction planned before loses its compare-and-swap.  The repair slot says which process repairs,
and from which commit word.  It is slot 0 of the peer table; a repair takes it as a mount takes its
slot.

States of one session, and of the region meanwhile:

    FREE     -> (take) -> JOINING   the session owns slot 0, with the next incarnation; it stores
                                    its identity and the former commit word
    JOINING  -> (mark) -> ACTIVE    the commit word has the mark; claims have counter 1
    ACTIVE   -> (publish) -> FREE   the new root, or the former one, replaces the mark

Another repair may take over a session in JOINING that has not yet stored its identity.  A session
checks slot 0 after it has loaded the commit word that it marks.  So of two that start at once, one
goes on.

A session that dies before the mark has changed nothing.  One that dies after it leaves the mark.
The next repair takes slot 0 over and marks again with the next sequence, so the dead session cannot
publish even if it wakes up.  It starts from the same former commit word.  No session stores to a
block that is reachable from there, unless the region is too full for anything else.
"""

from __future__ import annotations

import time

from ivshmemfs.errors import InUse
from ivshmemfs.format import peer, repair, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, REPAIR_OFFSET, Geometry
from ivshmemfs.format.peer import Occupant
from ivshmemfs.printing import shown
from ivshmemfs.region import Memory
from ivshmemfs.shm import identity
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.watch import POLL, Watch

COUNTER = 1  # counter of all claims of one repair
PULSE = 1.0  # seconds between two signs of life
MARK_ATTEMPTS = 10_000  # commits of other peers that may precede the mark


def repairing(page: bytes) -> bool:
    """Return whether the first page of a region says that it is being repaired."""
    word = page[COMMIT_OFFSET : COMMIT_OFFSET + words.WORD]
    return words.under_repair(int.from_bytes(word, "little"))


def abandoned(memory: Memory) -> bool:
    """Return whether slot 0 is free; if the mark stays while it is, the region is damaged.

    A repair owns slot 0 from before it marks until the mark is gone.  So the caller loads the
    commit word again after this call, and compares.
    """
    state, _, _ = words.split_state(memory.load(REPAIR_OFFSET))
    return not words.FREE < state <= words.DEAD


def describe(memory: Memory) -> str:
    """Return the message for a peer that a repair excludes."""
    raw = memory.read(REPAIR_OFFSET, peer.SLOT_SIZE)
    doing = "given another name or size" if _amends(raw) else "repaired"
    return (
        f"the region is being {doing}{_named(raw)}: wait for it, or run fsck.ivshmemfs -y again if "
        "that process is gone"
    )


def _named(raw: bytes) -> str:
    if not peer.identity_valid(raw):
        return ""
    record = peer.SLOT.unpack(raw)
    host = shown(record.host.rstrip(b"\0"))
    try:
        since = time.strftime(" since %H:%M:%S", time.localtime(record.joined_ns // 10**9))
    except (OverflowError, ValueError, OSError):
        since = ""
    return f" by pid {record.pid} on {host}{since}"


def _amends(raw: bytes) -> bool:
    """Return whether the repair slot names an amendment of the superblock (`shm/amendment.py`)."""
    return peer.identity_valid(raw) and bool(peer.SLOT.unpack(raw).capabilities & repair.AMENDS)


class RepairSession:
    """One repair's, or one amendment's, exclusive use of a region.  Not thread-safe."""

    def __init__(self, memory: Memory, geometry: Geometry, *, amends: bool = False) -> None:
        self._memory = memory
        self._amends = amends
        self._commit_word = CommitWord(memory)
        self._geometry = geometry
        self._table = PeerTable(memory, geometry, self._commit_word)
        self._word = 0  # state word of slot 0, while this session owns it
        self._beaten = 0.0
        self.former = 0  # the commit word before the repair
        self.marked = 0  # the commit word with this session's mark
        self.tag = 0  # tag of this session's claims
        self.inherited = False  # whether the mark of another session was there already
        self.must_end = False  # whether the former state is gone, so that nothing can be given up

    @property
    def marks(self) -> bool:
        """Whether the commit word has the mark of any session."""
        return words.under_repair(self._commit_word.load())

    @property
    def contested(self) -> bool:
        """Whether another repair may be under way; waits up to `SILENCE` seconds if it is dead."""
        return self._may_live(self._table.peer(repair.SLOT))

    def take(self, *, force: bool) -> None:
        """Take slot 0 and mark the commit word.  Raises InUse when another repair may be alive.

        An amendment refuses the mark of a repair that died: only a repair may go on from there.
        """
        raw = self._memory.read(REPAIR_OFFSET, peer.SLOT_SIZE)
        if self._amends and self.marks and peer.identity_valid(raw) and not _amends(raw):
            raise InUse(describe(self._memory))
        self._join(self._table.peer(repair.SLOT), force)
        self._store(peer.IDENTITY_OFFSET, self._identity())
        self._mark()
        self._move(words.ACTIVE, COUNTER)

    def _join(self, other: Occupant, force: bool) -> None:
        if not force and self._may_live(other):
            who = _named(self._memory.read(REPAIR_OFFSET, peer.SLOT_SIZE))
            raise InUse(
                f"the region is being repaired{who}: wait for it; if that process is gone and "
                "cannot come back, use --force"
            )
        incarnation = (other.incarnation + 1) & words.INCARNATION_MASK
        joining = words.make_state(words.JOINING, incarnation, 0)
        if not self._table.swap(repair.SLOT, other.word, joining):
            raise InUse("another repair has just begun: wait for it")
        self._word = joining
        self.tag = words.make_tag(repair.SLOT, incarnation, COUNTER)

    def _may_live(self, other: Occupant) -> bool:
        if not words.FREE < other.state <= words.DEAD:
            return False
        if other.state == words.JOINING and not other.identity_valid:
            return False
        return not self._absent()

    def _absent(self) -> bool:
        """Return whether the owner of slot 0 is surely gone; waits up to `SILENCE` seconds."""
        watch = Watch(self._memory, self._geometry)
        while True:
            watch.see(repair.SLOT)
            other = watch.occupant(repair.SLOT)
            if not watch.vanished(other) or watch.beats(repair.SLOT):
                return False
            if watch.absent(other):
                return True
            time.sleep(POLL)

    def _identity(self) -> bytes:
        _, incarnation, _ = words.split_state(self._word)
        does = repair.AMENDS if self._amends else 0
        return peer.encode_identity(identity.current(incarnation)._replace(capabilities=does))

    def _mark(self) -> None:
        """Store the former commit word, then swap the mark in."""
        for _ in range(MARK_ATTEMPTS):
            word = self._commit_word.load()
            self.inherited = words.under_repair(word)
            if self.inherited:
                self.former = self._memory.load(REPAIR_OFFSET + repair.FORMER_OFFSET)
            else:
                self.former = word
                self._store(repair.FORMER_OFFSET, word.to_bytes(words.WORD, "little"))
            self._memory.fence()
            self.check()
            self.marked = self._commit_word.publish(word, words.UNDER_REPAIR)
            if self.marked:
                if words.under_repair(self.former):
                    self.former = 0  # the stored word is not a root
                return
        self._free()
        raise InUse("other peers commit too fast: try again when it is quieter")

    def _store(self, field: int, content: bytes) -> None:
        self.check()
        self._memory.write(REPAIR_OFFSET + field, content)

    def _move(self, state: int, counter: int) -> None:
        _, incarnation, _ = words.split_state(self._word)
        new = words.make_state(state, incarnation, counter)
        if not self._table.swap(repair.SLOT, self._word, new):
            raise InUse("another repair took over from this one")
        self._word = new

    def check(self) -> None:
        """Raise InUse unless this session still owns slot 0; callers check before each store."""
        if self._table.state(repair.SLOT) != self._word:
            raise InUse("another repair took over from this one")

    def beat(self) -> None:
        """Show life, at most once a second.  Raises InUse when another repair has slot 0."""
        now = time.monotonic()
        if abs(now - self._beaten) > PULSE:
            self._beaten = now
            self.check()
            at = REPAIR_OFFSET + peer.HEARTBEAT_OFFSET
            self._memory.store(at, self._memory.load(at) + 1 & (1 << 64) - 1)

    def publish(self, root_block: int) -> None:
        """Replace the mark by a root, and admit other peers again.  Raises InUse."""
        self.check()
        self._memory.fence()
        if not self._commit_word.publish(self.marked, root_block):
            raise InUse("the region was formatted, or repaired by another, meanwhile")
        self._free()

    def give_up(self) -> None:
        """Put the former root back, under a later sequence.  Never raises."""
        if self.former:
            self._commit_word.publish(self.marked, words.split_commit(self.former)[1])
        elif self.marked:
            self._memory.cas(COMMIT_OFFSET, self.marked, 0)
        self._free()

    def _free(self) -> None:
        _, incarnation, counter = words.split_state(self._word)
        self._table.swap(
            repair.SLOT, self._word, words.make_state(words.FREE, incarnation, counter)
        )
