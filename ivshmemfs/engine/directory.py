"""Directories: a small one stands in its inode block, a larger one in a B+tree of its own.

    EMPTY    no entries
    DIRLEAF  the entries are the inode's payload
    DIRTREE  the payload is the top interior node; `height` levels of nodes below it

Looking up, inserting and removing touch one path.  Names of equal hash always stand in one leaf
(leaves are split between hashes only), so a look-up never has to look left or right.  A removal
merges a leaf that has become small with its neighbour, and a tree whose last leaf fits goes back
into the inode.  Keys stay with their entries for life (see format/dirent.py), so that a
reader who goes by keys sees every entry that was there throughout exactly once, however leaves
split and merge meanwhile.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, Final

from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import weight
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Corrupt, FsError, NoSpace
from ivshmemfs.format import inode as fmt
from ivshmemfs.format.dirent import (
    COLLISIONS,
    EMPTY_LEAF,
    ENTRY_FIXED,
    INO_MASK,
    LAST_KEY,
    NAME_MAX,
    NO_CHILDREN,
    NODE_ENTRY,
    TYPE_SHIFT,
    Interior,
    Leaf,
    decode_interior,
    decode_leaf,
    interior_of,
    is_name,
    name_key,
)
from ivshmemfs.format.node import DIRLEAF, DIRNODE, HEADER_SIZE


class Dirent:
    """One name in a directory; `kind` is the file type bits of its mode, shifted right by 12."""

    __slots__ = ("ino", "key", "kind", "name")

    def __init__(self, key: int, ino_and_type: int, name: bytes) -> None:
        self.key: Final = key
        self.ino: Final = ino_and_type & INO_MASK
        self.kind: Final = ino_and_type >> TYPE_SHIFT
        self.name: Final = name


class Step:
    """One interior node on the way down, and which child was taken."""

    __slots__ = ("at", "interior")

    def __init__(self, interior: Interior, at: int) -> None:
        self.interior: Final = interior
        self.at: Final = at

    @property
    def taken(self) -> bytes:
        """The pointer that was followed."""
        return self.interior.pointer(self.at)


class LeafPosition:
    """Where a name stands in a directory, or would stand: good until the directory changes.

    `at` is its index in `leaf`, -1 when it is not there; `base` is the lowest key it may have.
    """

    __slots__ = ("at", "base", "leaf", "name", "path")

    def __init__(self, name: bytes, base: int, path: list[Step], leaf: Leaf) -> None:
        self.name: Final = name
        self.base: Final = base
        self.path: Final = path
        self.leaf: Final = leaf
        self.at: Final = leaf.find(base, name)

    @property
    def entry(self) -> Dirent | None:
        """The entry, if there is one."""
        at = self.at
        return Dirent(self.leaf.key(at), self.leaf.ino(at), self.name) if at >= 0 else None


NOTHING: Final[dict[str, int]] = {}
LISTED: Final = 128  # entries that are read at once


def check_name(name: bytes) -> None:
    """Raise ENAMETOOLONG, or EINVAL for what cannot be a name."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    if not is_name(name):
        raise FsError(errno.EINVAL)


# --- reading --------------------------------------------------------------------------------


def _decoded_leaf(raw: bytes, count: int, where: str) -> Leaf:
    """A leaf as it stands in the region; what leaves this function as a name is one."""
    try:
        leaf = decode_leaf(raw, count)
    except ValueError as error:
        raise Corrupt(f"{where}: {error}") from None
    unfit = leaf.unfit()
    if unfit:
        raise Corrupt(f"{where}: {unfit!r} cannot be a name (fsck.ivshmemfs -y drops it)")
    return leaf


def _inline_leaf(inode: Inode) -> Leaf:
    if inode.leaf is None:
        if inode.record.payload == fmt.EMPTY:
            inode.leaf = EMPTY_LEAF
        else:
            where = f"directory {inode.ino}"
            inode.leaf = _decoded_leaf(inode.data, inode.record.entries, where)
    return inode.leaf


