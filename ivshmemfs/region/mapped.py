"""An open region, and the steps that all ways of opening one share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ivshmemfs.errors import RegionDenied, RegionError, RegionMissing, RegionSize, RegionUnfit
from ivshmemfs.native import DEVICE, NORMAL, WRITE_COMBINING, Memory
from ivshmemfs.printing import printable
from ivshmemfs.region.condition import Anchor, Condition
from ivshmemfs.region.sizes import readable_size

SHORT = 256 << 10  # free bytes below which a file system counts as full
_F_SEAL_FUTURE_WRITE = 16  # fcntl has it from Python 3.12 on
MIN_SIZE = 4096  # smallest mapping in bytes, one page; the format needs more
ANSWER_SECONDS = 5.0  # longest stat(2) of a path; a running file server answers sooner
ACCESS_NAMES = {NORMAL: "cached", DEVICE: "device memory", WRITE_COMBINING: "write-combining"}


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path in a form that one line of a message can show."""
    return printable(os.fspath(path))


@dataclass(frozen=True)
class Region:
    """Mapped shared memory.  After `close` any access raises ValueError."""

    memory: Memory
    spec: str  # canonical text that opens the same region again
    path: Path  # the file or device that is mapped
    kind: str  # as messages name it: file, PCI device, ...
    anchor: Anchor | None = None  # the mapped file or device, if it has a path of its own
    start: int | None = 0  # where mmap(2) of `path` finds the region, in bytes; None: nowhere
    device: int | None = None  # descriptor of a VFIO device, which one process may open once

    @property
    def size(self) -> int:
        """Size in bytes."""
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

    def shortage(self) -> str:
        """Return the message if a full file system made an access fail, else "".

        A sparse file gets its memory at the first access.  On a full file system that access ends
        in SIGBUS.
        """
        if self.kind != "file" or self.anchor is None:
            return ""
        try:
            cut, behind = self.anchor.is_cut, self.anchor.file_system()
        except OSError:
            return ""
        total, free = (n * behind.f_frsize for n in (behind.f_blocks, behind.f_bfree))
        if cut or not total or free >= SHORT:
            return ""
        return (
            f"the file system of {shown(self.path)} is full ({readable_size(total)} in all), so "
            "the file gets no more memory: make room there"
        )

    def descriptor(self) -> int:
        """Return a new descriptor of what is mapped; mmap(2) finds the region there at `start`.

        It is of the same file, also when another one has taken its path.  Raises OSError: ENODEV
        where mmap(2) finds the region nowhere, and what opening a device raises.
        """
        if self.start is None:
            raise OSError(errno.ENODEV, "a device behind vfio has no file to map", str(self.path))
        if self.anchor is not None:
            return self.anchor.duplicate()
        access = os.O_RDONLY if self.readonly else os.O_RDWR
        return os.open(self.path, access | os.O_CLOEXEC)

    @property
    def is_cut(self) -> bool:
        """Whether the file is shorter than it was when it was opened; looks at no path."""
        return self.anchor is not None and self.anchor.is_cut

    def condition(self) -> Condition:
        """Return what happened to the file or device since it was opened."""
        return Condition.SOUND if self.anchor is None else self.anchor.condition(self.path)

    def close(self) -> None:
        """Unmap; closing twice is harmless."""
        closed = self.memory.closed
        self.memory.close()
        if self.anchor is not None:
            self.anchor.close()
        if self.device is not None and not closed:
            os.close(self.device)

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
    """Return the RegionError for an OSError about `path`, with what to do."""
    name, reason = shown(path), os.strerror(error.errno or errno.EIO)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ENXIO | errno.ENODEV:
            return RegionMissing(f"{name}: no such file or device; see: ivshmemfs list")
        case errno.EACCES | errno.EPERM:
            return RegionDenied(
                f"{name}: permission denied; run as root, or give this user access to it"
            )
        case errno.EROFS:
            return RegionDenied(
                f"{name}: its file system is read-only; mounted with -o ro, the region can be read"
            )
        case errno.EBUSY | errno.ETXTBSY:
            return RegionError(f"{name}: in use by a driver or program; release it first")
        case errno.EISDIR:
            return RegionError(f"{name}: is a directory; name a file or character device")
    return RegionError(f"{name}: cannot be opened ({reason}); see: ivshmemfs list")


