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

A peer is living while its slot has the record's incarnation, it is not surely gone
(`Watch.absent`), and it is not silent for more than `SILENT` seconds.

Each mount keeps a copy of what its own owners hold (`Held`): what they believe.  The table is the
truth.  The two differ once this mount was silent for so long that another peer removed its records,
or after it has joined again as a new incarnation.  Then each open file through which such a lock
was taken is *fenced*, until it is closed: its writes fail.  `Guard.check` runs on the snapshot of
each write, so the commit's compare-and-swap makes the check and the write one.

Order of waiters: a request that may wait lets a conflicting earlier ticket go first.  Three limits
keep this queue from adding a deadlock.  A request ignores a ticket that its own locks block, a
ticket that nobody has blocked for `SLOW` s, and every ticket after `YIELD` s.  A request that does
not wait ignores all tickets.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Final, NamedTuple

from ivshmemfs.engine import xattr
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.mount import Mount
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Busy, Corrupt, FsError, IvshmemfsError, LockLost, StaleHandle
from ivshmemfs.format import lock as fmt
from ivshmemfs.format import words
from ivshmemfs.format.inode import ORPHANS_INO
from ivshmemfs.format.lock import (
    END,
    FLOCK,
    HELD,
    MAX_RECORDS,
    MAX_WAITS,
    WAITING,
    WRITE,
    LockRecord,
    WaitRecord,
)
from ivshmemfs.shm import watch

log = logging.getLogger(__name__)

SILENT = 10.0  # seconds without a sign of life after which a holder's machine counts as dead
QUEUE_AFTER = 0.003  # seconds of vain attempts after which a waiter takes a ticket
LIVENESS = 0.5  # seconds between two looks at the holders, when nobody commits
SLOW = 0.05  # seconds for which a waiter may leave unused what it could have
YIELD = 0.5  # seconds for which a waiter lets earlier tickets go first
_AGAIN = 0.01  # seconds between two looks while a waiter lets others go first
_CHAIN = 32  # waiting requests that the search for a deadlock follows
_OWED_AT_ONCE = 32  # locks that one tick gives back
_TICKETS = 1000  # tickets of other waiters that are watched at most

Place = tuple[int, int]  # slot, incarnation
Key = tuple[int, int, int]  # inode, kind, owner
_LOST = "another machine took this lock while this mount showed no life"


class Lock(NamedTuple):
    """A lock that an owner asks for; `start` and `end` in bytes, both included."""

    kind: int
    type: int
    owner: int
    start: int = 0
    end: int = END
    pid: int = 0


class Range(NamedTuple):
    """A part of a file that one owner holds."""

    start: int
    end: int
    type: int
    pid: int


