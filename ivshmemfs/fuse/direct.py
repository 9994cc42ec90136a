"""The hot requests, answered straight from the kernel's bytes.

pyfuse3 costs a request more than everything else in it: a coroutine, a chain of calls through
libfuse, several copies of what is written.  So the few operations that programs do all the time are
read from the FUSE descriptor, translated and answered here; all others, and all requests when there
is no descriptor to read from (see `handshake`), go through pyfuse3 and `adapter`.  Both translate
to the same calls of what is `served`.

A request: *read* into the one buffer -> *answered*, or *cold* (the caller hands it to pyfuse3), or
*waiting*: the engine was busy.  Then a task of its own tries again with a copy of the request,
until it is answered or the kernel says that nobody waits for it any more (INTERRUPT).

A handler takes (number of the inode, who asks, buffer, end of the request in it) and returns the
body of the answer, or None for ENOENT, which is nothing unusual; it raises as the engine does.
What it is given is read before it returns, because the next request takes its place.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pyfuse3
import trio

from ivshmemfs.engine import NOW, Attr, Context
from ivshmemfs.errors import Busy, FsError, Unfinished
from ivshmemfs.fuse import wire
from ivshmemfs.fuse.handshake import Relay
from ivshmemfs.fuse.rights import ENTER
from ivshmemfs.fuse.served import Served, failure

LARGEST = 1 << 20  # bytes that one request reads or writes
LARGEST_LISTING = 1 << 17
LOOKS = 32  # pieces of a directory that one request lists: up to 4,096 names
_HUGE = 1 << 21
_HEADERS = wire.IN_HEADER.size + wire.WRITE_IN.size
_BODY = wire.IN_HEADER.size
_BILLION = 10**9
_BLOCK = 4096  # what stat(2) shows as the best size for reading
#: Inodes that the kernel forgets at once (when it drops its caches); others follow a turn later.
FORGOTTEN_AT_ONCE = 512
#: Packed attributes that are kept for when the same attributes are asked for again.
PACKED_KEPT = 4000

Buffer = bytes | memoryview
Answer = bytes | memoryview
Handler = Callable[[int, Context, Buffer, int], Answer | None]

_NOTHING = b""
_header = wire.IN_HEADER.unpack_from
_out = wire.OUT_HEADER.pack
_OUT_SIZE = wire.OUT_HEADER.size
_ATTR_AT = wire.ENTRY_OUT.size
_dirent = wire.DIRENT.pack
_DIRENT_SIZE = wire.DIRENT.size


def _huge(size: int) -> mmap.mmap:
    """Private memory in huge pages where there are some: the kernel looks each page up."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Waiting(NamedTuple):
    """A request that the engine was too busy for."""

    operation: str
    handler: Handler
    unique: int
    node: int
    ctx: Context
    request: Buffer

    def call(self) -> Answer | None:
        """Try it."""
        return self.handler(self.node, self.ctx, self.request, len(self.request))


def _answered(call: Callable[[], Any], answer: Callable[[Any], Answer]) -> Answer:
    """Make an engine call that may go on for several turns; `answer` makes one of its result."""
    try:
        result = call()
    except Unfinished as turn:
        go_on = turn.go_on
        if go_on is not None:
            turn.go_on = lambda: _answered(go_on, answer)
        if turn.so_far is not None:
            turn.so_far = answer(turn.so_far)
        raise
    return answer(result)


def _nothing(_result: object) -> Answer:
    return _NOTHING


