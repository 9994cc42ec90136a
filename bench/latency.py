"""How long `wait` and `watch` take to notice a commit, and what they cost while nothing happens.

python -m bench.latency [ROUNDS]
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ivshmemfs.cli.commits import commits
from ivshmemfs.engine import ROOT_INO, Context, Filesystem
from ivshmemfs.format import geometry
from ivshmemfs.region import create_file, open_region
from mkfs.initial import Parameters
from mkfs.writer import format_region

SIZE = 16 << 20
QUIET_SECONDS = 5.0


def _make(path: Path) -> None:
    create_file(str(path), SIZE, exist_ok=False)
    with open_region(str(path)) as region:
        format_region(region.memory, geometry.plan(SIZE), Parameters(os.urandom(16)), fresh=True)


def _commit(path: Path, rounds: int, out: int) -> None:
    """Commit now and then; send the time of each."""
    with open_region(str(path)) as region:
        fs = Filesystem.mount(region)
        ino = fs.mknod(ROOT_INO, b"file", 0o100644, 0, Context(0, 0)).ino
        for number in range(rounds):
            time.sleep(0.05 + 0.0007 * (number % 10))
            at = time.monotonic()
            fs.setattr(ino, Context(0, 0), mode=0o600 + number % 8)
            os.write(out, b"%.9f\n" % at)
        fs.unmount()


def main(rounds: int) -> None:
    """Measure, and print one line for each figure."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "region"
        _make(path)
        out, into = os.pipe()
        if not os.fork():
            _commit(path, rounds, into)
            os._exit(0)
        os.close(into)
        noticed: list[float] = []
        with open_region(str(path), readonly=True) as region:
            fs = Filesystem.mount(region, readonly=True)
            for _ in commits(fs, time.monotonic() + rounds * 0.06 + 2):
                noticed.append(time.monotonic())
            with os.fdopen(out) as lines:
                made = [float(line) for line in lines]
            os.wait()
            late = [min(at for at in noticed if at >= start) - start for start in made]
            print(f"latency, median of {len(late)}: {statistics.median(late) * 1e3:.2f} ms")
            before = resource.getrusage(resource.RUSAGE_SELF)
            for _ in commits(fs, time.monotonic() + QUIET_SECONDS):
                pass
            after = resource.getrusage(resource.RUSAGE_SELF)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"CPU while nothing happens: {used / QUIET_SECONDS:.2%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
