"""The numbers by which the kernel knows inodes: the inode's own, but for directories that moved.

The kernel keeps one place in its tree of names for each directory.  When another machine moves a
directory, a look-up finds it in a new place while the old one still stands, and the kernel tries
to move its own entry.  For that it needs locks which it often holds already, as inside
rename(2); then it fails with ESTALE, and trying again changes nothing.

So a directory that is found below another parent than before gets a new number: its inode number
with a count in the upper bits.  To the kernel that is another directory, with nothing to move.
Whoever has the old one open, or stands in it, goes on with the old number, which leads to the
same inode.  stat(2) shows the plain inode number in any case, because the attributes are always
asked for once more.
"""

from __future__ import annotations

from ivshmemfs.format.inode import MAX_INO

_SHIFT = MAX_INO.bit_length()
_COUNTS = 127  # counts in the upper bits, which leave the sign alone


def inode_of(node: int) -> int:
    """The inode that a number from the kernel means."""
    return node & MAX_INO


class Nodes:
    """Where the kernel knows which directories, until it forgets them."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def found(self, ino: int, parent: int) -> int:
        """The number of directory `ino`, which was looked up below `parent`."""
        if self._parents.setdefault(ino, parent) != parent:
            self._parents[ino] = parent
            self._counts[ino] = self._counts.get(ino, 0) % _COUNTS + 1
        count = self._counts.get(ino)
        return ino | count << _SHIFT if count else ino

    def moved(self, ino: int, parent: int) -> None:
        """The kernel itself moved directory `ino`, so that its tree agrees."""
        if ino in self._parents:
            self._parents[ino] = parent

    def forget(self, node: int) -> bool:
        """The kernel knows a number no more; whether that was the latest one of its inode."""
        ino = node & MAX_INO
        if self._counts.get(ino, 0) != node >> _SHIFT:
            return False
        self._parents.pop(ino, None)
        self._counts.pop(ino, None)
        return True
