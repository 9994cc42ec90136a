"""Every operation of a mount, in the kernel's terms; the only caller of the engine.

The kernel names an inode by a node number (`nodeids`, "node" here) and an open file by the number
of a handle ("fh").  It sends the caller's identity (`Context`).  Two front ends translate requests
to these operations, and results to answers.  `kernel_frontend` translates the bytes of the FUSE
descriptor, `pyfuse3_frontend` the objects of pyfuse3.  This module joins:

- the kernel's node numbers (`nodeids`) and the last look-up of each thread (`walks`),
- the permissions of callers (`rights`) and the presented owners (`ownership`),
- the table of open handles: opened -> closed; closing is retried while the engine is busy,
- the retry policy (`retry`), which the front ends apply.

The kernel caches nothing, because another machine may change everything at any time.  All timeouts
are 0.  The answer for a name that does not exist is ENOENT, which the kernel does not cache.

An operation raises the engine's errors.  Its last argument is the caller, even if the operation
does not use it.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from ivshmemfs.engine import Attr, Context, Filesystem, Handle, StatFs
from ivshmemfs.engine.data import Buffer
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.engine.lock_table import Lock
from ivshmemfs.engine.locks import Wait
from ivshmemfs.engine.xattr import LISTS
from ivshmemfs.errors import FsError, StaleHandle
from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.format.lock import LockRecord
from ivshmemfs.fuse import callers
from ivshmemfs.fuse.locks import SharedLocks
from ivshmemfs.fuse.nodeids import NodeIds
from ivshmemfs.fuse.ownership import Ownership
from ivshmemfs.fuse.retry import Retry, errno_of
from ivshmemfs.fuse.rights import CHANGE_NAMES, EXECUTE, READ, WRITE, Rights
from ivshmemfs.fuse.wakeups import Wakeups
from ivshmemfs.fuse.walks import Step, Walks

#: Largest read, write or copy of one request, in bytes.
LARGEST = 1 << 20
#: Leaves of a directory that one request lists: up to 4,096 names, or 256 with attributes.
LEAVES = 32
LEAVES_WITH_ATTRIBUTES = 2
_S_IFMT, _S_IFDIR = 0o170000, 0o040000

T = TypeVar("T")


class Listed(NamedTuple):
    """One name of a directory with attributes, for the answer to the kernel."""

    name: bytes
    node: int  # its node number
    attr: Attr
    following: int  # the cookie of the next name


class OwnChanges:
    """What this mount changed since `notify` last compared: places, and inodes."""

    def __init__(self) -> None:
        self.names: set[tuple[int, bytes]] = set()  # inode of the directory, name
        self.inodes: set[int] = set()

    def clear(self) -> None:
        """Forget all."""
        self.names.clear()
        self.inodes.clear()


class KernelPlaces:
    """What the kernel knows of names and directories, for `pretence`."""

    def __init__(
        self, fs: Filesystem, node_ids: NodeIds, node: Callable[[int, bytes, Attr], int]
    ) -> None:
        self._fs = fs
        self._node_ids = node_ids
        self._node = node

    def look_for(
        self, parent: int, name: bytes, *, count: bool = True, kind: int = 0
    ) -> tuple[int, Attr] | None:
        """Look up a name for the replayer: it is not a step of a rename.

        With *kind* an entry of another file type is None.  Without *count* the kernel gets no
        reference: the node is the inode number.
        """
        attr = self._fs.find(self._node_ids.inode_of(parent), name)
        if attr is None or (kind and attr.mode & _S_IFMT != kind):
            return None
        return self._node(parent, name, attr) if count else attr.ino, attr

    def node_at(self, ino: int, parent: int, name: bytes) -> int:
        """Return the node of directory *ino* if the kernel has it at that place; else 0.

        The kernel gets a reference.
        """
        return self._node_ids.kept_at(ino, parent, name)

    def note_move(self, old: tuple[int, bytes], new: tuple[int, bytes], ino: int) -> None:
        """Note that the kernel moved its entry of directory *ino*; another machine did so first."""
        self._node_ids.moved(old, new, ino)

    def path_of(self, node: int) -> bytes:
        """Return the kernel's path to a directory, such as b"/a/b"; b"" if it is unknown."""
        return b"".join(b"/" + name for _, name in self._node_ids.steps_to(node))

    def leads_to(self, parent: int, name: bytes, nodes: Iterable[int]) -> bool:
        """Return whether an entry is a step on the kernel's path to one of the directories."""
        return any((parent, name) in self._node_ids.steps_to(node) for node in nodes if node)


