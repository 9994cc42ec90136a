"""Names: what making, linking, removing and renaming entries means, within one transaction.

Every function takes the `Transaction` that it plans in and changes nothing else.  An inode that
loses its last link is removed with its last name, unless somebody holds it open: then it gets an
entry in the hidden directory of orphans, and whoever closes it last frees it (`free_orphan`).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from ivshmemfs.engine import acl, data, directory
from ivshmemfs.engine.directory import Entry, Spot
from ivshmemfs.engine.inode import TARGET_MAX, Context, Inode
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Corrupt, FsError
from ivshmemfs.format.inode import INODE, ORPHANS_INO, ROOT_INO, InodeRecord

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
LINK_MAX = (1 << 31) - 1
DEPTH_MAX = 1000  # directories above a place to which a directory may be moved
PRIVILEGES = stat.S_ISUID | stat.S_ISGID
SET_GROUP_ID = stat.S_ISGID | stat.S_IXGRP  # both: of a program; the first alone: of another file
_BLANK = INODE.unpack(bytes(INODE.size))._replace(blocks=1)


def folder_of(view: View, ino: int) -> Inode:
    """The directory `ino`; raises ENOTDIR, and ENOENT for one that was removed: it was empty."""
    inode = view.find_inode(ino)
    if inode is None:
        raise FsError(errno.ENOENT)
    if not inode.is_dir:
        raise FsError(errno.ENOTDIR)
    return inode


def parent_of(view: View, ino: int, name: bytes) -> Inode:
    """The directory in which `name` may be entered; raises ENOTDIR, ENAMETOOLONG, ENOENT."""
    directory.check_name(name)
    return folder_of(view, ino)


def target(view: View, entry: Entry) -> Inode:
    """The inode of a directory entry."""
    inode = view.find_inode(entry.ino)
    if inode is None:
        raise Corrupt(f"name {entry.name!r} leads to inode {entry.ino}, which does not exist")
    return inode


def _existing(view: View, parent: int, name: bytes) -> tuple[Inode, Spot, Inode]:
    """(directory, spot in it, inode that stands there)"""
    folder = parent_of(view, parent, name)
    spot = directory.locate(view, folder, name)
    entry = spot.entry
    if entry is None:
        raise FsError(errno.ENOENT)
    return folder, spot, target(view, entry)


def _vacant(view: View, parent: int, name: bytes) -> tuple[Inode, Spot]:
    folder = parent_of(view, parent, name)
    spot = directory.locate(view, folder, name)
    if spot.at >= 0:
        raise FsError(errno.EEXIST)
    return folder, spot


def _kind(inode: Inode) -> int:
    return inode.record.mode >> 12 & 0o17


def without_privileges(inode: Inode, *, outsider: bool) -> Inode:
    """As write(2) by an ordinary user leaves it: no set-user-ID, no set-group-ID of a program.

    After an outsider, who is not in the group of the file, no set-group-ID of any file.
    """
    mode = inode.record.mode & ~stat.S_ISUID
    if outsider or mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return inode.evolve(mode=mode) if mode != inode.record.mode else inode


def plainly_permitted(folder: Inode, inode: Inode, flags: int, ctx: Context) -> bool:
    """Whether `ctx` may open the regular file `inode`, as far as its uid and gid alone tell."""
    record = inode.record
    if inode.is_dir:
        raise FsError(errno.EISDIR)
    if not inode.is_regular:
        return False
    if ctx.uid == 0:
        return True
    if record.xattr_size and ctx.uid != record.uid:
        return False  # maybe an access list
    owners = (record.uid, folder.record.uid)
    if folder.record.mode & stat.S_ISVTX and ctx.uid not in owners:
        return False
    shift = 6 if ctx.uid == record.uid else 3 if ctx.gid == record.gid else 0
    bits = {os.O_RDONLY: 4, os.O_WRONLY: 2, os.O_RDWR: 6}.get(flags & os.O_ACCMODE, 6)
    bits |= 2 if flags & os.O_TRUNC else 0
    others = 7 if shift else record.mode >> 3  # the groups of the caller are not known
    return record.mode >> shift & others & bits == bits


# --- making ---------------------------------------------------------------------------------


def new_record(
    tx: Transaction,
    folder: Inode,
    mode: int,
    ctx: Context,
    *,
    nlink: int = 1,
    rdev: int = 0,
    parent: int = 0,
) -> InodeRecord:
    """The record of an inode made in `folder` by `ctx`; set-group-ID directories hand down."""
    gid, above = ctx.gid, folder.record
    if above.mode & stat.S_ISGID:
        gid = above.gid
        if stat.S_ISDIR(mode):
            mode |= stat.S_ISGID
    fields: dict[str, Any] = {
        "mode": mode, "nlink": nlink, "uid": ctx.uid, "gid": gid, "rdev": rdev, "parent": parent,
        "atime_ns": tx.now, "mtime_ns": tx.now, "ctime_ns": tx.now, "btime_ns": tx.now,
    }  # fmt: skip
    return INODE.changed(_BLANK, fields)


def new_inode(tx: Transaction, folder: Inode, mode: int, ctx: Context, **fields: int) -> Inode:
    """A new inode made in `folder` by `ctx`, with the access lists that it inherits."""
    link = stat.S_ISLNK(mode)
    if not folder.record.xattr_size and not link:
        mode &= ~ctx.umask
    inode = tx.new_inode(new_record(tx, folder, mode, ctx, **fields))
    if folder.record.xattr_size and not link:
        inode = tx.put(acl.inherit(tx, folder, inode, ctx.umask))
    return inode


def _dated(tx: Transaction, folder: Inode, links: int) -> dict[str, int]:
    """Changes of the record of a directory in which a name changes, with `links` more links."""
    return {"mtime_ns": tx.now, "ctime_ns": tx.now, "nlink": folder.record.nlink + links}


def add(tx: Transaction, folder: Inode, spot: Spot, inode: Inode, links: int = 0) -> Inode:
    """Enter `inode` at `spot`; `links` more links on the directory, which is returned."""
    changes = _dated(tx, folder, links)
    return tx.put(directory.insert(tx, folder, spot, inode.ino, _kind(inode), changes))


def make(
    tx: Transaction, folder_ino: int, name: bytes, mode: int, ctx: Context, **fields: int
) -> Inode:
    """A new inode of any kind; raises EEXIST."""
    folder, spot = _vacant(tx, folder_ino, name)
    inode = new_inode(tx, folder, mode, ctx, **fields)
    add(tx, folder, spot, inode, links=int(stat.S_ISDIR(mode)))
    return inode


def mkdir(tx: Transaction, parent: int, name: bytes, mode: int, ctx: Context) -> Inode:
    """A new directory; raises EEXIST."""
    keep = stat.S_IMODE(mode) & ~PRIVILEGES
    return make(tx, parent, name, stat.S_IFDIR | keep, ctx, parent=parent, nlink=2)


def symlink(tx: Transaction, parent: int, name: bytes, to: bytes, ctx: Context) -> Inode:
    """A new symbolic link; raises EEXIST, ENOENT for an empty target, ENAMETOOLONG."""
    if not to:
        raise FsError(errno.ENOENT)
    if len(to) > TARGET_MAX:
        raise FsError(errno.ENAMETOOLONG)
    folder, spot = _vacant(tx, parent, name)
    inode = new_inode(tx, folder, stat.S_IFLNK | 0o777, ctx)
    inode = tx.put(data.write(tx, inode, 0, to))
    add(tx, folder, spot, inode)
    return inode


def make_nameless(
    tx: Transaction, folder: Inode, mode: int, ctx: Context, *, rdev: int = 0, to: bytes = b""
) -> Inode:
    """A new inode that nothing leads to, as if it had been made in `folder` and removed.

    `to` is the target of a symbolic link.
    """
    inode = new_inode(tx, folder, mode, ctx, nlink=0, rdev=rdev)
    if to:
        inode = tx.put(data.write(tx, inode, 0, to))
    _keep_orphan(tx, inode)
    return inode


def link(
    tx: Transaction,
    ino: int,
    parent: int,
    name: bytes,
    *,
    revive: bool = False,
    over: bool = False,
) -> Inode:
    """Another name for an inode; raises EPERM for directories, EEXIST, EMLINK.

    ENOENT for one that has no name left, unless it is to `revive`.  With `over` the name may be
    that of another file, which loses it; raises EISDIR for a directory.
    """
    folder = parent_of(tx, parent, name)
    inode = tx.inode(ino)
    if inode.is_dir:
        raise FsError(errno.EPERM)
    if inode.record.nlink == 0 and not revive:
        raise FsError(errno.ENOENT)
    if inode.record.nlink >= LINK_MAX:
        raise FsError(errno.EMLINK)
    spot = directory.locate(tx, folder, name)
    entry = spot.entry
    if entry is not None and not over:
        raise FsError(errno.EEXIST)
    if entry is not None and entry.ino == ino:
        return inode
    if inode.record.nlink == 0:
        _forget_orphan(tx, ino)
    if entry is None:
        add(tx, folder, spot, inode)
    else:
        _take_name(tx, folder, spot, target(tx, entry), inode)
    return tx.touch(ino, nlink=inode.record.nlink + 1)


def _take_name(tx: Transaction, folder: Inode, spot: Spot, victim: Inode, inode: Inode) -> None:
    """Have the name of `victim` at `spot` lead to `inode`."""
    if victim.is_dir:
        raise FsError(errno.EISDIR)
    _unlinked(tx, victim)
    changes = _dated(tx, folder, 0)
    tx.put(directory.replace(tx, folder, spot, inode.ino, _kind(inode), changes))


# --- removing -------------------------------------------------------------------------------


def _orphan_name(ino: int) -> bytes:
    return b"%016x" % ino


def _keep_orphan(tx: Transaction, inode: Inode) -> None:
    """Enter an inode without links among the orphans."""
    orphans = tx.inode(ORPHANS_INO)
    spot = directory.locate(tx, orphans, _orphan_name(inode.ino))
    tx.put(directory.insert(tx, orphans, spot, inode.ino, _kind(inode)))
    tx.orphans += 1


def _forget_orphan(tx: Transaction, ino: int) -> None:
    orphans = tx.inode(ORPHANS_INO)
    tx.put(directory.remove(tx, orphans, directory.locate(tx, orphans, _orphan_name(ino))))
    tx.orphans -= 1


def _unlinked(tx: Transaction, inode: Inode) -> None:
    """`inode` lost a link: count it, and free or keep what has none left."""
    left = inode.record.nlink - 1
    if left > 0:
        tx.put(inode.evolve(nlink=left, ctime_ns=tx.now))
    elif not tx.in_use(inode.ino):
        tx.remove(inode)
    else:
        tx.put(inode.evolve(nlink=0, ctime_ns=tx.now))
        _keep_orphan(tx, inode)


def free_orphan(tx: Transaction, ino: int) -> bool:
    """Free an inode that has no links, unless somebody holds it open or it is gone already."""
    inode = tx.find_inode(ino)
    if inode is None or inode.record.nlink or tx.in_use(ino):
        return False
    _forget_orphan(tx, ino)
    tx.remove(inode)
    return True


def unlink(tx: Transaction, parent: int, name: bytes) -> None:
    """Remove a name of something that is no directory; raises ENOENT, EISDIR."""
    folder, spot, inode = _existing(tx, parent, name)
    if inode.is_dir:
        raise FsError(errno.EISDIR)
    tx.put(directory.remove(tx, folder, spot, _dated(tx, folder, 0)))
    _unlinked(tx, inode)


def rmdir(tx: Transaction, parent: int, name: bytes) -> None:
    """Remove an empty directory; raises ENOENT, ENOTDIR, ENOTEMPTY."""
    folder, spot, inode = _existing(tx, parent, name)
    if not inode.is_dir:
        raise FsError(errno.ENOTDIR)
    if inode.record.entries:
        raise FsError(errno.ENOTEMPTY)
    links = max(folder.record.nlink - 1, 2) - folder.record.nlink
    tx.put(directory.remove(tx, folder, spot, _dated(tx, folder, links)))
    tx.remove(inode)


# --- renaming -------------------------------------------------------------------------------


def rename(
    tx: Transaction,
    parent: int,
    name: bytes,
    new_parent: int,
    new_name: bytes,
    flags: int,
    ctx: Context,
) -> tuple[int, int]:
    """Move an entry, also over another one; raises as rename(2) says.

    With RENAME_WHITEOUT a device node 0:0 takes the old place, which overlay mounts know.
    Returns which inode was moved, and which was moved back in exchange (0: none).
    """
    _, spot, inode = _existing(tx, parent, name)
    folder = parent_of(tx, new_parent, new_name)
    entry = directory.find(tx, folder, new_name)
    if inode.is_dir:
        _forbid_cycle(tx, inode.ino, new_parent)
    if flags == RENAME_EXCHANGE:
        return _exchange(tx, (parent, name), (new_parent, new_name), inode, entry)
    if entry is not None:
        if flags & RENAME_NOREPLACE:
            raise FsError(errno.EEXIST)
        if entry.ino == inode.ino:
            return inode.ino, 0
        _take_away(tx, new_parent, inode, target(tx, entry))
    _move(tx, parent, spot, new_parent, new_name, inode, over=entry is not None)
    if flags & RENAME_WHITEOUT:
        make(tx, parent, name, stat.S_IFCHR, ctx)
    return inode.ino, 0


def _forbid_cycle(view: View, ino: int, folder: int) -> None:
    """Raise EINVAL if directory `ino` is `folder` or above it.

    Raises ENAMETOOLONG too deep down, where the look at all parents would take too long.
    """
    if ino == ROOT_INO:
        raise FsError(errno.EBUSY)
    seen = set[int]()
    while folder != ROOT_INO:
        if folder == ino:
            raise FsError(errno.EINVAL)
        if folder in seen:
            raise Corrupt(f"directory {folder}: its parents form a ring")
        if len(seen) >= DEPTH_MAX:
            raise FsError(errno.ENAMETOOLONG, f"{DEPTH_MAX} directories stand above the new place")
        seen.add(folder)
        folder = view.directory(folder).record.parent


def _take_away(tx: Transaction, folder: int, inode: Inode, victim: Inode) -> None:
    """Remove what stands under the new name; its dirent stays for `_move` to redirect."""
    if victim.is_dir and not inode.is_dir:
        raise FsError(errno.EISDIR)
    if inode.is_dir and not victim.is_dir:
        raise FsError(errno.ENOTDIR)
    if not victim.is_dir:
        _unlinked(tx, victim)
        return
    if victim.record.entries:
        raise FsError(errno.ENOTEMPTY)
    above = tx.inode(folder)
    tx.put(above.evolve(nlink=max(above.record.nlink - 1, 2)))
    tx.remove(victim)


def _move(
    tx: Transaction, old: int, spot: Spot, new: int, name: bytes, inode: Inode, *, over: bool
) -> None:
    """Move `inode` from its spot in directory `old` to a name in `new`, which may be the same."""
    links = int(inode.is_dir and old != new)
    source = tx.inode(old)
    tx.put(directory.remove(tx, source, spot, _dated(tx, source, -links)))
    folder = tx.inode(new)
    place, changes = directory.locate(tx, folder, name), _dated(tx, folder, links)
    enter = directory.replace if over else directory.insert
    tx.put(enter(tx, folder, place, inode.ino, _kind(inode), changes))
    tx.touch(inode.ino, **({"parent": new} if inode.is_dir else {}))


def _exchange(
    tx: Transaction,
    old: tuple[int, bytes],
    new: tuple[int, bytes],
    inode: Inode,
    entry: Entry | None,
) -> tuple[int, int]:
    if entry is None:
        raise FsError(errno.ENOENT)
    if entry.ino == inode.ino:
        return inode.ino, inode.ino
    other = target(tx, entry)
    if other.is_dir:
        _forbid_cycle(tx, other.ino, old[0])
    for (folder, name), comes, goes in ((old, other, inode), (new, inode, other)):
        links = int(comes.is_dir) - int(goes.is_dir) if old[0] != new[0] else 0
        inside = tx.inode(folder)
        spot, changes = directory.locate(tx, inside, name), _dated(tx, inside, links)
        tx.put(directory.replace(tx, inside, spot, comes.ino, _kind(comes), changes))
        tx.touch(comes.ino, **({"parent": folder} if comes.is_dir else {}))
    return inode.ino, other.ino
