"""One FUSE request to one engine call.

A handler converts arguments, calls the engine and converts the result; all of them are plain
functions inside the one wrapper `request`, which makes the coroutine that pyfuse3 awaits, retries
while the engine is busy, and turns every error into an errno.

Nothing about files is remembered here but the table of open handles.  Nothing is cached by the
kernel either: all timeouts are 0 and a failed lookup is ENOENT, which the kernel does not keep,
because another machine may change everything at any time.

The objects that replies are made of (`EntryAttributes`, `FileInfo`, `StatvfsData`) are used again
and again: pyfuse3 copies them to the kernel before anything else can run, and changes none.
"""
# ruff: noqa: D102 - what each handler is for, pyfuse3.Operations says

from __future__ import annotations

import errno
import functools
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields

from ivshmemfs.engine import Attr, Context, Filesystem, Handle
from ivshmemfs.errors import Busy, FsError, IvshmemfsError, StaleHandle
from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.fuse.nodes import Nodes

log = logging.getLogger(__name__)

#: Seconds to wait before the first and, growing, between later attempts of a busy operation.
FIRST_DELAY = 0.0002
LONGEST_DELAY = 0.005
#: Seconds after which a busy operation fails.  It fails with EIO: programs know that as the end
#: of an operation, while EAGAIN on a file tells many of them to wait until it is readable, which
#: it always is.
PATIENCE = 10.0

#: Replies with attributes that are kept for when the same attributes are asked for again.  This is
#: no cache: the engine is asked each time, and answers with the same object while nothing changed.
REPLIES_KEPT = 1000

#: Errors of an operation that point to damage or a dead region, so that the log must name them.
_ALARMING = frozenset((errno.EUCLEAN, errno.EIO, errno.EFAULT, errno.ENXIO, errno.ENODEV))

_XATTR_CREATE = 1
_XATTR_REPLACE = 2
_S_IFMT, _S_IFDIR = 0o170000, 0o040000

P = ParamSpec("P")
R = TypeVar("R")


class Ownership(NamedTuple):
    """How owners and permissions are presented; the stored ones stay as they are."""

    uid: int | None = None
    gid: int | None = None
    umask: int = 0


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
    """`request` for a handler that must know by which number the kernel names a directory."""
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
                # A directory that has another number since another machine moved it: see `nodes`.
                args = (self.inode_of(first), *args[1:])  # type: ignore[assignment]
            return call(self, *args, **kwargs)
        except Busy:
            started = time.monotonic()
        except Exception as error:
            raise failure(operation, error) from None
        delay = FIRST_DELAY
        while True:
            await self.pause(delay * random.uniform(0.5, 1.5))
            delay = min(delay * 1.5, LONGEST_DELAY)
            try:
                return call(self, *args, **kwargs)
            except Busy as error:
                if self.ending:
                    raise FUSEError(errno.EIO) from None
                if time.monotonic() - started > PATIENCE:
                    log.error("%s: still busy after %.0f s: %s", operation, PATIENCE, error)
                    raise FUSEError(errno.EIO) from None
            except Exception as error:
                raise failure(operation, error) from None

    return handle


def failure(operation: str, error: Exception) -> FUSEError:
    """What the caller of *operation* gets for *error*; logs what nobody expects."""
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, IvshmemfsError):
        code = error.errno
        if code in _ALARMING or not isinstance(error, FsError):
            log.error("%s: %s", operation, error)
        if 0 < code < 1000:  # what libfuse can send; 0 would mean success
            return FUSEError(code)
        log.error("%s: an error with the impossible errno %d", operation, code)
        return FUSEError(errno.EIO)
    if isinstance(error, OSError) and error.errno == errno.EIO:
        log.error("%s: %s", operation, error)  # the region was truncated, or its device is gone
        return FUSEError(errno.EIO)
    log.error("%s: unexpected %s", operation, type(error).__name__, exc_info=error)
    return FUSEError(errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO)


