"""POSIX access lists: permissions of a file for further users and groups.

An inode has up to two lists, stored as extended attributes in Linux's own encoding (version 2):

    system.posix_acl_access     of this inode.  The permission bits of its mode are kept in step:
                                owner and others equal their entries, group equals the mask
    system.posix_acl_default    of a directory: the access list of what is made in it

A list with three entries says no more than a mode, so an access list of that kind is not stored.
The rules are those of Linux's fs/posix_acl.c.  A malformed list, which only a damaged or hostile
peer stores, counts as none.  The first half of this module is pure; transactions call the second.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from ivshmemfs.engine import xattr
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.engine.xattr import ACCESS_LIST, DEFAULT_LIST
from ivshmemfs.errors import FsError

VERSION: Final = 2
#: Version of the encoding.
_HEADER: Final = struct.Struct("<I")
#: tag, permissions, id.
_ENTRY: Final = struct.Struct("<HHI")
#: Largest value, in bytes: 511 entries.  A kernel reads a list into one page of at least this size.
VALUE_MAX: Final = 4096

# Tags, in the order in which a list has them.
USER_OBJ: Final = 0x01  # the owner
USER: Final = 0x02  # one more user
GROUP_OBJ: Final = 0x04  # the owning group
GROUP: Final = 0x08  # one more group
MASK: Final = 0x10  # the most that USER, GROUP_OBJ and GROUP give
OTHER: Final = 0x20
NO_ID: Final = 0xFFFFFFFF  # the id of the other four tags
#: The tags that may follow a tag; 0 is the start.
_FOLLOWING: Final[dict[int, tuple[int, ...]]] = {
    0: (USER_OBJ,),
    USER_OBJ: (USER, GROUP_OBJ),
    USER: (USER, GROUP_OBJ),
    GROUP_OBJ: (GROUP, MASK, OTHER),
    GROUP: (GROUP, MASK, OTHER),
    MASK: (OTHER,),
    OTHER: (),
}
_NAMED: Final = (USER, GROUP)


class Entry(NamedTuple):
    """One entry: permissions are READ 4, WRITE 2, EXECUTE 1; the id is NO_ID but of USER, GROUP."""

    tag: int
    permissions: int
    id: int = NO_ID


# --- values -----------------------------------------------------------------------------------


def parse(value: bytes) -> list[Entry]:
    """Return the entries of an encoded list; none for a list without any.

    Raises FsError: EINVAL for a damaged value, EOPNOTSUPP for another version.
    """
    if len(value) < _HEADER.size:
        raise FsError(errno.EINVAL)
    if _HEADER.unpack_from(value, 0)[0] != VERSION:
        raise FsError(errno.EOPNOTSUPP)
    if (len(value) - _HEADER.size) % _ENTRY.size:
        raise FsError(errno.EINVAL)
    entries: list[Entry] = []
    for at in range(_HEADER.size, len(value), _ENTRY.size):
        tag, permissions, number = _ENTRY.unpack_from(value, at)
        entries.append(Entry(tag, permissions, number if tag in _NAMED else NO_ID))
    return entries


def encode(entries: list[Entry]) -> bytes:
    """Return the encoded list."""
    return _HEADER.pack(VERSION) + b"".join([_ENTRY.pack(*entry) for entry in entries])


def check(entries: list[Entry]) -> None:
    """Raise EINVAL unless the entries form a list that the kernel accepts.

    The tags are in order.  The owner, the owning group and others are there once each, and so is
    the mask if there is a USER or GROUP.  The kernel does not compare the ids of two entries.
    """
    last, named = 0, False
    for entry in entries:
        if entry.tag not in _FOLLOWING.get(last, ()) or entry.permissions & ~7:
            raise FsError(errno.EINVAL)
        if entry.tag in _NAMED:
            named = True
            if entry.id == NO_ID:
                raise FsError(errno.EINVAL)
        if entry.tag == OTHER and named and last != MASK:
            raise FsError(errno.EINVAL)
        last = entry.tag
    if last != OTHER:
        raise FsError(errno.EINVAL)


def is_valid(value: bytes) -> bool:
    """Return whether the kernel accepts an encoded list; it refuses all use of a file otherwise."""
    try:
        entries = parse(value)
        check(entries)
    except FsError:
        return False
    return len(value) <= VALUE_MAX


def is_minimal(entries: list[Entry]) -> bool:
    """Return whether a mode says the same: neither a USER, nor a GROUP, nor a mask."""
    return len(entries) == 3


def _group_tag(entries: list[Entry]) -> int:
    """Return the tag whose entry equals the group's bits of the mode."""
    return MASK if entries[-2].tag == MASK else GROUP_OBJ


def permissions_of(entries: list[Entry]) -> int:
    """Return the permission bits that a mode has beside this access list."""
    group_tag = _group_tag(entries)
    bits = 0
    for tag, permissions, _ in entries:
        if tag == USER_OBJ:
            bits |= permissions << 6
        elif tag == group_tag:
            bits |= permissions << 3
        elif tag == OTHER:
            bits |= permissions
    return bits


