"""The filesystem as callers see it: POSIX operations, each one look or one change."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ivshmemfs.engine import data, directory, holes, names, xattr
from ivshmemfs.engine.directory import Entry
from ivshmemfs.engine.inode import MAX_RDEV, TARGET_MAX, Attr, Context, Inode, StatFs, attributes
from ivshmemfs.engine.locks import Guard, Locks
from ivshmemfs.engine.mount import ATTEMPTS, Mount
from ivshmemfs.engine.names import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from ivshmemfs.engine.pieces import Pieces
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import (
    Busy,
    Corrupt,
    FsError,
    IvshmemfsError,
    NoSpace,
    StaleHandle,
    Unfinished,
)
from ivshmemfs.format.dirent import NAME_MAX, TYPE_SHIFT

if TYPE_CHECKING:
    from ivshmemfs.region import Region

T = TypeVar("T")

NOW = 1 << 63  # as a time: the time of the operation
EARLIEST, LATEST = -(1 << 63), (1 << 63) - 1  # ns since 1970, as they can be stored
CAREFUL = 5.0  # seconds that a mount looks up carefully after something vanished under a caller
PINNED = 3.0  # seconds that a careful look-up lists a file as open
UNPINNED_AT_ONCE = 8  # pins that one call lets go; each may free a file, in its own commit
PINS = 64  # of them at once: the list is coarse, and what it seems to hold is freed late
PINNED_SHARE = 8  # a part of the free space: as much at most is kept from being freed by pins
_RENAME_FLAGS = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT
GHOSTS = 4096  # removed inodes that are remembered at most
FOLDERS = 4096  # directories, fifos and the like that are remembered at most
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # modes of fallocate(2)
EVERY = 1 << 60  # looks, more than any directory needs
FILLED_AT_ONCE = 1 << 20  # bytes of holes that one commit fills


class Handle:
    """An open file or directory.

    `append`, `unprivileged`, and `outsider` (opened by nobody of the file's group) are as of its
    opening.
    """

    __slots__ = ("append", "guard", "ino", "outsider", "readable", "unprivileged", "writable")

    def __init__(
        self, ino: int, flags: int, ctx: Context | None, *, outsider: bool = False
    ) -> None:
        self.ino = ino
        self.append = bool(flags & os.O_APPEND)
        access = flags & os.O_ACCMODE
        self.readable = access != os.O_WRONLY
        self.writable = access != os.O_RDONLY
        self.unprivileged = ctx is not None and ctx.uid != 0
        self.outsider = outsider
        self.guard: Guard | None = None  # of the locks that were taken through it


class Filesystem(Mount):
    """The operations of one mount.  Not thread-safe.

    Callers look a name up first and name the inode in a second call.  Two things bridge the time
    between, in which anybody may remove it:

    * *Ghosts*: what this mount itself removed, and what is no file whoever removed it, keeps its
      attributes, without links, until the caller forgets the inode: a directory that somebody is
      in, a fifo that is open, a path that somebody holds.  So all but files are remembered whenever
      they are looked up.
    * *Pins*: once a file vanished so under a caller (ESTALE; the kernel then walks the path
      again), files that are looked up are listed as open for a moment, so that the second walk
      cannot fail the same way however fast others replace the name.  Some at a time only, and small
      ones beside the free space, because what was replaced takes up room for as long.
    """

    def __init__(self, region: Region, *, readonly: bool = False) -> None:
        super().__init__(region, readonly=readonly)
        #: The further groups of a process, by its number; set by whoever can find out.
        self.groups_of: Callable[[int], Collection[int]] = _no_groups
        #: Whether what a caller writes keeps set-ID bits; the same.
        self.keeps_set_id: Callable[[Context], bool] = _is_root
        # As they were last, and their ctime since then; in the order of removal.
        self._ghosts: OrderedDict[int, tuple[Inode, int]] = OrderedDict()
        self._folders: dict[int, Inode] = {}  # all but files, as they were last looked up
        # Until when, and how many blocks; by inode, in the order of pinning.
        self._pins: dict[int, tuple[float, int]] = {}
        self._pinned_blocks = 0
        self._careful_until = 0.0
        self._nameless: set[int] = set()  # open files that were made without a name
        self.locks = Locks(self)

    def tick(self) -> bool:
        """Show life and do a bounded piece of housekeeping; see `Mount.tick`.  Raises Busy."""
        with suppress(Busy, FsError):  # neither of which may keep it from showing life
            self._unpin(time.monotonic())
        self.locks.tick()
        return super().tick()

    @property
    def shares_locks(self) -> bool:
        """Whether locks that are taken here hold on all mounts."""
        return self.superblock.shares_locks and not self.readonly

    def unmount(self) -> None:
        """Give all locks back and leave the peer table; see `Mount.unmount`."""
        if self._member is not None:
            with suppress(IvshmemfsError, OSError):
                self._check_identity()
                self.locks.leave()
        super().unmount()

    # --- what vanishes between two calls ------------------------------------------------------

    def _careful(self, stale: StaleHandle) -> StaleHandle:
        """Note that something vanished under a caller."""
        self._careful_until = time.monotonic() + CAREFUL
        return stale

    def _ghost(self, ino: int, stale: StaleHandle) -> Inode:
        self._check_identity()  # in another filesystem, or none, nothing is remembered
        self.look(lambda view: view.find_inode(ino))
        ghost = self._ghosts.get(ino)
        if ghost is None:
            folder = self._folders.pop(ino, None)
            if folder is None:
                raise self._careful(stale)
            ghost = self._remember(folder, folder.record.ctime_ns)
        inode, ctime_ns = ghost
        return inode.evolve(nlink=0, ctime_ns=ctime_ns)

    def _remember(self, removed: Inode, ctime_ns: int) -> tuple[Inode, int]:
        if len(self._ghosts) >= GHOSTS:
            self._ghosts.popitem(last=False)
        self._ghosts[removed.ino] = ghost = removed, ctime_ns
        return ghost

    def _found(self, inode: Inode) -> Attr:
        """The attributes of what was looked up."""
        if not inode.is_regular:  # nobody tells when a directory is entered, or a fifo opened
            folders = self._folders
            if folders.pop(inode.ino, None) is None and len(folders) >= FOLDERS:
                del folders[next(iter(folders))]
            folders[inode.ino] = inode  # the last, so that the first is the longest ago
        return self._attr(inode)

    def forget(self, ino: int) -> None:
        """The caller will not name inode `ino` again before it has looked it up again."""
        self._ghosts.pop(ino, None)
        self._folders.pop(ino, None)

    def _pinned(self, found: Inode, look_again: Callable[[], Inode | None]) -> Inode | None:
        """What was looked up, made sure to exist for the next call; None when it has gone."""
        now = time.monotonic()
        self._unpin(now)
        if now > self._careful_until:
            self._careful_until = 0.0
            return found
        inode: Inode | None = found
        for _ in range(ATTEMPTS):
            if inode is None or self._secured(inode, now):
                return inode
            inode = look_again()
        raise Busy("the name is replaced faster than it can be looked up")

    def _secured(self, inode: Inode, now: float) -> bool:
        """Pin a file; False when it is gone already."""
        if inode.is_dir:
            return True
        ino = inode.ino
        self._hold(ino)
        try:
            self._confirm(ino)
        except StaleHandle:
            self._let_go(ino)
            return False
        before = self._pins.pop(ino, None)
        if before is not None:
            self._let_go(ino)
            self._pinned_blocks -= before[1]
        blocks = inode.record.blocks
        self._pins[ino] = now + PINNED, blocks
        self._pinned_blocks += blocks
        self._unpin(now)
        return True

    def _unpin(self, now: float) -> None:
        """Let pins go whose time is over, or which are too many: some at a time."""
        for _ in range(min(UNPINNED_AT_ONCE, len(self._pins))):
            ino, (until, blocks) = next(iter(self._pins.items()))
            many = len(self._pins) > PINS or self._pinned_blocks > self._pinnable()
            if until >= now and not (many and len(self._pins) > 1):
                break
            del self._pins[ino]
            self._pinned_blocks -= blocks
            self._close(ino)

    def _pinnable(self) -> int:
        """Blocks that may be kept by pins."""
        used = self.look(lambda view: view.root.record.used)
        free = self.superblock.geometry.block_count - used
        return max(free, 0) // PINNED_SHARE

    # --- looking ----------------------------------------------------------------------------

    def _attr(self, inode: Inode) -> Attr:
        return inode.attr or attributes(inode, self.block_size)

    def lookup(self, parent: int, name: bytes) -> Attr:
        """The attributes of an entry; raises ENOENT, ENOTDIR."""
        found = self.find(parent, name)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    def find(self, parent: int, name: bytes) -> Attr | None:
        """The same; None when there is no such entry, which is cheaper than ENOENT."""

        def read(view: View) -> Inode | None:
            ino = view.known.find_name(parent, name)
            if ino:
                return view.find_inode(ino)
            folder = names.folder_of(view, parent)
            if name == b".":
                return folder
            if name == b"..":
                return view.inode(folder.record.parent)
            if len(name) > NAME_MAX:
                raise FsError(errno.ENAMETOOLONG)
            entry = directory.find(view, folder, name)
            if entry is None:
                return None
            inode = names.target(view, entry)
            view.known.add_name(parent, name, inode.ino)
            return inode

        inode = self.look(read)
        if inode is not None and self._careful_until:
            inode = self._pinned(inode, lambda: self.look(read))
        return None if inode is None else self._found(inode)

    def names_lead_to(self, ino: int, places: Collection[tuple[int, bytes]]) -> bool:
        """Whether all these names, of inodes of directories, lead to inode `ino` at one moment."""

        def read(view: View) -> bool:
            for parent, name in places:
                folder = view.find_inode(parent)
                if folder is None or not folder.is_dir:
                    return False
                entry = directory.find(view, folder, name)
                if entry is None or entry.ino != ino:
                    return False
            return True

        return self.look(read)

    def lookup_number(self, ino: int) -> Attr:
        """The attributes of an inode that nobody has looked up before; raises ESTALE."""
        return self._found(self.look(lambda view: view.inode(ino)))

    def getattr(self, ino: int) -> Attr:
        """The attributes of an inode; raises ESTALE."""
        try:
            return self.look(lambda view: self._attr(view.inode(ino)))
        except StaleHandle as stale:
            return self._attr(self._ghost(ino, stale))

    def birth_time(self, ino: int) -> int:
        """When an inode was made, in ns since 1970; raises ESTALE."""
        return self._look_at(lambda view: view.inode(ino).record.btime_ns)

    def readlink(self, ino: int) -> bytes:
        """The target of a symbolic link."""

        def read(view: View) -> bytes:
            inode = view.inode(ino)
            if not stat.S_ISLNK(inode.record.mode):
                raise FsError(errno.EINVAL)
            target = bytes(data.read(view, inode, 0, inode.record.size))
            if not target or b"\0" in target:
                raise Corrupt(f"inode {ino}: a symbolic link to {target[:40]!r}")
            return target

        return self._look_at(read)

    def _look_at(self, read: Callable[[View], T]) -> T:
        """Look at an inode that was looked up before."""
        try:
            return self.look(read)
        except StaleHandle as stale:
            raise self._careful(stale) from None

    def statfs(self) -> StatFs:
        """Sizes; `blocks_avail`: data of one file, without its block map and the reserve."""
        geometry = self.superblock.geometry
        record = self.look(lambda view: view.root.record)
        free = max(geometry.block_count - record.used, 0)
        avail = max(free - geometry.reserve, 0)
        return StatFs(
            self.block_size, geometry.block_count, free, data.most_blocks(self.block_size, avail),
            record.inodes + avail, avail, NAME_MAX,
        )  # fmt: skip

    # --- attributes -------------------------------------------------------------------------

    def setattr(
        self,
        ino: int,
        ctx: Context,
        guard: Guard | None = None,
        /,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        kept: int | None = None,
    ) -> Attr:
        """Change attributes; times may be NOW.

        `kept` is a mode: privileges that are not in it are shed, all else stays.  `guard` is of the
        open file through which the size is changed; raises LockLost.
        """

        wanted = {"mode": mode, "uid": uid, "gid": gid, "atime_ns": atime_ns, "mtime_ns": mtime_ns}
        changes = {field: value for field, value in wanted.items() if value is not None}
        for moment in (atime_ns, mtime_ns):
            if moment is not None:
                self.clock.seen(moment)

        def plan(tx: Transaction) -> Attr:
            inode = tx.inode(ino)
            if size is not None:
                if guard is not None:
                    guard.check(tx, inode)
                inode = self._resized(tx, inode, size, ctx)
            if uid is not None or gid is not None:
                sheds, outsider = not inode.is_dir, self._outsider(inode, ctx)
                inode = _without_privileges(tx, inode, unprivileged=sheds, outsider=outsider)
            if kept is not None:
                changes["mode"] = inode.record.mode & (kept | ~names.PRIVILEGES)
            return self._attr(tx.put(_changed(inode, changes, tx.now)))

        try:
            shrinking = size is None or self.look(lambda view: view.inode(ino).record.size >= size)
            return self.change(plan, removal=shrinking)
        except StaleHandle as stale:
            ghost = _changed(self._ghost(ino, stale), changes, self.clock.now())
            self._ghosts[ino] = ghost, ghost.record.ctime_ns
            return self._attr(ghost)

    def _resized(self, tx: Transaction, inode: Inode, size: int, ctx: Context) -> Inode:
        if inode.is_dir:
            raise FsError(errno.EISDIR)
        if not inode.is_regular:
            raise FsError(errno.EINVAL)
        if size < 0:
            raise FsError(errno.EINVAL)
        if size == inode.record.size:
            inode = data.modified(tx, inode)
        else:
            inode = data.truncate(tx, inode, size)
        outsider = self._outsider(inode, ctx)
        return _without_privileges(
            tx, inode, unprivileged=self._sheds(inode, ctx), outsider=outsider
        )

    def _sheds(self, inode: Inode, ctx: Context) -> bool:
        """Whether `inode` has set-ID bits, which go when `ctx` changes its contents."""
        return bool(inode.record.mode & names.PRIVILEGES) and not self.keeps_set_id(ctx)

    def _outsider(self, inode: Inode, ctx: Context | None) -> bool:
        """Whether a set-group-ID of a file that is no program goes, too, when `ctx` changes it."""
        record = inode.record
        if ctx is None or record.mode & names.SET_GROUP_ID != stat.S_ISGID:
            return False
        if self.keeps_set_id(ctx):
            return False
        return record.gid != ctx.gid and record.gid not in self.groups_of(ctx.pid)

    # --- names ------------------------------------------------------------------------------

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Context) -> Attr:
        """Make a file, fifo, socket or device node."""
        if stat.S_IFMT(mode) == 0:
            mode |= stat.S_IFREG
        if stat.S_IFMT(mode) == stat.S_IFDIR:
            raise FsError(errno.EINVAL)
        if not 0 <= rdev <= MAX_RDEV:
            raise FsError(errno.EINVAL)
        return self._made(lambda tx: names.make(tx, parent, name, mode, ctx, rdev=rdev))

    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Context) -> Attr:
        """Make a directory."""
        return self._found(self.change(lambda tx: names.mkdir(tx, parent, name, mode, ctx)))

    def symlink(self, parent: int, name: bytes, target: bytes, ctx: Context) -> Attr:
        """Make a symbolic link."""
        return self._made(lambda tx: names.symlink(tx, parent, name, target, ctx))

    def link(self, ino: int, parent: int, name: bytes, ctx: Context, *, over: bool = False) -> Attr:
        """Make another name for an inode that is no directory; `over` replaces another file."""
        revive = ino in self._nameless

        def plan(tx: Transaction) -> Attr:
            return self._attr(names.link(tx, ino, parent, name, revive=revive, over=over))

        attr = self._removing(plan, removal=False)
        self._nameless.discard(ino)
        return attr

    def _made(self, plan: Callable[[Transaction], Inode]) -> Attr:
        return self.change(lambda tx: self._attr(plan(tx)))

    def unlink(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove a name of something that is no directory."""
        self._removing(lambda tx: names.unlink(tx, parent, name))

    def rmdir(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove an empty directory."""
        self._removing(lambda tx: names.rmdir(tx, parent, name))

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Context
    ) -> tuple[int, int]:
        """Move an entry, also over another one; RENAME_NOREPLACE, _EXCHANGE, _WHITEOUT.

        Returns which inode was moved, and which was moved back in exchange (0: none).
        """
        if flags & ~_RENAME_FLAGS or (flags & RENAME_EXCHANGE and flags != RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)

        def plan(tx: Transaction) -> tuple[int, int]:
            return names.rename(tx, parent, name, new_parent, new_name, flags, ctx)

        return self._removing(plan, removal=not flags & RENAME_WHITEOUT)

    def _removing(self, plan: Callable[[Transaction], T], *, removal: bool = True) -> T:
        def run(tx: Transaction) -> tuple[T, Transaction]:
            return plan(tx), tx

        result, tx = self.change(run, removal=removal)
        for inode in tx.removed:
            self._remember(inode, tx.now)
        return result

    # --- opening and closing ----------------------------------------------------------------

    def open(self, ino: int, flags: int, ctx: Context | None = None) -> Handle:
        """Open a file; honours O_TRUNC and O_APPEND."""
        inode = self._look_at(lambda view: view.inode(ino))
        if inode.is_dir:
            raise FsError(errno.EISDIR)
        handle = Handle(ino, flags, ctx, outsider=self._outsider(inode, ctx))
        self._hold(ino)
        try:
            self._confirm(ino)
            if flags & os.O_TRUNC and inode.is_regular:
                self.setattr(ino, ctx or Context(0, 0), size=0)
        except StaleHandle as stale:
            self._let_go(ino)
            raise self._careful(stale) from None
        except BaseException:
            self._let_go(ino)
            raise
        return handle

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Context
    ) -> tuple[Handle, Attr]:
        """Open a file, making it first if there is none (or failing with EEXIST for O_EXCL).

        The caller has seen that there is none; for what another machine made meanwhile nobody has
        checked permissions.  ESTALE, so that the path is walked again, unless they are plain.
        """
        made = False

        def plan(tx: Transaction) -> Attr:
            nonlocal made
            made = False
            folder = names.parent_of(tx, parent, name)
            spot = directory.locate(tx, folder, name)
            entry = spot.entry
            if entry is not None:
                if flags & os.O_EXCL:
                    raise FsError(errno.EEXIST)
                found = names.target(tx, entry)
                if not names.plainly_permitted(folder, found, flags, ctx):
                    raise StaleHandle("another machine has just made this file")
                return self._attr(found)
            made = True
            new_mode = stat.S_IFREG | stat.S_IMODE(mode)
            inode = tx.new_inode(names.new_record(tx, folder, new_mode, ctx))
            self._hold_new(inode.ino)
            names.add(tx, folder, spot, inode)
            return self._attr(inode)

        try:
            attr = self.change(plan)
        except BaseException:
            self._drop_new(0)
            raise
        self._drop_new(attr.ino if made else 0)
        if made:
            return Handle(attr.ino, flags, ctx), attr
        handle = self.open(attr.ino, flags, ctx)
        return handle, self.getattr(attr.ino)

    def tmpfile(self, parent: int, mode: int, flags: int, ctx: Context) -> tuple[Handle, Attr]:
        """Make and open a file without a name, as O_TMPFILE does; `link` may give it one."""
        return self.make_nameless(parent, stat.S_IFREG | stat.S_IMODE(mode), flags, ctx)

    def make_nameless(
        self,
        parent: int,
        mode: int,
        flags: int,
        ctx: Context,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> tuple[Handle, Attr]:
        """The same for any kind but directories; `target` is that of a symbolic link.

        It is gone when it is released, or its owner dies, before `link` has named it.
        """
        if len(target) > TARGET_MAX:
            raise FsError(errno.ENAMETOOLONG)
        if not 0 <= rdev <= MAX_RDEV:
            raise FsError(errno.EINVAL)

        def plan(tx: Transaction) -> Attr:
            folder = names.folder_of(tx, parent)
            inode = names.make_nameless(tx, folder, mode, ctx, rdev=rdev, to=target)
            self._hold_new(inode.ino)
            return self._attr(inode)

        try:
            attr = self.change(plan)
        except BaseException:
            self._drop_new(0)
            raise
        self._drop_new(attr.ino)
        if not flags & os.O_EXCL:
            self._nameless.add(attr.ino)
        return Handle(attr.ino, flags, ctx), attr

    # A new file must be listed as open before the commit that makes it visible, and a lost race
    # gives it another number, so what was listed for a failed plan is taken back.
    _new: int = 0

    def _hold_new(self, ino: int) -> None:
        self._drop_new(0)
        self._hold(ino)
        self._new = ino

    def _drop_new(self, kept: int) -> None:
        if self._new and self._new != kept:
            self._let_go(self._new)
        self._new = 0

    def release(self, handle: Handle) -> None:
        """Close a file; a file without links whose last handle this was is freed."""
        self._close(handle.ino)

    def _close(self, ino: int) -> None:
        if not self._let_go(ino):
            return
        self._nameless.discard(ino)
        with suppress(Busy, FsError):  # or a later tick, here or elsewhere, frees it
            if self._member is not None and self.view().root.record.orphans:
                inode = self.look(lambda view: view.find_inode(ino))
                if inode is not None and inode.record.nlink == 0:
                    self._free_orphan(ino)

    # --- data -------------------------------------------------------------------------------

    def read(
        self, handle: Handle, offset: int, length: int, into: memoryview | None = None
    ) -> data.Buffer:
        """Up to `length` bytes from `offset`, all of one moment; in `into` if they are many."""
        return self.look(lambda view: data.read(view, view.inode(handle.ino), offset, length, into))

    def write(
        self,
        handle: Handle,
        offset: int,
        content: data.Buffer,
        *,
        append: bool | None = None,
        ctx: Context | None = None,
    ) -> int:
        """Write `content` at `offset`, or at the end when it is to be appended; atomic.

        Whether it is, and who writes, is as of the opening if the caller does not know better.
        Returns how many bytes were written: fewer when only a part fits the region.  Where free
        room is short it takes several commits, and turns: see `Pieces`.
        """
        at_end = handle.append if append is None else append

        def store(at: int, piece: data.Buffer) -> None:
            def plan(tx: Transaction) -> None:
                inode = tx.inode(handle.ino)
                if handle.guard is not None:
                    handle.guard.check(tx, inode)
                inode = data.write(tx, inode, inode.record.size if at_end else at, piece)
                tx.put(self._shed(tx, inode, handle, ctx))

            self.change(plan)

        try:
            if content:
                store(offset, content)
        except NoSpace:
            if len(content) <= self.block_size:
                raise
            return Pieces(store, offset, content, self.block_size, appending=at_end).turn()
        return len(content)

    def _shed(
        self, tx: Transaction, inode: Inode, handle: Handle, ctx: Context | None = None
    ) -> Inode:
        """`inode` without what it loses when `ctx`, or whoever opened it, writes."""
        if ctx is None:
            sheds, outsider = handle.unprivileged, handle.outsider
        else:
            sheds, outsider = self._sheds(inode, ctx), self._outsider(inode, ctx)
        return _without_privileges(tx, inode, unprivileged=sheds, outsider=outsider)

    def read_to(self, handle: Handle, offset: int, length: int, file: int) -> int:
        """Copy up to `length` bytes, all of one moment, to the same place in an open local file.

        Returns how many there were.  When this raises, what stands there is of no use.
        """
        return self.look(
            lambda view: data.read_to(view, view.inode(handle.ino), offset, length, file)
        )

    def write_from(self, handle: Handle, offset: int, length: int, file: int) -> int:
        """Copy up to `length` bytes from the same place in an open local file; atomic.

        Returns how many there were.
        """

        def plan(tx: Transaction) -> int:
            inode = tx.inode(handle.ino)
            if handle.guard is not None:
                handle.guard.check(tx, inode)
            inode, done = data.write_from(tx, inode, offset, length, file)
            if done:
                tx.put(self._shed(tx, inode, handle))
            return done

        return self.change(plan)

    def seek(self, handle: Handle, offset: int, whence: int) -> int:
        """Where data (SEEK_DATA) or a hole (SEEK_HOLE) begins from `offset` on; raises ENXIO."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FsError(errno.EINVAL)
        find = holes.next_data if whence == os.SEEK_DATA else holes.next_hole
        return self.look(lambda view: find(view, view.inode(handle.ino), offset))

    def fallocate(self, handle: Handle, mode: int, offset: int, length: int) -> None:
        """As fallocate(2): make or fill holes; blocks are kept within the file only.

        Room that is written over needs new blocks all the same, so this promises nothing about
        later writes.  Making holes is one change.  Filling them takes a commit and a turn for each
        1 MiB: after it Unfinished is raised, whose `go_on` does the rest.  Raises NoSpace,
        EOPNOTSUPP.
        """
        if mode not in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
            raise FsError(errno.EOPNOTSUPP)
        end = offset + length
        if end > data.MAX_SIZE:
            raise FsError(errno.EFBIG)
        grow = not mode & KEEP_SIZE
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            self._punch(handle, offset, length, grow=grow)
            return
        record = self.look(lambda view: _file(view, handle).record)
        missing = (end - offset) // self.block_size - record.blocks
        if missing > self.statfs().blocks_avail:
            raise NoSpace("the region has not that much room")
        self._fill(handle, offset, end, grow=grow)

    def _punch(self, handle: Handle, offset: int, length: int, *, grow: bool) -> None:
        def plan(tx: Transaction) -> None:
            inode = _guarded(tx, handle)
            inode = holes.punch(tx, inode, offset, length)
            if grow and offset + length > inode.record.size:
                inode = data.truncate(tx, inode, offset + length)
            tx.put(self._shed(tx, data.modified(tx, inode), handle))

        self.change(plan, removal=True)

    def _fill(self, handle: Handle, offset: int, end: int, *, grow: bool) -> None:
        def plan(tx: Transaction) -> int:
            inode = _guarded(tx, handle)
            upto = end if grow else min(end, inode.record.size)
            filled, following = holes.fill(tx, inode, offset, upto, FILLED_AT_ONCE)
            tx.put(self._shed(tx, data.modified(tx, filled), handle))
            return following if following < upto else end

        at = self.change(plan)
        if at < end:
            raise Unfinished("a part is filled", lambda: self._fill(handle, at, end, grow=grow))

    def fsync(self, handle: Handle) -> None:
        """Nothing to do: what has returned is in the region."""

    # --- directories ------------------------------------------------------------------------

    def opendir(self, ino: int) -> Handle:
        """Open a directory for reading its entries."""
        try:
            self.look(lambda view: view.directory(ino))
        except StaleHandle as stale:
            if not self._ghost(ino, stale).is_dir:
                raise
        return Handle(ino, os.O_RDONLY, None)

    def releasedir(self, handle: Handle) -> None:
        """Close a directory."""

    def readdir(
        self, handle: Handle, cookie: int, looks: int = EVERY
    ) -> Iterator[tuple[bytes, Attr, int]]:
        """(name, attributes, cookie of the next) from `cookie` on; 0 is the start.

        Entries that exist throughout appear exactly once, whatever changes meanwhile.  An entry
        that goes while it is being listed is left out.  Ends after so many `looks`, each of which
        finds at least one entry, or at the end of the directory.
        """
        for number, name in enumerate((b".", b"..")):
            if cookie <= number:
                attr = self._dot(handle.ino, name)
                if attr is None:
                    return
                yield name, attr, number + 1
        key = cookie if cookie > 1 else 0
        while looks > 0 and (found := self._next_found(handle.ino, key)):
            looks -= 1
            for entry, attr in found:
                yield entry.name, attr, entry.key
            key = found[-1][0].key

    def entries(self, handle: Handle, cookie: int, looks: int = EVERY) -> Iterator[list[Entry]]:
        """The same without looking at any inode, in pieces of one look each.

        An entry's `key` is the cookie of the next.
        """
        for number, name in enumerate((b".", b"..")):
            if cookie <= number:
                attr = self._dot(handle.ino, name)
                if attr is None:
                    return
                yield [Entry(number + 1, attr.ino | attr.mode >> 12 << TYPE_SHIFT, name)]
        key = cookie if cookie > 1 else 0
        while looks > 0 and (found := self._next_entries(handle.ino, key)):
            looks -= 1
            yield found
            key = found[-1].key

    def _dot(self, ino: int, name: bytes) -> Attr | None:
        try:
            return self.lookup(ino, name)
        except FsError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None  # the directory was removed: nothing in it
            raise

    def _next_entries(self, ino: int, key: int) -> list[Entry]:
        return self.look(lambda view: _entries_after(view, ino, key))

    def _next_found(self, ino: int, key: int) -> list[tuple[Entry, Attr]]:
        def read(view: View) -> list[tuple[Entry, Inode]]:
            found = _entries_after(view, ino, key)
            return [(entry, names.target(view, entry)) for entry in found]

        return [(entry, self._found(inode)) for entry, inode in self.look(read)]

    # --- extended attributes ----------------------------------------------------------------

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value of an attribute; raises ENODATA."""
        xattr.check_namespace(name)
        value = self._xattrs(ino).get(name)
        if value is None:
            raise FsError(errno.ENODATA)
        return value

    def _xattrs(self, ino: int) -> xattr.Table:
        try:
            return self.look(lambda view: xattr.table(view, view.inode(ino)))
        except StaleHandle as stale:
            self._ghost(ino, stale)
            return xattr.NO_ATTRIBUTES

    def listxattr(self, ino: int, ctx: Context | None = None) -> list[bytes]:
        """The names of all attributes; only root sees trusted ones."""
        shown = xattr.NAMESPACES if ctx is None or ctx.uid == 0 else xattr.PUBLIC
        return [name for name in self._xattrs(ino).names if name.startswith(shown)]

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int, ctx: Context) -> None:
        """Set an attribute."""
        self.change(
            lambda tx: tx.put(xattr.set_value(tx, tx.inode(ino), name, bytes(value), flags))
        )

    def removexattr(self, ino: int, name: bytes, ctx: Context) -> None:
        """Remove an attribute; raises ENODATA."""
        self.change(lambda tx: tx.put(xattr.remove_value(tx, tx.inode(ino), name)), removal=True)


def _file(view: View, handle: Handle) -> Inode:
    """What is open, if it is a regular file."""
    inode = view.inode(handle.ino)
    if not inode.is_regular:
        raise FsError(errno.ENODEV)
    return inode


def _guarded(tx: Transaction, handle: Handle) -> Inode:
    """The same for a change of its contents; raises LockLost."""
    inode = _file(tx, handle)
    if handle.guard is not None:
        handle.guard.check(tx, inode)
    return inode


def _changed(inode: Inode, changes: dict[str, int], now: int) -> Inode:
    """`inode` with other attributes, as setattr takes them."""
    fields: dict[str, Any] = dict(changes)
    if "mode" in fields:
        fields["mode"] = stat.S_IFMT(inode.record.mode) | stat.S_IMODE(fields["mode"])
    for field in ("atime_ns", "mtime_ns"):
        if field in fields:
            moment = fields[field]
            fields[field] = now if moment == NOW else min(max(moment, EARLIEST), LATEST)
    return inode.evolve(ctime_ns=now, **fields)


def _entries_after(view: View, ino: int, key: int) -> list[Entry]:
    """As `directory.leaf_after`; nothing is left of a directory that is gone."""
    folder = view.find_inode(ino)
    return [] if folder is None else directory.leaf_after(view, folder, key)


def _is_root(ctx: Context) -> bool:
    return not ctx.uid


def _no_groups(_pid: int) -> Collection[int]:
    return ()


def _without_privileges(
    tx: Transaction, inode: Inode, *, unprivileged: bool, outsider: bool
) -> Inode:
    """What a change of contents or owner leaves: no capabilities, no set-ID of the unprivileged."""
    record = inode.record
    if record.xattr_size:
        inode = xattr.without_capability(tx, inode)
    if unprivileged and record.mode & names.PRIVILEGES:
        inode = names.without_privileges(inode, outsider=outsider)
    return inode
