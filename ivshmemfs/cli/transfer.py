"""`get` and `put`: copy files and trees between a region and the local disk, without a mount.

`put` becomes one more peer of the region for as long as it copies; `get` only looks and stores
nothing.  A file appears under its name when all of it is there: it is written under a name of its
own first, and that is removed when something fails.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.peering import patiently, peer
from ivshmemfs.engine import RENAME_NOREPLACE, ROOT_INO, Context
from ivshmemfs.errors import Busy, FsError, IvshmemfsError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ivshmemfs.engine import Attr, Filesystem, Handle

#: Bytes of one read: what a cache still holds.
PIECE = 1 << 20
#: Bytes of which a disk brings the first ones before the last, or nearly so.
FETCHED = 1 << 18
#: Bytes and blocks of one transaction at most; other mounts wait for its end.
MOST = 4 << 20
MOST_BLOCKS = 1024
#: Seconds after which a copy counts as long, and shows how far it is.
LONG = 1.0
#: Seconds between two signs of life while copying into a region.
PULSE = 1.0

_numbers = itertools.count(1)


class Meter:
    """A progress bar on a terminal, once a copy takes long."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._since = time.monotonic()
        self._bar: Progress | None = None

    def add(self, name: bytes, done: int, size: int) -> None:
        """So many bytes of a file are there."""
        if not self._shown or time.monotonic() - self._since < LONG:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

            columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("")
            self._bar.start()
        text = ascii(os.fsdecode(name))[1:-1].replace("[", "\\[")
        self._bar.update(self._bar.task_ids[0], description=text, completed=done, total=size)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def _about(name: bytes) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except FsError as error:
        text = str(error) if error.args and str(error) else os.strerror(error.errno)
        raise OSError(error.errno, text, os.fsdecode(name)) from None


# --- names in the region -------------------------------------------------------------------------


def _resolve(fs: Filesystem, path: bytes) -> Attr:
    """What stands at a path from the region's root; symbolic links are not followed."""
    with _about(path):
        attr = patiently(lambda: fs.getattr(ROOT_INO))
        for name in path.split(b"/"):
            if name:
                attr = _child(fs, attr.ino, name)
        return attr


def _child(fs: Filesystem, ino: int, name: bytes) -> Attr:
    return patiently(lambda: fs.lookup(ino, name))


def _found(fs: Filesystem, path: bytes) -> Attr | None:
    try:
        return _resolve(fs, path)
    except FileNotFoundError:
        return None


def _last(path: bytes) -> bytes:
    """The last name of a path; raises UsageError when there is none."""
    name = os.path.basename(path.rstrip(b"/"))
    if name in (b"", b".", b".."):
        raise UsageError(f"{os.fsdecode(path)}: name what to copy it to")
    return name


def _temporary() -> bytes:
    return b".ivshmemfs-copy-%d-%d" % (os.getpid(), next(_numbers))


def _exists(name: bytes) -> UsageError:
    return UsageError(f"{os.fsdecode(name)} exists: --force replaces it")


def _omitted(name: bytes) -> UsageError:
    return UsageError(f"{os.fsdecode(name)} is a directory: --recursive copies it")


# --- from the disk into the region ----------------------------------------------------------------


