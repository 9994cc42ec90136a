"""A lock on a file, between machines: a record on the inode that says which peer holds it.

    record               what it means                           what a newcomer may do
    none                 nobody holds the lock                   take it
    of a living peer     held                                    wait
    of a peer that left  its holder died, or was declared gone   take it
    of a silent peer     its machine is dead or paused           take it after `SILENT` s

Taking and giving back are transactions that compare the record with what was judged before, so
of several newcomers one wins.  A holder shows life as every peer does; nobody's clock is compared
with anybody else's: silence is measured by who waits.

A machine that was paused for longer than that finds, when it wakes up, that the record is another
one: `keep` raises LockLost.  What its user does between waking up and that look is not prevented
by anything, as with every lock that outlives its holder.

The record is an extended attribute of a namespace that mounts do not show (`xattr.NAMESPACES`),
so no copy of the file carries it; it names the inode, too.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import NamedTuple

from ivshmemfs.engine import xattr
from ivshmemfs.engine.filesystem import Filesystem
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Busy, IvshmemfsError, LockLost
from ivshmemfs.format import words

ATTRIBUTE = b"ivshmemfs.lock"
SILENT = 10.0  # seconds without a sign of life after which a holder's machine counts as dead

_RECORD = struct.Struct("<QQQ")  # inode, slot, incarnation


class Holder(NamedTuple):
    """Who holds a lock."""

    ino: int
    slot: int
    incarnation: int


class FileLock:
    """One inode's lock as one peer sees it.

    `fs` may be a read-only mount while the lock is only watched; `acquire` and what follows need
    a writing one.
    """

    def __init__(self, fs: Filesystem, ino: int) -> None:
        self._fs = fs
        self._ino = ino
        self._mine = b""

    # --- looking ----------------------------------------------------------------------------

    def _load(self, view: View) -> bytes:
        return xattr.load(view, view.inode(self._ino)).get(ATTRIBUTE, b"")

    def record(self) -> bytes:
        """What stands on the inode; empty if the lock was never taken or was given back."""
        return self._fs.look(self._load)

    def blocking(self, record: bytes) -> Holder | None:
        """The living peer that holds the lock by `record`, or None if it can be taken."""
        holder = self._holder(record)
        if holder is None:
            return None
        table = self._fs.table
        table.watch.see(holder.slot)
        other = table.peer(holder.slot)
        present = other.state in (words.IDLE, words.ACTIVE)
        if not present or other.incarnation != holder.incarnation or table.watch.absent(other):
            return None
        return None if table.watch.silence(other.slot, other.word) > SILENT else holder

    def undecided(self, record: bytes) -> bool:
        """Whether a holder's process is gone, and all that is waited for is its silence."""
        holder = self.blocking(record)
        if holder is None:
            return False
        table = self._fs.table
        return table.watch.vanished(table.peer(holder.slot))

    def _holder(self, record: bytes) -> Holder | None:
        if len(record) != _RECORD.size:
            return None
        holder = Holder(*_RECORD.unpack(record))
        known = holder.ino == self._ino and 1 <= holder.slot <= self._fs.table.count
        return holder if known else None

    # --- taking and giving back -----------------------------------------------------------------

    def acquire(self, over: bytes) -> bool:
        """Take the lock if its record is still `over`; raises Busy, ESTALE, NoSpace."""

        def plan(tx: Transaction) -> bytes:
            inode = tx.inode(self._ino)
            values = xattr.load(tx, inode)
            if values.get(ATTRIBUTE, b"") != over:
                return b""
            mine = _RECORD.pack(self._ino, *self._fs.peer_id)
            tx.put(xattr.save(tx, inode, {**values, ATTRIBUTE: mine}, silent=True))
            return mine

        self._mine = self._fs.change(plan)
        return bool(self._mine)

    def keep(self) -> None:
        """Show life, and make sure that the lock is still ours; at least once a second.

        Raises LockLost, and then it is not; Busy says nothing about it.
        """
        try:
            with suppress(Busy):
                self._fs.tick()
            held = self.record()
        except Busy:
            return
        except IvshmemfsError as error:  # such as that all slots are taken
            raise LockLost(f"the lock is lost: {error}") from None
        if held != self._mine or _RECORD.unpack(held)[1:] != self._fs.peer_id:
            raise LockLost("the lock was taken over while this machine showed no life")

    def release(self) -> None:
        """Give the lock back if it is still ours; raises Busy."""

        def plan(tx: Transaction) -> None:
            inode = tx.inode(self._ino)
            values = xattr.load(tx, inode)
            if values.get(ATTRIBUTE) == self._mine:
                del values[ATTRIBUTE]
                tx.put(xattr.save(tx, inode, values, silent=True))

        if self._mine:
            self._fs.change(plan, removal=True)
            self._mine = b""
