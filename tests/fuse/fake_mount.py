"""Mounts of the test double."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.mounts import ENVIRONMENT, PATIENCE, eventually, mount_lines, release

FAKE = Path(__file__).with_name("fake_engine.py")


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
