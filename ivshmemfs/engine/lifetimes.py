"""What a caller may still name after it is gone: ghosts, remembered folders, pins.

Callers look a name up first and name the inode in a second call.  Between the two calls any peer
may remove it.  Two things bridge that time:

* *Ghosts* keep the attributes of removed inodes, without links, until the caller forgets them.
  Examples: a process's working directory, an open fifo, a path that a process holds.
* *Pins* list looked-up files as open for PINNED seconds, or until the caller opens them.  They are
  made only for CAREFUL seconds after a file vanished under a caller (ESTALE).  The kernel then
  walks the path again, and the second walk cannot fail in the same way.

Calls on behalf of no caller (`unattended`) make and need no pins.

The states of an inode other than a regular file:

    unknown      no look-up of this mount has found it
    remembered   `seen` keeps its attributes, because no request says that a process entered it
    ghost        it is gone; this mount removed it (`remember`), or named it later (`ghost`)
    forgotten    the caller forgot it (`forget`), or GHOSTS or FOLDERS newer ones came

A regular file becomes a ghost only when this mount removes it.

The states of a pin:

    pinned       `_secure` listed the inode as open
    expired      its time is over, or newer pins exceed PINS or the share of free blocks
    let go       `unpin` closed it, UNPINNED_AT_ONCE at most per call.  Or `opened` did, because a
                 handle holds the file now.  Or `make_way` did, with all others
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.openfiles import OpenFiles
from ivshmemfs.engine.orphans import Orphans
from ivshmemfs.engine.volume import ATTEMPTS, DAMAGE, Volume
from ivshmemfs.errors import Busy, StaleHandle

# Tests set these three, so they are not Final: the compiler would inline them.
CAREFUL = 5.0  # seconds of careful look-ups after something vanished under a caller
GHOSTS = 4096  # maximum of removed inodes that are kept
FOLDERS = 4096  # maximum of directories, fifos and the like that are remembered

PINNED: Final = 3.0  # seconds that a careful look-up lists a file as open
UNPINNED_AT_ONCE: Final = 8  # pins that one call lets go; each may free a file, in its own commit
PINS: Final = 64  # maximum; the open filter is lossy, so each pin may delay freeing other inodes
PINNED_SHARE: Final = 8  # pins keep at most 1 / PINNED_SHARE of the free blocks from being freed


class Lifetimes:
    """The inodes that one mount keeps, or keeps in mind, between two calls."""

    def __init__(self, volume: Volume, openfiles: OpenFiles, orphans: Orphans) -> None:
        self._volume: Final = volume
        self._openfiles: Final = openfiles
        self._orphans: Final = orphans
        # The inode before its removal, and its ctime since; by number, in the order of removal.
        self._ghosts: Final[OrderedDict[int, tuple[Inode, int]]] = OrderedDict()
        self._folders: Final[dict[int, Inode]] = {}  # in the order of their last look-up
        # The end of the pin's time and the inode's blocks; by number, in the order of pinning.
        self.pins: Final[dict[int, tuple[float, int]]] = {}
        self._shared: Final[set[int]] = set()  # pins of several look-ups, for several callers
        self._pinned_blocks = 0
        self.careful_until = 0.0  # 0.0: look-ups pin nothing
        self.unattended = False  # whether the present call has no caller

    # --- ghosts -------------------------------------------------------------------------------

    def vanished(self, stale: StaleHandle) -> StaleHandle:
        """Return `stale`, and make look-ups careful: an inode vanished under a caller."""
        if not self.unattended:
            self.careful_until = time.monotonic() + CAREFUL
        return stale

    def ghost(self, ino: int, stale: StaleHandle) -> Inode:
        """Return the last attributes of inode `ino`, which is gone; raises `stale` without any."""
        self._volume.check_identity()  # ghosts belong to the mounted filesystem only
        self._volume.look(lambda view: view.find_inode(ino))
        ghost = self._ghosts.get(ino)
        if ghost is None:
            folder = self._folders.pop(ino, None)
            if folder is None:
                raise self.vanished(stale)
            ghost = self.remember(folder, folder.record.ctime_ns)
        inode, ctime_ns = ghost
        return inode.evolve(nlink=0, ctime_ns=ctime_ns)

    def remember(self, removed: Inode, ctime_ns: int) -> tuple[Inode, int]:
        """Keep a removed inode as a ghost that changed last at `ctime_ns`."""
        if len(self._ghosts) >= GHOSTS:
            self._ghosts.popitem(last=False)
        self._ghosts[removed.ino] = ghost = removed, ctime_ns
        return ghost

    def replace(self, ghost: Inode) -> None:
        """Keep `ghost` with the attributes that a caller changed, in its place of the order."""
        self._ghosts[ghost.ino] = ghost, ghost.record.ctime_ns

    def seen(self, inode: Inode) -> None:
        """Remember an inode that a look-up found and that is not a regular file."""
        folders = self._folders
        if folders.pop(inode.ino, None) is None and len(folders) >= FOLDERS:
            del folders[next(iter(folders))]
        folders[inode.ino] = inode  # at the end, so the first one is the oldest

    def forget(self, ino: int) -> None:
        """Drop what is kept of `ino`: the caller looks it up before it names it again."""
        self._ghosts.pop(ino, None)
        self._folders.pop(ino, None)

    # --- pins ---------------------------------------------------------------------------------

    def pinned(self, found: Inode, look_again: Callable[[], Inode | None]) -> Inode | None:
        """Return what was looked up, pinned for the next call; None when the name is gone.

        Pins nothing for a call without a caller.  Raises Busy when other peers replace the name
        faster than `look_again` finds it.
        """
        if self.unattended:
            return found
        now = time.monotonic()
        self.unpin(now)
        if now > self.careful_until:
            self.careful_until = 0.0
            return found
        inode: Inode | None = found
        for _ in range(ATTEMPTS):
            if inode is None or self._secure(inode, now):
                return inode
            inode = look_again()
        raise Busy("the name is replaced faster than it can be looked up")

    def _secure(self, inode: Inode, now: float) -> bool:
        """Pin an inode unless it is a directory; False when it is gone."""
        if inode.is_dir:
            return True
        ino = inode.ino
        self._openfiles.hold(ino)
        try:
            self._openfiles.confirm(ino)
        except StaleHandle:
            self._openfiles.let_go(ino)
            return False
        before = self.pins.pop(ino, None)
        if before is not None:
            self._openfiles.let_go(ino)
            self._pinned_blocks -= before[1]
            self._shared.add(ino)
        blocks = inode.record.blocks
        self.pins[ino] = now + PINNED, blocks
        self._pinned_blocks += blocks
        self.unpin(now)
        return True

    def unpin(self, now: float) -> bool:
        """Let go pins that are expired at `now` (monotonic seconds), UNPINNED_AT_ONCE at most.

        Returns whether it let go so many, so that there may be more.
        """
        for _ in range(UNPINNED_AT_ONCE):
            if not self.pins:
                return False
            ino, (until, _) = next(iter(self.pins.items()))
            many = len(self.pins) > PINS or self._pinned_blocks > self._pinnable()
            if until >= now and not (many and len(self.pins) > 1):
                return False
            self._let_go(ino)
        return True

    def opened(self, ino: int) -> None:
        """Let go the pin of an inode that its only caller has opened; nothing without one.

        A mount that dies leaves its pins in its open filter, where they keep other files, too.
        """
        if ino in self.pins and ino not in self._shared:
            self._pinned_blocks -= self.pins.pop(ino)[1]
            self._openfiles.let_go(ino)

    def make_way(self) -> bool:
        """Free some unused files, for a change that found no space.

        All pins go.  Returns whether anything went.  Raises Busy, Corrupt, EIO, ESTALE.
        """
        pinned = bool(self.pins)
        try:
            while self.pins:
                self._let_go(next(iter(self.pins)))
            return bool(self._volume.view().root.orphans and self._orphans.free_some()) or pinned
        except DAMAGE as error:
            raise self._volume.contained(error) from error

    def _let_go(self, ino: int) -> None:
        self._pinned_blocks -= self.pins.pop(ino)[1]
        self._shared.discard(ino)
        self._orphans.close(ino)

    def _pinnable(self) -> int:
        """Return the number of blocks that all pins together may keep."""
        used = self._volume.look(lambda view: view.root.used)
        free = self._volume.superblock.geometry.block_count - used
        return max(free, 0) // PINNED_SHARE
