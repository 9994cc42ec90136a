"""Extended attributes: one string of bytes per inode, in the inode block or in its own blocks.

A string is decoded at once, into a `Table` of up to 24,000 attributes, in up to 20 ms.  It is not
decoded over several turns: a peer that changes the string would make the finished pieces useless.
The store caches recent tables by the pointer to their string.  So a caller that finds, sets or
removes one of thousands of attributes does not decode the others again.  The tables of a plan enter
the cache after its commit.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from typing import Final

from ivshmemfs.engine import radix
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, SIZE, RadixTree
from ivshmemfs.engine.transaction import BlockCount, Transaction, View
from ivshmemfs.errors import Corrupt, FsError
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import xattr as encoding
from ivshmemfs.format.node import INDEX

CREATE, REPLACE = 1, 2  # flags of setxattr(2)
NAME_MAX = 255
VALUE_MAX = 65536
TOTAL_MAX = 4 * VALUE_MAX
CACHED_FROM = 1024  # bytes of inline attributes from which on their table is cached
# Of the kernel's own names there are the two of access lists (`acl`).  Others are refused: the file
# system would have to obey them, and a copying program would believe that they took effect.
ACCESS_LIST = b"system.posix_acl_access"
DEFAULT_LIST = b"system.posix_acl_default"
LISTS = (ACCESS_LIST, DEFAULT_LIST)
NAMESPACES = (b"user.", b"security.", b"trusted.")
PUBLIC = (b"user.", b"security.", *LISTS)  # all but trusted ones, which only root sees


def check_namespace(name: bytes) -> None:
    """Raise EOPNOTSUPP for a name of another namespace, EINVAL for a namespace alone."""
    if name in LISTS:
        return
    if not name.startswith(NAMESPACES):
        raise FsError(errno.EOPNOTSUPP)
    if name in NAMESPACES:
        raise FsError(errno.EINVAL)


class Table:
    """Attributes by ascending name: names, and their encoded entries.  Immutable."""

    __slots__ = ("entries", "names", "size")

    def __init__(self, names: list[bytes], entries: list[bytes], size: int) -> None:
        self.names: Final = names
        self.entries: Final = entries
        self.size: Final = size  # bytes of the string

    def find(self, name: bytes) -> int:
        """Return the index of an attribute; -1 when there is none of that name."""
        at = bisect_left(self.names, name)
        return at if at < len(self.names) and self.names[at] == name else -1

    def get(self, name: bytes) -> bytes | None:
        """Return the value of an attribute, or None."""
        at = self.find(name)
        return encoding.value_of(name, self.entries[at]) if at >= 0 else None

    def put(self, name: bytes, value: bytes) -> Table:
        """Return the table with one attribute set; raises ValueError when it is too large."""
        at = bisect_left(self.names, name)
        there = at < len(self.names) and self.names[at] == name
        return self._spliced(at, at + int(there), [name], [encoding.encode_one(name, value)])

    def without(self, at: int) -> Table:
        """Return the table without the attribute at index `at`."""
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
    """Return the cache key of an inode's string; empty for a string that is not cached."""
    record = inode.record
    if record.xattr_pointer == NULL:
        return inode.xattr if len(inode.xattr) >= CACHED_FROM else b""
    sizes = record.xattr_size << 8 | record.xattr_height
    return record.xattr_pointer + sizes.to_bytes(8, "little")


def table(view: View, inode: Inode) -> Table:
    """Return all extended attributes of an inode; raises Corrupt."""
    if not inode.record.xattr_size and not inode.xattr:
        return NO_ATTRIBUTES
    key = _key(inode)
    known = None if view.tables is None else view.tables.get(key)
    if known is None and key:
        known = view.store.recent.get(key)
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
    tree = RadixTree(record.xattr_height, record.xattr_pointer)
    pointers = radix.find_range(view.nodes, tree, inode.ino, 0, count)
    return bytes(view.store.gather(pointers, 0, record.xattr_size))


def load(view: View, inode: Inode) -> dict[bytes, bytes]:
    """Return all extended attributes by name; raises Corrupt."""
    found = table(view, inode)
    pairs = zip(found.names, found.entries, strict=True)
    return {name: encoding.value_of(name, entry) for name, entry in pairs}


def set_value(tx: Transaction, inode: Inode, name: bytes, value: bytes, flags: int) -> Inode:
    """Return the inode with one attribute set.

    Raises EEXIST, ENODATA, ERANGE, E2BIG, EOPNOTSUPP, ENOSPC, NoSpace.
    """
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
    """Return the inode without an attribute; raises ENODATA, EOPNOTSUPP."""
    check_namespace(name)
    found = table(tx, inode)
    at = found.find(name)
    if at < 0:
        raise FsError(errno.ENODATA)
    return _stored(tx, inode, found.without(at))


def discard(tx: Transaction, inode: Inode, name: bytes) -> Inode:
    """Return the inode without an attribute, or unchanged when there is none of that name."""
    found = table(tx, inode)
    at = found.find(name)
    return _stored(tx, inode, found.without(at)) if at >= 0 else inode


def save(
    tx: Transaction, inode: Inode, values: dict[bytes, bytes], *, silent: bool = False
) -> Inode:
    """Return the inode with these attributes and no others; `silent` keeps its ctime."""
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
    """Return the inode with the attributes of `new`; raises ENOSPC, NoSpace."""
    if new.size > TOTAL_MAX:
        raise FsError(errno.ENOSPC)
    raw = b"".join(new.entries)
    record, count = inode.record, BlockCount(tx.space, inode)
    old = RadixTree(record.xattr_height, record.xattr_pointer)
    if old.slots != NULL:
        if old.height:
            tx.space.drop(old.slots, INDEX, old.height - 1, inode.ino)
        else:
            tx.space.replace(old.slots)
    capacity = fmt.payload_capacity(tx.block_size)
    inline = len(raw) <= capacity // 2 and len(inode.data) + len(raw) <= capacity
    tree, beside = RadixTree(0, NULL), raw
    if not inline:
        pointers = tx.space.claim(-(-len(raw) // tx.block_size))
        tx.space.fill(pointers, raw)
        tree = radix.store(tx.space, RadixTree(0, b""), inode.ino, 0, pointers, 1)
        beside = b""
    assert len(tree.slots) == SIZE
    inode = inode.evolve(
        xattr=beside,
        xattr_size=len(raw),
        xattr_height=tree.height,
        xattr_pointer=tree.slots,
        blocks=count.total(),
        ctime_ns=record.ctime_ns if silent else tx.now,
    )
    key = _key(inode)
    if key:
        tx.keep_table(key, new)
    return inode
