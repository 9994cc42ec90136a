"""One mount, from FUSE_INIT to its end.

    state        what ends it
    opening      the kernel and libfuse have agreed (see `connection`): `on_ready` is called
    serving      the file system is unmounted from outside, or a signal asks for the end
    unmounting   (after a signal) requests are still served, because unmounting writes back what
                 is mapped and modified; a mount that is in use is detached, and its open files fail
    ended        `run` returns; the caller leaves the region

pyfuse3 keeps its session in global variables: one `Session` per process and at a time.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pyfuse3
import trio

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import MountError
from ivshmemfs.fuse import logs, mountpoint
from ivshmemfs.fuse.connection import Handshake, Relay
from ivshmemfs.fuse.kernel_frontend import KernelFrontEnd
from ivshmemfs.fuse.loop import Loop
from ivshmemfs.fuse.operations import Operations
from ivshmemfs.fuse.options import MountOptions, fusermount_options, libfuse_options
from ivshmemfs.fuse.ownership import Ownership
from ivshmemfs.fuse.pyfuse3_frontend import Pyfuse3FrontEnd
from ivshmemfs.fuse.upkeep import Upkeep

log = logging.getLogger(__name__)

#: Seconds between two calls of the engine's upkeep.
UPKEEP_SECONDS = 0.7
#: Seconds between two pieces of the work that the upkeep found.
WORK_PAUSE = 0.005
#: Workers at most; more than one matters only while handlers wait for a busy engine.
MAX_WORKERS = 32
#: What is cached lives long and holds no cycles, so that looking through it often (by default
#: after 700 new objects) gains nothing: it cost a third of the time of creating a file.
GC_THRESHOLDS = (20_000, 20, 100)
#: Seconds that requests in flight have to finish once the mount is gone.
GRACE_SECONDS = 12.0


class Session:
    """A mounted file system.  *path* is a resolved, checked mount point."""

    def __init__(self, fs: Filesystem, path: str, source: str, options: MountOptions) -> None:
        self._path = path
        self._handshake: Handshake | None = None
        self._waits = 0
        self._on_ready: Callable[[], None] = lambda: None
        self._device: str | None = None
        self.loop = Loop(self._before_wait, polling=options.loop == "poll")
        ownership = Ownership(options.uid, options.gid, options.umask)
        unchecked = options.root_only and mountpoint.helper() is not None
        self._operations = Operations(fs, self.loop.pause, ownership=ownership, root_only=unchecked)
        self._can_share_locks = fs.shares_locks
        self._upkeep = Upkeep(fs)
        self._options = options
        self._lifeline: mountpoint.Lifeline | None = None
        self._mount(source, options)

    def _mount(self, source: str, options: MountOptions) -> None:
        if mountpoint.helper() is None:
            target, words = self._path, libfuse_options(options, source)
        else:
            fd = mountpoint.open_mount(self._path, fusermount_options(options, source))
            shares = options.locks == "shared" and self._can_share_locks
            self._handshake = Handshake(fd, keep=self.loop.polling, locks=shares)
            target, words = self._handshake.path, set()
        with _stderr_captured() as said:
            try:
                front_end = Pyfuse3FrontEnd(self._operations, page_cache=options.mmap)
                pyfuse3.init(front_end, target, words)
            except RuntimeError as error:
                self._abandon(libfuse=False)
                raise MountError(said() or str(error)) from None
        entry = mountpoint.find(self._path)
        self._device = entry.device if entry is not None else None

    @property
    def device(self) -> str | None:
        """The device number of the mount, as in "0:45"."""
        return self._device

    def hold(self, lifeline: mountpoint.Lifeline) -> None:
        """Show on `lifeline` what becomes of the region."""
        self._lifeline = lifeline
        self._upkeep.on_standing = lifeline.show

    @property
    def shared_mappings(self) -> bool:
        """Whether the kernel allows shared mappings with direct I/O; known once ready."""
        return self._handshake is not None and self._handshake.shared_mappings

    def _before_wait(self, fd: int) -> bool:
        """Called before each wait for a request until the connection is open."""
        if self._handshake is not None:
            ready = self._handshake.step(fd)
        else:
            # The first wait is for FUSE_INIT; libfuse has answered it when the second one comes.
            self._waits += 1
            ready = self._waits > 1
        if ready:
            if self._handshake is not None and self._handshake.relay is not None:
                self._answer_first(self._handshake.relay)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            mappings = "allowed" if self.shared_mappings else "refused"
            log.info("%s: mounted; shared mappings with direct I/O are %s", self._path, mappings)
            log.info("%s: locks of programs hold %s", self._path, self._reach_of_locks())
            self._on_ready()
        return ready

    def _reach_of_locks(self) -> str:
        """Between which programs flock(2) and fcntl(2) locks hold, and why."""
        relay = self._handshake.relay if self._handshake is not None else None
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
        front_end = KernelFrontEnd(
            self._operations,
            connection,
            self.loop.spawn,
            page_cache=self._options.mmap,
            ended=self._is_ending,
        )
        self.loop.answer_first(front_end, connection.device)

    def _is_ending(self) -> bool:
        return self.loop.closing or self._operations.retry.ending

    # --- serving --------------------------------------------------------------------------

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until the mount ends; *on_ready* is called once the mount can be used.

        Raises MountError when the connection could not be opened.
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
            await pyfuse3.main(min_tasks=1, max_tasks=MAX_WORKERS)
            log.info("%s: unmounted", self._path)
            nursery.cancel_scope.cancel()

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
                async for _number in signals:  # asked twice: do not wait for anything
                    everything.cancel()

    async def _end(self, everything: trio.CancelScope) -> None:
        """Unmount, or detach what is in use, and end the loop."""
        if not await self._unmount(lazy=False):
            log.warning("%s is in use: detached; what is open there fails now", self._path)
            await self._unmount(lazy=True)
        self._operations.retry.ending = True
        pyfuse3.terminate()
        await trio.sleep(GRACE_SECONDS)
        log.error("%s: requests did not finish in %.0f s", self._path, GRACE_SECONDS)
        everything.cancel()

    async def _unmount(self, *, lazy: bool) -> bool:
        command = mountpoint.unmount_command(self._path, lazy=lazy)
        if command is None or not self._still_mounted():
            return True
        with trio.move_on_after(mountpoint.HELPER_SECONDS):
            result = await trio.run_process(
                command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            return result.returncode == 0
        return False

    # --- ending ---------------------------------------------------------------------------

    def _still_mounted(self) -> bool:
        """Whether the topmost mount at our mount point is ours."""
        entry = mountpoint.find(self._path)
        return entry is not None and (self._device is None or entry.device == self._device)

    def _abandon(self, *, libfuse: bool = True) -> None:
        """Leave nothing behind: no connection, no mount, whatever has happened before.

        With *libfuse* False its session is left alone: closing one that it failed to make crashes.
        """
        if self._handshake is not None:
            self._handshake.close()
        if libfuse:
            pyfuse3.close(unmount=self._handshake is None)
        if self._handshake is not None and self._still_mounted():
            with suppress(MountError):
                mountpoint.unmount(self._path, lazy=True)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def _stderr_captured() -> Iterator[Callable[[], str]]:
    """Catch what libfuse prints; yields a function that returns its last line so far."""
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
