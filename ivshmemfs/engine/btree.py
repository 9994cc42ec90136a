"""The B+tree of one directory: how its nodes are read, stored, split and merged.

A directory's inode holds the tree in one of three payloads:

    EMPTY    no entries
    DIRLEAF  one leaf
    DIRTREE  the top interior node; `height` levels of nodes are below it

A leaf is split between two hashes only, so names of equal hash are always in one leaf, and a
look-up reads one path.  A leaf of less than a quarter of a block is merged with a neighbour.  A
tree whose last leaf fits in the inode becomes a DIRLEAF again.

Published nodes are never changed.  Each function here writes a new path of nodes into the
transaction's `Workspace`, and returns the inode with the new top.  `directory` gives entries their
meaning.
"""

from __future__ import annotations

from typing import Final

from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import BlockCount, Transaction, View
from ivshmemfs.errors import Corrupt, NoSpace
from ivshmemfs.format import inode as fmt
from ivshmemfs.format.dirent import (
    COLLISIONS,
    EMPTY_LEAF,
    ENTRY_FIXED,
    NO_CHILDREN,
    NODE_ENTRY,
    Interior,
    Leaf,
    decode_interior,
    decode_leaf,
    interior_of,
    only_child,
)
from ivshmemfs.format.inode import INODE
from ivshmemfs.format.node import DIRLEAF, DIRNODE, HEADER_SIZE
from ivshmemfs.native import weight_of


class Step:
    """One interior node on a path from the top to a leaf, and the index of the child taken."""

    __slots__ = ("at", "interior")

    def __init__(self, interior: Interior, at: int) -> None:
        self.interior: Final = interior
        self.at: Final = at

    @property
    def taken(self) -> bytes:
        """The pointer to the child taken."""
        return self.interior.pointer(self.at)


# --- reading --------------------------------------------------------------------------------


def _decoded_leaf(raw: bytes, count: int, where: str) -> Leaf:
    """Decode a leaf of the region; raises Corrupt unless every name in it is valid."""
    try:
        leaf = decode_leaf(raw, count)
    except ValueError as error:
        raise Corrupt(f"{where}: {error}") from None
    unfit = leaf.unfit()
    if unfit:
        raise Corrupt(f"{where}: {unfit!r} cannot be a name (fsck.ivshmemfs -y drops it)")
    return leaf


def inline_leaf(inode: Inode) -> Leaf:
    """The leaf in the inode of an EMPTY or DIRLEAF directory; raises Corrupt."""
    if inode.leaf is None:
        if inode.record.payload == fmt.EMPTY:
            inode.leaf = EMPTY_LEAF
        else:
            where = f"directory {inode.ino}"
            inode.leaf = _decoded_leaf(inode.data, inode.record.entries, where)
    return inode.leaf