class Operations:
    """The operations of one mounted engine.

    *pause* sleeps for a number of seconds; other requests run meanwhile.  With *root_only* the
    kernel checks no permissions, and `rights` does.  With *access_lists* the mount obeys and shows
    POSIX access lists.
    """

    def __init__(
        self,
        fs: Filesystem,
        pause: Callable[[float], Awaitable[None]],
        *,
        ownership: Ownership | None = None,
        root_only: bool = False,
        access_lists: bool = True,
    ) -> None:
        self._fs = fs
        fs.groups_of = callers.groups
        fs.keeps_set_id = Rights.keeps_set_id
        self.retry = Retry(fs, pause)
        self._ownership = ownership or Ownership()
        self.presented = self._ownership.presenter
        #: A mount that does not obey access lists hides them, too.
        self._shows_lists = access_lists
        self._rights = Rights(fs, self.presented, enforced=root_only, obeys_lists=access_lists)
        self._node_ids = NodeIds()
        self.inode_of = self._node_ids.inode_of
        self.nodes_of_file = self._node_ids.of_file
        self.places = KernelPlaces(fs, self._node_ids, self._node)
        self._walks = Walks()
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)
        self._folders: dict[int, int] = {}  # node of an open directory, by handle
        self._pause = pause
        self._locks: SharedLocks | None = None  # None: the kernel keeps them, for this mount only
        #: Set while programs watch; see `notify`.
        self.own: OwnChanges | None = None

    # --- names ------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes, ctx: Context) -> tuple[int, Attr] | None:
        """Return (node, attributes) of an entry; None if there is no such entry."""
        ino = parent if parent <= MAX_INO else self.inode_of(parent)
        thread = ctx.pid
        attr = self._fs.lookup_number(ino) if name == b"." else self._fs.find(ino, name)
        if self._rights.enforced and name != b".":
            self._rights.need(ino, ctx, EXECUTE)
        if attr is None:
            return None
        found = attr.ino
        source = self._walks.source(thread, parent, name, found)
        avoided = 0
        if source is not None and source[2] == found:
            avoided = self._avoided(source, ino, name)
        node = self._node(parent, name, attr, avoided)
        self._walks.note(thread, (parent, name, found, node, self._walks.changes), source)
        return node, attr

    def _avoided(self, source: Step, parent: int, name: bytes) -> int:
        """Return the node of *source*, which this look-up must not return; 0 for no limit.

        0 if both names lead to the inode at one moment, or if this mount changed the older name.
        """
        _, old_name, ino, node, _ = source
        try:
            folder = self.inode_of(source[0])
        except StaleHandle:
            return node
        if self._fs.names_lead_to(ino, ((folder, old_name), (parent, name))):
            return 0
        return 0 if self._walks.is_changed(folder, source) else node

    def _node(self, parent: int, name: bytes, attr: Attr, avoided: int = 0) -> int:
        """Return the node number to answer for an entry of the directory with node *parent*."""
        file = attr.mode & _S_IFMT != _S_IFDIR
        if name == b".":  # the kernel opens a file handle (NFS)
            return self._node_ids.found_by_handle(parent, file=file)
        if file:
            return attr.ino if attr.ino != avoided else self._node_ids.passing(attr.ino)
        if name == b"..":
            return self._node_ids.found_parent(attr.ino)
        return self._node_ids.found(attr.ino, parent, name, avoided)

    def forget(self, node: int, times: int) -> None:
        """Drop *times* references of the kernel to *node*.  Never raises; errors are logged."""
        try:
            ino = self.inode_of(node)
            if self._node_ids.forget(node, times):
                self._fs.forget(ino)
        except StaleHandle:
            pass
        except Exception as error:  # FORGET has no answer that could carry an error
            errno_of("forget", error)

    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: Context
    ) -> tuple[int, Attr]:
        """Make a file, fifo, socket or device; return (node, attributes)."""
        folder = self.inode_of(parent)
        self._rights.need(folder, ctx, CHANGE_NAMES)
        attr = self._fs.mknod(folder, name, mode, rdev, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))
        return attr.ino, attr

    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Context) -> tuple[int, Attr]:
        """Make a directory; return (node, attributes)."""
        folder = self.inode_of(parent)
        self._rights.need(folder, ctx, CHANGE_NAMES)
        attr = self._fs.mkdir(folder, name, mode, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))
        return self._node(parent, name, attr), attr

    def symlink(self, parent: int, name: bytes, target: bytes, ctx: Context) -> tuple[int, Attr]:
        """Make a symbolic link; return (node, attributes)."""
        folder = self.inode_of(parent)
        self._rights.need(folder, ctx, CHANGE_NAMES)
        attr = self._fs.symlink(folder, name, target, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))
        return attr.ino, attr

    def readlink(self, node: int, _ctx: Context) -> bytes:
        """Return the target of a symbolic link."""
        return bytes(self._fs.readlink(self.inode_of(node)))

    def link(self, node: int, parent: int, name: bytes, ctx: Context) -> tuple[int, Attr]:
        """Give a file another name; return (node, attributes)."""
        ino, folder = self.inode_of(node), self.inode_of(parent)
        self._rights.need(folder, ctx, CHANGE_NAMES)
        attr = self._fs.link(ino, folder, name, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))
            self.own.inodes.add(ino)
        return attr.ino, attr

    def unlink(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove a name of a file."""
        folder = parent if parent <= MAX_INO else self.inode_of(parent)
        self._walks.forget(ctx.pid)
        self._rights.need_removal(folder, name, ctx)
        self._fs.unlink(folder, name, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))
        self._walks.change(folder, name)

    def rmdir(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove an empty directory."""
        folder = self.inode_of(parent)
        self._rights.need_removal(folder, name, ctx)
        self._fs.rmdir(folder, name, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Context
    ) -> None:
        """Move an entry."""
        self._walks.forget(ctx.pid)
        old, new = self.inode_of(parent), self.inode_of(new_parent)
        self._rights.need_rename(old, name, new, new_name, ctx)
        moved, exchanged = self._fs.rename(old, name, new, new_name, flags, ctx)
        if self.own is not None:
            self.own.names.add((old, name))
            self.own.names.add((new, new_name))
        self._walks.forget(ctx.pid, moved)
        self._walks.change(old, name)
        self._walks.change(new, new_name)
        self._node_ids.moved((parent, name), (new_parent, new_name), moved, exchanged)

    # --- attributes -------------------------------------------------------------------------

    def getattr(self, node: int, _ctx: Context) -> Attr:
        """Return the stored attributes; a front end passes them through `presented`."""
        return self._fs.getattr(node if node <= MAX_INO else self.inode_of(node))

    def statx(self, node: int, _ctx: Context) -> tuple[Attr, int]:
        """Return the stored attributes and the birth time, in ns since 1970."""
        ino = self.inode_of(node)
        return self._fs.getattr(ino), self._fs.birth_time(ino)

    def setattr(
        self, node: int, wanted: dict[str, int], ctx: Context, *, opened: bool, fh: int = 0
    ) -> Attr:
        """Change the attributes in *wanted*: mode, uid, gid, size, atime_ns, mtime_ns.

        A time may be NOW.  *opened* is True for a change through an open file, whose handle is *fh*
        if the front end knows it.
        """
        ino = self.inode_of(node)
        changes = self._ownership.stored(wanted)
        self._rights.need_change(ino, ctx, changes, opened=opened)
        if self.own is not None:
            self.own.inodes.add(ino)
        handle = self._handles.get(fh) if self._locks is not None else None
        if handle is None or handle.guard is None:
            return self._fs.setattr(ino, ctx, **changes)
        return self._fs.setattr(ino, ctx, handle.guard, **changes)

    def access(self, node: int, mask: int, ctx: Context) -> None:
        """Check permissions for access(2) and chdir(2); ENOSYS if the kernel checks them itself."""
        if not self._rights.enforced:
            raise FsError(errno.ENOSYS)
        self._rights.need(self.inode_of(node), ctx, mask & 7)

    def statfs(self, _ctx: Context) -> StatFs:
        """Return the sizes of the filesystem."""
        return self._fs.statfs()

    # --- extended attributes ----------------------------------------------------------------

    def getxattr(self, node: int, name: bytes, ctx: Context) -> bytes:
        """Return the value of an extended attribute."""
        ino = self._attribute_of(node, name, ctx, READ)
        return bytes(self._fs.getxattr(ino, name))

    def setxattr(
        self,
        node: int,
        name: bytes,
        value: bytes,
        flags: int,
        ctx: Context,
        clears_set_group_id: bool | None = None,
    ) -> None:
        """Set an extended attribute; *flags* are XATTR_CREATE and XATTR_REPLACE.

        *clears_set_group_id* is for an access list; None if the kernel does not know.
        """
        ino = self._attribute_of(node, name, ctx, WRITE)
        if self.own is not None:
            self.own.inodes.add(ino)
        self._fs.setxattr(ino, name, value, flags, ctx, clears_set_group_id=clears_set_group_id)

    def listxattr(self, node: int, ctx: Context) -> list[bytes]:
        """Return the names of the extended attributes that the caller may see."""
        names = self._fs.listxattr(self.inode_of(node), callers.identified(ctx))
        return names if self._shows_lists else [name for name in names if name not in LISTS]

    def removexattr(self, node: int, name: bytes, ctx: Context) -> None:
        """Remove an extended attribute."""
        ino = self._attribute_of(node, name, ctx, WRITE)
        if self.own is not None:
            self.own.inodes.add(ino)
        self._fs.removexattr(ino, name, ctx)

    def _attribute_of(self, node: int, name: bytes, ctx: Context, mask: int) -> int:
        """Return the inode whose attribute the caller may READ or WRITE; raise FsError if not."""
        if name in LISTS and not self._shows_lists:
            raise FsError(errno.EOPNOTSUPP)
        ino = self.inode_of(node)
        self._rights.need_attribute(ino, name, ctx, mask)
        return ino

    # --- files ------------------------------------------------------------------------------

    def _keep(self, handle: Handle) -> int:
        """Enter a handle in the table; return its number."""
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Context
    ) -> tuple[int, Attr]:
        """Open a file and make it if it does not exist; return (handle, attributes)."""
        folder = parent if parent <= MAX_INO else self.inode_of(parent)
        self._rights.need(folder, ctx, CHANGE_NAMES)
        handle, attr = self._fs.create(folder, name, mode, flags, ctx)
        if self.own is not None:
            self.own.names.add((folder, name))
            self.own.inodes.add(attr.ino)
        return self._keep(handle), attr

    def tmpfile(self, parent: int, mode: int, flags: int, ctx: Context) -> tuple[int, Attr]:
        """Make and open a file without a name (O_TMPFILE); return (handle, attributes)."""
        folder = self.inode_of(parent)
        self._rights.need(folder, ctx, CHANGE_NAMES)
        handle, attr = self._fs.tmpfile(folder, mode, flags, ctx)
        return self._keep(handle), attr

    def open(self, node: int, flags: int, ctx: Context) -> int:
        """Open a file; return its handle.

        Raises StaleHandle once for a thread that names the file by its passing number.  The kernel
        then walks the path again.  A path that cannot change, as /proc/self/fd, succeeds then.
        """
        ino = node if node <= MAX_INO else self.inode_of(node)
        if node > MAX_INO and self._walks.was_told(ctx.pid, ino, node):
            self._walks.forget(ctx.pid, ino)
            raise StaleHandle("another machine has just renamed this file")
        self._rights.need_open(ino, ctx, flags)
        if flags & os.O_TRUNC and self.own is not None:
            self.own.inodes.add(ino)
        return self._keep(self._fs.open(ino, flags, ctx))

    def read(self, fh: int, offset: int, size: int, into: memoryview | None = None) -> Buffer:
        """Return up to *size* bytes from one snapshot; many bytes are put in *into*."""
        return self._fs.read(self._handles[fh], offset, size, into)

    def opened(self, fh: int) -> int:
        """The inode of an open file."""
        return self._handles[fh].ino

    def write(
        self,
        fh: int,
        offset: int,
        content: Buffer,
        append: bool | None = None,
        ctx: Context | None = None,
    ) -> int:
        """Write *content*; return the number of bytes written.

        *append* and *ctx* default to their values when the file was opened.
        """
        handle = self._handles[fh]
        if self.own is not None:
            self.own.inodes.add(handle.ino)
        return self._fs.write(handle, offset, content, append=append, ctx=ctx)

    def copy_file_range(
        self,
        source: int,
        offset: int,
        to: int,
        at: int,
        size: int,
        through: memoryview,
        ctx: Context,
    ) -> int:
        """Copy up to LARGEST bytes between two handles in one commit; return the number copied."""
        if self.own is not None:
            self.own.inodes.add(self._handles[to].ino)
        content = self._fs.read(self._handles[source], offset, min(size, LARGEST), through)
        return self._fs.write(self._handles[to], at, content, append=False, ctx=ctx)

    def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Return the offset of the next data (SEEK_DATA) or hole (SEEK_HOLE)."""
        return self._fs.seek(self._handles[fh], offset, whence)

    def fallocate(self, fh: int, mode: int, offset: int, size: int, ctx: Context) -> None:
        """Make or fill holes; raise Unfinished after each piece."""
        if self.own is not None:
            self.own.inodes.add(self._handles[fh].ino)
        self._fs.fallocate(self._handles[fh], mode, offset, size, ctx)

    def flush(self, fh: int, owner: int = 0) -> None:
        """End the fcntl(2) locks of *owner* at a close(2).  All writes are published already.

        Raises ENOSYS where the kernel keeps the locks: it then sends no FLUSH any more.
        """
        if self._locks is None:
            raise FsError(errno.ENOSYS)
        self._locks.flush(self._handles[fh], owner)

    def fsync(self, fh: int, _datasync: bool) -> None:
        """Return when all writes are in the region."""
        self._fs.fsync(self._handles[fh])

    def release(self, fh: int) -> None:
        """Close a file."""
        handle = self._handles[fh]
        if self._locks is not None and handle.guard is not None:
            self._locks.release(handle)
        self._fs.release(handle)
        del self._handles[fh]

    # --- locks ------------------------------------------------------------------------------

    def share_locks(self, ended: Callable[[], bool], wakeups: Wakeups | None = None) -> None:
        """Keep the locks of files in the region; *ended* says whether the mount ends.

        Waiters sleep until a ring where *wakeups* has a doorbell.
        """
        self._locks = SharedLocks(self._fs.locks, self._pause, ended, wakeups)

    @property
    def locks(self) -> SharedLocks:
        """The locks of files; raises ENOSYS where the kernel keeps them."""
        if self._locks is None:
            raise FsError(errno.ENOSYS)
        return self._locks

    def getlk(self, fh: int, lock: Lock, *, own: bool = False) -> tuple[LockRecord, bool] | None:
        """(a lock that is in the way, whether its holder is on this mount); None if none is.

        With *own* a lock of the owner of *lock* itself.
        """
        return self.locks.test(self._handles[fh], lock, own=own)

    def setlk(self, fh: int, lock: Lock) -> None:
        """Take a lock; raises EAGAIN when another one is in the way."""
        self.locks.take(self._handles[fh], lock)

    def unlock(self, fh: int, lock: Lock) -> None:
        """Give back what the owner of *lock* holds of its bytes."""
        self.locks.give(self._handles[fh], lock)

    def setlkw(self, fh: int, lock: Lock, ctx: Context) -> Wait | None:
        """Take a lock, or return the wait for it; None when it was taken at once."""
        return self.locks.ask(self._handles[fh], lock, ctx.pid)

    # --- directories ------------------------------------------------------------------------

    def opendir(self, node: int, ctx: Context) -> int:
        """Open a directory; return its handle."""
        ino = self.inode_of(node)
        self._rights.need(ino, ctx, READ)
        number = self._keep(self._fs.opendir(ino))
        self._folders[number] = node
        return number

    def readdir(self, fh: int, cookie: int, leaves: int = LEAVES) -> Iterator[list[Dirent]]:
        """Yield the names from *cookie* on, in pieces.

        The `key` of an entry is the cookie of the next one.
        """
        return _until_failure(self._fs.entries(self._handles[fh], cookie, leaves))

    def readdirplus(self, fh: int, cookie: int, take: Callable[[Listed], bool]) -> None:
        """Pass the names from *cookie* on, with attributes, to *take* until it returns False."""
        folder = self._folders[fh]
        pieces = self.readdir(fh, cookie, LEAVES_WITH_ATTRIBUTES)
        for entry, attr in _until_failure(self._with_attributes(pieces)):
            node = attr.ino
            counts = attr.mode & _S_IFMT == _S_IFDIR and entry.name not in (b".", b"..")
            if counts:
                node = self._node_ids.found(node, folder, entry.name)
            if not take(Listed(entry.name, node, attr, entry.key)):
                if counts:
                    self.forget(node, 1)  # the answer does not contain it
                return

    def _with_attributes(self, pieces: Iterator[list[Dirent]]) -> Iterator[tuple[Dirent, Attr]]:
        for entry in itertools.chain.from_iterable(pieces):
            try:
                attr = self._fs.lookup_number(entry.ino)
            except StaleHandle:  # removed after it was listed
                continue
            yield entry, attr

    def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._fs.releasedir(self._handles[fh])
        del self._handles[fh], self._folders[fh]

    def fsyncdir(self, fh: int, _datasync: bool) -> None:
        """Return when all changes of names are in the region."""
        self._fs.fsync(self._handles[fh])


def _until_failure(listing: Iterator[T]) -> Iterator[T]:
    """Yield the items of *listing*; raise its error only if it comes before the first item.

    The next request of the caller gets a later error.
    """
    begun = False
    try:
        for item in listing:
            yield item
            begun = True
    except Exception:
        if not begun:
            raise