def changed_ranges(
    ranges: Iterable[Range], start: int, end: int, new: Range | None = None
) -> list[Range]:
    """One owner's ranges without the bytes `start` to `end`, and with `new`.

    The result is in order, disjoint, and has no two neighbours of one type that touch.
    """
    kept = [] if new is None else [new]
    for one in ranges:
        if one.end < start or one.start > end:
            kept.append(one)
            continue
        if one.start < start:
            kept.append(one._replace(end=start - 1))
        if one.end > end:
            kept.append(one._replace(start=end + 1))
    kept.sort()
    merged: list[Range] = []
    for one in kept:
        last = merged[-1] if merged else None
        if last is not None and last.type == one.type and last.end + 1 == one.start:
            pid = new.pid if new is not None else last.pid
            merged[-1] = Range(last.start, one.end, one.type, pid)
        else:
            merged.append(one)
    return merged


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
            records = _records(view, inode)
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
        self._locks = locks
        self._began = time.monotonic()
        self._word = 0
        self._due = 0.0
        self._yields_since = 0.0

    @property
    def key(self) -> Key:
        """Of what it asks for."""
        return self.guard.ino, self.lock.kind, self.lock.owner

    def attempt(self) -> bool:
        """Take the lock if nothing is in the way; whether it is held now.

        Costs one load while nobody commits.  Raises Busy, ESTALE, ENOLCK, EDEADLK, LockLost.
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
            elif self.blocking and not self.ticket:
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
        """A holder is in the way, so it has let nobody go first yet."""
        self._yields_since = 0.0

    def leave(self) -> None:
        """Wait no more; the next ticks take the ticket back if this cannot.  Never raises."""
        if self.ticket:
            self._locks.withdraw(self.guard.ino, self.ticket, self.place)
            self.ticket = 0


class Locks:
    """The locks of all inodes as one mount sees them.  Not thread-safe."""

    def __init__(self, fs: Mount) -> None:
        self._fs = fs
        self._held: dict[Key, Held] = {}
        self._owed: dict[Key, list[tuple[int, int]]] = {}  # given back, as soon as it succeeds
        self._withdrawn: list[tuple[int, int, Place]] = []  # the same of tickets
        self._gone: set[Place] = set()  # judged by another watch of this process
        self._free_since: dict[tuple[int, int], float] = {}  # tickets that nobody blocks
        self.version = 0  # changes with what is held

    @property
    def place(self) -> Place:
        """(slot, incarnation) of this mount."""
        return self._fs.place

    def commit_word(self) -> int:
        """The commit word: nothing in any table has changed while it has not."""
        return self._fs.store.control.load()

    # --- who lives --------------------------------------------------------------------------

    def living(self, slot: int, incarnation: int) -> bool:
        """Whether the records of a peer count."""
        place = (slot, incarnation)
        if place == self._fs.place:
            return True
        table = self._fs.table
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
        return self._fs.look(lambda view: self._in_the_way(view, ino, lock))

    def _in_the_way(self, view: View, ino: int, lock: Lock) -> LockRecord | None:
        records = self._living(_records(view, view.inode(ino)))
        return _blocker(sorted(records, key=_start), lock, self._fs.place)

    def verify(self, guard: Guard) -> None:
        """Raise LockLost unless all that was taken through an open file is still held."""
        self._fs.look(lambda view: guard.check(view, view.inode(guard.ino)))

    def stands(self, held: Held, records: list[LockRecord]) -> bool:
        """Whether the table has what its owner believes to hold."""
        if held.place != self._fs.place:
            return False
        mine = _ranges_of(records, held.key, held.place)
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
        if wait.ticket and wait.place != self._fs.place:
            wait.ticket = 0  # it was this mount's former incarnation that waited
        if not self._fs.look(lambda view: self._worth_trying(view, wait, now)):
            return False
        try:
            return self._fs.change(lambda tx: self._attempt(tx, wait, now))()
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise FsError(errno.ENOLCK, "the region has no room for another lock") from None

    def _worth_trying(self, view: View, wait: Wait, now: float) -> bool:
        """Whether a transaction would change anything."""
        inode = view.inode(wait.guard.ino)
        table = _records(view, inode)
        wait.seen = _value(view, inode)
        held = self._held.get(wait.key)
        if held is not None and not self.stands(held, table):
            raise self.lost(held)
        if wait.queues(now) or (held is not None and wait.lock.kind == FLOCK):
            return True
        records = self._living(table)
        if _blocker(records, wait.lock, self._fs.place) is not None:
            wait.is_blocked()
            return False
        return not self._lets_go_first(records, wait, now)

    def _attempt(self, tx: Transaction, wait: Wait, now: float) -> Callable[[], bool]:
        """The plan: what to do once it is committed."""
        place, lock, key = self._fs.place, wait.lock, wait.key
        inode = tx.inode(wait.guard.ino)
        table = _records(tx, inode)
        held = self._held.get(key)
        if held is not None and not self.stands(held, table):
            raise self.lost(held)
        before = held.ranges if held is not None else []
        for start, end in self._owed.get(key, ()):
            before = changed_ranges(before, start, end)
        if lock.kind == FLOCK and any(one.type != lock.type for one in before):
            before = []  # as Linux does it: another type is a lock given back and one asked for
        records = self._living(table)
        others = [one for one in records if not _is_of(one, key, place) or one.state == WAITING]
        unchanged = [*others, *_held_records(before, key, place)]
        blocked = _blocker(others, lock, place) is not None
        if blocked:
            wait.is_blocked()
        if blocked or self._lets_go_first(unchanged, wait, now):
            ticket = self._queued(tx, inode, others, wait) if wait.queues(now) else 0
            if ticket:
                unchanged.append(_waiting(lock, place, ticket))
            self._store(tx, inode, table, unchanged)
            return lambda: self._refused(wait, place, before, ticket)
        after = changed_ranges(
            before, lock.start, lock.end, Range(lock.start, lock.end, lock.type, lock.pid)
        )
        if wait.ticket:
            others = [one for one in others if not _is_ticket(one, wait.ticket, place)]
            self._unlist(tx, wait.ticket, place)
        records = [*others, *_held_records(after, key, place)]
        if len(records) > max(MAX_RECORDS, len(table)):
            raise FsError(errno.ENOLCK, f"inode {inode.ino} has {len(records) - 1} locks")
        self._store(tx, inode, table, records)
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

    @staticmethod
    def _store(
        tx: Transaction, inode: Inode, before: list[LockRecord], after: list[LockRecord]
    ) -> None:
        """Have these records in the table, unless they are there; raises ENOLCK."""
        if len(after) > fmt.MOST:
            raise FsError(errno.ENOLCK, f"inode {inode.ino} has {len(after)} locks")
        after = sorted(after)
        if after != before:
            value = fmt.encode_locks(after) if after else b""
            tx.put(xattr.set_hidden(tx, tx.inode(inode.ino), fmt.LOCKS, value))

    # --- the order of waiters -----------------------------------------------------------------

    def _lets_go_first(self, records: list[LockRecord], wait: Wait, now: float) -> bool:
        """Whether an earlier ticket is before `wait`; see the module's comment."""
        if not wait.blocking:
            return False
        lock, place = wait.lock, self._fs.place
        for one in records:
            if one.state != WAITING or (wait.ticket and one.ticket >= wait.ticket):
                continue
            if _is_of(one, wait.key, place) or not _conflicts(one, lock):
                continue
            if not self._waits_for_others(records, one, wait, now):
                continue
            return wait.yields(now)
        return False

    def _waits_for_others(
        self, records: list[LockRecord], one: LockRecord, wait: Wait, now: float
    ) -> bool:
        """Whether a waiter is neither slow nor in need of what the owner of `wait` holds."""
        ticket = (wait.guard.ino, one.ticket)
        holders = [it for it in records if it.state == HELD and _conflicts(it, one)]
        holders = [it for it in holders if _owner(it) != _owner(one)]
        if holders:
            self._free_since.pop(ticket, None)
            me = (*self._fs.place, wait.lock.owner)
            return all(_owner(it) != me for it in holders)
        if len(self._free_since) > _TICKETS:
            self._free_since.clear()
        return now - self._free_since.setdefault(ticket, now) < SLOW

    def _queued(self, tx: Transaction, inode: Inode, records: list[LockRecord], wait: Wait) -> int:
        """The ticket of `wait`; 0 when there is no room for it.  Raises EDEADLK."""
        waits = self._living_waits(tx) if wait.detect else []
        if wait.detect and self._is_deadlock(tx, wait, waits):
            raise FsError(errno.EDEADLK)
        if len(records) >= MAX_RECORDS:
            return 0
        sequence = words.split_commit(tx.word)[0]
        ticket = words.next_sequence(sequence)
        if wait.detect and len(waits) < MAX_WAITS:
            slot, incarnation = self._fs.place
            mine = WaitRecord(wait.lock.owner, inode.ino, ticket, incarnation, slot)
            _store_waits(tx, [*waits, mine])
        return ticket

    def withdraw(self, ino: int, ticket: int, place: Place) -> None:
        """Take a ticket back, now or at a later tick.  Never raises."""

        def plan(tx: Transaction) -> None:
            self._unlist(tx, ticket, place)
            inode = tx.find_inode(ino)
            if inode is not None:
                table = _records(tx, inode)
                kept = [one for one in self._living(table) if not _is_ticket(one, ticket, place)]
                self._store(tx, inode, table, kept)

        if place != self._fs.place:
            return
        try:
            self._fs.change(plan, removal=True)
        except Corrupt:
            pass
        except (IvshmemfsError, OSError):
            self._withdrawn.append((ino, ticket, place))

    # --- deadlocks --------------------------------------------------------------------------

    def _living_waits(self, tx: Transaction) -> list[WaitRecord]:
        found = _waits(tx)
        places = {(one.slot, one.incarnation) for one in found}
        living = {place for place in places if self.living(*place)}
        return [one for one in found if (one.slot, one.incarnation) in living]

    def _unlist(self, tx: Transaction, ticket: int, place: Place) -> None:
        found = _waits(tx)
        kept = [one for one in found if (one.ticket, one.slot, one.incarnation) != (ticket, *place)]
        if len(kept) != len(found):
            _store_waits(tx, kept)

    def _is_deadlock(self, tx: Transaction, wait: Wait, waits: list[WaitRecord]) -> bool:
        """Whether an owner that blocks `wait` waits, over any number of others, for it."""
        me = (*self._fs.place, wait.lock.owner)
        known: dict[int, list[LockRecord]] = {}
        lock = wait.lock
        todo: list[tuple[int, Lock | LockRecord, tuple[int, int, int]]] = [
            (wait.guard.ino, lock, me)
        ]
        seen: set[tuple[int, int]] = set()
        for _ in range(_CHAIN):
            if not todo:
                break
            ino, asked, by = todo.pop()
            for holder in self._table_of(tx, ino, known):
                who = _owner(holder)
                if holder.state != HELD or who == by or not _conflicts(holder, asked):
                    continue
                if who == me:
                    return True
                for one in waits:
                    if (one.slot, one.incarnation, one.owner) == who and (
                        (one.ino, one.ticket) not in seen
                    ):
                        seen.add((one.ino, one.ticket))
                        for it in self._table_of(tx, one.ino, known):
                            if _is_ticket(it, one.ticket, who[:2]):
                                todo.append((one.ino, it, who))
        return False

    def _table_of(
        self, tx: Transaction, ino: int, known: dict[int, list[LockRecord]]
    ) -> list[LockRecord]:
        found = known.get(ino)
        if found is None:
            inode = tx.find_inode(ino)
            found = []
            if inode is not None:
                with suppress(Corrupt):
                    found = self._living(_records(tx, inode))
            known[ino] = found
        return found

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
        with suppress(Corrupt, StaleHandle):  # neither has a lock
            self._fs.change(lambda tx: self._reduce(tx, held, after), removal=True)
        self._believe(key, held.place, after, None)
        owed.remove((start, end))
        if not owed:
            del self._owed[key]

    def _reduce(self, tx: Transaction, held: Held, after: list[Range]) -> None:
        """Have no more in the table than `after`; nothing where the lock was lost."""
        key, place = held.key, self._fs.place
        inode = tx.find_inode(key[0])
        if inode is None:
            return
        table = _records(tx, inode)
        others = [
            one
            for one in self._living(table)
            if not _is_of(one, key, place) or one.state == WAITING
        ]
        left = _held_records(after, key, place) if self.stands(held, table) else []
        self._store(tx, inode, table, [*others, *left])

    def close(self, guard: Guard) -> None:
        """Give back what no other open file shares with this one.  Raises Busy: call it again."""
        for key, held in list(guard.held.items()):
            if len(held.guards) > 1:
                held.guards.remove(guard)
                del guard.held[key]
            else:
                self.give(*key)

    def tick(self) -> None:
        """Give back what could not be given back before, some at a time."""
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