class Putter:
    """Copies into a region."""

    def __init__(self, fs: Filesystem, meter: Meter, *, recursive: bool, force: bool) -> None:
        self._fs = fs
        self._meter = meter
        self._recursive = recursive
        self._force = force
        self._me = Context(os.getuid(), os.getgid())
        self._most = min(MOST, MOST_BLOCKS * fs.block_size)
        self._ticked = time.monotonic()

    def copy(self, source: bytes, folder: int, name: bytes) -> None:
        """`source` becomes `name` in directory `folder`; raises OSError, UsageError."""
        status = os.lstat(source)
        with _about(name):
            if stat.S_ISDIR(status.st_mode):
                self._tree(source, status, folder, name)
            elif stat.S_ISREG(status.st_mode):
                self._file(source, status, folder, name)
            else:
                self._node(source, status, folder, name)

    def _tree(self, source: bytes, status: os.stat_result, folder: int, name: bytes) -> None:
        if not self._recursive:
            raise _omitted(source)
        try:
            made = patiently(lambda: self._fs.mkdir(folder, name, 0o700, self._me))
        except FsError as error:
            if error.errno != errno.EEXIST:
                raise
            made = _child(self._fs, folder, name)
            if not stat.S_ISDIR(made.mode):
                raise _exists(name) from None
        for child in sorted(os.listdir(source)):
            self.copy(os.path.join(source, child), made.ino, child)
        self._dress(made.ino, status)

    def _file(self, source: bytes, status: os.stat_result, folder: int, name: bytes) -> None:
        fs, fresh = self._fs, _temporary()
        self._vacant(folder, name)
        with open(source, "rb", buffering=0) as file:
            flags = os.O_WRONLY | os.O_EXCL
            handle, attr = patiently(lambda: fs.create(folder, fresh, 0o600, flags, self._me))
            try:
                try:
                    for start, end in _extents(file.fileno(), status, fs.block_size):
                        self._pour(file.fileno(), handle, start, end, source, status.st_size)
                    self._dress(attr.ino, status, size=status.st_size)
                finally:
                    fs.release(handle)
                self._publish(folder, fresh, name)
            except BaseException:
                with suppress(IvshmemfsError):
                    patiently(lambda: fs.unlink(folder, fresh, self._me))
                raise

    def _pour(
        self, fd: int, handle: Handle, start: int, end: int, source: bytes, size: int
    ) -> None:
        fs = self._fs
        while start < end:
            at, most = start, min(self._most, end - start)
            _fetch(fd, at, most)
            got = patiently(lambda at=at, most=most: fs.write_from(handle, at, most, fd))  # type: ignore[misc]
            if not got:
                return  # it became shorter meanwhile
            start += got
            self._meter.add(source, start, size)
            self._show_life()

    def _show_life(self) -> None:
        now = time.monotonic()
        if now - self._ticked > PULSE:
            self._ticked = now
            with suppress(Busy):
                self._fs.tick()

    def _node(self, source: bytes, status: os.stat_result, folder: int, name: bytes) -> None:
        fs, fresh = self._fs, _temporary()
        self._vacant(folder, name)
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(source)
            made = patiently(lambda: fs.symlink(folder, fresh, target, self._me))
        else:
            mode, device = status.st_mode, status.st_rdev
            made = patiently(lambda: fs.mknod(folder, fresh, mode, device, self._me))
        self._dress(made.ino, status)
        self._publish(folder, fresh, name)

    def _vacant(self, folder: int, name: bytes) -> None:
        """Raise UsageError unless `name` is free or may be replaced."""
        if self._force:
            return
        with suppress(FsError):
            _child(self._fs, folder, name)
            raise _exists(name)

    def _publish(self, folder: int, fresh: bytes, name: bytes) -> None:
        flags = 0 if self._force else RENAME_NOREPLACE
        try:
            patiently(lambda: self._fs.rename(folder, fresh, folder, name, flags, self._me))
        except FsError as error:
            with suppress(IvshmemfsError):
                patiently(lambda: self._fs.unlink(folder, fresh, self._me))
            if error.errno == errno.EEXIST:
                raise _exists(name) from None
            raise

    def _dress(self, ino: int, status: os.stat_result, size: int | None = None) -> None:
        """Owner (as root), size, permissions and times, in this order: one may change the next."""
        fs, root, link = self._fs, os.getuid() == 0, stat.S_ISLNK(status.st_mode)
        if root:
            uid, gid = status.st_uid, status.st_gid
            patiently(lambda: fs.setattr(ino, self._me, uid=uid, gid=gid))
        if size is not None:
            patiently(lambda: fs.setattr(ino, self._me, size=size))
        mode = None if link else stat.S_IMODE(status.st_mode)
        atime, mtime = status.st_atime_ns, status.st_mtime_ns
        patiently(lambda: fs.setattr(ino, self._me, mode=mode, atime_ns=atime, mtime_ns=mtime))


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


# --- from the region to the disk ------------------------------------------------------------------


