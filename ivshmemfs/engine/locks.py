"""Locks between all mounts: flock(2), fcntl(2) and `ivshmemfs lock` in one table for each inode.

The table is a hidden attribute of the inode (`format/lock.py`), so each change of it is a commit.
Of two owners that lock at once, one commits first and the other plans again on that table.  States
of a record, and what changes them:

    absent  -> held       `Wait.attempt`: no living owner has a lock that conflicts
    absent  -> waiting    the same, once it has been refused for QUEUE_AFTER s; it gets a ticket
    waiting -> held       the same, in one commit
    waiting -> absent     `Wait.leave`: its caller was interrupted
    held    -> absent     `Locks.give`, `Locks.close`, `Locks.leave`
    any     -> absent     any peer that changes the table, when the record's peer is not living

A peer is living while its slot has the record's incarnation and it is not surely gone
(`Watch.absent`).  Silence of more than `SILENT` seconds counts as its end.

Each mount keeps a copy of what its own owners hold (`Held`): what they believe.  The table is the
truth.  The two differ once another peer removed this mount's records because of its silence.  They
also differ after the mount has joined again as a new incarnation.  Then each open file through
which such a lock was taken is *fenced*, until it is closed: its writes fail.  `Guard.check` runs on
the snapshot of each write, so the commit's compare-and-swap makes the check and the write one.

Order of waiters: a request that may wait lets a conflicting earlier ticket go first.  Three limits
keep this queue from adding a deadlock.  A request ignores a ticket that its own locks block.  It
ignores a ticket that no holder has blocked for `SLOW` s, and every ticket after `YIELD` s.  A
request that does not wait ignores all tickets.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

from ivshmemfs.engine.changes import Changes
from ivshmemfs.engine.deadlock import closes_ring
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.lock_table import (
    Key,
    Lock,
    Place,
    Range,
    blocker,
    changed_ranges,
    conflicts,
    held_records,
    is_of,
    is_ticket,
    owner_of,
    ranges_of,
    records_of,
    start_of,
    store_records,
    store_waits,
    ticket_of,
    value_of,
    waiting_record,
    waits_of,
)
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.engine.volume import Volume
from ivshmemfs.errors import Corrupt, FsError, IvshmemfsError, LockLost, NoSpace, StaleHandle
from ivshmemfs.format import words
from ivshmemfs.format.lock import (
    END,
    FLOCK,
    HELD,
    LOCK,
    MAX_RECORDS,
    MAX_WAITS,
    WAITING,
    LockRecord,
    WaitRecord,
)
from ivshmemfs.shm import watch

log = logging.getLogger(__name__)

SILENT = 10.0  # seconds without a sign of life after which a holder's machine counts as dead
QUEUE_AFTER = 0.003  # seconds of vain attempts after which a waiter takes a ticket
LIVENESS = 0.5  # seconds between two looks at the holders, when no peer commits
SLOW = 0.05  # seconds for which a waiter may leave unused what it could have
YIELD = 0.5  # seconds for which a waiter lets earlier tickets go first
_AGAIN = 0.01  # seconds between two looks while a waiter lets others go first
_FIRST = 16  # earlier tickets that are looked at
_OWED_AT_ONCE = 32  # locks that one tick gives back
_TICKETS = 1000  # tickets of other waiters that are watched at most

_LOST = "another machine took this lock while this mount showed no life"


class Held:
    """What one owner holds of one inode, as it believes; see the module's comment."""

    __slots__ = ("guards", "key", "place", "ranges")

    def __init__(self, key: Key, place: Place) -> None:
        self.key: Final = key
        self.place = place  # of this mount when the lock was taken
        self.ranges: list[Range] = []
        self.guards: list[Guard] = []  # of the open files through which it was taken


class Guard:
    """The locks that were taken through one open file: sound -> fenced, until it is closed."""

    __slots__ = ("_locks", "_seen", "fenced", "held", "ino")

    def __init__(self, locks: Locks, ino: int) -> None:
        self._locks = locks
        self._seen: tuple[bytes, bytes, Place, int] | None = None  # what was checked last
        self.ino: Final = ino
        self.held: dict[Key, Held] = {}
        self.fenced = False

    def check(self, view: View, inode: Inode) -> None:
        """Raise LockLost unless every lock that was taken through this file is in the table."""
        if self.fenced:
            raise LockLost(_LOST)
        if not self.held:
            return
        locks = self._locks
        seen = (inode.xattr, inode.record.xattr_pointer, locks.place, locks.version)
        if seen != self._seen:
            records = records_of(view, inode)
            for held in self.held.values():
                if not locks.stands(held, records):
                    raise locks.lost(held)
            self._seen = seen


