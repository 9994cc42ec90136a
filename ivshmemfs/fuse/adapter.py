"""One FUSE request that comes through pyfuse3 to one engine call.

A handler converts arguments, calls what is `served` and converts the result; all of them are plain
functions inside the one wrapper `request`, which makes the coroutine that pyfuse3 awaits, retries
while the engine is busy, and turns every error into an errno.

The objects that replies are made of (`EntryAttributes`, `FileInfo`, `StatvfsData`) are used again
and again: pyfuse3 copies them to the kernel before anything else can run, and changes none.
"""
# ruff: noqa: D102 - what each handler is for, pyfuse3.Operations says

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from ivshmemfs.engine import Attr, Context
from ivshmemfs.errors import Busy
from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.fuse.rights import ENTER, READ, WRITE
from ivshmemfs.fuse.served import Entry, Served, failure

#: Replies with attributes that are kept for when the same attributes are asked for again.  This is
#: no cache: the engine is asked each time, and answers with the same object while nothing changed.
REPLIES_KEPT = 1000

_XATTR_CREATE = 1
_XATTR_REPLACE = 2

P = ParamSpec("P")
R = TypeVar("R")


def request(
    call: Callable[Concatenate[Adapter, P], R],
) -> Callable[Concatenate[Adapter, P], Coroutine[Any, Any, R]]:
    """Make a plain function the handler of a request: the one place where errors become errno.

    Its first argument, where that is a number of the kernel's, arrives as the inode it means.
    """
    return _handler(call, numbers=False)


def request_by_number(
    call: Callable[Concatenate[Adapter, P], R],
) -> Callable[Concatenate[Adapter, P], Coroutine[Any, Any, R]]:
    """`request` for a handler that must know by which number the kernel names an inode."""
    return _handler(call, numbers=True)


