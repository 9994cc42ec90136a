"""Open inodes of one mount: how many handles each has, and their listing in the open filter.

    CLOSED      the mount has no handle of the inode
    HELD        `hold` counted a handle and listed the inode in the open filter of the own slot
    OPEN        `confirm` found the inode after that: no peer frees it until it is unlisted
    CLOSED      `let_go` took the last handle off the count, and the inode off the list

Open lists before it checks, and a free announces before it checks (`in_use`), so one of the two
always sees the other.

A new inode must be listed before the commit that makes it visible.  A plan that loses the race for
the commit chooses another inode number.  So `hold_new` takes back what the previous plan listed.
"""

from __future__ import annotations

from typing import Final

from ivshmemfs.engine.volume import Volume
from ivshmemfs.errors import Fenced
from ivshmemfs.shm.membership import Membership


class OpenFiles:
    """The handles of one mount, by inode."""

    def __init__(self, volume: Volume) -> None:
        self._volume: Final = volume
        self.counts: Final[dict[int, int]] = {}  # handles by inode
        self.nameless: Final[set[int]] = set()  # open inodes that were made without a name
        self._new = 0  # the inode that the present plan makes and opens; 0: none

    def hold(self, ino: int) -> None:
        """Count one more handle of `ino` and list it in the open filter."""
        self.counts[ino] = self.counts.get(ino, 0) + 1
        member = self._volume.member
        if member is not None:
            try:
                member.list_open(ino)
            except Fenced:
                try:
                    self._volume.rejoin(member)
                except BaseException:
                    self.let_go(ino)
                    raise

    def confirm(self, ino: int) -> None:
        """Raise StaleHandle if a peer that did not see `hold` has freed `ino`."""
        member = self._volume.member
        if member is not None and member.intended_elsewhere(ino):
            self._volume.store.commit_word.fence()
        self._volume.look(lambda view: view.inode(ino))

    def let_go(self, ino: int) -> bool:
        """Count one handle less; whether it was the last one of this mount."""
        left = self.counts.get(ino, 0) - 1
        if left > 0:
            self.counts[ino] = left
        else:
            self.counts.pop(ino, None)
        member = self._volume.member
        if member is not None:
            member.unlist_open(ino)
        return left <= 0

    def let_all_go(self, member: Membership) -> None:
        """Drop all handles: the mount ends."""
        for ino in list(self.counts):
            for _ in range(self.counts.pop(ino)):
                member.unlist_open(ino)

    def in_use(self, ino: int) -> bool:
        """Whether a peer holds `ino` open; if not, it announces that this peer frees it."""
        if ino in self.counts:
            return True
        member = self._volume.joined()
        member.intend(ino)
        return member.listed_elsewhere(ino)

    def hold_new(self, ino: int) -> None:
        """Hold an inode that a plan makes, in place of that of the plan before it."""
        self.drop_new(0)
        self.hold(ino)
        self._new = ino

    def drop_new(self, kept: int) -> None:
        """End the making of an inode; let it go unless it is `kept`, which was committed."""
        if self._new and self._new != kept:
            self.let_go(self._new)
        self._new = 0
