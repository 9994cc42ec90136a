"""Extended attributes: one string of bytes per inode, beside the payload or in own blocks.

A string is decoded once, into a `Table`: 24,000 attributes at most, which takes 20 ms.  It is not
done in pieces, because somebody who changes the string in between would make them vain.  The tables
that were used last stay known, by the pointer to their string, so that one attribute of thousands
is found, set or removed without decoding the others again.  Tables of a plan are known once it is
committed.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from typing import Final

from ivshmemfs.engine import radix
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, SIZE, Tree
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Corrupt, FsError
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import xattr as encoding
from ivshmemfs.format.node import INDEX

CREATE, REPLACE = 1, 2  # flags of setxattr(2)
NAME_MAX = 255
VALUE_MAX = 65536
TOTAL_MAX = 4 * VALUE_MAX
REMEMBERED = 1024  # bytes of attributes beside the payload from which on their table is kept
# The kernel's own names, such as POSIX access lists, would have to be obeyed, not just stored:
# a copying program that believes that they took effect leaves out the permissions.
CAPABILITY = b"security.capability"
PUBLIC = (b"user.", b"security.")
NAMESPACES = (*PUBLIC, b"trusted.")


def check_namespace(name: bytes) -> None:
    """Raise EOPNOTSUPP for attributes that are not merely stored."""
    if not name.startswith(NAMESPACES):
        raise FsError(errno.EOPNOTSUPP)
    if name in NAMESPACES:
        raise FsError(errno.EINVAL)


class Table:
    """Attributes in order: names, and entries as they stand in the string.  Immutable."""

    __slots__ = ("entries", "names", "size")

    def __init__(self, names: list[bytes], entries: list[bytes], size: int) -> None:
        self.names: Final = names
        self.entries: Final = entries
        self.size: Final = size  # of the string, in bytes

    def find(self, name: bytes) -> int:
        """The index of an attribute; -1 when there is none of that name."""
        at = bisect_left(self.names, name)
        return at if at < len(self.names) and self.names[at] == name else -1

    def get(self, name: bytes) -> bytes | None:
        """The value of an attribute, or None."""
        at = self.find(name)
        return encoding.value_of(name, self.entries[at]) if at >= 0 else None

    def put(self, name: bytes, value: bytes) -> Table:
        """The table with one attribute set; ValueError when it is too large."""
        at = bisect_left(self.names, name)
        there = at < len(self.names) and self.names[at] == name
        return self._spliced(at, at + int(there), [name], [encoding.encode_one(name, value)])

    def without(self, at: int) -> Table:
        """The table without the attribute of that index."""
        return self._spliced(at, at + 1, [], [])

    def _spliced(self, at: int, end: int, names: list[bytes], entries: list[bytes]) -> Table:
        gone = sum([len(entry) for entry in self.entries[at:end]])
        come = sum([len(entry) for entry in entries])
        return Table(
            [*self.names[:at], *names, *self.names[end:]],
            [*self.entries[:at], *entries, *self.entries[end:]],
            self.size - gone + come,
        )


NO_ATTRIBUTES: Final = Table([], [], 0)


def _key(inode: Inode) -> bytes:
    """What tells the string of an inode from all others; empty for a short one."""
    record = inode.record
    if record.xattr_pointer == NULL:
        return inode.xattr if len(inode.xattr) >= REMEMBERED else b""
    sizes = record.xattr_size << 8 | record.xattr_height
    return record.xattr_pointer + sizes.to_bytes(8, "little")


def table(view: View, inode: Inode) -> Table:
    """All extended attributes of an inode."""
    if not inode.record.xattr_size and not inode.xattr:
        return NO_ATTRIBUTES
    key = _key(inode)
    known = view.tables.get(key) or (view.store.recent.get(key) if key else None)
    if isinstance(known, Table):
        return known
    raw = _string(view, inode)
    try:
        pairs = list(encoding.split(raw))
    except ValueError as error:
        raise Corrupt(f"inode {inode.ino}: extended attributes: {error}") from None
    found = Table([name for name, _ in pairs], [entry for _, entry in pairs], len(raw))
    if key:
        view.store.recent.put(key, found)
    return found


def _string(view: View, inode: Inode) -> bytes:
    record = inode.record
    if record.xattr_pointer == NULL:
        return bytes(inode.xattr)
    if record.xattr_size > TOTAL_MAX:
        raise Corrupt(f"inode {inode.ino}: {record.xattr_size} bytes of extended attributes")
    count = -(-record.xattr_size // view.block_size)
    tree = Tree(record.xattr_height, record.xattr_pointer)
    pointers = radix.find_range(view.nodes, tree, inode.ino, 0, count)
    return bytes(view.store.gather(pointers, 0, record.xattr_size))


def load(view: View, inode: Inode) -> dict[bytes, bytes]:
    """All extended attributes by name."""
    found = table(view, inode)
    pairs = zip(found.names, found.entries, strict=True)
    return {name: encoding.value_of(name, entry) for name, entry in pairs}


def set_value(tx: Transaction, inode: Inode, name: bytes, value: bytes, flags: int) -> Inode:
    """The inode with one attribute set; raises EEXIST, ENODATA, ERANGE, E2BIG, NoSpace."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ERANGE)
    check_namespace(name)
    if len(value) > VALUE_MAX:
        raise FsError(errno.E2BIG)
    found = table(tx, inode)
    there = found.find(name) >= 0
    if flags & CREATE and there:
        raise FsError(errno.EEXIST)
    if flags & REPLACE and not there:
        raise FsError(errno.ENODATA)
    return _stored(tx, inode, found.put(name, value))


