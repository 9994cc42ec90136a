"""The local side of `get` and `put`: directories by descriptor, and names that are not finished.

Names come from a region, and an earlier copy may have put anything below DEST.  So nothing is
reached by a path: each step is one name under one descriptor, and follows no link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ivshmemfs.errors import IvshmemfsError, UsageError

if TYPE_CHECKING:
    from ivshmemfs.region import Region

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def exists(path: bytes) -> UsageError:
    """Return the error for a name that is taken."""
    return UsageError(f"{os.fsdecode(path)} exists: --force replaces it")


def omitted(path: bytes) -> UsageError:
    """Return the error for a directory where only files are copied."""
    return UsageError(f"{os.fsdecode(path)} is a directory: --recursive copies it")


class Folder:
    """A local directory, held by its descriptor; `enter` and `leave` move it by one step.

    It holds one descriptor however deep it is, so going up looks for `..` and compares it with
    what was left on the way down.
    """

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._names: list[bytes] = []
        self._above: list[tuple[int, int]] = []
        self.fd = os.open(path or b".", _OPEN)
        self._top = os.dup(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:  # fmt: skip
        os.close(self.fd)
        os.close(self._top)

    @property
    def names(self) -> tuple[bytes, ...]:
        """The steps from where it began to where it is."""
        return tuple(self._names)

    def path(self, name: bytes = b"") -> bytes:
        """Return the path of `name` in it, for a message."""
        return os.path.join(self._path, *self._names, *([name] if name else []))

    def identity(self) -> tuple[int, int]:
        """Return what no other directory has: its device and inode number."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def status(self, name: bytes) -> os.stat_result | None:
        """Return the status of `name`, or None; follows no link."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def enter(self, name: bytes) -> None:
        """Step down; raises NotADirectoryError for anything else, a link to a directory too."""
        here = self.identity()
        try:
            below = os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=self.fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotADirectoryError(
                    errno.ENOTDIR, "is a symbolic link, no directory"
                ) from None
            raise
        os.close(self.fd)
        self.fd = below
        self._names.append(name)
        self._above.append(here)

    def leave(self) -> int:
        """Step up; returns the descriptor of the directory that was left, for the caller."""
        above = os.open(b"..", _OPEN, dir_fd=self.fd)
        left, self.fd = self.fd, above
        name, wanted = self._names.pop(), self._above.pop()
        if self.identity() != wanted:
            os.close(left)
            raise OSError(errno.ESTALE, f"{os.fsdecode(name)} was moved away meanwhile")
        return left

    def reach(self, names: tuple[bytes, ...]) -> int:
        """Return a descriptor of the directory at `names` below where it began."""
        fd = os.dup(self._top)
        for name in names:
            try:
                below = os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd


def refuse_taken(folder: Folder, name: bytes, kind: int, *, force: bool) -> None:
    """Raise UsageError when `name` exists, unless `force` lets a file of `kind` replace it.

    A device node, a fifo or a socket, also behind a link, is replaced by its like alone: programs
    would no longer find it.
    """
    there = folder.status(name)
    if there is None:
        return
    if stat.S_IFMT(there.st_mode) != kind:
        with suppress(OSError):  # a link that leads nowhere
            mode = os.stat(name, dir_fd=folder.fd).st_mode
            if stat.S_IFMT(mode) not in (stat.S_IFREG, stat.S_IFDIR):
                raise UsageError(
                    f"{os.fsdecode(folder.path(name))} is {kind_name(mode)}, which is not "
                    "replaced; '-' is the standard output"
                )
    if not force:
        raise exists(folder.path(name))


@contextmanager
def unfinished(folder: Folder) -> Iterator[bytes]:
    """Give a name for an unfinished file; a file that still has it in the end is removed."""
    name = b".ivshmemfs-copy-" + os.urandom(8).hex().encode()
    at = os.dup(folder.fd)
    try:
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=at)
        os.close(at)


def publish(folder: Folder, fresh: bytes, name: bytes, *, force: bool) -> None:
    """Have `fresh` appear as `name`; raises UsageError when that exists, unless `force`."""
    at = folder.fd
    if force:
        os.rename(fresh, name, src_dir_fd=at, dst_dir_fd=at)
        return
    try:  # unlike rename, link never replaces
        os.link(fresh, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
    except FileExistsError:
        raise exists(folder.path(name)) from None
    except OSError:  # a filesystem without links
        if folder.status(name) is not None:
            raise exists(folder.path(name)) from None
        os.rename(fresh, name, src_dir_fd=at, dst_dir_fd=at)


def own_mounts(region: Region) -> frozenset[int]:
    """Return the device numbers of the mounts here that show this very region."""
    from ivshmemfs.fuse.mountpoint import FSTYPE, mounted

    try:
        entries = mounted()
    except (OSError, IvshmemfsError):  # without /proc
        return frozenset()
    devices = [
        entry.device
        for entry in entries
        if entry.fstype == FSTYPE and _same_region(region, entry.source)
    ]
    return frozenset(os.makedev(*map(int, device.split(":"))) for device in devices)


def _same_region(region: Region, source: str) -> bool:
    try:
        return source == region.spec or os.path.samefile(source, region.path)
    except OSError:
        return False


def kind_name(mode: int) -> str:
    """Return what people call a file of this mode."""
    names = {
        stat.S_IFCHR: "a device node", stat.S_IFBLK: "a device node", stat.S_IFIFO: "a fifo",
        stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory",
    }  # fmt: skip
    return names.get(stat.S_IFMT(mode), "a file")
