"""The peer behind a client: one engine, one lock around it, its upkeep and its end.

    OPEN       calls run, one at a time; a thread beats for a writing peer every BEAT seconds
    CLOSED     `close` has given the slot back and unmapped the region; calls raise ValueError
    FORKED     the process is a child of the one that joined; calls raise RuntimeError, and `close`
               touches neither the slot nor the lock, which belong to the parent

`close` alone ends a session; the client's finalizer calls it at the latest.  The engine is not
thread-safe, so every call of it holds `_lock`.  A thread that waits for another peer does not hold
it.  Neither the upkeep thread nor the finalizer holds the client, so the client can be collected.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ivshmemfs.api.signals import deferred
from ivshmemfs.errors import (
    Busy,
    FsError,
    IvshmemfsError,
    RegionError,
    StaleHandle,
    UnderRepair,
    Unfinished,
)

if TYPE_CHECKING:
    from ivshmemfs.api.mapped_file import MappedFile
    from ivshmemfs.engine import Filesystem, Handle
    from ivshmemfs.region import Region
    from ivshmemfs.shm.bells import Doorbell

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two signs of life; others take 3 s without one for silence.
BEAT = 0.7
#: Seconds between two pieces of upkeep work, in which calls have a turn.
WORK_PAUSE = 0.001
#: Seconds after which a call that finds the region busy all the time raises TimeoutError.
PATIENCE = 30.0
#: Seconds between two attempts: the first pause, and the longest.
FIRST_NAP, LONGEST_NAP = 0.00005, 0.005
#: Walks of a path again after what it led to vanished on the way.
WALKS = 16
#: Seconds that the end waits for a call that is under way; a finalizer must not wait for ever.
GIVE_UP = 10.0
#: Seconds that `open` waits for the end of a repair.
REPAIR_SECONDS = 3.0


def os_error(error: IvshmemfsError | OSError, path: str | None) -> OSError:
    """Return the OSError for an error of the layers below, about `path`."""
    code = error.errno or errno.EIO
    if isinstance(error, Busy):
        code = errno.ETIMEDOUT
    text = error.strerror if isinstance(error, OSError) else str(error)
    return OSError(code, text or os.strerror(code), path)


def join(region: Region, *, readonly: bool, doorbell: Doorbell | None = None) -> Filesystem:
    """Mount `region`; waits up to REPAIR_SECONDS for the end of a repair.

    Raises UnderRepair, and what `Filesystem.mount` raises.
    """
    from ivshmemfs.engine import Filesystem

    end = time.monotonic() + REPAIR_SECONDS
    while True:
        try:
            return Filesystem.mount(region, readonly=readonly, doorbell=doorbell)
        except OSError as error:
            if short := region.shortage():
                raise RegionError(short) from error
            raise
        except UnderRepair:
            if time.monotonic() > end:
                raise
            time.sleep(LONGEST_NAP)


def _count_fork() -> None:
    global _forks
    _forks += 1


#: Calls of fork() that lead to this process.  To ask for the process at each call costs more.
_forks = 0
os.register_at_fork(after_in_child=_count_fork)


def _resumed(go_on: Callable[[], T], _fs: Filesystem) -> T:
    return go_on()


class Session:
    """One peer of a region.  Thread-safe."""

    def __init__(self, region: Region, fs: Filesystem) -> None:
        self.region = region
        self._fs = fs
        self._lock = threading.Lock()
        self._sleeping = threading.Lock()  # of the one thread that a ring wakes; others nap
        self._owner = 0  # the thread that holds the lock
        self._pid = os.getpid()
        self._forks = _forks
        self._ended = threading.Event()
        self._unreleased: list[Handle] = []  # of files that were collected during a call
        self.files: weakref.WeakSet[io.IOBase] = weakref.WeakSet()
        self.maps: weakref.WeakSet[MappedFile] = weakref.WeakSet()
        self.readonly = fs.readonly
        self._beating: threading.Thread | None = None
        if not fs.readonly:
            self._beating = threading.Thread(target=self._beat, name="ivshmemfs-beat", daemon=True)
            self._beating.start()

    # --- calls --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._ended.is_set()

    def call(
        self, action: Callable[[Filesystem], T], path: str | Callable[[], str] | None = None
    ) -> T:
        """Return what `action` returns; runs it again while the region is busy.

        `action` names what it changes by path, so it walks again when that is stale.  An operation
        that takes several commits comes last in it.  Raises OSError about `path`, or about what
        `path` returns.
        """
        try:
            return self._insist(action)
        except IvshmemfsError as error:  # an OSError is that of a signal handler
            path = path() if callable(path) else path
            if isinstance(error.__cause__, OSError) and (short := self.region.shortage()):
                raise OSError(errno.ENOSPC, short, path) from error
            raise os_error(error, path) from error

    def _insist(self, action: Callable[[Filesystem], T]) -> T:
        attempt: Callable[[Filesystem], Any] = action
        end, nap, walks = 0.0, FIRST_NAP, 0  # `end` is set when the region is busy
        while True:
            try:
                result: T = self._exclusively(attempt)
                return result
            except Unfinished as turn:
                if turn.go_on is not None:
                    attempt = partial(_resumed, turn.go_on)
                end, nap, pause = 0.0, FIRST_NAP, 0.0
            except Busy:
                end = end or time.monotonic() + PATIENCE
                if time.monotonic() > end:
                    raise
                pause, nap = nap, min(nap * 1.5, LONGEST_NAP)
            except StaleHandle:
                walks, pause = walks + 1, 0.0
                if walks > WALKS:
                    raise
            time.sleep(pause)

    def _exclusively(self, attempt: Callable[[Filesystem], T]) -> T:
        """Return what `attempt` returns, with the lock held and signals deferred.

        Raises RuntimeError, ValueError, and what `attempt` raises; FsError in place of OSError.
        """
        if self._forks != _forks:
            raise RuntimeError(
                f"process {self._pid} opened this region before fork(): a peer belongs to one "
                "process; open the region again in this one"
            )
        me = threading.get_ident()
        if self._owner == me:
            raise RuntimeError("a finalizer or callback cannot use the region during a call of it")
        return deferred(self._locked, attempt, me)

    def _locked(self, attempt: Callable[[Filesystem], T], me: int) -> T:
        with self._lock:
            self.refuse_closed()
            self._owner = me
            try:
                return attempt(self._fs)
            except OSError as error:
                raise FsError(error.errno or errno.EIO, error.strerror or str(error)) from error
            finally:
                self._owner = 0

    def sleep(self, word: int, seconds: float) -> bool:
        """Sleep until a commit rings, for `seconds` at most, while the commit word is `word`.

        Returns False at once where the caller has to nap.  See `Bells.sleep`.
        """
        bells = self._fs.bells
        if bells is None or not self._sleeping.acquire(blocking=False):
            return False
        try:
            if not self.call(lambda _fs: bells.prepare()):
                return False
            if self.call(lambda fs: fs.commit_word()) == word:
                rang = bells.await_ring(seconds)
                self.call(lambda _fs: bells.judge(word, rang))
            return True
        finally:
            self._sleeping.release()

    def refuse_closed(self) -> None:
        """Raise ValueError after `close`."""
        if self._ended.is_set():
            raise ValueError("I/O operation on a closed region")

    def release(self, handle: Handle) -> None:
        """Close an open file of the engine; after the session's end there is nothing to close."""
        if self._ended.is_set() or self._forks != _forks:
            return
        if self._owner == threading.get_ident():  # the file was collected during a call
            self._unreleased.append(handle)
            return
        with suppress(ValueError):  # another thread has closed the session
            self.call(lambda fs: fs.release(handle))

    # --- upkeep -------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Beat until the end; the upkeep thread runs it."""
        told = ""
        due = time.monotonic() + BEAT
        while not self._ended.wait(max(due - time.monotonic(), 0.0)):
            due = time.monotonic() + BEAT
            try:
                self._upkeep(self._look_at_maps)
                more = self._upkeep(lambda fs: fs.tick())
                while more and time.monotonic() < due and not self._ended.wait(WORK_PAUSE):
                    more = self._upkeep(lambda fs: fs.work())
                told = ""
            except Busy:
                pass  # the next tick retries
            except Exception as error:  # without a beat others would take this peer for dead
                if self._ended.is_set():
                    return
                if isinstance(error, StaleHandle):
                    for one in list(self.maps):
                        one.lose(str(error))
                if str(error) != told:
                    told = str(error)
                    log.error("upkeep of %s: %s", self.region.spec, told or type(error).__name__)

    def _look_at_maps(self, fs: Filesystem) -> bool:
        for one in list(self.maps):
            one.look_again(fs)
        return False

    def _upkeep(self, step: Callable[[Filesystem], bool]) -> bool:
        def run(fs: Filesystem) -> bool:
            while self._unreleased:
                with suppress(Busy):
                    fs.release(self._unreleased.pop())
            return step(fs)

        return self._exclusively(run)

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the files that are open, leave the peers and unmap the region; once."""
        if self._ended.is_set():
            return
        if self._forks != _forks:
            self._ended.set()
            return
        try:
            self._close_files()
        finally:
            self._ended.set()
            beating = self._beating
            if beating is not None and beating is not threading.current_thread():
                beating.join(GIVE_UP)
            if self._owner == threading.get_ident():
                # The last reference went during the upkeep thread's own call.
                threading.Thread(target=self._give_back, daemon=True).start()
            else:
                self._give_back()

    def _close_files(self) -> None:
        """Close all files, then raise what the first failing one raised."""
        failed: Exception | None = None
        for file in list(self.files):
            try:
                file.close()
            except (OSError, ValueError) as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _give_back(self) -> None:
        def leave() -> None:
            if not self._lock.acquire(timeout=GIVE_UP):
                return  # a call hangs: others take the slot back when this process has ended
            try:
                self._fs.unmount()
                if self._fs.bells is not None:
                    self._fs.bells.doorbell.close()
                self.region.close()
            finally:
                self._lock.release()

        deferred(leave)
