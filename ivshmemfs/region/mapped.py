"""A region that is open, and the steps that all ways of opening one share."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ivshmemfs.errors import RegionDenied, RegionError, RegionMissing, RegionSize, RegionUnfit
from ivshmemfs.native import DEVICE, NORMAL, WRITE_COMBINING, Memory
from ivshmemfs.region.sizes import readable_size

MIN_SIZE = 4096  # whatever the format asks for, less than a page cannot be a region
ACCESS_NAMES = {NORMAL: "cached", DEVICE: "device memory", WRITE_COMBINING: "write-combining"}


def shown(path: str | os.PathLike[str]) -> str:
    """A path as one line of a message can show it."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass(frozen=True)
class Region:
    """Shared memory, mapped.  Closing it makes any later access raise ValueError."""

    memory: Memory
    spec: str  # canonical text that opens the same region again
    path: Path  # the file or device that is mapped
    kind: str  # for people: file, PCI device, ...

    @property
    def size(self) -> int:
        """Bytes."""
        return self.memory.length

    @property
    def readonly(self) -> bool:
        """Whether stores are refused (OSError EROFS)."""
        return not self.memory.writable

    @property
    def description(self) -> str:
        """One line: kind, size, access."""
        mode = ", read-only" if self.readonly else ""
        return f"{self.kind}, {readable_size(self.size)}, {ACCESS_NAMES[self.memory.access]}{mode}"

    def close(self) -> None:
        """Unmap; closing twice is harmless."""
        self.memory.close()

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def translate(error: OSError, path: str | os.PathLike[str]) -> RegionError:
    """The RegionError that says what an OSError about `path` means and what to do."""
    name, reason = shown(path), os.strerror(error.errno or errno.EIO)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ENXIO | errno.ENODEV:
            return RegionMissing(f"{name}: no such file or device; see: ivshmemfs list")
        case errno.EACCES | errno.EPERM:
            return RegionDenied(
                f"{name}: permission denied; run as root, or give this user access to it"
            )
        case errno.EROFS:
            return RegionDenied(f"{name}: cannot be written here; mount it with -o ro")
        case errno.EBUSY | errno.ETXTBSY:
            return RegionError(f"{name}: in use by a driver or program; release it first")
        case errno.EISDIR:
            return RegionError(f"{name}: is a directory; name a file or character device")
    return RegionError(f"{name}: cannot be opened ({reason}); see: ivshmemfs list")


def look_at(path: Path) -> os.stat_result:
    """stat(2) that follows links; raises a RegionError."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise translate(error if isinstance(error, OSError) else OSError(2, ""), path) from None


def open_descriptor(path: Path, *, readonly: bool, extra_flags: int = 0) -> int:
    """A file descriptor of a file or device; raises a RegionError."""
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | extra_flags
    try:
        return os.open(path, flags)
    except OSError as error:
        raise translate(error, path) from None


def refuse_small(size: int, name: str) -> None:
    """Raise RegionSize for what is too small to be a region at all."""
    if size < MIN_SIZE:
        raise RegionSize(f"{name}: {size} bytes are too small; a region has 1 MiB or more")


def map_descriptor(
    descriptor: int, length: int, offset: int, *, path: Path, readonly: bool, access: int
) -> Memory:
    """Map and close `descriptor`; raises a RegionError."""
    refuse_small(length, shown(path))
    try:
        return Memory(descriptor, length, offset, writable=not readonly, access=access)
    except ValueError as error:
        raise RegionSize(f"{shown(path)}: {error}") from None
    except OSError as error:
        raise _cannot_map(error, path, length) from None
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _cannot_map(error: OSError, path: Path, length: int) -> RegionError:
    name = shown(path)
    match error.errno:
        case errno.ENODEV | errno.ENOSYS | errno.EOPNOTSUPP:
            return RegionUnfit(f"{name}: cannot be mapped into memory; use a file in /dev/shm")
        case errno.ENOMEM:
            return RegionError(
                f"{name}: not enough memory for {readable_size(length)}; use a "
                "smaller region, or for hugetlbfs raise /proc/sys/vm/nr_hugepages"
            )
        case errno.EINVAL | errno.EOVERFLOW:
            return RegionSize(
                f"{name}: {readable_size(length)} cannot be mapped there; check offset and size"
            )
        case errno.EACCES | errno.EPERM:
            return translate(error, path)
    reason = os.strerror(error.errno or errno.EIO)
    return RegionError(f"{name}: cannot be mapped ({reason}); see: ivshmemfs list")


def kind_of(mode: int) -> str:
    """What a file is, for messages about what it should not be."""
    for check, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if check(mode):
            return name
    return "neither file nor device"
