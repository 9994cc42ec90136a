"""The filesystem as callers see it: POSIX operations, each one look or one change.

    mounted      `Filesystem.mount` made the parts of the mount, which live as long as it does
    unmounted    `unmount` gave the slot back: looks still work, changes raise EROFS

`Filesystem` has no state of its own.  Its parts, each of which uses only the parts above it:

    Volume       the region as this peer sees it: membership, snapshots, damage
    OpenFiles    handles by inode, and their listing in the open filter
    Garbage      releases and collects blocks
    Committer    changes: one plan, one commit
    Orphans      frees inodes without links
    Lifetimes    ghosts and pins: what callers name after it is gone
    Changes      changes that callers ask for; finds space for them
    Upkeep       what a mount does without a request
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from ivshmemfs.engine import acl, contents, data, directory, holes, names, privileges, xattr
from ivshmemfs.engine.changes import WAYS, Changes
from ivshmemfs.engine.committer import Committer
from ivshmemfs.engine.credentials import Credentials
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.engine.garbage import Garbage
from ivshmemfs.engine.handle import Handle
from ivshmemfs.engine.inode import MAX_RDEV, TARGET_MAX, Attr, Context, Inode, StatFs, attributes
from ivshmemfs.engine.lifetimes import Lifetimes
from ivshmemfs.engine.locks import Guard, Locks
from ivshmemfs.engine.messages import Messages
from ivshmemfs.engine.names import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from ivshmemfs.engine.openfiles import OpenFiles
from ivshmemfs.engine.orphans import Orphans
from ivshmemfs.engine.pieces import Pieces
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.engine.upkeep import Upkeep
from ivshmemfs.engine.volume import Volume
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
from ivshmemfs.format.inode import MAX_FILE_SIZE

if TYPE_CHECKING:
    from ivshmemfs.region import Region
    from ivshmemfs.region.condition import Condition
    from ivshmemfs.shm.bells import Doorbell

T = TypeVar("T")

NOW = 1 << 63  # in place of a timestamp: the time of the operation
EARLIEST, LATEST = (
    -(1 << 63),
    (1 << 63) - 1,
)  # timestamps that the inode record can store, in ns since 1970
_RENAME_FLAGS: Final = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16  # modes of fallocate(2)
EVERY = 1 << 60  # looks of one listing without a limit; no directory needs as many
FILLED_AT_ONCE = 1 << 20  # bytes of holes that one commit fills


class Filesystem:
    """The operations of one mount.  Not thread-safe.

    Between two calls any peer may remove an inode that the caller named: see `Lifetimes`.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume: Final = volume
        self._openfiles: Final = OpenFiles(volume)
        self._garbage: Final = Garbage(volume)
        self._committer: Final = Committer(volume, self._openfiles, self._garbage)
        self._orphans: Final = Orphans(volume, self._openfiles, self._committer)
        self._lifetimes: Final = Lifetimes(volume, self._openfiles, self._orphans)
        self._changes: Final = Changes(self._committer, self._lifetimes)
        self._upkeep: Final = Upkeep(
            volume, self._openfiles, self._garbage, self._orphans, self._lifetimes
        )
        self.locks: Final = Locks(volume, self._changes)
        self.region: Final = volume.region
        self.superblock: Final = volume.superblock
        self.readonly: Final = volume.readonly
        self.store: Final = volume.store
        self.table: Final = volume.table
        self.bells: Final = volume.bells
        self.clock: Final = volume.clock
        self.block_size: Final = volume.block_size
        self._credentials: Final = Credentials()

    @classmethod
    def mount(
        cls, region: Region, *, readonly: bool = False, doorbell: Doorbell | None = None
    ) -> Self:
        """Join the peers of `region`; with `readonly`, look without joining.

        With a `doorbell`, which the caller closes, it rings waiters and `bells` wait for rings.

        Raises FormatError and its subclasses when the region holds no usable filesystem,
        RegionUnfit, TooManyPeers, UnderRepair.
        """
        return cls(Volume.mount(region, readonly=readonly, doorbell=doorbell))

    def unmount(self) -> None:
        """Give all locks back and leave the peers.

        Frees files that are open here and have no links.
        """
        if self._volume.member is not None:
            with suppress(IvshmemfsError, OSError):
                self._volume.check_identity()
                self.locks.leave()
        self._upkeep.unmount()

    # --- the mount's parts, as callers use them ---------------------------------------------

    @property
    def peer_id(self) -> tuple[int, int]:
        """(slot, incarnation) of this mount among the peers; (0, 0) when it only looks."""
        return self._volume.peer_id

    @property
    def unfit(self) -> str:
        """Why this mount may not write, because its machine does not share the memory; else ""."""
        member = self._volume.member
        return "" if member is None else member.unfit

    @property
    def is_committing(self) -> bool:
        """Whether a peer holds the hint word now, so that a change would raise Busy."""
        return self._committer.hint.held

    @property
    def shares_locks(self) -> bool:
        """Whether locks that are taken here hold on all mounts."""
        return self.superblock.shares_locks and not self.readonly

    def messages(self, ino: int) -> Messages:
        """Return the queue in a fixed file that is open; raises EINVAL if it is none, EIO."""
        return Messages(self._volume, ino)

    def commit_word(self) -> int:
        """The commit word; while it does not change, no peer has changed anything.  One load."""
        return self.store.commit_word.load()

    def only_own_commits(self, before: int, now: int) -> bool:
        """Whether this mount made all commits after the commit word `before`, up to `now`."""
        return self._volume.only_own_commits(before, now)

    @property
    def groups_of(self) -> Callable[[int], Collection[int]]:
        """Returns the supplementary groups of a process, by pid.  The FUSE layer sets it."""
        return self._credentials.groups_of

    @groups_of.setter
    def groups_of(self, groups_of: Callable[[int], Collection[int]]) -> None:
        self._credentials.groups_of = groups_of

    @property
    def keeps_set_id(self) -> Callable[[Context], bool]:
        """Whether set-ID bits survive a write by this caller.  The FUSE layer sets it."""
        return self._credentials.keeps_set_id

    @keeps_set_id.setter
    def keeps_set_id(self, keeps_set_id: Callable[[Context], bool]) -> None:
        self._credentials.keeps_set_id = keeps_set_id

    def view(self) -> View:
        """Return the present state; the same object until the next commit."""
        return self._volume.view()

    def look(self, reader: Callable[[View], T]) -> T:
        """Return what `reader` returns for a snapshot; see `Volume.look`."""
        return self._volume.look(reader)

    def change(self, plan: Callable[[Transaction], T], *, removal: bool = False) -> T:
        """Commit what `plan` changes and return its result; see `Changes.change`."""
        return self._changes.change(plan, removal=removal)

    def condition(self, found: Condition | None = None) -> Condition:
        """Return how the region has changed since the mount; see `Volume.condition`."""
        return self._volume.condition(found)

    def tick(self) -> bool:
        """Beat and do one piece of upkeep, about once a second; see `Upkeep.tick`."""
        self.locks.tick()
        self._volume.locks = self.locks.count
        return self._upkeep.tick()

    def name_mount_point(self, path: bytes) -> None:
        """State in the own slot where this mount is; nothing without a slot."""
        if self._volume.member is not None:
            with suppress(Busy, IvshmemfsError, OSError):  # the next tick states it
                self._volume.member.state_mount_point(path)

    def work(self) -> bool:
        """Do one piece of upkeep; whether there is more.  See `Upkeep.work`."""
        return self._upkeep.work()

    def collect(self) -> int:
        """Do a whole collection now; returns how many blocks it freed."""
        return self._garbage.collect()

    def reap(self) -> None:
        """Free all inodes without links that no peer holds open.  Raises Busy."""
        self._orphans.reap()

    # --- looking ----------------------------------------------------------------------------

    def _found(self, inode: Inode) -> Attr:
        """Return the attributes of what a look-up found."""
        if not inode.is_regular:
            self._lifetimes.seen(inode)
        return self._attr(inode)

    def forget(self, ino: int) -> None:
        """Drop what is kept of `ino`: the caller looks it up before it names it again."""
        self._lifetimes.forget(ino)

    def _attr(self, inode: Inode) -> Attr:
        return inode.attr or attributes(inode, self.block_size)

    def lookup(self, parent: int, name: bytes) -> Attr:
        """Return the attributes of an entry; raises ENOENT, ENOTDIR."""
        found = self.find(parent, name)
        if found is None:
            raise FsError(errno.ENOENT)
        return found

    def find(self, parent: int, name: bytes) -> Attr | None:
        """Return what `lookup` returns, or None for ENOENT, which costs less than an exception."""

        def read(view: View) -> Inode | None:
            return names.find(view, parent, name)

        inode = self._volume.look(read)
        if inode is not None and self._lifetimes.careful_until:
            inode = self._lifetimes.pinned(inode, lambda: self._volume.look(read))
        return None if inode is None else self._found(inode)

    def unattended(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; what it finds gone did not vanish under a caller.

        For calls that repeat what happened elsewhere, and expect to find things gone.
        """
        self._lifetimes.unattended = True
        try:
            return call()
        finally:
            self._lifetimes.unattended = False

    def names_lead_to(self, ino: int, places: Collection[tuple[int, bytes]]) -> bool:
        """Whether one snapshot has inode `ino` under all `places`: (inode of a directory, name)."""

        def read(view: View) -> bool:
            for parent, name in places:
                folder = view.find_inode(parent)
                if folder is None or not folder.is_dir:
                    return False
                entry = directory.find(view, folder, name)
                if entry is None or entry.ino != ino:
                    return False
            return True

        return self._volume.look(read)

    def lookup_number(self, ino: int) -> Attr:
        """Return the attributes of an inode that no look-up has found yet; raises ESTALE."""
        return self._found(self._volume.look(lambda view: view.inode(ino)))

    def getattr(self, ino: int) -> Attr:
        """Return the attributes of an inode or of its ghost; raises ESTALE."""
        try:
            return self._volume.look(lambda view: self._attr(view.inode(ino)))
        except StaleHandle as stale:
            return self._attr(self._lifetimes.ghost(ino, stale))

    def birth_time(self, ino: int) -> int:
        """Return the creation time of an inode, in ns since 1970; raises ESTALE."""
        return self._look_at(lambda view: view.inode(ino).record.btime_ns)

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link; raises EINVAL, ESTALE, Corrupt."""

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
        """Look at an inode that the caller has looked up; ESTALE makes look-ups careful."""
        try:
            return self._volume.look(read)
        except StaleHandle as stale:
            raise self._lifetimes.vanished(stale) from None

    def statfs(self) -> StatFs:
        """Return the sizes of the filesystem.

        `blocks_avail` counts blocks of data in one new file, without its block map and the reserve.
        """
        geometry = self.superblock.geometry
        record = self._volume.look(lambda view: view.root.record)
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
        """Change attributes and return them all.  Times are in ns since 1970, or NOW.

        `kept` is a mode: it clears those set-ID bits that it does not have, and changes no other.
        Raises EISDIR, EINVAL, EFBIG, ESTALE.
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
                inode = self._credentials.after_chown(tx, inode, ctx)
            if mode is not None and inode.record.xattr_size:
                inode = acl.change_mode(tx, inode, mode)
            if kept is not None:
                changes["mode"] = inode.record.mode & (kept | ~privileges.SET_ID_BITS)
            return self._attr(tx.put(_changed(inode, changes, tx.now)))

        try:
            shrinking = size is None or self._volume.look(
                lambda view: view.inode(ino).record.size >= size
            )
            return self._changes.change(plan, removal=shrinking)
        except StaleHandle as stale:
            ghost = _changed(self._lifetimes.ghost(ino, stale), changes, self.clock.now())
            self._lifetimes.replace(ghost)
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
        return self._credentials.after_resize(tx, inode, ctx)

    # --- names ------------------------------------------------------------------------------

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Context) -> Attr:
        """Make a file, fifo, socket or device node; returns its attributes.  Raises EEXIST."""
        if stat.S_IFMT(mode) == 0:
            mode |= stat.S_IFREG
        if stat.S_IFMT(mode) == stat.S_IFDIR:
            raise FsError(errno.EINVAL)
        if not 0 <= rdev <= MAX_RDEV:
            raise FsError(errno.EINVAL)
        return self._made(lambda tx: names.make(tx, parent, name, mode, ctx, rdev=rdev))

    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Context) -> Attr:
        """Make a directory; returns its attributes.  Raises EEXIST."""
        return self._found(
            self._changes.change(lambda tx: names.mkdir(tx, parent, name, mode, ctx))
        )

    def symlink(self, parent: int, name: bytes, target: bytes, ctx: Context) -> Attr:
        """Make a symbolic link; returns its attributes.  Raises EEXIST, ENAMETOOLONG."""
        return self._made(lambda tx: names.symlink(tx, parent, name, target, ctx))

    def link(self, ino: int, parent: int, name: bytes, ctx: Context, *, over: bool = False) -> Attr:
        """Make another name for an inode, not of a directory; `over` replaces an existing file."""
        revive = ino in self._openfiles.nameless

        def plan(tx: Transaction) -> Attr:
            return self._attr(names.link(tx, ino, parent, name, revive=revive, over=over))

        attr = self._removing(plan, removal=False)
        self._openfiles.nameless.discard(ino)
        return attr

    def _made(self, plan: Callable[[Transaction], Inode]) -> Attr:
        return self._changes.change(lambda tx: self._attr(plan(tx)))

    def unlink(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove a name; raises ENOENT, EISDIR for a directory."""
        self._removing(lambda tx: names.unlink(tx, parent, name))

    def rmdir(self, parent: int, name: bytes, ctx: Context) -> None:
        """Remove an empty directory; raises ENOENT, ENOTDIR, ENOTEMPTY."""
        self._removing(lambda tx: names.rmdir(tx, parent, name))

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Context
    ) -> tuple[int, int]:
        """Move an entry, also over an existing one.

        `flags`: 0, RENAME_NOREPLACE or RENAME_EXCHANGE, the former also with RENAME_WHITEOUT.
        Returns the number of the moved inode, and of the inode exchanged for it (0: none).
        """
        if flags & ~_RENAME_FLAGS or (flags & RENAME_EXCHANGE and flags != RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)

        def plan(tx: Transaction) -> tuple[int, int]:
            return names.rename(tx, parent, name, new_parent, new_name, flags, ctx)

        return self._removing(plan, removal=not flags & RENAME_WHITEOUT)

    def _removing(self, plan: Callable[[Transaction], T], *, removal: bool = True) -> T:
        def run(tx: Transaction) -> tuple[T, Transaction]:
            return plan(tx), tx

        result, tx = self._changes.change(run, removal=removal)
        for inode in tx.removed:
            self._lifetimes.remember(inode, tx.now)
        return result

    # --- opening and closing ----------------------------------------------------------------

    def open(self, ino: int, flags: int, ctx: Context | None = None) -> Handle:
        """Open a file, with O_TRUNC and O_APPEND of `flags`; raises EISDIR, ESTALE."""
        inode = self._look_at(lambda view: view.inode(ino))
        if inode.is_dir:
            raise FsError(errno.EISDIR)
        handle = Handle(ino, flags, ctx, outsider=self._credentials.is_outsider(inode, ctx))
        if ctx is not None and handle.unprivileged and inode.record.mode & privileges.SET_ID_BITS:
            handle.unprivileged = not self._credentials.keeps_set_id(ctx)
        self._openfiles.hold(ino)
        try:
            self._openfiles.confirm(ino)
            if flags & os.O_TRUNC and inode.is_regular:
                self.setattr(ino, ctx or Context(0, 0), size=0)
        except StaleHandle as stale:
            self._openfiles.let_go(ino)
            raise self._lifetimes.vanished(stale) from None
        except BaseException:
            self._openfiles.let_go(ino)
            raise
        if self._lifetimes.pins:
            self._lifetimes.opened(ino)
        return handle

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Context
    ) -> tuple[Handle, Attr]:
        """Make and open a file; open an existing one, or raise EEXIST with O_EXCL.

        The caller has seen that there is no file.  If another machine has made one since then,
        nothing has checked its permissions.  Unless uid and gid alone permit the access, this
        raises ESTALE, and the kernel walks the path again.
        """
        made = False

        def plan(tx: Transaction) -> Attr:
            nonlocal made
            made = False
            folder = names.parent_of(tx, parent, name)
            position = directory.locate(tx, folder, name)
            entry = position.entry
            if entry is not None:
                if flags & os.O_EXCL:
                    raise FsError(errno.EEXIST)
                found = names.target(tx, entry)
                if not names.plainly_permitted(folder, found, flags, ctx):
                    raise StaleHandle("another machine has just made this file")
                return self._attr(found)
            made = True
            new_mode = stat.S_IFREG | stat.S_IMODE(mode)
            inode = names.new_inode(tx, folder, new_mode, ctx)
            self._openfiles.hold_new(inode.ino)
            names.add(tx, folder, position, inode)
            return self._attr(inode)

        try:
            attr = self._changes.change(plan)
        except BaseException:
            self._openfiles.drop_new(0)
            raise
        self._openfiles.drop_new(attr.ino if made else 0)
        if made:
            return Handle(attr.ino, flags, ctx), attr
        handle = self.open(attr.ino, flags, ctx)
        return handle, self.getattr(attr.ino)

    def tmpfile(self, parent: int, mode: int, flags: int, ctx: Context) -> tuple[Handle, Attr]:
        """Make and open a file without a name (O_TMPFILE); `link` can give it one."""
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
        """Make and open an inode without a name, of any kind except directories.

        `rdev` belongs to device nodes, `target` to symbolic links.  The release of the handle or
        the end of this mount frees the inode unless `link` has named it.  With O_EXCL in `flags`,
        `link` refuses it.  Raises ENAMETOOLONG, EINVAL.
        """
        if len(target) > TARGET_MAX:
            raise FsError(errno.ENAMETOOLONG)
        if not 0 <= rdev <= MAX_RDEV:
            raise FsError(errno.EINVAL)

        def plan(tx: Transaction) -> Attr:
            folder = names.folder_of(tx, parent)
            inode = names.make_nameless(tx, folder, mode, ctx, rdev=rdev, to=target)
            self._openfiles.hold_new(inode.ino)
            return self._attr(inode)

        try:
            attr = self._changes.change(plan)
        except BaseException:
            self._openfiles.drop_new(0)
            raise
        self._openfiles.drop_new(attr.ino)
        if not flags & os.O_EXCL:
            self._openfiles.nameless.add(attr.ino)
        return Handle(attr.ino, flags, ctx), attr

    def is_open(self, ino: int) -> bool:
        """Whether this mount holds inode `ino` open."""
        return ino in self._openfiles.counts

    def release(self, handle: Handle) -> None:
        """Close a file; the last close of a file without links frees it."""
        self._orphans.close(handle.ino)

    # --- data -------------------------------------------------------------------------------

    def read(
        self, handle: Handle, offset: int, length: int, into: memoryview | None = None
    ) -> data.Buffer:
        """Return up to `length` bytes from `offset`, of one snapshot.

        A long result is a part of `into`, if the caller gives it.
        """
        got = self._volume.look(
            lambda view: data.read(view, view.inode(handle.ino), offset, length, into)
        )
        self._volume.bytes_read += len(got)
        return got

    def value(self, parent: int, name: bytes, most: int) -> bytes | None:
        """Return the contents of the regular file `name`, or None if there is none.

        Raises ENOTDIR, ENOENT, ENAMETOOLONG, EFBIG for more than `most` bytes, Corrupt.
        """
        return self._volume.look(lambda view: contents.value(view, parent, name, most))

    def write(
        self,
        handle: Handle,
        offset: int,
        content: data.Buffer,
        *,
        append: bool | None = None,
        ctx: Context | None = None,
    ) -> int:
        """Write `content` at `offset`, or with `append` at the end of the file; atomic.

        `append` and `ctx` default to their values at open time.  Returns the number of bytes
        written, fewer than given if the region is full.  When space is short, the write takes
        several commits and turns: see `Pieces`.
        """
        at_end = handle.append if append is None else append

        def store(at: int, piece: data.Buffer) -> None:
            def plan(tx: Transaction) -> None:
                inode = tx.inode(handle.ino)
                if handle.guard is not None:
                    handle.guard.check(tx, inode)
                inode = data.write(tx, inode, inode.record.size if at_end else at, piece)
                tx.put(self._credentials.after_write(tx, inode, handle, ctx))

            self._changes.change(plan)
            self._volume.bytes_written += len(piece)

        try:
            if content:
                store(offset, content)
        except NoSpace:
            if len(content) <= self.block_size:
                raise
            return Pieces(store, offset, content, self.block_size, appending=at_end).turn()
        return len(content)

    def read_to(self, handle: Handle, offset: int, length: int, file: int) -> int:
        """Copy up to `length` bytes of one snapshot to the same offset of an open local file.

        `file` is its descriptor.  Returns the number of bytes.  After an exception the local file
        has undefined contents there.
        """
        done = self._volume.look(
            lambda view: data.read_to(view, view.inode(handle.ino), offset, length, file)
        )
        self._volume.bytes_read += done
        return done

    def write_from(self, handle: Handle, offset: int, length: int, file: int) -> int:
        """Copy up to `length` bytes from the same offset of an open local file; atomic.

        `file` is its descriptor.  Returns the number of bytes.
        """

        def plan(tx: Transaction) -> int:
            inode = tx.inode(handle.ino)
            if handle.guard is not None:
                handle.guard.check(tx, inode)
            inode, done = data.write_from(tx, inode, offset, length, file)
            if done:
                tx.put(self._credentials.after_write(tx, inode, handle))
            return done

        done = self._changes.change(plan)
        self._volume.bytes_written += done
        return done

    def seek(self, handle: Handle, offset: int, whence: int) -> int:
        """Return the next offset of data (SEEK_DATA) or of a hole (SEEK_HOLE); raises ENXIO."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FsError(errno.EINVAL)
        find = holes.next_data if whence == os.SEEK_DATA else holes.next_hole
        return self._volume.look(lambda view: find(view, view.inode(handle.ino), offset))

    def fallocate(
        self, handle: Handle, mode: int, offset: int, length: int, ctx: Context | None = None
    ) -> None:
        """Make or fill holes, as fallocate(2); allocates no blocks beyond the end of the file.

        A later write may still find no space, because it replaces blocks by new ones.  Making holes
        is one change.  Filling them takes a commit and a turn per FILLED_AT_ONCE bytes; after each
        it raises Unfinished, and `go_on` continues.  `ctx` defaults to its value at open time.
        Raises NoSpace, EOPNOTSUPP, EFBIG, ENODEV.
        """
        if mode not in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
            raise FsError(errno.EOPNOTSUPP)
        end = offset + length
        if end > MAX_FILE_SIZE:
            raise FsError(errno.EFBIG)
        grow = not mode & KEEP_SIZE
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            self._punch(handle, offset, length, ctx, grow=grow)
            return
        record = self._volume.look(lambda view: _file(view, handle).record)
        missing = (end - offset) // self.block_size - record.blocks
        ways = WAYS
        while missing > self.statfs().blocks_avail:
            ways -= 1
            if ways < 0 or not self._changes.make_way():
                raise NoSpace("the region has fewer free blocks than that")
        self._fill(handle, offset, end, ctx, grow=grow)

    def _punch(
        self, handle: Handle, offset: int, length: int, ctx: Context | None, *, grow: bool
    ) -> None:
        def plan(tx: Transaction) -> None:
            inode = holes.punch(tx, _guarded(tx, handle), offset, length)
            if grow and offset + length > inode.record.size:
                inode = data.truncate(tx, inode, offset + length)
            tx.put(self._credentials.after_write(tx, data.modified(tx, inode), handle, ctx))

        self._changes.change(plan, removal=True)

    def _fill(
        self, handle: Handle, offset: int, end: int, ctx: Context | None, *, grow: bool
    ) -> None:
        def plan(tx: Transaction) -> int:
            inode = _guarded(tx, handle)
            upto = end if grow else min(end, inode.record.size)
            filled, following = holes.fill(tx, inode, offset, upto, FILLED_AT_ONCE)
            tx.put(self._credentials.after_write(tx, data.modified(tx, filled), handle, ctx))
            return following if following < upto else end

        at = self._changes.change(plan)
        if at < end:
            go_on = partial(self._fill, handle, at, end, ctx, grow=grow)
            raise Unfinished("a part is filled", go_on)

    def fsync(self, handle: Handle) -> None:
        """Do nothing: each write is in the region before it returns."""

    # --- directories ------------------------------------------------------------------------

    def opendir(self, ino: int) -> Handle:
        """Open a directory to list it; raises ENOTDIR, ESTALE."""
        try:
            self._volume.look(lambda view: view.directory(ino))
        except StaleHandle as stale:
            if not self._lifetimes.ghost(ino, stale).is_dir:
                raise
        return Handle(ino, os.O_RDONLY, None)

    def releasedir(self, handle: Handle) -> None:
        """Close a directory."""

    def readdir(
        self, handle: Handle, cookie: int, looks: int = EVERY
    ) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield (name, attributes, cookie of the next entry) from `cookie` on; 0 is the start.

        An entry that exists all the time appears exactly once.  An entry that is removed meanwhile
        may be missing.  Ends with the directory, or after `looks` looks, each of which finds at
        least one entry.
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

    def entries(self, handle: Handle, cookie: int, looks: int = EVERY) -> Iterator[list[Dirent]]:
        """Yield the entries of one look at a time, as `readdir` but without attributes.

        An entry's `key` is the cookie of the next entry.
        """
        for number, name in enumerate((b".", b"..")):
            if cookie <= number:
                attr = self._dot(handle.ino, name)
                if attr is None:
                    return
                yield [Dirent(number + 1, attr.ino | attr.mode >> 12 << TYPE_SHIFT, name)]
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
                return None  # the directory was removed: it has no entries
            raise

    def _next_entries(self, ino: int, key: int) -> list[Dirent]:
        return self._volume.look(lambda view: _entries_after(view, ino, key))

    def _next_found(self, ino: int, key: int) -> list[tuple[Dirent, Attr]]:
        def read(view: View) -> list[tuple[Dirent, Inode]]:
            found = _entries_after(view, ino, key)
            return [(entry, names.target(view, entry)) for entry in found]

        return [(entry, self._found(inode)) for entry, inode in self._volume.look(read)]

    # --- extended attributes ----------------------------------------------------------------

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return the value of an extended attribute; raises ENODATA."""
        xattr.check_namespace(name)
        value = self._xattrs(ino).get(name)
        if value is None or (name in xattr.LISTS and not acl.is_valid(value)):
            raise FsError(errno.ENODATA)
        return value

    def _xattrs(self, ino: int) -> xattr.Table:
        try:
            return self._volume.look(lambda view: xattr.table(view, view.inode(ino)))
        except StaleHandle as stale:
            self._lifetimes.ghost(ino, stale)
            return xattr.NO_ATTRIBUTES

    def listxattr(self, ino: int, ctx: Context | None = None) -> list[bytes]:
        """The names of all attributes; only root sees trusted ones."""
        root = ctx is None or ctx.uid == 0
        shown = (*xattr.NAMESPACES, *xattr.LISTS) if root else xattr.PUBLIC
        table = self._xattrs(ino)
        return [
            name
            for name in table.names
            if name.startswith(shown)
            and not (name in xattr.LISTS and not acl.is_valid(table.get(name) or b""))
        ]

    def access_list(self, ino: int) -> list[acl.Entry]:
        """The access list of an inode; no entries if it has none, or is gone."""
        try:
            return self._volume.look(
                lambda view: acl.find(view, view.inode(ino), xattr.ACCESS_LIST)
            )
        except StaleHandle:
            return []

    def mode_without_list(self, attr: Attr) -> int:
        """The mode for a copy of an inode without its access list, as `acl.without_list`."""
        return acl.without_list(attr.mode, self.access_list(attr.ino))

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
        """Set an attribute; an access list changes the mode, too.

        A caller outside of the file's group also clears set-group-ID by an access list;
        `clears_set_group_id` says so if the kernel has found out.
        """

        def plan(tx: Transaction) -> None:
            inode = tx.inode(ino)
            if name not in xattr.LISTS:
                tx.put(xattr.set_value(tx, inode, name, bytes(value), flags))
                return
            clears = clears_set_group_id
            if clears is None:
                clears = self._credentials.loses_set_group_id(inode, ctx)
            tx.put(acl.set_list(tx, inode, name, bytes(value), clears_set_group_id=clears))

        self._changes.change(plan)

    def removexattr(self, ino: int, name: bytes, ctx: Context) -> None:
        """Remove an attribute; raises ENODATA, but not for an access list."""
        remove = acl.remove if name in xattr.LISTS else xattr.remove_value
        self._changes.change(lambda tx: tx.put(remove(tx, tx.inode(ino), name)), removal=True)


