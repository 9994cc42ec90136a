"""Mounts of the test double, and bounds on everything that a test waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOP = HERE.parent.parent
FAKE = HERE / "fake_engine.py"
#: The daemon must find the package, wherever the tests are started.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOP)}
#: Seconds that anything in these tests may take.
PATIENCE = 20.0

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened here"
)


def mount_lines(path: Path) -> list[str]:
    """The lines of mountinfo for *path*; never touches the path itself."""
    return [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(path)
    ]


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether *condition* becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


def run(
    *words: object,
    timeout: float = PATIENCE,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command with a bound on its time, capturing its output."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
        env={**ENVIRONMENT, **(env or {})},
        cwd=cwd,
    )


class FakeMount:
    """A mount of the test double, served by a daemon of its own."""

    def __init__(self, directory: Path, *words: str, **environment: str) -> None:
        self.path = directory / "mnt"
        self.path.mkdir()
        self.log = directory / "log"
        self.faults = directory / "faults"
        command = [sys.executable, str(FAKE), "-f", "--faults", str(self.faults)]
        command += ["-o", f"log={self.log}", *words, str(self.path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env={**ENVIRONMENT, **environment}
        )
        ready = eventually(lambda: self.process.poll() is not None or "mounted" in self.log_text())
        if not ready or self.process.poll() is not None:
            self.end()
            raise AssertionError(f"the daemon did not mount: {self.log_text()}")

    def log_text(self) -> str:
        """What the daemon has logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def fail(self, operation: str, exception: str, count: int = 1) -> None:
        """Let the next *count* calls of *operation* fail; see `fake_engine.EXCEPTIONS`."""
        staged = self.faults.with_suffix(".staged")
        staged.write_text(f"{operation} {exception} {count}\n")
        staged.rename(self.faults)

    def left(self) -> int:
        """How many faults have not been raised yet."""
        return sum(int(line.split()[2]) for line in self.faults.read_text().splitlines())

    @property
    def alive(self) -> bool:
        """Whether the daemon runs and its mount is there."""
        return self.process.poll() is None and bool(mount_lines(self.path))

    def end(self) -> None:
        """Unmount in every way there is, and end the daemon."""
        release(self.path)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE)
        release(self.path)


def stop(pid: int) -> None:
    """Stop a process, and wait until it is: on a busy machine that takes a while."""
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: b") T " in Path(f"/proc/{pid}/stat").read_bytes())


def release(path: Path) -> None:
    """Detach whatever is mounted on *path*."""
    for _attempt in range(5):
        if not mount_lines(path):
            return
        with suppress(subprocess.TimeoutExpired):
            run("fusermount3", "-u", "-z", "--", path, timeout=10)
