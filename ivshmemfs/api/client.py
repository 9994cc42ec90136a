"""`Client`: operations on the paths of one region, as the module `os` has them.

Each operation is one look or one commit, so it is atomic for all machines, except those that say
otherwise.  A client acts with the user and group of its process.  It checks no permissions of
files, as `ivshmemfs put`, because its process can write the whole region anyway.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Literal, overload

from ivshmemfs.api import file as files
from ivshmemfs.api import walk
from ivshmemfs.api.closing import Closing
from ivshmemfs.api.file import RegionFile
from ivshmemfs.api.kv import KeyValue
from ivshmemfs.api.locks import FileLock
from ivshmemfs.api.mapped_file import MappedFile
from ivshmemfs.api.messages import RECORD_SIZE, RECORDS, Queue
from ivshmemfs.api.session import Session
from ivshmemfs.api.walk import Path, text_of
from ivshmemfs.api.watching import Watch
from ivshmemfs.engine import contents, fixed
from ivshmemfs.engine.filesystem import NOW
from ivshmemfs.engine.inode import Context
from ivshmemfs.engine.names import RENAME_EXCHANGE, RENAME_NOREPLACE
from ivshmemfs.errors import FsError

if TYPE_CHECKING:
    from io import BufferedRandom, BufferedReader, BufferedWriter, TextIOWrapper

    from _typeshed import (
        OpenBinaryMode,
        OpenBinaryModeReading,
        OpenBinaryModeUpdating,
        OpenBinaryModeWriting,
        OpenTextMode,
        ReadableBuffer,
    )

    from ivshmemfs.engine import Attr, Filesystem, Handle
    from ivshmemfs.engine.inode import StatFs

#: Entries of a directory that one look returns.
LISTED = 256
_BEHIND_DOTS = 2  # the cookie of a listing behind `.` and `..`


def stat_result(attr: Attr, block_size: int) -> os.stat_result:
    """Return attributes as os.stat does; `st_dev` is 0."""
    times = (attr.atime_ns, attr.mtime_ns, attr.ctime_ns)
    seconds = [ns // 10**9 for ns in times]
    numbers = (attr.mode, attr.ino, 0, attr.nlink, attr.uid, attr.gid, attr.size, *seconds)
    names = ("st_atime", "st_mtime", "st_ctime")
    more: dict[str, Any] = dict(zip(names, (ns / 1e9 for ns in times), strict=True))
    more |= {f"{name}_ns": ns for name, ns in zip(names, times, strict=True)}
    more |= {"st_blksize": block_size, "st_blocks": attr.blocks, "st_rdev": attr.rdev}
    return os.stat_result(numbers, more)


class DirEntry:
    """An entry of a directory as `Client.scandir` found it, with its attributes at that time."""

    __slots__ = ("_attr", "_block_size", "_client", "name", "path")

    def __init__(self, client: Client, folder: str, name: str, attr: Attr, block_size: int) -> None:
        self._client = client
        self._attr = attr
        self._block_size = block_size
        self.name = name
        self.path = f"{folder.rstrip('/')}/{name}"

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def inode(self) -> int:
        """Return the inode number."""
        return self._attr.ino

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self._attr.mode)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a directory, or a link to one."""
        return self._is(stat.S_ISDIR, follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a regular file, or a link to one."""
        return self._is(stat.S_ISREG, follow_symlinks)

    def _is(self, check: Callable[[int], bool], follow: bool) -> bool:
        if not (follow and self.is_symlink()):
            return check(self._attr.mode)
        try:
            return check(self._client.stat(self.path).st_mode)
        except OSError:
            return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the attributes; for a link, those of its target now."""
        if follow_symlinks and self.is_symlink():
            return self._client.stat(self.path)
        return stat_result(self._attr, self._block_size)


class Client(Closing):
    """A region as one process uses it; `ivshmemfs.open` makes it.  Thread-safe.

    Close it, or use it in a `with`: then its slot is free at once.  The collection of the client
    and the end of the process close it as well.  A child of fork() must open the region itself;
    every call of the parent's client raises RuntimeError there.

    Paths are str, bytes or os.PathLike, from the root of the region, with or without a leading
    slash.  Names that are not UTF-8 become str as os.fsdecode makes it.
    """

    def __init__(self, session: Session, fs: Filesystem, spec: str) -> None:
        self.session = session
        self.spec = spec
        # The engine applies the umask: a default access list of the directory takes its place.
        self.context = Context(os.geteuid(), os.getegid(), os.getpid(), _umask())
        self._block_size = fs.block_size
        self._finalizer = weakref.finalize(self, session.close)

    # --- the client itself ----------------------------------------------------------------------

    @property
    def readonly(self) -> bool:
        """Whether the client only reads."""
        return self.session.readonly

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.session.closed

    def close(self) -> None:
        """Close the files that are open, leave the peers, unmap the region; once."""
        self._finalizer()

    def __repr__(self) -> str:
        return f"<ivshmemfs.Client of {self.spec!r}{' closed' if self.closed else ''}>"

    def statvfs(self) -> StatFs:
        """Return the sizes of the filesystem, in blocks of `block_size` bytes."""
        return self.session.call(lambda fs: fs.statfs())

    # --- files ----------------------------------------------------------------------------------

    @overload
    def open(
        self, path: Path, mode: OpenTextMode = "r", buffering: int = -1,
        encoding: str | None = None, errors: str | None = None, newline: str | None = None,
    ) -> TextIOWrapper: ...  # fmt: skip
    @overload
    def open(
        self, path: Path, mode: OpenBinaryMode, buffering: Literal[0],
        encoding: None = None, errors: None = None, newline: None = None,
    ) -> RegionFile: ...  # fmt: skip
    @overload
    def open(
        self, path: Path, mode: OpenBinaryModeUpdating, buffering: Literal[-1, 1] = -1,
        encoding: None = None, errors: None = None, newline: None = None,
    ) -> BufferedRandom: ...  # fmt: skip
    @overload
    def open(
        self, path: Path, mode: OpenBinaryModeWriting, buffering: Literal[-1, 1] = -1,
        encoding: None = None, errors: None = None, newline: None = None,
    ) -> BufferedWriter: ...  # fmt: skip
    @overload
    def open(
        self, path: Path, mode: OpenBinaryModeReading, buffering: Literal[-1, 1] = -1,
        encoding: None = None, errors: None = None, newline: None = None,
    ) -> BufferedReader: ...  # fmt: skip
    @overload
    def open(
        self, path: Path, mode: str, buffering: int = -1,
        encoding: str | None = None, errors: str | None = None, newline: str | None = None,
    ) -> Any: ...  # fmt: skip
    def open(
        self,
        path: Path,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Open a file as the built-in function open does, with the same modes and arguments.

        The buffer has 64 KiB by default.  What is written is in the region after `flush` or
        `close`.  With `buffering=0` each write of up to 1 MiB is one commit, and in mode "ab" no
        other append of any machine gets between.  Raises OSError, ValueError.
        """
        return files.opened(self, text_of(path), mode, buffering, encoding, errors, newline)

    def read_bytes(self, path: Path) -> bytes:
        """Return the contents of a file; those of one commit if they are at most 1 MiB.

        Longer contents are also those of one commit if all writers use `write_bytes`.
        """
        with self.open(path, "rb", 0) as raw:
            return raw.readall()

    def read_text(self, path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the contents of a file as text, with the line ends that it has."""
        return self.read_bytes(path).decode(encoding, errors)

    def write_bytes(self, path: Path, data: ReadableBuffer) -> None:
        """Replace the contents of a file, or make it; every reader sees the old ones or the new.

        Up to 1 MiB is one commit, and the file keeps its inode, mode, owner and other names.  More
        goes to a file without a name, which then takes over the name, mode and owner.  A failure
        leaves the old contents.  Raises OSError: EISDIR, ENOSPC, ENOENT for the directory.
        """
        name, content = text_of(path), memoryview(data).cast("B")
        if len(content) > contents.MOST:
            self._replace_contents(
                name, lambda handle: files.pour(self, handle, _Source(content), name)
            )
            return
        me = self.context

        def store(fs: Filesystem) -> None:
            place = walk.place_of(fs, name)
            _refuse_directory(name, place)
            fs.change(lambda tx: contents.store(tx, place.parent, place.name, content, 0o666, me))

        self.session.call(store, name)

    def write_text(self, path: Path, text: str, encoding: str = "utf-8") -> None:
        """Do the same with text."""
        self.write_bytes(path, text.encode(encoding))

    def _replace_contents(self, path: str, fill: Callable[[Handle], object]) -> None:
        """Fill a file without a name, then give it `path`; a death on the way leaves nothing."""
        me, session = self.context, self.session

        def make(fs: Filesystem) -> Handle:
            place = walk.place_of(fs, path)
            _refuse_directory(path, place)
            return fs.tmpfile(place.parent, 0o666, os.O_RDWR, me)[0]

        def name(fs: Filesystem) -> None:
            place = walk.place_of(fs, path)
            _refuse_directory(path, place)
            fs.link(handle.ino, place.parent, place.name, me, over=True)

        def dress(fs: Filesystem) -> None:
            old = walk.place_of(fs, path).attr
            if old is not None and stat.S_ISREG(old.mode):
                kept = stat.S_IMODE(old.mode) & 0o1777
                fs.setattr(handle.ino, me, mode=kept, uid=old.uid, gid=old.gid)

        handle = session.call(make, path)
        try:
            fill(handle)
            session.call(dress, path)
            session.call(name, path)
        finally:
            session.release(handle)

    def copy_in(self, source: str | os.PathLike[str] | IO[bytes], path: Path) -> int:
        """Copy a local file, or what a binary stream gives, to `path`; returns the bytes.

        The name leads to the old contents until all new ones are there.
        """
        name, done = text_of(path), 0

        def fill(handle: Handle) -> None:
            nonlocal done
            if isinstance(source, str | bytes | os.PathLike):
                with open(source, "rb") as stream:
                    done = files.pour(self, handle, stream, name)
            else:
                done = files.pour(self, handle, source, name)

        self._replace_contents(name, fill)
        return done

    def copy_out(self, path: Path, target: str | os.PathLike[str] | IO[bytes]) -> int:
        """Copy a file to a local path, or into a binary stream; returns the bytes.

        A local path leads to its old contents until all new ones are there.
        """
        if not isinstance(target, str | bytes | os.PathLike):
            return self._drain(path, target)
        place = os.fsdecode(target)
        fd, fresh = tempfile.mkstemp(prefix=".ivshmemfs-copy-", dir=os.path.dirname(place) or ".")
        try:
            with open(fd, "wb") as stream:
                os.fchmod(fd, 0o666 & ~self.context.umask)
                done = self._drain(path, stream)
            os.replace(fresh, place)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(fresh)
            raise
        return done

    def _drain(self, path: Path, target: IO[bytes]) -> int:
        done, buffer = 0, memoryview(bytearray(files.MOST))
        with self.open(path, "rb", 0) as raw:
            while got := raw.readinto(buffer):
                target.write(buffer[:got])
                done += got
        return done

    # --- looking --------------------------------------------------------------------------------

    def _attr(self, path: Path, *, follow: bool) -> Attr:
        name = text_of(path)
        return self.session.call(lambda fs: walk.existing(fs, name, follow=follow), name)

    def stat(self, path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the attributes as os.stat does; raises FileNotFoundError."""
        return stat_result(self._attr(path, follow=follow_symlinks), self._block_size)

    def lstat(self, path: Path) -> os.stat_result:
        """Return the attributes of a symbolic link itself, and of everything else."""
        return self.stat(path, follow_symlinks=False)

    def created_ns(self, path: Path) -> int:
        """Return the time of the creation, in ns since 1970."""
        name = text_of(path)
        return self.session.call(lambda fs: fs.birth_time(walk.existing(fs, name).ino), name)

    def _mode(self, path: Path, *, follow: bool = True) -> int:
        """Return the mode; 0 when nothing is there."""
        try:
            return self._attr(path, follow=follow).mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                return 0
            raise

    def exists(self, path: Path) -> bool:
        """Whether the path leads to something; a link that leads nowhere does not."""
        return self._mode(path) != 0

    def is_file(self, path: Path) -> bool:
        """Whether the path leads to a regular file."""
        return stat.S_ISREG(self._mode(path))

    def is_dir(self, path: Path) -> bool:
        """Whether the path leads to a directory."""
        return stat.S_ISDIR(self._mode(path))

    def is_symlink(self, path: Path) -> bool:
        """Whether the path leads to a symbolic link."""
        return stat.S_ISLNK(self._mode(path, follow=False))

    def readlink(self, path: Path) -> str:
        """Return the target of a symbolic link; raises OSError EINVAL for anything else."""
        name = text_of(path)
        target = self.session.call(
            lambda fs: fs.readlink(walk.existing(fs, name, follow=False).ino), name
        )
        return os.fsdecode(target)

    def listdir(self, path: Path = "/") -> list[str]:
        """Return the names in a directory, without `.` and `..`, in no order."""
        return [entry.name for entry in self.scandir(path)]

    def scandir(self, path: Path = "/") -> Iterator[DirEntry]:
        """Return an iterator of the entries of a directory; raises NotADirectoryError.

        It looks at up to LISTED entries at a time.  An entry that exists all the time appears
        exactly once, one that is made or removed meanwhile once or not at all.
        """
        folder = text_of(path)
        handle = self.session.call(lambda fs: fs.opendir(walk.existing(fs, folder).ino), folder)

        def entries() -> Iterator[DirEntry]:
            cookie = _BEHIND_DOTS
            while piece := self.session.call(partial(_listed, handle, cookie), folder):
                for name, attr, _ in piece:
                    yield DirEntry(self, folder, os.fsdecode(name), attr, self._block_size)
                cookie = piece[-1][2]

        return entries()

    def walk(
        self,
        top: Path = "/",
        topdown: bool = True,
        onerror: Callable[[OSError], object] | None = None,
        followlinks: bool = False,
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield (path, names of directories, names of others) below `top`, as os.walk does."""
        todo: list[str | tuple[str, list[str], list[str]]] = [text_of(top)]
        while todo:
            here = todo.pop()
            if isinstance(here, tuple):
                yield here
                continue
            folders, others, links = list[str](), list[str](), set[str]()
            try:
                for entry in self.scandir(here):
                    (folders if entry.is_dir() else others).append(entry.name)
                    if entry.is_symlink():
                        links.add(entry.name)
            except OSError as error:
                if onerror is not None:
                    onerror(error)
                continue
            if topdown:
                yield here, folders, others
            else:
                todo.append((here, folders, others))
            for name in reversed(folders):
                if followlinks or name not in links:
                    todo.append(f"{here.rstrip('/')}/{name}")

    # --- names ----------------------------------------------------------------------------------

    def mkdir(
        self, path: Path, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory; with `parents` also those above it, each in a commit of its own.

        Raises FileExistsError, unless `exist_ok` and a directory is there; FileNotFoundError.
        """
        name, me = text_of(path), self.context

        def make(fs: Filesystem) -> None:
            place = walk.place_of(fs, name.rstrip("/") or "/", follow=False)
            if place.attr is not None:
                raise FsError(errno.EEXIST)
            fs.mkdir(place.parent, place.name, mode, me)

        try:
            self.session.call(make, name)
        except FileNotFoundError:
            above = os.path.dirname(name.rstrip("/"))
            if not parents or above in ("", "/", name):
                raise
            self.mkdir(above, parents=True, exist_ok=True)
            self.mkdir(path, mode, exist_ok=exist_ok)
        except FileExistsError:
            if not exist_ok or not self.is_dir(path):
                raise

    def makedirs(self, path: Path, mode: int = 0o777, exist_ok: bool = False) -> None:
        """Make a directory and those above it."""
        self.mkdir(path, mode, parents=True, exist_ok=exist_ok)

    def remove(self, path: Path) -> None:
        """Remove a name; the file stays readable where it is open.  Raises IsADirectoryError."""
        name, me = text_of(path), self.context

        def unlink(fs: Filesystem) -> None:
            place = _present(walk.named(fs, name))
            fs.unlink(place.parent, place.name, me)

        self.session.call(unlink, name)

    unlink = remove

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory; raises OSError ENOTEMPTY, NotADirectoryError."""
        name, me = text_of(path), self.context

        def remove(fs: Filesystem) -> None:
            place = _present(walk.named(fs, name))
            fs.rmdir(place.parent, place.name, me)

        self.session.call(remove, name)

    def rmtree(self, path: Path) -> None:
        """Remove a directory and all that is below it, each name in a commit of its own.

        Follows no links.  Ignores what another machine removes meanwhile.
        """
        if not stat.S_ISDIR(self._attr(path, follow=False).mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), text_of(path))
        for here, folders, others in self.walk(path, topdown=False):
            for name in others + [n for n in folders if self.is_symlink(f"{here}/{n}")]:
                with suppress(FileNotFoundError):
                    self.remove(f"{here}/{name}")
            with suppress(FileNotFoundError):
                self.rmdir(here)

    def rename(self, source: Path, target: Path) -> None:
        """Move an entry, also over an existing one, as rename(2) does; `replace` is the same."""
        self._rename(source, target, 0)

    replace = rename

    def rename_new(self, source: Path, target: Path) -> None:
        """Move an entry; raises FileExistsError when there is one at `target`."""
        self._rename(source, target, RENAME_NOREPLACE)

    def exchange(self, one: Path, other: Path) -> None:
        """Exchange two entries in one commit."""
        self._rename(one, other, RENAME_EXCHANGE)

    def _rename(self, source: Path, target: Path, flags: int) -> None:
        old, new, me = text_of(source), text_of(target), self.context

        def move(fs: Filesystem) -> None:
            here = _present(walk.named(fs, old))
            there = walk.named(fs, new)
            fs.rename(here.parent, here.name, there.parent, there.name, flags, me)

        try:
            self.session.call(move, old)
        except OSError as error:
            error.filename2 = new
            raise

    def link(self, source: Path, target: Path) -> None:
        """Give the file at `source` another name; raises FileExistsError."""
        old, new, me = text_of(source), text_of(target), self.context

        def add(fs: Filesystem) -> None:
            ino = walk.existing(fs, old, follow=False).ino
            place = walk.named(fs, new)
            fs.link(ino, place.parent, place.name, me)

        try:
            self.session.call(add, old)
        except OSError as error:
            error.filename2 = new
            raise

    def symlink(self, target: Path, path: Path) -> None:
        """Make a symbolic link at `path`; raises FileExistsError.

        Use a relative target: an absolute one counts from the root of each machine.
        """
        to, name, me = os.fsencode(target), text_of(path), self.context

        def make(fs: Filesystem) -> None:
            place = walk.named(fs, name)
            fs.symlink(place.parent, place.name, to, me)

        self.session.call(make, name)

    # --- attributes -----------------------------------------------------------------------------

    def _set(self, path: Path, **changes: int | None) -> None:
        name, me = text_of(path), self.context
        self.session.call(lambda fs: fs.setattr(walk.existing(fs, name).ino, me, **changes), name)

    def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits."""
        self._set(path, mode=stat.S_IMODE(mode))

    def chown(self, path: Path, uid: int, gid: int) -> None:
        """Set owner and group; -1 keeps one."""
        self._set(path, uid=None if uid < 0 else uid, gid=None if gid < 0 else gid)

    def truncate(self, path: Path, size: int) -> None:
        """Set the size of a file, in bytes."""
        self._set(path, size=size)

    def utime(self, path: Path, ns: tuple[int, int] | None = None) -> None:
        """Set the times of access and modification, in ns since 1970; to now by default."""
        atime, mtime = (NOW, NOW) if ns is None else ns
        self._set(path, atime_ns=atime, mtime_ns=mtime)

    # --- between machines -----------------------------------------------------------------------

    def lock(self, path: Path) -> FileLock:
        """Return a lock on the file at `path`, which excludes all machines and other threads.

        It is not taken yet: use it in a `with`, or call `acquire`.
        """
        return FileLock(self, text_of(path))

    def watch(self, path: Path = "/", *, recursive: bool = False) -> Watch:
        """Return an iterator over what any machine changes at `path`, from now on.

        `path` is a file or a directory; with `recursive`, directories below count as well.
        Raises OSError: ENOENT, EOVERFLOW for a directory with too many names.
        """
        return Watch(self, text_of(path), recursive=recursive)

    def map(self, path: Path, create: int | None = None) -> MappedFile:
        """Return the fixed file at `path` as memory: bytes that all machines change in place.

        With `create`, a size in bytes, it is made of zeros if there is no file; a multiple of 4096
        is taken.  Such a file keeps its place and size until `release`, and cannot be removed.
        Raises OSError: ENOENT, EINVAL for an ordinary file, EEXIST for one of another size.  ENOSPC
        means that no so long row of blocks is free, EOPNOTSUPP that an older version made the
        filesystem.
        """
        return MappedFile(self, text_of(path), create)

    def release(self, path: Path, *, force: bool = False) -> bool:
        """Make a fixed file an ordinary one, which can be removed; whether it was fixed.

        The contents stay.  First end all programs that store to it.  Raises OSError EBUSY while a
        peer has it open, unless `force`.
        """
        name = text_of(path)

        def let_go(fs: Filesystem) -> bool:
            ino = walk.existing(fs, name).ino
            return fs.change(lambda tx: fixed.release(tx, ino, force=force))

        return self.session.call(let_go, name)

    def queue(
        self,
        path: Path,
        *,
        records: int = RECORDS,
        record_size: int = RECORD_SIZE,
        broadcast: bool | None = None,
        replay: bool = False,
    ) -> Queue:
        """Return the queue at `path`; made, if there is none, for so many records of so many bytes.

        Each record goes to one reader, or with `broadcast` to all.  A reader of a broadcast begins
        with what is put from now on; with `replay`, with the oldest record that is there.  Raises
        OSError: EINVAL for another file, EEXIST for a queue of the other kind.
        """
        return Queue(self, text_of(path), records, record_size, broadcast, replay)

    def kv(self, path: Path) -> KeyValue:
        """Return the directory at `path`, made if need be, as a store of values by key."""
        self.mkdir(path, parents=True, exist_ok=True)
        return KeyValue(self, text_of(path))


class _Source:
    """Contents in memory, as a stream that is read once."""

    def __init__(self, content: memoryview) -> None:
        self._rest = content

    def read(self, size: int) -> memoryview:
        """Return the next bytes."""
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _listed(handle: Handle, cookie: int, fs: Filesystem) -> list[tuple[bytes, Attr, int]]:
    return list(islice(fs.readdir(handle, cookie), LISTED))


def _present(place: walk.Place) -> walk.Place:
    if place.attr is None:
        raise FsError(errno.ENOENT)
    return place


def _refuse_directory(path: str, place: walk.Place) -> None:
    """Raise EISDIR where a file is to be made and a directory is, or is meant."""
    if path.endswith("/") or (place.attr is not None and stat.S_ISDIR(place.attr.mode)):
        raise FsError(errno.EISDIR)


def _umask() -> int:
    """Return the umask of this process; os.umask would change it for a moment."""
    try:
        with open("/proc/self/status", "rb") as lines:
            for line in lines:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
