"""Programs that lock files: each is a process of its own, which a test tells what to call.

Run as a program, this file is such a process.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
GETLK, SETLK, SETLKW = 5, 6, 7
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38
_FLOCK = struct.Struct("hhqqi4x")
TOP = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds that anything may take


class Program:
    """A process; a call of it returns, or raises, what the call did there."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuse.locker"], cwd=TOP,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, name: str, *args: Any) -> None:
        """Begin a call; `result` ends it."""
        assert self.process.stdin is not None
        pickle.dump((name, args), self.process.stdin)
        self.process.stdin.flush()

    def waits(self, seconds: float = 0.3) -> bool:
        """Whether the call that was begun has not ended within so many seconds."""
        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def result(self, seconds: float = PATIENCE) -> Any:
        """What the call that was begun came to."""
        assert self.process.stdout is not None
        assert not self.waits(seconds), "it waits for ever"
        failed, result = pickle.load(self.process.stdout)
        if failed:
            raise result
        return result

    def call(self, name: str, *args: Any) -> Any:
        """Call one of `CALLS`."""
        self.start(name, *args)
        return self.result()

    def open(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        fd: int = self.call("open", str(path), flags)
        return fd

    def lock(
        self, fd: int, type: int, start: int = 0, length: int = 0, *, command: int = SETLK
    ) -> tuple[int, int, int, int]:
        """fcntl(2): (type, start, length, pid) as it comes back."""
        found: tuple[int, int, int, int] = self.call("lock", fd, command, type, start, length)
        return found

    def wait_for(self, fd: int, type: int, start: int = 0, length: int = 0) -> None:
        """Begin to wait for an fcntl(2) lock."""
        self.start("lock", fd, SETLKW, type, start, length)

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


# --- what it can be told ------------------------------------------------------------------------


def lock(fd: int, command: int, type: int, start: int, length: int) -> tuple[int, int, int, int]:
    """fcntl(2) with a lock."""
    got = fcntl.fcntl(fd, command, _FLOCK.pack(type, os.SEEK_SET, start, length, 0))
    found, _, start, length, pid = _FLOCK.unpack(got)
    return found, start, length, pid


def interrupted(seconds: float, name: str, *args: Any) -> Any:
    """Another call, which a signal ends after a while."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedError(4, "the alarm rang")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return CALLS[name](*args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fork_that_holds(*fds: int) -> int:
    """A child that does nothing but have these files open; returns its process id."""
    pid = os.fork()
    if pid == 0:
        os.closerange(0, 3)
        signal.pause()
    return pid


def fork_that_closes(fd: int) -> None:
    """A child that closes a file that it has inherited, and ends."""
    pid = os.fork()
    if pid == 0:
        os.close(fd)
        os._exit(0)
    os.waitpid(pid, 0)


def end_child(pid: int) -> None:
    """Kill a child."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ping_pong(path: str, rounds: int, kind: str) -> int:
    """Increment a counter in a file under its lock, again and again."""
    fd = os.open(path, os.O_RDWR)
    for _ in range(rounds):
        _whole(fd, kind, fcntl.LOCK_EX)
        number = int(os.pread(fd, 20, 0))
        os.pwrite(fd, b"%020d" % (number + 1), 0)
        _whole(fd, kind, fcntl.LOCK_UN)
    os.close(fd)
    return rounds


def _whole(fd: int, kind: str, operation: int) -> None:
    if kind == "flock":
        fcntl.flock(fd, operation)
    elif kind == "lockf":
        fcntl.lockf(fd, operation)
    else:
        lock(fd, OFD_SETLKW, UNLOCK if operation == fcntl.LOCK_UN else WRITE, 0, 0)


def compete(path: str, seconds: float, hold: float) -> tuple[int, float]:
    """Lock and unlock for a while: (how often, the longest wait in seconds)."""
    import time

    fd = os.open(path, os.O_RDWR)
    end, count, longest = time.monotonic() + seconds, 0, 0.0
    while (began := time.monotonic()) < end:
        fcntl.flock(fd, fcntl.LOCK_EX)
        longest = max(longest, time.monotonic() - began)
        time.sleep(hold)
        fcntl.flock(fd, fcntl.LOCK_UN)
        count += 1
    os.close(fd)
    return count, longest


CALLS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (
        *(lock, interrupted, fork_that_holds, fork_that_closes, end_child, ping_pong, compete),
        *(os.open, os.close, os.dup, os.pwrite, os.pread, os.ftruncate, os.posix_fallocate),
        *(os.copy_file_range, os.unlink, fcntl.flock),
    )
}


def main() -> None:
    """Serve calls until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            name, args = pickle.load(requests)
        except EOFError:
            return
        try:
            result: Any = (False, CALLS[name](*args))
        except OSError as error:
            result = (True, error)
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    main()