def _top(inode: Inode) -> Interior:
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


def _descend(view: View, inode: Inode, key: int) -> tuple[list[Step], Leaf]:
    """The way from the top of a DIRTREE to the leaf whose range holds `key`."""
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


def _way(view: View, inode: Inode, key: int) -> tuple[list[Step], Leaf]:
    if inode.record.payload == fmt.DIRTREE:
        return _descend(view, inode, key)
    return [], _inline_leaf(inode)


def locate(view: View, inode: Inode, name: bytes) -> LeafPosition:
    """The position of `name`, whether it is there or not."""
    key = name_key(name, view.secret)
    path, leaf = _way(view, inode, key)
    return LeafPosition(name, key, path, leaf)


def find(view: View, inode: Inode, name: bytes) -> Dirent | None:
    """The entry called `name`, or None."""
    return locate(view, inode, name).entry


def leaf_after(view: View, inode: Inode, key: int) -> list[Dirent]:
    """Entries with keys above `key`, LISTED at most, of one leaf; empty at the directory's end.

    No leaf of a tree is empty and each holds what its bounds say, so the second leaf at the latest
    has some; raises Corrupt when that is not so.
    """
    if key >= LAST_KEY:
        return []
    if inode.record.payload != fmt.DIRTREE:
        return _entries_after(_inline_leaf(inode), key)
    path, leaf = _descend(view, inode, key)
    found = _entries_after(leaf, key)
    if found:
        return found
    bounds = [s.interior.key(s.at + 1) for s in path if s.at + 1 < s.interior.count]
    further = [bound for bound in bounds if bound > key]
    if not further:
        return []
    key = min(further)
    if key % COLLISIONS:
        raise Corrupt(f"directory {inode.ino}: a bound divides names of one hash")
    # A bound is the lowest key of its leaf, and "after" is exclusive.
    found = _entries_after(_descend(view, inode, key)[1], key - 1)
    if not found:
        raise Corrupt(f"directory {inode.ino}: no name stands behind the bound {key:#x}")
    return found


def _entries_after(leaf: Leaf, key: int) -> list[Dirent]:
    keys, inos, sizes = leaf.keys, leaf.inos, leaf.sizes
    first, found = leaf.lower(key + 1), list[Dirent]()
    start = leaf.name_at(first)
    for at in range(first, min(first + LISTED, leaf.count)):
        name = leaf.raw[start : start + sizes[at]]
        found.append(Dirent(keys[at], inos[at], name))
        start += sizes[at]
    return found


def entries(view: View, inode: Inode) -> Iterator[Dirent]:
    """All entries in the order of their keys."""
    key = 0
    while found := leaf_after(view, inode, key):
        yield from found
        key = found[-1].key


# --- changing -------------------------------------------------------------------------------


class Plan:
    """One change of one directory under way; `fields` of its record, as they shall become."""

    def __init__(self, tx: Transaction, inode: Inode, fields: dict[str, int], entries: int) -> None:
        self.tx: Final = tx
        self.inode: Final = inode
        self.before: Final = tx.space.balance
        self.fields: Final[dict[str, Any]] = {**fields, "entries": inode.record.entries + entries}

    def finish(self, data: bytes, kind: int, height: int) -> Inode:
        """The directory with this payload, its blocks accounted for."""
        fields = self.fields
        fields["payload"], fields["height"] = kind, height
        fields["blocks"] = self.inode.record.blocks + self.tx.space.balance - self.before
        return self.inode.changed(fields, data)


def insert(
    tx: Transaction,
    inode: Inode,
    position: LeafPosition,
    ino: int,
    kind: int,
    changes: dict[str, int] = NOTHING,
) -> Inode:
    """The directory with one entry more, and other `changes` of its record.

    The caller made sure that the name is one (`check_name`), and found it not to be there.
    """
    plan = Plan(tx, inode, changes, 1)
    key = _free_key(position.leaf, position.base)
    leaf = position.leaf.insert(key, ino | kind << TYPE_SHIFT, position.name)
    return _put_leaf(plan, position.path, leaf)