def remove_value(tx: Transaction, inode: Inode, name: bytes) -> Inode:
    """The inode without an attribute; raises ENODATA."""
    check_namespace(name)
    found = table(tx, inode)
    at = found.find(name)
    if at < 0:
        raise FsError(errno.ENODATA)
    return _stored(tx, inode, found.without(at))


def without_capability(tx: Transaction, inode: Inode) -> Inode:
    """The inode without the capabilities that running it would give."""
    found = table(tx, inode)
    at = found.find(CAPABILITY)
    return _stored(tx, inode, found.without(at)) if at >= 0 else inode


def save(
    tx: Transaction, inode: Inode, values: dict[bytes, bytes], *, silent: bool = False
) -> Inode:
    """The inode with these attributes and no others; `silent` leaves its ctime alone."""
    names = sorted(values)
    entries = [encoding.encode_one(name, values[name]) for name in names]
    size = sum([len(entry) for entry in entries])
    return _stored(tx, inode, Table(names, entries, size), silent=silent)


def set_hidden(tx: Transaction, inode: Inode, name: bytes, value: bytes) -> Inode:
    """The inode with an attribute that users do not see; its ctime stays.

    An empty value removes the attribute.  Raises ENOSPC when all attributes are too large.
    """
    found = table(tx, inode)
    if value:
        return _stored(tx, inode, found.put(name, value), silent=True)
    at = found.find(name)
    return inode if at < 0 else _stored(tx, inode, found.without(at), silent=True)


def _stored(tx: Transaction, inode: Inode, new: Table, *, silent: bool = False) -> Inode:
    if new.size > TOTAL_MAX:
        raise FsError(errno.ENOSPC)
    raw = b"".join(new.entries)
    record, before = inode.record, tx.space.balance
    old = Tree(record.xattr_height, record.xattr_pointer)
    if old.slots != NULL:
        if old.height:
            tx.space.drop(old.slots, INDEX, old.height - 1, inode.ino)
        else:
            tx.space.replace(old.slots)
    capacity = fmt.payload_capacity(tx.block_size)
    inline = len(raw) <= capacity // 2 and len(inode.data) + len(raw) <= capacity
    tree, beside = Tree(0, NULL), raw
    if not inline:
        pointers = tx.space.claim(-(-len(raw) // tx.block_size))
        tx.space.fill(pointers, raw)
        tree = radix.store(tx.space, Tree(0, b""), inode.ino, 0, pointers, 1)
        beside = b""
    assert len(tree.slots) == SIZE
    inode = inode.evolve(
        xattr=beside,
        xattr_size=len(raw),
        xattr_height=tree.height,
        xattr_pointer=tree.slots,
        blocks=record.blocks + tx.space.balance - before,
        ctime_ns=record.ctime_ns if silent else tx.now,
    )
    key = _key(inode)
    if key:
        tx.tables[key] = new
    return inode
