"""The numbers by which the kernel knows inodes: the inode's own, but for what others moved.

The kernel keeps one place in its tree of names for each directory.  When another machine moves a
directory, a look-up finds it in a new place while the old one still stands, and the kernel tries
to move its own entry.  For that it needs locks which it often holds already, as inside
rename(2); then it fails with ESTALE, and trying again changes nothing.

So a directory that is found below another parent than before gets a new number, never used before.
To the kernel that is another directory, with nothing to move.  Whoever has the old one open, or
stands in it, goes on with the old number, which leads to the same inode.  stat(2) shows the plain
inode number in any case, because the attributes are always asked for once more.

States of a directory, changed by what the kernel is told and by what it does:

    unknown     the kernel has no number for it
    alone       the kernel came with a number of its own (a file handle), or asked for the parent
                of such a directory: it has no place for it yet, and takes the first one named
    placed      `found` told the kernel a number for it, at (parent, name); parents are numbers too,
                because each number of a parent is a tree of its own
    displaced   it moved, but what the kernel made of that is uncertain: next time, a new number

Older numbers of a directory stay good until the kernel forgets them.

A file has one more number at most, its *passing* one.  It is told in one case only, see `walks`: a
thread that is told the file's own number for two names might take a rename for done.  The next
look-up leads to the file's own number again, and `operations` lets nobody open the passing one at
first, because pages and locks follow what the kernel takes for an inode.
"""

from __future__ import annotations

from typing import NamedTuple

from ivshmemfs.errors import StaleHandle
from ivshmemfs.format.inode import MAX_INO

_NOWHERE, _ALONE = (0, b""), (-1, b"")


class _Place(NamedTuple):
    node: int
    parent: int
    name: bytes


class NodeIds:
    """Where the kernel knows which directories, by which numbers, until it forgets them."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}  # by inode: the number told last
        self._names: dict[tuple[int, bytes], int] = {}  # the inode told last, by parent and name
        self._told: dict[int, int] = {}  # by number: how often it was told, less what was forgotten
        self._inodes: dict[int, int] = {}  # by number, of those that are not the inode's own
        self._passing: dict[int, int] = {}  # by inode: the other number of a file
        self._last = MAX_INO

    def inode_of(self, node: int) -> int:
        """The inode that a number from the kernel means; raises StaleHandle."""
        if node <= MAX_INO:
            return node
        try:
            return self._inodes[node]
        except KeyError:
            raise StaleHandle("the kernel was never told of this number") from None

    def found(self, ino: int, parent: int, name: bytes, avoided: int = 0) -> int:
        """The number of directory `ino`, looked up as `name` below the number `parent`.

        It is not `avoided`.
        """
        place = self._places.get(ino)
        if place is not None and place.parent in (parent, _ALONE[0]) and place.node != avoided:
            node = place.node
            if place[1:] != (parent, name):
                self._place(ino, node, parent, name)
        else:
            fresh = place is None and ino not in self._told and ino != avoided
            node = ino if fresh else self._new_number(ino)
            self._place(ino, node, parent, name)
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def passing(self, ino: int) -> int:
        """The number of file `ino` that is not its own."""
        node = self._passing.get(ino)
        if node is None:
            node = self._passing[ino] = self._new_number(ino)
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def of_file(self, ino: int) -> tuple[int, ...]:
        """The numbers by which the kernel may know file `ino`."""
        passing = self._passing.get(ino)
        return (ino,) if passing is None else (ino, passing)

    def named(self, node: int, *, file: bool = False) -> int:
        """The number itself, by which the kernel asks for something: from a file handle."""
        ino = self.inode_of(node)
        if file:
            if node != ino:
                self._told[node] = self._told.get(node, 0) + 1
            return node
        if ino not in self._places:
            self._place(ino, node, *_ALONE)
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def above(self, ino: int) -> int:
        """The number of directory `ino`, which was looked up as the parent of another one."""
        place = self._places.get(ino)
        if place is None:
            node = ino if ino not in self._told else self._new_number(ino)
            self._place(ino, node, *_ALONE)
        else:
            node = place.node
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def _new_number(self, ino: int) -> int:
        self._last += 1
        self._inodes[self._last] = ino
        return self._last

    def _place(self, ino: int, node: int, parent: int, name: bytes) -> None:
        self._leave(ino)
        self._places[ino] = _Place(node, parent, name)
        if parent > 0:
            self._names[parent, name] = ino

    def _leave(self, ino: int) -> None:
        place = self._places.pop(ino, None)
        if place is not None and self._names.get(place[1:]) == ino:
            del self._names[place[1:]]

    def moved(
        self, old: tuple[int, bytes], new: tuple[int, bytes], ino: int, exchanged: int = 0
    ) -> None:
        """The kernel moved what it knows as `old`, a parent and a name; really it was `ino`.

        `exchanged` is what really came back to `old`, 0 for nothing.
        """
        there, here = self._names.get(old), self._names.get(new)
        self._follow(there, ino, new)
        if exchanged:
            self._follow(here, exchanged, old)
        elif here is not None and here != ino:
            self._displace(here)

    def _follow(self, believed: int | None, ino: int, to: tuple[int, bytes]) -> None:
        """The kernel moved `believed` to `to`, while `ino` went there."""
        if believed == ino:
            self._place(ino, self._places[ino].node, *to)
            return
        for uncertain in (believed, ino):
            if uncertain is not None:
                self._displace(uncertain)

    def _displace(self, ino: int) -> None:
        if ino in self._places:
            self._place(ino, self._places[ino].node, *_NOWHERE)

    def forget(self, node: int, times: int) -> bool:
        """The kernel forgets what it was told `times` times; whether it may not name it again."""
        left = self._told.get(node)
        if left is None:
            return True  # the own number of a file
        if left > times:
            self._told[node] = left - times
            return False
        del self._told[node]
        ino = self._inodes.pop(node, node)
        if self._passing.get(ino) == node:
            del self._passing[ino]
            return False
        if ino not in self._places or self._places[ino].node != node:
            return False
        self._leave(ino)
        return True