def refuse_hung(path: str) -> None:
    """Raise RegionError when stat(2) of `path` hangs because its file system's server is stopped.

    A thread makes the call; the kernel ends it together with the process.  A main thread that hangs
    there could not even handle a signal.
    """

    def look() -> None:
        with contextlib.suppress(OSError, ValueError):
            os.stat(path)

    thread = threading.Thread(target=look, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a limit on threads or memory: rather risk a wait than refuse
        return
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        raise RegionError(
            f"{shown(path)}: the file system there does not answer within {ANSWER_SECONDS:.0f} s: "
            "its server is stopped or hangs; see: ivshmemfs list"
        )


def look_at(path: Path) -> os.stat_result:
    """Return stat(2) of a path, following links; raises a RegionError."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise translate(error if isinstance(error, OSError) else OSError(2, ""), path) from None


def open_descriptor(path: Path, *, readonly: bool, extra_flags: int = 0) -> int:
    """Open a file or device and return the descriptor; raises a RegionError."""
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | extra_flags
    try:
        return os.open(path, flags)
    except OSError as error:
        if not readonly and error.errno in (errno.EACCES, errno.EPERM) and _may_read(path):
            raise RegionDenied(_unwritable(error, path)) from None
        raise translate(error, path) from None


def _may_read(path: Path) -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        return True
    return False


def _unwritable(error: OSError, path: Path) -> str:
    """Return the message for a file that this user may only read."""
    if error.errno == errno.EPERM:
        return (
            f"{shown(path)}: must not be written (lsattr shows 'i' or 'a'? 'chattr -i -a' takes "
            "them away); mounted with -o ro, the region can be read"
        )
    return (
        f"{shown(path)}: this user may only read it; mount it with -o ro, run as root, or give "
        "this user access to it"
    )


def refuse_small(size: int, name: str) -> None:
    """Raise RegionSize if `size` bytes are too small for any region."""
    if size < MIN_SIZE:
        raise RegionSize(f"{name}: {size} bytes are too small; a region has 1 MiB or more")


def map_descriptor(
    descriptor: int,
    length: int,
    offset: int,
    *,
    path: Path,
    readonly: bool,
    access: int,
    device: bool = False,
) -> tuple[Memory, Anchor]:
    """Map and close `descriptor`, which is of a file in sysfs if `device`; raises a RegionError."""
    try:
        refuse_small(length, shown(path))
        memory = Memory(descriptor, length, offset, writable=not readonly, access=access)
        return memory, Anchor(descriptor, length, device=device)
    except ValueError as error:
        raise RegionSize(f"{shown(path)}: {error}") from None
    except OSError as error:
        if error.errno == errno.EPERM and (sealed := _sealed(descriptor)):
            raise RegionDenied(
                f"{shown(path)}: is sealed against writing ({sealed}); mount it with -o ro"
            ) from None
        raise _cannot_map(error, path, length) from None
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _sealed(descriptor: int) -> str:
    """Return the seals of a memfd that forbid a writable mapping."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return ""
    names = {fcntl.F_SEAL_WRITE: "F_SEAL_WRITE", _F_SEAL_FUTURE_WRITE: "F_SEAL_FUTURE_WRITE"}
    return ", ".join(name for seal, name in names.items() if seals & seal)


def _cannot_map(error: OSError, path: Path, length: int) -> RegionError:
    name = shown(path)
    match error.errno:
        case errno.ENODEV | errno.ENOSYS | errno.EOPNOTSUPP:
            return RegionUnfit(f"{name}: cannot be mapped into memory; use a file in /dev/shm")
        case errno.ENOMEM:
            return RegionError(
                f"{name}: not enough memory for {readable_size(length)}; use a smaller region, "
                "raise 'ulimit -v', or for hugetlbfs /proc/sys/vm/nr_hugepages"
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
    """Return a phrase for a file of the wrong kind."""
    for check, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if check(mode):
            return name
    return "neither file nor device"
