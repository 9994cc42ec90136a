"""How long `wait` and `watch` take to notice a commit, and what they cost while nothing happens.

Once by polling, and once by the doorbell of `ivshmemfs server`.  Besides, what a commit costs with
a doorbell and without one, without waiters.

python -m bench.latency [ROUNDS]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.peers import ENVIRONMENT, IVSHMEMFS
from ivshmemfs.cli.attach.peer import peer
from ivshmemfs.cli.commits import commits
from ivshmemfs.doorbell.finding import OFF
from ivshmemfs.engine import ROOT_INO, Context, Filesystem
from ivshmemfs.format import geometry
from ivshmemfs.region import create_file, open_region
from mkfs.initial import Parameters
from mkfs.writer import format_region

SIZE = 16 << 20
QUIET_SECONDS = 5.0
COMMITS, TURNS = 2000, 15  # of the comparison without waiters


def _make(path: Path) -> None:
    create_file(str(path), SIZE, exist_ok=False)
    with open_region(str(path)) as region:
        format_region(region.memory, geometry.plan(SIZE), Parameters(os.urandom(16)), fresh=True)


@contextmanager
def _serving(path: Path) -> Iterator[str]:
    """A server for the region; yields its socket."""
    socket = path.with_name("bell")
    words = [*IVSHMEMFS, "server", str(socket), str(path)]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        server.stderr.readline()
        try:
            yield str(socket)
        finally:
            server.terminate()


@contextmanager
def _mounted(path: Path, doorbell: str, *, readonly: bool) -> Iterator[Filesystem]:
    with (
        open_region(str(path)) as region,
        peer(region, readonly=readonly, waits=True, doorbell=doorbell) as fs,
    ):
        yield fs


def _commit(path: Path, doorbell: str, rounds: int, out: int) -> None:
    """Commit now and then; send the time of each."""
    with _mounted(path, doorbell, readonly=False) as fs:
        ino = fs.mknod(ROOT_INO, b"file", 0o100644, 0, Context(0, 0)).ino
        for number in range(rounds):
            time.sleep(0.05 + 0.0007 * (number % 10))
            at = time.monotonic()
            fs.setattr(ino, Context(0, 0), mode=0o600 + number % 8)
            os.write(out, b"%.9f\n" % at)
        fs.unlink(ROOT_INO, b"file", Context(0, 0))


def _wait(path: Path, doorbell: str, rounds: int) -> None:
    """Measure one way to wait, and print one line for each figure."""
    out, into = os.pipe()
    if not os.fork():
        _commit(path, doorbell, rounds, into)
        os._exit(0)
    os.close(into)
    noticed: list[float] = []
    with _mounted(path, doorbell, readonly=True) as fs:
        for _ in commits(fs, time.monotonic() + rounds * 0.06 + 2):
            noticed.append(time.monotonic())
        with os.fdopen(out) as lines:
            made = [float(line) for line in lines]
        os.wait()
        late = sorted(min(at for at in noticed if at >= start) - start for start in made)
        middle, most = statistics.median(late), late[len(late) * 9 // 10]
        print(f"  latency of {len(late)}: median {middle * 1e3:.2f} ms, 90 % {most * 1e3:.2f} ms")
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in commits(fs, time.monotonic() + QUIET_SECONDS):
            pass
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"  CPU while nothing happens: {used / QUIET_SECONDS:.2%}")


def _one_turn(fs: Filesystem) -> float:
    """Return the seconds of a commit, over COMMITS of them."""
    name = b"turn"
    ino = fs.mknod(ROOT_INO, name, 0o100644, 0, Context(0, 0)).ino
    start = time.perf_counter()
    for number in range(COMMITS):
        fs.setattr(ino, Context(0, 0), mode=0o600 + number % 8)
    end = time.perf_counter()
    fs.unlink(ROOT_INO, name, Context(0, 0))
    return (end - start) / COMMITS


def _compare_commits(path: Path, doorbell: str) -> None:
    """Measure commits with a doorbell and without one, in turns."""
    with ExitStack() as stack:
        mounts = [
            stack.enter_context(_mounted(path, one, readonly=False)) for one in (OFF, doorbell)
        ]
        turns = [[_one_turn(fs) for fs in mounts] for _ in range(TURNS)]
    without, ringing = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio = statistics.median(ringing / without for without, ringing in turns)
    print(f"a commit: {without * 1e6:.1f} us, with a doorbell {ringing * 1e6:.1f} us: {ratio:.3f}")


def main(rounds: int) -> None:
    """Measure both ways."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "region"
        _make(path)
        with _serving(path) as socket:
            for name, doorbell in (("polling", OFF), ("doorbell", socket)):
                print(f"{name}:")
                _wait(path, doorbell, rounds)
            _compare_commits(path, socket)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
