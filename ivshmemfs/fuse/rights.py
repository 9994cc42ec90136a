"""Permissions of a mount that only root may use, where the kernel leaves checking to the daemon.

The kernel checks them by itself for the price of a request more for each look at a name.  Root is
nearly always permitted, and most often as the owner: that is seen from the attributes alone.  Where
they do not permit it, the caller's capabilities decide (see `callers`), as the kernel does it in
generic_permission and setattr_prepare: a process may be root and have none, in a container, after
capset(2), or in a user namespace of its own.

The kernel still checks by itself what it checks for every file system: read-only mounts, who may
use other extended attributes than those of users.  Sticky bits it is not told of.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from ivshmemfs.engine import NOW, Attr, Context, Filesystem
from ivshmemfs.errors import FsError
from ivshmemfs.fuse import callers
from ivshmemfs.fuse.callers import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_FOWNER,
    CAP_FSETID,
)

EXECUTE, WRITE, READ = 1, 2, 4
#: What changes names in a directory.
ENTER = WRITE | EXECUTE
_FMODE_EXEC = 0x20  # among the flags of an open: the file is to be run
_OPENED = {os.O_RDONLY: READ, os.O_WRONLY: WRITE}
_PRIVILEGES = stat.S_ISUID | stat.S_ISGID


class Rights:
    """Checks callers of *fs*; *presented* shows attributes as the mount options want them.

    Where *enforced* is False the kernel checks, and everything is permitted here.
    """

    def __init__(
        self, fs: Filesystem, presented: Callable[[Attr], Attr], *, enforced: bool
    ) -> None:
        self._fs = fs
        self._presented = presented
        self.enforced = enforced

    def need(self, ino: int, ctx: Context, mask: int) -> None:
        """Raise EACCES unless the caller may READ, WRITE or EXECUTE an inode."""
        if not self.enforced:
            return
        if ctx.uid:
            raise FsError(errno.EACCES)
        attr = self._presented(self._fs.getattr(ino))
        if attr.uid == 0 and attr.mode >> 6 & mask == mask:
            return
        self._judge(attr, ctx, mask)

    def _judge(self, attr: Attr, ctx: Context, mask: int) -> None:
        """As generic_permission in the kernel."""
        mode = attr.mode
        shift = 6 if ctx.uid == attr.uid else 3 if self._in_group(ctx, attr.gid) else 0
        if mode >> shift & mask == mask:
            return
        if stat.S_ISDIR(mode):
            searches, overrides = not mask & WRITE, True
        else:
            searches, overrides = mask == READ, bool(not mask & EXECUTE or mode & 0o111)
        if overrides and callers.is_capable(ctx.pid, CAP_DAC_OVERRIDE):
            return
        if searches and callers.is_capable(ctx.pid, CAP_DAC_READ_SEARCH):
            return
        raise FsError(errno.EACCES)

    def _in_group(self, ctx: Context, gid: int) -> bool:
        return ctx.gid == gid or gid in self._fs.groups_of(ctx.pid)

    def need_open(self, ino: int, ctx: Context, flags: int) -> None:
        """Raise EACCES unless the caller may open a file so."""
        if self.enforced:
            mask = _OPENED.get(flags & os.O_ACCMODE, READ | WRITE)
            if flags & _FMODE_EXEC:
                mask = EXECUTE
            self.need(ino, ctx, mask | (WRITE if flags & os.O_TRUNC else 0))

    def need_removal(self, folder: int, name: bytes, ctx: Context) -> Attr | None:
        """Raise EACCES, or EPERM, unless the caller may take a name away; returns what it is."""
        if not self.enforced:
            return None
        self.need(folder, ctx, ENTER)
        victim = self._fs.find(folder, name)
        if victim is not None:
            above = self._presented(self._fs.getattr(folder))
            owners = above.uid, self._presented(victim).uid
            if above.mode & stat.S_ISVTX and ctx.uid not in owners:
                self._need_ownership(ctx)
        return victim

    def need_rename(self, old: int, name: bytes, new: int, new_name: bytes, ctx: Context) -> None:
        """The same for moving an entry between two directories."""
        if not self.enforced:
            return
        moved = self.need_removal(old, name, ctx)
        replaced = self.need_removal(new, new_name, ctx)
        if old != new:
            for one in (moved, replaced):
                if one is not None and stat.S_ISDIR(one.mode):  # its ".." changes
                    self.need(one.ino, ctx, WRITE)

    @staticmethod
    def _need_ownership(ctx: Context) -> None:
        if not callers.is_capable(ctx.pid, CAP_FOWNER):
            raise FsError(errno.EPERM)

    def need_attribute(self, ino: int, name: bytes, ctx: Context, mask: int) -> None:
        """Raise EACCES, or EPERM, unless the caller may use an extended attribute.

        Names of other kinds are checked by the kernel.
        """
        if not self.enforced or not name.startswith(b"user."):
            return
        self.need(ino, ctx, mask)
        attr = self._presented(self._fs.getattr(ino))
        sticky = stat.S_ISDIR(attr.mode) and attr.mode & stat.S_ISVTX
        if mask == WRITE and sticky and ctx.uid != attr.uid:
            self._need_ownership(ctx)

    def need_change(self, ino: int, ctx: Context, changes: dict[str, int], *, opened: bool) -> None:
        """Raise EPERM, or EACCES, unless the caller may change attributes, as setattr takes them.

        *opened*: through a handle, which may be open for writing.  A mode loses its set-group-ID
        where the caller could not give it.
        """
        if not self.enforced:
            return
        if "size" in changes and not opened:
            self.need(ino, ctx, WRITE)
        if ctx.uid:
            raise FsError(errno.EACCES)
        attr = self._presented(self._fs.getattr(ino))
        owns = attr.uid == ctx.uid
        self._need_owner_change(attr, ctx, changes, owns=owns)
        mode = changes.get("mode")
        if mode is not None:
            self._need_mode(attr, ctx, mode, owns=owns)
            gid = changes.get("gid", attr.gid)
            if mode & stat.S_ISGID and not self._in_group(ctx, gid) and not self.keeps_set_id(ctx):
                changes["mode"] = mode & ~stat.S_ISGID
        if not owns and "size" not in changes:
            self._need_times(attr, ctx, changes)

    def _need_times(self, attr: Attr, ctx: Context, changes: dict[str, int]) -> None:
        """Whoever may write may touch."""
        times = [changes[field] for field in ("atime_ns", "mtime_ns") if field in changes]
        if not times or callers.is_capable(ctx.pid, CAP_FOWNER):
            return
        if times != [NOW, NOW]:
            raise FsError(errno.EPERM)
        self._judge(attr, ctx, WRITE)

    def _need_owner_change(
        self, attr: Attr, ctx: Context, changes: dict[str, int], *, owns: bool
    ) -> None:
        uid, gid = changes.get("uid"), changes.get("gid")
        fits = uid is None or (owns and uid == attr.uid)
        if gid is not None and not (owns and (gid == attr.gid or self._in_group(ctx, gid))):
            fits = False
        if not fits and not callers.is_capable(ctx.pid, CAP_CHOWN):
            raise FsError(errno.EPERM)

    def _need_mode(self, attr: Attr, ctx: Context, mode: int, *, owns: bool) -> None:
        """The kernel also takes set-ID bits away by itself, from whoever writes."""
        sheds = attr.mode & 0o7777 & ~_PRIVILEGES == mode & ~_PRIVILEGES and not (
            mode & ~attr.mode & _PRIVILEGES
        )
        if not owns and not sheds:
            self._need_ownership(ctx)

    @staticmethod
    def keeps_set_id(ctx: Context) -> bool:
        """Whether what a caller writes keeps its set-ID bits."""
        return not ctx.uid and callers.is_capable(ctx.pid, CAP_FSETID)
