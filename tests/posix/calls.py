"""System calls by name, for tests that make the same calls in two places and compare.

What a call did is told as plain data: ``None`` or a value when it succeeded, an `Errno` when it
failed.  Paths are relative to the current directory, so that the same words mean the same in both
places.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

#: One system call: its name below and its arguments.
Call = tuple[Any, ...]

AT_FDCWD, AT_SYMLINK_NOFOLLOW = -100, 0x100
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
#: A device that no driver serves, so that opening it fails in the same way everywhere.
NO_DEVICE = os.makedev(250, 250)

_libc = ctypes.CDLL(None, use_errno=True)


class Errno(NamedTuple):
    """A failed call."""

    name: str


def outcome(call: Call) -> Any:
    """Make a call; what came of it."""
    name, *arguments = call
    try:
        return CALLS[name](*arguments)
    except OSError as error:
        return Errno(errno.errorcode.get(error.errno or 0, str(error)))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _open(path: str, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(path, flags, mode))


def _with(path: str, flags: int, call: Callable[[int], Any]) -> Any:
    fd = os.open(path, flags)
    try:
        return call(fd)
    finally:
        os.close(fd)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path)


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)


def _rename2(old: str, new: str, flags: int) -> None:
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def _link(old: str, new: str, follow: bool = False) -> None:
    flag = 0x400 if follow else 0
    _checked(_libc.linkat(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag))


def _utimens(path: str, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    spec = (ctypes.c_long * 4)(*atime, *mtime)
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), spec, flags))


def _write_new(path: str, content: bytes, mode: int = 0o644) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    os.write(fd, content)
    os.close(fd)


def _stat(path: str, follow: bool = True) -> tuple[int, ...]:
    found = os.stat(path, follow_symlinks=follow)
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev


def _fchmodat(path: str, mode: int) -> None:
    _checked(_libc.fchmodat(AT_FDCWD, os.fsencode(path), mode, AT_SYMLINK_NOFOLLOW))


def _access(path: str, mode: int, effective: bool = True) -> bool:
    return os.access(path, mode, effective_ids=effective)


def _under(mask: int, call: Call) -> Any:
    before = os.umask(mask)
    try:
        return CALLS[call[0]](*call[1:])
    finally:
        os.umask(before)


def _all(*calls: Call) -> list[Any]:
    return [outcome(call) for call in calls]


def _visit(path: str) -> None:
    back = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path)
        os.fchdir(back)
    finally:
        os.close(back)


CALLS: dict[str, Callable[..., Any]] = {
    "access": _access,
    "all": _all,
    "append": lambda path, data: _with(
        path, os.O_WRONLY | os.O_APPEND, lambda f: os.write(f, data)
    ),
    "chdir": _visit,
    "chmod": lambda path, mode: os.chmod(path, mode),
    "chown": lambda path, uid, gid: os.chown(path, uid, gid),
    "connect": _connect,
    "fchmod": lambda path, mode: _with(path, os.O_RDONLY, lambda f: os.fchmod(f, mode)),
    "fchmodat": _fchmodat,
    "fchown": lambda path, uid, gid: _with(path, os.O_RDONLY, lambda f: os.fchown(f, uid, gid)),
    "ftruncate": lambda path, size: _with(path, os.O_RDWR, lambda f: os.ftruncate(f, size)),
    "getxattr": lambda path, name: os.getxattr(path, name, follow_symlinks=False),
    "lchown": lambda path, uid, gid: os.lchown(path, uid, gid),
    "link": _link,
    "listdir": lambda path: sorted(os.listdir(path)),
    "listxattr": lambda path: sorted(os.listxattr(path, follow_symlinks=False)),
    "lstat": lambda path: _stat(path, follow=False),
    "mkdir": lambda path, mode=0o755: os.mkdir(path, mode),
    "mkfifo": lambda path, mode=0o644: os.mkfifo(path, mode),
    "mknod": lambda path, mode, device=0: os.mknod(path, mode, device),
    "open": _open,
    "pwrite": lambda path, data, at: _with(path, os.O_WRONLY, lambda f: os.pwrite(f, data, at)),
    "read": lambda path: _with(path, os.O_RDONLY, lambda f: os.read(f, 100)),
    "readlink": os.readlink,
    "removexattr": lambda path, name: os.removexattr(path, name, follow_symlinks=False),
    "rename": os.rename,
    "rename2": _rename2,
    "rmdir": os.rmdir,
    "setxattr": lambda path, name, value, flags=0: os.setxattr(
        path, name, value, flags, follow_symlinks=False
    ),
    "socket": _socket,
    "stat": _stat,
    "statvfs": lambda path: os.statvfs(path).f_namemax,
    "symlink": os.symlink,
    "truncate": os.truncate,
    "umask": _under,
    "unlink": os.unlink,
    "utimens": _utimens,
    "write_new": _write_new,
}


# --- calls of descriptors, which stay open from one batch to the next -----------------------------

_opened: dict[tuple[str, int], int] = {}
_folder = ""


def _fd(slot: int) -> int:
    try:
        return _opened[_folder, slot]
    except KeyError:
        raise OSError(errno.EBADF, "not open here") from None


def _stream(slot: int) -> int:
    """The descriptor of a slot, unless it is a fifo's: those meet within one mount only."""
    fd = _fd(slot)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise OSError(errno.ESPIPE, "not tried")
    return fd


