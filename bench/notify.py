"""What `-o notify` costs a mount while another machine changes a watched directory all the time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.peers import ENVIRONMENT, PATIENCE, TOP, available_cpus, make_region, ours

CHANGES = 10_000  # per second, of the other machine
FILES = 20
IN_ALL_EVENTS = 0xFFF
#: The other machine: makes and removes names in a directory at a given rate, until it is ended.
WRITER = """
import sys, time
import ivshmemfs
region, folder, rate = sys.argv[1], sys.argv[2], float(sys.argv[3])
with ivshmemfs.open(region) as fs:
    print("ready", flush=True)
    started, done = time.monotonic(), 0
    while True:
        if done > (time.monotonic() - started) * rate:
            time.sleep(0.0005)
            continue
        fs.write_bytes(f"{folder}/{done // 2}", b"")
        fs.remove(f"{folder}/{done // 2}")
        done += 2
"""


def notify(shm: Path, work: Path, *, rounds: int, seconds: float) -> dict[str, float]:
    """Calls per second of a program beside such changes, with and without `-o notify`.

    The program looks at files in a directory that is not watched.  The ratio is the median over
    rounds; each round measures both, one after the other.
    """
    region = make_region(shm / "notify.region", "64M")
    found: dict[str, list[float]] = {"": [], "notify": []}
    for turn in range(rounds):
        for options in ("", "notify") if turn % 2 else ("notify", ""):
            path = work / "notify"
            with ours(region, path, available_cpus(), options=options) as peer:
                for folder in ("watched", "mine"):
                    (peer.path / folder).mkdir(exist_ok=True)
                for number in range(FILES):
                    (peer.path / "mine" / str(number)).write_bytes(bytes(100))
                with _watch(peer.path / "watched"), _writer(region):
                    time.sleep(1.0)  # the daemon learns of watches within half a second
                    found[options].append(_rate(peer.path / "mine", seconds))
    ratios = [told / plain for told, plain in zip(found["notify"], found[""], strict=True)]
    return {
        f"calls per second beside {CHANGES:,} changes": median(found[""]),
        "the same with -o notify": median(found["notify"]),
        "with / without": median(ratios),
    }


def _rate(folder: Path, seconds: float) -> float:
    """Calls per second: stat(2) of each file, and open, read and close of some."""
    calls, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for number in range(FILES):
            os.stat(folder / str(number))
        for number in range(4):
            fd = os.open(folder / str(number), os.O_RDONLY)
            os.read(fd, 100)
            os.close(fd)
        calls += FILES + 3 * 4
    return calls / seconds


@contextmanager
def _watch(folder: Path) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    try:
        if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(folder), IN_ALL_EVENTS) < 0:
            raise OSError(ctypes.get_errno(), "inotify", str(folder))
        yield
    finally:
        os.close(fd)


@contextmanager
def _writer(region: Path) -> Iterator[None]:
    command = [sys.executable, "-c", WRITER, str(region), "/watched", str(CHANGES)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=TOP)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()
