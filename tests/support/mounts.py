"""Commands and mounts, and bounds on everything that a test waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent.parent
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
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
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


def stop(pid: int) -> None:
    """Stop a process, and wait until it is: on a busy machine that takes a while."""
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: b") T " in Path(f"/proc/{pid}/stat").read_bytes())


def release(path: Path) -> None:
    """Detach what is mounted on *path*."""
    for _attempt in range(5):
        if not mount_lines(path):
            return
        with suppress(subprocess.TimeoutExpired):
            run("fusermount3", "-u", "-z", "--", path, timeout=10)