class Getter:
    """Copies out of a region."""

    def __init__(self, fs: Filesystem, meter: Meter, *, recursive: bool, force: bool) -> None:
        self._fs = fs
        self._meter = meter
        self._recursive = recursive
        self._force = force
        self._zeroes = bytes(PIECE)
        self._piece = memoryview(bytearray(PIECE))

    def copy(self, attr: Attr, target: bytes) -> None:
        """What has `attr` becomes the local file `target`; raises OSError, UsageError."""
        with _about(target):
            if stat.S_ISDIR(attr.mode):
                self._tree(attr, target)
                return
            if not self._force and os.path.lexists(target):
                raise _exists(target)
            fresh = os.path.join(os.path.dirname(target), _temporary())
            try:
                self._make(attr, fresh, target)
                self._publish(fresh, target)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(fresh)

    def _tree(self, attr: Attr, target: bytes) -> None:
        if not self._recursive:
            raise _omitted(target)
        if not os.path.isdir(target):
            if os.path.lexists(target):
                raise _exists(target)
            os.mkdir(target, 0o700)
        fs = self._fs
        listed = patiently(lambda: list(fs.readdir(fs.opendir(attr.ino), 0)))
        for name, child, _ in listed:
            if name not in (b".", b".."):
                self.copy(child, os.path.join(target, name))
        _dress(attr, target)

    def _make(self, attr: Attr, fresh: bytes, target: bytes) -> None:
        kind = stat.S_IFMT(attr.mode)
        if kind == stat.S_IFLNK:
            os.symlink(patiently(lambda: self._fs.readlink(attr.ino)), fresh)
        elif kind == stat.S_IFREG:
            self._file(attr, fresh, target)
        else:
            os.mknod(fresh, kind | 0o600, attr.rdev)
        _dress(attr, fresh)

    def _file(self, attr: Attr, fresh: bytes, target: bytes) -> None:
        fs = self._fs
        copy = self._copied_sparsely if attr.blocks * 512 < attr.size else self._copied
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        handle = None
        try:
            handle = patiently(lambda: fs.open(attr.ino, os.O_RDONLY))
            opened, at = handle, 0
            while got := patiently(lambda at=at: copy(opened, at, fd)):  # type: ignore[misc]
                at += got
                self._meter.add(target, at, attr.size)
            os.ftruncate(fd, at)
        finally:
            os.close(fd)
            if handle is not None:
                fs.release(handle)

    def _copied(self, handle: Handle, at: int, fd: int) -> int:
        """Copy a piece; its size."""
        return self._fs.read_to(handle, at, PIECE, fd)

    def _copied_sparsely(self, handle: Handle, at: int, fd: int) -> int:
        """The same, but zeros stay a hole."""
        piece = self._fs.read(handle, at, PIECE, self._piece)
        if bytes(piece) != self._zeroes[: len(piece)]:
            _write(fd, piece, at)
        return len(piece)

    def _publish(self, fresh: bytes, target: bytes) -> None:
        if self._force:
            os.rename(fresh, target)
            return
        try:
            os.link(fresh, target, follow_symlinks=False)  # unlike rename, never replaces
        except FileExistsError:
            raise _exists(target) from None
        except OSError:  # a filesystem without links
            if os.path.lexists(target):
                raise _exists(target) from None
            os.rename(fresh, target)


def _write(fd: int, piece: bytes | bytearray | memoryview, at: int) -> None:
    view = memoryview(piece)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _dress(attr: Attr, path: bytes) -> None:
    """Owner (as root), permissions and times of a local file."""
    if os.getuid() == 0:
        os.chown(path, attr.uid, attr.gid, follow_symlinks=False)
    if not stat.S_ISLNK(attr.mode):
        os.chmod(path, stat.S_IMODE(attr.mode))
    os.utime(path, ns=(attr.atime_ns, attr.mtime_ns), follow_symlinks=False)


# --- the commands ---------------------------------------------------------------------------------


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in (
        click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
        click.option("-f", "--force", is_flag=True, help="Replace files that exist."),
        click.option("-r", "-R", "--recursive", is_flag=True, help="Copy directories as well."),
        click.argument("destination", type=click.Path(path_type=bytes)),
        click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=bytes)),
        click.argument("region"),
    ):
        command = decorate(command)
    return command


@contextmanager
def _opened(spec: str, *, readonly: bool) -> Iterator[Filesystem]:
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region

    with (
        open_region(spec, readonly=readonly, identify=identify) as region,
        peer(region, readonly=readonly) as fs,
    ):
        yield fs


@contextmanager
def _metered(quiet: bool) -> Iterator[Meter]:
    meter = Meter(quiet=quiet)
    try:
        yield meter
    finally:
        meter.close()


@click.command("put", short_help="Copy local files to REGION, without a mount.")
@_options
def put_command(
    region: str,
    sources: tuple[bytes, ...],
    destination: bytes,
    recursive: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Copy local SOURCES to DESTINATION in REGION, without a mount.

    DESTINATION counts from the region's root.  Several sources, or an existing directory: they go
    into it.  Mode, times and, as root, owners are kept.
    """
    with _opened(region, readonly=False) as fs, _metered(quiet) as meter:
        putter = Putter(fs, meter, recursive=recursive, force=force)
        into = _found(fs, destination)
        if into is not None and stat.S_ISDIR(into.mode):
            for source in sources:
                putter.copy(source, into.ino, _last(source))
            return
        if len(sources) > 1:
            raise UsageError(f"{os.fsdecode(destination)} is no directory in {region}")
        above = _resolve(fs, os.path.dirname(destination.rstrip(b"/")))
        putter.copy(sources[0], above.ino, _last(destination))


@click.command("get", short_help="Copy files from REGION, without a mount.")
@_options
def get_command(
    region: str,
    sources: tuple[bytes, ...],
    destination: bytes,
    recursive: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Copy SOURCES in REGION to the local DESTINATION, without a mount.

    SOURCES count from the region's root.  Several sources, or an existing directory: they go into
    it.  Mode, times and, as root, owners are kept.  Nothing is stored in the region.
    """
    with _opened(region, readonly=True) as fs, _metered(quiet) as meter:
        getter = Getter(fs, meter, recursive=recursive, force=force)
        if os.path.isdir(destination):
            for source in sources:
                getter.copy(_resolve(fs, source), os.path.join(destination, _last(source)))
            return
        if len(sources) > 1:
            raise UsageError(f"{os.fsdecode(destination)} is no directory")
        getter.copy(_resolve(fs, sources[0]), destination)
