"""The file systems that are measured side by side, each mounted in a folder of its own.

All of them keep their bytes in /dev/shm.  Mounts and processes of this module end
at the end of the `with` block, also after a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Seconds that mounting or unmounting may take.
PATIENCE = 20.0
TOP = Path(__file__).resolve().parent.parent
#: As the installed commands, but of this source tree.
IVSHMEMFS = (sys.executable, "-m", "ivshmemfs.cli")
MKFS = (sys.executable, "-m", "mkfs")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOP)}


@dataclass
class Peer:
    """One file system under measurement: its mount point and its daemon."""

    name: str
    path: Path
    daemon: int | None = None  # process id


class PeerError(Exception):
    """A peer could not be set up."""


def pinned(cpus: Sequence[int], command: Sequence[str]) -> list[str]:
    """*command*, to be run on these CPUs alone."""
    return ["taskset", "-c", ",".join(map(str, cpus)), *command]


def available_cpus() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


def cpu_seconds(peer: Peer) -> float:
    """The CPU time that the daemon has used so far."""
    tasks = Path(f"/proc/{peer.daemon}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def tmpfs(shm: Path) -> Iterator[Peer]:
    """A plain folder in /dev/shm."""
    path = shm / "tmpfs"
    path.mkdir()
    yield Peer("tmpfs", path)


@contextmanager
def passthrough(
    program: Path, shm: Path, work: Path, cpus: Sequence[int], *, cache: str = "auto"
) -> Iterator[Peer]:
    """libfuse's passthrough_ll over a folder in /dev/shm, with all timeouts 0."""
    name = "passthrough" if cache == "auto" else f"passthrough-{cache}"
    source, path = shm / name, work / name
    source.mkdir()
    options = f"source={source},timeout=0,cache={cache}"
    command = pinned(cpus, [str(program), "-f", "-o", options, str(path)])
    with _served(name, command, path) as peer:
        yield peer


@contextmanager
def ours(
    region: Path, path: Path, cpus: Sequence[int], *, name: str = "ivshmemfs", options: str = ""
) -> Iterator[Peer]:
    """One mount of a formatted region."""
    command = [*IVSHMEMFS, "mount", "-f", str(region), str(path)]
    if options:
        command += ["-o", options]
    with _served(name, pinned(cpus, command), path) as peer:
        yield peer


def make_region(path: Path, size: str, *, reserve: bool = True) -> Path:
    """Format a region file; with *reserve* its memory is allocated, as a machine's is."""
    memory = () if reserve else ("--sparse",)
    command = [*MKFS, *memory, "--any-size", "--size", size, str(path)]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT, timeout=PATIENCE
    )
    return path


@contextmanager
def _served(name: str, command: list[str], path: Path) -> Iterator[Peer]:
    path.mkdir(exist_ok=True)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=ENVIRONMENT, cwd=TOP,
    )  # fmt: skip
    try:
        _await_mount(name, process, path)
        yield Peer(name, path, process.pid)
    finally:
        unmount(path)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _await_mount(name: str, process: subprocess.Popen[bytes], path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not os.path.ismount(path):
        if process.poll() is not None or time.monotonic() > end:
            said = process.stderr.read() if process.poll() is not None and process.stderr else b""
            raise PeerError(f"{name} was not mounted: {said.decode(errors='replace').strip()}")
        time.sleep(0.005)


def unmount(path: Path) -> None:
    """Detach what is mounted on *path*, if anything."""
    helper = shutil.which("fusermount3") or "fusermount3"
    for flags in (["-u"], ["-u", "-z"]):
        if not _mounted(path):
            return
        subprocess.run([helper, *flags, "--", str(path)], stderr=subprocess.DEVNULL, check=False)


def _mounted(path: Path) -> bool:
    """Whether something is mounted there; does not touch the mount, which may hang."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)