# --- one table ------------------------------------------------------------------------------------


def _value(view: View, inode: Inode) -> bytes:
    return xattr.table(view, inode).get(fmt.LOCKS) or b""


def _records(view: View, inode: Inode) -> list[LockRecord]:
    """The table of an inode.

    A damaged one is empty, so the next change replaces it.  Holders lose their locks by that, and
    are fenced.
    """
    if not inode.record.xattr_size:
        return []
    try:
        return fmt.decode_locks(_value(view, inode))
    except ValueError as error:
        log.warning("inode %d: its locks are damaged and hold nothing: %s", inode.ino, error)
        return []


def _waits(view: View) -> list[WaitRecord]:
    """Which owners wait for which inodes; a damaged list is an empty one."""
    inode = view.find_inode(ORPHANS_INO)
    if inode is None or not inode.record.xattr_size:
        return []
    try:
        return fmt.decode_waits(xattr.table(view, inode).get(fmt.WAITS) or b"")
    except ValueError:
        return []


def _store_waits(tx: Transaction, waits: list[WaitRecord]) -> None:
    value = fmt.encode_waits(waits) if waits else b""
    tx.put(xattr.set_hidden(tx, tx.inode(ORPHANS_INO), fmt.WAITS, value))


def _conflicts(one: Lock | LockRecord, other: Lock | LockRecord) -> bool:
    return (
        one.kind == other.kind
        and one.start <= other.end
        and other.start <= one.end
        and (one.type == WRITE or other.type == WRITE)
    )


