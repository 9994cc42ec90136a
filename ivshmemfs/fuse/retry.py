"""The retry policy of both front ends.

An attempt ends in one of these:

    Busy          `briefly` retries for BRIEF_SECONDS: another peer's commit usually takes less
                  time than a switch to another request
    still Busy    `patiently` pauses between attempts; other requests run meanwhile
    Unfinished    the operation has used up its turn and continues in `patiently`; each turn is
                  progress, so PATIENCE starts again
    too late      PATIENCE has passed, or the mount ends: the partial result, or EIO
    other errors  `errno_of` returns the caller's errno and logs unexpected errors
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from ivshmemfs.errors import (
    Busy,
    FsError,
    IvshmemfsError,
    LockLost,
    UnderRepair,
    Unfinished,
)
from ivshmemfs.fuse.protocol import MAX_ERRNO

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

log = logging.getLogger(__name__)

#: Retry budget of `briefly`, in seconds: it spins for the first SPIN_SECONDS, then sleeps between
#: the attempts, from FIRST_NAP to LONGEST_NAP.
BRIEF_SECONDS = 0.0015
SPIN_SECONDS = 40e-6
FIRST_NAP = 0.0001
LONGEST_NAP = 0.001
#: Pauses of `patiently`, in seconds: before its first attempt, and the maximum between later ones.
FIRST_DELAY = 0.001
LONGEST_DELAY = 0.005
#: Seconds after which a busy operation fails with EIO.  EAGAIN would tell many programs to wait
#: until the file is readable, and it always is.
PATIENCE = 10.0

#: Errors that point to damage or a dead region; they are always logged.
_ALARMING = frozenset((errno.EUCLEAN, errno.EIO, errno.EFAULT, errno.ENODEV))

T = TypeVar("T")


class Refused(Exception):
    """An operation fails with `errno`; the log has what is to be said about it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.errno = code


def errno_of(operation: str, error: Exception) -> int:
    """Return the errno for the caller of *operation*; log an unexpected *error*."""
    if isinstance(error, Refused | LockLost):  # the log has the cause already
        return error.errno
    if isinstance(error, IvshmemfsError):
        code = error.errno
        if code in _ALARMING or not isinstance(error, FsError):
            log.error("%s: %s", operation, error)
        if 0 < code <= MAX_ERRNO:  # 0 would mean success
            return code
        log.error("%s: an error with the impossible errno %d", operation, code)
        return errno.EIO
    if isinstance(error, OSError) and error.errno == errno.EIO:
        log.error("%s: %s", operation, error)  # a truncated region, or a removed device
        return errno.EIO
    log.error("%s: unexpected %s", operation, type(error).__name__, exc_info=error)
    return errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO


class Retry:
    """Retries operations of *fs*; *pause* sleeps while other requests run."""

    def __init__(self, fs: Filesystem, pause: Callable[[float], Awaitable[None]]) -> None:
        self._fs = fs
        self._pause = pause
        #: Set at the end of the mount: waiting operations then fail.
        self.ending = False

    async def complete(self, operation: str, call: Callable[[], T]) -> T:
        """Call *call* until it succeeds; return its result.  Raises errors other than Busy."""
        try:
            return call()
        except Busy as error:
            busy = error
        try:
            return self.briefly(call, busy)
        except Busy as error:
            busy = error
        return await self.patiently(operation, call, busy)

    def briefly(self, call: Callable[[], T], busy: Busy) -> T:
        """Retry *call*, which raised *busy*, for BRIEF_SECONDS; raise the last Busy."""
        if not isinstance(busy, Unfinished):
            for _ in self._moments():
                try:
                    return call()
                except Busy as error:
                    busy = error
                    if isinstance(busy, Unfinished):
                        break
        raise busy

    def _moments(self) -> Iterator[None]:
        """Wait before each attempt, and yield.

        A commit takes less time than a sleep, so the daemon first spins while a peer commits.  That
        peer may need this CPU, so the daemon then sleeps.  The sleeps grow, because each vain
        attempt takes time from the committing peers.
        """
        now = time.monotonic()
        end = now + BRIEF_SECONDS
        awake = now + SPIN_SECONDS if len(os.sched_getaffinity(0)) > 1 else now
        nap, unexplained = FIRST_NAP, 0
        while now < end and unexplained < 2:
            unexplained += not self._fs.is_committing
            while (is_committing := self._fs.is_committing) and time.monotonic() < awake:
                pass
            if is_committing:
                time.sleep(nap * random.random())
                nap = min(nap * 3, LONGEST_NAP)
            yield
            now = time.monotonic()

    async def patiently(self, operation: str, call: Callable[[], T], busy: Busy) -> T:
        """Retry *call*, which raised *busy*, while other requests run.

        If it must stop early, it returns the partial result, also for an interrupted caller.
        Without one it raises Refused after PATIENCE.  Raises errors other than Busy.
        """
        attempt: Callable[[], Any] = call
        started = time.monotonic()
        delay = FIRST_DELAY
        so_far: Any = None
        while True:
            if isinstance(busy, Unfinished):
                attempt, so_far = busy.go_on or attempt, busy.so_far or so_far
                started, delay, pause = time.monotonic(), FIRST_DELAY, 0.0
            else:
                pause, delay = delay * random.uniform(0.5, 1.5), min(delay * 1.5, LONGEST_DELAY)
            result: T
            try:
                await self._pause(pause)
            except trio.Cancelled:
                if so_far is None:
                    raise
                result = so_far
                return result
            try:
                result = attempt()
                return result
            except Busy as error:
                busy = error
            late = not isinstance(busy, Unfinished) and time.monotonic() - started > PATIENCE
            if not late and not self.ending:
                continue
            if so_far is not None:
                result = so_far
                return result
            if not self.ending and not isinstance(busy, UnderRepair):  # the upkeep logs a repair
                log.error("%s: still busy after %.0f s: %s", operation, PATIENCE, busy)
            raise Refused(errno.EIO)