def remove(
    tx: Transaction, inode: Inode, position: LeafPosition, changes: dict[str, int] = NOTHING
) -> Inode:
    """The directory without what stands at `position`; raises ENOENT."""
    plan, path = Plan(tx, inode, changes, -1), position.path
    leaf = position.leaf.remove(_present(position))
    if path and not leaf.count:
        tx.space.replace(path[-1].taken)
        return _put_children(plan, path, NO_CHILDREN)
    if path and leaf.size < _leaf_capacity(tx) // 4:
        return _merge(plan, path, leaf)
    return _put_leaf(plan, path, leaf)


def replace(
    tx: Transaction,
    inode: Inode,
    position: LeafPosition,
    ino: int,
    kind: int,
    changes: dict[str, int] = NOTHING,
) -> Inode:
    """The directory in which the name at `position` leads to another inode; raises ENOENT."""
    plan = Plan(tx, inode, changes, 0)
    leaf = position.leaf.replace(_present(position), ino | kind << TYPE_SHIFT)
    return _put_leaf(plan, position.path, leaf)


def _present(position: LeafPosition) -> int:
    if position.at < 0:
        raise FsError(errno.ENOENT)
    return position.at


def _free_key(leaf: Leaf, base: int) -> int:
    at, key = leaf.lower(base), base
    while at < leaf.count and leaf.key(at) == key:
        at, key = at + 1, key + 1
    if key >= base + COLLISIONS:
        raise NoSpace("the directory holds too many names of the same hash")
    return key


def _leaf_capacity(tx: Transaction) -> int:
    return tx.block_size - HEADER_SIZE


def _top_capacity(tx: Transaction, inode: Inode) -> int:
    return fmt.payload_capacity(tx.block_size) - len(inode.xattr)


def _inline(plan: Plan, leaf: Leaf) -> Inode:
    new = plan.finish(leaf.raw, fmt.DIRLEAF if leaf.count else fmt.EMPTY, 0)
    new.leaf = leaf
    return new


def _put_leaf(plan: Plan, path: list[Step], leaf: Leaf) -> Inode:
    """Store a changed leaf at the end of `path`, splitting and converting as its size demands."""
    tx, inode = plan.tx, plan.inode
    if not path:
        if leaf.size <= _top_capacity(tx, inode):
            return _inline(plan, leaf)
        return _put_top(plan, _leaf_nodes(tx, inode.ino, leaf, 0), 1)
    tx.space.replace(path[-1].taken)
    return _put_in_place(plan, path, leaf)


def _leaf_nodes(tx: Transaction, ino: int, leaf: Leaf, bound: int) -> Interior:
    """The one or two children that `leaf` becomes; the first has the lower bound `bound`."""
    if leaf.size <= _leaf_capacity(tx):
        return interior_of([(bound, _leaf_node(tx, ino, leaf))])
    cut = _split_point(leaf, _leaf_capacity(tx))
    left, right = leaf.part(0, cut), leaf.part(cut, leaf.count)
    middle = leaf.key(cut) & ~(COLLISIONS - 1)
    return interior_of([(bound, _leaf_node(tx, ino, left)), (middle, _leaf_node(tx, ino, right))])


def _leaf_node(tx: Transaction, ino: int, leaf: Leaf) -> bytes:
    return tx.space.add_node(DIRLEAF, 0, ino, leaf.count, leaf.raw, 1, leaf)


