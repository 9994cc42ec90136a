"""What `-o notify` costs a mount while another machine changes a watched directory all the time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.peers import ENVIRONMENT, PATIENCE, TOP, Peer, available_cpus, make_region, ours

CHANGES = 10_000  # per second, of the other machine
FILES = 20
TURN = 0.25  # seconds
#: Seconds in which the daemon learns of the watch.
SETTLED = 1.0
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

    The program looks at files in a directory that is not watched.  Two mounts of the region take
    turns of TURN seconds; the daemon of the other one is stopped meanwhile.  So what else the
    machine does meets both.  The ratio is the median over all pairs of turns.
    """
    region = make_region(shm / "notify.region", "64M")
    with (
        ours(region, work / "plain", available_cpus()) as plain,
        ours(region, work / "notify", available_cpus(), options="notify") as told,
    ):
        for folder in ("watched", "mine"):
            (plain.path / folder).mkdir(exist_ok=True)
        for number in range(FILES):
            (plain.path / "mine" / str(number)).write_bytes(bytes(100))
        with _watch(told.path / "watched"), _writer(region):
            time.sleep(SETTLED)
            pairs = [
                _pair(plain, told, reverse=bool(turn % 2))
                for turn in range(max(1, round(rounds * seconds / TURN)))
            ]
    return {
        f"calls per second beside {CHANGES:,} changes": median(pair[0] for pair in pairs),
        "the same with -o notify": median(pair[1] for pair in pairs),
        "with / without": median(with_it / without for without, with_it in pairs),
    }


def _pair(plain: Peer, told: Peer, *, reverse: bool) -> tuple[float, float]:
    """Calls per second of both mounts, one after the other; `told` is first if `reverse`."""
    first, second = (told, plain) if reverse else (plain, told)
    rates = {}
    for peer, other in ((first, second), (second, first)):
        with _stopped(other):
            time.sleep(TURN / 2)  # both have much to catch up with after a stop
            rates[peer.path] = _rate(peer.path / "mine", TURN)
    return rates[plain.path], rates[told.path]


@contextmanager
def _stopped(peer: Peer) -> Iterator[None]:
    """Stop a daemon and its replayer."""
    assert peer.daemon is not None
    children = Path(f"/proc/{peer.daemon}/task/{peer.daemon}/children").read_text().split()
    processes = [peer.daemon, *map(int, children)]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


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