def _blocker(records: list[LockRecord], lock: Lock, place: Place) -> LockRecord | None:
    me = (*place, lock.owner)
    for one in records:
        if one.state == HELD and _conflicts(one, lock) and _owner(one) != me:
            return one
    return None


def _start(record: LockRecord) -> int:
    return record.start


def _owner(record: LockRecord) -> tuple[int, int, int]:
    return record.slot, record.incarnation, record.owner


def _is_of(record: LockRecord, key: Key, place: Place) -> bool:
    return record.kind == key[1] and _owner(record) == (*place, key[2])


def _is_ticket(record: LockRecord, ticket: int, place: Place) -> bool:
    same = record.state == WAITING and record.ticket == ticket
    return same and (record.slot, record.incarnation) == place


def _ranges_of(records: list[LockRecord], key: Key, place: Place) -> list[Range]:
    return [
        Range(one.start, one.end, one.type, one.pid)
        for one in records
        if one.state == HELD and _is_of(one, key, place)
    ]


def _held_records(ranges: list[Range], key: Key, place: Place) -> list[LockRecord]:
    slot, incarnation = place
    return [
        LockRecord(
            key[1], one.type, HELD, slot, incarnation, key[2], one.start, one.end, one.pid, 0
        )
        for one in ranges
    ]


