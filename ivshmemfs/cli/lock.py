"""`lock`: run a command while holding a lock that counts on every machine.

The command itself is a peer of the region that FILE's mount shows, for as long as it holds the
lock.  While it waits, it only looks.  When this process or its machine dies, others notice it as
they notice the death of any peer, and free the lock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.peer import patiently, peer
from ivshmemfs.cli.commits import DOORBELL_HELP
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.seconds import Seconds
from ivshmemfs.errors import Busy, LockLost, RegionMissing, UnsupportedVersion, UsageError
from ivshmemfs.fuse.mountpoint import enclosing, of_device, refuse_hung
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.shm.watch import LOOK, SILENCE

if TYPE_CHECKING:
    from ivshmemfs.engine import FileLock, Filesystem
    from ivshmemfs.region import Region

#: Seconds between two looks while waiting: at first, and at most.
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.05
#: Seconds between two signs of life of a holder.
PULSE = 0.5
#: Seconds that a command gets to end when the lock is lost.
MERCY = 2.0
#: Seconds that giving the lock back may take; the end of this process frees it anyway.
GIVE_BACK = 5.0

_PR_SET_PDEATHSIG = 1


MANUAL = Manual(
    examples=(
        Example(
            "ivshmemfs lock /mnt/shared/build.lock -- make install",
            "Run make on one machine at a time.",
        ),
        Example(
            "ivshmemfs lock -n -E 75 /mnt/shared/cron.lock -- backup",
            "Run backup, or end with 75 if another machine runs it.",
        ),
    ),
    exits={
        **exits({0: "done: COMMAND ended with 0", 32: "the region cannot be opened"}),
        1: "wrong usage, or another process keeps the lock (see -E)",
        128: "and above: a signal ended COMMAND, 128 plus its number.  Else the exit code is "
        "COMMAND's own",
    },
)


@click.command(
    "lock", cls=Command, manual=MANUAL, context_settings={"allow_interspersed_args": False}
)
@click.argument("file", shell_complete=complete_path)  # click.Path would look at it
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-n", "--nonblock", is_flag=True, help="Fail at once when it is held.")
@click.option("-w", "--wait", "seconds", type=Seconds(), metavar="SECONDS",
              help="Wait at most so many seconds.")  # fmt: skip
@click.option("--doorbell", metavar="SOCKET", help=DOORBELL_HELP)
@click.option(
    "-E", "--conflict-exit-code", "conflict", type=click.IntRange(0, 255), default=1, metavar="N",
    show_default=True, help="Exit code when another process keeps the lock.",
)  # fmt: skip
def lock_command(
    file: str,
    command: tuple[str, ...],
    nonblock: bool,
    seconds: float | None,
    doorbell: str | None,
    conflict: int,
) -> int:
    """Run COMMAND while holding a lock on FILE that excludes all other machines.

    FILE is on a mount, and is made if it does not exist.  The lock is an flock(2) lock, as programs
    on any mount take it.  When the holder dies, the lock is free after 3 s if others can see that
    its process is gone.  Otherwise it is free after 10 s without a sign of life.  If its machine
    was only paused, COMMAND is ended there within a second of waking up.

    Ends with COMMAND's exit code.  Needs access to the region itself, as mounting does.
    """
    words = command[1:] if command[0] == "--" else command
    if not words:
        raise UsageError("name a command: ivshmemfs lock FILE -- COMMAND")
    patience = 0.0 if nonblock else seconds
    if (entry := enclosing(file)) is not None:
        refuse_hung(entry)
    with _region_of(file) as region, _opened(file) as fd:
        _check_same(region, fd, file)
        ino = os.fstat(fd).st_ino
        with _held(region, ino, patience, doorbell) as lock:
            if lock is None:
                return conflict
            return _run(words, lock)


# --- the file and its region --------------------------------------------------------------------


@contextmanager
def _opened(file: str) -> Iterator[int]:
    """Open FILE, so that it stays while it is locked, also when its name is removed."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo would wait for its writer
    try:
        fd = os.open(file, flags)
    except FileNotFoundError:
        fd = os.open(file, flags | os.O_CREAT, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _region_of(file: str) -> Iterator[Region]:
    """The region that the mount of FILE shows; FILE itself may not exist yet."""
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region

    number = _device_of(file)
    entry = of_device(f"{os.major(number)}:{os.minor(number)}")
    if entry is None:
        raise UsageError(f"{file} is not on an ivshmemfs mount")
    try:
        region = open_region(entry.source, identify=identify)
    except RegionMissing:
        raise RegionMissing(
            f"{entry.source}, which is mounted on {entry.path}, is not there any more: it was "
            "renamed or removed; give it its name back"
        ) from None
    with region:
        yield region


def _device_of(file: str) -> int:
    """The device number of the file system that FILE is on, or would be made on."""
    try:
        return os.stat(file).st_dev
    except FileNotFoundError:
        return os.stat(os.path.dirname(os.path.realpath(file))).st_dev


def _check_same(region: Region, fd: int, file: str) -> None:
    """Raise UsageError unless FILE is seen in the region as through the mount."""
    with peer(region, readonly=True) as fs:
        for _ in range(10):
            status = os.fstat(fd)
            with suppress(Busy):
                if fs.getattr(status.st_ino).ctime_ns == status.st_ctime_ns:
                    return
    raise UsageError(f"{file}: its mount shows another region than {region.spec} is now")


# --- the lock -------------------------------------------------------------------------------------


@contextmanager
def _held(
    region: Region, ino: int, patience: float | None, doorbell: str | None
) -> Iterator[FileLock | None]:
    """The lock, held; None when it was not to be had in time."""
    from ivshmemfs.engine import FileLock

    end = None if patience is None else time.monotonic() + patience
    with peer(region, readonly=True, waits=True, doorbell=doorbell) as looker:
        if not looker.superblock.shares_locks:
            raise UnsupportedVersion(
                f"{region.spec} was formatted by a version without locks between machines: "
                "format it anew"
            )
        watched = FileLock(looker, looker.locks, ino)
        while _free(looker, watched, end):
            gone = patiently(watched.gone)
            with peer(region, readonly=False, doorbell=doorbell) as fs:
                lock = FileLock(fs, fs.locks, ino)
                if patiently(lambda lock=lock, gone=gone: lock.acquire(gone)):  # type: ignore[misc]
                    try:
                        yield lock
                    finally:
                        with suppress(Busy):
                            patiently(lock.release, GIVE_BACK)
                    return
    yield None


def _free(fs: Filesystem, lock: FileLock, end: float | None) -> bool:
    """Whether the lock can be taken before `end`; waits for that.

    A holder that seems to be gone is waited for until that is sure.
    """
    delay, decided = FIRST_WAIT, time.monotonic() + SILENCE + LOOK
    while True:
        word = fs.commit_word()
        if patiently(lock.holder) is None:
            return True
        now = time.monotonic()
        if end is not None and now >= end and (now >= decided or not patiently(lock.undecided)):
            return False
        left = LOOK / 2 if end is None else min(LOOK / 2, max(end - now, FIRST_WAIT))
        if delay == LONGEST_WAIT and fs.bells is not None and fs.bells.sleep(word, left):
            if fs.commit_word() != word:
                delay = FIRST_WAIT  # commits come in rows
            continue
        time.sleep(delay)
        delay = min(delay * 1.5, LONGEST_WAIT)


# --- the command ----------------------------------------------------------------------------------


def _run(command: Sequence[str], lock: FileLock) -> int:
    """Run the command and show life; returns its exit code, as a shell would tell it."""
    parent = os.getpid()

    def die_with_parent() -> None:
        # A command that outlived this process would work without the lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    try:
        child = subprocess.Popen(command, preexec_fn=die_with_parent)
    except FileNotFoundError:
        raise UsageError(f"{command[0]}: no such command") from None
    except PermissionError:
        raise UsageError(f"{command[0]}: cannot be executed") from None
    with _signals_passed_on(child):
        while True:
            try:
                code = child.wait(PULSE)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                pass
            try:
                lock.keep()
            except LockLost:
                _end(child)
                raise


@contextmanager
def _signals_passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward SIGTERM and SIGHUP to the command; the terminal sends it SIGINT itself."""
    before = {
        number: signal.signal(number, lambda got, _frame: child.send_signal(got))
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda _got, _frame: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(MERCY)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