def _file(view: View, handle: Handle) -> Inode:
    """Return the inode of `handle`; raises ENODEV unless it is a regular file."""
    inode = view.inode(handle.ino)
    if not inode.is_regular:
        raise FsError(errno.ENODEV)
    return inode


def _guarded(tx: Transaction, handle: Handle) -> Inode:
    """Return the inode of an open regular file, to change its contents; raises LockLost."""
    inode = _file(tx, handle)
    if handle.guard is not None:
        handle.guard.check(tx, inode)
    return inode


def _changed(inode: Inode, changes: dict[str, int], now: int) -> Inode:
    """Return `inode` with `changes`, which name fields of its record."""
    fields: dict[str, Any] = dict(changes)
    if "mode" in fields:
        fields["mode"] = stat.S_IFMT(inode.record.mode) | stat.S_IMODE(fields["mode"])
    for field in ("atime_ns", "mtime_ns"):
        if field in fields:
            moment = fields[field]
            fields[field] = now if moment == NOW else min(max(moment, EARLIEST), LATEST)
    fields["ctime_ns"] = now
    return inode.changed(fields)


def _entries_after(view: View, ino: int, key: int) -> list[Dirent]:
    """Return the entries after `key` as `directory.leaf_after`; none of a removed directory."""
    folder = view.find_inode(ino)
    return [] if folder is None else directory.leaf_after(view, folder, key)