def _waiting(lock: Lock, place: Place, ticket: int) -> LockRecord:
    slot, incarnation = place
    return LockRecord(
        lock.kind, lock.type, WAITING, slot, incarnation, lock.owner, lock.start, lock.end,
        lock.pid, ticket,
    )  # fmt: skip


# --- the lock of a command ------------------------------------------------------------------------


class FileLock:
    """An exclusive flock(2) of one inode for a command that is a peer itself.

    `fs` may be a read-only mount while the lock is only watched; `acquire` and what follows need
    a writing one.
    """

    _numbers = itertools.count(1)

    def __init__(self, fs: Mount, locks: Locks, ino: int) -> None:
        self._fs = fs
        self._locks = locks
        self._guard = Guard(locks, ino)
        self._lock = Lock(FLOCK, WRITE, next(FileLock._numbers), pid=os.getpid())

    def holder(self) -> LockRecord | None:
        """A living peer's lock that is in the way.  Raises Busy, ESTALE."""
        return self._locks.test(self._guard.ino, self._lock)

    def gone(self) -> set[Place]:
        """The peers of the table that this watch takes for dead."""

        def read(view: View) -> set[Place]:
            records = _records(view, view.inode(self._guard.ino))
            places = {(one.slot, one.incarnation) for one in records}
            return {place for place in places if not self._locks.living(*place)}

        return self._fs.look(read)

    def undecided(self) -> bool:
        """Whether the holder's process is gone, and all that is waited for is its silence."""
        holder = self.holder()
        if holder is None:
            return False
        table = self._fs.table
        return table.watch.vanished(table.peer(holder.slot))

    def acquire(self, gone: Collection[Place] = ()) -> bool:
        """Take the lock unless a peer holds it that is not `gone`; whether it is held now.

        Raises Busy, ESTALE, ENOLCK.
        """
        self._locks.presume_gone(gone)
        return self._locks.take(self._guard, self._lock)

    def keep(self) -> None:
        """Show life, and make sure that the lock is still ours; at least once a second.

        Raises LockLost, and then it is not.
        """
        try:
            with suppress(Busy):
                self._fs.tick()
            self._locks.verify(self._guard)
        except Busy:
            return
        except LockLost:
            raise LockLost("the lock was taken over while this machine showed no life") from None
        except IvshmemfsError as error:  # such as that all slots are taken
            raise LockLost(f"the lock is lost: {error}") from None

    def release(self) -> None:
        """Give the lock back if it is still ours; raises Busy."""
        self._locks.close(self._guard)
