"""Whole contents of a file by its name: one look reads them, one plan replaces them.

Several calls of `store` in one plan replace several files in one commit.  A file keeps its inode,
owner, mode and other names.
"""

from __future__ import annotations

import errno
import stat
from typing import Final

from ivshmemfs.engine import data, directory, names, privileges, xattr
from ivshmemfs.engine.data import Buffer
from ivshmemfs.engine.inode import Context, Inode
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import FsError
from ivshmemfs.format.pointer import POINTER

MOST: Final = 1 << 20  # bytes of contents that one commit stores, as one FUSE request


def find(view: View, parent: int, name: bytes) -> Inode | None:
    """Return the regular file `name`, or None.

    Raises ENOTDIR, ENOENT, ENAMETOOLONG, Corrupt.
    """
    inode = names.find(view, parent, name)
    return inode if inode is not None and inode.is_regular else None


def value(view: View, parent: int, name: bytes, most: int = MOST) -> bytes | None:
    """Return the contents of the regular file `name`, or None.

    Raises EFBIG for more than `most` bytes, and what `find` raises.
    """
    inode = find(view, parent, name)
    return None if inode is None else _whole(view, inode, most)


def load(
    view: View, parent: int, name: bytes, note: bytes, most: int = MOST
) -> tuple[bytes, bytes, int] | None:
    """Return (contents, extended attribute `note`, version) of the regular file `name`, or None.

    An attribute that is not there is empty.  Raises what `value` raises.
    """
    inode = find(view, parent, name)
    if inode is None:
        return None
    kept = xattr.table(view, inode).get(note)
    return _whole(view, inode, most), kept or b"", version(view, inode.ino)


def _whole(view: View, inode: Inode, most: int) -> bytes:
    size = inode.record.size
    if size > most:
        raise FsError(errno.EFBIG, f"the file has more than {most} bytes")
    return bytes(data.read(view, inode, 0, size))


def version(view: View, ino: int) -> int:
    """Return a number that changes with every change of an inode, and never comes back.

    It is the tag of the inode's block: a change claims a new block, and no tag comes back.
    """
    return int(POINTER.unpack(view.pointer_to(ino))[2])


def store(
    tx: Transaction,
    parent: int,
    name: bytes,
    content: Buffer,
    mode: int,
    ctx: Context,
    notes: dict[bytes, bytes] | None = None,
) -> Inode:
    """Give the file `name` these contents and no others; make it with `mode` if there is none.

    `notes` are extended attributes to set; an empty value removes one.  Raises EISDIR, ELOOP for a
    symbolic link, EINVAL for other kinds of files, NoSpace.
    """
    folder = names.parent_of(tx, parent, name)
    position = directory.locate(tx, folder, name)
    entry = position.entry
    if entry is None:
        inode = names.new_inode(tx, folder, stat.S_IFREG | stat.S_IMODE(mode), ctx)
    else:
        inode = _emptied(tx, names.target(tx, entry), ctx)
    for key, value in (notes or {}).items():
        if value:
            inode = xattr.set_value(tx, inode, key, value, 0)
        else:
            inode = xattr.discard(tx, inode, key)
    if content:
        inode = data.write(tx, inode, 0, content)
    tx.put(inode)
    if entry is None:
        names.add(tx, folder, position, inode)
    return inode


def _emptied(tx: Transaction, inode: Inode, ctx: Context) -> Inode:
    """Return a regular file without contents and privileges; raises EISDIR, ELOOP, EINVAL."""
    if inode.is_dir:
        raise FsError(errno.EISDIR)
    if stat.S_ISLNK(inode.record.mode):
        raise FsError(errno.ELOOP)
    if not inode.is_regular:
        raise FsError(errno.EINVAL)
    outsider = ctx.gid != inode.record.gid
    inode = privileges.shed(tx, inode, unprivileged=bool(ctx.uid), outsider=outsider)
    return data.truncate(tx, inode, 0)
