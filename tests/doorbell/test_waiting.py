"""Waiters on the host sleep until a commit rings, by the eventfds of `ivshmemfs server`.

A waiter that polls is switched to 125 times a second or more, one that sleeps about once.  So the
tests count the switches of its process, while the bell words say that it waits.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import ivshmemfs
from ivshmemfs.doorbell.finding import OnDemand, doorbell_of
from ivshmemfs.engine import ROOT_INO, FileLock, Filesystem
from ivshmemfs.format import bell
from ivshmemfs.region import open_region
from tests.support.doorbell import IVSHMEMFS, serving
from tests.support.inotify import Inotify
from tests.support.lab import ENVIRONMENT, new_lab
from tests.support.mounts import eventually, needs_fuse
from tests.support.regions import ROOT, TestRegion, new_region, put

SIZE = 1 << 20
WATCHED_SECONDS = 1.5  # for which a waiter is watched
MOST = 20  # switches of a sleeper meanwhile; one that polls has 180
PATIENCE = 30.0
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(SIZE) as region:
        yield region


@pytest.fixture
def bell_socket(made: TestRegion, tmp_path: Path) -> Iterator[Path]:
    with serving(tmp_path / "socket", made.path):
        yield tmp_path / "socket"


@pytest.fixture
def writer(made: TestRegion, bell_socket: Path) -> Iterator[Filesystem]:
    """A peer in this process that rings."""
    region = made.region()
    doorbell = doorbell_of(region, str(bell_socket))
    assert doorbell is not None
    fs = Filesystem.mount(region, doorbell=doorbell)
    yield fs
    fs.unmount()
    doorbell.close()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands, which end with the test."""
    with ExitStack() as stack:

        def begin(*words: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [IVSHMEMFS, *map(str, words)], env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield begin


def switches(pid: int) -> int:
    """How often the threads of a process have gone to sleep."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def announced(fs: Filesystem) -> bool:
    return fs.region.memory.load(bell.BELLS_OFFSET) != 0


def asleep(fs: Filesystem, pid: int) -> int:
    """Wait until a process has announced itself; how often it wakes up from then on."""
    assert eventually(lambda: announced(fs), PATIENCE)
    before = switches(pid)
    time.sleep(WATCHED_SECONDS)
    return switches(pid) - before


def rung(fs: Filesystem) -> int:
    assert fs.bells is not None
    return fs.bells.rung


def test_wait_sleeps_until_a_commit_rings(
    made: TestRegion,
    bell_socket: Path,
    writer: Filesystem,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    waiting = start("wait", "--doorbell", bell_socket, f"{made.path}:/new")
    assert asleep(writer, waiting.pid) <= MOST
    writer.mknod(ROOT_INO, b"other", FILE, 0, ROOT)
    assert rung(writer) == 1
    assert asleep(writer, waiting.pid) <= MOST, "it waits on"
    writer.mknod(ROOT_INO, b"new", FILE, 0, ROOT)
    assert waiting.wait(PATIENCE) == 0
    assert rung(writer) == 2


def test_wait_polls_without_a_doorbell(
    made: TestRegion, writer: Filesystem, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """What the counts of the other tests would be."""
    waiting = start("wait", "--doorbell", "off", f"{made.path}:/new")
    assert eventually(lambda: switches(waiting.pid) > 500, PATIENCE)
    assert not announced(writer)
    writer.mknod(ROOT_INO, b"new", FILE, 0, ROOT)
    assert waiting.wait(PATIENCE) == 0
    assert rung(writer) == 0


def test_watch_sleeps_and_tells_each_change(
    made: TestRegion,
    bell_socket: Path,
    writer: Filesystem,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    watching = start("watch", "--doorbell", bell_socket, f"{made.path}:/")
    assert watching.stdout is not None
    assert asleep(writer, watching.pid) <= MOST
    for number in range(5):
        assert eventually(lambda: announced(writer), PATIENCE)
        writer.mknod(ROOT_INO, b"name%d" % number, FILE, 0, ROOT)
        assert f"name{number}" in watching.stdout.readline()
    assert rung(writer) == 5


def test_a_peer_that_does_not_ring_makes_waiters_poll_again(
    made: TestRegion,
    bell_socket: Path,
    writer: Filesystem,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    waiting = start("wait", "--doorbell", bell_socket, f"{made.path}:/new")
    assert eventually(lambda: announced(writer), PATIENCE)
    silent = made.mount()
    before = switches(waiting.pid)
    assert eventually(lambda: switches(waiting.pid) > before + 200, PATIENCE)
    silent.mknod(ROOT_INO, b"new", FILE, 0, ROOT)
    assert waiting.wait(PATIENCE) == 0
    silent.unmount()


def test_a_command_finds_the_unit_s_socket_and_connects_only_to_ring(
    made: TestRegion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets = tmp_path / "run"
    sockets.mkdir()
    region = made.region()
    assert doorbell_of(region, sockets=sockets) is None
    with serving(sockets / f"{made.path.name}.sock", made.path) as server:
        doorbell = doorbell_of(region, sockets=sockets)
        assert isinstance(doorbell, OnDemand)
        fs = Filesystem.mount(region, doorbell=doorbell)
        put(fs, ROOT_INO, b"one", b"x")
        assert doorbell.fileno() == -1, "nobody waits, so it has not connected"
        region.memory.store(bell.BELLS_OFFSET, 1)
        put(fs, ROOT_INO, b"two", b"x")
        assert doorbell.fileno() >= 0
        assert doorbell.keep()
        server.terminate()
        server.wait(PATIENCE)
        assert not doorbell.keep()
        assert doorbell.number == -1
        fs.unmount()
        doorbell.close()
        late = doorbell_of(region, sockets=sockets)
        assert late is None, "the server took its socket away"


def test_clients_of_one_region_wait_for_each_other(made: TestRegion, bell_socket: Path) -> None:
    """`Client.watch` and `Client.lock`, in two processes' places: two clients."""
    with (
        ivshmemfs.open(made.path, doorbell=bell_socket) as waiter,
        ivshmemfs.open(made.path, doorbell=bell_socket) as other,
    ):
        memory = made.region(readonly=True).memory
        other.write_bytes("/lock", b"")
        watch = waiter.watch("/")
        seen: list[ivshmemfs.Change] = []
        got: list[bool] = []

        def look() -> None:
            seen.extend(watch.poll(PATIENCE))

        looking = threading.Thread(target=look)
        looking.start()
        assert eventually(lambda: memory.load(bell.BELLS_OFFSET), PATIENCE)
        other.write_bytes("/new", b"x")
        looking.join(PATIENCE)
        assert [change.path for change in seen][:1] == ["/new"]

        held = other.lock("/lock")
        held.acquire()
        locking = threading.Thread(target=lambda: got.append(waiter.lock("/lock").acquire()))
        locking.start()
        assert eventually(lambda: memory.load(bell.BELLS_OFFSET), PATIENCE)
        held.release()
        locking.join(PATIENCE)
        assert got == [True]


def test_lock_sleeps_until_the_holder_gives_back(
    bell_socket: Path, made: TestRegion, writer: Filesystem, tmp_path: Path
) -> None:
    """The command's own way to wait; `FILE` needs a mount, which the next test has."""
    put(writer, ROOT_INO, b"lock", b"")
    ino = writer.lookup(ROOT_INO, b"lock").ino
    lock = FileLock(writer, writer.locks, ino)
    assert lock.acquire()
    code = (
        "import sys\n"
        "from ivshmemfs.cli.lock import _held\n"
        "from ivshmemfs.region import open_region\n"
        "with open_region(sys.argv[1]) as region:\n"
        "    with _held(region, int(sys.argv[2]), None, sys.argv[3]) as lock:\n"
        "        print('held', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, made.path, str(ino), bell_socket],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert asleep(writer, waiting.pid) <= MOST
        lock.release()
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "held\n"
        assert waiting.wait(PATIENCE) == 0
    assert rung(writer) >= 1


@needs_fuse
def test_waiters_of_mounts_sleep_and_wake(tmp_path: Path) -> None:
    """flock(2) on two mounts: the waiter's daemon sleeps, and the release rings it."""
    with new_lab(SIZE, mounts=0) as lab, serving(tmp_path / "socket", lab.region):
        for _ in range(2):
            lab.add(f"doorbell={tmp_path / 'socket'}")
        (lab.paths[0] / "lock").write_bytes(b"")
        holder, waiter = (os.open(path / "lock", os.O_RDWR) for path in lab.paths)
        fcntl.flock(holder, fcntl.LOCK_EX)
        got = threading.Event()

        def take() -> None:
            fcntl.flock(waiter, fcntl.LOCK_EX)
            got.set()

        taking = threading.Thread(target=take)
        taking.start()
        with open_region(str(lab.region), readonly=True) as region:
            look = Filesystem.mount(region, readonly=True)
            assert asleep(look, lab.mounts[1].process.pid) <= MOST
        assert not got.is_set()
        fcntl.flock(holder, fcntl.LOCK_UN)
        assert got.wait(PATIENCE)
        taking.join()
        for one in (holder, waiter):
            os.close(one)


@needs_fuse
def test_a_mount_with_notify_sleeps_while_a_program_watches(tmp_path: Path) -> None:
    with new_lab(SIZE, mounts=0) as lab, serving(tmp_path / "socket", lab.region):
        for more in ("", ",notify"):
            lab.add(f"doorbell={tmp_path / 'socket'}{more}")
        there, here = lab.paths
        with open_region(str(lab.region), readonly=True) as region, Inotify(here) as watch:
            look = Filesystem.mount(region, readonly=True)
            assert asleep(look, lab.mounts[1].process.pid) <= MOST
            (there / "new").write_bytes(b"")
            assert eventually(lambda: any(event.name == "new" for event in watch.read()), PATIENCE)


@needs_fuse
def test_a_mount_that_keeps_pages_sleeps_until_another_machine_commits(tmp_path: Path) -> None:
    with new_lab(SIZE, mounts=0) as lab, serving(tmp_path / "socket", lab.region):
        mounted = lab.add(f"doorbell={tmp_path / 'socket'}").path
        (mounted / "mapped").write_bytes(b"a" * 4096)
        with (
            open_region(str(lab.region)) as region,
            (mounted / "mapped").open("rb") as file,
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as seen,
        ):
            doorbell = doorbell_of(region, str(tmp_path / "socket"))
            assert doorbell is not None
            writer = Filesystem.mount(region, doorbell=doorbell)
            ino = writer.lookup(ROOT_INO, b"mapped").ino
            for letter in (b"b", b"c"):
                assert seen[0] != letter[0]
                assert asleep(writer, lab.mounts[0].process.pid) <= MOST
                before = rung(writer)
                handle = writer.open(ino, os.O_WRONLY, ROOT)
                writer.write(handle, 0, letter)
                writer.release(handle)
                assert rung(writer) == before + 1
                assert eventually(lambda: seen[:1] == letter, PATIENCE)  # noqa: B023
            writer.unmount()
            doorbell.close()


@needs_fuse
@pytest.mark.parametrize("more", ["", ",notify"])
def test_a_mount_that_sleeps_outlives_the_end_of_its_region(tmp_path: Path, more: str) -> None:
    """It looks, announces itself and is rung where there is no memory any more."""
    with new_lab(SIZE, mounts=0) as lab, serving(tmp_path / "socket", lab.region):
        mount = lab.add(f"doorbell={tmp_path / 'socket'}{more}")
        (mount.path / "mapped").write_bytes(b"a" * 4096)
        with (
            open_region(str(lab.region), readonly=True) as region,
            (mount.path / "mapped").open("rb") as file,
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as seen,
            Inotify(mount.path),
        ):
            assert seen[0] == ord("a")
            look = Filesystem.mount(region, readonly=True)
            doorbell = doorbell_of(region, str(tmp_path / "socket"))
            assert doorbell is not None
            assert asleep(look, mount.process.pid) <= MOST
            numbers = bell.numbers(region.memory.load(bell.BELLS_OFFSET))
            kept = lab.region.read_bytes()
            os.truncate(lab.region, 0)
            assert doorbell.keep()
            doorbell.ring(numbers)
            time.sleep(WATCHED_SECONDS)
            assert mount.process.poll() is None
            lab.region.write_bytes(kept)
            doorbell.close()
        lab.expected = "region"  # the log says what happened to it
