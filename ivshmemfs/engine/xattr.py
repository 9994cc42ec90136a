"""Extended attributes: one string of bytes per inode, beside the payload or in own blocks."""

from __future__ import annotations

import errno

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


def load(view: View, inode: Inode) -> dict[bytes, bytes]:
    """All extended attributes by name."""
    record = inode.record
    raw = bytes(inode.xattr)
    if record.xattr_pointer != NULL:
        if record.xattr_size > TOTAL_MAX:
            raise Corrupt(f"inode {inode.ino}: {record.xattr_size} bytes of extended attributes")
        count = -(-record.xattr_size // view.block_size)
        tree = Tree(record.xattr_height, record.xattr_pointer)
        pointers = radix.find_range(view.nodes, tree, inode.ino, 0, count)
        raw = bytes(view.store.gather(pointers, 0, record.xattr_size))
    try:
        return encoding.decode(raw) if raw else {}
    except ValueError as error:
        raise Corrupt(f"inode {inode.ino}: extended attributes: {error}") from None


def set_value(tx: Transaction, inode: Inode, name: bytes, value: bytes, flags: int) -> Inode:
    """The inode with one attribute set; raises EEXIST, ENODATA, ERANGE, E2BIG, NoSpace."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ERANGE)
    check_namespace(name)
    if len(value) > VALUE_MAX:
        raise FsError(errno.E2BIG)
    values = load(tx, inode)
    if flags & CREATE and name in values:
        raise FsError(errno.EEXIST)
    if flags & REPLACE and name not in values:
        raise FsError(errno.ENODATA)
    return save(tx, inode, {**values, name: value})


def remove_value(tx: Transaction, inode: Inode, name: bytes) -> Inode:
    """The inode without an attribute; raises ENODATA."""
    check_namespace(name)
    values = load(tx, inode)
    if values.pop(name, None) is None:
        raise FsError(errno.ENODATA)
    return save(tx, inode, values)


def without_capability(tx: Transaction, inode: Inode) -> Inode:
    """The inode without the capabilities that running it would give."""
    values = load(tx, inode)
    return save(tx, inode, values) if values.pop(CAPABILITY, None) is not None else inode


def save(
    tx: Transaction, inode: Inode, values: dict[bytes, bytes], *, silent: bool = False
) -> Inode:
    """The inode with these attributes and no others; `silent` leaves its ctime alone."""
    if sum(encoding.XATTR.size + len(n) + len(v) for n, v in values.items()) > TOTAL_MAX:
        raise FsError(errno.ENOSPC)
    raw = encoding.encode(values) if values else b""
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
    return inode.evolve(
        xattr=beside,
        xattr_size=len(raw),
        xattr_height=tree.height,
        xattr_pointer=tree.slots,
        blocks=record.blocks + tx.space.balance - before,
        ctime_ns=record.ctime_ns if silent else tx.now,
    )
