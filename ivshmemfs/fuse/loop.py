"""How the daemon waits for the next request: trio, with its two costly steps replaced.

pyfuse3 runs several worker tasks.  One at a time holds a lock, waits until the FUSE descriptor is
readable and reads one request; then it lets go of the lock and handles the request.  On plain trio
each of these two steps ends in a trip through trio's scheduler, which costs more than everything
else that a request needs.  pyfuse3 reaches trio through its module attribute ``trio`` alone (its
own asyncio mode replaces that attribute too), so a `Loop` put there changes both steps:

- **the lock** (`ReadLock`) is taken without a scheduling point when nobody holds it, and it is not
  handed on when it is released: the worker that has just answered usually reads the next request
  itself.  Another worker is woken only when the first one cannot go on, which is when its handler
  pauses (`Loop.pause`) or the worker ends.  Nothing else in a handler suspends.
- **the wait** asks the kernel first, then polls for about 50 us (not on a single CPU, where that
  would keep the client from running), then blocks in poll(2) for a few milliseconds, and only then
  goes to trio.  With no requests coming, all the time is spent in trio: idle costs nothing.

Where `kernel_frontend` reads requests (`answer_first`), a wait is the time until a request comes
that is left to pyfuse3: all others are answered on the way.

Other tasks (signals, the once-a-second upkeep) get their turn by a forced checkpoint after 64
requests or 2 ms.

States of a worker: *parked* (another one holds the lock) -> *reading* (holds the lock) ->
*handling* (does not) -> *reading* or *parked* again.  Invariant: while any worker exists that is
not in a pause, one of them holds the lock or is on its way to take it.

A worker also survives what would end pyfuse3's main loop: an exception that escapes from request
handling is logged and the worker goes on, and a request that vanished between poll(2) and read(2)
(its process was killed) ends in EAGAIN, because the descriptor is non-blocking, instead of in a
read that blocks the whole process.
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

log = logging.getLogger(__name__)

#: Requests handled in a row before other tasks get a turn.
REQUESTS_PER_TURN = 64
#: Seconds after which other tasks get a turn, however few requests there were.
SECONDS_PER_TURN = 0.002
#: Seconds of busy polling after a request, when there is a second CPU.
SPIN_SECONDS = 50e-6
#: Milliseconds that a worker may block in poll(2), and so delay every other task, when idle.
NAP_MILLISECONDS = 5
#: Failures, less than a second apart, after which a worker gives up.
MAX_FAILURES = 100


@types.coroutine
def _nothing() -> Generator[Any, Any, None]:
    return
    yield


#: An awaitable that is done.  An exhausted generator may be awaited again and again, and costs a
#: quarter of an object with __await__, a sixth of a coroutine.
_DONE: Awaitable[None] = _nothing()
with suppress(StopIteration):
    _DONE.send(None)  # type: ignore[attr-defined]


class Requests(Protocol):
    """Whoever reads requests before pyfuse3 does."""

    def serve(self) -> memoryview | None:
        """Read one request; returns it when it is for pyfuse3.  Raises OSError as read(2) does."""

    def hand_on(self, request: memoryview) -> None:
        """Let pyfuse3 read *request* next."""

    def pump(self) -> None:
        """Pass on what pyfuse3 has answered."""


class ReadLock:
    """The lock that makes one worker at a time read; see the module's comment.

    *before_entry* is called when a worker comes, having answered what it read before.
    """

    __slots__ = ("_held", "_parked", "_requests_left", "_turn_ends", "before_entry")

    def __init__(self) -> None:
        self.before_entry: Callable[[], None] | None = None
        self._held = False
        self._requests_left = REQUESTS_PER_TURN
        self._turn_ends = 0.0
        self._parked = trio.lowlevel.ParkingLot()

    def __aenter__(self) -> Awaitable[None]:
        if self.before_entry is not None:
            self.before_entry()
        left = self._requests_left
        # The clock is looked at after every eighth request only.
        if self._held or (not left & 7 and (left <= 0 or time.monotonic() > self._turn_ends)):
            return self._enter()
        self._requests_left = left - 1
        self._held = True
        return _DONE

    def __aexit__(self, *_error: object) -> Awaitable[None]:
        self._held = False
        return _DONE

    async def _enter(self) -> None:
        if not self._held:
            await trio.lowlevel.checkpoint()
            self.new_turn()
        while self._held:
            await self._parked.park()
        self._requests_left -= 1
        self._held = True

    def turn_is_over(self) -> bool:
        """Count a request; whether it is time that other tasks get their chance to run."""
        self._requests_left = left = self._requests_left - 1
        return not left & 7 and (left <= 0 or time.monotonic() > self._turn_ends)

    def new_turn(self) -> None:
        """Note that every other task has just had its chance to run."""
        self._requests_left = REQUESTS_PER_TURN
        self._turn_ends = time.monotonic() + SECONDS_PER_TURN

    def pass_on(self) -> None:
        """Wake one parked worker, because the caller will not read the next request."""
        self._parked.unpark()


class Loop:
    """Stands in for the module ``trio`` inside pyfuse3.

    *before_wait* is called with the FUSE descriptor before each wait until it returns True: the
    place where the connection is set up (see `connection`).  With *polling* False everything else
    is left to plain trio, for comparison.
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
        #: Returns when the descriptor has a request, or an end, to report.
        self.wait_readable: Callable[[int], Awaitable[None]] = self._wait_while_opening

    def __getattr__(self, name: str) -> Any:
        """Whatever is not replaced here is trio's."""
        found = getattr(trio.lowlevel, name, None)
        return found if found is not None else getattr(trio, name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let pyfuse3 use this loop for the length of a ``with`` block."""
        setattr(pyfuse3, "trio", self)
        try:
            yield
        finally:
            setattr(pyfuse3, "trio", trio)

    def answer_first(self, requests: Requests, fd: int) -> None:
        """Let *requests*, which reads from *fd*, answer what it can before pyfuse3 sees it."""
        self._first = requests
        self._read_lock.before_entry = requests.pump
        self._fd = fd

    def adapt(self) -> None:
        """Look again at what may change while the daemon runs: the CPUs that it may use."""
        spin = _useful_spin()
        if spin != self._spin and self._fd >= 0 and self.polling:
            self._spin = spin
            self._choose_wait()

    def spawn(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run *task* beside the workers."""
        if self._nursery is not None:
            self._nursery.start_soon(task)

    # --- what pyfuse3 calls ---------------------------------------------------------------

    def Lock(self) -> Any:
        """The lock that the workers share."""
        return self._read_lock if self.polling else trio.Lock()

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[Workers]:
        """A nursery whose tasks are the workers."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            yield Workers(nursery, self)

    def notify_closing(self, fd: int) -> None:
        """pyfuse3 ends its loop: whoever waits for a request shall end too."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)
        if self._fd >= 0 and self._fd != fd:
            trio.lowlevel.notify_closing(self._fd)

    @property
    def closing(self) -> bool:
        """Whether no more requests are read."""
        return self._closing

    def _wait_while_opening(self, fd: int) -> Awaitable[None]:
        """The wait until the connection is open; then another one takes its place."""
        if not self._before_wait(fd):
            return trio.lowlevel.wait_readable(fd)
        if self._first is None:
            os.set_blocking(fd, False)
            self._fd = fd
        self._choose_wait()
        return self.wait_readable(fd)

    def _choose_wait(self) -> None:
        self._ready = self._polling()
        if not self.polling:
            self.wait_readable = trio.lowlevel.wait_readable
        elif self._first is not None:
            self.wait_readable = self._wait_answering
        else:
            self.wait_readable = self._wait

    def _polling(self) -> Callable[[], bool]:
        """Whether there is a request, after a wait that blocks all else but not for long.

        For the CPUs that there are: a closure, because it runs for each request.
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
        """Answer requests until there is one for pyfuse3.

        Raises ClosedResourceError, which ends the worker, when the connection has ended.
        """
        requests, read_lock, device = self._first, self._read_lock, self._fd
        assert requests is not None
        while not self._closing:
            if not self._ready():
                await self._wait_in_trio(device)
            elif read_lock.turn_is_over():
                await trio.lowlevel.checkpoint()
                read_lock.new_turn()
            try:
                request = requests.serve()
            except OSError as error:
                if error.errno in protocol.ENDED:
                    break
                if not _withdrawn(error):
                    raise
            else:
                if request is not None:
                    requests.hand_on(request)
                    return
        pyfuse3.terminate()
        raise trio.ClosedResourceError

    async def _wait_in_trio(self, fd: int) -> None:
        await trio.lowlevel.wait_readable(fd)
        self._read_lock.new_turn()

    # --- what the rest of this package calls ----------------------------------------------

    async def pause(self, seconds: float) -> None:
        """Sleep inside a request handler while other workers take over the reading."""
        self._pauses += 1
        self._read_lock.pass_on()
        try:
            await trio.sleep(seconds)
        finally:
            self._pauses -= 1

    def worker_ended(self) -> None:
        """Somebody else must read from now on."""
        if self._first is not None:
            self._first.pump()
        self._read_lock.pass_on()


def _useful_spin() -> float:
    """Seconds of busy polling: none on a single CPU, where the client could not run meanwhile."""
    return SPIN_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0


class Workers:
    """The nursery that pyfuse3 starts its workers in; each is supervised."""

    def __init__(self, nursery: trio.Nursery, loop: Loop) -> None:
        self._nursery = nursery
        self._loop = loop

    def start_soon(self, worker: Callable[..., Awaitable[None]], *args: Any, name: str) -> None:
        """Start *worker*; the arguments are what pyfuse3 passes to each."""
        self._nursery.start_soon(self._supervise, worker, args, name=name)

    async def _supervise(self, worker: Callable[..., Awaitable[None]], args: Any) -> None:
        """Run *worker* until it ends by itself, whatever exceptions a single request causes.

        Raises MountError when the connection could not be set up, and the worker's own error
        when it fails again and again, which means that the FUSE descriptor itself fails.
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
    """Whether a request was taken back before it was read, because its process was killed."""
    return isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR)
