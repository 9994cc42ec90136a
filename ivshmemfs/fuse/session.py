"""One mount, from FUSE_INIT to its end.

    state        what ends it
    opening      the kernel and libfuse have agreed (see `connection`): `on_ready` is called
    serving      another process unmounts the file system, or a signal arrives
    unmounting   (after a signal) the unmount succeeds, or the mount is in use and is detached.
                 Requests are still served, because the kernel writes back modified mapped pages.
                 Open files of a detached mount fail
    ended        `run` returns; the caller leaves the region

pyfuse3 keeps its session in global variables, so a process has one `Session` at a time.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyfuse3
import trio

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import MountError
from ivshmemfs.fuse import logs, mountpoint
from ivshmemfs.fuse.connection import Handshake, Relay
from ivshmemfs.fuse.kernel_frontend import KernelFrontEnd
from ivshmemfs.fuse.lifeline import Lifeline
from ivshmemfs.fuse.loop import Loop
from ivshmemfs.fuse.notify import Notifier
from ivshmemfs.fuse.operations import Operations
from ivshmemfs.fuse.options import MountOptions, fusermount_options, mount_data, mount_flags
from ivshmemfs.fuse.ownership import Ownership
from ivshmemfs.fuse.pages import Invalidator, Pages
from ivshmemfs.fuse.pyfuse3_frontend import Pyfuse3FrontEnd
from ivshmemfs.fuse.upkeep import MountUpkeep
from ivshmemfs.fuse.wakeups import Wakeups

log = logging.getLogger(__name__)

#: Seconds between two calls of the engine's upkeep.
UPKEEP_SECONDS = 0.7
#: Seconds between two pieces of upkeep work.
WORK_PAUSE = 0.005
#: Maximum number of workers; more than one matters only while handlers wait for a busy engine.
MAX_WORKERS = 32
#: Cached objects are long-lived and acyclic, so frequent passes of the garbage collector are
#: wasted.  The default of 700 new objects cost a third of the time to create a file.
GC_THRESHOLDS = (20_000, 20, 100)
#: Seconds that requests in flight have to finish after the unmount.
GRACE_SECONDS = 12.0


class Session:
    """A mounted file system; *path* is a resolved and checked mount point."""

    def __init__(self, fs: Filesystem, path: str, source: str, options: MountOptions) -> None:
        self._path = path
        self._opened = trio.Event()
        self._on_ready: Callable[[], None] = lambda: None
        self._device: str | None = None
        self.loop = Loop(self._before_wait, polling=options.loop == "poll")
        ownership = Ownership(options.uid, options.gid, options.umask)
        #: Whether the kernel checks permissions, and not `rights`.
        self._kernel_checks = not options.root_only
        self._access_lists = options.acl and ownership == Ownership()
        self._can_share_locks = fs.shares_locks
        self._operations = Operations(
            fs,
            self.loop.pause,
            ownership=ownership,
            root_only=options.root_only,
            access_lists=self._access_lists,
        )
        self._upkeep = MountUpkeep(fs)
        self._wakeups = Wakeups(fs)
        self._invalidator = Invalidator()
        self._pages = Pages(
            fs, self._operations.nodes_of_file, self._invalidator.tell, self._wakeups
        )
        self._notifier = (
            Notifier(fs, self._operations, path, self._wakeups) if options.notify else None
        )
        self._options = options
        self._lifeline: Lifeline | None = None
        self._handshake = Handshake(
            _open_mount(path, source, options),
            keep=self.loop.polling,
            kernel_checks=self._kernel_checks,
            access_lists=self._access_lists,
            locks=options.locks == "shared" and self._can_share_locks,
        )
        self._start_libfuse()

    def _start_libfuse(self) -> None:
        with _stderr_captured() as said:
            try:
                front_end = Pyfuse3FrontEnd(self._operations, page_cache=self._options.mmap)
                pyfuse3.init(front_end, self._handshake.path, set())
            except RuntimeError as error:
                self._abandon(libfuse=False)
                raise MountError(said() or str(error)) from None
        entry = mountpoint.find(self._path)
        self._device = entry.device if entry is not None else None

    @property
    def device(self) -> str | None:
        """The device number of the mount, such as "0:45"."""
        return self._device

    def hold(self, lifeline: Lifeline) -> None:
        """Show the state of the region on `lifeline`."""
        self._lifeline = lifeline
        self._upkeep.on_condition = lifeline.show

    @property
    def shared_mappings(self) -> bool:
        """Whether the kernel allows shared mappings with direct I/O; valid after `on_ready`."""
        return self._handshake.shared_mappings

    def _before_wait(self, fd: int) -> bool:
        """Advance the opening before a wait for a request; return True when it is complete."""
        ready = self._handshake.step(fd)
        if ready:
            if self._handshake.relay is not None:
                self._answer_first(self._handshake.relay)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            mappings = "allowed" if self.shared_mappings else "refused"
            log.info(
                "%s: mounted; shared mappings with direct I/O are %s; access lists are %s; "
                "locks of programs hold %s",
                self._path,
                mappings,
                self._lists_obeyed(),
                self._reach_of_locks(),
            )
            self._opened.set()
            self._on_ready()
        return ready

    def _lists_obeyed(self) -> str:
        """Return how the mount treats access lists, for the log."""
        if not self._access_lists:
            return "hidden and not obeyed"
        if not self._kernel_checks:
            return "obeyed by the daemon"
        if not self._handshake.access_lists:
            return "not obeyed: the kernel is too old"
        return "obeyed by the kernel"

    def _reach_of_locks(self) -> str:
        """Return between which programs flock(2) and fcntl(2) locks hold, and why."""
        relay = self._handshake.relay
        if relay is not None and relay.shares_locks:
            return "on all mounts"
        if self._options.locks == "local":
            reason = "locks=local"
        elif self._options.readonly:
            reason = "it is read-only"
        elif not self._can_share_locks:
            reason = "the region cannot be written to, or was formatted before locks were shared"
        elif relay is None:
            reason = "requests come through pyfuse3, which has no handlers for locks"
        else:
            reason = "the kernel does not offer them"
        return f"on this mount only: {reason}"

    def _answer_first(self, connection: Relay) -> None:
        self._invalidator.use(connection.device)
        front_end = KernelFrontEnd(
            self._operations,
            connection,
            self.loop.spawn,
            page_cache=self._options.mmap,
            pages=self._pages,
            ended=self._is_ending,
            pretence=self._notifier.pretence if self._notifier is not None else None,
            wakeups=self._wakeups,
        )
        if self._notifier is not None:
            self._notifier.front = front_end
        self.loop.answer_first(front_end, connection.device)

    def _is_ending(self) -> bool:
        return self.loop.closing or self._operations.retry.ending

    # --- serving --------------------------------------------------------------------------

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until the mount ends; call *on_ready* when the mount can be used.

        Raises MountError if the connection cannot be opened.
        """
        self._on_ready = on_ready
        try:
            with self.loop.installed():
                trio.run(self._serve)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            self._abandon()

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals, nursery.cancel_scope)
            nursery.start_soon(self._keep_up)
            nursery.start_soon(self._pages.run)
            nursery.start_soon(self._wakeups.run)
            if self._notifier is not None:
                nursery.start_soon(self._notify, self._notifier)
            await pyfuse3.main(min_tasks=1, max_tasks=MAX_WORKERS)
            log.info("%s: unmounted", self._path)
            nursery.cancel_scope.cancel()

    async def _notify(self, notifier: Notifier) -> None:
        await self._opened.wait()
        await notifier.run(self._device)

    async def _keep_up(self) -> None:
        next_time = trio.current_time() + UPKEEP_SECONDS
        while True:
            await trio.sleep_until(next_time)
            next_time = trio.current_time() + UPKEEP_SECONDS
            more = self._upkeep.run()
            self.loop.adapt()
            logs.tell()
            if self._lifeline is not None:
                self._lifeline.tidy()
            while more and trio.current_time() < next_time:
                await trio.sleep(WORK_PAUSE)
                more = self._upkeep.work()

    async def _watch_signals(self, everything: trio.CancelScope) -> None:
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        with trio.open_signal_receiver(*watched) as signals:
            async for number in signals:
                log.info("%s: unmounting on %s", self._path, signal.Signals(number).name)
                break
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, everything)
                async for _number in signals:  # a second signal ends all waits
                    everything.cancel()

    async def _end(self, everything: trio.CancelScope) -> None:
        """Unmount, or detach a mount that is in use, and end the loop."""
        if self._notifier is not None:
            await self._notifier.end()
        if not await self._unmount(lazy=False):
            log.warning("%s is in use: detached; its open files fail now", self._path)
            await self._unmount(lazy=True)
        self._operations.retry.ending = True
        pyfuse3.terminate()
        await trio.sleep(GRACE_SECONDS)
        log.error("%s: requests did not finish in %.0f s", self._path, GRACE_SECONDS)
        everything.cancel()

    async def _unmount(self, *, lazy: bool) -> bool:
        """Unmount in a thread: the kernel sends requests to this process meanwhile."""
        if not self._still_mounted():
            return True
        trio_token, ended = trio.lowlevel.current_trio_token(), trio.Event()
        failures: list[MountError] = []

        def unmount() -> None:
            try:
                mountpoint.unmount(self._path, lazy=lazy)
            except MountError as error:
                failures.append(error)
            with suppress(trio.RunFinishedError):
                trio_token.run_sync_soon(ended.set)

        threading.Thread(target=unmount, daemon=True).start()
        with trio.move_on_after(mountpoint.HELPER_SECONDS):
            await ended.wait()
            return not failures
        return False

    # --- ending ---------------------------------------------------------------------------

    def _still_mounted(self) -> bool:
        """Return whether the topmost mount at the mount point is this one."""
        entry = mountpoint.find(self._path)
        return entry is not None and (self._device is None or entry.device == self._device)

    def _abandon(self, *, libfuse: bool = True) -> None:
        """Close the connection and remove the mount, in every state.

        With *libfuse* False, libfuse's session stays: libfuse crashes if it closes a session that
        it failed to make.
        """
        self._invalidator.stop()
        self._handshake.close()
        if self._notifier is not None:
            self._notifier.close()
        if libfuse:
            pyfuse3.close(unmount=False)
        if self._still_mounted():
            with suppress(MountError):
                mountpoint.unmount(self._path, lazy=True)


def _open_mount(path: str, source: str, options: MountOptions) -> int:
    """Mount on *path* and return the FUSE descriptor.  Raises MountError."""
    if mountpoint.helper() is None and os.geteuid() == 0:
        return mountpoint.open_mount_directly(
            path, source, mount_flags(options), mount_data(options)
        )
    return mountpoint.open_mount(path, fusermount_options(options, source))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first plain exception inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def _stderr_captured() -> Iterator[Callable[[], str]]:
    """Capture stderr, to which libfuse prints; yield a function that returns the last line."""
    saved = os.dup(2)
    caught = os.memfd_create("stderr")
    os.dup2(caught, 2)

    def said() -> str:
        text = os.fsdecode(os.pread(caught, 65536, 0))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1].removeprefix("fuse: ") if lines else ""

    try:
        yield said
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(caught)