def without_list(mode: int, entries: list[Entry]) -> int:
    """Return the mode for a copy that has no list: the owning group gets no more than before."""
    granted = 7
    for tag, permissions, _ in entries:
        if tag in (GROUP_OBJ, MASK):
            granted &= permissions
    return mode & (~0o070 | granted << 3)


def with_permissions(entries: list[Entry], bits: int) -> list[Entry]:
    """Return the access list after chmod(2) to these permission bits."""
    group_tag = _group_tag(entries)
    changed = {USER_OBJ: bits >> 6 & 7, group_tag: bits >> 3 & 7, OTHER: bits & 7}
    return [Entry(tag, changed.get(tag, held), number) for tag, held, number in entries]


def inherited(entries: list[Entry], bits: int) -> list[Entry]:
    """Return the access list of a new inode: the default list, less what its mode leaves out."""
    return with_permissions(entries, permissions_of(entries) & bits)


def permits(
    entries: list[Entry], uid: int, owner: int, group: int, mask: int, is_in: Callable[[int], bool]
) -> bool:
    """Return whether the access list of an inode of *owner* and *group* gives *uid* all of *mask*.

    *is_in* returns whether the caller is in a group.
    """
    most = next((entry.permissions for entry in entries if entry.tag == MASK), 7)
    in_group = False
    for tag, held, number in entries:
        if tag == USER_OBJ and uid == owner:
            return held & mask == mask
        if tag == USER and uid == number:
            return held & most & mask == mask
        if (tag == GROUP_OBJ and is_in(group)) or (tag == GROUP and is_in(number)):
            in_group = True
            if held & mask == mask:
                return most & mask == mask
        if tag == OTHER:
            return not in_group and held & mask == mask
    return False


# --- lists of inodes --------------------------------------------------------------------------


def find(view: View, inode: Inode, name: bytes) -> list[Entry]:
    """Return a list of an inode; no entries if it has none, or only a damaged one."""
    if not inode.record.xattr_size:
        return []
    value = xattr.table(view, inode).get(name)
    if value is None or not is_valid(value):
        return []
    return parse(value)


def set_list(
    tx: Transaction, inode: Inode, name: bytes, value: bytes, *, clears_set_group_id: bool
) -> Inode:
    """Return the inode with a list, and with the mode that goes with it; an empty one removes it.

    Raises EOPNOTSUPP for a symbolic link.  Raises EACCES for a default list, unless the inode is a
    directory.  Raises EINVAL for a malformed list, E2BIG above VALUE_MAX, ENOSPC.
    """
    if stat.S_ISLNK(inode.record.mode):
        raise FsError(errno.EOPNOTSUPP)
    entries = parse(value) if value else []
    if not entries:
        return remove(tx, inode, name)
    if name == DEFAULT_LIST and not inode.is_dir:
        raise FsError(errno.EACCES)
    check(entries)
    if len(value) > VALUE_MAX:
        raise FsError(errno.E2BIG)
    if name == ACCESS_LIST:
        mode = inode.record.mode & ~0o777 | permissions_of(entries)
        if clears_set_group_id:
            mode &= ~stat.S_ISGID
        inode = inode.evolve(mode=mode, ctime_ns=tx.now)
        if is_minimal(entries):
            return remove(tx, inode, name)
    return xattr.set_value(tx, inode, name, encode(entries), 0)


def remove(tx: Transaction, inode: Inode, name: bytes) -> Inode:
    """Return the inode without a list; the mode stays, and so does the time if it had none."""
    if xattr.table(tx, inode).find(name) < 0:
        return inode
    return xattr.remove_value(tx, inode, name)


def change_mode(tx: Transaction, inode: Inode, mode: int) -> Inode:
    """Return the inode with its access list in step with a new *mode*; the caller sets the mode."""
    entries = find(tx, inode, ACCESS_LIST)
    if not entries:
        return inode
    return xattr.set_value(tx, inode, ACCESS_LIST, encode(with_permissions(entries, mode)), 0)


def inherit(tx: Transaction, folder: Inode, inode: Inode, umask: int) -> Inode:
    """Return a new inode with the mode and the lists that it gets in *folder*.

    A default list replaces the umask.  A new directory gets the default list, too.
    """
    mode = inode.record.mode
    entries = find(tx, folder, DEFAULT_LIST)
    if not entries:
        return inode if not mode & umask else inode.evolve(mode=mode & ~umask)
    own = inherited(entries, mode)
    lists = {} if is_minimal(own) else {ACCESS_LIST: encode(own)}
    if inode.is_dir:
        lists[DEFAULT_LIST] = encode(entries)
    inode = inode.evolve(mode=mode & ~0o777 | permissions_of(own))
    return xattr.save(tx, inode, lists, silent=True) if lists else inode
