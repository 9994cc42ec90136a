"""Names: how a transaction makes, links, removes and renames entries of directories.

Every function takes the `Transaction` that it plans in and changes nothing else.

    linked      names lead to the inode; `nlink` counts them
    orphan      no name is left, but a peer has the inode open: the hidden directory of orphans
                has an entry for it
    removed     no name is left, and no peer has the inode open: the transaction frees it

The removal of the last name makes a linked inode an orphan or removes it.  `link` may make an
orphan without a name a linked inode.  The peer that closes an orphan last removes it
(`free_orphan`).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from ivshmemfs.engine import acl, data, directory, fixed
from ivshmemfs.engine.directory import Dirent, LeafPosition
from ivshmemfs.engine.inode import TARGET_MAX, Context, Inode
from ivshmemfs.engine.privileges import SET_ID_BITS
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Corrupt, FsError
from ivshmemfs.format.dirent import NAME_MAX
from ivshmemfs.format.inode import INODE, ORPHANS_INO, ROOT_INO, InodeRecord, orphan_name

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
# The values of the module `stat`, as constants at compile time.
_FORMAT: Final = 0o170000
_DIRECTORY: Final = 0o040000
_LINK: Final = 0o120000
_SET_GROUP_ID: Final = 0o2000
LINK_MAX = (1 << 31) - 1  # names of one inode
DEPTH_MAX = 1000  # directories above the place to which a directory is moved; limits the check
_BLANK: Final = INODE.unpack(bytes(INODE.size))._replace(blocks=1)
_NEW: Final = INODE.places(
    "mode", "nlink", "uid", "gid", "rdev", "parent",
    "atime_ns", "mtime_ns", "ctime_ns", "btime_ns",
)  # fmt: skip
_RENAMED: Final = INODE.places("ctime_ns")
_MOVED: Final = INODE.places("ctime_ns", "parent")


def folder_of(view: View, ino: int) -> Inode:
    """Return directory `ino`; raises ENOTDIR, and ENOENT for a removed directory.

    ENOENT is the answer of an empty directory to every name.
    """
    inode = view.find_inode(ino)
    if inode is None:
        raise FsError(errno.ENOENT)
    if not inode.is_dir:
        raise FsError(errno.ENOTDIR)
    return inode


def parent_of(view: View, ino: int, name: bytes) -> Inode:
    """Return the directory `ino`, which may have an entry `name`.

    Raises ENOTDIR, ENAMETOOLONG, EINVAL, ENOENT.
    """
    directory.check_name(name)
    return folder_of(view, ino)


def target(view: View, entry: Dirent) -> Inode:
    """Return the inode of a directory entry; raises Corrupt."""
    return _target(view, entry.ino, entry.name)


def find(view: View, parent: int, name: bytes) -> Inode | None:
    """Return the inode that `name` leads to, or None; the cache of the commit learns the name.

    Raises ENOTDIR, ENAMETOOLONG, ENOENT for a removed directory, Corrupt.
    """
    ino = view.cache.find_name(parent, name)
    if ino:
        return view.find_inode(ino)
    folder = folder_of(view, parent)
    if name == b".":
        return folder
    if name == b"..":
        return view.inode(folder.record.parent)
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    entry = directory.find(view, folder, name)
    if entry is None:
        return None
    inode = target(view, entry)
    view.cache.add_name(parent, name, inode.ino)
    return inode


def _target(view: View, ino: int, name: bytes) -> Inode:
    inode = view.find_inode(ino)
    if inode is None:
        raise Corrupt(f"name {name!r} leads to inode {ino}, which does not exist")
    return inode


def _existing(view: View, parent: int, name: bytes) -> tuple[Inode, LeafPosition, Inode]:
    """Return (directory, position of `name`, inode of `name`); raises ENOENT."""
    folder = parent_of(view, parent, name)
    position = directory.locate(view, folder, name)
    ino = position.ino
    if ino < 0:
        raise FsError(errno.ENOENT)
    return folder, position, _target(view, ino, name)


def _vacant(view: View, parent: int, name: bytes) -> tuple[Inode, LeafPosition]:
    """Return (directory, insertion point of `name`); raises EEXIST."""
    folder = parent_of(view, parent, name)
    position = directory.locate(view, folder, name)
    if position.at >= 0:
        raise FsError(errno.EEXIST)
    return folder, position


def _kind(inode: Inode) -> int:
    """Return the file type bits of an inode, shifted right by 12."""
    return inode.record.mode >> 12 & 0o17


def plainly_permitted(folder: Inode, inode: Inode, flags: int, ctx: Context) -> bool:
    """Return whether the uid and gid of `ctx` alone permit it to open regular file `inode`.

    Raises EISDIR.  The caller's other groups are unknown, so the answer may be a false no.
    """
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
    others = 7 if shift else record.mode >> 3  # the groups of the caller are unknown
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
    """Return the record of an inode that `ctx` makes in `folder`.

    In a set-group-ID directory it gets the directory's group, and a directory gets the bit.
    """
    gid, above = ctx.gid, folder.record
    if above.mode & _SET_GROUP_ID:
        gid = above.gid
        if mode & _FORMAT == _DIRECTORY:
            mode |= _SET_GROUP_ID
    now = tx.now
    values = (mode, nlink, ctx.uid, gid, rdev, parent, now, now, now, now)
    return INODE.placed(_BLANK, _NEW, values)


def new_inode(
    tx: Transaction,
    folder: Inode,
    mode: int,
    ctx: Context,
    *,
    nlink: int = 1,
    rdev: int = 0,
    parent: int = 0,
) -> Inode:
    """A new inode made in `folder` by `ctx`, with the access lists that it inherits."""
    link = mode & _FORMAT == _LINK
    inherits = folder.record.xattr_size and not link
    if not inherits and not link:
        mode &= ~ctx.umask
    record = new_record(tx, folder, mode, ctx, nlink=nlink, rdev=rdev, parent=parent)
    inode = tx.new_inode(record)
    if inherits:
        inode = tx.put(acl.inherit(tx, folder, inode, ctx.umask))
    return inode


def add(
    tx: Transaction, folder: Inode, position: LeafPosition, inode: Inode, links: int = 0
) -> Inode:
    """Enter `inode` at `position` of `folder`, which gets `links` more links.

    Returns the changed directory; raises NoSpace.
    """
    return tx.put(directory.insert(tx, folder, position, inode.ino, _kind(inode), links))


def make(
    tx: Transaction, folder_ino: int, name: bytes, mode: int, ctx: Context, *, rdev: int = 0
) -> Inode:
    """Return a new inode, not a directory, under a new name; raises EEXIST, NoSpace."""
    folder, position = _vacant(tx, folder_ino, name)
    inode = new_inode(tx, folder, mode, ctx, rdev=rdev)
    add(tx, folder, position, inode)
    return inode


def make_fixed(
    tx: Transaction,
    parent: int,
    name: bytes,
    mode: int,
    size: int,
    ctx: Context,
    head: bytes = b"",
) -> tuple[int, bool]:
    """Make a fixed file of `size` bytes, whole pages, unless the name leads to something.

    It begins with `head`; all other bytes are zero.

    Returns (the inode's number, whether it was made).  Raises what `fixed.make` raises.
    """
    folder = parent_of(tx, parent, name)
    position = directory.locate(tx, folder, name)
    if position.entry is not None:
        return target(tx, position.entry).ino, False
    inode = new_inode(tx, folder, stat.S_IFREG | stat.S_IMODE(mode), ctx)
    add(tx, folder, position, tx.put(fixed.make(tx, inode, size, head)))
    return inode.ino, True


def mkdir(tx: Transaction, parent: int, name: bytes, mode: int, ctx: Context) -> Inode:
    """Return a new directory; raises EEXIST, NoSpace."""
    keep = stat.S_IMODE(mode) & ~SET_ID_BITS
    folder, position = _vacant(tx, parent, name)
    inode = new_inode(tx, folder, _DIRECTORY | keep, ctx, nlink=2, parent=parent)
    add(tx, folder, position, inode, links=1)
    return inode


def symlink(tx: Transaction, parent: int, name: bytes, to: bytes, ctx: Context) -> Inode:
    """Return a new symbolic link to `to`.

    Raises EEXIST, ENOENT for an empty target, ENAMETOOLONG, NoSpace.
    """
    if not to:
        raise FsError(errno.ENOENT)
    if len(to) > TARGET_MAX:
        raise FsError(errno.ENAMETOOLONG)
    folder, position = _vacant(tx, parent, name)
    inode = new_inode(tx, folder, stat.S_IFLNK | 0o777, ctx)
    inode = tx.put(data.write(tx, inode, 0, to))
    add(tx, folder, position, inode)
    return inode


def make_nameless(
    tx: Transaction, folder: Inode, mode: int, ctx: Context, *, rdev: int = 0, to: bytes = b""
) -> Inode:
    """Return a new inode without a name, an orphan.

    It has the owner and group of an inode made in `folder`.  `to` is the target of a symbolic link.
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
    """Give an inode another name and return it; raises EPERM for directories, EEXIST, EMLINK.

    An inode without a name gets one only with `revive`, else ENOENT.  With `over`, the name may be
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
    position = directory.locate(tx, folder, name)
    entry = position.entry
    if entry is not None and not over:
        raise FsError(errno.EEXIST)
    if entry is not None and entry.ino == ino:
        return inode
    if inode.record.nlink == 0:
        _forget_orphan(tx, ino)
    if entry is None:
        add(tx, folder, position, inode)
    else:
        _take_name(tx, folder, position, target(tx, entry), inode)
    return tx.touch(ino, nlink=inode.record.nlink + 1)


def _take_name(
    tx: Transaction, folder: Inode, position: LeafPosition, victim: Inode, inode: Inode
) -> None:
    """Redirect the entry at `position` from `victim` to `inode`; raises EISDIR."""
    if victim.is_dir:
        raise FsError(errno.EISDIR)
    _unlinked(tx, victim)
    tx.put(directory.replace(tx, folder, position, inode.ino, _kind(inode), 0))


# --- removing -------------------------------------------------------------------------------


def _keep_orphan(tx: Transaction, inode: Inode) -> None:
    """Enter an inode without links in the directory of orphans."""
    orphans = tx.inode(ORPHANS_INO)
    position = directory.locate(tx, orphans, orphan_name(inode.ino))
    tx.put(directory.insert(tx, orphans, position, inode.ino, _kind(inode)))
    tx.orphans += 1


def _forget_orphan(tx: Transaction, ino: int) -> None:
    """Remove an inode from the directory of orphans."""
    orphans = tx.inode(ORPHANS_INO)
    tx.put(directory.remove(tx, orphans, directory.locate(tx, orphans, orphan_name(ino))))
    tx.orphans -= 1


def _unlinked(tx: Transaction, inode: Inode) -> None:
    """Take one link from `inode`; without links it becomes an orphan or is removed.

    Raises EPERM for the last link of a fixed file.
    """
    left = inode.record.nlink - 1
    if left > 0:
        tx.put(inode.evolve(nlink=left, ctime_ns=tx.now))
        return
    fixed.refuse(inode)
    if not tx.in_use(inode.ino):
        tx.remove(inode)
    else:
        tx.put(inode.evolve(nlink=0, ctime_ns=tx.now))
        _keep_orphan(tx, inode)


def free_orphan(tx: Transaction, ino: int) -> bool:
    """Remove an inode without links; return False when it is open somewhere or gone."""
    inode = tx.find_inode(ino)
    if inode is None or inode.record.nlink or tx.in_use(ino):
        return False
    _forget_orphan(tx, ino)
    tx.remove(inode)
    return True


def unlink(tx: Transaction, parent: int, name: bytes) -> None:
    """Remove a name of an inode other than a directory; raises ENOENT, EISDIR."""
    folder, position, inode = _existing(tx, parent, name)
    if inode.is_dir:
        raise FsError(errno.EISDIR)
    tx.put(directory.remove(tx, folder, position, 0))
    _unlinked(tx, inode)


def rmdir(tx: Transaction, parent: int, name: bytes) -> None:
    """Remove an empty directory; raises ENOENT, ENOTDIR, ENOTEMPTY."""
    folder, position, inode = _existing(tx, parent, name)
    if not inode.is_dir:
        raise FsError(errno.ENOTDIR)
    if inode.record.entries:
        raise FsError(errno.ENOTEMPTY)
    links = max(folder.record.nlink - 1, 2) - folder.record.nlink
    tx.put(directory.remove(tx, folder, position, links))
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
    """Move an entry, also over another one; raises the errors of rename(2).

    With RENAME_WHITEOUT, device node 0:0 takes the old name: overlay mounts use it.  Returns
    (inode that moved, inode that moved back in an exchange or 0).
    """
    _, position, inode = _existing(tx, parent, name)
    folder = parent_of(tx, new_parent, new_name)
    place = directory.locate(tx, folder, new_name)
    if inode.is_dir:
        _forbid_cycle(tx, inode.ino, new_parent)
    if flags == RENAME_EXCHANGE:
        return _exchange(tx, (parent, name), (new_parent, new_name), inode, place.entry)
    if place.at >= 0:
        if flags & RENAME_NOREPLACE:
            raise FsError(errno.EEXIST)
        if place.ino == inode.ino:
            return inode.ino, 0
        _take_away(tx, new_parent, inode, _target(tx, place.ino, new_name))
    _move(tx, parent, position, new_parent, place, inode)
    if flags & RENAME_WHITEOUT:
        make(tx, parent, name, stat.S_IFCHR, ctx)
    return inode.ino, 0


def _forbid_cycle(view: View, ino: int, folder: int) -> None:
    """Raise EINVAL if directory `ino` is `folder` or above it.

    Raises EBUSY for the root directory, and ENAMETOOLONG below DEPTH_MAX directories, where a walk
    through all parents takes too long.
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
            raise FsError(
                errno.ENAMETOOLONG, f"the new place is below more than {DEPTH_MAX} directories"
            )
        seen.add(folder)
        folder = view.directory(folder).record.parent


def _take_away(tx: Transaction, folder: int, inode: Inode, victim: Inode) -> None:
    """Unlink `victim`, the inode of the new name; `_move` redirects its entry.

    Raises EISDIR, ENOTDIR, ENOTEMPTY.
    """
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
    tx: Transaction,
    old: int,
    position: LeafPosition,
    new: int,
    place: LeafPosition,
    inode: Inode,
) -> None:
    """Move the entry at `position` of directory `old` to `place` in directory `new`."""
    ino, kind, folder = inode.ino, _kind(inode), tx.inode(new)
    if old == new:
        tx.put(directory.move(tx, folder, position, place, ino, kind))
    else:
        links = int(inode.is_dir)
        tx.put(directory.remove(tx, tx.inode(old), position, -links))
        enter = directory.insert if place.at < 0 else directory.replace
        tx.put(enter(tx, folder, place, ino, kind, links))
    _moved(tx, ino, new)


def _moved(tx: Transaction, ino: int, parent: int) -> None:
    """Note in an inode that it has another name, in directory `parent`."""
    inode = tx.inode(ino)
    if inode.is_dir:
        record = INODE.placed(inode.record, _MOVED, (tx.now, parent))
    else:
        record = INODE.placed(inode.record, _RENAMED, (tx.now,))
    tx.put(Inode(ino, record, inode.data, inode.xattr))


def _exchange(
    tx: Transaction,
    old: tuple[int, bytes],
    new: tuple[int, bytes],
    inode: Inode,
    entry: Dirent | None,
) -> tuple[int, int]:
    """Exchange the inodes of two entries; raises ENOENT, EINVAL."""
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
        position = directory.locate(tx, inside, name)
        tx.put(directory.replace(tx, inside, position, comes.ino, _kind(comes), links))
        _moved(tx, comes.ino, folder)
    return inode.ino, other.ino