def _top(inode: Inode) -> Interior:
    """The top interior node of a DIRTREE directory; raises Corrupt."""
    if inode.top is None:
        try:
            inode.top = decode_interior(inode.data, len(inode.data) // NODE_ENTRY)
        except ValueError as error:
            raise Corrupt(f"directory {inode.ino}: {error}") from None
    return inode.top


def _leaf_at(view: View, pointer: bytes, owner: int) -> Leaf:
    node = view.nodes.node(pointer, DIRLEAF, 0, owner)
    if node.parsed is None:
        where = f"directory {owner}, block {node.block}"
        node.parsed = _decoded_leaf(node.data[HEADER_SIZE:], node.count, where)
    leaf: Leaf = node.parsed
    return leaf


def _interior_at(view: View, pointer: bytes, level: int, owner: int) -> Interior:
    node = view.nodes.node(pointer, DIRNODE, level, owner)
    if node.parsed is None:
        try:
            node.parsed = decode_interior(node.data[HEADER_SIZE:], node.count)
        except ValueError as error:
            raise Corrupt(f"directory {owner}, block {node.block}: {error}") from None
    interior: Interior = node.parsed
    return interior


def top_pointers(inode: Inode) -> list[bytes]:
    """The pointers to the children of the top of a DIRTREE directory; raises Corrupt."""
    return _pointers(_top(inode))


def pointers_at(view: View, inode: Inode, pointer: bytes, level: int) -> list[bytes]:
    """The pointers in an interior node of a directory; raises Corrupt."""
    return _pointers(_interior_at(view, pointer, level, inode.ino))


def _pointers(interior: Interior) -> list[bytes]:
    return [interior.pointer(at) for at in range(interior.count)]


def leaf_at(view: View, inode: Inode, pointer: bytes) -> Leaf:
    """The leaf at a pointer, or the one in the inode; raises Corrupt."""
    if inode.record.payload != fmt.DIRTREE:
        return inline_leaf(inode)
    return _leaf_at(view, pointer, inode.ino)


def descend(view: View, inode: Inode, key: int) -> tuple[list[Step], Leaf]:
    """Return (path, leaf) from the top of a DIRTREE to the leaf whose range holds `key`."""
    step, path = _first_step(inode, key), list[Step]()
    for level in range(inode.record.height - 1, 0, -1):
        path.append(step)
        interior = _interior_at(view, step.taken, level, inode.ino)
        step = Step(interior, interior.pick(key))
    path.append(step)
    return path, _leaf_at(view, step.taken, inode.ino)


def _first_step(inode: Inode, key: int) -> Step:
    top = _top(inode)
    return Step(top, top.pick(key))


def path_to(view: View, inode: Inode, key: int) -> tuple[list[Step], Leaf]:
    """Return the same for any directory; the path to a leaf in the inode is empty."""
    if inode.record.payload == fmt.DIRTREE:
        return descend(view, inode, key)
    return [], inline_leaf(inode)


# --- changing -------------------------------------------------------------------------------


_FILLED: Final = INODE.places("entries", "blocks", "payload", "height", "payload_size")
_EDITED: Final = _FILLED + INODE.places("nlink", "mtime_ns", "ctime_ns")
_PAYLOAD: Final = fmt.PAYLOAD_OFFSET  # read without a look-up


class Edit(BlockCount):
    """One change of one directory: of its number of entries by `entries`, and of its blocks.

    It gets `links` more links, and new times; with None, neither.
    """

    __slots__ = ("entries", "inode", "links", "tx")

    def __init__(self, tx: Transaction, inode: Inode, links: int | None, entries: int) -> None:
        super().__init__(tx.space, inode)
        self.tx: Final = tx
        self.inode: Final = inode
        self.links: Final = links
        self.entries: Final = entries

    def finish(self, data: bytes, kind: int, height: int) -> Inode:
        """Return the directory with this payload and its new number of blocks."""
        inode, links = self.inode, self.links
        record = inode.record
        entries = record.entries + self.entries
        if links is None:
            kept = (entries, self.total(), kind, height, len(data))
            new = INODE.placed(record, _FILLED, kept)
        else:
            nlink, now = record.nlink + links, self.tx.now
            values = (entries, self.total(), kind, height, len(data), nlink, now, now)
            new = INODE.placed(record, _EDITED, values)
        return Inode(inode.ino, new, data, inode.xattr)


def _leaf_capacity(tx: Transaction) -> int:
    """Bytes of entries that a leaf block holds."""
    return tx.block_size - HEADER_SIZE


def _top_capacity(tx: Transaction, inode: Inode) -> int:
    """Bytes of entries, or of children, that the inode block holds."""
    return tx.block_size - _PAYLOAD - len(inode.xattr)


def store_leaf(edit: Edit, path: list[Step], leaf: Leaf) -> Inode:
    """Return the directory with `leaf` at the end of `path`.

    Splits nodes that overflow, and moves a leaf that overflows the inode into a tree.  Raises
    NoSpace.
    """
    tx, inode = edit.tx, edit.inode
    if not path:
        if leaf.size <= _top_capacity(tx, inode):
            return _inline(edit, leaf)
        return _put_top(edit, _leaf_nodes(tx, inode.ino, leaf, 0), 1)
    tx.space.replace(path[-1].taken)
    return _put_in_place(edit, path, leaf)


def store_smaller_leaf(edit: Edit, path: list[Step], leaf: Leaf) -> Inode:
    """Do the same for a leaf that lost an entry: remove an empty leaf, merge a small one."""
    tx = edit.tx
    if path and not leaf.count:
        tx.space.replace(path[-1].taken)
        return _put_children(edit, path, NO_CHILDREN)
    if path and leaf.size < _leaf_capacity(tx) // 4:
        return _merge(edit, path, leaf)
    return store_leaf(edit, path, leaf)


def is_same_leaf(path: list[Step], other: list[Step]) -> bool:
    """Return whether two paths in one directory lead to one leaf."""
    return all(step.at == other[depth].at for depth, step in enumerate(path))


def store_leaves(
    edit: Edit, path: list[Step], leaf: Leaf, other_path: list[Step], other: Leaf
) -> Inode | None:
    """Return the directory with two leaves at the ends of two paths; the first one lost an entry.

    For the usual case: both leaves are below the top, one is not merged and the other not split.
    Returns None, and changes nothing, in other cases.
    """
    tx, inode, most = edit.tx, edit.inode, _leaf_capacity(edit.tx)
    if len(path) != 1 or leaf.size < most // 4 or other.size > most:
        return None
    step, second = path[0], other_path[0]
    tx.space.replace(step.taken)
    tx.space.replace(second.taken)
    top = step.interior.with_pointer(step.at, _leaf_node(tx, inode.ino, leaf))
    top = top.with_pointer(second.at, _leaf_node(tx, inode.ino, other))
    return _top_put(edit, top, 1)


def _inline(edit: Edit, leaf: Leaf) -> Inode:
    """Return the directory with `leaf` as its payload."""
    new = edit.finish(leaf.raw, fmt.DIRLEAF if leaf.count else fmt.EMPTY, 0)
    new.leaf = leaf
    return new


def _leaf_nodes(tx: Transaction, ino: int, leaf: Leaf, bound: int) -> Interior:
    """Store `leaf` as one or two nodes; `bound` is the lower bound of the first.

    Raises NoSpace when no place to split leaves two halves that fit a node.
    """
    if leaf.size <= _leaf_capacity(tx):
        return only_child(bound, _leaf_node(tx, ino, leaf))
    cut = _split_point(leaf, _leaf_capacity(tx))
    left, right = leaf.part(0, cut), leaf.part(cut, leaf.count)
    middle = leaf.key(cut) & ~(COLLISIONS - 1)
    return interior_of([(bound, _leaf_node(tx, ino, left)), (middle, _leaf_node(tx, ino, right))])


def _leaf_node(tx: Transaction, ino: int, leaf: Leaf) -> bytes:
    return tx.space.add_node(DIRLEAF, 0, ino, leaf.count, leaf.raw, 1, leaf)


def _split_point(leaf: Leaf, capacity: int) -> int:
    """Return the index between two hashes that is nearest to the middle of `leaf`, in bytes.

    Raises NoSpace when a half is larger than `capacity`.
    """
    best, best_off, best_size, size = 0, leaf.size, 0, 0
    keys, sizes = leaf.keys, leaf.sizes
    for at in range(1, leaf.count):
        size += ENTRY_FIXED + sizes[at - 1]
        off = abs(2 * size - leaf.size)
        if off < best_off and keys[at] ^ keys[at - 1] >= COLLISIONS:  # two hashes
            best, best_off, best_size = at, off, size
    if not best or best_size > capacity or leaf.size - best_size > capacity:
        raise NoSpace("the directory holds too many names of the same hash")
    return best


def _merge(edit: Edit, path: list[Step], leaf: Leaf) -> Inode:
    """Store `leaf`, joined with a neighbour under the same parent if both fit three quarters."""
    tx, inode = edit.tx, edit.inode
    interior, at = path[-1].interior, path[-1].at
    for other_at in (at + 1, at - 1):
        if not 0 <= other_at < interior.count:
            continue
        other = _leaf_at(tx, interior.pointer(other_at), inode.ino)
        if other.size + leaf.size > _leaf_capacity(tx) * 3 // 4:
            continue
        low = min(at, other_at)
        both = leaf.join(other) if other_at > at else other.join(leaf)
        tx.space.replace(interior.pointer(low))
        tx.space.replace(interior.pointer(low + 1))
        shrunk = interior.replace(low + 1, NO_CHILDREN)
        return _put_in_place(edit, [*path[:-1], Step(shrunk, low)], both)
    return store_leaf(edit, path, leaf)


def _put_in_place(edit: Edit, path: list[Step], leaf: Leaf) -> Inode:
    """Store a leaf at the end of `path`; the caller has replaced the block there."""
    tx, inode = edit.tx, edit.inode
    step = path[-1]
    below_top = len(path) == 1
    if below_top and step.interior.count == 1 and leaf.size <= _top_capacity(tx, inode) // 2:
        return _inline(edit, leaf)
    if below_top and leaf.size <= _leaf_capacity(tx):  # the usual case, as the general one below
        top = step.interior.with_pointer(step.at, _leaf_node(tx, inode.ino, leaf))
        return _top_put(edit, top, 1)
    children = _leaf_nodes(tx, inode.ino, leaf, step.interior.key(step.at))
    return _put_children(edit, path, children)


def _with_children(step: Step, children: Interior) -> Interior:
    """Return the node of `step` with `children` (0, 1 or 2) in place of the child taken.

    The first of them has the bound of that child.
    """
    if children.count == 1:
        return step.interior.with_pointer(step.at, children.pointer(0))
    new = step.interior.replace(step.at, children)
    if not children.count and step.at == 0 and new.count:
        return new.from_bound(step.interior.key(0))  # the next child takes over the range
    return new


def _put_children(edit: Edit, path: list[Step], children: Interior) -> Inode:
    """Replace the child at the end of `path` by `children`, then each node up to the top.

    The caller has replaced the child's own block.
    """
    tx, inode = edit.tx, edit.inode
    for depth in range(len(path) - 1, 0, -1):
        interior = _with_children(path[depth], children)
        above = path[depth - 1]
        tx.space.replace(above.taken)
        level, bound = len(path) - depth, above.interior.key(above.at)
        children = _interior_nodes(tx, inode.ino, interior, level, bound)
    return _put_top(edit, _with_children(path[0], children), len(path))


def _interior_nodes(
    tx: Transaction, ino: int, interior: Interior, level: int, bound: int
) -> Interior:
    """Store `interior` as no, one or two nodes; `bound` is the lower bound of the first."""
    if not interior.count:
        return NO_CHILDREN
    if interior.size <= tx.block_size - HEADER_SIZE:
        return only_child(bound, _interior_node(tx, ino, interior, level))
    cut = interior.count // 2
    left, right = interior.part(0, cut), interior.part(cut, interior.count)
    return interior_of(
        [
            (bound, _interior_node(tx, ino, left, level)),
            (right.key(0), _interior_node(tx, ino, right, level)),
        ]
    )


def _interior_node(tx: Transaction, ino: int, interior: Interior, level: int) -> bytes:
    below = 1 + weight_of(interior.pointers)
    return tx.space.add_node(DIRNODE, level, ino, interior.count, interior.raw, below, interior)


def _put_top(edit: Edit, top: Interior, height: int) -> Inode:
    """Return the directory with `top` as its payload.

    A top that overflows the inode moves one level down; an only child that fits moves up.
    """
    tx, inode = edit.tx, edit.inode
    if not top.count:
        return _inline(edit, EMPTY_LEAF)
    if top.size > _top_capacity(tx, inode):
        top, height = _interior_nodes(tx, inode.ino, top, height, 0), height + 1
    while height > 1 and top.count == 1:
        pointer = top.pointer(0)
        below = _interior_at(tx, pointer, height - 1, inode.ino)
        if below.size > _top_capacity(tx, inode):
            break
        tx.space.replace(pointer)
        # The lowest bound of a tree is 0, even after a removal of its first child.
        top, height = below.from_bound(0), height - 1
    return _top_put(edit, top, height)


def _top_put(edit: Edit, top: Interior, height: int) -> Inode:
    """Return the directory with `top`, which fits, as its payload."""
    new = edit.finish(top.raw, fmt.DIRTREE, height)
    new.top = top
    return new
