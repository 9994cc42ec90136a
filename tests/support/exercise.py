"""Every operation of the engine on a region that cannot be trusted, each turn of it bounded.

The bound is the work that the store counts, so it holds on any machine.  What counts no work is
bounded in time, more coarsely.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from tempfile import TemporaryFile
from typing import TypeVar

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.engine.filesystem import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from ivshmemfs.engine.lock_table import Lock
from ivshmemfs.engine.locks import QUEUE_AFTER, Guard, Wait
from ivshmemfs.errors import Busy, Corrupt, FormatError, IvshmemfsError, Unfinished
from ivshmemfs.format.lock import FCNTL, WRITE
from ivshmemfs.region import Region
from ivshmemfs.shm.published import TURN
from tests.support.attacks import of_use
from tests.support.damage import Names
from tests.support.regions import ROOT

T = TypeVar("T")

MOST_WORK = TURN  # of one turn of a request, though it may look several times
MOST_TURNS = 200  # of one operation on so small a region
SLOWEST = 1.0  # seconds of computing that one turn may take, on a machine that is slow
HANGING = 60.0  # seconds on the clock after which it hangs, however busy the machine is
PATIENCE = 0.2  # seconds of Busy after which a caller gives up; less once that was in vain
SLOWEST_REPAIR = 10.0  # seconds of computing
MOST_MEMORY = 200 << 10  # KiB that a whole family of cases may add
FOLDERS, ENTRIES = 40, 1000  # walked at most

#: What a caller may be told: of damage, and what any filesystem tells of what is not there.
TOLERABLE = {
    errno.EIO, errno.EUCLEAN, errno.ESTALE, errno.ENOSPC, errno.ENOENT, errno.EEXIST, errno.EAGAIN,
    errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENODATA, errno.EFBIG,
    errno.EROFS, errno.EMLINK, errno.EUSERS, errno.E2BIG, errno.EPERM, errno.EBUSY,
    errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EACCES, errno.ENXIO, errno.ENODEV,
    errno.ENOLCK, errno.EDEADLK, errno.ETXTBSY,
}  # fmt: skip


#: Modes of fallocate, offsets and lengths.
ALLOCATIONS = (
    (PUNCH_HOLE | KEEP_SIZE, 1000, 3000),
    (PUNCH_HOLE | KEEP_SIZE, 0, 1 << 61),
    (ZERO_RANGE, 5, 1 << 40),
    (0, 0, 20_000),
    (KEEP_SIZE, 1 << 39, 1 << 20),
)


class Ledger:
    """What operations came to."""

    def __init__(self) -> None:
        self.done = 0
        self.refused = 0
        self.slowest = 0.0
        self.most_work = 0
        self.patience = PATIENCE
        self.fs: Filesystem | None = None  # whose work is counted

    def attempt(self, operation: Callable[[], T]) -> T | None:
        """Its result, or None for a tolerable refusal; anything else is a failure."""
        end, turns = time.monotonic() + self.patience, 0
        while True:
            began, computed = time.monotonic(), time.thread_time()
            before = self._work()
            try:
                result = operation()
            except Unfinished as turn:
                operation = turn.go_on or operation  # type: ignore[assignment]
                turns += 1
                assert turns < MOST_TURNS, "one operation goes on and on"
                continue
            except Busy:
                if time.monotonic() < end:
                    time.sleep(0.002)
                    continue
                self.refused += 1
                self.patience /= 2
                return None
            except IvshmemfsError as error:
                if error.errno not in TOLERABLE:
                    raise
                self.refused += 1
                return None
            finally:
                taken, computed = time.monotonic() - began, time.thread_time() - computed
                self.slowest = max(self.slowest, taken)
                work = self._work() - before
                self.most_work = max(self.most_work, work)
                assert work <= MOST_WORK, f"one operation did {work} pieces of work in one turn"
                assert computed < SLOWEST, f"one operation computed for {computed:.1f} s"
                assert taken < HANGING, f"one operation took {taken:.1f} s"
            self.done += 1
            return result

    def _work(self) -> int:
        return self.fs.store.work if self.fs is not None else 0


def walk(fs: Filesystem, ledger: Ledger) -> None:
    """Look at everything that can be reached, and at what is known to have been there."""
    folders, seen = [1], {1}
    for folder in folders:
        found = ledger.attempt(lambda ino=folder: _listed(fs, ino)) or []  # type: ignore[misc]
        for name, ino, mode in found:
            ledger.attempt(lambda at=folder, name=name: fs.lookup(at, name))  # type: ignore[misc]
            if ino in seen:
                continue
            seen.add(ino)
            inspect(fs, ledger, ino)
            if stat.S_ISDIR(mode) and len(folders) < FOLDERS:
                folders.append(ino)
    for ino in (*sorted(known() - seen), 2, 999, 1 << 40, (1 << 56) - 1):
        inspect(fs, ledger, ino)
    ledger.attempt(fs.statfs)


def known() -> set[int]:
    """The inodes of the sample."""
    return {number for number in vars(Names).values() if isinstance(number, int)}


def _listed(fs: Filesystem, ino: int) -> list[tuple[bytes, int, int]]:
    entries = islice(fs.readdir(fs.opendir(ino), 0), ENTRIES)
    return [(name, attr.ino, attr.mode) for name, attr, _ in entries]


def inspect(fs: Filesystem, ledger: Ledger, ino: int) -> None:
    """Attributes, extended attributes and contents of one inode."""
    attr = ledger.attempt(lambda: fs.getattr(ino))
    ledger.attempt(lambda: fs.readlink(ino))
    ledger.attempt(lambda: _listed(fs, ino)[:1])
    for name in ledger.attempt(lambda: fs.listxattr(ino)) or [b"user.none"]:
        ledger.attempt(lambda name=name: fs.getxattr(ino, name))  # type: ignore[misc]
    size = attr.size if attr is not None else 0
    for offset in {0, 4096, max(size - 10, 0), (1 << 62)}:
        ledger.attempt(lambda at=offset: _content(fs, ino, at))  # type: ignore[misc]
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            ledger.attempt(lambda at=offset, how=whence: _sought(fs, ino, at, how))  # type: ignore[misc]
    ledger.attempt(lambda: fs.birth_time(ino))
    ledger.attempt(lambda: fs.lookup_number(ino))
    ledger.attempt(lambda: [entry.key for entry in islice(_named(fs, ino), ENTRIES)])


def _named(fs: Filesystem, ino: int) -> Iterator[Dirent]:
    return chain.from_iterable(fs.entries(fs.opendir(ino), 0))


def _sought(fs: Filesystem, ino: int, offset: int, whence: int) -> int:
    handle = fs.open(ino, os.O_RDONLY, ROOT)
    try:
        return fs.seek(handle, offset, whence)
    finally:
        fs.release(handle)


def _content(fs: Filesystem, ino: int, offset: int) -> int:
    handle = fs.open(ino, os.O_RDONLY, ROOT)
    try:
        return len(fs.read(handle, offset, 256 << 10))
    finally:
        fs.release(handle)


def _stored(fs: Filesystem, ino: int, offset: int, flags: int = os.O_WRONLY) -> None:
    handle = fs.open(ino, flags, ROOT)
    try:
        fs.write(handle, offset, b"written")
    finally:
        fs.release(handle)


def _allocated(fs: Filesystem, ino: int, mode: int, offset: int, length: int) -> None:
    handle = fs.open(ino, os.O_RDWR, ROOT)
    try:
        fs.fallocate(handle, mode, offset, length)
    finally:
        fs.release(handle)


def _copied(fs: Filesystem, ino: int) -> None:
    """As `get`, `put` and copy_file_range do it."""
    handle = fs.open(ino, os.O_RDWR, ROOT)
    try:
        with TemporaryFile() as file:
            fs.read_to(handle, 0, 100_000, file.fileno())
            fs.write_from(handle, 0, 100_000, file.fileno())
        fs.write(handle, 30_000, bytes(fs.read(handle, 5, 70_000)))
    finally:
        fs.release(handle)


def _nameless(fs: Filesystem) -> None:
    handle, attr = fs.tmpfile(1, 0o644, os.O_RDWR, ROOT)
    try:
        fs.write(handle, 0, b"nameless" * 1000)
        fs.link(attr.ino, 1, b"named", ROOT)
    finally:
        fs.release(handle)


def _made(fs: Filesystem) -> None:
    handle, _ = fs.create(1, b"new", 0o644, os.O_RDWR, ROOT)
    try:
        fs.write(handle, 3, b"contents" * 1000)
    finally:
        fs.release(handle)


def _locked(fs: Filesystem, ino: int) -> None:
    """Lock, wait with a ticket, write under the lock, and give all back."""
    handle = fs.open(ino, os.O_RDWR, ROOT)
    handle.guard = Guard(fs.locks, ino)
    try:
        fs.locks.test(ino, Lock(FCNTL, WRITE, 1))
        fs.locks.take(handle.guard, Lock(FCNTL, WRITE, 1, 0, 99))
        wait = Wait(fs.locks, Guard(fs.locks, ino), Lock(FCNTL, WRITE, 2), blocking=True)
        wait.detect = True
        wait.attempt()
        time.sleep(QUEUE_AFTER)
        wait.attempt()
        wait.leave()
        fs.write(handle, 0, b"locked")
    finally:
        fs.locks.leave()
        fs.release(handle)


def changes(fs: Filesystem) -> list[Callable[[], object]]:
    """Every kind of change, what takes things away last."""
    n = Names
    ops: list[Callable[[], object]] = [
        lambda: _made(fs),
        lambda: _nameless(fs),
        lambda: fs.mkdir(1, b"dir", 0o755, ROOT),
        lambda: fs.symlink(1, b"sym", b"target" * 20, ROOT),
        lambda: fs.mknod(n.inner, b"fifo", stat.S_IFIFO | 0o644, 0, ROOT),
        lambda: fs.rename(1, b"new", n.crowd, b"moved", 0, ROOT),
        lambda: fs.rename(1, b"folder", n.inner, b"into itself", 0, ROOT),
        lambda: fs.rename(1, b"near", 1, b"far", 2, ROOT),
        lambda: fs.rename(n.folder, b"inner", 1, b"inner", 0, ROOT),
        lambda: fs.rmdir(1, b"dir", ROOT),
        lambda: fs.rmdir(1, b"folder", ROOT),
    ]
    for ino in (1, n.folder, n.inner, n.crowd):
        ops.append(lambda ino=ino: fs.link(n.small, ino, b"another", ROOT))  # type: ignore[misc]
    for ino in sorted(known()):
        ops += [
            lambda ino=ino: fs.setattr(ino, ROOT, mode=0o600, mtime_ns=5),  # type: ignore[misc]
            lambda ino=ino: fs.setxattr(ino, b"user.x", b"y" * 900, 0, ROOT),  # type: ignore[misc]
            lambda ino=ino: fs.removexattr(ino, b"user.x", ROOT),  # type: ignore[misc]
            lambda ino=ino: _stored(fs, ino, 2),  # type: ignore[misc]
            lambda ino=ino: _stored(fs, ino, 0, os.O_WRONLY | os.O_APPEND),  # type: ignore[misc]
            lambda ino=ino: fs.setattr(ino, ROOT, size=5000),  # type: ignore[misc]
            lambda ino=ino: _copied(fs, ino),  # type: ignore[misc]
            lambda ino=ino: _locked(fs, ino),  # type: ignore[misc]
        ]
        for mode, at, length in ALLOCATIONS:
            ops.append(
                lambda ino=ino, mode=mode, at=at, n=length: _allocated(fs, ino, mode, at, n)  # type: ignore[misc]
            )
        ops.append(lambda ino=ino: fs.setattr(ino, ROOT, size=1))  # type: ignore[misc]
    removed = [(n.folder, b"big"), (n.inner, b"sparse"), (n.inner, b"link"), (n.inner, b"device"),
               (1, b"small"), (1, b"near"), (1, b"far"), (1, b"sym")]  # fmt: skip
    for parent, name in removed:
        ops.append(lambda p=parent, n=name: fs.unlink(p, n, ROOT))  # type: ignore[misc]
    return ops


def alter(fs: Filesystem, ledger: Ledger) -> None:
    """Change everything there is, empty a directory, and keep house."""
    for change in changes(fs):
        ledger.attempt(change)
    for name, _, _ in (ledger.attempt(lambda: _listed(fs, Names.crowd)) or [])[2:]:
        ledger.attempt(lambda name=name: fs.unlink(Names.crowd, name, ROOT))  # type: ignore[misc]
    for _ in range(5):  # the fourth looks for peers that fell silent
        ledger.attempt(fs.tick)
        ledger.attempt(fs.work)


def use(fs: Filesystem, ledger: Ledger) -> None:
    """Everything on one mount, which then leaves."""
    ledger.patience, ledger.fs = PATIENCE, fs
    walk(fs, ledger)
    alter(fs, ledger)
    ledger.fs = None  # what follows is done to the end, at any cost
    ledger.attempt(fs.collect)
    ledger.attempt(fs.unmount)


def joined(region: Region, ledger: Ledger) -> Filesystem | None:
    """A mount made after the damage, or None when it is refused in a tolerable way."""
    return ledger.attempt(lambda: Filesystem.mount(region))


def repaired(region: Region) -> None:
    """Repair the region; the filesystem is of use afterwards, or its superblock is refused."""
    began = time.thread_time()
    with suppress(FormatError, Corrupt):  # refused: a superblock of another version, say
        after = fsck.repair(region, force=True)
        assert not after.findings, f"left:\n{after}\ndone:\n{after.repairs}"
        of_use(region)
        assert not fsck.check(region).findings
    assert time.thread_time() - began < SLOWEST_REPAIR
