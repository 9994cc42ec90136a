"""A test double of the engine: one tree in private memory, and faults on demand.

It has the interface of `ivshmemfs.engine.Filesystem` as far as `fuse/` uses it.  So the front ends
and the daemon can be tested without a region, and with errors that the engine never has.

Faults come from a file, because the double runs in the daemon's process and the test in another.
Each line is `<operation> <exception> <count>`.  The double raises the exception in that many calls
of the operation, and then does what it should.  See `EXCEPTIONS` for the names.

Run as a program it serves a mount: `fake_engine.py [-f] [-o OPTIONS] [--faults FILE] MOUNTPOINT`.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ivshmemfs.engine import NOW, ROOT_INO, Attr, Context, StatFs, acl
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.errors import Busy, Corrupt, FsError, IvshmemfsError, Unfinished
from ivshmemfs.format.dirent import TYPE_SHIFT
from ivshmemfs.region import Condition

BLOCK = 4096
NAME_MAX = 255
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
XATTR_CREATE = 1
XATTR_REPLACE = 2

EXCEPTIONS: dict[str, Callable[[], Exception]] = {
    "OSError": lambda: OSError(errno.ENOTUNIQ, "injected"),
    "struct.error": lambda: struct.error("injected"),
    "KeyError": lambda: KeyError("injected"),
    "MemoryError": lambda: MemoryError("injected"),
    "Busy": lambda: Busy("injected"),
    "Unfinished": lambda: Unfinished("injected"),
    "Corrupt": lambda: Corrupt("injected: block 7 is torn"),
    "FsError": lambda: FsError(errno.EXDEV, "injected"),
    "zero": lambda: FsError(0, "injected: no error at all"),
    "negative": lambda: FsError(-5, "injected: negative"),
    "ValueError": lambda: ValueError("injected"),
}


@dataclass
class Inode:
    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    nlink: int = 1
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, int] = field(default_factory=dict)
    parent: int = ROOT_INO
    times: list[int] = field(default_factory=lambda: [time.time_ns()] * 3)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    opens: int = 0

    def attr(self) -> Attr:
        size = len(self.data)
        blocks = (size + 511) // 512
        return Attr(
            self.number, self.mode, self.nlink, self.uid, self.gid, self.rdev, size, blocks,
            *self.times,
        )  # fmt: skip


@dataclass
class FakeHandle:
    ino: int
    flags: int = 0
    #: For a directory: its names when reading began, so that cookies stay valid under change.
    snapshot: list[bytes] | None = None


class FakeFilesystem:
    """See the module's comment."""

    bells = None
    is_committing = False
    shares_locks = False
    region = SimpleNamespace(condition=lambda: Condition.SOUND, is_cut=False)

    def __init__(self, faults: str | None = None, *, readonly: bool = False) -> None:
        self._faults = faults
        self._next = ROOT_INO + 1
        self._inodes = {ROOT_INO: Inode(ROOT_INO, stat.S_IFDIR | 0o755, nlink=2)}
        self._inodes[ROOT_INO].uid = os.getuid()
        self._readonly = readonly
        self.ticks = 0

    def __getattribute__(self, name: str) -> Any:
        """Every public method first looks whether it is to fail."""
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and callable(value):
            object.__getattribute__(self, "_maybe_fail")(name)
        return value

    def _maybe_fail(self, operation: str) -> None:
        if self._faults is None or not os.path.exists(self._faults):
            return
        with open(self._faults, encoding="ascii") as file:
            lines = [line.split() for line in file]
        for line in lines:
            if line[0] in (operation, "*") and int(line[2]) > 0:
                line[2] = str(int(line[2]) - 1)
                with open(self._faults + ".new", "w", encoding="ascii") as file:
                    file.writelines(" ".join(parts) + "\n" for parts in lines)
                os.replace(self._faults + ".new", self._faults)
                raise EXCEPTIONS[line[1]]()

    # --- helpers ---

    def _inode(self, ino: int) -> Inode:
        try:
            return self._inodes[ino]
        except KeyError:
            raise FsError(errno.ESTALE) from None

    def _find(self, parent: int, name: bytes) -> Inode:
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG)
        try:
            return self._inode(self._inode(parent).entries[name])
        except KeyError:
            raise FsError(errno.ENOENT) from None

    def _new(self, parent: int, name: bytes, mode: int, ctx: Context, rdev: int = 0) -> Inode:
        directory = self._inode(parent)
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG)
        if name in directory.entries:
            raise FsError(errno.EEXIST)
        inode = Inode(self._next, mode & ~ctx.umask, ctx.uid, ctx.gid, rdev, parent=parent)
        self._next += 1
        self._inodes[inode.number] = inode
        directory.entries[name] = inode.number
        directory.times[1] = directory.times[2] = time.time_ns()
        return inode

    def _drop(self, inode: Inode) -> None:
        if inode.nlink <= 0 and inode.opens == 0:
            self._inodes.pop(inode.number, None)

    # --- names ---

    def find(self, parent: int, name: bytes) -> Attr | None:
        try:
            return self._find(parent, name).attr()
        except FsError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def unattended(self, call: Callable[[], Any]) -> Any:
        return call()

    def names_lead_to(self, ino: int, places: Collection[tuple[int, bytes]]) -> bool:
        return all(self._inode(parent).entries.get(name) == ino for parent, name in places)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Context) -> Attr:
        return self._new(parent, name, mode, ctx, rdev).attr()

    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Context) -> Attr:
        inode = self._new(parent, name, stat.S_IFDIR | (mode & 0o7777), ctx)
        inode.nlink = 2
        self._inode(parent).nlink += 1
        return inode.attr()

    def symlink(self, parent: int, name: bytes, target: bytes, ctx: Context) -> Attr:
        inode = self._new(parent, name, stat.S_IFLNK | 0o777, ctx)
        inode.data[:] = target
        return inode.attr()

    def readlink(self, ino: int) -> bytes:
        return bytes(self._inode(ino).data)

    def link(self, ino: int, parent: int, name: bytes, ctx: Context) -> Attr:
        directory, inode = self._inode(parent), self._inode(ino)
        if name in directory.entries:
            raise FsError(errno.EEXIST)
        directory.entries[name] = ino
        inode.nlink += 1
        return inode.attr()

    def unlink(self, parent: int, name: bytes, ctx: Context) -> None:
        inode = self._find(parent, name)
        del self._inode(parent).entries[name]
        inode.nlink -= 1
        self._drop(inode)

    def rmdir(self, parent: int, name: bytes, ctx: Context) -> None:
        inode = self._find(parent, name)
        if inode.entries:
            raise FsError(errno.ENOTEMPTY)
        del self._inode(parent).entries[name]
        self._inode(parent).nlink -= 1
        inode.nlink = 0
        self._drop(inode)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Context
    ) -> tuple[int, int]:
        inode = self._find(parent, name)
        source, target = self._inode(parent).entries, self._inode(new_parent).entries
        if flags & RENAME_EXCHANGE:
            other = self._find(new_parent, new_name)
            source[name], target[new_name] = other.number, inode.number
            return inode.number, other.number
        if flags & RENAME_NOREPLACE and new_name in target:
            raise FsError(errno.EEXIST)
        replaced = target.get(new_name)
        del source[name]
        target[new_name] = inode.number
        if replaced is not None and replaced != inode.number:
            old = self._inode(replaced)
            old.nlink = 0 if stat.S_ISDIR(old.mode) else old.nlink - 1
            self._drop(old)
        return inode.number, 0

    # --- attributes ---

    def getattr(self, ino: int) -> Attr:
        return self._inode(ino).attr()

    def lookup_number(self, ino: int) -> Attr:
        return self.getattr(ino)

    def setattr(
        self,
        ino: int,
        ctx: Context,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        kept: int | None = None,
    ) -> Attr:
        inode = self._inode(ino)
        if mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | mode & 0o7777
        if kept is not None:
            inode.mode &= kept | ~0o6000
        if uid is not None:
            inode.uid = uid
        if gid is not None:
            inode.gid = gid
        if size is not None:
            del inode.data[size:]
            inode.data.extend(bytes(size - len(inode.data)))
            inode.times[1] = time.time_ns()
        if atime_ns is not None:
            inode.times[0] = time.time_ns() if atime_ns == NOW else atime_ns
        if mtime_ns is not None:
            inode.times[1] = time.time_ns() if mtime_ns == NOW else mtime_ns
        inode.times[2] = time.time_ns()
        return inode.attr()

    def statfs(self) -> StatFs:
        return StatFs(BLOCK, 1000, 600, 500, 2000, 1500, NAME_MAX)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        try:
            return self._inode(ino).xattrs[name]
        except KeyError:
            raise FsError(errno.ENODATA) from None

    def access_list(self, ino: int) -> list[acl.Entry]:
        return []

    def setxattr(
        self,
        ino: int,
        name: bytes,
        value: bytes,
        flags: int,
        ctx: Context,
        *,
        clears_set_group_id: bool | None = None,
    ) -> None:
        xattrs = self._inode(ino).xattrs
        xattrs[b"user.flags-of-the-last-setxattr"] = str(flags).encode()
        self.clears_set_group_id = clears_set_group_id
        if flags & XATTR_CREATE and name in xattrs:
            raise FsError(errno.EEXIST)
        if flags & XATTR_REPLACE and name not in xattrs:
            raise FsError(errno.ENODATA)
        xattrs[name] = value

    def forget(self, ino: int) -> None:
        pass

    def listxattr(self, ino: int, ctx: Context | None = None) -> list[bytes]:
        return list(self._inode(ino).xattrs)

    def removexattr(self, ino: int, name: bytes, ctx: Context) -> None:
        if self._inode(ino).xattrs.pop(name, None) is None:
            raise FsError(errno.ENODATA)

    # --- files ---

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Context
    ) -> tuple[FakeHandle, Attr]:
        if name in self._inode(parent).entries:
            if flags & os.O_EXCL:
                raise FsError(errno.EEXIST)
            inode = self._find(parent, name)
        else:
            inode = self._new(parent, name, stat.S_IFREG | mode & 0o7777, ctx)
        return self._open(inode, flags), inode.attr()

    def open(self, ino: int, flags: int, ctx: Context) -> FakeHandle:
        return self._open(self._inode(ino), flags)

    def _open(self, inode: Inode, flags: int) -> FakeHandle:
        if flags & os.O_TRUNC:
            inode.data.clear()
        inode.opens += 1
        return FakeHandle(inode.number, flags)

    def read(
        self, handle: FakeHandle, offset: int, length: int, _into: memoryview | None = None
    ) -> memoryview:
        data = self._inode(handle.ino).data
        return memoryview(bytes(data[offset : offset + length]))

    def write(
        self,
        handle: FakeHandle,
        offset: int,
        data: bytes,
        *,
        append: bool | None = None,
        ctx: Context | None = None,
    ) -> int:
        inode = self._inode(handle.ino)
        if handle.flags & os.O_APPEND if append is None else append:
            offset = len(inode.data)
        if offset > len(inode.data):
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(data)] = data
        inode.times[1] = inode.times[2] = time.time_ns()
        return len(data)

    def tmpfile(self, parent: int, mode: int, flags: int, ctx: Context) -> tuple[FakeHandle, Attr]:
        raise FsError(errno.EOPNOTSUPP)

    def birth_time(self, ino: int) -> int:
        return self._inode(ino).times[0]

    def seek(self, handle: FakeHandle, offset: int, whence: int) -> int:
        size = len(self._inode(handle.ino).data)
        if offset >= size:
            raise FsError(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else size

    def fallocate(
        self, handle: FakeHandle, mode: int, offset: int, length: int, ctx: Context
    ) -> None:
        data = self._inode(handle.ino).data
        data.extend(bytes(max(offset + length - len(data), 0)))

    def fsync(self, handle: FakeHandle) -> None:
        self._inode(handle.ino)

    def release(self, handle: FakeHandle) -> None:
        inode = self._inode(handle.ino)
        inode.opens -= 1
        self._drop(inode)

    # --- directories ---

    def opendir(self, ino: int) -> FakeHandle:
        self._inode(ino).opens += 1
        return FakeHandle(ino)

    def _listed(self, handle: FakeHandle, cookie: int) -> Iterator[tuple[bytes, Attr, int]]:
        directory = self._inode(handle.ino)
        if cookie == 0 or handle.snapshot is None:
            handle.snapshot = list(directory.entries)
        names = [b".", b"..", *handle.snapshot]
        for position in range(cookie, len(names)):
            self._maybe_fail("readdir-entry")
            name = names[position]
            if position == 0:
                yield name, directory.attr(), 1
            elif position == 1:
                yield name, self._inode(directory.parent).attr(), 2
            elif name in directory.entries:
                yield name, self._inode(directory.entries[name]).attr(), position + 1

    def entries(self, handle: FakeHandle, cookie: int, _looks: int) -> Iterator[list[Dirent]]:
        for name, attr, following in self._listed(handle, cookie):
            yield [Dirent(following, attr.ino | attr.mode >> 12 << TYPE_SHIFT, name)]

    def releasedir(self, handle: FakeHandle) -> None:
        self.release(handle)

    def commit_word(self) -> int:
        return 0

    def look(self, _reader: Callable[[Any], dict[int, Any]]) -> dict[int, Any]:
        return {}  # nothing of an inode block: its files are never watched

    def condition(self, found: Condition | None = None) -> Condition:
        return found or Condition.SOUND

    def name_mount_point(self, path: bytes) -> None:
        pass

    def tick(self) -> bool:
        self.ticks += 1
        # Shown as an attribute of the root, so that a test can see that upkeep goes on.
        self._inodes[ROOT_INO].xattrs[b"user.ticks"] = str(self.ticks).encode()
        return True

    def work(self) -> bool:
        return False

    def unmount(self) -> None:
        if self._faults is not None:
            with open(self._faults + ".left", "w", encoding="ascii") as file:
                file.write("left")


def main(arguments: list[str]) -> int:
    """Serve one tree; exit codes and messages as the commands have them."""
    from ivshmemfs.fuse import daemon, options, retry

    retry.PATIENCE = float(os.environ.get("FAKE_PATIENCE", retry.PATIENCE))

    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("-o", action="append", default=[])
    parser.add_argument("-f", action="store_true")
    parser.add_argument("--faults")
    parser.add_argument("--source", default="fake")
    chosen = parser.parse_args(arguments)

    @contextmanager
    def attach() -> Iterator[Any]:
        fs = FakeFilesystem(chosen.faults)
        fs_attach = EXCEPTIONS.get(os.environ.get("FAKE_ATTACH", ""))
        if fs_attach is not None:
            raise fs_attach()
        if os.environ.get("FAKE_ATTACH") == "die":
            os.abort()
        try:
            yield daemon.Attached(fs, chosen.source, os.environ.get("FAKE_NOTICE", ""))  # type: ignore[arg-type]
        finally:
            fs.unmount()

    try:
        notice = daemon.mount(
            attach, chosen.mountpoint, options.parse(chosen.o), foreground=chosen.f
        )
        print(notice, end="")
    except IvshmemfsError as error:
        print(f"fake: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