class Direct:
    """Reads and answers requests of one *connection*.

    *spawn* starts a task.
    """

    def __init__(
        self,
        served: Served,
        connection: Relay,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        *,
        page_cache: bool,
    ) -> None:
        self._served = served
        self._fs = served.fs
        self._device = connection.device
        self.hand_on = connection.offer
        self.pump = connection.pump
        self._unwanted = connection.unwanted
        self._spawn = spawn
        self._open_flags = 0 if page_cache else wire.FOPEN_DIRECT_IO
        self._rights = served.rights
        # What is written starts at a page of the buffer, which makes copying it faster.
        area = memoryview(_huge(2 * _HUGE))
        self._request = area[mmap.PAGESIZE - _HEADERS :]
        self._into = [self._request]
        self._result = memoryview(_huge(_HUGE))
        self._packed: dict[int, tuple[Attr, bytes]] = {}
        self._waiting: dict[int, trio.CancelScope] = {}
        self._handlers = self._table()

    def _table(self) -> list[Handler | None]:
        table: list[Handler | None] = [None] * 256
        for opcode, handler in (
            (wire.LOOKUP, self._lookup),
            (wire.GETATTR, self._getattr),
            (wire.SETATTR, self._setattr),
            (wire.MKDIR, self._mkdir),
            (wire.UNLINK, self._unlink),
            (wire.RMDIR, self._rmdir),
            (wire.RENAME, self._rename),
            (wire.RENAME2, self._rename2),
            (wire.OPEN, self._open),
            (wire.CREATE, self._create),
            (wire.TMPFILE, self._tmpfile),
            (wire.STATX, self._statx),
            (wire.LSEEK, self._lseek),
            (wire.FALLOCATE, self._fallocate),
            (wire.COPY_FILE_RANGE, self._copy_file_range),
            (wire.READ, self._read),
            (wire.WRITE, self._write),
            (wire.FLUSH, self._flush),
            (wire.RELEASE, self._release),
            (wire.OPENDIR, self._opendir),
            (wire.READDIR, self._readdir),
            (wire.RELEASEDIR, self._releasedir),
        ):
            table[opcode] = handler
        if self._rights.enforced:
            table[wire.ACCESS] = self._access
        return table

    # --- one request ------------------------------------------------------------------------

    def serve(self) -> memoryview | None:
        """Read one request and answer it; returns it when it is not one of those known here.

        Raises OSError: one of `wire.ENDED` when the connection has ended; EAGAIN, ENOENT when there
        is no request to be read after all.
        """
        size = os.readv(self._device, self._into)
        request = self._request
        _, opcode, unique, node, uid, gid, pid, _ = _header(request)
        handler = self._handlers[opcode & 255]
        if handler is None:
            return None if self._silent(opcode, node, size) else request[:size]
        ctx = Context(uid, gid, pid)
        try:
            answer = handler(node, ctx, request, size)
        except Busy as busy:
            waiting = Waiting(handler.__name__[1:], handler, unique, node, ctx, request[:size])
            self._soon(waiting, busy)
        except Exception as error:
            self._say(unique, failure(handler.__name__[1:], error).errno)
        else:
            self._answer(unique, answer)
        return None

    def _soon(self, waiting: Waiting, busy: Busy) -> None:
        """Try again for a moment; then let a task wait, so that others are served meanwhile.

        Whoever has used up its turn waits at once.
        """
        moments = iter(()) if isinstance(busy, Unfinished) else self._served.moments()
        for _ in moments:
            try:
                self._answer(waiting.unique, waiting.call())
                return
            except Busy as error:
                busy = error
                if isinstance(busy, Unfinished):
                    break
            except Exception as error:
                self._say(waiting.unique, failure(waiting.operation, error).errno)
                return
        self._wait(waiting._replace(request=bytes(waiting.request)), busy)

    def _answer(self, unique: int, answer: Answer | None) -> None:
        if answer is None:
            self._say(unique, errno.ENOENT)
            return
        try:
            header = _out(_OUT_SIZE + len(answer), 0, unique)
            if answer.__class__ is bytes:
                os.write(self._device, header + answer)
            else:
                os.writev(self._device, (header, answer))
        except OSError as error:
            self._unwanted(error)
        except Exception as error:  # nothing may escape, and somebody waits for an answer
            self._say(unique, failure("answer", error).errno)

    def _say(self, unique: int, code: int) -> None:
        try:
            os.write(self._device, _out(_OUT_SIZE, -code, unique))
        except OSError as error:
            self._unwanted(error)

    def _silent(self, opcode: int, node: int, size: int) -> bool:
        """Do what has no answer; False when *opcode* is nothing of that kind."""
        request = self._request
        if opcode == wire.FORGET:
            self._forget(node, wire.FORGET_IN.unpack_from(request, _BODY)[0])
        elif opcode == wire.BATCH_FORGET:
            start = _BODY + wire.BATCH_FORGET_IN.size
            self._forget_all(bytes(request[start:size]))
        elif opcode == wire.INTERRUPT:
            scope = self._waiting.get(wire.INTERRUPT_IN.unpack_from(request, _BODY)[0])
            if scope is not None:
                scope.cancel()
        else:
            return False
        return True

    def _forget_all(self, batch: bytes) -> None:
        """Forget what a batch names; the rest of a large one by and by, for nobody waits for it."""
        most = FORGOTTEN_AT_ONCE * wire.FORGET_ONE.size
        for one, times in wire.FORGET_ONE.iter_unpack(batch[:most]):
            self._forget(one, times)
        if len(batch) > most:

            async def forget_on() -> None:
                await trio.lowlevel.checkpoint()
                self._forget_all(batch[most:])

            self._spawn(forget_on)

    def _forget(self, node: int, times: int) -> None:
        self._packed.pop(node, None)
        self._served.forget(node, times)

    # --- waiting ----------------------------------------------------------------------------

    def _wait(self, waiting: Waiting, busy: Busy) -> None:
        async def answer_later() -> None:
            with trio.CancelScope() as scope:
                self._waiting[waiting.unique] = scope
                try:
                    await self._again(waiting, busy)
                finally:
                    del self._waiting[waiting.unique]
            if scope.cancelled_caught:
                self._say(waiting.unique, errno.EINTR)

        self._spawn(answer_later)

    async def _again(self, waiting: Waiting, busy: Busy) -> None:
        try:
            answer = await self._served.again(waiting.operation, waiting.call, busy)
        except pyfuse3.FUSEError as error:
            self._say(waiting.unique, error.errno)
        else:
            self._answer(waiting.unique, answer)

    # --- parts of answers -------------------------------------------------------------------

    def _entry(self, node: int, attr: Attr) -> bytes:
        """An entry: its number, and its attributes, which show the number of a directory too."""
        known = self._packed.get(attr.ino)
        entry = known[1] if known is not None and known[0] is attr else self._pack(attr)
        if node == attr.ino:
            return entry
        number = wire.INO.pack(node)
        if attr.mode & 0o170000 != 0o040000:
            return number + entry[len(number) :]
        return number + entry[len(number) : _ATTR_AT] + number + entry[_ATTR_AT + len(number) :]

    def _attr(self, attr: Attr) -> bytes:
        """Attributes, after the time that they may be kept: the same bytes end an entry."""
        return self._entry(attr.ino, attr)[_ATTR_AT - wire.ATTR_OUT_SIZE :]

    def _pack(self, attr: Attr) -> bytes:
        """The entry of what is known by the number of its inode."""
        shown = self._served.presented(attr)
        atime, atime_ns = divmod(shown.atime_ns, _BILLION)
        mtime, mtime_ns = divmod(shown.mtime_ns, _BILLION)
        ctime, ctime_ns = divmod(shown.ctime_ns, _BILLION)
        entry = wire.ENTRY_OUT.pack(attr.ino) + wire.ATTR.pack(
            shown.ino, shown.size, shown.blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
            shown.mode, shown.nlink, shown.uid, shown.gid, shown.rdev, _BLOCK,
        )  # fmt: skip
        if len(self._packed) >= PACKED_KEPT:
            self._packed.clear()
        self._packed[attr.ino] = attr, entry
        return entry

    @staticmethod
    def _name(request: Buffer, start: int, end: int) -> bytes:
        return bytes(request[start : end - 1])

    @staticmethod
    def _names(request: Buffer, start: int, end: int) -> tuple[bytes, bytes]:
        first, _, second = bytes(request[start : end - 1]).partition(b"\0")
        return first, second

    # --- names ------------------------------------------------------------------------------

    def _lookup(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer | None:
        found = self._served.lookup(node, bytes(request[_BODY : end - 1]), ctx)
        return None if found is None else self._entry(*found)

    def _mkdir(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        (mode,) = wire.MKDIR_IN.unpack_from(request, _BODY)
        name = self._name(request, _BODY + wire.MKDIR_IN.size, end)
        found = self._served.mkdir(node, name, mode, ctx)
        return self._entry(*found)

    def _unlink(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        self._served.unlink(self._served.inode_of(node), self._name(request, _BODY, end), ctx)
        return _NOTHING

    def _rmdir(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        self._served.rmdir(self._served.inode_of(node), self._name(request, _BODY, end), ctx)
        return _NOTHING

    def _rename(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        (new,) = wire.RENAME_IN.unpack_from(request, _BODY)
        names = self._names(request, _BODY + wire.RENAME_IN.size, end)
        return self._move(node, new, names, 0, ctx)

    def _rename2(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        new, flags = wire.RENAME2_IN.unpack_from(request, _BODY)
        names = self._names(request, _BODY + wire.RENAME2_IN.size, end)
        return self._move(node, new, names, flags, ctx)

    def _move(
        self, node: int, new: int, names: tuple[bytes, bytes], flags: int, ctx: Context
    ) -> Answer:
        self._served.rename(node, names[0], new, names[1], flags, ctx)
        return _NOTHING

    # --- attributes -------------------------------------------------------------------------

    def _getattr(self, node: int, _ctx: Context, _request: Buffer, _end: int) -> Answer:
        return self._attr(self._fs.getattr(self._served.inode_of(node)))

    def _statx(self, node: int, _ctx: Context, _request: Buffer, _end: int) -> Answer:
        """What getattr tells, and when the inode was made."""
        ino = self._served.inode_of(node)
        attr = self._served.presented(self._fs.getattr(ino))
        times = (attr.atime_ns, self._fs.born(ino), attr.ctime_ns, attr.mtime_ns)
        return wire.STATX_OUT.pack(
            wire.STATX_BASIC_STATS | wire.STATX_BTIME, _BLOCK,
            attr.nlink, attr.uid, attr.gid, attr.mode, attr.ino, attr.size, attr.blocks,
            *(part for moment in times for part in divmod(moment, _BILLION)),
            os.major(attr.rdev), os.minor(attr.rdev),
        )  # fmt: skip

    def _setattr(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        ino = self._served.inode_of(node)
        valid, _fh, size, atime, mtime, atime_ns, mtime_ns, mode, uid, gid = (
            wire.SETATTR_IN.unpack_from(request, _BODY)
        )
        changes = self._served.owner_changes(
            uid if valid & wire.SET_UID else None, gid if valid & wire.SET_GID else None
        )
        if valid & wire.SET_SIZE:
            changes["size"] = size
        if valid & wire.SET_MODE:
            changes |= self._served.mode_change(mode, changes)
        if valid & wire.SET_ATIME:
            now = valid & wire.SET_ATIME_NOW
            changes["atime_ns"] = NOW if now else atime * _BILLION + atime_ns
        if valid & wire.SET_MTIME:
            now = valid & wire.SET_MTIME_NOW
            changes["mtime_ns"] = NOW if now else mtime * _BILLION + mtime_ns
        self._rights.need_change(ino, ctx, changes, opened=bool(valid & wire.SET_FH))
        return self._attr(self._fs.setattr(ino, ctx, **changes))

    def _access(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        """access(2) and chdir(2)."""
        (mask,) = wire.ACCESS_IN.unpack_from(request, _BODY)
        self._rights.need(self._served.inode_of(node), ctx, mask & 7)
        return _NOTHING

    # --- files ------------------------------------------------------------------------------

    def _open(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        (flags,) = wire.OPEN_IN.unpack_from(request, _BODY)
        return self._opened(self._served.open(node, flags, ctx))

    def _opened(self, number: int) -> bytes:
        return wire.OPEN_OUT.pack(number, self._open_flags)

    def _create(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        flags, mode = wire.CREATE_IN.unpack_from(request, _BODY)
        name = self._name(request, _BODY + wire.CREATE_IN.size, end)
        ino = self._served.inode_of(node)
        self._rights.need(ino, ctx, ENTER)
        handle, attr = self._fs.create(ino, name, mode, flags, ctx)
        return self._entry(attr.ino, attr) + self._opened(self._served.keep(handle))

    def _tmpfile(self, node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        flags, mode = wire.CREATE_IN.unpack_from(request, _BODY)
        ino = self._served.inode_of(node)
        self._rights.need(ino, ctx, ENTER)
        handle, attr = self._fs.tmpfile(ino, mode, flags, ctx)
        return self._entry(attr.ino, attr) + self._opened(self._served.keep(handle))

    def _lseek(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, whence = wire.LSEEK_IN.unpack_from(request, _BODY)
        return wire.LSEEK_OUT.pack(self._fs.seek(self._served.handles[fh], offset, whence))

    def _fallocate(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, length, mode = wire.FALLOCATE_IN.unpack_from(request, _BODY)
        handle = self._served.handles[fh]
        return _answered(lambda: self._fs.fallocate(handle, mode, offset, length), _nothing)

    def _read(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, size = wire.READ_IN.unpack_from(request, _BODY)
        into = self._result if size <= LARGEST else None
        got = self._fs.read(self._served.handles[fh], offset, size, into)
        return got if isinstance(got, bytes | memoryview) else memoryview(got)

    def _write(self, _node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, offset, size, write_flags, flags = wire.WRITE_IN.unpack_from(request, _BODY)
        content = memoryview(request)[_HEADERS : _HEADERS + size]
        handle = self._served.handles[fh]
        cached = bool(write_flags & wire.WRITE_CACHE)  # who wrote it and how is not known any more
        append, by = not cached and bool(flags & os.O_APPEND), None if cached else ctx
        write = self._fs.write
        return _answered(
            lambda: write(handle, offset, content, append=append, ctx=by), wire.WRITE_OUT.pack
        )

    def _copy_file_range(self, _node: int, ctx: Context, request: Buffer, _end: int) -> Answer:
        """A part of it, atomic by itself; who wants more asks for the rest."""
        fields = wire.COPY_FILE_RANGE_IN.unpack_from(request, _BODY)
        source, offset, _, to, at, length, _ = fields
        length = min(length, LARGEST)
        handles = self._served.handles
        content = self._fs.read(handles[source], offset, length, self._result)
        return _answered(
            lambda: self._fs.write(handles[to], at, content, append=False, ctx=ctx),
            wire.WRITE_OUT.pack,
        )

    def _flush(self, _node: int, _ctx: Context, _request: Buffer, _end: int) -> Answer:
        # Each write is published when it returns; the kernel does not ask again after ENOSYS.
        raise FsError(errno.ENOSYS)

    def _release(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        self._served.release(wire.RELEASE_IN.unpack_from(request, _BODY)[0])
        return _NOTHING

    # --- directories ------------------------------------------------------------------------

    def _opendir(self, node: int, ctx: Context, _request: Buffer, _end: int) -> Answer:
        return wire.OPEN_OUT.pack(self._served.opendir(node, ctx), 0)

    def _readdir(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        fh, cookie, size = wire.READ_IN.unpack_from(request, _BODY)
        parts: list[bytes] = []
        left = min(size, LARGEST_LISTING)
        try:
            for entry in self._fs.entries(self._served.handles[fh], cookie, LOOKS):
                name = entry.name
                length = len(name)
                padded = (length + 7) & ~7
                left -= _DIRENT_SIZE + padded
                if left < 0:
                    break
                parts.append(_dirent(entry.ino, entry.key, length, entry.kind))
                parts.append(name if padded == length else name.ljust(padded, b"\0"))
        except Exception:
            if not parts:  # what was found so far stands: the kernel goes on from there
                raise
        return b"".join(parts)

    def _releasedir(self, _node: int, _ctx: Context, request: Buffer, _end: int) -> Answer:
        self._served.releasedir(wire.RELEASE_IN.unpack_from(request, _BODY)[0])
        return _NOTHING