class Wait:
    """One request for a lock: asked -> granted, or left.

    Without `blocking` it is attempted once.  With `detect` it may end in EDEADLK.
    """

    def __init__(
        self, locks: Locks, guard: Guard, lock: Lock, *, blocking: bool, detect: bool = False
    ) -> None:
        self.guard: Final = guard
        self.lock: Final = lock
        self.blocking: Final = blocking
        self.detect = detect
        self.ticket = 0
        self.place: Place = (0, 0)  # of this mount when it took the ticket
        self.seen = b""  # the table at the last look
        self.before = 0  # earlier tickets that conflict, at the last look
        self._locks = locks
        self._began = time.monotonic()
        self._word = 0
        self._due = 0.0
        self._yields_since = 0.0

    @property
    def key(self) -> Key:
        """Of what it asks for."""
        return self.guard.ino, self.lock.kind, self.lock.owner

    @property
    def is_due(self) -> bool:
        """Whether an attempt would look at the table; costs one load."""
        return self._locks.commit_word() != self._word or time.monotonic() >= self._due

    def attempt(self) -> bool:
        """Take the lock if nothing is in the way; whether it is held now.

        Costs one load while no peer commits.  Raises Busy, ESTALE, ENOLCK, EDEADLK, LockLost.
        """
        word, now = self._locks.commit_word(), time.monotonic()
        if word == self._word and now < self._due:
            return False
        self._word = 0
        granted = self._locks.attempt(self, now)
        if not granted:
            self._word, self._due = word, now + LIVENESS
            if self._yields_since:
                self._due = now + _AGAIN
            elif self.blocking and not self.ticket and not self.queues(now):
                self._due = min(self._due, self._began + QUEUE_AFTER)
        return granted

    def queues(self, now: float) -> bool:
        """Whether it is time to take a ticket."""
        return self.blocking and not self.ticket and now - self._began >= QUEUE_AFTER

    def yields(self, now: float) -> bool:
        """Whether it still lets earlier tickets go first."""
        if not self._yields_since:
            self._yields_since = now
        return now - self._yields_since < YIELD

    def is_blocked(self) -> None:
        """A holder is in the way, so it has not let another waiter go first yet."""
        self._yields_since = 0.0

    def leave(self) -> None:
        """Wait no more; the next ticks take the ticket back if this cannot.  Never raises."""
        if self.ticket:
            self._locks.withdraw(self.guard.ino, self.ticket, self.place)
            self.ticket = 0


