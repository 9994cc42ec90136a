"""Locks as the kernel asks for them: owners, waiting, and what closing a file gives back.

The kernel keeps no lock itself once INIT has agreed on FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS.  It
names an owner by 64 bits.  The owner is the file table of a process (fcntl), or an open file
(flock(2), and fcntl locks of open files, OFD).  What ends a lock:

    fcntl     an unlock; FLUSH, which the kernel sends at each close(2), with the owner that closes
    flock     an unlock; RELEASE of the open file
    OFD       an unlock; RELEASE.  The kernel sends no unlock, so the handle's `Guard` remembers

A request that may wait is attempted at once.  Then a task attempts it again after FIRST_DELAY, with
a backoff up to LONGEST_DELAY.  The backoff starts again when the table has changed.  The task
attempts it at once when this mount gives back a lock of the inode.  An attempt costs one load while
no peer commits; else it waits for its turn to compute (`turns`).  Where bells work (`wakeups`),
the backoff ends in a sleep until a commit rings.  After a ring that did not help it naps
LONGEST_DELAY first, because commits come in rows.

A wait ends with the lock, with an error, with INTERRUPT (EINTR), or with the mount (EIO).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from ivshmemfs.engine.handle import Handle
from ivshmemfs.engine.lock_table import Lock
from ivshmemfs.engine.locks import Guard, Locks, Wait
from ivshmemfs.errors import Busy, FsError
from ivshmemfs.format.lock import END, FCNTL, READ, LockRecord
from ivshmemfs.fuse.retry import Refused
from ivshmemfs.fuse.turns import Turns
from ivshmemfs.fuse.wakeups import Wakeups

#: Seconds between two attempts of a request that waits: at first, and at most.
FIRST_DELAY = 0.0002
LONGEST_DELAY = 0.004
#: Waiters of one lock, in their order, whose delays are as said.  Those behind them look more
#: seldom, so that thousands keep the daemon no busier than some.
NEAR = 8
#: Waiters of all locks that look as often; more of them look more seldom.  A look in vain costs
#: 30 us.
MANY = 32
#: Those whose delay starts again when the table has changed.
NEXT = 2
#: Maximum seconds of a sleep until a ring.  Holders that block the first waiter may die.  The owner
#: of an earlier ticket may be paused.
LONG_SLEEP, SHORT_SLEEP = 0.5, 0.05
_F_OFD_SETLKW = 38


class SharedLocks:
    """The locks of one mount's open files, for the front end that reads the descriptor.

    *pause* sleeps for some seconds while other requests are served; *ended* says whether the mount
    ends.  *wakeups* wake waiters where there is a doorbell.
    """

    def __init__(
        self,
        locks: Locks,
        pause: Callable[[float], Awaitable[None]],
        ended: Callable[[], bool],
        wakeups: Wakeups | None = None,
    ) -> None:
        self._locks = locks
        self._pause = pause
        self._ended = ended
        self._wakeups = wakeups
        if wakeups is not None:
            wakeups.on_ring(self._rung)
        self._sleepers = 0
        self._turns = Turns(pause, time.monotonic)
        self._asleep: dict[int, dict[trio.CancelScope, Wait]] = {}  # by inode

    def test(
        self, handle: Handle, lock: Lock, *, own: bool = False
    ) -> tuple[LockRecord, bool] | None:
        """(a lock that is in the way, whether its holder is on this mount); None if none is.

        With *own* a lock of the owner of *lock* itself (F_OFD_GETLK with F_UNLCK).
        """
        _check(lock)
        find = self._locks.owned if own else self._locks.test
        found = find(handle.ino, lock)
        if found is None:
            return None
        return found, (found.slot, found.incarnation) == self._locks.place

    def take(self, handle: Handle, lock: Lock) -> None:
        """Take a lock at once; raises EAGAIN when another one is in the way."""
        _check(lock)
        if not self._locks.take(self._guard(handle), lock):
            raise FsError(errno.EAGAIN)
        if lock.type == READ:  # it may have been a write lock before
            self._wake(handle.ino)

    def give(self, handle: Handle, lock: Lock) -> None:
        """Give back what the owner of *lock* holds of its bytes."""
        _check(lock)
        self._locks.give(handle.ino, lock.kind, lock.owner, lock.start, lock.end)
        self._wake(handle.ino)

    def ask(self, handle: Handle, lock: Lock, thread: int) -> Wait | None:
        """Take a lock, or return the wait for it; None when it was taken at once.

        *thread* is the caller's.
        """
        _check(lock)
        wait = Wait(self._locks, self._guard(handle), lock, blocking=True)
        try:
            if wait.attempt():
                return None
        except Busy:
            pass
        wait.detect = lock.kind == FCNTL and not _is_of_open_file(thread)
        return wait

    async def granted(self, wait: Wait) -> None:
        """Return when the lock is taken; raises what ends the wait."""
        delay, seen = FIRST_DELAY, wait.seen
        slept = True  # until a ring, in place of the last nap
        try:
            while True:
                slept = not slept and delay >= LONGEST_DELAY and self._announced()
                if slept and not wait.is_due:  # no commit since the last attempt
                    await self._nap(wait, SHORT_SLEEP if wait.before else LONG_SLEEP)
                else:
                    slept = False
                    await self._nap(wait, delay)
                if self._ended():
                    raise Refused(errno.EIO)
                if wait.is_due and await self._attempt(wait):
                    return
                if wait.seen != seen and wait.before < NEXT:
                    delay = FIRST_DELAY
                else:
                    delay = min(delay * 1.5, self._longest(wait))
                seen = wait.seen
        finally:
            wait.leave()

    def _announced(self) -> bool:
        return self._wakeups is not None and self._wakeups.announce()

    def _longest(self, wait: Wait) -> float:
        """The longest delay of a waiter now, in seconds."""
        before = wait.before
        if not wait.ticket:  # it has no place in the order: maybe the table has no room for one
            before = max(before, len(self._asleep.get(wait.guard.ino, ())))
        return LONGEST_DELAY * max(1.0, before / NEAR, self._sleepers / MANY)

    async def _attempt(self, wait: Wait) -> bool:
        """Attempt it when it is this waiter's turn to compute; whether the lock is held now."""
        async with self._turns.turn(wait.before):
            with suppress(Busy):
                return wait.attempt()
        return False

    async def _nap(self, wait: Wait, seconds: float) -> None:
        """Sleep, until this mount gives back a lock of the inode at most."""
        ino = wait.guard.ino
        with trio.CancelScope() as scope:
            asleep = self._asleep.setdefault(ino, {})
            asleep[scope] = wait
            self._sleepers += 1
            try:
                await self._pause(seconds)
            finally:
                self._sleepers -= 1
                del asleep[scope]
                if not asleep:
                    self._asleep.pop(ino, None)

    def _wake(self, ino: int) -> None:
        """Let those attempt it again whose turn it may be."""
        for scope, wait in list(self._asleep.get(ino, {}).items()):
            if wait.before < NEXT:
                scope.cancel()

    def _rung(self) -> None:
        """Another machine has committed: look whether that was what is waited for."""
        for ino in list(self._asleep):
            self._wake(ino)

    def flush(self, handle: Handle, owner: int) -> None:
        """A process closes the file: its fcntl locks of the inode are over."""
        self._locks.give(handle.ino, FCNTL, owner)
        if self._asleep:
            self._wake(handle.ino)

    def release(self, handle: Handle) -> None:
        """The last descriptor of an open file is closed: all that was taken through it is over."""
        if handle.guard is not None:
            self._locks.close(handle.guard)
            self._wake(handle.ino)

    def _guard(self, handle: Handle) -> Guard:
        if handle.guard is None:
            handle.guard = Guard(self._locks, handle.ino)
        return handle.guard


def _check(lock: Lock) -> None:
    if not lock.start <= lock.end <= END:
        raise FsError(errno.EINVAL)


def _is_of_open_file(thread: int) -> bool:
    """Whether the caller, which waits in fcntl(2), asks for a lock of its open file (OFD).

    The request does not say so.  For such a lock no deadlock is told.  False where the system call
    cannot be read: the thread is in another pid namespace, or another user's.
    """
    try:
        with open(f"/proc/{thread}/syscall", "rb") as file:
            words = file.read(200).split()
        return len(words) > 3 and int(words[2], 16) == _F_OFD_SETLKW
    except (OSError, ValueError):
        return False