def _split_point(leaf: Leaf, capacity: int) -> int:
    """Index between two hashes that divides `leaf` best; both halves must fit a node."""
    best, best_off, best_size, size = 0, leaf.size, 0, 0
    keys, sizes = leaf.keys, leaf.sizes
    for at in range(1, leaf.count):
        size += ENTRY_FIXED + sizes[at - 1]
        off = abs(2 * size - leaf.size)
        if off < best_off and keys[at] >> 8 != keys[at - 1] >> 8:
            best, best_off, best_size = at, off, size
    if not best or best_size > capacity or leaf.size - best_size > capacity:
        raise NoSpace("the directory holds too many names of the same hash")
    return best


def _merge(plan: Plan, path: list[Step], leaf: Leaf) -> Inode:
    """Store a small leaf, together with a neighbour under the same parent if both fit one node."""
    tx, inode = plan.tx, plan.inode
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
        return _put_in_place(plan, [*path[:-1], Step(shrunk, low)], both)
    return _put_leaf(plan, path, leaf)


def _put_in_place(plan: Plan, path: list[Step], leaf: Leaf) -> Inode:
    """Store a leaf whose place at the end of `path` is free."""
    tx, inode = plan.tx, plan.inode
    step = path[-1]
    alone = len(path) == 1 and step.interior.count == 1
    if alone and leaf.size <= _top_capacity(tx, inode) // 2:
        return _inline(plan, leaf)
    children = _leaf_nodes(tx, inode.ino, leaf, step.interior.key(step.at))
    return _put_children(plan, path, children)


def _with_children(step: Step, children: Interior) -> Interior:
    """The node of `step` with `children` (0, 1 or 2) in the place of the child that was taken."""
    new = step.interior.replace(step.at, children)
    if not children.count and step.at == 0 and new.count:
        return new.from_bound(step.interior.key(0))  # the next child takes over the range
    return new


def _put_children(plan: Plan, path: list[Step], children: Interior) -> Inode:
    """Replace the child at the end of `path` by `children`, and so on up to the top.

    The child's own block was replaced by the caller.
    """
    tx, inode = plan.tx, plan.inode
    for depth in range(len(path) - 1, 0, -1):
        interior = _with_children(path[depth], children)
        above = path[depth - 1]
        tx.space.replace(above.taken)
        level, bound = len(path) - depth, above.interior.key(above.at)
        children = _interior_nodes(tx, inode.ino, interior, level, bound)
    return _put_top(plan, _with_children(path[0], children), len(path))


def _interior_nodes(
    tx: Transaction, ino: int, interior: Interior, level: int, bound: int
) -> Interior:
    """The children that a node becomes: none, one or two."""
    if not interior.count:
        return NO_CHILDREN
    if interior.size <= tx.block_size - HEADER_SIZE:
        return interior_of([(bound, _interior_node(tx, ino, interior, level))])
    cut = interior.count // 2
    left, right = interior.part(0, cut), interior.part(cut, interior.count)
    return interior_of(
        [
            (bound, _interior_node(tx, ino, left, level)),
            (right.key(0), _interior_node(tx, ino, right, level)),
        ]
    )


def _interior_node(tx: Transaction, ino: int, interior: Interior, level: int) -> bytes:
    below = 1 + weight(interior.pointers)
    return tx.space.add_node(DIRNODE, level, ino, interior.count, interior.raw, below, interior)


def _put_top(plan: Plan, top: Interior, height: int) -> Inode:
    """Make `top` the payload: pushed down a level if it is too large, pulled up if it can be."""
    tx, inode = plan.tx, plan.inode
    if not top.count:
        return _inline(plan, EMPTY_LEAF)
    if top.size > _top_capacity(tx, inode):
        top, height = _interior_nodes(tx, inode.ino, top, height, 0), height + 1
    while height > 1 and top.count == 1:
        pointer = top.pointer(0)
        below = _interior_at(tx, pointer, height - 1, inode.ino)
        if below.size > _top_capacity(tx, inode):
            break
        tx.space.replace(pointer)
        # The lowest bound of a tree is 0, whatever was removed below it.
        top, height = below.from_bound(0), height - 1
    new = plan.finish(top.raw, fmt.DIRTREE, height)
    new.top = top
    return new