def _handler(
    call: Callable[Concatenate[Adapter, P], R], *, numbers: bool
) -> Callable[Concatenate[Adapter, P], Coroutine[Any, Any, R]]:
    operation = call.__name__

    @functools.wraps(call)
    async def handle(self: Adapter, /, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        try:
            if first.__class__ is int and first > MAX_INO and not numbers:
                # It has another number since another machine moved it: see `nodes`.
                args = (self.served.inode_of(first), *args[1:])  # type: ignore[assignment]
            return call(self, *args, **kwargs)
        except Busy as error:
            busy = error
        except Exception as error:
            raise failure(operation, error) from None
        again: R = await self.served.again(operation, lambda: call(self, *args, **kwargs), busy)
        return again

    return handle


class Adapter(pyfuse3.Operations):
    """The handlers of what is *served*; with *page_cache* files are opened through it."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, served: Served, *, page_cache: bool = False) -> None:
        super().__init__()
        self.served = served
        self._fs = served.fs
        self._xattr_probe: tuple[RequestContext, int] | None = None
        self._replies: dict[int, tuple[Attr, EntryAttributes]] = {}
        self._listed = _new_entry()
        self._info = FileInfo(direct_io=not page_cache, keep_cache=False)
        self._statvfs = pyfuse3.StatvfsData()

    # --- conversions ----------------------------------------------------------------------

    def _reply(self, attr: Attr) -> EntryAttributes:
        """*attr* for the kernel; filled in again only when it is another object than last time."""
        known = self._replies.get(attr.ino)
        if known is not None and known[0] is attr:
            return known[1]
        if len(self._replies) >= REPLIES_KEPT:
            self._replies.clear()
        entry = self._filled(_new_entry(), attr)
        self._replies[attr.ino] = attr, entry
        return entry

    def _found(self, found: tuple[int, Attr]) -> EntryAttributes:
        """For the kernel: what was looked up by a name, and by which number it shall be known."""
        node, attr = found
        if node == attr.ino:
            return self._reply(attr)
        entry = self._filled(_new_entry(), attr)
        entry.st_ino = pyfuse3.InodeT(node)
        return entry

    def _filled(self, entry: EntryAttributes, attr: Attr) -> EntryAttributes:
        (
            entry.st_ino,
            entry.st_mode,
            entry.st_nlink,
            entry.st_uid,
            entry.st_gid,
            entry.st_rdev,
            entry.st_size,
            entry.st_blocks,
            entry.st_atime_ns,
            entry.st_mtime_ns,
            entry.st_ctime_ns,
        ) = self.served.presented(attr)
        return entry

    def _opened(self, number: int) -> FileInfo:
        self._info.fh = pyfuse3.FileHandleT(number)
        return self._info

    # --- names ----------------------------------------------------------------------------

    @request_by_number
    def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = self.served.lookup(parent, name, _context(ctx))
        if found is None:
            raise FUSEError(errno.ENOENT)
        return self._found(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node, times in inode_list:
            self.served.forget(node, times)

    @request
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        asks = _context(ctx)
        self.served.rights.need(parent, asks, ENTER)
        return self._reply(self._fs.mknod(parent, name, mode, rdev, asks))

    @request_by_number
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._found(self.served.mkdir(parent, name, mode, _context(ctx)))

    @request
    def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        asks = _context(ctx)
        self.served.rights.need(parent, asks, ENTER)
        return self._reply(self._fs.symlink(parent, name, target, asks))

    @request
    def readlink(self, inode: int, _ctx: RequestContext) -> bytes:
        return bytes(self._fs.readlink(inode))

    @request
    def link(self, inode: int, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        asks, folder = _context(ctx), self.served.inode_of(parent)
        self.served.rights.need(folder, asks, ENTER)
        return self._reply(self._fs.link(inode, folder, name, asks))

    @request
    def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self.served.unlink(parent, name, _context(ctx))

    @request
    def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self.served.rmdir(parent, name, _context(ctx))

    @request_by_number
    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self.served.rename(parent, name, new_parent, new_name, flags, _context(ctx))

    # --- attributes -----------------------------------------------------------------------

    @request
    def getattr(self, inode: int, _ctx: RequestContext) -> EntryAttributes:
        return self._reply(self._fs.getattr(inode))

    @request
    def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        # UTIME_NOW has become the time of the request already.
        changes = self.served.owner_changes(
            attr.st_uid if fields.update_uid else None, attr.st_gid if fields.update_gid else None
        )
        if fields.update_size:
            changes["size"] = attr.st_size
        if fields.update_mode:
            changes |= self.served.mode_change(attr.st_mode, changes)
        if fields.update_atime:
            changes["atime_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["mtime_ns"] = attr.st_mtime_ns
        asks = _context(ctx)
        self.served.rights.need_change(inode, asks, changes, opened=fh is not None)
        return self._reply(self._fs.setattr(inode, asks, **changes))

    @request
    def statfs(self, _ctx: RequestContext) -> pyfuse3.StatvfsData:
        stats = self._fs.statfs()
        reply = self._statvfs
        reply.f_bsize = reply.f_frsize = stats.block_size
        reply.f_blocks = stats.blocks
        reply.f_bfree = stats.blocks_free
        reply.f_bavail = stats.blocks_avail
        reply.f_files = stats.files
        reply.f_ffree = reply.f_favail = stats.files_free
        reply.f_namemax = stats.name_max
        return reply

    # --- extended attributes --------------------------------------------------------------
    #
    # pyfuse3 does not hand on XATTR_CREATE and XATTR_REPLACE.  It calls getxattr with the context
    # of the same request first and calls setxattr, without a pause, only when that found what the
    # flag demands.  So a setxattr that follows a getxattr with the very same context object had a
    # flag, and which one follows from what was found.  The engine gets the flag, because between
    # machines only its own check is safe.

    @request
    def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        self.served.rights.need_attribute(inode, name, _context(ctx), READ)
        self._xattr_probe = (ctx, _XATTR_CREATE)
        value = bytes(self._fs.getxattr(inode, name))
        self._xattr_probe = (ctx, _XATTR_REPLACE)
        return value

    @request
    def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        probe = self._xattr_probe
        flags = probe[1] if probe is not None and probe[0] is ctx else 0
        self.served.rights.need_attribute(inode, name, _context(ctx), WRITE)
        self._fs.setxattr(inode, name, value, flags, _context(ctx))

    @request
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return self._fs.listxattr(inode, _context(ctx))

    @request
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self.served.rights.need_attribute(inode, name, _context(ctx), WRITE)
        self._fs.removexattr(inode, name, _context(ctx))

    # --- files ----------------------------------------------------------------------------

    @request
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        asks = _context(ctx)
        self.served.rights.need(parent, asks, ENTER)
        handle, attr = self._fs.create(parent, name, mode, flags, asks)
        reply = self._reply(attr)
        return self._opened(self.served.keep(handle)), reply

    @request_by_number
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return self._opened(self.served.open(inode, flags, _context(ctx)))

    @request
    def read(self, fh: int, offset: int, size: int) -> Any:
        return self._fs.read(self.served.handles[fh], offset, size)

    @request
    def write(self, fh: int, offset: int, data: bytes) -> int:
        return self._fs.write(self.served.handles[fh], offset, data)

    @request
    def flush(self, fh: int) -> None:
        # Each write is published when it returns; the kernel does not ask again after ENOSYS.
        raise FUSEError(errno.ENOSYS)

    @request
    def fsync(self, fh: int, _datasync: bool) -> None:
        self._fs.fsync(self.served.handles[fh])

    @request
    def release(self, fh: int) -> None:
        self.served.release(fh)

    # --- directories ----------------------------------------------------------------------

    @request_by_number
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self.served.opendir(inode, _context(ctx))

    @request
    def readdir(self, fh: int, cookie: int, token: pyfuse3.ReaddirToken) -> None:
        def take(entry: Entry) -> bool:
            told = self._filled(self._listed, entry.attr)
            told.st_ino = pyfuse3.InodeT(entry.node)
            return bool(pyfuse3.readdir_reply(token, entry.name, told, entry.following))

        self.served.listing(fh, cookie, take)

    @request
    def releasedir(self, fh: int) -> None:
        self.served.releasedir(fh)

    @request
    def fsyncdir(self, fh: int, _datasync: bool) -> None:
        self._fs.fsync(self.served.handles[fh])


def _new_entry() -> EntryAttributes:
    """Attributes that the kernel must not keep."""
    entry = EntryAttributes()
    entry.entry_timeout = 0
    entry.attr_timeout = 0
    return entry


def _context(ctx: RequestContext) -> Context:
    return Context(ctx.uid, ctx.gid, ctx.pid)
