"""`get`: from a region to the local disk.  The region is not trusted.

A region makes nothing here outside of the directory that the user named.  Each name is one step
(`local`), and each directory is walked once.  Only files, directories and symbolic links are made
unless the user allows more.  A file gets its name once all of it is there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.cli.attach.paths import PIECE, about, contents, listing, twice
from ivshmemfs.cli.attach.peer import patiently
from ivshmemfs.cli.transfer.local import (
    Folder,
    kind_name,
    omitted,
    own_mounts,
    publish,
    refuse_taken,
    unfinished,
)
from ivshmemfs.errors import Corrupt, FsError, OutputError, StaleHandle, UsageError

if TYPE_CHECKING:
    from ivshmemfs.cli.transfer.meter import Meter
    from ivshmemfs.engine import Attr, Filesystem, Handle

#: Bytes of the first read behind a hole; at least a block.  Each further one is twice as long.
FIRST_PIECE = 1 << 16
#: Bytes that `Attr.blocks` counts in.
SECTOR = 512

#: Permissions that a copy gets without further ado: no set-ID, and sticky for directories only.
DIRECTORY_BITS, FILE_BITS = 0o1777, 0o777

_PLAIN = (stat.S_IFREG, stat.S_IFLNK)
_MOVED = "it was met before (moved meanwhile, or damage that fsck.ivshmemfs tells)"
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Wishes(NamedTuple):
    """What the user allows."""

    recursive: bool
    force: bool
    devices: bool
    special: bool


class Level:
    """A directory of the region that is being copied: its attributes and the names to come."""

    __slots__ = ("_names", "attr", "entries")

    def __init__(self, attr: Attr, entries: Iterator[tuple[bytes, Attr]]) -> None:
        self.attr = attr
        self.entries = entries
        self._names: set[bytes] = set()

    def claim(self, name: bytes) -> None:
        """Raise Corrupt when a name comes twice."""
        if name in self._names:
            raise twice(self.attr.ino)
        self._names.add(name)


class Copy(NamedTuple):
    """The place of the first copy of an inode with several names."""

    folder: tuple[bytes, ...]
    name: bytes
    identity: tuple[int, int]


class Getter:
    """Copies out of a region."""

    def __init__(self, fs: Filesystem, meter: Meter, wishes: Wishes) -> None:
        self._fs = fs
        self._meter = meter
        self._wishes = wishes
        self._root = os.geteuid() == 0
        self._piece = memoryview(bytearray(PIECE))
        self._zeros = bytes(fs.block_size)
        self._copies: dict[int, Copy] = {}  # of inodes with several names
        self._met: set[int] = set()  # all other inodes of the source under way
        self._own = own_mounts(fs.region) if wishes.recursive else frozenset()
        self._made: set[int] = set()  # directories that were made on a mount of this very region

    def copy(self, attr: Attr, folder: Folder, name: bytes) -> None:
        """What has `attr` becomes `name` in `folder`; raises OSError, UsageError."""
        self._met.clear()
        levels: list[Level] = []
        with about(lambda: folder.path(name)):
            self._take(attr, folder, name, levels)
        while levels:
            self._step(levels, folder)

    def _step(self, levels: list[Level], folder: Folder) -> None:
        level = levels[-1]
        with about(folder.path):
            following = next(level.entries, None)
            if following is None:
                levels.pop()
                path = folder.path()
                self._finish(level.attr, folder.leave(), path)
                return
        name, attr = following
        with about(lambda: folder.path(name)):
            level.claim(name)
            try:
                self._take(attr, folder, name, levels)
            except StaleHandle:
                self._meter.leave_out(folder.path(name), "it was removed meanwhile")

    def _take(self, attr: Attr, folder: Folder, name: bytes, levels: list[Level]) -> None:
        """Copy one thing; of a directory, only begin."""
        if stat.S_ISDIR(attr.mode):
            if not self._wishes.recursive:
                raise omitted(folder.path(name))
            if attr.ino in self._made:
                self._meter.leave_out(folder.path(name), "it contains the copy itself")
            elif self._first_time(attr, folder, name):
                entries = listing(self._fs, attr.ino)
                self._begin(folder, name)
                levels.append(Level(attr, entries))
        elif stat.S_IFMT(attr.mode) not in _PLAIN and not self._wishes.devices:
            why = f"{kind_name(attr.mode)} (--devices makes it)"
            self._meter.leave_out(folder.path(name), why)
        elif attr.nlink > 1 or self._first_time(attr, folder, name):
            self._single(attr, folder, name)

    def _first_time(self, attr: Attr, folder: Folder, name: bytes) -> bool:
        """Whether an inode with one name was not met before; the region may say so wrongly."""
        if attr.ino in self._met:
            self._meter.leave_out(folder.path(name), _MOVED)
            return False
        self._met.add(attr.ino)
        return True

    # --- directories --------------------------------------------------------------------------

    def _begin(self, folder: Folder, name: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=folder.fd)
        except FileExistsError:
            with suppress(NotADirectoryError):
                folder.enter(name)
                return
            raise UsageError(
                f"{os.fsdecode(folder.path(name))} exists and is not a directory: remove it first"
            ) from None
        folder.enter(name)
        device, ino = folder.identity()
        if device in self._own:
            self._made.add(ino)

    def _finish(self, attr: Attr, fd: int, path: bytes) -> None:
        try:
            self._dress(fd, attr, path)
        finally:
            os.close(fd)

    # --- everything else ----------------------------------------------------------------------

    def _single(self, attr: Attr, folder: Folder, name: bytes) -> None:
        refuse_taken(folder, name, stat.S_IFMT(attr.mode), force=self._wishes.force)
        with unfinished(folder) as fresh:
            if not self._linked(attr, folder, fresh):
                self._make(attr, folder, fresh, name)
            publish(folder, fresh, name, force=self._wishes.force)
        if attr.nlink > 1 and attr.ino not in self._copies:
            status = folder.status(name)
            if status is not None:
                identity = status.st_dev, status.st_ino
                self._copies[attr.ino] = Copy(folder.names, name, identity)

    def _linked(self, attr: Attr, folder: Folder, fresh: bytes) -> bool:
        """Make `fresh` another name of what was copied of this inode, if there is such a thing."""
        copy = self._copies.get(attr.ino)
        if copy is None:
            return False
        try:
            at = folder.reach(copy.folder)
        except OSError:
            return False
        try:
            status = os.stat(copy.name, dir_fd=at, follow_symlinks=False)
            if (status.st_dev, status.st_ino) != copy.identity:
                return False
            os.link(copy.name, fresh, src_dir_fd=at, dst_dir_fd=folder.fd, follow_symlinks=False)
        except OSError:  # a filesystem without links, or too many of them
            return False
        finally:
            os.close(at)
        return True

    def _make(self, attr: Attr, folder: Folder, fresh: bytes, name: bytes) -> None:
        kind = stat.S_IFMT(attr.mode)
        if kind == stat.S_IFREG:
            fd = os.open(fresh, _CREATE, 0o600, dir_fd=folder.fd)
            try:
                self._pour(attr, fd, name)
                self._dress(fd, attr, folder.path(name))
            finally:
                os.close(fd)
            return
        if kind == stat.S_IFLNK:
            target = patiently(lambda: self._fs.readlink(attr.ino))
            os.symlink(target, fresh, dir_fd=folder.fd)
        else:
            mode = self._permissions(attr, folder.path(name))
            _mknod(fresh, kind | mode, attr.rdev, folder.fd)
        if self._root:
            os.chown(fresh, attr.uid, attr.gid, dir_fd=folder.fd, follow_symlinks=False)
        times = (attr.atime_ns, attr.mtime_ns)
        os.utime(fresh, ns=times, dir_fd=folder.fd, follow_symlinks=False)

    def _dress(self, fd: int, attr: Attr, path: bytes) -> None:
        """Owner (as root), permissions as far as the user wishes, and times."""
        if self._root:
            os.chown(fd, attr.uid, attr.gid)
        os.chmod(fd, self._permissions(attr, path))
        os.utime(fd, ns=(attr.atime_ns, attr.mtime_ns))

    def _permissions(self, attr: Attr, path: bytes) -> int:
        """The permissions that the copy gets; says so when bits are left out."""
        mode = stat.S_IMODE(patiently(lambda: self._fs.mode_without_list(attr)))
        kept = mode & (DIRECTORY_BITS if stat.S_ISDIR(attr.mode) else FILE_BITS)
        if self._wishes.special or kept == mode:
            return mode
        self._meter.leave_out(path, f"bits {mode & ~kept:04o} (--preserve-special keeps them)")
        return kept

    # --- contents -----------------------------------------------------------------------------

    def _pour(self, attr: Attr, fd: int, name: bytes) -> None:
        """Copy contents; raises Corrupt for more data than there can be."""
        fs, taken = self._fs, 0
        copies = self._sparse if attr.blocks * SECTOR < attr.size else self._dense
        handle = patiently(lambda: fs.open(attr.ino, os.O_RDONLY))
        try:
            for got, at in copies(handle, fd):
                taken += got
                self._meter.add(name, at, attr.size)
                if taken > fs.region.size:
                    raise Corrupt("it has more data than the region can hold: run fsck.ivshmemfs")
        finally:
            fs.release(handle)

    def _dense(self, handle: Handle, fd: int) -> Iterator[tuple[int, int]]:
        """Copy all that is there; yields how much room each piece takes, and where it ends."""
        fs, at = self._fs, 0
        while got := patiently(lambda at=at: fs.read_to(handle, at, PIECE, fd)):  # type: ignore[misc]
            at += got
            yield got, at
        os.ftruncate(fd, at)

    def _sparse(self, handle: Handle, fd: int) -> Iterator[tuple[int, int]]:
        """The same, but holes stay holes and cost nothing.

        Each piece begins with data, so it takes at least a block of the region's room.  It never
        asks where the next hole is: that answer costs as much as the file says it has.
        """
        fs, at, most = self._fs, 0, FIRST_PIECE
        while True:
            # The size of before a look that finds no more data: what is appended later is not a
            # hole at the end.
            size = patiently(lambda: fs.getattr(handle.ino)).size
            start = self._next_data(handle, at)
            if start < 0:
                os.ftruncate(fd, min(size, patiently(lambda: fs.getattr(handle.ino)).size))
                return
            most = min(2 * most, PIECE) if start == at else FIRST_PIECE
            piece = patiently(lambda at=start, most=most: fs.read(handle, at, most, self._piece))  # type: ignore[misc]
            stored = self._store(fd, memoryview(piece), start)
            at = start + len(piece)
            yield max(stored, fs.block_size), at

    def _next_data(self, handle: Handle, at: int) -> int:
        """Where data begins from `at` on; -1 when only a hole follows."""
        try:
            return patiently(lambda: self._fs.seek(handle, at, os.SEEK_DATA))
        except FsError as error:
            if error.errno == errno.ENXIO:
                return -1
            raise

    def _store(self, fd: int, piece: memoryview, at: int) -> int:
        """Write a piece that begins with a block, but no block of zeros; how many bytes it were."""
        unit, zeros = len(self._zeros), self._zeros
        start = stored = 0  # of a run of blocks
        for end in range(0, len(piece) + unit, unit):
            block = piece[end : end + unit]
            if block and block != zeros[: len(block)]:
                continue
            run = piece[start : min(end, len(piece))]
            while run:
                done = os.pwrite(fd, run, at + start)
                run, start, stored = run[done:], start + done, stored + done
            start = end + unit
        return stored

    def pour_out(self, attr: Attr, path: bytes, fd: int) -> None:
        """Write the contents of a file to a descriptor that may be a pipe."""
        if not stat.S_ISREG(attr.mode):
            raise UsageError(f"{os.fsdecode(path)} is {kind_name(attr.mode)}, not a file")
        pieces = contents(self._fs, attr.ino)
        while True:
            with about(lambda: path):
                piece = next(pieces, None)
            if piece is None:
                return
            while piece:
                piece = piece[_write_output(fd, piece) :]


def _write_output(fd: int, piece: memoryview) -> int:
    """Write to standard output; return how many bytes it took."""
    try:
        return os.write(fd, piece)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"write error: standard output: {error.strerror}") from None


def _mknod(name: bytes, mode: int, rdev: int, at: int) -> None:
    """Make a node with exactly these permissions."""
    before = os.umask(0)
    try:
        os.mknod(name, mode, rdev, dir_fd=at)
    finally:
        os.umask(before)
