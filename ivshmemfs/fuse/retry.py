"""What happens to an operation that does not succeed at once: one policy for both front ends.

Busy          `briefly` tries again for BRIEF_SECONDS: the commit of another peer usually takes
              less time than switching to another request
still Busy    `patiently` pauses between attempts, while other requests are served
Unfinished    the operation has used up its turn, and goes on with `patiently`; each turn is
              progress, so the patience starts again
too late      PATIENCE has passed, or the mount ends: what was done so far, or EIO
other errors  `errno_of` says what the caller gets, and logs what nobody expects
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

#: Seconds for which `briefly` tries again; it spins for the first SPIN_SECONDS and then sleeps
#: between the attempts, from FIRST_NAP to LONGEST_NAP.
BRIEF_SECONDS = 0.0015
SPIN_SECONDS = 40e-6
FIRST_NAP = 0.0001
LONGEST_NAP = 0.001
#: Seconds that `patiently` pauses: before its first attempt, and at most between later ones.
FIRST_DELAY = 0.001
LONGEST_DELAY = 0.005
#: Seconds after which a busy operation fails.  It fails with EIO, which programs know as the end
#: of an operation.  EAGAIN tells many of them to wait until the file is readable, which it is.
PATIENCE = 10.0

#: Errors that point to damage or a dead region: the log must name them.
_ALARMING = frozenset((errno.EUCLEAN, errno.EIO, errno.EFAULT, errno.ENODEV))

T = TypeVar("T")


class Refused(Exception):
    """An operation fails with `errno`; the log has what is to be said about it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.errno = code


def errno_of(operation: str, error: Exception) -> int:
    """The errno that the caller of *operation* gets for *error*; logs what nobody expects."""
    if isinstance(error, Refused | LockLost):  # the log has what is to be said of it
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
        log.error("%s: %s", operation, error)  # the region was truncated, or its device is gone
        return errno.EIO
    log.error("%s: unexpected %s", operation, type(error).__name__, exc_info=error)
    return errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO


class Retry:
    """Tries operations of *fs* again.

    *pause* sleeps for some seconds while other requests are served.
    """

    def __init__(self, fs: Filesystem, pause: Callable[[float], Awaitable[None]]) -> None:
        self._fs = fs
        self._pause = pause
        #: Set when the mount is ending: operations that wait fail now.
        self.ending = False

    async def complete(self, operation: str, call: Callable[[], T]) -> T:
        """The result of *call*, tried until it succeeds; raises what is not Busy."""
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
        """Try *call*, which ended in *busy*, again for BRIEF_SECONDS; raises the last Busy."""
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
        """Short waits, one before each attempt.

        A commit takes less time than going to sleep and waking up, so the daemon spins while a
        peer on another CPU commits.  That peer may also be waiting for this CPU, hence the naps.
        They grow: each vain attempt takes time away from the peers that commit.
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
        """Try *call*, which ended in *busy*, again while other requests are served.

        Where it ends early, what it did so far is its result, if that is one: also for a caller
        that is interrupted.  Else raises Refused when it is too late, and what is not Busy.
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
            if not self.ending and not isinstance(busy, UnderRepair):  # of which the upkeep tells
                log.error("%s: still busy after %.0f s: %s", operation, PATIENCE, busy)
            raise Refused(errno.EIO)
