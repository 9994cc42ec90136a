"""The front end that reads requests from the FUSE descriptor and answers them without pyfuse3.

pyfuse3 costs more than the rest of a request: a coroutine, a chain of calls through libfuse, and
several copies of the bytes written.  This front end reads each request, translates it to a call of
`operations`, and answers it.  It forwards the rare requests that libfuse refuses to libfuse.
Without a descriptor to read from (see `connection`), `pyfuse3_frontend` serves all requests.

States of a request:

    read       it is in the request buffer
    answered   the kernel has the answer
    forwarded  it has no handler here; the caller of `serve` gives it to pyfuse3
    waiting    the engine was busy, or the request waits for a lock; a task answers it later, or the
               kernel sends INTERRUPT for it

A handler takes (node, caller, buffer, end of the request in the buffer).  It returns the body of
the answer, None for an empty body, ABSENT for ENOENT, or LATER when a task answers.  It raises the
engine's errors.  It reads its buffer before it returns, because the next request overwrites it.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import trio

from ivshmemfs.engine import NOW, Attr, Context
from ivshmemfs.engine.lock_table import Lock
from ivshmemfs.engine.locks import Wait
from ivshmemfs.errors import Busy, FsError, Unfinished
from ivshmemfs.format.lock import FCNTL, FLOCK
from ivshmemfs.fuse import protocol
from ivshmemfs.fuse.budget import Budget
from ivshmemfs.fuse.connection import Relay
from ivshmemfs.fuse.operations import LARGEST, Operations
from ivshmemfs.fuse.pages import Pages
from ivshmemfs.fuse.pretence import PRETENDED_FH, Parts, Pretence
from ivshmemfs.fuse.retry import errno_of
from ivshmemfs.fuse.wakeups import Wakeups
from ivshmemfs.native import Requests, cut, packed_attributes, packed_entry, placed_tuple

#: Largest answer to READDIR, in bytes.
LARGEST_LISTING: Final = 1 << 17
_HUGE: Final = 1 << 21
_BODY: Final = protocol.IN_HEADER.size
_HEADERS: Final = _BODY + protocol.WRITE_IN.size
_BILLION: Final = 10**9
_BLOCK: Final = 4096  # st_blksize, in bytes
#: Inodes of one BATCH_FORGET that one turn forgets; the next turn forgets more.
FORGOTTEN_AT_ONCE: Final = 512

Buffer = bytes | memoryview
Answer = bytes | memoryview | None
Handler = Callable[[int, Context, Buffer, int], Answer]

#: Seconds for which a request that waits for a busy engine goes on after an INTERRUPT.  Another
#: peer's commit takes milliseconds, and programs do not expect EINTR from calls on files.
INTERRUPTED_SECONDS = 1.0
#: The answer to a look-up of a name that does not exist; it costs less than an exception.
ABSENT: Final = memoryview(b"ENOENT")
#: A task answers.
LATER: Final = memoryview(b"later")
# What is done for every request of its kind is bound here.
_create_in: Final = protocol.CREATE_IN.unpack_from
_CREATE_NAME_AT: Final = _BODY + protocol.CREATE_IN.size
_flush_in: Final = protocol.FLUSH_IN.unpack_from
_mkdir_in: Final = protocol.MKDIR_IN.unpack_from
_MKDIR_NAME_AT: Final = _BODY + protocol.MKDIR_IN.size
_open_in: Final = protocol.OPEN_IN.unpack_from
_read_in: Final = protocol.READ_IN.unpack_from
_release_in: Final = protocol.RELEASE_IN.unpack_from
_rename2_in: Final = protocol.RENAME2_IN.unpack_from
_RENAME2_NAMES_AT: Final = _BODY + protocol.RENAME2_IN.size
_setattr_in: Final = protocol.SETATTR_IN.unpack_from
_write_in: Final = protocol.WRITE_IN.unpack_from
_open_out: Final = protocol.OPEN_OUT.pack
_written: Final = protocol.WRITE_OUT.pack
_dirent: Final = protocol.DIRENT.pack
_DIRENT_SIZE: Final = protocol.DIRENT.size
_UMASK: Final = (Context._fields.index("umask"),)


def _huge(size: int) -> mmap.mmap:
    """Return private memory, in huge pages if there are some: the kernel pins fewer pages then."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Waiting(NamedTuple):
    """A request whose first attempt raised Busy."""

    operation: str
    handler: Handler
    unique: int
    node: int
    ctx: Context
    request: Buffer

    def call(self) -> Answer:
        """Run the handler again."""
        return self.handler(self.node, self.ctx, self.request, len(self.request))


