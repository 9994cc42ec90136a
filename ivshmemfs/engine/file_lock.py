"""The lock that a command holds: an exclusive flock(2) lock, taken without a mount.

The command is a peer itself.  So its death frees the lock, as the death of any peer does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from ivshmemfs.engine.filesystem import Filesystem
from ivshmemfs.engine.lock_table import Lock, Place, records_of
from ivshmemfs.engine.locks import Guard, Locks
from ivshmemfs.engine.transaction import View
from ivshmemfs.errors import Busy, IvshmemfsError, LockLost
from ivshmemfs.format.lock import FLOCK, WRITE, LockRecord

_owners: Final = itertools.count(1)  # of this process


class FileLock:
    """An exclusive flock(2) of one inode for a command that is a peer itself.

    `fs` may be a read-only mount while the lock is only watched; `acquire` and what follows need
    a writing one.
    """

    def __init__(self, fs: Filesystem, locks: Locks, ino: int) -> None:
        self._fs = fs
        self._locks = locks
        self._guard = Guard(locks, ino)
        self._lock = Lock(FLOCK, WRITE, next(_owners), pid=os.getpid())

    def holder(self) -> LockRecord | None:
        """A living peer's lock that is in the way.  Raises Busy, ESTALE."""
        return self._locks.test(self._guard.ino, self._lock)

    def gone(self) -> set[Place]:
        """The peers of the table that this watch takes for dead."""

        def read(view: View) -> set[Place]:
            records = records_of(view, view.inode(self._guard.ino))
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
