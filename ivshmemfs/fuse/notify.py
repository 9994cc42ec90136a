"""Changes of other machines, told to the programs that watch on this one (`-o notify`).

The kernel reports to inotify and fanotify what system calls on this machine do.  The replayer, a
child of the daemon, repeats each foreign change as a system call, and `pretence` answers it.

States of the notifier:

    off        it was not started, or a reason against it was logged
    waiting    the replayer runs; no program watches; nothing is polled here
    looking    programs watch: every LOOK_SECONDS the commit word is compared.  After a commit the
               watched directories and inodes are compared, and differences are queued.  On a busy
               mount looks and records wait for their credit (`pacing`).  Where bells work, it
               sleeps until a ring after some looks without a commit (`wakeups`)

The replayer sends the list of watched nodes (`_take_marks`); only that changes waiting to looking
and back.  The replayer may die in each state.  `run` then starts another one, at most one a second;
its first list replaces the old one.

The kernel has reported this mount's own changes already.  While the notifier looks, `operations`
notes them in `OwnChanges`, and `_look` leaves them out.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from ivshmemfs.engine.diff import Change, Kind, Watcher
from ivshmemfs.errors import Busy, FsError, IvshmemfsError
from ivshmemfs.fuse import mountpoint, replayer
from ivshmemfs.fuse.operations import OwnChanges
from ivshmemfs.fuse.pacing import Pacer
from ivshmemfs.fuse.pretence import Action, Pretence
from ivshmemfs.fuse.wakeups import Naps

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.engine.transaction import View
    from ivshmemfs.fuse.kernel_frontend import KernelFrontEnd
    from ivshmemfs.fuse.operations import Operations
    from ivshmemfs.fuse.wakeups import Wakeups

log = logging.getLogger(__name__)

#: Seconds between two looks at the commit word while programs watch.
LOOK_SECONDS: Final = 0.01
#: Minimum seconds between two starts of the replayer.
START_SECONDS: Final = 1.0
#: Maximum number of watched nodes; others get no events.
MARKS_MAX: Final = 4096
#: Watched inodes that one look compares.
COMPARED_AT_ONCE: Final = 200
#: Directories whose names one look begins to remember; other requests run between two looks.
FOLDERS_AT_ONCE: Final = 10
#: Seconds that watched directories rest after they had too many names to remember.
REST_SECONDS: Final = 10.0
#: Seconds of work after which the replayer may be stopped; then it must not outlive the mount.
STOPPED_SECONDS: Final = 1.0
#: Seconds that an unmount waits for the end of the replayer.
END_SECONDS: Final = 0.5
#: The part of a clock's number for the CPU time of a process; the rest is its pid.
_CPU_OF_PROCESS: Final = 2
_MESSAGE: Final = 1 << 16  # bytes; the replayer sends less


class _Details(NamedTuple):
    """What of an inode its watchers are told about."""

    mode: int
    owners: tuple[int, int]
    contents: tuple[int, int]  # mtime in ns, size; 0, 0 for a directory
    gone: bool


class _Used(NamedTuple):
    """What was used up to a moment."""

    clock: float  # in seconds, as the rest
    looks: float  # CPU of looks
    replayer: float  # CPU of the replayer
    daemon: float  # CPU of the daemon
    records: int


class Notifier:
    """The notifications of one mount: *path*, on *device* as "MAJOR:MINOR"."""

    def __init__(
        self, fs: Filesystem, operations: Operations, path: str, wakeups: Wakeups | None = None
    ) -> None:
        self._fs = fs
        self._operations = operations
        self._path = path
        self.pretence = Pretence(fs, operations, self._mode_of)
        self.front: KernelFrontEnd | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = False
        self._deaths = 0
        self._device = ""
        self._stopped_at = 0.0  # the replayer that works from now until then may be stopped
        self._channel: socket.socket | None = None
        self._any = trio.Event()  # set while programs watch
        self._naps = Naps(fs, LOOK_SECONDS, wakeups)
        self._coming: list[int] = []  # nodes of a list that is not complete
        self._listed: set[int] | None = None  # the last list, until `_adopt` takes it
        self._unread: list[int] | None = None  # inodes of it whose details are still to be read
        self._nodes: dict[int, set[int]] = {}  # watched nodes, by inode
        self._details: dict[int, _Details] = {}  # by inode
        self._watcher = Watcher(fs)
        self._word = 0  # the commit word of the last comparison
        self._unwatched: list[int] = []  # directories that the watcher is still to remember
        self._found: list[Change] = []  # that are not queued yet
        self._round: list[int] = []  # watched inodes that are still to be compared
        self._round_word = 0  # the commit word at the start of the last round
        self._round_from = 0  # and of the round before it
        self._told: set[tuple[int, Kind]] = set()  # what got an event by a name in this round
        self._rests_until = 0.0
        self._pacer = Pacer()
        self._looked = 0.0  # CPU seconds of all looks
        self._used = _Used(0.0, 0.0, 0.0, 0.0, 0)

    def _mode_of(self, ino: int) -> int | None:
        details = self._details.get(ino)
        return None if details is None else details.mode

    # --- the replayer -----------------------------------------------------------------------

    async def run(self, device: str | None) -> None:
        """Notify for as long as the mount lives."""
        if device is None or self.front is None or not sys.executable:
            log.warning("%s: notify is off: the replayer cannot be started", self._path)
            return
        self._device = device
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_on)
            while await self._run_once(device):
                if self._deaths == 1:
                    log.warning("%s: the replayer died; it is started again", self._path)
            nursery.cancel_scope.cancel()
        self._operations.own = None  # no look takes what it notes

    async def _run_once(self, device: str) -> bool:
        """Start a replayer and serve it until it ends; return whether to start another one."""
        started = trio.current_time()
        try:
            channel = self._start(device)
        except OSError as error:
            log.warning("%s: notify is off: no replayer: %s", self._path, error)
            return False
        with channel:
            useful = await self._listen(channel)
        self._channel = None
        await self._reap()
        if not useful:
            log.warning("%s: notify is off: /proc cannot be read here", self._path)
        if not useful or self._ending:
            return False
        self._deaths += 1
        await trio.sleep_until(started + START_SECONDS)
        return not self._ending

    def _start(self, device: str) -> socket.socket:
        """Start a replayer; return our end of its socket.  Raises OSError."""
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the kernel may reuse its pid
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-I", "-S", replayer.__file__, str(theirs.fileno())]
        with theirs:
            try:
                process = subprocess.Popen(
                    [*words, self._path, device, str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self._process, self._channel = process, ours
        self.pretence.begin()
        if self.front is not None:
            self.front.replayer = process.pid
        self._wake()
        return ours

    async def _listen(self, channel: socket.socket) -> bool:
        """Take the messages of the replayer until it ends; return False if it cannot work."""
        while True:
            await trio.lowlevel.wait_readable(channel)
            try:
                message = channel.recv(_MESSAGE)
            except BlockingIOError:
                continue
            except OSError:
                return True
            if not message:
                return True
            kind = message[:1]
            if kind == replayer.NO_PROC:
                return False
            if kind == replayer.GIVEN_UP:
                self.pretence.clear()
                self.pretence.awake = False
            else:
                self._take_marks(message[1:], last=kind == replayer.MARKS)

    async def _reap(self) -> None:
        """End the replayer and wait for its end.

        Its pid names it until then: a request that it has sent must never count as a user's.
        """
        process = self._process
        if process is None:
            return
        process.kill()
        while process.poll() is None:
            await trio.sleep(0.002)
        if self._process is process:  # another task may have waited, too
            self._process = None
            if self.front is not None:
                self.front.replayer = -1

    async def end(self) -> None:
        """End the replayer for good before an unmount; wait up to END_SECONDS."""
        self._ending = True
        with trio.move_on_after(END_SECONDS):
            await self._reap()

    def close(self) -> None:
        """End the replayer after the end of the connection."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)

    def _wake(self) -> None:
        """Tell the replayer that there are records."""
        has_work = self.pretence.has_work and self.pretence.allowed
        if has_work and not self.pretence.awake and self._channel is not None:
            with suppress(OSError):  # it died; `run` notices
                self._channel.send(b"!")
                self.pretence.awake = True
                self._stopped_at = trio.current_time() + STOPPED_SECONDS

    def _end_with_mount(self, now: float) -> None:
        """End a replayer that may be stopped, if the mount has ended: its copy keeps it alive."""
        if not self.pretence.awake or now < self._stopped_at:
            return
        self._stopped_at = now + STOPPED_SECONDS
        mounts = mountpoint.mounted()
        if all(entry.device != self._device for entry in mounts) and self._process is not None:
            self._ending = True
            self._process.kill()

    # --- what is watched --------------------------------------------------------------------

    def _take_marks(self, raw: bytes, *, last: bool) -> None:
        self._coming += [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
        if not last:
            return
        if len(self._coming) > MARKS_MAX:
            log.warning("%s: more than %d watches; some get no events", self._path, MARKS_MAX)
        self._listed, self._coming = set(self._coming[:MARKS_MAX]), []
        self._unread = None
        if self._listed or self._nodes:
            self._any.set()
        self._naps.wake()

    def _adopt(self, listed: set[int]) -> bool:
        """Watch the inodes of the listed nodes, and no others; return whether that is done.

        Reads COMPARED_AT_ONCE inodes: other requests run before the next call.  Raises Busy.
        """
        nodes: dict[int, set[int]] = {}
        for node in listed:
            with suppress(FsError):
                nodes.setdefault(self._operations.inode_of(node), set()).add(node)
        if self._unread is None:
            self._unread = [ino for ino in nodes if ino not in self._details]
            if nodes and self._operations.own is None:
                self._operations.own = OwnChanges()  # from the first inode that is read
                self._word = self._round_word = self._fs.commit_word()
        self._details.update(self._details_of(self._unread[:COMPARED_AT_ONCE]))
        del self._unread[:COMPARED_AT_ONCE]
        if self._unread:
            return False
        self._details = {ino: kept for ino, kept in self._details.items() if ino in nodes}
        self._nodes, self._listed = nodes, None
        for folder in self._watcher.folders - self._details.keys():
            self._watcher.unwatch(folder)
        self._watch_folders()
        if not nodes:
            self._operations.own = None
        return True

    def _watch_folders(self) -> None:
        watched = self._watcher.folders
        self._unwatched = [
            ino
            for ino, details in self._details.items()
            if stat.S_ISDIR(details.mode) and not details.gone and ino not in watched
        ]

    def _details_of(self, inodes: list[int]) -> dict[int, _Details]:
        """Return details of the inodes that exist.  Raises Busy."""

        def read(view: View) -> dict[int, _Details]:
            found = {}
            for ino in inodes:
                inode = view.find_inode(ino)
                if inode is not None:
                    record = inode.record
                    contents = (0, 0) if inode.is_dir else (record.mtime_ns, record.size)
                    owners = (record.uid, record.gid)
                    found[ino] = _Details(record.mode, owners, contents, not record.nlink)
            return found

        return self._fs.look(read) if inodes else {}

    # --- looking ----------------------------------------------------------------------------

    async def _look_on(self) -> None:
        while True:
            await self._any.wait()
            busy = self._listed is not None or self._unwatched or self._round or self._rests_until
            await self._naps.nap(self._word, busy=bool(busy))
            self._account()
            if not self._pacer.may_look:
                continue
            started = time.thread_time()
            try:
                self._end_with_mount(trio.current_time())
                if self._listed is not None:
                    if not self._adopt(self._listed):
                        continue
                    if not self._nodes:
                        self._any = trio.Event()
                        self.pretence.clear()
                        continue
                self._look(trio.current_time())
            except Busy:
                continue  # next time
            except (IvshmemfsError, OSError) as error:
                log.debug("watched directories are not compared: %s", error)
            finally:
                self._looked += time.thread_time() - started

    def _account(self) -> None:
        """Tell the pacer what was used since the last call; let the replayer go on."""
        process, replayer_cpu = self._process, 0.0
        if process is not None:
            with suppress(OSError):  # it died
                replayer_cpu = time.clock_gettime(~process.pid << 3 | _CPU_OF_PROCESS)
        before, clock, records = self._used, trio.current_time(), self.pretence.records
        now = self._used = _Used(clock, self._looked, replayer_cpu, time.process_time(), records)
        self._pacer.account(
            elapsed=now.clock - before.clock,
            looks=now.looks - before.looks,
            replayer=max(now.replayer - before.replayer, 0.0),  # another one starts at 0
            daemon=now.daemon - before.daemon,
            records=now.records - before.records,
        )
        self.pretence.allowed = self._pacer.records
        self._wake()

    def _look(self, now: float) -> None:
        """Compare what is watched, and queue what other machines changed.  Raises Busy."""
        if self._rests_until and now >= self._rests_until:
            self._rests_until = 0.0
            self._watch_folders()
        for ino in self._unwatched[:FOLDERS_AT_ONCE]:
            if ino in self._details:
                self._watcher.watch(ino)
        del self._unwatched[:FOLDERS_AT_ONCE]
        word = self._fs.commit_word()
        self._found += self._watcher.changes()
        own = self._operations.own
        if own is None or (word == self._word and not self._found and not self._round):
            return
        if word != self._word:
            self._compare_names(now, own)
        self._word = word
        self._naps.wake()
        if not self._round and word != self._round_word:
            self._round, self._round_from = list(self._details), self._round_word
            self._round_word = word
        if self._round:
            self._compare_selves(own)
        self._wake()

    def _compare_names(self, now: float, own: OwnChanges) -> None:
        """Queue the changes that the watcher found, unless this mount made all of them."""
        found, self._found = self._found, []
        if not self._fs.only_own_commits(self._word, self._fs.commit_word()):
            if any(change.kind is Kind.OVERFLOW for change in found):
                self._rests_until = now + REST_SECONDS
                self._overflow()
            else:
                self._queue_all(_foreign(found, own))
        own.names.clear()

    def _compare_selves(self, own: OwnChanges) -> None:
        """Compare some of the watched inodes themselves; queue what changed.  Raises Busy."""
        some = [ino for ino in self._round[:COMPARED_AT_ONCE] if ino in self._details]
        found = self._details_of(some)
        foreign = not self._fs.only_own_commits(self._round_from, self._fs.commit_word())
        for ino in some:
            before = self._details[ino]
            now = found.get(ino) or before._replace(gone=True)
            self._details[ino] = now
            if before != now and not before.gone and foreign and ino not in own.inodes:
                self._queue_self(ino, before, now)
        del self._round[:COMPARED_AT_ONCE]
        if not self._round:
            own.inodes.clear()
            self._told.clear()

    def _queue_self(self, ino: int, before: _Details, now: _Details) -> None:
        """Queue changes of a watched inode, except those that it got by a name."""
        whats = []
        if now.contents != before.contents and not now.gone:
            whats.append((replayer.MODIFY, Kind.CHANGED))
        if now.mode != before.mode or now.owners != before.owners or now.gone:
            whats.append((replayer.CHMOD, Kind.ATTRIBUTES))
        for what, kind in whats:
            if not {(ino, kind), (ino, Kind.REMOVED)} & self._told:
                for node in self._nodes.get(ino, ()):
                    self._queue(Action(what, node, b"", ino))

    def _queue_all(self, changes: list[Change]) -> None:
        targets = {change.to: change for change in changes if change.to is not None}
        victims = {
            (change.folder, change.name): change.ino
            for change in changes
            if change.kind is Kind.REMOVED and (change.folder, change.name) in targets
        }
        self._told.update((change.ino, change.kind) for change in changes)
        for change in changes:
            if change.kind is Kind.MOVED:
                self._queue_move(change, victims)
            elif (change.folder, change.name) not in victims or change.kind is not Kind.REMOVED:
                for folder in self._nodes.get(change.folder, ()):
                    for what in _actions_of(change):
                        name, ino, is_dir = change.name, change.ino, change.is_dir
                        self._queue(Action(what, folder, name, ino, is_dir))

    def _queue_move(self, change: Change, victims: dict[tuple[int, bytes], int]) -> None:
        assert change.to is not None
        folder = min(self._nodes.get(change.folder, {0}))
        to_folder = min(self._nodes.get(change.to[0], {0}))
        if folder and to_folder:
            victim = victims.get(change.to, 0)
            self._queue(
                Action(
                    replayer.RENAME, folder, change.name, change.ino, change.is_dir,
                    to_folder, change.to[1], victim,
                )
            )  # fmt: skip

    def _queue(self, action: Action) -> None:
        if not self.pretence.add(action):
            self._overflow()

    def _overflow(self) -> None:
        """Drop all events; tell the watchers of each inode that it changed."""
        self.pretence.clear()
        for ino, nodes in self._nodes.items():
            for node in nodes:
                self.pretence.add(Action(replayer.CHMOD, node, b"", ino))


def _actions_of(change: Change) -> list[bytes]:
    """Return the actions of the replayer that repeat a change of one name."""
    if change.kind is Kind.CREATED:
        return [replayer.MKDIR] if change.is_dir else [replayer.CREATE, replayer.CLOSE]
    if change.kind is Kind.REMOVED:
        return [replayer.RMDIR if change.is_dir else replayer.UNLINK]
    if change.kind is Kind.CHANGED:
        return [] if change.is_dir else [replayer.MODIFY]
    return [replayer.CHMOD]


def _foreign(changes: list[Change], own: OwnChanges) -> list[Change]:
    """Return the changes that this mount did not make."""
    return [
        change
        for change in changes
        if (
            change.ino not in own.inodes
            if change.kind in (Kind.CHANGED, Kind.ATTRIBUTES)
            else (change.folder, change.name) not in own.names and change.to not in own.names
        )
    ]
