"""Regions in regular files: tmpfs, hugetlbfs, or any filesystem that maps files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from pathlib import Path

from ivshmemfs.errors import RegionError, RegionMissing, RegionSize
from ivshmemfs.native import NORMAL
from ivshmemfs.region.mapped import (
    Region,
    kind_of,
    look_at,
    map_descriptor,
    open_descriptor,
    shown,
    translate,
)
from ivshmemfs.region.sizes import readable_size


def open_file(path: Path, *, readonly: bool = False) -> Region:
    """Map a whole regular file, exactly to its end; raises a RegionError."""
    try:
        mode = look_at(path).st_mode
    except RegionMissing:
        raise RegionMissing(
            f"{shown(path)}: no such file; create it with: mkfs.ivshmemfs --size 1M {shown(path)}"
        ) from None
    if not stat.S_ISREG(mode):
        raise RegionError(f"{shown(path)}: is {kind_of(mode)}; name a file or character device")
    descriptor = open_descriptor(path, readonly=readonly)
    size = os.fstat(descriptor).st_size
    if size == 0:
        os.close(descriptor)
        raise RegionSize(
            f"{shown(path)}: is an empty file, and a region has 1 MiB or more; is it the right one?"
        )
    memory, anchor = map_descriptor(
        descriptor, size, 0, path=path, readonly=readonly, access=NORMAL
    )
    whole = path.absolute()
    return Region(memory=memory, spec=str(whole), path=whole, kind="file", anchor=anchor)


def create_file(path: str | os.PathLike[str], size: int, *, exist_ok: bool = False) -> None:
    """Make a file of `size` bytes, sparse and readable by its owner and group alone.

    Raises RegionError for an existing file unless `exist_ok`; then the file gets the size and keeps
    its contents up to there.  A new file that cannot get its size is removed again.
    """
    target = Path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    created = True
    try:
        descriptor = os.open(target, flags | os.O_EXCL, 0o660)
    except FileExistsError:
        if not exist_ok:
            raise RegionError(
                f"{shown(target)}: exists already; leave out --size to format it as it is, or use "
                "--force to overwrite it"
            ) from None
        created, descriptor = False, open_descriptor(target, readonly=False)
    except OSError as error:
        raise _cannot_create(error, target) from None
    try:
        _set_size(descriptor, target, size)
    except RegionError:
        if created:
            with contextlib.suppress(OSError):
                target.unlink()
        raise
    finally:
        os.close(descriptor)


def reserve(region: Region) -> None:
    """Allocate all the memory of a file, so no later access finds its file system full.

    The contents stay.  Raises RegionSize, with both sizes, when the memory does not fit.
    """
    if region.kind != "file":
        return
    descriptor = open_descriptor(region.path, readonly=False)
    try:
        behind = os.fstatvfs(descriptor)
        refuse_tight(behind, region.path, region.size, os.fstat(descriptor).st_blocks * 512)
        os.posix_fallocate(descriptor, 0, region.size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            raise translate(error, region.path) from None
        raise _too_large(os.fstatvfs(descriptor), region.path, region.size) from None
    finally:
        os.close(descriptor)


def refuse_tight(behind: os.statvfs_result, path: Path, size: int, has: int = 0) -> None:
    """Raise RegionSize unless a file of `size` bytes fits on the file system `behind` it.

    `has` is the number of bytes that the file takes already.
    """
    free = behind.f_bfree if os.geteuid() == 0 else behind.f_bavail
    if behind.f_blocks and size - has > free * behind.f_frsize:
        raise _too_large(behind, path, size)


def cramped(region: Region) -> str:
    """Return a warning when the file system of a region's file is smaller than the file, or ""."""
    if region.kind != "file":
        return ""
    behind = os.statvfs(region.path)
    total = behind.f_blocks * behind.f_frsize
    if not behind.f_blocks or total >= region.size:
        return ""
    return (
        f"{shown(region.path)} has {readable_size(region.size)}, and its file system has only "
        f"{readable_size(total)}: writes fail when that is full; "
        f"'mount -o remount,size={region.size * 2 >> 20}M {shown(_mount_of(region.path))}' "
        "makes a tmpfs larger"
    )


def _mount_of(path: Path) -> Path:
    """Return the mount point that `path` is below."""
    return next(parent for parent in path.parents if os.path.ismount(parent))


def _too_large(behind: os.statvfs_result, path: Path, size: int) -> RegionSize:
    total, free = (n * behind.f_frsize for n in (behind.f_blocks, behind.f_bfree))
    return RegionSize(
        f"{shown(path)}: {readable_size(size)} do not fit there; the file system "
        f"has {readable_size(total)}, of which {readable_size(free)} are free: make room or use a "
        "smaller size (--sparse takes memory only where it is written to)"
    )


def _cannot_create(error: OSError, target: Path) -> RegionError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return RegionMissing(f"{shown(target.parent)}: no such directory; create it first")
    return translate(error, target)


def _set_size(descriptor: int, target: Path, size: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise RegionError(f"{shown(target)}: is not a regular file; leave out --size")
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno == errno.EINVAL:
            unit = os.fstatvfs(descriptor).f_bsize
            raise RegionSize(
                f"{shown(target)}: cannot have {size} bytes there; use a multiple of "
                f"{readable_size(unit)}"
            ) from None
        if error.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
            limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            raised = ", or raise 'ulimit -f'" if 0 <= limit < size else ""
            raise RegionSize(
                f"{shown(target)}: {readable_size(size)} do not fit there; use a smaller size"
                + raised
            ) from None
        raise translate(error, target) from None
