"""The wait for the next request: trio, with its two costly steps replaced.

pyfuse3 runs several worker tasks.  One worker at a time holds a lock, waits until the FUSE
descriptor is readable, and reads one request.  It then releases the lock and handles the request.
On plain trio each of these two steps passes through trio's scheduler.  That costs more than the
rest of a request.  pyfuse3 reaches trio only through its module attribute ``trio``, which its own
asyncio mode replaces too.  A `Loop` in that place changes both steps:

- **the lock** (`ReadLock`): a worker takes a free lock without a scheduling point.  A release does
  not wake another worker, because the same worker usually reads the next request.  It wakes another
  one only if its handler pauses (`Loop.pause`) or if it ends.  Nothing else in a handler suspends.
- **the wait**: the worker asks the kernel first.  Then it asks again for 50 us, but not on a single
  CPU, where the client could not run meanwhile.  Then it blocks in poll(2) for 5 ms, and then it
  waits in trio.  Without requests it stays in trio, so an idle mount costs nothing.

If `kernel_frontend` reads requests (`answer_first`), it answers them inside the wait.  To ask is
then to read the request itself.  The wait ends with a request that it leaves to pyfuse3.

Other tasks (signals, the upkeep) get a turn by a forced checkpoint when a `Budget` is spent.

States of a worker: *parked* (another one holds the lock) -> *reading* (it holds the lock) ->
*handling* (it does not) -> *reading* or *parked* again.  Invariant: while a worker exists outside a
pause, one worker holds the lock or is about to take it.

A worker survives two events that would end pyfuse3's main loop.  It logs an exception that escapes
from a handler, and goes on.  If the kernel withdraws a request between poll(2) and read(2), because
its process was killed, the read fails with EAGAIN: the descriptor is non-blocking.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol

import pyfuse3
import trio

from ivshmemfs.errors import MountError
from ivshmemfs.fuse import protocol
from ivshmemfs.fuse.budget import Budget

log = logging.getLogger(__name__)

#: Busy polling after a request, in seconds; none on a single CPU.
SPIN_SECONDS = 50e-6
#: Maximum time that an idle worker blocks in poll(2), in milliseconds; it delays all other tasks.
NAP_MILLISECONDS = 5
#: Number of failures, each less than 1 s after the last, after which a worker ends.
MAX_FAILURES = 100


@types.coroutine
def _nothing() -> Generator[Any, Any, None]:
    return
    yield


#: A completed awaitable.  An exhausted generator can be awaited any number of times.  It costs a
#: quarter of an object with __await__, and a sixth of a coroutine.
_DONE: Awaitable[None] = _nothing()
with suppress(StopIteration):
    _DONE.send(None)  # type: ignore[attr-defined]


class Requests(Protocol):
    """A front end that reads requests before pyfuse3 does."""

    def serve(self, budget: Budget, spin: int, nap: int) -> memoryview | None:
        """Answer requests; return one that is for pyfuse3, or None.

        None: *budget* is spent, or no request came within *spin* ns and then *nap* ms.
        Raises the OSError of read(2).
        """

    def hand_on(self, request: memoryview) -> None:
        """Let pyfuse3 read *request* next."""

    def pump(self) -> None:
        """Forward the answers of pyfuse3 to the kernel."""


class ReadLock:
    """The lock under which one worker at a time reads; see the module's docstring.

    A worker that takes the lock calls *before_entry* first; it has answered its last request.
    """

    __slots__ = ("_held", "_parked", "before_entry", "budget")

    def __init__(self) -> None:
        self.before_entry: Callable[[], None] | None = None
        self._held = False
        self.budget = Budget()
        self._parked = trio.lowlevel.ParkingLot()

    def __aenter__(self) -> Awaitable[None]:
        if self.before_entry is not None:
            self.before_entry()
        budget = self.budget
        left = budget.left
        # Only every eighth request reads the clock.
        if self._held or (not left & 7 and (left <= 0 or time.monotonic() > budget.ends)):
            return self._enter()
        budget.left = left - 1
        self._held = True
        return _DONE

    def __aexit__(self, *_error: object) -> Awaitable[None]:
        self._held = False
        return _DONE

    async def _enter(self) -> None:
        if not self._held:
            await trio.lowlevel.checkpoint()
            self.budget.renew()
        while self._held:
            await self._parked.park()
        self.budget.left -= 1
        self._held = True

    def pass_on(self) -> None:
        """Wake one parked worker, because the caller will not read the next request."""
        self._parked.unpark()


class Loop:
    """Replaces the module ``trio`` inside pyfuse3.

    The loop calls *before_wait* with the FUSE descriptor before each wait until it returns True;
    that call opens the connection (see `connection`).  With *polling* False plain trio waits, for
    comparison.
    """

    ClosedResourceError = trio.ClosedResourceError

    def __init__(self, before_wait: Callable[[int], bool], *, polling: bool = True) -> None:
        self.polling = polling
        self.lowlevel = self  # pyfuse3 asks for trio.lowlevel.<name>
        self._before_wait = before_wait
        self._read_lock = ReadLock()
        self._pauses = 0
        self._fd = -1
        self._first: Requests | None = None
        self._nursery: trio.Nursery | None = None
        self._closing = False
        self._spin = _useful_spin()
        self._ready: Callable[[], bool] = lambda: False
        #: Wait until the descriptor has a request or reports the end of the connection.
        self.wait_readable: Callable[[int], Awaitable[None]] = self._wait_while_opening

    def __getattr__(self, name: str) -> Any:
        """Return trio's attribute of that name; this class replaces only some of them."""
        found = getattr(trio.lowlevel, name, None)
        return found if found is not None else getattr(trio, name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let pyfuse3 use this loop inside a ``with`` block."""
        setattr(pyfuse3, "trio", self)
        try:
            yield
        finally:
            setattr(pyfuse3, "trio", trio)

    def answer_first(self, requests: Requests, fd: int) -> None:
        """Let *requests* read from *fd* and answer; pyfuse3 gets only the rest."""
        self._first = requests
        self._read_lock.before_entry = requests.pump
        self._fd = fd

    def adapt(self) -> None:
        """Adapt the polling to the number of CPUs that the daemon may use now."""
        spin = _useful_spin()
        if spin != self._spin and self._fd >= 0 and self.polling:
            self._spin = spin
            self._choose_wait()

    def spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run *task* beside the workers."""
        if self._nursery is not None:
            self._nursery.start_soon(task)

    # --- the interface of trio that pyfuse3 uses --------------------------------------------

    def Lock(self) -> Any:
        """The lock that the workers share."""
        return self._read_lock if self.polling else trio.Lock()

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[Workers]:
        """Open the nursery of the workers."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            yield Workers(nursery, self)

    def notify_closing(self, fd: int) -> None:
        """End all waits for a request; pyfuse3 calls this at the end of its loop."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)
        if self._fd >= 0 and self._fd != fd:
            trio.lowlevel.notify_closing(self._fd)

    @property
    def closing(self) -> bool:
        """Whether no more requests are read."""
        return self._closing

    def _wait_while_opening(self, fd: int) -> Awaitable[None]:
        """Wait while the connection is not open; then replace `wait_readable`."""
        if not self._before_wait(fd):
            return trio.lowlevel.wait_readable(fd)
        if self._first is None:
            os.set_blocking(fd, False)
            self._fd = fd
        self._choose_wait()
        return self.wait_readable(fd)

    def _choose_wait(self) -> None:
        if not self.polling:
            self.wait_readable = trio.lowlevel.wait_readable
        elif self._first is not None:
            self.wait_readable = self._wait_answering
        else:
            self._ready = self._polling()
            self.wait_readable = self._wait

    def _polling(self) -> Callable[[], bool]:
        """Return a function that polls and blocks briefly and returns whether there is a request.

        It fits the number of CPUs.  It is a closure, because it runs for each request.
        """
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        ready, clock, spin = poll.poll, time.monotonic, self._spin

        def nap() -> bool:
            return bool(ready(0 if self._pauses else NAP_MILLISECONDS))

        def spin_and_nap() -> bool:
            if ready(0):
                return True
            end = clock() + spin
            while clock() < end:
                if ready(0):
                    return True
            return nap()

        return spin_and_nap if spin else nap

    def _wait(self, fd: int) -> Awaitable[None]:
        return _DONE if self._ready() else self._wait_in_trio(fd)

    async def _wait_answering(self, _fd: int) -> None:
        """Answer requests until one is for pyfuse3.

        Raises ClosedResourceError at the end of the connection; that ends the worker.
        """
        requests, budget = self._first, self._read_lock.budget
        assert requests is not None
        while not self._closing:
            try:
                nap = 0 if self._pauses else NAP_MILLISECONDS
                request = requests.serve(budget, int(self._spin * 1e9), nap)
            except OSError as error:
                if error.errno in protocol.ENDED:
                    break
                raise
            if request is not None:
                requests.hand_on(request)
                return
            if budget.left > 0:
                await self._wait_in_trio(self._fd)
            else:
                await trio.lowlevel.checkpoint()
                budget.renew()
        pyfuse3.terminate()
        raise trio.ClosedResourceError

    async def _wait_in_trio(self, fd: int) -> None:
        await trio.lowlevel.wait_readable(fd)
        self._read_lock.budget.renew()

    # --- the interface for the rest of this package -----------------------------------------

    async def pause(self, seconds: float) -> None:
        """Sleep inside a request handler; another worker reads meanwhile."""
        self._pauses += 1
        self._read_lock.pass_on()
        try:
            await trio.sleep(seconds)
        finally:
            self._pauses -= 1

    def worker_ended(self) -> None:
        """Wake another worker, because the caller ends."""
        if self._first is not None:
            self._first.pump()
        self._read_lock.pass_on()


def _useful_spin() -> float:
    """Return the seconds of busy polling: 0 on a single CPU, where the client could not run."""
    return SPIN_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0


class Workers:
    """The nursery in which pyfuse3 starts its workers; it supervises each worker."""

    def __init__(self, nursery: trio.Nursery, loop: Loop) -> None:
        self._nursery = nursery
        self._loop = loop

    def start_soon(self, worker: Callable[..., Awaitable[None]], *args: Any, name: str) -> None:
        """Start *worker* with the arguments that pyfuse3 passes."""
        self._nursery.start_soon(self._supervise, worker, args, name=name)

    async def _supervise(self, worker: Callable[..., Awaitable[None]], args: Any) -> None:
        """Run *worker* until it returns; log the exception of a single request and go on.

        Raises MountError if the connection cannot be opened.  Raises the worker's error after
        MAX_FAILURES in a row, which mean that the FUSE descriptor itself fails.
        """
        failures = 0
        last_failure = 0.0
        try:
            while True:
                try:
                    await worker(*args)
                    return
                except MountError:
                    raise
                except Exception as error:
                    if _withdrawn(error):
                        continue
                    if isinstance(error, OSError) and error.errno in protocol.ENDED:
                        return
                    now = time.monotonic()
                    failures = failures + 1 if now - last_failure < 1.0 else 1
                    last_failure = now
                    if failures >= MAX_FAILURES:
                        raise
                    log.error("a request failed outside of its handler", exc_info=error)
        finally:
            self._loop.worker_ended()


def _withdrawn(error: Exception) -> bool:
    """Return whether the kernel withdrew a request before the read: its process was killed."""
    return isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR)
