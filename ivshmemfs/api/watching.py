"""`Client.watch`: what any machine changes, as it happens.

    WATCHING   `poll` and iteration tell what changed since the call before
    OVER       the watched directory was removed, or the client was closed

It looks at the commit word, and stores nothing.  Changes that follow each other within
milliseconds come as their sum: of a file that came and went nothing is told.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.api import walk
from ivshmemfs.errors import FsError

if TYPE_CHECKING:
    from ivshmemfs.api.client import Client
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.engine.watched_path import PathChange, WatchedPath

#: Seconds between two loads of the commit word: until DROWSY seconds after a commit, and later.
#: A change is told half as late at the median.
NAP, LONG_NAP, DROWSY = 0.003, 0.008, 10.0
#: Seconds after a commit before it sleeps until a ring, if there are bells: commits come in rows.
AWAKE = 0.02
#: Seconds between two looks at whether the region still is what was opened.
CONDITION_SECONDS = 1.0


class Change(NamedTuple):
    """One change of a watched path."""

    kind: str  # created, removed, moved, changed (contents), attributes, overflow
    path: str
    inode: int
    is_dir: bool
    target: str | None  # the new path, of a move


class Watch:
    """The changes of one file or directory; an iterator that waits.  Not thread-safe."""

    def __init__(self, client: Client, path: str, *, recursive: bool) -> None:
        from ivshmemfs.engine.watched_path import WatchedPath

        self._session = client.session
        self._path = path
        self._above = path.rstrip("/")
        self._next_check = 0.0
        self._changed = time.monotonic()  # when the commit word was another one
        self._over = False

        def make(fs: Filesystem) -> tuple[WatchedPath, bytes]:
            place = walk.place_of(fs, path)
            if place.attr is None:
                raise FsError(errno.ENOENT)
            if stat.S_ISDIR(place.attr.mode):
                return WatchedPath(fs, place.attr.ino, recursive=recursive), b""
            return WatchedPath(fs, place.parent, place.name), place.name

        watched, self._file = self._session.call(make, path)
        self._watched = watched
        self._session.call(lambda _fs: watched.begin(), path)

    def poll(self, timeout: float | None = 0.0) -> list[Change]:
        """Return what changed since the last call; waits up to `timeout` seconds for a change.

        None waits for ever.  Returns nothing when the time is over, or when nothing is watched any
        more.  After an overflow changes are missing: list the directory.  Raises OSError: ESTALE
        when the region was formatted anew, removed or replaced.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not self._over:
            self._check()
            found = self._session.call(lambda _fs: self._watched.changes(), self._path)
            self._over = self._watched.is_over
            if found:
                return [self._told(change) for change in found]
            if not self._wait(end):
                break
        return []

    def __iter__(self) -> Iterator[Change]:
        """Wait for changes, and yield them; ends when the watched directory is removed."""
        while not self._over:
            yield from self.poll(None)

    def _wait(self, end: float) -> bool:
        """Wait for a commit, or for the next check; whether `end` has not come yet."""
        word = self._session.call(lambda fs: fs.commit_word(), self._path)
        until = min(end, self._next_check)
        while (now := time.monotonic()) < until:
            quiet = now - self._changed
            if quiet < AWAKE or not self._session.sleep(word, until - now):
                time.sleep(min(NAP if quiet < DROWSY else LONG_NAP, until - now))
            if self._session.call(lambda fs: fs.commit_word(), self._path) != word:
                self._changed = now
                return True
        return time.monotonic() < end

    def _check(self) -> None:
        """Raise OSError ESTALE unless the region is the one that was opened; once a second."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CONDITION_SECONDS
        from ivshmemfs.region import Condition

        def look(fs: Filesystem) -> None:
            found = fs.condition()
            if found not in (Condition.SOUND, Condition.RENAMED):
                raise FsError(errno.ESTALE, found.explained)

        self._session.call(look, self._path)

    def _told(self, change: PathChange) -> Change:
        target = None if change.to is None else self._named(change.to)
        return Change(
            change.kind.value, self._named(change.path), change.ino, change.is_dir, target
        )

    def _named(self, inside: bytes) -> str:
        if not inside:
            return self._path
        if self._file and inside == self._file:
            return self._path
        above = os.path.dirname(self._above) if self._file else self._above
        below = os.fsdecode(inside)
        return f"{above.rstrip('/')}/{below}" if above or self._path.startswith("/") else below
