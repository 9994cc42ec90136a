"""`Client.queue`: records between programs on all machines (see `shm/queue.py`).

A work queue gives each record to exactly one reader, oldest first.  A broadcast shows each record
to all readers; one that is slower than the writers loses the oldest, and is told how many.

While a call waits, it is in one of these states, by the time since it began:

    awake    SPIN seconds: it looks without a nap, and lets other threads run
    drowsy   naps that become longer, as `nap_after` says
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from ivshmemfs.api.closing import Closing
from ivshmemfs.api.mapped_file import MappedFile
from ivshmemfs.errors import FsError
from ivshmemfs.format import queue as fmt
from ivshmemfs.shm.queue import Reader, await_cell

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from ivshmemfs.api.client import Client
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.engine.messages import Messages

T = TypeVar("T")
#: Records of a new queue, and the most bytes of one.
RECORDS: Final = 256
RECORD_SIZE: Final = 4096
#: Seconds between two looks at whether the region still is what was opened.
CONDITION_SECONDS: Final = 1.0
#: Seconds without a free buffer after which `put` says so: many writers at once take less.
CLAIMED_SECONDS: Final = 1.0


class Queue(Closing):
    """A queue in a file; a context manager.  Thread-safe.

    `put` and `get` raise `queue.Full` and `queue.Empty` of the standard library when their time is
    over.  Both raise OSError: EUCLEAN for a damaged queue, ESTALE when the region was replaced, or
    when the file was released while this peer was evicted.
    """

    def __init__(
        self,
        client: Client,
        path: str,
        records: int,
        record_size: int,
        broadcast: bool | None,
        replay: bool,
    ) -> None:
        self._session = client.session
        self._memory = client.session.region.memory
        self.path: Final = path
        kind = fmt.BROADCAST if broadcast else fmt.WORK
        plan = fmt.plan(kind, record_size, records)
        # A reader makes nothing.
        size = None if client.readonly else plan.size
        try:
            self._file = MappedFile(client, path, size, head=fmt.encode(plan), any_size=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            text = "it is no queue: give the queue a new name"
            raise OSError(errno.EINVAL, text, path) from error
        try:
            messages = self._session.call(self._open, path)
            if broadcast is not None and messages.ring.is_broadcast != broadcast:
                found = "a broadcast" if messages.ring.is_broadcast else "a work queue"
                raise FileExistsError(errno.EEXIST, f"it is there already, as {found}", path)
        except BaseException:
            self._file.close()
            raise
        self._messages = messages
        self._ring = messages.ring
        self.broadcast: Final = messages.ring.is_broadcast
        self.records: Final = messages.ring.geometry.cells
        self.record_size: Final = messages.ring.geometry.record
        self._turn = threading.Lock()  # around the place in a broadcast
        self._claimed_since = 0.0  # when `put` first met no free buffer, without one since; or 0
        self._reader = Reader(self._ring, replay=replay)

    def _open(self, fs: Filesystem) -> Messages:
        return fs.messages(self._file.ino)

    def __repr__(self) -> str:
        kind = "broadcast" if self.broadcast else "work"
        return f"<Queue {self.path!r}: {kind}, {self.records} records of {self.record_size} bytes>"

    @property
    def lost(self) -> int:
        """Records of a broadcast that this reader missed, because it was too slow."""
        return self._reader.lost

    def close(self) -> None:
        """Let go of the file; once."""
        self._file.close()

    def __del__(self) -> None:
        """Let go of the file, which others could not release otherwise."""
        file: MappedFile | None = getattr(self, "_file", None)  # None: it was never opened
        if file is not None:
            with suppress(OSError):
                file.close()

    # --- putting and getting ----------------------------------------------------------------------

    def put(self, record: ReadableBuffer, timeout: float | None = None) -> None:
        """Put a record; when it has returned, every reader on every machine can get it.

        Waits while a work queue is full: for ever, or up to `timeout` seconds, then it raises
        queue.Full.  A broadcast never waits for readers.  Raises OSError: EMSGSIZE for a record
        that is too long, EROFS if the client only reads.  ENOBUFS means that writers that stopped
        amid a `put` have all free buffers.
        """
        # bytes(5) would be five zeros.
        content = record if isinstance(record, bytes) else bytes(memoryview(record))
        if self._insert(content):
            return
        end = _end_of(timeout)
        waiting = _Waiting(self)
        while True:
            at = self._ring.cell_at(self._ring.tail)
            word = self._memory.load(at)
            if self._insert(content):
                return
            if not waiting.wait(at, word, end):
                raise queue.Full

    def _insert(self, content: bytes) -> bool:
        try:
            done = self._call(lambda: self._messages.put(content))
        except OSError as error:
            now = time.monotonic()
            self._claimed_since = self._claimed_since or now
            if error.errno != errno.ENOBUFS or now - self._claimed_since > CLAIMED_SECONDS:
                raise
            return False
        self._claimed_since = 0.0
        return done

    def get(self, timeout: float | None = None) -> bytes:
        """Return the next record: of a work queue the oldest, which no other reader gets.

        Of a broadcast it is the first that was put after this object was made, then the one after
        it.  Waits for ever, or up to `timeout` seconds, then it raises queue.Empty.
        """
        record = self._next_record()
        if record is not None:
            return record
        end = _end_of(timeout)
        waiting = _Waiting(self)
        while True:
            at = self._ring.cell_at(self._reader.number)
            word = self._memory.load(at)
            record = self._next_record()
            if record is not None:
                return record
            if not waiting.wait(at, word, end):
                raise queue.Empty

    def __iter__(self) -> Iterator[bytes]:
        """Get records for ever."""
        while True:
            yield self.get()

    def _next_record(self) -> bytes | None:
        if not self.broadcast:
            return self._call(self._messages.take)
        with self._turn:
            try:
                return self._call(lambda: self._reader.next(self._messages))
            except OSError as error:
                if error.errno == errno.EUCLEAN:
                    self._reader.skip()
                raise

    def _call(self, action: Callable[[], T]) -> T:
        if self._file.closed:
            raise ValueError("the queue is closed")
        self._file.refuse_lost()
        try:
            return self._session.call(lambda _fs: action(), self.path)
        except OSError as error:
            if error.errno == errno.EUCLEAN:
                self.check()  # the bytes may be another file's
            raise

    def check(self) -> None:
        """Raise OSError ESTALE unless the region and the file are those that were opened."""
        from ivshmemfs.region import Condition

        def look(fs: Filesystem) -> None:
            found = fs.condition()
            if found not in (Condition.SOUND, Condition.RENAMED):
                raise FsError(errno.ESTALE, found.explained)
            self._file.look_again(fs)

        self._session.call(look, self.path)
        self._file.refuse_lost()


class _Waiting:
    """One call that waits."""

    def __init__(self, owner: Queue) -> None:
        self._queue = owner
        self._memory = owner._memory
        self._began = time.monotonic()
        self._next_check = self._began + CONDITION_SECONDS

    def wait(self, at: int, word: int, end: float) -> bool:
        """Wait until the word at `at` is not `word`, or for a while; False when `end` has come."""
        now = time.monotonic()
        if now >= end:
            return False
        if now >= self._next_check:
            self._queue.check()
            self._next_check = now + CONDITION_SECONDS
        until = min(end, self._next_check)
        await_cell(self._memory, at, word, self._began, until, time.monotonic)
        return True


def _end_of(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout
