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
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import SIZE, Reader, Writer, weight
from ivshmemfs.errors import Corrupt, FsError, NoSpace
from ivshmemfs.format import inode as fmt
from ivshmemfs.format.dirent import (
    COLLISIONS,
    EMPTY_LEAF,
    ENTRY_FIXED,
    INO_MASK,
    NAME_MAX,
    TYPE_SHIFT,
    Interior,
    Leaf,
    decode_interior,
    decode_leaf,
    name_key,
)
from ivshmemfs.format.node import DIRLEAF, DIRNODE, HEADER_SIZE


class Entry(NamedTuple):
    """One name in a directory; `kind` is the file type bits of its mode, shifted right by 12."""

    key: int
    ino: int
    kind: int
    name: bytes


class DirReader(Reader, Protocol):
    """A reader that also knows the key that names are hashed with."""

    secret: bytes


class DirWriter(Writer, Protocol):
    """A transaction that also knows sizes."""

    secret: bytes
    block_size: int


NOTHING: dict[str, int] = {}


class Step(NamedTuple):
    """One interior node on the way down: its columns and which child was taken."""

    interior: Interior
    at: int


def check_name(name: bytes) -> None:
    """Raise ENAMETOOLONG, or EINVAL for what cannot be a name."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)


# --- reading --------------------------------------------------------------------------------


def _inline_leaf(inode: Inode) -> Leaf:
    if inode.leaf is None:
        if inode.record.payload == fmt.EMPTY:
            inode.leaf = EMPTY_LEAF
        else:
            try:
                inode.leaf = decode_leaf(inode.data, inode.record.entries)
            except ValueError as error:
                raise Corrupt(f"directory {inode.ino}: {error}") from None
    return inode.leaf


def _top(inode: Inode) -> Interior:
    if inode.top is None:
        try:
            inode.top = decode_interior(inode.data, len(inode.data) // (8 + SIZE))
        except ValueError as error:
            raise Corrupt(f"directory {inode.ino}: {error}") from None
    return inode.top


def _child_node(reader: Reader, pointer: bytes, level: int, owner: int) -> Interior | Leaf:
    kind = DIRNODE if level else DIRLEAF
    node = reader.pointed(pointer, kind, level, owner)
    if node.parsed is None:
        try:
            decode = decode_interior if level else decode_leaf
            node.parsed = decode(node.data[HEADER_SIZE:], node.count)
        except ValueError as error:
            raise Corrupt(f"directory {owner}, block {node.block}: {error}") from None
    parsed: Interior | Leaf = node.parsed
    return parsed


def _pick(interior: Interior, key: int) -> int:
    return max(bisect_right(interior.keys, key) - 1, 0)


def _pointer(interior: Interior, at: int) -> bytes:
    return interior.pointers[at * SIZE : at * SIZE + SIZE]


def _descend(reader: Reader, inode: Inode, key: int) -> tuple[list[Step], Leaf]:
    """The way from the top of a DIRTREE to the leaf whose range holds `key`."""
    interior, level, path = _top(inode), inode.record.height, []
    while True:
        at = _pick(interior, key)
        path.append(Step(interior, at))
        level -= 1
        below = _child_node(reader, _pointer(interior, at), level, inode.ino)
        if isinstance(below, Leaf):
            return path, below
        interior = below


def _leaf_for(reader: Reader, inode: Inode, key: int) -> Leaf:
    if inode.record.payload != fmt.DIRTREE:
        return _inline_leaf(inode)
    interior, level = _top(inode), inode.record.height
    while True:
        level -= 1
        below = _child_node(reader, _pointer(interior, _pick(interior, key)), level, inode.ino)
        if isinstance(below, Leaf):
            return below
        interior = below


def _entry(leaf: Leaf, at: int) -> Entry:
    both = leaf.inos[at]
    return Entry(leaf.keys[at], both & INO_MASK, both >> TYPE_SHIFT, leaf.name(at))


def find(reader: DirReader, inode: Inode, name: bytes) -> Entry | None:
    """The entry called `name`, or None."""
    key = name_key(name, reader.secret)
    leaf = _leaf_for(reader, inode, key)
    at = leaf.find(key, name)
    if at < 0:
        return None
    both = leaf.inos[at]
    return Entry(leaf.keys[at], both & INO_MASK, both >> TYPE_SHIFT, name)


def leaf_after(reader: Reader, inode: Inode, key: int) -> list[Entry]:
    """Entries with keys above `key`, those of one leaf; empty at the end of the directory."""
    if inode.record.payload != fmt.DIRTREE:
        return _entries_after(_inline_leaf(inode), key)
    while True:
        path, leaf = _descend(reader, inode, key)
        found = _entries_after(leaf, key)
        if found:
            return found
        bounds = [s.interior.keys[s.at + 1] for s in path if s.at + 1 < len(s.interior.keys)]
        further = [bound for bound in bounds if bound > key]
        if not further:
            return []
        key = min(further)
        if key % COLLISIONS:
            raise Corrupt(f"directory {inode.ino}: a bound divides names of one hash")
        # A bound is the lowest key of its leaf, and "after" is exclusive.
        first = _entries_after(_descend(reader, inode, key)[1], key - 1)
        if first:
            return first


def _entries_after(leaf: Leaf, key: int) -> list[Entry]:
    return [_entry(leaf, at) for at in range(bisect_right(leaf.keys, key), len(leaf.keys))]


def entries(reader: Reader, inode: Inode) -> Iterator[Entry]:
    """All entries in the order of their keys."""
    key = 0
    while found := leaf_after(reader, inode, key):
        yield from found
        key = found[-1].key


# --- changing -------------------------------------------------------------------------------


class Plan(NamedTuple):
    """One change of one directory under way."""

    tx: DirWriter
    inode: Inode
    before: int  # the transaction's balance when it began
    fields: dict[str, Any]  # of the inode's record, as they shall become

    def finish(self, data: bytes, kind: int, height: int) -> Inode:
        """The directory with this payload, its blocks accounted for."""
        blocks = self.inode.record.blocks + self.tx.space.balance - self.before
        return self.inode.evolve(
            data=data, payload=kind, height=height, blocks=blocks, **self.fields
        )


def insert(
    tx: DirWriter,
    inode: Inode,
    name: bytes,
    ino: int,
    kind: int,
    changes: dict[str, int] = NOTHING,
) -> Inode:
    """The directory with one entry more, and other `changes` of its record.

    The caller made sure that `name` is not in it.
    """
    check_name(name)
    plan = Plan(tx, inode, tx.space.balance, {**changes, "entries": inode.record.entries + 1})
    base = name_key(name, tx.secret)
    path, leaf = _way(tx, inode, base)
    leaf = leaf.insert(_free_key(leaf, base), ino | kind << TYPE_SHIFT, name)
    return _put_leaf(plan, path, leaf)


def remove(tx: DirWriter, inode: Inode, name: bytes, changes: dict[str, int] = NOTHING) -> Inode:
    """The directory without `name`; raises ENOENT."""
    plan = Plan(tx, inode, tx.space.balance, {**changes, "entries": inode.record.entries - 1})
    path, leaf, at = _locate(tx, inode, name)
    leaf = leaf.remove(at)
    if path and not leaf.keys:
        tx.space.replace(_taken(path[-1]))
        return _put_children(plan, path, [])
    if path and leaf.size < _leaf_capacity(tx) // 4:
        return _merge(plan, path, leaf)
    return _put_leaf(plan, path, leaf)


def replace(tx: DirWriter, inode: Inode, name: bytes, ino: int, kind: int) -> Inode:
    """The directory in which `name` leads to another inode; raises ENOENT."""
    plan = Plan(tx, inode, tx.space.balance, {})
    path, leaf, at = _locate(tx, inode, name)
    return _put_leaf(plan, path, leaf.replace(at, ino | kind << TYPE_SHIFT))


def _way(tx: DirWriter, inode: Inode, key: int) -> tuple[list[Step], Leaf]:
    if inode.record.payload == fmt.DIRTREE:
        return _descend(tx, inode, key)
    return [], _inline_leaf(inode)


def _locate(tx: DirWriter, inode: Inode, name: bytes) -> tuple[list[Step], Leaf, int]:
    key = name_key(name, tx.secret)
    path, leaf = _way(tx, inode, key)
    at = leaf.find(key, name)
    if at < 0:
        raise FsError(errno.ENOENT)
    return path, leaf, at


def _free_key(leaf: Leaf, base: int) -> int:
    at = bisect_left(leaf.keys, base)
    key = base
    while at < len(leaf.keys) and leaf.keys[at] == key:
        at, key = at + 1, key + 1
    if key >= base + COLLISIONS:
        raise NoSpace("the directory holds too many names of the same hash")
    return key


def _leaf_capacity(tx: DirWriter) -> int:
    return tx.block_size - HEADER_SIZE


def _top_capacity(tx: DirWriter, inode: Inode) -> int:
    return fmt.payload_capacity(tx.block_size) - len(inode.xattr)


def _taken(step: Step) -> bytes:
    """The pointer that was followed."""
    return _pointer(step.interior, step.at)


def _inline(plan: Plan, leaf: Leaf) -> Inode:
    kind = fmt.DIRLEAF if leaf.keys else fmt.EMPTY
    new = plan.finish(leaf.encode(), kind, 0)
    new.leaf = leaf
    return new


def _put_leaf(plan: Plan, path: list[Step], leaf: Leaf) -> Inode:
    """Store a changed leaf at the end of `path`, splitting and converting as its size demands."""
    tx, inode = plan.tx, plan.inode
    if not path:
        if leaf.size <= _top_capacity(tx, inode):
            return _inline(plan, leaf)
        pairs = _leaf_nodes(tx, inode.ino, leaf, 0)
        return _put_top(plan, _join_pairs(pairs), 1)
    tx.space.replace(_taken(path[-1]))
    return _put_in_place(plan, path, leaf)


def _leaf_nodes(tx: DirWriter, ino: int, leaf: Leaf, bound: int) -> list[tuple[int, bytes]]:
    """(lower bound, pointer) of the one or two nodes that `leaf` becomes."""
    if leaf.size <= _leaf_capacity(tx):
        return [(bound, _leaf_node(tx, ino, leaf))]
    cut = _split_point(leaf, _leaf_capacity(tx))
    left, right = leaf.part(0, cut), leaf.part(cut, len(leaf.keys))
    return [
        (bound, _leaf_node(tx, ino, left)),
        (leaf.keys[cut] & ~(COLLISIONS - 1), _leaf_node(tx, ino, right)),
    ]


def _leaf_node(tx: DirWriter, ino: int, leaf: Leaf) -> bytes:
    return tx.space.add_node(DIRLEAF, 0, ino, len(leaf.keys), leaf.encode(), parsed=leaf)


def _split_point(leaf: Leaf, capacity: int) -> int:
    """Index between two hashes that divides `leaf` best; both halves must fit a node."""
    best, best_off, size = 0, leaf.size, 0
    for at in range(1, len(leaf.keys)):
        size += ENTRY_FIXED + leaf.sizes[at - 1]
        off = abs(2 * size - leaf.size)
        if off < best_off and leaf.keys[at] >> 8 != leaf.keys[at - 1] >> 8:
            best, best_off, best_size = at, off, size
    if not best or best_size > capacity or leaf.size - best_size > capacity:
        raise NoSpace("the directory holds too many names of the same hash")
    return best


def _merge(plan: Plan, path: list[Step], leaf: Leaf) -> Inode:
    """Store a small leaf, together with a neighbour under the same parent if both fit one node."""
    tx, inode = plan.tx, plan.inode
    interior, at = path[-1]
    for other_at in (at + 1, at - 1):
        if not 0 <= other_at < len(interior.keys):
            continue
        pointer = _pointer(interior, other_at)
        other = _child_node(tx, pointer, 0, inode.ino)
        assert isinstance(other, Leaf)
        if other.size + leaf.size > _leaf_capacity(tx) * 3 // 4:
            continue
        low = min(at, other_at)
        both = leaf.join(other) if other_at > at else other.join(leaf)
        tx.space.replace(_pointer(interior, low))
        tx.space.replace(_pointer(interior, low + 1))
        shrunk = Interior(
            interior.keys[: low + 1] + interior.keys[low + 2 :],
            interior.pointers[: (low + 1) * SIZE] + interior.pointers[(low + 2) * SIZE :],
        )
        return _put_in_place(plan, [*path[:-1], Step(shrunk, low)], both)
    return _put_leaf(plan, path, leaf)


def _put_in_place(plan: Plan, path: list[Step], leaf: Leaf) -> Inode:
    """Store a leaf whose place at the end of `path` is free."""
    tx, inode = plan.tx, plan.inode
    step = path[-1]
    alone = len(path) == 1 and len(step.interior.keys) == 1
    if alone and leaf.size <= _top_capacity(tx, inode) // 2:
        return _inline(plan, leaf)
    pairs = _leaf_nodes(tx, inode.ino, leaf, step.interior.keys[step.at])
    return _put_children(plan, path, pairs)


def _join_pairs(pairs: list[tuple[int, bytes]]) -> Interior:
    keys = array("Q", [key for key, _ in pairs])
    return Interior(keys, b"".join([pointer for _, pointer in pairs]))


def _without_or_with(step: Step, pairs: list[tuple[int, bytes]]) -> Interior:
    """The node of `step` in which the child that was taken is replaced by `pairs` (0, 1 or 2)."""
    (keys, pointers), at = step
    new = _join_pairs(pairs)
    after = keys[at + 1 :]
    if not pairs and at == 0 and after:
        after[0] = keys[0]  # the next child takes over the range
    return Interior(
        keys[:at] + new.keys + after,
        pointers[: at * SIZE] + new.pointers + pointers[(at + 1) * SIZE :],
    )


def _put_children(plan: Plan, path: list[Step], pairs: list[tuple[int, bytes]]) -> Inode:
    """Replace the child at the end of `path` by `pairs`, and so on up to the top.

    The child's own block was replaced by the caller.
    """
    tx, inode = plan.tx, plan.inode
    for depth in range(len(path) - 1, 0, -1):
        interior = _without_or_with(path[depth], pairs)
        above = path[depth - 1]
        tx.space.replace(_taken(above))
        level = len(path) - depth
        pairs = _interior_nodes(tx, inode.ino, interior, level, above.interior.keys[above.at])
    top = _without_or_with(path[0], pairs)
    return _put_top(plan, top, len(path))


def _interior_nodes(
    tx: DirWriter, ino: int, interior: Interior, level: int, bound: int
) -> list[tuple[int, bytes]]:
    if not interior.keys:
        return []
    if interior.size <= tx.block_size - HEADER_SIZE:
        return [(bound, _interior_node(tx, ino, interior, level))]
    cut = len(interior.keys) // 2
    left = Interior(interior.keys[:cut], interior.pointers[: cut * SIZE])
    right = Interior(interior.keys[cut:], interior.pointers[cut * SIZE :])
    return [
        (bound, _interior_node(tx, ino, left, level)),
        (right.keys[0], _interior_node(tx, ino, right, level)),
    ]


def _interior_node(tx: DirWriter, ino: int, interior: Interior, level: int) -> bytes:
    return tx.space.add_node(
        DIRNODE, level, ino, len(interior.keys), interior.encode(),
        weight=1 + weight(interior.pointers), parsed=interior,
    )  # fmt: skip


def _put_top(plan: Plan, top: Interior, height: int) -> Inode:
    """Make `top` the payload: pushed down a level if it is too large, pulled up if it can be."""
    tx, inode = plan.tx, plan.inode
    if not top.keys:
        return _inline(plan, EMPTY_LEAF)
    if top.size > _top_capacity(tx, inode):
        pairs = _interior_nodes(tx, inode.ino, top, height, 0)
        top, height = _join_pairs(pairs), height + 1
    while height > 1 and len(top.keys) == 1:
        pointer = _pointer(top, 0)
        below = _child_node(tx, pointer, height - 1, inode.ino)
        assert isinstance(below, Interior)
        if below.size > _top_capacity(tx, inode):
            break
        tx.space.replace(pointer)
        # The lowest bound of a tree is 0, whatever was removed below it.
        top, height = Interior(array("Q", [0]) + below.keys[1:], below.pointers), height - 1
    new = plan.finish(top.encode(), fmt.DIRTREE, height)
    new.top = top
    return new
