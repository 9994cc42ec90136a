"""Rings of owners that wait for each other's locks.

An owner waits for those that hold what it asks for; each of them may wait itself, in this file or
another one.  The region lists which owner waits where (`WaitRecord`).  A commit that
adds a waiting request follows these edges first, so the last request of a ring sees all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from ivshmemfs.engine.lock_table import Lock, conflicts, is_ticket, owner_of
from ivshmemfs.format.lock import HELD, MOST, LockRecord, WaitRecord

LONGEST: Final = 16  # waiting requests that are followed
#: Records in the tables that are read for them; a hostile region fills each table, with records
#: that do not even count.
MOST_RECORDS: Final = 4 * MOST

Owner = tuple[int, int, int]  # slot, incarnation, number


def closes_ring(
    ino: int,
    lock: Lock,
    me: Owner,
    waits: Iterable[WaitRecord],
    table_of: Callable[[int], tuple[list[LockRecord], int]],
) -> bool:
    """Whether an owner that blocks `lock` of inode `ino` waits, over any others, for `me`.

    `table_of` gives the records of an inode that count, and how many its table has.  False where
    the answer takes more than LONGEST requests or MOST_RECORDS records.
    """
    by_owner: dict[Owner, list[WaitRecord]] = {}
    for one in waits:
        by_owner.setdefault((one.slot, one.incarnation, one.owner), []).append(one)
    records, read = table_of(ino)
    tables = {ino: records}
    todo: list[tuple[int, Lock | LockRecord, Owner]] = [(ino, lock, me)]
    followed = 0
    while todo:
        at, asked, by = todo.pop()
        for holder in tables[at]:
            who = owner_of(holder)
            if holder.state != HELD or who == by or not conflicts(holder, asked):
                continue
            if who == me:
                return True
            for one in by_owner.pop(who, ()):  # each owner once
                followed += 1
                if followed > LONGEST or read > MOST_RECORDS:
                    return False
                if one.ino not in tables:
                    tables[one.ino], count = table_of(one.ino)
                    read += count
                for it in tables[one.ino]:
                    if is_ticket(it, one.ticket, who[:2]):
                        todo.append((one.ino, it, who))
    return False