def _with_umask(ctx: Context, umask: int) -> Context:
    """Return the caller of a request that makes something."""
    return placed_tuple(ctx, _UMASK, (umask,)) if umask else ctx


def _answered(turn: Unfinished, answer: Callable[[Any], Answer]) -> Unfinished:
    """Return *turn* with its results translated to answers: the one so far and the final one."""
    go_on = turn.go_on
    if go_on is not None:

        def then() -> Answer:
            try:
                return answer(go_on())
            except Unfinished as following:
                raise _answered(following, answer) from None

        turn.go_on = then
    if turn.so_far is not None:
        turn.so_far = answer(turn.so_far)
    return turn


class KernelFrontEnd:
    """Reads and answers the requests of one *connection*; *spawn* starts a task.

    *pages* learns which files the kernel keeps pages of.  *ended* tells whether the mount ends,
    which ends all waits for locks.  *pretence* answers the replayer.  *wakeups* wake waiters.
    """

    def __init__(
        self,
        operations: Operations,
        connection: Relay,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        *,
        page_cache: bool,
        pages: Pages | None = None,
        ended: Callable[[], bool] = lambda: False,
        pretence: Pretence | None = None,
        wakeups: Wakeups | None = None,
    ) -> None:
        self._operations = operations
        self._presented = operations.presented
        if connection.shares_locks:
            operations.share_locks(ended, wakeups)
        #: The pid of the replayer, whose requests *pretence* answers; -1 without one.
        self.replayer = -1
        self._pretence = pretence
        if pretence is not None:
            pretence.use(Parts(self._entry, self._attr, self._sized, self._getxattr, ABSENT))
        self._pages = pages
        self._page_cache = page_cache
        self._retry = operations.retry
        self.hand_on = connection.offer
        self.pump = connection.pump
        self._unwanted = connection.unwanted
        self._setxattr_ext = connection.setxattr_ext
        self._kernel_obeys_lists = connection.access_lists
        self._spawn = spawn
        self._open_flags = 0 if page_cache else protocol.FOPEN_DIRECT_IO
        # The bytes of a WRITE start at a page boundary, which makes the copy faster.
        area = memoryview(_huge(2 * _HUGE))
        self._request = area[mmap.PAGESIZE - _HEADERS :]
        self._requests = Requests(connection.device, self._request, Context)
        self._result = memoryview(_huge(_HUGE))
        self._waiting: dict[int, tuple[trio.CancelScope, float]] = {}
        self._handlers: list[Handler | None] = [None] * 256
        for opcode, handler in self._table().items():
            self._handlers[opcode] = handler

    def _table(self) -> dict[int, Handler]:
        return {
            protocol.LOOKUP: self._lookup,
            protocol.GETATTR: self._getattr,
            protocol.SETATTR: self._setattr,
            protocol.READLINK: self._readlink,
            protocol.SYMLINK: self._symlink,
            protocol.MKNOD: self._mknod,
            protocol.MKDIR: self._mkdir,
            protocol.UNLINK: self._unlink,
            protocol.RMDIR: self._rmdir,
            protocol.RENAME: self._rename,
            protocol.RENAME2: self._rename2,
            protocol.LINK: self._link,
            protocol.OPEN: self._open,
            protocol.CREATE: self._create,
            protocol.TMPFILE: self._tmpfile,
            protocol.STATX: self._statx,
            protocol.STATFS: self._statfs,
            protocol.ACCESS: self._access,
            protocol.SETXATTR: self._setxattr,
            protocol.GETXATTR: self._getxattr,
            protocol.LISTXATTR: self._listxattr,
            protocol.REMOVEXATTR: self._removexattr,
            protocol.LSEEK: self._lseek,
            protocol.FALLOCATE: self._fallocate,
            protocol.COPY_FILE_RANGE: self._copy_file_range,
            protocol.READ: self._read,
            protocol.WRITE: self._write,
            protocol.FLUSH: self._flush,
            protocol.FSYNC: self._fsync,
            protocol.RELEASE: self._release,
            protocol.GETLK: self._getlk,
            protocol.SETLK: self._setlk,
            protocol.SETLKW: self._setlkw,
            protocol.OPENDIR: self._opendir,
            protocol.READDIR: self._readdir,
            protocol.RELEASEDIR: self._releasedir,
            protocol.FSYNCDIR: self._fsyncdir,
        }

    # --- one request ------------------------------------------------------------------------

    def serve(self, budget: Budget, spin: int, nap: int) -> memoryview | None:
        """Answer requests until *budget* is spent or none comes.

        It looks for each request for *spin* ns, and then sleeps up to *nap* ms.  Returns a request
        that has no handler here.  Raises OSError: one of `protocol.ENDED` after the end of the
        connection.
        """
        read, handlers, request = self._requests.read, self._handlers, self._request
        left = budget.left
        while left > 0:
            got = read(spin, nap)
            if got is None:
                break
            left -= 1
            # Only every eighth request reads the clock.
            if not left & 7 and time.monotonic() > budget.ends:
                left = 0
            size, opcode, unique, node, ctx = got
            handler = handlers[opcode & 255]
            if self._pretence is not None and ctx.pid == self.replayer:
                handler = self._pretence.handler(opcode, handler)
            if handler is None:
                if self._silent(opcode, node, size):
                    continue
                budget.left = left
                return request[:size]
            try:
                answer = handler(node, ctx, request, size)
            except Busy as busy:
                waiting = Waiting(handler.__name__[1:], handler, unique, node, ctx, request[:size])
                self._try_again(waiting, busy)
            except Exception as error:
                self._say(unique, errno_of(handler.__name__[1:], error))
            else:
                self._answer(unique, answer)
        budget.left = left
        return None

    def _try_again(self, waiting: Waiting, busy: Busy) -> None:
        """Retry for `retry.BRIEF_SECONDS`; then start a task that retries beside other requests."""
        try:
            answer = self._retry.briefly(waiting.call, busy)
        except Busy as still:
            self._wait(waiting._replace(request=bytes(waiting.request)), still)
        except Exception as error:
            self._say(waiting.unique, errno_of(waiting.operation, error))
        else:
            self._answer(waiting.unique, answer)

    def _answer(self, unique: int, answer: Answer) -> None:
        if answer is ABSENT:
            self._say(unique, errno.ENOENT)
        elif answer is not LATER:
            try:
                self._requests.answer(unique, answer)
            except OSError as error:
                self._unwanted(error)
            except Exception as error:  # the caller waits for an answer, and the loop must go on
                self._say(unique, errno_of("answer", error))

    def _say(self, unique: int, code: int) -> None:
        try:
            self._requests.refuse(unique, code)
        except OSError as error:
            self._unwanted(error)

    def _silent(self, opcode: int, node: int, size: int) -> bool:
        """Serve a request that gets no answer; return False if *opcode* is not of that kind."""
        request = self._request
        if opcode == protocol.FORGET:
            self._operations.forget(node, protocol.FORGET_IN.unpack_from(request, _BODY)[0])
        elif opcode == protocol.BATCH_FORGET:
            start = _BODY + protocol.BATCH_FORGET_IN.size
            self._forget_all(cut(request, start, size))
        elif opcode == protocol.INTERRUPT:
            waiting = self._waiting.get(protocol.INTERRUPT_IN.unpack_from(request, _BODY)[0])
            if waiting is not None:
                scope, grace = waiting
                scope.deadline = min(scope.deadline, trio.current_time() + grace)
        else:
            return False
        return True

    def _forget_all(self, batch: bytes) -> None:
        """Forget the inodes of a batch, FORGOTTEN_AT_ONCE in a turn; no caller waits for it."""
        most = FORGOTTEN_AT_ONCE * protocol.FORGET_ONE.size
        for one, times in protocol.FORGET_ONE.iter_unpack(batch[:most]):
            self._operations.forget(one, times)
        if len(batch) > most:

            async def forget_on() -> None:
                await trio.lowlevel.checkpoint()
                self._forget_all(batch[most:])

            self._spawn(forget_on)

    # --- waiting ----------------------------------------------------------------------------

    def _wait(self, waiting: Waiting, busy: Busy) -> None:
        self._later(
            waiting.unique, lambda: self._answer_patiently(waiting, busy), INTERRUPTED_SECONDS
        )

    def _later(
        self, unique: int, answering: Callable[[], Awaitable[None]], grace: float = 0.0
    ) -> None:
        """Let a task answer; *grace* seconds after an INTERRUPT it answers EINTR."""
        scope = trio.CancelScope()
        self._waiting[unique] = scope, grace  # before the next request is read

        async def answer_later() -> None:
            with scope:
                try:
                    await answering()
                finally:
                    if self._waiting.get(unique, (None,))[0] is scope:
                        del self._waiting[unique]
            if scope.cancelled_caught:
                self._say(unique, errno.EINTR)

        self._spawn(answer_later)

    async def _answer_patiently(self, waiting: Waiting, busy: Busy) -> None:
        try:
            answer = await self._retry.patiently(waiting.operation, waiting.call, busy)
        except Exception as error:
            self._say(waiting.unique, errno_of(waiting.operation, error))
        else:
            self._answer(waiting.unique, answer)

    # --- parts of answers -------------------------------------------------------------------

    def _entry(self, node: int, attr: Attr) -> bytes:
        """Return the bytes of an entry: node number and attributes.

        The attributes of a directory show its node number as st_ino.
        """
        number = node if attr.mode & 0o170000 == 0o040000 else attr.ino
        return packed_entry(node, number, self._presented(attr), _BLOCK)

    def _attr(self, attr: Attr) -> bytes:
        """Return the answer to GETATTR."""
        return packed_attributes(attr.ino, self._presented(attr), _BLOCK)

    @staticmethod
    def _names(request: Buffer, start: int, end: int) -> tuple[bytes, bytes]:
        first, _, second = cut(request, start, end - 1).partition(b"\0")
        return first, second

    # --- names ------------------------------------------------------------------------------

    def _lookup(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        found = self._operations.lookup(node, cut(request, _BODY, end - 1), ctx)
        return ABSENT if found is None else self._entry(*found)

    def _mknod(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        mode, rdev, umask = protocol.MKNOD_IN.unpack_from(request, _BODY)
        name = cut(request, _BODY + protocol.MKNOD_IN.size, end - 1)
        maker = _with_umask(ctx, umask)
        return self._entry(*self._operations.mknod(node, name, mode, rdev, maker))

    def _mkdir(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        mode, umask = _mkdir_in(request, _BODY)
        name = cut(request, _MKDIR_NAME_AT, end - 1)
        return self._entry(*self._operations.mkdir(node, name, mode, _with_umask(ctx, umask)))

    def _symlink(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        name, target = self._names(request, _BODY, end)
        return self._entry(*self._operations.symlink(node, name, target, ctx))

    def _readlink(self, node: int, ctx: Context, _request: Buffer, _end: int) -> Answer:
        return self._operations.readlink(node, ctx)

    def _link(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        (old,) = protocol.LINK_IN.unpack_from(request, _BODY)
        name = cut(request, _BODY + protocol.LINK_IN.size, end - 1)
        return self._entry(*self._operations.link(old, node, name, ctx))

    def _unlink(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        self._operations.unlink(node, cut(request, _BODY, end - 1), ctx)
        return None

    def _rmdir(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        self._operations.rmdir(node, cut(request, _BODY, end - 1), ctx)
        return None

    def _rename(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        (new,) = protocol.RENAME_IN.unpack_from(request, _BODY)
        old_name, name = self._names(request, _BODY + protocol.RENAME_IN.size, end)
        self._operations.rename(node, old_name, new, name, 0, ctx)
        return None

    def _rename2(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        new, flags = _rename2_in(request, _BODY)
        old_name, name = self._names(request, _RENAME2_NAMES_AT, end)
        self._operations.rename(node, old_name, new, name, flags, ctx)
        return None

    # --- attributes -------------------------------------------------------------------------

    def _getattr(self, node: int, ctx: Context, _request: Buffer, _end: int) -> Answer:
        return self._attr(self._operations.getattr(node, ctx))

    def _statx(self, node: int, ctx: Context, _request: Buffer, _end: int) -> Answer:
        stored, birth_time = self._operations.statx(node, ctx)
        attr = self._operations.presented(stored)
        times = (attr.atime_ns, birth_time, attr.ctime_ns, attr.mtime_ns)
        return protocol.STATX_OUT.pack(
            protocol.STATX_BASIC_STATS | protocol.STATX_BTIME, _BLOCK,
            attr.nlink, attr.uid, attr.gid, attr.mode, attr.ino, attr.size, attr.blocks,
            *(part for moment in times for part in divmod(moment, _BILLION)),
            os.major(attr.rdev), os.minor(attr.rdev),
        )  # fmt: skip

    def _setattr(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        valid, fh, size, atime, mtime, atime_ns, mtime_ns, mode, uid, gid = _setattr_in(
            request, _BODY
        )
        wanted = {}
        if valid & protocol.SET_UID:
            wanted["uid"] = uid
        if valid & protocol.SET_GID:
            wanted["gid"] = gid
        if valid & protocol.SET_SIZE:
            wanted["size"] = size
        if valid & protocol.SET_MODE:
            wanted["mode"] = mode
        if valid & protocol.SET_ATIME:
            now = valid & protocol.SET_ATIME_NOW
            wanted["atime_ns"] = NOW if now else atime * _BILLION + atime_ns
        if valid & protocol.SET_MTIME:
            now = valid & protocol.SET_MTIME_NOW
            wanted["mtime_ns"] = NOW if now else mtime * _BILLION + mtime_ns
        opened = bool(valid & protocol.SET_FH)
        return self._attr(
            self._operations.setattr(node, wanted, ctx, opened=opened, fh=fh if opened else 0)
        )

    def _access(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        (mask,) = protocol.ACCESS_IN.unpack_from(request, _BODY)
        self._operations.access(node, mask, ctx)
        return None

    def _statfs(self, _node: int, ctx: Context, _request: Buffer, _end: int) -> Answer:
        stats = self._operations.statfs(ctx)
        return protocol.STATFS_OUT.pack(
            stats.blocks, stats.blocks_free, stats.blocks_avail, stats.files, stats.files_free,
            stats.block_size, stats.name_max, stats.block_size,
        )  # fmt: skip

    # --- extended attributes ----------------------------------------------------------------

    def _getxattr(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        name = cut(request, _BODY + protocol.GETXATTR_IN.size, end - 1)
        return self._sized(self._operations.getxattr(node, name, ctx), request)

    def _setxattr(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        header, clears = protocol.SETXATTR_IN, None
        if self._setxattr_ext:
            header = protocol.SETXATTR_EXT_IN
            if self._kernel_obeys_lists:  # else the kernel does not set the flag
                more = header.unpack_from(request, _BODY)[2]
                clears = bool(more & protocol.SETXATTR_ACL_KILL_SGID)
        size, flags = header.unpack_from(request, _BODY)[:2]
        name, _, value = cut(request, _BODY + header.size, end).partition(b"\0")
        self._operations.setxattr(node, name, value[:size], flags, ctx, clears)
        return None

    def _listxattr(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        names = self._operations.listxattr(node, ctx)
        return self._sized(b"".join(name + b"\0" for name in names), request)

    def _removexattr(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        self._operations.removexattr(node, cut(request, _BODY, end - 1), ctx)
        return None

    @staticmethod
    def _sized(value: bytes, request: Buffer) -> bytes:
        """Return *value*, or its length if the caller's buffer has size 0.

        Raises ERANGE for a buffer that is too small.
        """
        (room,) = protocol.GETXATTR_IN.unpack_from(request, _BODY)
        if not room:
            return protocol.GETXATTR_OUT.pack(len(value))
        if len(value) > room:
            raise FsError(errno.ERANGE)
        return value

    # --- files ------------------------------------------------------------------------------

    def _open(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        (flags,) = _open_in(request, _BODY)
        return self._opened(self._operations.open(node, flags, ctx))

    def _opened(self, fh: int) -> bytes:
        if self._page_cache and self._pages is not None:
            self._pages.note(self._operations.opened(fh))
        return _open_out(fh, self._open_flags)

    def _create(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        flags, mode, umask = _create_in(request, _BODY)
        name = cut(request, _CREATE_NAME_AT, end - 1)
        maker = _with_umask(ctx, umask)
        fh, attr = self._operations.create(node, name, mode, flags, maker)
        return self._entry(attr.ino, attr) + self._opened(fh)

    def _tmpfile(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        flags, mode, umask = _create_in(request, _BODY)
        maker = _with_umask(ctx, umask)
        fh, attr = self._operations.tmpfile(node, mode, flags, maker)
        return self._entry(attr.ino, attr) + self._opened(fh)

    def _read(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, size = _read_in(request, _BODY)
        into = self._result if size <= LARGEST else None
        if not request[protocol.READ_FLAGS_AT] & protocol.READ_LOCKOWNER and self._pages:
            self._pages.note(self._operations.opened(fh))
        got = self._operations.read(fh, offset, size, into)
        return got if isinstance(got, bytes | memoryview) else memoryview(got)

    def _write(self, _node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, size, write_flags, flags = _write_in(request, _BODY)
        content = memoryview(request)[_HEADERS : _HEADERS + size]
        cached = bool(write_flags & protocol.WRITE_CACHE)  # caller and O_APPEND are unknown
        append, by = not cached and bool(flags & os.O_APPEND), None if cached else ctx
        try:
            return _written(self._operations.write(fh, offset, content, append, by))
        except Unfinished as turn:
            raise _answered(turn, _written) from None

    def _copy_file_range(self, _node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        fields = protocol.COPY_FILE_RANGE_IN.unpack_from(request, _BODY)
        source, offset, _, to, at, length, _ = fields
        copy = self._operations.copy_file_range
        try:
            return _written(copy(source, offset, to, at, length, self._result, ctx))
        except Unfinished as turn:
            raise _answered(turn, _written) from None

    def _lseek(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        return protocol.LSEEK_OUT.pack(
            self._operations.lseek(*protocol.LSEEK_IN.unpack_from(request, _BODY))
        )

    def _fallocate(self, _node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, length, mode = protocol.FALLOCATE_IN.unpack_from(request, _BODY)
        self._operations.fallocate(fh, mode, offset, length, ctx)
        return None

    def _flush(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, owner = _flush_in(request, _BODY)
        if fh != PRETENDED_FH:
            self._operations.flush(fh, owner)
        return None

    def _fsync(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, flags = protocol.FSYNC_IN.unpack_from(request, _BODY)
        self._operations.fsync(fh, bool(flags & protocol.FSYNC_FDATASYNC))
        return None

    def _release(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        (fh,) = _release_in(request, _BODY)
        if fh != PRETENDED_FH:
            self._operations.release(fh)
        return None

    # --- locks ------------------------------------------------------------------------------

    @staticmethod
    def _lock(request: Buffer) -> tuple[int, bool, Lock]:
        """(handle, whether it is to be given back, the lock) of a request about one."""
        fh, owner, start, end, kind, pid, flags = protocol.LK_IN.unpack_from(request, _BODY)
        if kind not in (protocol.F_RDLCK, protocol.F_WRLCK, protocol.F_UNLCK):
            raise FsError(errno.EINVAL)
        which = FLOCK if flags & protocol.LK_FLOCK else FCNTL
        return fh, kind == protocol.F_UNLCK, Lock(which, kind & 1, owner, start, end, pid)

    def _getlk(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, own, lock = self._lock(request)
        found = self._operations.getlk(fh, lock, own=own)
        if found is None:
            return protocol.LK_OUT.pack(lock.start, lock.end, protocol.F_UNLCK, 0)
        record, here = found
        pid = record.pid if here else 0
        return protocol.LK_OUT.pack(record.start, record.end, record.type, pid)

    def _setlk(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, unlock, lock = self._lock(request)
        if unlock:
            self._operations.unlock(fh, lock)
        else:
            self._operations.setlk(fh, lock)
        return None

    def _setlkw(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        fh, unlock, lock = self._lock(request)
        if unlock:
            return self._setlk(node, ctx, request, end)
        wait = self._operations.setlkw(fh, lock, ctx)
        if wait is None:
            return None
        unique = protocol.IN_HEADER.unpack_from(request)[2]
        self._later(unique, lambda: self._answer_lock(unique, wait))
        return LATER

    async def _answer_lock(self, unique: int, wait: Wait) -> None:
        try:
            await self._operations.locks.granted(wait)
        except Exception as error:
            self._say(unique, errno_of("setlkw", error))
        else:
            self._answer(unique, None)

    # --- directories ------------------------------------------------------------------------

    def _opendir(self, node: int, ctx: Context, _request: Buffer, _end: int) -> Answer:
        return _open_out(self._operations.opendir(node, ctx), 0)

    def _readdir(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, cookie, size = _read_in(request, _BODY)
        parts: list[bytes] = []
        left = min(size, LARGEST_LISTING)
        for piece in self._operations.readdir(fh, cookie):
            for entry in piece:
                name = entry.name
                length = len(name)
                padded = (length + 7) & ~7
                left -= _DIRENT_SIZE + padded
                if left < 0:
                    return b"".join(parts)
                parts.append(_dirent(entry.ino, entry.key, length, entry.kind))
                parts.append(name if padded == length else name.ljust(padded, b"\0"))
        return b"".join(parts)

    def _releasedir(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        self._operations.releasedir(_release_in(request, _BODY)[0])
        return None

    def _fsyncdir(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, flags = protocol.FSYNC_IN.unpack_from(request, _BODY)
        self._operations.fsyncdir(fh, bool(flags & protocol.FSYNC_FDATASYNC))
        return None
