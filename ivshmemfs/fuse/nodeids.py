"""Node numbers: the numbers by which the kernel knows inodes.

A node number equals the inode number, except for directories that another machine moved.

The kernel keeps one place in its tree of names for each directory.  After another machine moves a
directory, a look-up finds it in its new place.  The kernel then tries to move its own entry there.
It needs locks for that, and often holds them already, as inside rename(2).  Then it fails with
ESTALE, and a retry fails too.

So a directory that is found below another parent than before gets a new node number, never used
before.  To the kernel that is another directory, with nothing to move.  A process that has the old
one open, or as its current directory, goes on with the old number.  Both numbers lead to the same
inode.  stat(2) always shows the inode number, because the kernel asks for the attributes again.

States of a directory, changed by answers to the kernel and by its renames:

    unknown     the kernel has no number for it
    alone       the kernel used a number of its own (a file handle), or asked for the parent of such
                a directory.  It has no place for it yet, and takes the first one that is looked up
    placed      `found` returned a number for it, at (parent, name).  The parent is a node number
                too, because each node number of a parent is a tree of its own
    displaced   it moved, and the place in the kernel's tree is uncertain; it gets a new number at
                the next look-up

Older numbers of a directory stay valid until the kernel forgets them.

A file has at most one more number, its *passing* number.  A look-up returns it in one case only,
see `walks`: a thread that gets one number for two names may skip a rename.  The next look-up
returns the file's own number again.  `operations` refuses the first open by the passing number,
because the kernel keeps pages and locks by node number.
"""

from __future__ import annotations

from typing import NamedTuple

from ivshmemfs.errors import StaleHandle
from ivshmemfs.format.inode import MAX_INO

_NOWHERE, _ALONE = (0, b""), (-1, b"")
_ROOT = 1  # the node number of the root
_DEEPEST = 1000  # directories above one another; anything deeper is a cycle


class _Place(NamedTuple):
    node: int
    parent: int
    name: bytes


class NodeIds:
    """The node numbers of one mount and the places of directories in the kernel's tree."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}  # by inode: the number and place answered last
        self._names: dict[tuple[int, bytes], int] = {}  # by parent and name: the last inode
        self._told: dict[int, int] = {}  # by number: references that the kernel holds
        self._inodes: dict[int, int] = {}  # by number, if it is not the inode number
        self._passing: dict[int, int] = {}  # by inode: the passing number of a file
        self._last = MAX_INO

    def inode_of(self, node: int) -> int:
        """Return the inode number for a node number; raises StaleHandle."""
        if node <= MAX_INO:
            return node
        try:
            return self._inodes[node]
        except KeyError:
            raise StaleHandle(f"node {node} is unknown to this mount") from None

    def found(self, ino: int, parent: int, name: bytes, avoided: int = 0) -> int:
        """Return the number of directory `ino`, looked up as `name` below node `parent`.

        The result is never `avoided`.
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
        """Return the passing number of file `ino`."""
        node = self._passing.get(ino)
        if node is None:
            node = self._passing[ino] = self._new_number(ino)
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def of_file(self, ino: int) -> tuple[int, ...]:
        """The numbers by which the kernel may know file `ino`."""
        passing = self._passing.get(ino)
        return (ino,) if passing is None else (ino, passing)

    def found_by_handle(self, node: int, *, file: bool = False) -> int:
        """Count a reference to `node`, which the kernel took from a file handle; return it."""
        ino = self.inode_of(node)
        if file:
            if node != ino:
                self._told[node] = self._told.get(node, 0) + 1
            return node
        if ino not in self._places:
            self._place(ino, node, *_ALONE)
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def found_parent(self, ino: int) -> int:
        """Return the number of directory `ino`, looked up as the parent of another one."""
        place = self._places.get(ino)
        if place is None:
            node = ino if ino not in self._told else self._new_number(ino)
            self._place(ino, node, *_ALONE)
        else:
            node = place.node
        self._told[node] = self._told.get(node, 0) + 1
        return node

    def kept_at(self, ino: int, parent: int, name: bytes) -> int:
        """Return the number of directory `ino` if its place is there, and count it; else 0."""
        place = self._places.get(ino)
        if place is None or place[1:] != (parent, name):
            return 0
        self._told[place.node] = self._told.get(place.node, 0) + 1
        return place.node

    def steps_to(self, node: int) -> list[tuple[int, bytes]]:
        """Return the places (parent, name) from the root down to a directory; [] if unknown."""
        steps: list[tuple[int, bytes]] = []
        while node != _ROOT:
            place = self._places.get(self._inodes.get(node, node))
            if place is None or place.node != node or place.parent <= 0 or len(steps) > _DEEPEST:
                return []
            steps.append((place.parent, place.name))
            node = place.parent
        steps.reverse()
        return steps

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
        """Note that the kernel moved its entry `old`, a parent and a name, to `new`.

        The engine moved inode `ino`, and `exchanged` back to `old` (0: none).
        """
        there, here = self._names.get(old), self._names.get(new)
        self._follow(there, ino, new)
        if exchanged:
            self._follow(here, exchanged, old)
        elif here is not None and here != ino:
            self._displace(here)

    def _follow(self, believed: int | None, ino: int, to: tuple[int, bytes]) -> None:
        """Note that the kernel moved `believed` to `to`, and the engine moved `ino`."""
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
        """Drop `times` references to `node`; return whether the kernel can no longer name it."""
        left = self._told.get(node)
        if left is None:
            return True  # a file's own number, whose references are not counted
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
