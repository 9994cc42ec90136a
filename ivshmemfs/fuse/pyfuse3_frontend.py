"""The front end for requests that pyfuse3 reads.

A handler translates objects of pyfuse3 to a call of `operations`, and its result to objects.
`_forwarded` makes most handlers from the name of the operation and the kind of its result.

pyfuse3 has no handlers for O_TMPFILE, fallocate(2), SEEK_DATA and SEEK_HOLE, statx(2) and
copy_file_range(2).  It does not pass the caller of a write, nor its current O_APPEND flag.

The handlers reuse their reply objects (`EntryAttributes`, `FileInfo`, `StatvfsData`).  pyfuse3
copies a reply to the kernel before another task runs, and does not change it.
"""
# ruff: noqa: D102 - pyfuse3.Operations documents each handler

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from ivshmemfs.engine import Attr, Context, StatFs
from ivshmemfs.errors import FsError
from ivshmemfs.fuse.operations import Listed, Operations
from ivshmemfs.fuse.retry import errno_of

T = TypeVar("T")
Handler = Callable[..., Coroutine[Any, Any, Any]]


def _forwarded(
    operation: str, reply: Callable[[Pyfuse3FrontEnd, Any], Any] = lambda _, result: result
) -> Handler:
    """Return a handler that calls *operation* with pyfuse3's arguments and makes a *reply*."""

    async def handler(self: Pyfuse3FrontEnd, /, *words: Any) -> Any:
        ours = [_context(one) if one.__class__ is RequestContext else one for one in words]
        call = getattr(self.operations, operation)
        return await self.completed(operation, lambda: reply(self, call(*ours)))

    handler.__name__ = operation
    return handler


class Pyfuse3FrontEnd(pyfuse3.Operations):
    """Translates requests to *operations*; with *page_cache* files use the page cache."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, operations: Operations, *, page_cache: bool = False) -> None:
        super().__init__()
        self.operations = operations
        self._xattr_probe: tuple[RequestContext, int] | None = None
        self._reply = EntryAttributes()
        self._reply.entry_timeout = self._reply.attr_timeout = 0  # the kernel must not keep them
        self._info = FileInfo(direct_io=not page_cache, keep_cache=False)
        self._statvfs = pyfuse3.StatvfsData()

    async def completed(self, operation: str, call: Callable[[], T]) -> T:
        """Call *call*, with retries; return its result.  Raises FUSEError with the errno."""
        try:
            return await self.operations.retry.complete(operation, call)
        except Exception as error:
            raise FUSEError(errno_of(operation, error)) from None

    # --- results --------------------------------------------------------------------------

    def _attributes(self, attr: Attr) -> EntryAttributes:
        entry = self._reply
        (
            entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev,
            entry.st_size, entry.st_blocks, entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns,
        ) = self.operations.presented(attr)  # fmt: skip
        return entry

    def _entry(self, found: tuple[int, Attr] | None) -> EntryAttributes:
        if found is None:
            raise FsError(errno.ENOENT)
        entry = self._attributes(found[1])
        entry.st_ino = pyfuse3.InodeT(found[0])
        return entry

    def _opened(self, fh: int) -> FileInfo:
        self._info.fh = pyfuse3.FileHandleT(fh)
        return self._info

    def _created(self, made: tuple[int, Attr]) -> tuple[FileInfo, EntryAttributes]:
        return self._opened(made[0]), self._attributes(made[1])

    def _sizes(self, stats: StatFs) -> pyfuse3.StatvfsData:
        reply = self._statvfs
        reply.f_bsize, reply.f_frsize, reply.f_namemax = (
            stats.block_size, stats.block_size, stats.name_max
        )  # fmt: skip
        reply.f_blocks, reply.f_bfree, reply.f_bavail = (
            stats.blocks, stats.blocks_free, stats.blocks_avail
        )  # fmt: skip
        reply.f_files, reply.f_ffree, reply.f_favail = (
            stats.files, stats.files_free, stats.files_free
        )  # fmt: skip
        return reply

    # --- requests -------------------------------------------------------------------------

    lookup = _forwarded("lookup", _entry)
    mknod = _forwarded("mknod", _entry)
    mkdir = _forwarded("mkdir", _entry)
    symlink = _forwarded("symlink", _entry)
    readlink = _forwarded("readlink")
    link = _forwarded("link", _entry)
    unlink = _forwarded("unlink")
    rmdir = _forwarded("rmdir")
    rename = _forwarded("rename")
    getattr = _forwarded("getattr", _attributes)
    statfs = _forwarded("statfs", _sizes)
    listxattr = _forwarded("listxattr")
    removexattr = _forwarded("removexattr")
    create = _forwarded("create", _created)
    open = _forwarded("open", _opened)
    read = _forwarded("read")
    write = _forwarded("write")
    flush = _forwarded("flush")
    fsync = _forwarded("fsync")
    release = _forwarded("release")
    opendir = _forwarded("opendir")
    releasedir = _forwarded("releasedir")
    fsyncdir = _forwarded("fsyncdir")

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node, times in inode_list:
            self.operations.forget(node, times)

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        call = functools.partial(self.operations.access, inode, mode, _context(ctx))
        await self.completed("access", call)
        return True

    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        # pyfuse3 has already replaced UTIME_NOW by the time of the request.
        wanted = {
            name: getattr(attr, f"st_{name}")
            for name in ("uid", "gid", "size", "mode", "atime_ns", "mtime_ns")
            if getattr(fields, f"update_{name.removesuffix('_ns')}")
        }
        change = functools.partial(self.operations.setattr, opened=fh is not None)
        return await self.completed(
            "setattr", lambda: self._attributes(change(inode, wanted, _context(ctx)))
        )

    # pyfuse3 does not pass XATTR_CREATE and XATTR_REPLACE.  For them it first calls getxattr with
    # the same context object, and then setxattr if the result agrees with the flag.  The result of
    # getxattr tells which flag it was.  The engine gets the flag, because only its check is atomic.

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        def look() -> bytes:
            self._xattr_probe = ctx, os.XATTR_CREATE
            value = self.operations.getxattr(inode, name, _context(ctx))
            self._xattr_probe = ctx, os.XATTR_REPLACE
            return value

        return await self.completed("getxattr", look)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        probe = self._xattr_probe
        flags = probe[1] if probe is not None and probe[0] is ctx else 0
        words = inode, name, value, flags, _context(ctx)
        await self.completed("setxattr", lambda: self.operations.setxattr(*words))

    async def readdir(self, fh: int, cookie: int, token: pyfuse3.ReaddirToken) -> None:
        def take(one: Listed) -> bool:
            told = self._entry((one.node, one.attr))
            return bool(pyfuse3.readdir_reply(token, one.name, told, one.following))

        call = functools.partial(self.operations.readdirplus, fh, cookie, take)
        await self.completed("readdir", call)


def _context(ctx: RequestContext) -> Context:
    return Context(ctx.uid, ctx.gid, ctx.pid, ctx.umask)
