"""Credentials of callers: they decide which privileges a change takes from a file.

    capabilities       go with every change of contents, owner or group
    set-user-ID        goes when an unprivileged caller changes the file
    set-group-ID       of a program (the group may execute it): the same;
                       of another file: goes when that caller is an outsider, not in its group

The FUSE layer sets `groups_of` and `keeps_set_id` once, before the first request.  Without them a
caller has one group, and only root keeps set-ID bits.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection

from ivshmemfs.engine import privileges
from ivshmemfs.engine.handle import Handle
from ivshmemfs.engine.inode import Context, Inode
from ivshmemfs.engine.transaction import Transaction


class Credentials:
    """Decides, by the caller's credentials, what a change takes from a file."""

    def __init__(self) -> None:
        self.groups_of: Callable[[int], Collection[int]] = _no_groups
        self.keeps_set_id: Callable[[Context], bool] = _is_root

    def is_outsider(self, inode: Inode, ctx: Context | None) -> bool:
        """Whether a change by `ctx` takes set-group-ID from `inode`, which is not a program."""
        if ctx is None or not privileges.group_bit_alone(inode.record.mode):
            return False
        return self.loses_set_group_id(inode, ctx)

    def loses_set_group_id(self, inode: Inode, ctx: Context) -> bool:
        """Whether `inode` has set-group-ID, which a caller outside of its group may not keep."""
        record = inode.record
        if not record.mode & stat.S_ISGID or self.keeps_set_id(ctx):
            return False
        return record.gid != ctx.gid and record.gid not in self.groups_of(ctx.pid)

    def after_write(
        self, tx: Transaction, inode: Inode, handle: Handle, ctx: Context | None = None
    ) -> Inode:
        """Return `inode` as a write leaves it; without `ctx`, a write by the opener of `handle`."""
        if ctx is None:
            return privileges.shed(
                tx, inode, unprivileged=handle.unprivileged, outsider=handle.outsider
            )
        return self.after_resize(tx, inode, ctx)

    def after_resize(self, tx: Transaction, inode: Inode, ctx: Context) -> Inode:
        """Return `inode` as a change of contents by `ctx` leaves it."""
        bits = inode.record.mode & privileges.SET_ID_BITS
        unprivileged = bool(bits) and not self.keeps_set_id(ctx)
        outsider = self.is_outsider(inode, ctx)
        return privileges.shed(tx, inode, unprivileged=unprivileged, outsider=outsider)

    def after_chown(self, tx: Transaction, inode: Inode, ctx: Context) -> Inode:
        """Return `inode` as a change of owner or group leaves it; directories keep set-ID bits."""
        outsider = self.is_outsider(inode, ctx)
        return privileges.shed(tx, inode, unprivileged=not inode.is_dir, outsider=outsider)


def _is_root(ctx: Context) -> bool:
    return not ctx.uid


def _no_groups(_pid: int) -> Collection[int]:
    return ()
