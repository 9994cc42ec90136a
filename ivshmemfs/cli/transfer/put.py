"""`put`: from the local disk into a region.

A copy is made without a name, and linked once all of it is there.  So a death in the middle leaves
nothing behind that another program would have to remove.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from ivshmemfs.cli.attach.paths import Place, about, child
from ivshmemfs.cli.attach.peer import PULSE, Pulse, patiently
from ivshmemfs.cli.transfer.local import Folder, exists, omitted, own_mounts
from ivshmemfs.errors import FsError, UsageError

if TYPE_CHECKING:
    from ivshmemfs.cli.transfer.meter import Meter
    from ivshmemfs.engine import Filesystem, Handle

#: Bytes of which a disk brings the first ones before the last, or nearly so.
FETCHED = 1 << 18
#: Bytes and blocks of one transaction at most; other mounts wait for its end.
MOST = 4 << 20
MOST_BLOCKS = 1024

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class Level:
    """A local directory that is being copied: what it became, and the names to come."""

    __slots__ = ("ino", "names", "status")

    def __init__(self, ino: int, status: os.stat_result, names: list[bytes]) -> None:
        self.ino = ino
        self.status = status
        self.names = names[::-1]


class Putter:
    """Copies into a region."""

    def __init__(self, fs: Filesystem, meter: Meter, *, recursive: bool, force: bool) -> None:
        self._fs = fs
        self._meter = meter
        self._recursive = recursive
        self._force = force
        self._root = os.geteuid() == 0
        from ivshmemfs.engine import Context

        self._me = Context(os.getuid(), os.getgid())
        self._most = min(MOST, MOST_BLOCKS * fs.block_size)
        self._pulse = Pulse(fs)
        self._links: dict[tuple[int, int], int] = {}  # inodes by what has several names here
        self._own = own_mounts(fs.region) if recursive else frozenset()
        self._made: set[int] = set()  # directories that this copy has made

    def copy(self, source: bytes, place: Place) -> None:
        """`source` becomes what `place` says; raises OSError, UsageError.

        As cp(1) does, it follows a symbolic link, and reads a fifo or a device, unless it copies
        trees.
        """
        status = os.stat(source, follow_symlinks=not self._recursive)
        if stat.S_ISDIR(status.st_mode):
            if not self._recursive:
                raise omitted(source)
            with Folder(source) as local:
                self._tree(local, place)
        elif self._recursive or stat.S_ISREG(status.st_mode):
            with about(lambda: place.path, lambda: source):
                self._single(source, None, status, place)
        else:
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.copy_stream(fd, place)
            finally:
                os.close(fd)

    def copy_stream(self, fd: int, place: Place) -> None:
        """What comes out of a pipe becomes a file."""
        with about(lambda: place.path):
            self._vacant(place)
            mask = os.umask(0)
            os.umask(mask)
            handle, ino = self._nameless(place, stat.S_IFREG | 0o666 & ~mask)
            try:
                self._stream(fd, handle, place)
                self._name(ino, place)
            finally:
                self._fs.release(handle)

    # --- directories --------------------------------------------------------------------------

    def _tree(self, local: Folder, place: Place) -> None:
        levels: list[Level] = []
        paths = [place.path]
        with about(lambda: place.path, local.path):
            levels.append(self._begun(local, place))
        while levels:
            level = levels[-1]
            if not level.names:
                with about(lambda: paths[-1], local.path):
                    self._dress(level.ino, level.status)
                    levels.pop()
                    paths.pop()
                    if levels:
                        os.close(local.leave())
                continue
            below = Place(level.ino, level.names.pop(), paths[-1])
            name = below.name
            with about(lambda below=below: below.path, lambda name=name: local.path(name)):  # type: ignore[misc]
                if self._descended(local, below, levels):
                    paths.append(below.path)

    def _descended(self, local: Folder, place: Place, levels: list[Level]) -> bool:
        """Step down into a directory and return True, or copy anything else."""
        status = os.stat(place.name, dir_fd=local.fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            self._single(place.name, local.fd, status, place)
            return False
        if status.st_dev in self._own and status.st_ino in self._made:
            self._meter.leave_out(local.path(place.name), "it contains the copy itself")
            return False
        local.enter(place.name)
        levels.append(self._begun(local, place))
        return True

    def _begun(self, local: Folder, place: Place) -> Level:
        fs = self._fs
        try:
            made = patiently(lambda: fs.mkdir(place.folder, place.name, 0o700, self._me))
            self._made.add(made.ino)
        except FsError as error:
            if error.errno != errno.EEXIST:
                raise
            made = child(fs, place.folder, place.name)
            if not stat.S_ISDIR(made.mode):
                raise UsageError(
                    f"{os.fsdecode(place.path)} exists and is not a directory: remove it first"
                ) from None
        names = sorted(os.fsencode(name) for name in os.listdir(local.fd))
        return Level(made.ino, os.fstat(local.fd), names)

    # --- everything else ----------------------------------------------------------------------

    def _single(self, source: bytes, at: int | None, status: os.stat_result, place: Place) -> None:
        self._vacant(place)
        if self._linked(status, place):
            return
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            ino = self._file(source, at, place)
        else:
            target = os.readlink(source, dir_fd=at) if kind == stat.S_IFLNK else b""
            ino = self._node(status, target, place)
        if status.st_nlink > 1:
            self._links[status.st_dev, status.st_ino] = ino

    def _vacant(self, place: Place) -> None:
        """Raise UsageError unless the name is free or may be replaced."""
        if self._force:
            return
        with suppress(FsError):
            child(self._fs, place.folder, place.name)
            raise exists(place.path)

    def _linked(self, status: os.stat_result, place: Place) -> bool:
        """Make another name of what was copied of this inode, if there is such a thing."""
        ino = self._links.get((status.st_dev, status.st_ino))
        if ino is None:
            return False
        try:
            self._name(ino, place)
        except FsError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE, errno.EMLINK):
                return False  # it was removed meanwhile, or has as many names as it may have
            raise
        return True

    def _nameless(self, place: Place, mode: int, **kinds: int | bytes) -> tuple[Handle, int]:
        fs = self._fs
        handle, attr = patiently(
            lambda: fs.make_nameless(place.folder, mode, os.O_WRONLY, self._me, **kinds)  # type: ignore[arg-type]
        )
        return handle, attr.ino

    def _name(self, ino: int, place: Place) -> None:
        """Give what is finished its name."""
        fs, force = self._fs, self._force
        try:
            patiently(lambda: fs.link(ino, place.folder, place.name, self._me, over=force))
        except FsError as error:
            if error.errno == errno.EEXIST:
                raise exists(place.path) from None
            raise

    def _node(self, status: os.stat_result, target: bytes, place: Place) -> int:
        mode, rdev = status.st_mode, 0 if target else status.st_rdev
        handle, ino = self._nameless(place, mode, rdev=rdev, target=target)
        try:
            self._dress(ino, status)
            self._name(ino, place)
        finally:
            self._fs.release(handle)
        return ino

    def _dress(self, ino: int, status: os.stat_result, size: int | None = None) -> None:
        """Owner (as root), size, permissions and times, in this order: one may change the next."""
        fs, link = self._fs, stat.S_ISLNK(status.st_mode)
        if self._root:
            uid, gid = status.st_uid, status.st_gid
            patiently(lambda: fs.setattr(ino, self._me, uid=uid, gid=gid))
        if size is not None:
            patiently(lambda: fs.setattr(ino, self._me, size=size))
        mode = None if link else stat.S_IMODE(status.st_mode)
        atime, mtime = status.st_atime_ns, status.st_mtime_ns
        patiently(lambda: fs.setattr(ino, self._me, mode=mode, atime_ns=atime, mtime_ns=mtime))

    # --- contents -----------------------------------------------------------------------------

    def _file(self, source: bytes, at: int | None, place: Place) -> int:
        """Copy a file; returns the inode that it became."""
        flags = _OPEN if at is None else _OPEN | os.O_NOFOLLOW
        fd = os.open(source, flags, dir_fd=at)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it was replaced by something else than a file")
            handle, ino = self._nameless(place, stat.S_IFREG | 0o600)
            try:
                self._fill(fd, status, handle, place)
                self._name(ino, place)
            finally:
                self._fs.release(handle)
        finally:
            os.close(fd)
        return ino

    def _fill(self, fd: int, status: os.stat_result, handle: Handle, place: Place) -> None:
        size: int | None = status.st_size
        if not size:  # empty, or of unknown size, as in /proc
            size = None
            self._stream(fd, handle, place)
        else:
            for start, end in _extents(fd, status, self._fs.block_size):
                copied = self._pour(fd, handle, start, end, place, status.st_size)
                if copied < end:  # it has less than its size says, or became shorter meanwhile
                    size = copied
                    break
        self._dress(handle.ino, status, size=size)

    def _pour(self, fd: int, handle: Handle, start: int, end: int, place: Place, size: int) -> int:
        """Copy the bytes from `start` to `end`; returns where the source ended, or `end`."""
        fs = self._fs
        while start < end:
            at, most = start, min(self._most, end - start)
            _fetch(fd, at, most)
            got = patiently(lambda at=at, most=most: fs.write_from(handle, at, most, fd))  # type: ignore[misc]
            if not got:
                break
            start += got
            self._meter.add(place.name, start, size)
            self._pulse.beat()
        return start

    def _stream(self, fd: int, handle: Handle, place: Place) -> None:
        """Copy what comes until it ends."""
        fs, at = self._fs, 0
        while piece := self._gathered(fd):
            rest = memoryview(piece)
            while rest:
                done = patiently(lambda at=at, rest=rest: fs.write(handle, at, rest))  # type: ignore[misc]
                rest, at = rest[done:], at + done
            self._meter.add(place.name, at, at)

    def _gathered(self, fd: int) -> bytes:
        """As many bytes as one transaction takes, or what comes before the end."""
        pieces, size = list[bytes](), 0
        while size < self._most:
            while not select.select([fd], [], [], PULSE)[0]:
                self._pulse.beat()
            piece = os.read(fd, self._most - size)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        self._pulse.beat()
        return b"".join(pieces)


def _fetch(fd: int, at: int, length: int) -> None:
    """Have a disk bring bytes into memory, so that no transaction has to wait for it."""
    os.posix_fadvise(fd, at, length, os.POSIX_FADV_WILLNEED)
    for place in range(at, at + length, FETCHED):
        os.pread(fd, 1, min(place + FETCHED, at + length) - 1)


def _extents(fd: int, status: os.stat_result, unit: int) -> Iterator[tuple[int, int]]:
    """Where a local file has data: start, a multiple of `unit`, and end of each run, in bytes."""
    at, size = 0, status.st_size
    if status.st_blocks * 512 >= size:
        yield 0, size
        return
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                return
            raise
        start = max(start - start % unit, at)
        at = min(-(-os.lseek(fd, start, os.SEEK_HOLE) // unit) * unit, size)
        yield start, at
