"""Inodes without links: they are freed when no peer holds them open.

    linked     a directory entry leads to the inode
    orphan     its last link was removed while a peer held it open; the orphan directory lists it
    freed      the last close of the mount that held it freed it (`close`).  Or any mount did, after
               the holder died or found the region busy (`reap_piece`): in its upkeep, or because it
               needed the space

A pass goes through the orphan directory in the order of its keys, in pieces.  The upkeep has one
pass under way; each change that needs space makes its own.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from ivshmemfs.engine import directory, names
from ivshmemfs.engine.committer import Committer
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.engine.openfiles import OpenFiles
from ivshmemfs.engine.transaction import View
from ivshmemfs.engine.volume import Volume
from ivshmemfs.errors import Busy, FsError
from ivshmemfs.format.inode import ORPHANS_INO

CHECKED_AT_ONCE: Final = 256  # orphans that one piece looks up in the open filters
FREED_AT_ONCE: Final = 8  # orphans that one piece frees, each in a commit of its own
CHECKED_FOR_SPACE: Final = 1 << 14  # orphans that a change without space looks up; about 10 ms
FREED_FOR_SPACE: Final = 256  # orphans that it frees before it tries again


class _Pass:
    """Where a pass continues: behind `last_key`.  At 0, a new pass starts."""

    def __init__(self) -> None:
        self.last_key = 0


class Orphans:
    """Frees inodes without links, for one mount."""

    def __init__(self, volume: Volume, openfiles: OpenFiles, committer: Committer) -> None:
        self._volume: Final = volume
        self._openfiles: Final = openfiles
        self._committer: Final = committer
        self._pass: Final = _Pass()

    def close(self, ino: int) -> None:
        """Drop a handle of `ino`, and free the inode if it has no links and no other handle."""
        if not self._openfiles.let_go(ino):
            return
        self._openfiles.nameless.discard(ino)
        volume = self._volume
        with suppress(Busy, FsError):  # a later tick of any mount frees it
            if volume.member is not None and volume.view().root.orphans:
                inode = volume.look(lambda view: view.find_inode(ino))
                if inode is not None and inode.record.nlink == 0:
                    self._free(ino)

    def reap(self) -> None:
        """Free the present orphans that no peer holds open.  Raises Busy.

        Peers at work leave new ones all the time.  So this takes one pass, and no more pieces than
        the present orphans need: it does not last as long as others work.
        """
        count = self._volume.view().root.orphans
        self._pass.last_key = 0
        for _ in range(count // FREED_AT_ONCE + count // CHECKED_AT_ONCE + 2):
            self.reap_piece()
            if not self._pass.last_key:
                break

    def reap_piece(self) -> bool:
        """Check the next orphans of this pass and free some; whether there may be more to free.

        Returns False when the pass is over and this piece freed nothing.  Raises Busy.
        """
        freed = self._free_next(self._pass, CHECKED_AT_ONCE, FREED_AT_ONCE)
        return freed > 0 or self._pass.last_key != 0

    def free_some(self) -> int:
        """Free orphans that no peer holds open, for a change that found no space; how many.

        It makes a pass of its own, which begins with the first orphan.  Raises Busy.
        """
        return self._free_next(_Pass(), CHECKED_FOR_SPACE, FREED_FOR_SPACE)

    def _free_next(self, at: _Pass, checked: int, most: int) -> int:
        """Look at about `checked` of the next orphans and free `most` at most; returns how many."""

        def read(view: View) -> list[Dirent]:
            return directory.leaf_after(view, view.inode(ORPHANS_INO), at.last_key)

        member, freed, seen = self._volume.joined(), 0, 0
        while seen < checked:
            found = self._volume.look(read)
            if not found:
                at.last_key = 0
                break
            for entry in found:
                if freed == most:
                    return freed
                before, at.last_key = at.last_key, entry.key
                ino = entry.ino
                if ino not in self._openfiles.counts and not member.listed_elsewhere(ino):
                    try:
                        freed += self._free(ino)
                    except Busy:  # the next piece tries it again
                        at.last_key = before
                        raise
            seen += len(found)
        return freed

    def _free(self, ino: int) -> bool:
        return self._committer.change(lambda tx: names.free_orphan(tx, ino), removal=True)
