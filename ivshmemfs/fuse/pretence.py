"""The answers to the replayer, which repeats foreign changes on the mount (see `replayer`).

The kernel asks about each system call of the replayer.  The daemon shows it the names as they were
before the change, agrees to the change, and does nothing.  The kernel then reports the change to
the programs that watch.  No other process gets such an answer: each request carries a pid.  The
kernel does not give that of the replayer to another process before `notify` has reaped it.

States of an action:

    queued     `add` took it
    current    the replayer asked for it, and got a record; `notify` allows a number of them
    done       the replayer asked for the next one, or `clear` dropped it

Only requests that the current action needs are answered.  All others of the replayer get EACCES.
Requests that only read attributes, or end something, are answered as for any caller.

What the kernel then knows stays true, because it asks again at the next look-up:

- a name that was created leads to the true inode, if there is one of that kind
- a file that was removed or moved keeps its node; a directory does while the kernel has it there
- all else is a phantom: a node number that is used once and never found again

A directory that lives on elsewhere is never shown for a removal: the kernel would kill its node.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from ivshmemfs.engine import Attr, Context
from ivshmemfs.errors import FsError, StaleHandle
from ivshmemfs.fuse import protocol, replayer

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.fuse.kernel_frontend import Answer, Buffer, Handler
    from ivshmemfs.fuse.operations import Operations

#: Maximum number of queued actions; beyond, watchers are told to list again.
QUEUE_MAX: Final = 4096
#: Actions without effect that one request skips.
SKIPPED_AT_ONCE: Final = 32
#: The handle of files that the replayer opens.
PRETENDED_FH: Final = (1 << 64) - 2
#: Phantoms have node numbers from here on.
_FIRST_PHANTOM: Final = 1 << 62
_BODY: Final = protocol.IN_HEADER.size
_LISTS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")


class Action(NamedTuple):
    """One foreign change that is to be repeated.  Folders are node numbers."""

    what: bytes  # an action of `replayer`
    folder: int
    name: bytes  # empty: the node `folder` itself
    ino: int
    is_dir: bool = False
    to_folder: int = 0
    to_name: bytes = b""
    victim: int = 0  # the inode that a rename replaced


class Parts(NamedTuple):
    """What `kernel_frontend` makes answers of."""

    entry: Callable[[int, Attr], bytes]
    attr: Callable[[Attr], bytes]
    sized: Callable[[bytes, Buffer], bytes]
    getxattr: Handler
    absent: Answer


class Pretence:
    """The queue of actions, and the answers to the replayer.

    *mode_of* returns the mode of an inode that programs watch, even after its end; else None.
    """

    def __init__(
        self, fs: Filesystem, operations: Operations, mode_of: Callable[[int], int | None]
    ) -> None:
        self._fs = fs
        self._operations = operations
        self._places = operations.places
        self._mode_of = mode_of
        self._parts: Parts | None = None
        self._queue: deque[Action] = deque()
        self._waiting: set[Action] = set()
        self._phantoms = itertools.count(_FIRST_PHANTOM)
        #: Whether the replayer asks for records.
        self.awake = False
        #: How many records it may still get; `notify` sets it.
        self.allowed = 0
        self.records = 0  # that it got, in all
        self._record_number = 0
        self._record = b""
        self._action: Action | None = None
        self._target = 0  # the node that the current action changes
        self._made_up: dict[int, Attr] = {}  # attributes of nodes without an inode, by node
        self._handlers: dict[int, Handler] = {
            protocol.LOOKUP: self._lookup,
            protocol.GETATTR: self._getattr,
            protocol.SETATTR: self._setattr,
            protocol.MKNOD: self._make,
            protocol.MKDIR: self._make,
            protocol.UNLINK: self._remove,
            protocol.RMDIR: self._remove,
            protocol.RENAME: self._rename,
            protocol.OPEN: self._open,
            protocol.GETXATTR: self._getxattr,
        }
        self._usual = {
            protocol.FORGET,
            protocol.BATCH_FORGET,
            protocol.INTERRUPT,
            protocol.RELEASE,
            protocol.FLUSH,
            protocol.ACCESS,
        }

    def use(self, parts: Parts) -> None:
        """Make answers of *parts*."""
        self._parts = parts

    def handler(self, opcode: int, usual: Handler | None) -> Handler | None:
        """Return the handler of a request of the replayer; *usual* is that of other callers."""
        if opcode in self._usual:
            return usual
        answer = self._handlers.get(opcode, self._refuse)

        def unattended(node: int, ctx: Context, request: Buffer, end: int) -> Answer:
            return self._fs.unattended(lambda: answer(node, ctx, request, end))

        unattended.__name__ = answer.__name__  # for the log
        return unattended

    # --- the queue --------------------------------------------------------------------------

    def add(self, action: Action) -> bool:
        """Queue *action* unless an equal one waits; return False if the queue is full."""
        if action in self._waiting:
            return True
        if len(self._queue) >= QUEUE_MAX:
            return False
        if action.what in (replayer.MODIFY, replayer.CLOSE, replayer.CHMOD):
            self._waiting.add(action)
        self._queue.append(action)
        return True

    def clear(self) -> None:
        """Drop all queued actions."""
        self._queue.clear()
        self._waiting.clear()

    def begin(self) -> None:
        """A new replayer starts."""
        self._record_number, self._record, self._action = 0, b"", None
        self.awake = False

    @property
    def has_work(self) -> bool:
        """Whether actions are queued."""
        return bool(self._queue)

    def _next_record(self) -> bytes:
        """Make the next action current; return its record.  Raises ENODATA at the end."""
        record: replayer.Record | None = None
        skipped = 0
        while record is None and self._queue and self.allowed > 0:
            self._action = action = self._queue[0]
            self._target = 0 if action.name else action.folder
            self._made_up.clear()
            try:
                record = self._record_of(action)
            except FsError:  # its folder has gone
                record = None
            self._queue.popleft()
            self._waiting.discard(action)
            skipped += 1
            if record is None and skipped >= SKIPPED_AT_ONCE:
                record = replayer.Record(replayer.NOTHING, 0, b"")
        if record is None:
            self._action, self.awake = None, False
            raise FsError(errno.ENODATA)
        self.allowed -= 1
        self.records += 1
        self._record_number += 1
        self._record = record.packed()
        return self._record

    def _record_of(self, action: Action) -> replayer.Record | None:
        """Return the record of an action; None if there is nothing left to repeat."""
        what, number = action.what, 0
        if what in (replayer.MODIFY, replayer.CLOSE, replayer.CHMOD):
            attr = self._attributes_of(action)
            if attr is None:
                return None
            kind = stat.S_IFMT(attr.mode)
            if what == replayer.CHMOD:
                number = stat.S_IMODE(attr.mode)
                if kind == stat.S_IFLNK:
                    what, number = replayer.CHOWN, self._operations.presented(attr).uid
            elif kind != stat.S_IFREG or (what == replayer.CLOSE and attr.nlink > 1):
                return None
            elif what == replayer.CLOSE and attr.size:  # made and written
                what, number = replayer.MODIFY, attr.size
            else:
                number = attr.size
        path_of = self._places.path_of
        return replayer.Record(
            what, action.folder, path_of(action.folder), action.name,
            action.to_folder, path_of(action.to_folder), action.to_name, number,
        )  # fmt: skip

    def _attributes_of(self, action: Action) -> Attr | None:
        if action.name:
            found = self._places.look_for(action.folder, action.name, count=False)
            return None if found is None else found[1]
        attr = self._alive(action.ino)
        if attr is None:
            mode = self._mode_of(action.ino)
            if mode is None:
                return None
            attr = self._made_up[action.folder] = _made_up(action.ino, mode, nlink=0)
        return attr

    def _alive(self, ino: int) -> Attr | None:
        """Return the attributes of an inode; None if it has no name any more."""
        try:
            attr = self._fs.getattr(ino)
        except StaleHandle:
            return None
        return attr if attr.nlink else None

    # --- handlers ---------------------------------------------------------------------------

    def _refuse(self, _node: int, _ctx: Context, _request: Buffer, _end: int) -> Answer:
        raise FsError(errno.EACCES)

    @property
    def _make_answer(self) -> Parts:
        assert self._parts is not None
        return self._parts

    def _getxattr(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        name = bytes(request[_BODY + protocol.GETXATTR_IN.size : end - 1])
        if name in _LISTS:  # the kernel keeps the answer for other callers, too
            return self._make_answer.getxattr(node, ctx, request, end)
        number = name.removeprefix(replayer.ATTRIBUTE)
        if node != 1 or number == name or not number.isdigit():
            raise FsError(errno.ENODATA)
        if int(number) == self._record_number + 1:
            record = self._next_record()
        elif int(number) == self._record_number and self._record:
            record = self._record  # asked again with a larger buffer
        else:
            raise FsError(errno.ENODATA)
        return self._make_answer.sized(record, request)

    def _lookup(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        name, action = bytes(request[_BODY : end - 1]), self._action
        if action is None:
            raise FsError(errno.EACCES)
        if name == b"." and node in (action.folder, action.to_folder):
            found = self._operations.lookup(node, name, ctx)
        elif (node, name) == (action.folder, action.name):
            found = self._shown(action)
        elif (node, name) == (action.to_folder, action.to_name):
            found = self._victim(action)
        elif self._places.leads_to(node, name, (action.folder, action.to_folder)):
            found = self._places.look_for(node, name)
        else:
            raise FsError(errno.EACCES)
        return self._make_answer.absent if found is None else self._make_answer.entry(*found)

    def _shown(self, action: Action) -> tuple[int, Attr] | None:
        """Return what the replayer sees by the name of an action."""
        if action.what in (replayer.CREATE, replayer.MKDIR):
            return None
        if action.what in (replayer.UNLINK, replayer.RMDIR):
            found = self._gone(action.folder, action.name, action.ino, action.is_dir)
        elif action.what == replayer.RENAME:
            found = self._moved(action)
        else:
            truth = self._places.look_for(action.folder, action.name)
            if truth is None:
                return None
            found = truth
        self._target = found[0]
        return found

    def _gone(self, folder: int, name: bytes, ino: int, is_dir: bool) -> tuple[int, Attr]:
        """Return node and attributes of a name that was removed, as before the removal."""
        alive = self._alive(ino)
        if is_dir:
            node = 0 if alive is not None else self._places.node_at(ino, folder, name)
            return self._made(node, stat.S_IFDIR | 0o700, ino)
        if alive is not None:
            return ino, alive._replace(nlink=alive.nlink + 1)
        mode = self._mode_of(ino)
        return self._made(0 if mode is None else ino, mode or stat.S_IFREG | 0o600, ino)

    def _moved(self, action: Action) -> tuple[int, Attr]:
        alive = self._alive(action.ino)
        if alive is not None and not action.is_dir:
            return action.ino, alive
        node = 0
        if alive is not None:
            node = self._places.node_at(action.ino, action.folder, action.name)
            if node:
                return node, alive
        kind = stat.S_IFDIR | 0o700 if action.is_dir else stat.S_IFREG | 0o600
        return self._made(node, kind, action.ino)

    def _victim(self, action: Action) -> tuple[int, Attr] | None:
        """Return what a rename replaced, if programs watch it; else None."""
        if not action.victim or self._mode_of(action.victim) is None:
            return None
        return self._gone(action.to_folder, action.to_name, action.victim, action.is_dir)

    def _made(self, node: int, mode: int, ino: int) -> tuple[int, Attr]:
        """Return *node*, or a phantom if it is 0, with made-up attributes."""
        if not node:
            node = ino = next(self._phantoms)
        attr = self._made_up[node] = _made_up(ino, mode, nlink=1)
        return node, attr

    def _getattr(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        made_up = self._made_up.get(node)
        if made_up is not None:
            return self._make_answer.attr(made_up)
        return self._make_answer.attr(self._operations.getattr(node, ctx))

    def _setattr(self, node: int, ctx: Context, request: Buffer, end: int) -> Answer:
        action = self._action
        changing = action is not None and action.what in (
            replayer.MODIFY, replayer.CLOSE, replayer.CHMOD,
        )  # fmt: skip
        if not changing or node != self._target:
            raise FsError(errno.EACCES)
        return self._getattr(node, ctx, request, end)

    def _open(self, node: int, _ctx: Context, _request: Buffer, _end: int) -> Answer:
        action = self._action
        if (
            action is None
            or action.what not in (replayer.MODIFY, replayer.CLOSE)
            or node != self._target
        ):
            raise FsError(errno.EACCES)
        return protocol.OPEN_OUT.pack(PRETENDED_FH, protocol.FOPEN_DIRECT_IO)

    def _make(self, node: int, _ctx: Context, request: Buffer, end: int) -> Answer:
        action, is_dir = self._action, False
        if action is not None and action.what == replayer.MKDIR:
            is_dir, start = True, _BODY + protocol.MKDIR_IN.size
        elif action is not None and action.what == replayer.CREATE:
            start = _BODY + protocol.MKNOD_IN.size
        else:
            raise FsError(errno.EACCES)
        if (node, bytes(request[start : end - 1])) != (action.folder, action.name):
            raise FsError(errno.EACCES)
        kind = stat.S_IFDIR if is_dir else stat.S_IFREG
        found = self._places.look_for(action.folder, action.name, kind=kind)
        if found is None:
            found = self._made(0, kind | 0o600, 0)
        return self._make_answer.entry(*found)

    def _remove(self, node: int, _ctx: Context, request: Buffer, end: int) -> Answer:
        action = self._action
        if (
            action is None
            or action.what not in (replayer.UNLINK, replayer.RMDIR)
            or (node, bytes(request[_BODY : end - 1])) != (action.folder, action.name)
        ):
            raise FsError(errno.EACCES)
        return None

    def _rename(self, node: int, _ctx: Context, request: Buffer, end: int) -> Answer:
        action = self._action
        (to,) = protocol.RENAME_IN.unpack_from(request, _BODY)
        start = _BODY + protocol.RENAME_IN.size
        name, _, to_name = bytes(request[start : end - 1]).partition(b"\0")
        if (
            action is None
            or action.what != replayer.RENAME
            or (node, name) != (action.folder, action.name)
            or (to, to_name) != (action.to_folder, action.to_name)
        ):
            raise FsError(errno.EACCES)
        if action.is_dir and self._target < _FIRST_PHANTOM:
            self._places.note_move((node, name), (to, to_name), action.ino)
        return None


def _made_up(ino: int, mode: int, nlink: int) -> Attr:
    return Attr(ino, mode, nlink, os.geteuid(), os.getegid(), 0, 0, 0, 0, 0, 0)
