"""`Client.lock`: a lock on a file that excludes all other machines, and other threads.

    FREE     `acquire` takes it; so may any peer
    HELD     until `release`, or the end of the client
    LOST     this machine was silent for so long that another peer took it; `check` raises EIO

The engine's record on the inode decides (`engine/locks.py`); `ivshmemfs lock` uses the same one.
The client's upkeep thread shows life.
"""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ivshmemfs.api.file import open_handle
from ivshmemfs.errors import LockLost

if TYPE_CHECKING:
    from ivshmemfs.api.client import Client
    from ivshmemfs.engine import FileLock as EngineLock
    from ivshmemfs.engine import Filesystem, Handle

#: Seconds between two looks at a lock that another holds: the first, and at most.
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.05
#: Seconds of a sleep until a ring: a holder that dies does not ring.
LIVENESS = 0.5


class FileLock:
    """A lock on one file of a region; a context manager.  Not recursive."""

    def __init__(self, client: Client, path: str) -> None:
        self._client = client
        self._session = client.session
        self._path = path
        self._lock: EngineLock | None = None
        self._handle: Handle | None = None

    @property
    def held(self) -> bool:
        """Whether `acquire` took the lock and `release` did not give it back; it may be lost."""
        return self._lock is not None

    def acquire(self, timeout: float | None = None) -> bool:
        """Take the lock; returns False after `timeout` seconds.  None waits for ever.

        Makes the file if it does not exist.  Raises RuntimeError when this object holds the lock.
        """
        if self._lock is not None:
            raise RuntimeError("this lock is held already; it is not recursive")
        flags, me = os.O_RDONLY | os.O_CREAT, self._client.context
        handle, _ = self._session.call(
            lambda fs: open_handle(fs, self._path, flags, 0o666, me), self._path
        )
        try:
            lock = self._wait(handle.ino, timeout)
        except BaseException:
            self._session.release(handle)
            raise
        if lock is None:
            self._session.release(handle)
            return False
        self._lock, self._handle = lock, handle
        return True

    def _wait(self, ino: int, timeout: float | None) -> EngineLock | None:
        from ivshmemfs.engine import FileLock as EngineLock

        end = None if timeout is None else time.monotonic() + timeout
        pause = FIRST_WAIT

        def attempt(fs: Filesystem) -> EngineLock | None:
            lock = EngineLock(fs, fs.locks, ino)
            return lock if lock.acquire() else None

        while True:
            word = self._session.call(lambda fs: fs.commit_word())
            if (lock := self._session.call(attempt, self._path)) is not None:
                return lock
            left = LIVENESS if end is None else min(end - time.monotonic(), LIVENESS)
            if left <= 0:
                return None
            if pause == LONGEST_WAIT and self._session.sleep(word, left):
                if self._session.call(lambda fs: fs.commit_word()) != word:
                    pause = FIRST_WAIT  # commits come in rows
                continue
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_WAIT)

    def check(self) -> None:
        """Raise OSError EIO unless the lock is still held; call it before what must not race."""
        lock = self._lock

        def look(_fs: Filesystem) -> None:
            if lock is None:
                raise LockLost("the lock is not held")
            lock.keep()

        self._session.call(look, self._path)

    def release(self) -> None:
        """Give the lock back; harmless when it is lost or not held."""
        lock, handle = self._lock, self._handle
        self._lock = self._handle = None
        if lock is not None and not self._session.closed:
            self._session.call(lambda _fs: lock.release(), self._path)
        if handle is not None:
            self._session.release(handle)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.release()