def _keep(slot: int, path: str, flags: int, mode: int) -> None:
    if (_folder, slot) in _opened:
        os.close(_opened.pop((_folder, slot)))
    fd = os.open(path, flags, mode)
    if flags & os.O_ACCMODE == os.O_WRONLY and stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)  # there is a reader, but it may be on another mount
        raise OSError(errno.ENXIO, "not tried")
    _opened[_folder, slot] = fd


def _close(slot: int) -> None:
    os.close(_fd(slot))
    del _opened[_folder, slot]


def _fstat(slot: int) -> tuple[Any, ...]:
    found = os.fstat(_fd(slot))
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    times = (_shown(found.st_atime_ns), _shown(found.st_mtime_ns))
    if stat.S_ISFIFO(found.st_mode):
        times = ("", "")  # documented: what goes through a fifo does not count
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev, times


def _shown(moment: int) -> int | str:
    """A time that was set by a test (to long ago), or one that the clock gave."""
    return moment if moment < 10**18 else "now"


def _futimens(slot: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    spec = (ctypes.c_long * 4)(*atime, *mtime)
    _checked(_libc.futimens(_fd(slot), spec))


def _link_open(slot: int, new: str) -> None:
    old = os.fsencode(f"/proc/self/fd/{_fd(slot)}")
    _checked(_libc.linkat(AT_FDCWD, old, AT_FDCWD, os.fsencode(new), 0x400))


def _copy_range(source: int, at: int, to: int, where: int, length: int) -> int:
    return os.copy_file_range(_fd(source), _fd(to), length, at, where)


def _seek(slot: int, offset: int, whence: int) -> int | None:
    """In a file; offsets in a directory have no meaning for callers."""
    fd = _fd(slot)
    return os.lseek(fd, offset, whence) if stat.S_ISREG(os.fstat(fd).st_mode) else None


def _fallocate(slot: int, mode: int, offset: int, length: int) -> None:
    _checked(_libc.fallocate(_fd(slot), mode, ctypes.c_long(offset), ctypes.c_long(length)))


def _append_from_now(slot: int) -> None:
    flags = fcntl.fcntl(_fd(slot), fcntl.F_GETFL)
    fcntl.fcntl(_fd(slot), fcntl.F_SETFL, flags | os.O_APPEND)


def _mapped(slot: int, offset: int, length: int) -> bytes:
    found = os.fstat(_fd(slot))
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    if not size:
        return b""
    with mmap.mmap(_fd(slot), size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        return mapping[offset : offset + length]


CALLS |= {
    "f keep": _keep,
    "f close": _close,
    "f append": _append_from_now,
    "f chmod": lambda slot, mode: os.fchmod(_fd(slot), mode),
    "f chown": lambda slot, uid, gid: os.fchown(_fd(slot), uid, gid),
    "f copy": _copy_range,
    "f fallocate": _fallocate,
    "f link": _link_open,
    "f list": lambda slot: sorted(os.listdir(_fd(slot))),
    "f map": _mapped,
    "f pread": lambda slot, length, at: os.pread(_fd(slot), length, at),
    "f pwrite": lambda slot, data, at: os.pwrite(_fd(slot), data, at),
    "f pwrite to end": lambda slot, data: os.pwritev(_stream(slot), [data], 0, os.RWF_APPEND),
    "f read": lambda slot, length: os.read(_stream(slot), length),
    "f seek": _seek,
    "f setxattr": lambda slot, name, value: os.setxattr(_fd(slot), name, value),
    "f stat": _fstat,
    "f sync": lambda slot: os.fsync(_fd(slot)),
    "f truncate": lambda slot, size: os.ftruncate(_fd(slot), size),
    "f utimens": _futimens,
    "f write": lambda slot, data: os.write(_stream(slot), data),
    "f writev": lambda slot, *parts: os.writev(_stream(slot), parts),
}


def batch(folder: str, calls: Sequence[Call]) -> list[Any]:
    """Make many calls with `folder` as the current directory."""
    global _folder
    try:
        os.chdir(folder)
    except OSError as error:
        return [Errno(errno.errorcode[error.errno or 0])] * len(calls)
    _folder = folder
    try:
        return [outcome(call) for call in calls]
    finally:
        os.chdir("/")
