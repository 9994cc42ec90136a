"""What a mount serves, by the kernel's numbers, whichever way its requests come in.

Requests come through pyfuse3 (`adapter`) or straight from the kernel (`direct`).  Both are mere
translations; what lies between the kernel's idea of a file system and the engine's stands here:

- the kernel's numbers of inodes (`nodes`),
- what each thread was told last (`walks`), and what callers may do (`rights`),
- the table of open handles: opened -> closed, which is tried again while the engine is busy,
- how owners and permissions are presented,
- what errors mean to a caller, and how long a busy operation is tried again.

Nothing is cached by the kernel: all timeouts are 0 and a name that does not exist is ENOENT, which
the kernel does not keep, because another machine may change everything at any time.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any, NamedTuple

import trio
from pyfuse3 import FUSEError, get_sup_groups

from ivshmemfs.engine import Attr, Context, Filesystem, Handle
from ivshmemfs.errors import (
    Busy,
    FsError,
    IvshmemfsError,
    StaleHandle,
    UnderRepair,
    Unfinished,
)
from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.fuse import wire
from ivshmemfs.fuse.nodes import Nodes
from ivshmemfs.fuse.rights import ENTER, EXECUTE, READ, Rights
from ivshmemfs.fuse.walks import Step, Walks
from ivshmemfs.region import Standing

log = logging.getLogger(__name__)

#: Seconds for which a busy operation is tried again before other requests are served meanwhile,
#: for which it is waited awake first, and then asleep: at most, the first time and the last.
MOMENTS = 0.0015
SPIN_SECONDS = 40e-6
FIRST_NAP = 0.0001
LONGEST_NAP = 0.001
#: Seconds to wait before the first and, growing, between later attempts of a busy operation.
FIRST_DELAY = 0.001
LONGEST_DELAY = 0.005
#: Seconds after which a busy operation fails.  It fails with EIO: programs know that as the end
#: of an operation, while EAGAIN on a file tells many of them to wait until it is readable, which
#: it always is.
PATIENCE = 10.0

#: Errors of an operation that point to damage or a dead region, so that the log must name them.
_ALARMING = frozenset((errno.EUCLEAN, errno.EIO, errno.EFAULT, errno.ENODEV))
LOOKS = 2  # pieces of a directory that one request lists with attributes: up to 256 names
_S_IFMT, _S_IFDIR = 0o170000, 0o040000

_SHEDDING = {"uid", "gid", "size"}


class Ownership(NamedTuple):
    """How owners and permissions are presented; the stored ones stay as they are."""

    uid: int | None = None
    gid: int | None = None
    umask: int = 0


class Entry(NamedTuple):
    """One name of a directory as the kernel is told of it."""

    name: bytes
    node: int  # by which the kernel shall know it
    attr: Attr
    following: int  # where the listing goes on behind it


def failure(operation: str, error: Exception) -> FUSEError:
    """What the caller of *operation* gets for *error*; logs what nobody expects."""
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, IvshmemfsError):
        code = error.errno
        if code in _ALARMING or not isinstance(error, FsError):
            log.error("%s: %s", operation, error)
        if 0 < code <= wire.MAX_ERRNO:  # 0 would mean success
            return FUSEError(code)
        log.error("%s: an error with the impossible errno %d", operation, code)
        return FUSEError(errno.EIO)
    if isinstance(error, OSError) and error.errno == errno.EIO:
        log.error("%s: %s", operation, error)  # the region was truncated, or its device is gone
        return FUSEError(errno.EIO)
    log.error("%s: unexpected %s", operation, type(error).__name__, exc_info=error)
    return FUSEError(errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO)


def _groups_of(pid: int) -> Collection[int]:
    """The further groups of a process; none when it is gone, or in another pid namespace."""
    try:
        groups: Collection[int] = get_sup_groups(pid)
    except Exception:  # whatever is wrong with the process: it is in no group that we know of
        return ()
    return groups


class Served:
    """One mounted engine.  *pause* sleeps for some seconds while other requests are served.

    With *root_only* the kernel checks no permissions, see `rights`.
    """

    def __init__(
        self,
        fs: Filesystem,
        pause: Callable[[float], Awaitable[None]],
        *,
        ownership: Ownership | None = None,
        root_only: bool = False,
    ) -> None:
        self.fs = fs
        fs.groups_of = _groups_of
        #: What became of the region, as of the last upkeep; `on_standing` is told of each change.
        self.standing = Standing.SOUND
        self.on_standing: Callable[[Standing], None] = lambda _standing: None
        fs.keeps_set_id = Rights.keeps_set_id
        self.rights = Rights(fs, self.presented, enforced=root_only)
        #: Set when the mount is ending: operations that wait fail now.
        self.ending = False
        self.nodes = Nodes()
        self.inode_of = self.nodes.inode_of
        self.walks = Walks()
        self.handles: dict[int, Handle] = {}
        self._pause = pause
        self._ownership = ownership or Ownership()
        self.as_stored = self._ownership == Ownership()
        self._numbers = itertools.count(1)
        self._folders: dict[int, int] = {}  # by handle: the number that was opened

    # --- waiting --------------------------------------------------------------------------

    def moments(self) -> Iterator[None]:
        """Short waits, one for each attempt of a busy operation before `again`.

        A commit takes less time than going to sleep and waking up, so whoever commits on another
        CPU is waited for awake.  It may also be waiting for this very CPU, hence the naps.  Whoever
        is still not served has several before him: his naps grow, for each time that he wakes up
        in vain takes away from those who commit.
        """
        now = time.monotonic()
        end = now + MOMENTS
        awake = now + SPIN_SECONDS if len(os.sched_getaffinity(0)) > 1 else now
        nap, unexplained = FIRST_NAP, 0
        while now < end and unexplained < 2:
            unexplained += not self.fs.crowded
            while (crowded := self.fs.crowded) and time.monotonic() < awake:
                pass
            if crowded:
                time.sleep(nap * random.random())
                nap = min(nap * 3, LONGEST_NAP)
            yield
            now = time.monotonic()

    async def again(self, operation: str, call: Callable[[], Any], busy: Busy) -> Any:
        """Try *call*, which ended in *busy*, again until it succeeds; raises FUSEError.

        An operation that has used up its turn goes on as soon as others had theirs, and gets
        new patience, because it made progress.  Where it ends early, what it did so far is its
        result, if that is one: also for a caller that is interrupted.
        """
        started = time.monotonic()
        delay = FIRST_DELAY
        so_far: Any = None
        while True:
            if isinstance(busy, Unfinished):
                call, so_far = busy.go_on or call, busy.so_far or so_far
                started, delay, pause = time.monotonic(), FIRST_DELAY, 0.0
            else:
                pause, delay = delay * random.uniform(0.5, 1.5), min(delay * 1.5, LONGEST_DELAY)
            try:
                await self._pause(pause)
            except trio.Cancelled:
                if so_far is None:
                    raise
                return so_far
            try:
                return call()
            except Busy as error:
                busy = error
                turn = isinstance(busy, Unfinished)
                ending = self.ending or (not turn and time.monotonic() - started > PATIENCE)
                if ending and so_far is not None:
                    return so_far
                if self.ending:
                    raise FUSEError(errno.EIO) from None
                if ending:
                    if not isinstance(error, UnderRepair):  # of which the upkeep has told
                        log.error("%s: still busy after %.0f s: %s", operation, PATIENCE, error)
                    raise FUSEError(errno.EIO) from None
            except Exception as error:
                raise failure(operation, error) from None

    # --- owners -----------------------------------------------------------------------------

    def presented(self, attr: Attr) -> Attr:
        """*attr* as the mount options want it shown."""
        if self.as_stored:
            return attr
        shown = self._ownership
        return attr._replace(
            mode=attr.mode & ~shown.umask,
            uid=attr.uid if shown.uid is None else shown.uid,
            gid=attr.gid if shown.gid is None else shown.gid,
        )

    def owner_changes(self, uid: int | None, gid: int | None) -> dict[str, int]:
        """What chown(2) is to change; a presented owner can only be set to what it is: EPERM."""
        changes = {}
        shown = self._ownership
        for field, value, fixed in (("uid", uid, shown.uid), ("gid", gid, shown.gid)):
            if value is None:
                continue
            if fixed is None:
                changes[field] = value
            elif value != fixed:
                raise FsError(errno.EPERM, f"the mount option {field}= fixes the owner")
        return changes

    @staticmethod
    def mode_change(mode: int, changes: dict[str, int]) -> dict[str, int]:
        """What a mode that comes with `changes` is to change.

        With an owner or a size the kernel sends a mode only to shed privileges; the other bits in
        it are as the kernel last saw them.
        """
        return {"kept" if changes.keys() & _SHEDDING else "mode": mode & 0o7777}

    # --- names ------------------------------------------------------------------------------

    def _node(self, parent: int, name: bytes, attr: Attr, avoided: int = 0) -> int:
        """The number to tell for an entry of the directory with the number *parent*."""
        file = attr.mode & _S_IFMT != _S_IFDIR
        if name == b".":  # somebody comes with a file handle (NFS)
            return self.nodes.named(parent, file=file)
        if file:
            return attr.ino if attr.ino != avoided else self.nodes.passing(attr.ino)
        if name == b"..":
            return self.nodes.above(attr.ino)
        return self.nodes.found(attr.ino, parent, name, avoided)

    def lookup(self, parent: int, name: bytes, ctx: Context) -> tuple[int, Attr] | None:
        """(the number, the attributes) of an entry of the directory with the number *parent*.

        None when there is no such entry.
        """
        ino, thread = self.inode_of(parent), ctx.pid
        attr = self.fs.numbered(ino) if name == b"." else self.fs.find(ino, name)
        if self.rights.enforced and name != b".":
            self.rights.need(ino, ctx, EXECUTE)
        if attr is None:
            return None
        found = attr.ino
        source = self.walks.source(thread, parent, name, found)
        avoided = 0
        if source is not None and source[2] == found:
            avoided = self._avoided(source, ino, name)
        node = self._node(parent, name, attr, avoided)
        self.walks.note(thread, (parent, name, found, node, self.walks.changes), source)
        return node, attr

    def _avoided(self, source: Step, parent: int, name: bytes) -> int:
        """The number of *source*, unless its name and this one lead to its inode at one moment."""
        _, old_name, ino, node, _ = source
        try:
            folder = self.inode_of(source[0])
        except StaleHandle:
            return node
        if self.fs.bears(ino, ((folder, old_name), (parent, name))):
            return 0
        return 0 if self.walks.is_changed(folder, source) else node

    def open(self, node: int, flags: int, ctx: Context) -> int:
        """The number of a new handle of a file.

        Raises StaleHandle when the kernel names it by its passing number: the path is walked again.
        Once only: a path that does not lead elsewhere, as /proc/self/fd, may open it so.
        """
        ino = self.inode_of(node)
        if node > MAX_INO and self.walks.was_told(ctx.pid, ino, node):
            self.walks.forget(ctx.pid, ino)
            raise StaleHandle("another machine has just renamed this file")
        self.rights.need_open(ino, ctx, flags)
        return self.keep(self.fs.open(ino, flags, ctx))

    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Context) -> tuple[int, Attr]:
        """The same for a new directory."""
        self.rights.need(self.inode_of(parent), ctx, ENTER)
        attr = self.fs.mkdir(self.inode_of(parent), name, mode, ctx)
        return self._node(parent, name, attr), attr

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Context
    ) -> None:
        """Move an entry."""
        self.walks.forget(ctx.pid)
        old, new = self.inode_of(parent), self.inode_of(new_parent)
        self.rights.need_rename(old, name, new, new_name, ctx)
        moved, exchanged = self.fs.rename(old, name, new, new_name, flags, ctx)
        self.walks.forget(ctx.pid, moved)
        self.walks.change(old, name)
        self.walks.change(new, new_name)
        self.nodes.moved((parent, name), (new_parent, new_name), moved, exchanged)

    def unlink(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove a name of the directory with the inode *parent*."""
        self.walks.forget(ctx.pid)
        self.rights.need_removal(parent, name, ctx)
        self.fs.unlink(parent, name, ctx)
        self.walks.change(parent, name)

    def rmdir(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove an empty directory from the one with the inode *parent*."""
        self.rights.need_removal(parent, name, ctx)
        self.fs.rmdir(parent, name, ctx)

    def forget(self, node: int, times: int) -> None:
        """The kernel forgets what it was told *times* times.  Never raises; errors are logged."""
        try:
            ino = self.inode_of(node)
            if self.nodes.forget(node, times):
                self.fs.forget(ino)
        except StaleHandle:
            pass
        except Exception as error:  # nobody waits for an answer
            failure("forget", error)

    # --- handles ----------------------------------------------------------------------------

    def keep(self, handle: Handle) -> int:
        """The number by which the kernel names an open handle from now on."""
        number = next(self._numbers)
        self.handles[number] = handle
        return number

    def release(self, number: int) -> None:
        """Close a file."""
        self.fs.release(self.handles[number])
        del self.handles[number]

    # --- directories ------------------------------------------------------------------------

    def opendir(self, node: int, ctx: Context) -> int:
        """The number of a new handle of a directory."""
        self.rights.need(self.inode_of(node), ctx, READ)
        number = self.keep(self.fs.opendir(self.inode_of(node)))
        self._folders[number] = node
        return number

    def releasedir(self, number: int) -> None:
        """Close a directory."""
        self.fs.releasedir(self.handles[number])
        del self.handles[number], self._folders[number]

    def listing(self, number: int, cookie: int, take: Callable[[Entry], bool]) -> None:
        """Hand what a directory holds from *cookie* on to *take*, until it refuses one.

        What has been taken stands when reading on fails: the kernel goes on from there, and whoever
        is still busy or broken then says so again.
        """
        taken = False
        folder = self._folders[number]
        try:
            for name, attr, following in self.fs.readdir(self.handles[number], cookie, LOOKS):
                node = attr.ino
                counts = attr.mode & _S_IFMT == _S_IFDIR and name not in (b".", b"..")
                if counts:
                    node = self.nodes.found(node, folder, name)
                if not take(Entry(name, node, attr, following)):
                    if counts:
                        self.forget(node, 1)  # it was not told after all
                    return
                taken = True
        except Exception:
            if not taken:
                raise

    # --- upkeep -----------------------------------------------------------------------------

    def upkeep(self) -> bool:
        """What must be done about once a second.  Never raises; errors are logged.

        Returns whether there is more to do, for which `work` is to be called soon.
        """
        self._kept(self._watch_region)
        return self._kept(lambda: self.fs.tick())

    def work(self) -> bool:
        """Another piece of that; whether there is still more.  Never raises; errors are logged."""
        return self._kept(lambda: self.fs.work())

    def _kept(self, call: Callable[[], bool]) -> bool:
        try:
            return call()
        except Busy:
            pass  # next time
        except Exception as error:
            if self.standing is Standing.SOUND:  # else it has been said why
                failure("upkeep", error)
        return False

    def _watch_region(self) -> bool:
        """Log once what became of the region, and once when that is over; always False."""
        before, self.standing = self.standing, self.fs.standing()
        if self.standing is before:
            return False
        if self.standing is Standing.SOUND:
            log.warning("the region is as it was mounted again; it was %s", before.value)
        else:
            log.error("%s", self.standing.explained)
        self.on_standing(self.standing)
        return False