class Adapter(pyfuse3.Operations):
    """The handlers.  *pause* sleeps for some seconds while other requests are served."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        fs: Filesystem,
        pause: Callable[[float], Awaitable[None]],
        *,
        ownership: Ownership | None = None,
        page_cache: bool = False,
    ) -> None:
        super().__init__()
        self.pause = pause
        #: Set when the mount is ending: operations that wait fail now.
        self.ending = False
        self._fs = fs
        self._ownership = ownership or Ownership()
        self._presented_as_stored = self._ownership == Ownership()
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)
        self._unreleased: list[Callable[[], None]] = []
        self._xattr_probe: tuple[RequestContext, int] | None = None
        self._replies: dict[int, tuple[Attr, EntryAttributes]] = {}
        self._listed = _new_entry()
        self._info = FileInfo(direct_io=not page_cache, keep_cache=False)
        self._statvfs = pyfuse3.StatvfsData()
        self._nodes = Nodes()
        self.inode_of = self._nodes.inode_of
        self._folders: dict[int, int] = {}  # by handle: the number that was opened

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

    def _found(self, parent: int, name: bytes, attr: Attr) -> EntryAttributes:
        """*attr* for the kernel, of what was looked up by a name in the directory *parent*."""
        if attr.mode & _S_IFMT != _S_IFDIR:
            return self._reply(attr)
        if name in (b".", b".."):  # somebody comes with a file handle (NFS)
            node = self._nodes.seen(attr.ino)
        else:
            node = self._nodes.found(attr.ino, parent, name)
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
        ) = attr
        if not self._presented_as_stored:
            shown = self._ownership
            entry.st_mode = pyfuse3.ModeT(attr.mode & ~shown.umask)
            if shown.uid is not None:
                entry.st_uid = shown.uid
            if shown.gid is not None:
                entry.st_gid = shown.gid
        return entry

    def _opened(self, handle: Handle) -> FileInfo:
        info = self._info
        info.fh = pyfuse3.FileHandleT(self._keep(handle))
        return info

    def _keep(self, handle: Handle) -> int:
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    # --- names ----------------------------------------------------------------------------

    @request_by_number
    def lookup(self, parent: int, name: bytes, _ctx: RequestContext) -> EntryAttributes:
        ino = self.inode_of(parent)
        attr = self._fs.getattr(ino) if name == b"." else self._fs.lookup(ino, name)
        return self._found(parent, name, attr)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node, times in inode_list:
            with suppress(StaleHandle):
                ino = self.inode_of(node)
                if self._nodes.forget(node, times):
                    self._fs.forget(ino)

    @request
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._reply(self._fs.mknod(parent, name, mode, rdev, _context(ctx)))

    @request_by_number
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        attr = self._fs.mkdir(self.inode_of(parent), name, mode, _context(ctx))
        return self._found(parent, name, attr)

    @request
    def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._reply(self._fs.symlink(parent, name, target, _context(ctx)))

    @request
    def readlink(self, inode: int, _ctx: RequestContext) -> bytes:
        return bytes(self._fs.readlink(inode))

    @request
    def link(self, inode: int, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._reply(self._fs.link(inode, self.inode_of(parent), name, _context(ctx)))

    @request
    def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self._fs.unlink(parent, name, _context(ctx))

    @request
    def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self._fs.rmdir(parent, name, _context(ctx))

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
        old, new = self.inode_of(parent), self.inode_of(new_parent)
        moved, exchanged = self._fs.rename(old, name, new, new_name, flags, _context(ctx))
        self._nodes.moved((parent, name), (new_parent, new_name), moved, exchanged)

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
        _fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        # UTIME_NOW has become the time of the request already.
        changes: dict[str, int] = {}
        if fields.update_mode:
            changes["mode"] = attr.st_mode & 0o7777
        if fields.update_uid:
            self._change_owner(changes, "uid", attr.st_uid, self._ownership.uid)
        if fields.update_gid:
            self._change_owner(changes, "gid", attr.st_gid, self._ownership.gid)
        if fields.update_size:
            changes["size"] = attr.st_size
        if fields.update_atime:
            changes["atime_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["mtime_ns"] = attr.st_mtime_ns
        return self._reply(self._fs.setattr(inode, _context(ctx), **changes))

    @staticmethod
    def _change_owner(changes: dict[str, int], field: str, value: int, shown: int | None) -> None:
        """With a presented owner, only that one can be set, and setting it changes nothing."""
        if shown is None:
            changes[field] = value
        elif value != shown:
            raise FsError(errno.EPERM, f"the mount option {field}= fixes the owner")

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
        self._xattr_probe = (ctx, _XATTR_CREATE)
        value = bytes(self._fs.getxattr(inode, name))
        self._xattr_probe = (ctx, _XATTR_REPLACE)
        return value

    @request
    def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        probe = self._xattr_probe
        flags = probe[1] if probe is not None and probe[0] is ctx else 0
        self._fs.setxattr(inode, name, value, flags, _context(ctx))

    @request
    def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return self._fs.listxattr(inode, _context(ctx))

    @request
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._fs.removexattr(inode, name, _context(ctx))

    # --- files ----------------------------------------------------------------------------

    @request
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, attr = self._fs.create(parent, name, mode, flags, _context(ctx))
        reply = self._reply(attr)
        return self._opened(handle), reply

    @request
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return self._opened(self._fs.open(inode, flags, _context(ctx)))

    @request
    def read(self, fh: int, offset: int, size: int) -> Any:
        return self._fs.read(self._handles[fh], offset, size)

    @request
    def write(self, fh: int, offset: int, data: bytes) -> int:
        return self._fs.write(self._handles[fh], offset, data)

    @request
    def flush(self, fh: int) -> None:
        # Each write is published when it returns; the kernel does not ask again after ENOSYS.
        raise FUSEError(errno.ENOSYS)

    @request
    def fsync(self, fh: int, _datasync: bool) -> None:
        self._fs.fsync(self._handles[fh])

    @request
    def release(self, fh: int) -> None:
        self._let_go(self._fs.release, fh)

    def _let_go(self, release: Callable[[Handle], None], fh: int) -> None:
        """Forget a handle now; when the engine is busy, the upkeep releases it later."""
        handle = self._handles.pop(fh)
        try:
            release(handle)
        except Busy:
            self._unreleased.append(functools.partial(release, handle))

    # --- directories ----------------------------------------------------------------------

    @request_by_number
    def opendir(self, inode: int, _ctx: RequestContext) -> int:
        fh = self._keep(self._fs.opendir(self.inode_of(inode)))
        self._folders[fh] = inode
        return fh

    @request
    def readdir(self, fh: int, cookie: int, token: pyfuse3.ReaddirToken) -> None:
        reported = False
        folder = self._folders[fh]
        try:
            for name, attr, following in self._fs.readdir(self._handles[fh], cookie):
                entry = self._filled(self._listed, attr)
                node = 0
                if attr.mode & _S_IFMT == _S_IFDIR and name not in (b".", b".."):
                    node = self._nodes.found(attr.ino, folder, name)
                    entry.st_ino = pyfuse3.InodeT(node)
                if not pyfuse3.readdir_reply(token, name, entry, following):
                    if node and self._nodes.forget(node, 1):  # it was not told after all
                        self._fs.forget(attr.ino)
                    return
                reported = True
        except Exception:
            # What has been reported stands; the kernel goes on from there, and whoever is still
            # busy or broken then says so again.
            if not reported:
                raise

    @request
    def releasedir(self, fh: int) -> None:
        del self._folders[fh]
        self._let_go(self._fs.releasedir, fh)

    @request
    def fsyncdir(self, fh: int, _datasync: bool) -> None:
        self._fs.fsync(self._handles[fh])

    # --- upkeep ---------------------------------------------------------------------------

    def upkeep(self) -> None:
        """What must be done about once a second.  Never raises; errors are logged."""
        try:
            self._release_late()
            self._fs.tick()
        except Busy:
            pass  # next time
        except Exception as error:
            failure("upkeep", error)

    def _release_late(self) -> None:
        while self._unreleased:
            release = self._unreleased.pop()
            try:
                release()
            except Busy:
                self._unreleased.append(release)
                raise

    @property
    def open_handles(self) -> int:
        """How many files and directories are open."""
        return len(self._handles)


def _new_entry() -> EntryAttributes:
    """Attributes that the kernel must not keep."""
    entry = EntryAttributes()
    entry.entry_timeout = 0
    entry.attr_timeout = 0
    return entry


def _context(ctx: RequestContext) -> Context:
    return Context(ctx.uid, ctx.gid, ctx.umask, ctx.pid)
