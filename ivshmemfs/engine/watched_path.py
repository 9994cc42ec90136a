"""What happens to one file, or below one directory, told by path; for `watch` and the Python API.

    NEW         nothing is remembered
    WATCHING    `begin` remembered what is there, and `changes` tells what changed since
    NEW         an overflow was told: the next `changes` remembers anew
    OVER        the directory was removed

Nothing here waits, and nothing is stored in the region.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from ivshmemfs.engine.diff import NAMES_MAX, Change, Kind, Watcher
from ivshmemfs.engine.filesystem import Filesystem
from ivshmemfs.errors import FsError

PATH_MAX: Final = 4096  # bytes of a path above a name; no system call takes a longer one
PATHS_MAX: Final = 4096  # paths that are remembered


class PathChange(NamedTuple):
    """One change; paths are below the watched directory, or the directory of the watched file."""

    kind: Kind
    path: bytes  # b"": the directory itself, or unknown after an overflow
    ino: int
    is_dir: bool
    to: bytes | None  # the new path, of a move


class WatchedPath:
    """One watched directory, with `recursive` all below it, or one file.  Not thread-safe."""

    def __init__(
        self, fs: Filesystem, folder: int, file: bytes = b"", *, recursive: bool = False
    ) -> None:
        self._base: Final = folder
        self._file: Final = file  # the only name that counts, if a file is watched
        self._watcher: Final = Watcher(fs, recursive=recursive and not file)
        self._paths: dict[int, bytes] = {folder: b""}
        self._early: list[Change] = []  # what changed while the names were remembered
        self._watching = False

    def begin(self) -> None:
        """Remember what is there now.

        Raises Busy: call again.  Raises EOVERFLOW when there are more than `NAMES_MAX` names.
        """
        self._watcher.watch(self._base)
        early = self._watcher.changes()
        if any(change.kind is Kind.OVERFLOW for change in early):
            raise FsError(errno.EOVERFLOW, f"there are more than {NAMES_MAX} names")
        self._early += early
        self._watching = True

    def changes(self) -> list[PathChange]:
        """Return what changed since the last call; costs one load if there was no commit.

        Raises Busy: call again.  Raises what `Watcher.changes` raises, and what `begin` raises.
        """
        if not self._watching:
            self.begin()
        found = self._early + self._watcher.changes()
        self._early = []
        if any(change.kind is Kind.OVERFLOW for change in found):
            self._watching = False
            return [PathChange(Kind.OVERFLOW, self._file, self._base, not self._file, None)]
        told = [self._told(change) for change in found if self._counts(change)]
        if any(change.is_dir for change in found):
            self._paths = {self._base: b""}  # paths below may be other ones now
        return told

    @property
    def is_over(self) -> bool:
        """Whether nothing is watched any more: the directory was removed."""
        return self._watching and self._base not in self._watcher.folders

    def _counts(self, change: Change) -> bool:
        if not self._file:
            return True
        return self._file in (change.name, change.to[1] if change.to is not None else b"")

    def _told(self, change: Change) -> PathChange:
        to = None if change.to is None else self._path(change.to[0], change.to[1])
        path = self._path(change.folder, change.name)
        return PathChange(change.kind, path, change.ino, change.is_dir, to)

    def _path(self, folder: int, name: bytes) -> bytes:
        above = self._folder_path(folder)
        return above + b"/" + name if above else name

    def _folder_path(self, folder: int) -> bytes:
        """The path of a directory; "?" for what was removed in the same moment, or is too deep."""
        below: list[bytes] = []
        at, length = folder, 0
        while (above := self._paths.get(at)) is None:
            places = sorted(self._watcher.names_of(at))
            if length > PATH_MAX:  # a damaged region may have a ring of directories
                below.clear()
            if not places or length > PATH_MAX:
                above = b"?"
                break
            at, name = places[0]
            below.append(name)
            length += len(name) + 1
        path = b"/".join([*([above] if above else []), *reversed(below)])
        if len(self._paths) > PATHS_MAX:
            self._paths = {self._base: b""}
        self._paths[folder] = path
        return path
