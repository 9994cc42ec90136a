"""Directories: names, the keys that order them, and the inodes that they lead to.

A name's key is its hash and 8 bits that tell apart names of equal hash (see format/dirent.py).  An
entry keeps its key for life.  So a reader that goes by keys sees every entry that exists throughout
exactly once, even when leaves split and merge meanwhile.

The entries are in a B+tree, which `btree` reads and changes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from ivshmemfs import native
from ivshmemfs.engine import btree
from ivshmemfs.engine.btree import Edit, Step
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Corrupt, FsError
from ivshmemfs.format import inode as fmt
from ivshmemfs.format.dirent import (
    COLLISIONS,
    INO_MASK,
    LAST_KEY,
    NAME_MAX,
    TYPE_SHIFT,
    Leaf,
    name_key,
)

# The compiler looks an imported function up at each call, but not a constant.
_is_name: Final = native.is_name
_name_key: Final = name_key
LISTED: Final = 128  # entries that one call of `leaf_after` returns at most


class Dirent:
    """One name in a directory; `kind` is the file type bits of its mode, shifted right by 12."""

    __slots__ = ("ino", "key", "kind", "name")

    def __init__(self, key: int, ino_and_type: int, name: bytes) -> None:
        self.key: Final = key
        self.ino: Final = ino_and_type & INO_MASK
        self.kind: Final = ino_and_type >> TYPE_SHIFT
        self.name: Final = name


class LeafPosition:
    """Where a name is in a directory, or its insertion point; valid until the directory changes.

    `at` is its index in `leaf`, or -1 when the name is not there.  `base` is the lowest key that
    the name may have.
    """

    __slots__ = ("at", "base", "leaf", "name", "path")

    def __init__(self, name: bytes, base: int, path: list[Step], leaf: Leaf) -> None:
        self.name: Final = name
        self.base: Final = base
        self.path: Final = path
        self.leaf: Final = leaf
        self.at: Final = leaf.find(base, name)

    @property
    def ino(self) -> int:
        """The number of the inode that the name leads to; -1 when the name is not there."""
        return self.leaf.ino(self.at) & INO_MASK if self.at >= 0 else -1

    @property
    def entry(self) -> Dirent | None:
        """The entry, or None when the name is not there."""
        at = self.at
        return Dirent(self.leaf.key(at), self.leaf.ino(at), self.name) if at >= 0 else None


def check_name(name: bytes) -> None:
    """Raise ENAMETOOLONG for more than NAME_MAX bytes, EINVAL for another invalid name."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    if not _is_name(name):
        raise FsError(errno.EINVAL)


# --- reading --------------------------------------------------------------------------------


def locate(view: View, inode: Inode, name: bytes) -> LeafPosition:
    """Return the position of `name`, present or not."""
    key = _name_key(name, view.secret)
    path, leaf = btree.path_to(view, inode, key)
    return LeafPosition(name, key, path, leaf)


def find(view: View, inode: Inode, name: bytes) -> Dirent | None:
    """Return the entry called `name`, or None."""
    return locate(view, inode, name).entry


def leaf_after(view: View, inode: Inode, key: int) -> list[Dirent]:
    """Return entries of one leaf with keys above `key`: LISTED at most, none at the end.

    No leaf of a tree is empty, and its keys are within its bounds.  So the first or the second
    leaf has an entry to return; raises Corrupt when neither has.
    """
    if key >= LAST_KEY:
        return []
    if inode.record.payload != fmt.DIRTREE:
        return _entries_after(btree.inline_leaf(inode), key)
    path, leaf = btree.descend(view, inode, key)
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
    found = _entries_after(btree.descend(view, inode, key)[1], key - 1)
    if not found:
        raise Corrupt(f"directory {inode.ino}: no name follows the bound {key:#x}")
    return found


def entries_at(view: View, inode: Inode, pointer: bytes) -> list[Dirent]:
    """Return all entries of the leaf at `pointer`, or of the one in the inode; raises Corrupt."""
    leaf, found = btree.leaf_at(view, inode, pointer), list[Dirent]()
    while len(found) < leaf.count:
        found += _entries_after(leaf, found[-1].key if found else -1)
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
    """Yield all entries by ascending key."""
    key = 0
    while found := leaf_after(view, inode, key):
        yield from found
        key = found[-1].key


# --- changing: `links` is as in `btree.Edit` ---------------------------------------------------


def insert(
    tx: Transaction,
    inode: Inode,
    position: LeafPosition,
    ino: int,
    kind: int,
    links: int | None = None,
) -> Inode:
    """Return the directory with a new entry.

    The caller has checked the name (`check_name`) and has seen that it is not there.  Raises
    NoSpace.
    """
    edit = Edit(tx, inode, links, 1)
    return btree.store_leaf(edit, position.path, _entered(position, ino, kind))


def _entered(position: LeafPosition, ino: int, kind: int) -> Leaf:
    """Return the leaf whose entry at `position`, old or new, leads to an inode; raises NoSpace."""
    target = ino | kind << TYPE_SHIFT
    if position.at >= 0:
        return position.leaf.replace(position.at, target)
    return position.leaf.insert(position.base, target, position.name)


def remove(
    tx: Transaction, inode: Inode, position: LeafPosition, links: int | None = None
) -> Inode:
    """Return the directory without the entry at `position`; raises ENOENT, NoSpace."""
    edit = Edit(tx, inode, links, -1)
    leaf = position.leaf.remove(_present(position))
    return btree.store_smaller_leaf(edit, position.path, leaf)


def replace(
    tx: Transaction,
    inode: Inode,
    position: LeafPosition,
    ino: int,
    kind: int,
    links: int | None = None,
) -> Inode:
    """Return the directory whose entry at `position` leads to inode `ino`.

    Raises ENOENT, NoSpace.
    """
    edit = Edit(tx, inode, links, 0)
    leaf = position.leaf.replace(_present(position), ino | kind << TYPE_SHIFT)
    return btree.store_leaf(edit, position.path, leaf)


def move(
    tx: Transaction, inode: Inode, old: LeafPosition, new: LeafPosition, ino: int, kind: int
) -> Inode:
    """Return the directory whose entry at `old` is at `new` instead, over the entry there.

    The entry leads to inode `ino`.  Both positions are those in `inode`.  Raises ENOENT, NoSpace.
    """
    edit, at = Edit(tx, inode, 0, 0 if new.at < 0 else -1), _present(old)
    if btree.is_same_leaf(old.path, new.path):
        return btree.store_smaller_leaf(edit, old.path, _moved(old.leaf, at, new, ino, kind))
    left, right = old.leaf.remove(at), _entered(new, ino, kind)
    both = btree.store_leaves(edit, old.path, left, new.path, right)
    if both is not None:
        return both
    less = btree.store_smaller_leaf(Edit(tx, inode, 0, -1), old.path, left)
    place = locate(tx, less, new.name)
    enter = insert if new.at < 0 else replace
    return enter(tx, less, place, ino, kind, 0)


def _moved(leaf: Leaf, at: int, new: LeafPosition, ino: int, kind: int) -> Leaf:
    """Return the leaf whose entry `at` is at `new` instead, over the entry there."""
    target = ino | kind << TYPE_SHIFT
    if new.at < 0:
        return leaf.move(at, new.base, target, new.name)
    return leaf.replace(new.at, target).remove(at)


def _present(position: LeafPosition) -> int:
    if position.at < 0:
        raise FsError(errno.ENOENT)
    return position.at