class Locks:
    """The locks of all inodes as one mount sees them.  Not thread-safe."""

    def __init__(self, volume: Volume, changes: Changes) -> None:
        self._volume: Final = volume
        self._changes: Final = changes
        self._held: dict[Key, Held] = {}
        self._owed: dict[Key, list[tuple[int, int]]] = {}  # given back, as soon as it succeeds
        self._withdrawn: list[tuple[int, int, Place]] = []  # the same of tickets
        self._gone: set[Place] = set()  # judged by another watch of this process
        self._free_since: dict[tuple[int, int], float] = {}  # tickets that no holder blocks
        self.version = 0  # changes with what is held

    @property
    def place(self) -> Place:
        """(slot, incarnation) of this mount."""
        return self._volume.peer_id

    @property
    def count(self) -> int:
        """How many (owner, inode) pairs of this mount hold locks."""
        return len(self._held)

    def commit_word(self) -> int:
        """The commit word: nothing in any table has changed while it has not."""
        return self._volume.store.commit_word.load()

    # --- which peers live -------------------------------------------------------------------

    def living(self, slot: int, incarnation: int) -> bool:
        """Whether the records of a peer count."""
        place = (slot, incarnation)
        if place == self._volume.peer_id:
            return True
        table = self._volume.table
        if not 1 <= slot <= table.count or place in self._gone:
            return False
        word = table.state(slot)
        state, present, _ = words.split_state(word)
        if present != incarnation or state not in (words.IDLE, words.ACTIVE):
            return False
        table.watch.see(slot)
        silence = table.watch.silence(slot, word)
        if silence < watch.SILENCE:
            return True
        return silence <= SILENT and not table.watch.absent(table.peer(slot))

    def presume_gone(self, places: Collection[Place]) -> None:
        """Take these peers for dead: another watch of this process has seen them be silent."""
        self._gone.update(places)

    def _living(self, records: list[LockRecord]) -> list[LockRecord]:
        if not records:
            return records
        places = {(one.slot, one.incarnation) for one in records}
        living = {place for place in places if self.living(*place)}
        if len(living) == len(places):
            return records
        return [one for one in records if (one.slot, one.incarnation) in living]

    # --- looking ----------------------------------------------------------------------------

    def test(self, ino: int, lock: Lock) -> LockRecord | None:
        """The first held lock that would be in the way, or None.  Raises Busy, ESTALE."""
        return self._volume.look(lambda view: self._in_the_way(view, ino, lock))

    def owned(self, ino: int, lock: Lock) -> LockRecord | None:
        """The first held lock of the owner of `lock` in its range, of any type."""
        key = (ino, lock.kind, lock.owner)
        held = self._held.get(key)
        if held is None or held.place != self._volume.peer_id:
            return None
        ranges = [one for one in held.ranges if one.start <= lock.end and lock.start <= one.end]
        return held_records(ranges[:1], key, held.place)[0] if ranges else None

    def _in_the_way(self, view: View, ino: int, lock: Lock) -> LockRecord | None:
        records = self._living(records_of(view, view.inode(ino)))
        return blocker(sorted(records, key=start_of), lock, self._volume.peer_id)

    def verify(self, guard: Guard) -> None:
        """Raise LockLost unless all that was taken through an open file is still held."""
        self._volume.look(lambda view: guard.check(view, view.inode(guard.ino)))

    def stands(self, held: Held, records: list[LockRecord]) -> bool:
        """Whether the table has what its owner believes to hold."""
        if held.place != self._volume.peer_id:
            return False
        mine = ranges_of(records, held.key, held.place)
        return all(
            any(it.start <= one.start and one.end <= it.end and it.type >= one.type for it in mine)
            for one in held.ranges
        )

    def lost(self, held: Held) -> LockLost:
        """What to raise for a lock that others removed; its open files are fenced."""
        for guard in held.guards:
            if not guard.fenced:
                guard.fenced = True
                log.warning(
                    "inode %d: %s: writes through the file that holds it fail until it is closed",
                    guard.ino,
                    _LOST,
                )
        self._believe(held.key, held.place, [], None)
        return LockLost(_LOST)

    # --- taking -----------------------------------------------------------------------------

    def take(self, guard: Guard, lock: Lock) -> bool:
        """Take a lock unless something is in the way; whether it is held now.

        Raises Busy, ESTALE, ENOLCK, LockLost.
        """
        return Wait(self, guard, lock, blocking=False).attempt()

    def attempt(self, wait: Wait, now: float) -> bool:
        """One attempt of `Wait.attempt`."""
        if wait.guard.fenced:
            raise LockLost(_LOST)
        if wait.ticket and wait.place != self._volume.peer_id:
            wait.ticket = 0  # it was this mount's former incarnation that waited
        if not self._volume.look(lambda view: self._worth_trying(view, wait, now)):
            return False
        try:
            return self._changes.change(lambda tx: self._attempt(tx, wait, now))()
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise FsError(errno.ENOLCK, "the region has no room for another lock") from None

    def _worth_trying(self, view: View, wait: Wait, now: float) -> bool:
        """Whether a transaction would change anything."""
        inode = view.inode(wait.guard.ino)
        table = records_of(view, inode)
        wait.seen = value_of(view, inode)
        wait.before = sum(1 for one in table if self._is_before(one, wait))
        held = self._held.get(wait.key)
        if held is not None and not self.stands(held, table):
            raise self.lost(held)
        if wait.queues(now) or (held is not None and wait.lock.kind == FLOCK):
            return True
        records = self._living(table)
        if blocker(records, wait.lock, self._volume.peer_id) is not None:
            wait.is_blocked()
            return False
        return not self._lets_go_first(records, wait, now)

    def _attempt(self, tx: Transaction, wait: Wait, now: float) -> Callable[[], bool]:
        """The plan: what to do once it is committed."""
        place, lock, key = self._volume.peer_id, wait.lock, wait.key
        inode = tx.inode(wait.guard.ino)
        table = records_of(tx, inode)
        held = self._held.get(key)
        if held is not None and not self.stands(held, table):
            raise self.lost(held)
        before = held.ranges if held is not None else []
        for start, end in self._owed.get(key, ()):
            before = changed_ranges(before, start, end)
        if lock.kind == FLOCK and any(one.type != lock.type for one in before):
            before = []  # as Linux does it: another type is a lock given back and one asked for
        records = self._living(table)
        others = [one for one in records if not is_of(one, key, place) or one.state == WAITING]
        unchanged = [*others, *held_records(before, key, place)]
        blocked = blocker(others, lock, place) is not None
        if blocked:
            wait.is_blocked()
        if blocked or self._lets_go_first(unchanged, wait, now):
            ticket = self._queued(tx, inode, others, wait) if wait.queues(now) else 0
            if ticket:
                unchanged.append(waiting_record(lock, place, ticket))
            store_records(tx, inode, table, unchanged)
            return lambda: self._refused(wait, place, before, ticket)
        after = changed_ranges(
            before, lock.start, lock.end, Range(lock.start, lock.end, lock.type, lock.pid)
        )
        if wait.ticket:
            others = [one for one in others if not is_ticket(one, wait.ticket, place)]
            self._unlist(tx, wait.ticket, place)
        records = [*others, *held_records(after, key, place)]
        if len(records) > max(MAX_RECORDS, len(table)):
            raise FsError(errno.ENOLCK, f"inode {inode.ino} has {len(records) - 1} locks")
        store_records(tx, inode, table, records)
        return lambda: self._granted(wait, place, after)

    def _refused(self, wait: Wait, place: Place, ranges: list[Range], ticket: int) -> bool:
        self._owed.pop(wait.key, None)
        if wait.key in self._held:
            self._believe(wait.key, place, ranges, None)
        if ticket:
            wait.ticket, wait.place = ticket, place
        return False

    def _granted(self, wait: Wait, place: Place, ranges: list[Range]) -> bool:
        self._owed.pop(wait.key, None)
        wait.ticket = 0
        self._believe(wait.key, place, ranges, wait.guard)
        return True

    def _believe(self, key: Key, place: Place, ranges: list[Range], guard: Guard | None) -> None:
        """An owner holds these ranges from now on; `guard` is of the file that it asked through."""
        self.version += 1
        held = self._held.get(key)
        if not ranges:
            if held is not None:
                del self._held[key]
                for one in held.guards:
                    one.held.pop(key, None)
            return
        if held is None:
            held = self._held[key] = Held(key, place)
        held.place, held.ranges = place, ranges
        if guard is not None and guard not in held.guards:
            held.guards.append(guard)
            guard.held[key] = held

    # --- the order of waiters -----------------------------------------------------------------

    def _lets_go_first(self, records: list[LockRecord], wait: Wait, now: float) -> bool:
        """Whether an earlier ticket is before `wait`; see the module's comment."""
        if not wait.blocking:
            return False
        earlier = [one for one in records if self._is_before(one, wait)]
        if not earlier:
            return False
        earlier.sort(key=ticket_of)
        held = [one for one in records if one.state == HELD]
        for one in earlier[:_FIRST]:
            if self._waits_for_others(held, one, wait, now):
                return wait.yields(now)
        return False

    def _is_before(self, one: LockRecord, wait: Wait) -> bool:
        """Whether a record is an earlier ticket, of another owner, that conflicts."""
        if one.state != WAITING or (wait.ticket and one.ticket >= wait.ticket):
            return False
        return conflicts(one, wait.lock) and not is_of(one, wait.key, self._volume.peer_id)

    def _waits_for_others(
        self, held: list[LockRecord], one: LockRecord, wait: Wait, now: float
    ) -> bool:
        """Whether a waiter is neither slow nor in need of what the owner of `wait` holds."""
        ticket = (wait.guard.ino, one.ticket)
        holders = [it for it in held if conflicts(it, one) and owner_of(it) != owner_of(one)]
        if holders:
            self._free_since.pop(ticket, None)
            me = (*self._volume.peer_id, wait.lock.owner)
            return all(owner_of(it) != me for it in holders)
        if len(self._free_since) > _TICKETS:
            self._free_since.clear()
        return now - self._free_since.setdefault(ticket, now) < SLOW

    def _queued(self, tx: Transaction, inode: Inode, records: list[LockRecord], wait: Wait) -> int:
        """The ticket of `wait`; 0 when the table has no room for it.  Raises EDEADLK."""
        waits = self._living_waits(tx) if wait.detect else []
        if wait.detect and self._is_deadlock(tx, wait, waits):
            raise FsError(errno.EDEADLK)
        if len(records) >= MAX_RECORDS:
            return 0
        sequence = words.split_commit(tx.word)[0]
        ticket = words.next_sequence(sequence)
        if wait.detect and len(waits) < MAX_WAITS:
            slot, incarnation = self._volume.peer_id
            mine = WaitRecord(wait.lock.owner, inode.ino, ticket, incarnation, slot)
            store_waits(tx, [*waits, mine])
        return ticket

    def withdraw(self, ino: int, ticket: int, place: Place) -> None:
        """Take a ticket back, now or at a later tick.  Never raises."""

        def plan(tx: Transaction) -> None:
            self._unlist(tx, ticket, place)
            inode = tx.find_inode(ino)
            if inode is not None:
                table = records_of(tx, inode)
                kept = [one for one in self._living(table) if not is_ticket(one, ticket, place)]
                store_records(tx, inode, table, kept)

        if place != self._volume.peer_id:
            return
        try:
            self._changes.change(plan, removal=True)
        except Corrupt:
            pass
        except (IvshmemfsError, OSError):
            self._withdrawn.append((ino, ticket, place))

    # --- deadlocks --------------------------------------------------------------------------

    def _living_waits(self, tx: Transaction) -> list[WaitRecord]:
        found = waits_of(tx)
        places = {(one.slot, one.incarnation) for one in found}
        living = {place for place in places if self.living(*place)}
        return [one for one in found if (one.slot, one.incarnation) in living]

    def _unlist(self, tx: Transaction, ticket: int, place: Place) -> None:
        found = waits_of(tx)
        kept = [one for one in found if (one.ticket, one.slot, one.incarnation) != (ticket, *place)]
        if len(kept) != len(found):
            store_waits(tx, kept)

    def _is_deadlock(self, tx: Transaction, wait: Wait, waits: list[WaitRecord]) -> bool:
        me = (*self._volume.peer_id, wait.lock.owner)
        return closes_ring(wait.guard.ino, wait.lock, me, waits, lambda ino: self._table(tx, ino))

    def _table(self, tx: Transaction, ino: int) -> tuple[list[LockRecord], int]:
        """The records of any inode that count, and how many it has; none if gone or damaged."""
        with suppress(Corrupt):
            inode = tx.find_inode(ino)
            if inode is not None:
                records = records_of(tx, inode)
                return self._living(records), len(value_of(tx, inode)) // LOCK.size
        return [], 0

    # --- giving back ------------------------------------------------------------------------

    def give(self, ino: int, kind: int, owner: int, start: int = 0, end: int = END) -> None:
        """Give back what an owner holds of these bytes; at once where it holds none.

        Raises Busy: then the same call goes on, or a later tick does.  ENOLCK: the middle of a lock
        cannot be given back, because the table is full.
        """
        key = (ino, kind, owner)
        held = self._held.get(key)
        if held is None:
            self._owed.pop(key, None)
            return
        after = changed_ranges(held.ranges, start, end)
        if after == held.ranges:
            return
        owed = self._owed.setdefault(key, [])
        if (start, end) not in owed:
            owed.append((start, end))
        try:
            self._changes.change(lambda tx: self._reduce(tx, held, after), removal=True)
        except (Corrupt, StaleHandle):  # neither has a lock
            pass
        except NoSpace:  # not even of the reserve: a later tick finds some
            return
        except FsError as error:
            if error.errno == errno.ENOLCK:
                self._forgive(key, (start, end))
            raise
        self._believe(key, held.place, after, None)
        self._forgive(key, (start, end))

    def _forgive(self, key: Key, part: tuple[int, int]) -> None:
        """Forget that this part was to be given back."""
        owed = self._owed.get(key, [])
        if part in owed:
            owed.remove(part)
        if not owed:
            self._owed.pop(key, None)

    def _reduce(self, tx: Transaction, held: Held, after: list[Range]) -> None:
        """Have no more in the table than `after`; nothing where the lock was lost."""
        key, place = held.key, self._volume.peer_id
        inode = tx.find_inode(key[0])
        if inode is None:
            return
        table = records_of(tx, inode)
        others = [
            one for one in self._living(table) if not is_of(one, key, place) or one.state == WAITING
        ]
        left = held_records(after, key, place) if self.stands(held, table) else []
        store_records(tx, inode, table, [*others, *left])

    def close(self, guard: Guard) -> None:
        """Give back what no other open file shares with this one.  Raises Busy: call it again."""
        for key, held in list(guard.held.items()):
            if len(held.guards) > 1:
                held.guards.remove(guard)
                del guard.held[key]
            else:
                self.give(*key)

    def tick(self) -> None:
        """Give back what could not be given back before, some at a time.  Never raises."""
        for key in list(self._owed)[:_OWED_AT_ONCE]:
            for start, end in list(self._owed.get(key, ())):
                with suppress(IvshmemfsError, OSError):
                    self.give(*key, start, end)
        withdrawn = self._withdrawn[:_OWED_AT_ONCE]
        del self._withdrawn[:_OWED_AT_ONCE]
        for one in withdrawn:
            self.withdraw(*one)

    def leave(self) -> None:
        """Give everything back: this mount ends.  What cannot be given back goes with its slot."""
        for key in list(self._held):
            with suppress(IvshmemfsError, OSError):
                self.give(*key)
        self.tick()
