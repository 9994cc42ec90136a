"""One table of locks: its records, what is in the way of what, and one owner's ranges.

Everything here is about one snapshot or one transaction.  Which records count, because their peers
live, is up to `locks.Locks`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import NamedTuple

from ivshmemfs.engine import xattr
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import FsError
from ivshmemfs.format import lock as fmt
from ivshmemfs.format.inode import ORPHANS_INO
from ivshmemfs.format.lock import END, HELD, WAITING, WRITE, LockRecord, WaitRecord

log = logging.getLogger(__name__)

Place = tuple[int, int]  # slot, incarnation
Key = tuple[int, int, int]  # inode, kind, owner


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


def value_of(view: View, inode: Inode) -> bytes:
    """The bytes of an inode's table; empty when it has none."""
    return xattr.table(view, inode).get(fmt.LOCKS) or b""


def records_of(view: View, inode: Inode) -> list[LockRecord]:
    """The table of an inode.

    A damaged one is empty, so the next change replaces it.  Holders lose their locks by that, and
    are fenced.
    """
    if not inode.record.xattr_size:
        return []
    try:
        return fmt.decode_locks(value_of(view, inode))
    except ValueError as error:
        log.warning("inode %d: its locks are damaged and hold nothing: %s", inode.ino, error)
        return []


def waits_of(view: View) -> list[WaitRecord]:
    """Which owners wait for which inodes; a damaged list is an empty one."""
    inode = view.find_inode(ORPHANS_INO)
    if inode is None or not inode.record.xattr_size:
        return []
    try:
        return fmt.decode_waits(xattr.table(view, inode).get(fmt.WAITS) or b"")
    except ValueError:
        return []


def store_waits(tx: Transaction, waits: list[WaitRecord]) -> None:
    """Have this list of owners that wait in the new root."""
    value = fmt.encode_waits(waits) if waits else b""
    tx.put(xattr.set_hidden(tx, tx.inode(ORPHANS_INO), fmt.WAITS, value))


def conflicts(one: Lock | LockRecord, other: Lock | LockRecord) -> bool:
    """Whether two owners cannot hold both locks at once."""
    return (
        one.kind == other.kind
        and one.start <= other.end
        and other.start <= one.end
        and (one.type == WRITE or other.type == WRITE)
    )


def blocker(records: list[LockRecord], lock: Lock, place: Place) -> LockRecord | None:
    """The first held record of another owner that conflicts with `lock`, of the peer `place`."""
    me = (*place, lock.owner)
    for one in records:
        if one.state == HELD and conflicts(one, lock) and owner_of(one) != me:
            return one
    return None


def start_of(record: LockRecord) -> int:
    """The first byte of a record."""
    return record.start


def ticket_of(record: LockRecord) -> int:
    """The ticket of a record."""
    return record.ticket


def owner_of(record: LockRecord) -> tuple[int, int, int]:
    """(slot, incarnation, owner) of a record: what names an owner in the whole region."""
    return record.slot, record.incarnation, record.owner


def is_of(record: LockRecord, key: Key, place: Place) -> bool:
    """Whether a record is of the owner and kind in `key`, of the peer `place`."""
    return record.kind == key[1] and owner_of(record) == (*place, key[2])


def is_ticket(record: LockRecord, ticket: int, place: Place) -> bool:
    """Whether a record is that of a waiting request of the peer `place`."""
    same = record.state == WAITING and record.ticket == ticket
    return same and (record.slot, record.incarnation) == place


def ranges_of(records: list[LockRecord], key: Key, place: Place) -> list[Range]:
    """What the owner in `key`, of the peer `place`, holds by the table."""
    return [
        Range(one.start, one.end, one.type, one.pid)
        for one in records
        if one.state == HELD and is_of(one, key, place)
    ]


def held_records(ranges: list[Range], key: Key, place: Place) -> list[LockRecord]:
    """The records of ranges that the owner in `key`, of the peer `place`, holds."""
    slot, incarnation = place
    return [
        LockRecord(
            key[1], one.type, HELD, slot, incarnation, key[2], one.start, one.end, one.pid, 0
        )
        for one in ranges
    ]


def waiting_record(lock: Lock, place: Place, ticket: int) -> LockRecord:
    """The record of a request that waits."""
    slot, incarnation = place
    return LockRecord(
        lock.kind, lock.type, WAITING, slot, incarnation, lock.owner, lock.start, lock.end,
        lock.pid, ticket,
    )  # fmt: skip


def store_records(
    tx: Transaction, inode: Inode, before: list[LockRecord], after: list[LockRecord]
) -> None:
    """Have these records in the table, unless they are there; raises ENOLCK."""
    if len(after) > fmt.MOST:
        raise FsError(errno.ENOLCK, f"inode {inode.ino} has {len(after)} locks")
    after = sorted(after)
    if after != before:
        value = fmt.encode_locks(after) if after else b""
        tx.put(xattr.set_hidden(tx, tx.inode(inode.ino), fmt.LOCKS, value))
