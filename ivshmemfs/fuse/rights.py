"""Permission checks of a mount that only root may use.

On other mounts the kernel checks permissions, which costs one more request for each look-up.  On a
root-only mount the daemon checks them.  Root is nearly always permitted, usually as the owner; the
attributes alone show that.  If they do not permit an operation, the caller's capabilities decide
(see `callers`), as in the kernel's generic_permission and setattr_prepare.  A root process may have
no capabilities: in a container, after capset(2), or in its own user namespace.

The kernel still checks what it checks for every file system: read-only mounts, and extended
attributes other than those of users.  It does not see sticky bits here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from ivshmemfs.engine import NOW, Attr, Context, Filesystem, acl
from ivshmemfs.engine.xattr import LISTS
from ivshmemfs.errors import FsError
from ivshmemfs.fuse import callers
from ivshmemfs.fuse.callers import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_FOWNER,
    CAP_FSETID,
)
from ivshmemfs.fuse.protocol import NO_ID

EXECUTE, WRITE, READ = 1, 2, 4
#: The permissions on a directory that are needed to change its names.
CHANGE_NAMES = WRITE | EXECUTE
_FMODE_EXEC = 0x20  # flag of an open by execve(2)
_OPENED = {os.O_RDONLY: READ, os.O_WRONLY: WRITE}
_PRIVILEGES = stat.S_ISUID | stat.S_ISGID


class Rights:
    """Checks the callers of *fs*; *presented* applies the mount options uid=, gid= and umask=.

    With *enforced* False the kernel checks, and this class permits everything.  With *obeys_lists*
    access lists count.
    """

    def __init__(
        self,
        fs: Filesystem,
        presented: Callable[[Attr], Attr],
        *,
        enforced: bool,
        obeys_lists: bool = True,
    ) -> None:
        self._fs = fs
        self._presented = presented
        self.enforced = enforced
        self._obeys_lists = obeys_lists

    def need(self, ino: int, ctx: Context, mask: int) -> None:
        """Raise EACCES unless the caller may READ, WRITE or EXECUTE an inode."""
        if self.enforced:
            self._permitted(ino, ctx, mask)

    def _permitted(self, ino: int, ctx: Context, mask: int) -> Attr:
        """Do the same where permissions are enforced; return the presented attributes."""
        if ctx.uid:
            raise FsError(errno.EACCES)
        attr = self._presented(self._fs.getattr(ino))
        if attr.uid != 0 or attr.mode >> 6 & mask != mask:
            self._check_permission(attr, ctx, mask)
        return attr

    def _check_permission(self, attr: Attr, ctx: Context, mask: int) -> None:
        """Raise EACCES by the rules of the kernel's generic_permission."""
        mode = attr.mode
        if self._is_permitted(attr, ctx, mask):
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

    def _is_permitted(self, attr: Attr, ctx: Context, mask: int) -> bool:
        """Return whether the mode, or the access list, gives the caller all of *mask*."""
        if ctx.uid == attr.uid:
            return attr.mode >> 6 & mask == mask
        if attr.mode & stat.S_IRWXG and self._obeys_lists:
            entries = self._fs.access_list(attr.ino)
            if entries:

                def is_in(gid: int) -> bool:
                    return self._in_group(ctx, gid)

                return acl.permits(entries, ctx.uid, attr.uid, attr.gid, mask, is_in)
        shift = 3 if self._in_group(ctx, attr.gid) else 0
        return attr.mode >> shift & mask == mask

    def _in_group(self, ctx: Context, gid: int) -> bool:
        return ctx.gid == gid or gid in self._fs.groups_of(ctx.pid)

    def need_open(self, ino: int, ctx: Context, flags: int) -> None:
        """Raise EACCES unless the caller may open a file with these flags."""
        if self.enforced:
            mask = _OPENED.get(flags & os.O_ACCMODE, READ | WRITE)
            if flags & _FMODE_EXEC:
                mask = EXECUTE
            self.need(ino, ctx, mask | (WRITE if flags & os.O_TRUNC else 0))

    def need_removal(self, folder: int, name: bytes, ctx: Context) -> None:
        """Raise EACCES or EPERM unless the caller may remove a name."""
        if not self.enforced:
            return
        above = self._permitted(folder, ctx, CHANGE_NAMES)
        if above.mode & stat.S_ISVTX and ctx.uid != above.uid:
            victim = self._fs.find(folder, name)
            if victim is not None and ctx.uid != self._presented(victim).uid:
                self._need_ownership(ctx)

    def need_rename(self, old: int, name: bytes, new: int, new_name: bytes, ctx: Context) -> None:
        """Raise EACCES or EPERM unless the caller may move an entry between two directories."""
        if not self.enforced:
            return
        self.need_removal(old, name, ctx)
        self.need_removal(new, new_name, ctx)
        if old != new:
            for one in (self._fs.find(old, name), self._fs.find(new, new_name)):
                if one is not None and stat.S_ISDIR(one.mode):  # its ".." changes
                    self.need(one.ino, ctx, WRITE)

    @staticmethod
    def _need_ownership(ctx: Context) -> None:
        if not callers.is_capable(ctx.pid, CAP_FOWNER):
            raise FsError(errno.EPERM)

    def need_attribute(self, ino: int, name: bytes, ctx: Context, mask: int) -> None:
        """Raise EACCES or EPERM unless the caller may use an extended attribute.

        The kernel checks names of other namespaces than `user`, and since Linux 6.2 the owner that
        sets an access list.
        """
        if not self.enforced:
            return
        if name in LISTS and mask == WRITE:
            if ctx.uid != self._presented(self._fs.getattr(ino)).uid:
                self._need_ownership(ctx)
            return
        if not name.startswith(b"user."):
            return
        self.need(ino, ctx, mask)
        attr = self._presented(self._fs.getattr(ino))
        sticky = stat.S_ISDIR(attr.mode) and attr.mode & stat.S_ISVTX
        if mask == WRITE and sticky and ctx.uid != attr.uid:
            self._need_ownership(ctx)

    def need_change(self, ino: int, ctx: Context, changes: dict[str, int], *, opened: bool) -> None:
        """Raise EPERM or EACCES unless the caller may make these changes of attributes.

        *opened* is True for a change through a handle.  Clears the set-group-ID bit of a new mode
        if the caller may not set it.
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
        """Raise unless the caller may set times: "now" needs write permission, others ownership."""
        times = [changes[field] for field in ("atime_ns", "mtime_ns") if field in changes]
        if not times or callers.is_capable(ctx.pid, CAP_FOWNER):
            return
        if times != [NOW, NOW]:
            raise FsError(errno.EPERM)
        self._check_permission(attr, ctx, WRITE)

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
        """Raise EPERM unless the caller may set the mode.

        A change that only clears set-ID bits is allowed: the kernel makes it for a caller that
        writes.
        """
        sheds = attr.mode & 0o7777 & ~_PRIVILEGES == mode & ~_PRIVILEGES and not (
            mode & ~attr.mode & _PRIVILEGES
        )
        if not owns and not sheds:
            self._need_ownership(ctx)

    @staticmethod
    def keeps_set_id(ctx: Context) -> bool:
        """Return whether a file keeps its set-ID bits when the caller writes to it."""
        return ctx.uid in (0, NO_ID) and callers.is_capable(ctx.pid, CAP_FSETID)
