"""Real mounts of one region for tests: daemons, logs, deaths, and what must hold at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ivshmemfs.format import geometry
from ivshmemfs.region import create_file, open_region
from mkfs.initial import Parameters
from mkfs.writer import format_region
from tests.support.checks import assert_sound

TOP = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOP)}
#: Seconds that mounting and unmounting may take on a loaded machine.
PATIENCE = 30.0
#: As root: everything that a program may want to do.
EVERYTHING = "allow_other,suid,dev"

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened here"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users: needs root")
KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])
#: Whether shared mappings and coherent calls go together on this kernel.
SHARED_MAPPINGS = KERNEL >= (6, 6)


class Mount:
    """One mount of a region, served by a daemon that is our child."""

    def __init__(self, region: Path, path: Path, options: str = EVERYTHING) -> None:
        path.mkdir()
        self.path = path
        self.log = path.with_suffix(".log")
        if os.geteuid() != 0:
            options = ""
        words = [sys.executable, "-m", "ivshmemfs.cli", "mount", "-f", "-o"]
        words += [f"{options},log={self.log}".strip(","), str(region), str(path)]
        self._before = path.stat().st_dev
        self.process = subprocess.Popen(words, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while not self.mounted and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if not self.mounted or self.process.poll() is not None:
            self.process.kill()
            raise AssertionError(f"the daemon did not mount: {self.log_text()}")

    @property
    def mounted(self) -> bool:
        """Whether something is mounted on our mount point; touches nothing."""
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        return any(line.split()[4] == str(self.path) for line in lines)

    @property
    def alive(self) -> bool:
        """Whether the daemon runs and serves."""
        return self.process.poll() is None and self.mounted

    def log_text(self) -> str:
        """All that the daemon has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self) -> None:
        """Kill the daemon, as if its machine had died, and detach what it leaves."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self._detach()

    def _detach(self) -> None:
        for _ in range(5):
            if self.mounted:
                words = ["fusermount3", "-u", "-z", "--", str(self.path)]
                subprocess.run(words, check=False, capture_output=True, timeout=PATIENCE)

    def end(self) -> None:
        """Unmount, and wait until the daemon has left the region."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        self._detach()


class Lab:
    """A region in shared memory and its mounts."""

    def __init__(self, folder: Path, size: int, mounts: int, options: str, **plan: int) -> None:
        self.region = folder / "region"
        self._folder = folder
        create_file(str(self.region), size, exist_ok=False)
        with open_region(str(self.region)) as region:
            layout = geometry.plan(size, **plan)
            format_region(region.memory, layout, Parameters(os.urandom(16)), fresh=True)
        self.mounts: list[Mount] = []
        #: A test that causes an error on purpose sets a part of its line here.
        self.expected = ""
        self._deaths = 0
        try:
            for _ in range(mounts):
                self.add(options)
            if mounts:
                self.paths[0].chmod(0o777)
        except BaseException:
            self.close(check=False)
            raise

    @property
    def paths(self) -> list[Path]:
        """Where the region is mounted."""
        return [mount.path for mount in self.mounts]

    def add(self, options: str = EVERYTHING) -> Mount:
        """Mount it once more."""
        mount = Mount(self.region, self._folder / f"m{len(self.mounts)}", options)
        self.mounts.append(mount)
        return mount

    def kill(self, number: int) -> None:
        """Let a mount's machine die."""
        self._deaths += 1
        self.mounts[number].kill()

    def close(self, *, check: bool = True) -> None:
        """Unmount everything; all daemons must have lived, logged no error and left no damage."""
        dead = [m.path.name for m in self.mounts if not m.alive]
        for mount in self.mounts:
            mount.end()
        if not check:
            return
        logs = "".join(mount.log_text() for mount in self.mounts)
        wrong = [line for line in logs.splitlines() if "ERROR" in line or "CRITICAL" in line
                 or "Traceback" in line]  # fmt: skip
        if self.expected:
            wrong = [line for line in wrong if self.expected not in line]
        assert not wrong, "\n".join(wrong[:20])
        assert len(dead) == self._deaths, f"daemons died: {dead}"
        with open_region(str(self.region), readonly=True) as region:
            report = assert_sound(region.memory)
        if not self._deaths:
            assert not report.findings, str(report)


@contextmanager
def new_lab(
    size: int = 64 << 20, mounts: int = 1, options: str = EVERYTHING, **plan: int
) -> Iterator[Lab]:
    """A region of `size` bytes with so many mounts; `plan` as geometry.plan takes it."""
    with tempfile.TemporaryDirectory(prefix="ivshmemfs-lab-", dir="/dev/shm") as folder:
        os.chmod(folder, 0o755)
        lab = Lab(Path(folder), size, mounts, options, **plan)
        try:
            yield lab
        except BaseException:
            lab.close(check=False)
            raise
        lab.close()
