"""flock(2), fcntl(2) and OFD locks of programs on three real mounts of one region."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivshmemfs.fuse import protocol
from tests.fuse.fake_kernel import Kernel
from tests.fuse.locker import (
    GETLK,
    OFD_GETLK,
    OFD_SETLK,
    OFD_SETLKW,
    READ,
    SETLKW,
    UNLOCK,
    WRITE,
    Program,
)
from tests.support.figures import Figures
from tests.support.lab import (
    ENVIRONMENT,
    EVERYTHING,
    KERNEL,
    TOP,
    Lab,
    needs_fuse,
    needs_root,
    new_lab,
)
from tests.support.mounts import eventually, stop

pytestmark = [needs_fuse, needs_root]
EX, SH, UN, NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
LOST = "fail until it is closed"

_numbers = itertools.count()
Starts = Callable[[], Program]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A region with three mounts."""
    with new_lab(64 << 20, 3) as made:
        yield made


@pytest.fixture
def paths(lab: Lab) -> list[Path]:
    """One new file on all mounts."""
    name = f"f{next(_numbers)}"
    (lab.paths[0] / name).write_bytes(b"%020d" % 0)
    return [path / name for path in lab.paths]


@pytest.fixture
def program() -> Iterator[Starts]:
    """Starts programs; they are killed at the end."""
    started: list[Program] = []

    def start() -> Program:
        started.append(Program())
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            if one.process.poll() is None:
                one.kill()


def refused(code: int, call: Callable[..., object], *args: object, **named: object) -> None:
    """The call fails with this errno."""
    with pytest.raises(OSError, match=r".") as caught:
        call(*args, **named)
    assert caught.value.errno == code, caught.value


def busy(call: Callable[..., object], *args: object, **named: object) -> None:
    refused(errno.EAGAIN, call, *args, **named)


def for_ever(call: Callable[[int], object]) -> None:
    """Call it with 0, 1, 2 and so on, until it fails."""
    for number in itertools.count():
        call(number)


# --- fcntl --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1], ids=["one mount", "two mounts"])
def test_fcntl_ranges(paths: list[Path], program: Starts, other: int) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[other])
    one.lock(a, WRITE, 10, 10)
    busy(two.lock, b, READ, 19, 5)
    busy(two.lock, b, WRITE, 0, 0)
    two.lock(b, WRITE, 20, 0)
    two.lock(b, WRITE, 0, 10)
    busy(one.lock, a, READ, 1 << 40, 1)
    one.lock(a, UNLOCK, 14, 2)
    two.lock(b, WRITE, 14, 2)
    busy(two.lock, b, WRITE, 13, 1)
    busy(two.lock, b, WRITE, 16, 1)
    one.lock(a, READ, 10, 4)
    two.lock(b, READ, 12, 1)
    busy(one.lock, a, WRITE, 10, 4)
    two.lock(b, UNLOCK, 0, 0)
    one.lock(a, WRITE, 0, 0)
    busy(two.lock, b, READ, 5000, 1)


def test_what_getlk_tells(paths: list[Path], program: Starts) -> None:
    """The range and the type; the process only where it is known here."""
    one, near, far = program(), program(), program()
    a, b, c = one.open(paths[0]), near.open(paths[0]), far.open(paths[1])
    one.lock(a, WRITE, 10, 10)
    one.lock(a, READ, 100, 0)
    assert near.lock(b, WRITE, 0, 0, command=GETLK) == (WRITE, 10, 10, one.pid)
    assert near.lock(b, WRITE, 50, 100, command=GETLK) == (READ, 100, 0, one.pid)
    assert far.lock(c, WRITE, 0, 0, command=GETLK) == (WRITE, 10, 10, 0)
    assert far.lock(c, READ, 200, 1, command=GETLK)[0] == UNLOCK
    assert one.lock(a, WRITE, 0, 0, command=GETLK)[0] == UNLOCK, "its own locks do not count"


def test_any_close_ends_a_processs_fcntl_locks(paths: list[Path], program: Starts) -> None:
    """As POSIX has it: also of another open file."""
    one, two = program(), program()
    a, again, b = one.open(paths[0]), one.open(paths[0]), two.open(paths[1])
    one.lock(a, WRITE)
    busy(two.lock, b, WRITE)
    one.call("close", again)
    two.lock(b, WRITE)
    two.lock(b, UNLOCK)
    one.lock(a, WRITE)
    duplicate = one.call("dup", a)
    one.call("close", duplicate)
    two.lock(b, WRITE)


def test_fcntl_locks_are_not_inherited(paths: list[Path], program: Starts) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[1])
    one.lock(a, WRITE)
    one.call("fork_that_closes", a)
    busy(two.lock, b, WRITE)
    child = one.call("fork_that_holds", a)
    one.call("close", a)
    two.lock(b, WRITE)
    one.call("end_child", child)


@pytest.mark.parametrize("other", [0, 1], ids=["one mount", "two mounts"])
@pytest.mark.parametrize("kind", ["fcntl", "flock", "OFD"])
def test_a_killed_program_gives_back_at_once(
    paths: list[Path], program: Starts, kind: str, other: int
) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[other])

    def lock(at: Program, fd: int) -> None:
        if kind == "flock":
            at.start("flock", fd, EX)
        else:
            at.start("lock", fd, SETLKW if kind == "fcntl" else OFD_SETLKW, WRITE, 0, 0)

    lock(one, a)
    one.result()
    lock(two, b)
    assert two.waits()
    one.kill()
    two.result(5.0)


# --- OFD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1], ids=["one mount", "two mounts"])
def test_locks_of_open_files(paths: list[Path], program: Starts, other: int) -> None:
    """They belong to the open file: two of one process exclude each other, a child shares it."""
    one, two = program(), program()
    a, second, b = one.open(paths[0]), one.open(paths[0]), two.open(paths[other])
    one.lock(a, WRITE, 0, 10, command=OFD_SETLK)
    busy(one.lock, second, WRITE, 5, 1, command=OFD_SETLK)
    busy(two.lock, b, WRITE, 5, 1)
    assert two.lock(b, WRITE, 0, 0, command=OFD_GETLK)[:3] == (WRITE, 0, 10)
    one.call("close", second)
    busy(two.lock, b, WRITE, 5, 1, command=OFD_SETLK)
    child = one.call("fork_that_holds", a)
    one.call("close", a)
    busy(two.lock, b, WRITE, 5, 1, command=OFD_SETLK)
    one.call("end_child", child)
    two.lock(b, WRITE, 5, 1, command=OFD_SETLKW)


def test_an_open_file_is_asked_for_its_own_locks(paths: list[Path], program: Starts) -> None:
    """F_OFD_GETLK with F_UNLCK, which kernels before 6.6 refuse."""
    one = program()
    a, b = one.open(paths[0]), one.open(paths[0])
    one.lock(a, READ, 10, 10, command=OFD_SETLK)
    one.lock(a, WRITE, 20, 10, command=OFD_SETLK)
    if KERNEL < (6, 6):
        refused(errno.EINVAL, one.lock, a, UNLOCK, 0, 0, command=OFD_GETLK)
        return
    assert one.lock(a, UNLOCK, 0, 0, command=OFD_GETLK)[:3] == (READ, 10, 10)
    assert one.lock(a, UNLOCK, 25, 0, command=OFD_GETLK)[:3] == (WRITE, 20, 10)
    assert one.lock(a, UNLOCK, 30, 0, command=OFD_GETLK)[0] == UNLOCK
    assert one.lock(b, UNLOCK, 0, 0, command=OFD_GETLK)[0] == UNLOCK


# --- flock --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1], ids=["one mount", "two mounts"])
def test_flock_and_its_conversion(paths: list[Path], program: Starts, other: int) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[other])
    one.call("flock", a, SH)
    two.call("flock", b, SH | NB)
    busy(one.call, "flock", a, EX | NB)
    two.call("flock", b, EX | NB)  # the refused conversion has given the shared lock back
    busy(one.call, "flock", a, SH | NB)
    two.call("flock", b, SH | NB)
    one.call("flock", a, SH | NB)
    two.call("flock", b, UN)
    one.call("flock", a, EX | NB)
    one.start("flock", a, EX)
    one.result()


def test_flock_and_fcntl_do_not_see_each_other(paths: list[Path], program: Starts) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[1])
    one.call("flock", a, EX)
    two.lock(b, WRITE)
    busy(two.call, "flock", b, SH | NB)
    busy(one.lock, a, READ)


def test_an_flock_ends_with_the_last_descriptor(paths: list[Path], program: Starts) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[1])
    one.call("flock", a, EX)
    duplicate, child = one.call("dup", a), one.call("fork_that_holds", a)
    one.call("close", a)
    busy(two.call, "flock", b, EX | NB)
    one.call("end_child", child)
    busy(two.call, "flock", b, EX | NB)
    one.call("close", duplicate)
    two.call("flock", b, EX)  # closing is told a moment later
    one.call("fork_that_closes", one.open(paths[0]))
    busy(one.call, "flock", one.open(paths[0]), EX | NB)


def test_a_locked_file_that_is_removed(paths: list[Path], program: Starts) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[1])
    one.call("flock", a, EX)
    two.call("unlink", str(paths[1]))
    busy(two.call, "flock", b, EX | NB)
    fresh = two.open(paths[1])
    two.call("flock", fresh, EX | NB)
    one.call("close", a)
    two.call("flock", b, EX)


# --- waiting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [0, 1], ids=["one mount", "two mounts"])
def test_waiting_and_signals(paths: list[Path], program: Starts, other: int) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[other])
    one.lock(a, WRITE, 0, 10)
    refused(errno.EINTR, two.call, "interrupted", 0.2, "lock", b, SETLKW, WRITE, 5, 1)
    refused(errno.EINTR, two.call, "interrupted", 0.0005, "lock", b, SETLKW, WRITE, 5, 1)
    two.lock(b, WRITE, 10, 1)
    two.wait_for(b, WRITE, 5, 1)
    assert two.waits()
    assert one.lock(a, WRITE, 10, 1, command=GETLK)[0] == WRITE
    one.lock(a, UNLOCK, 5, 1)
    two.result(5.0)
    busy(one.lock, a, READ, 5, 1)


def test_a_killed_waiter_is_forgotten(paths: list[Path], program: Starts) -> None:
    one, two, three = program(), program(), program()
    a, b, c = one.open(paths[0]), two.open(paths[1]), three.open(paths[2])
    one.lock(a, WRITE)
    two.wait_for(b, WRITE)
    three.wait_for(c, WRITE)
    assert two.waits(0.1)
    two.kill()
    one.lock(a, UNLOCK)
    three.result(5.0)


@pytest.mark.parametrize("other", [0, 1], ids=["one mount", "two mounts"])
def test_a_deadlock_is_told(paths: list[Path], program: Starts, other: int) -> None:
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[other])
    one.lock(a, WRITE, 0, 1)
    two.lock(b, WRITE, 1, 1)
    one.wait_for(a, WRITE, 1, 1)
    assert one.waits(0.1)
    refused(errno.EDEADLK, two.lock, b, WRITE, 0, 1, command=SETLKW)
    two.lock(b, UNLOCK, 0, 0)
    one.result(5.0)


def test_a_deadlock_of_open_files_is_not_told(paths: list[Path], program: Starts) -> None:
    """As on Linux: other threads may give the lock of an open file back."""
    one, two = program(), program()
    a, b = one.open(paths[0]), two.open(paths[1])
    one.lock(a, WRITE, 0, 1, command=OFD_SETLK)
    two.lock(b, WRITE, 1, 1, command=OFD_SETLK)
    one.start("interrupted", 1.0, "lock", a, OFD_SETLKW, WRITE, 1, 1)
    assert one.waits(0.1)
    two.start("interrupted", 2.0, "lock", b, OFD_SETLKW, WRITE, 0, 1)
    refused(errno.EINTR, one.result)
    refused(errno.EINTR, two.result)


def test_three_mounts_in_a_ring(lab: Lab, program: Starts) -> None:
    """Each waits for the next one, in three files: the last to wait is told."""
    programs = [program() for _ in range(3)]
    names = [f"ring{at}" for at in range(3)]
    fds = [
        [programs[at].open(lab.paths[at] / name) for name in (names[at], names[(at + 1) % 3])]
        for at in range(3)
    ]
    for at in range(3):
        programs[at].lock(fds[at][0], WRITE)
    for at in (0, 1):
        programs[at].wait_for(fds[at][1], WRITE)
        assert programs[at].waits(1.0)  # a busy mount lists it later than after 3 ms
    refused(errno.EDEADLK, programs[2].lock, fds[2][1], WRITE, command=SETLKW)
    programs[2].kill()
    programs[1].result(5.0)
    programs[1].kill()
    programs[0].result(5.0)


@pytest.mark.parametrize("kind", ["flock", "lockf", "ofd"])
def test_a_counter_under_a_lock_loses_nothing(
    paths: list[Path], program: Starts, kind: str, long_run: bool
) -> None:
    rounds = 2000 if long_run else 100
    programs = [program() for _ in range(4)]
    for at, one in enumerate(programs):
        one.start("ping_pong", str(paths[at % 3]), rounds, kind)
    for one in programs:
        assert one.result(300.0) == rounds
    assert int(paths[0].read_bytes()) == 4 * rounds


def test_flock_1_and_the_lock_command(lab: Lab, paths: list[Path]) -> None:
    """flock(1) in a mount and `ivshmemfs lock` exclude each other."""
    command = [sys.executable, "-m", "ivshmemfs.cli", "lock"]
    held = paths[0].with_suffix(".held")
    script = f"touch {held}; exec sleep 60"

    def holds(words: list[str]) -> subprocess.Popen[bytes]:
        started = subprocess.Popen(words, env=ENVIRONMENT, cwd=TOP)
        assert eventually(held.exists)
        return started

    for first, second, code in (
        (
            ["flock", "-F", str(paths[0]), "sh", "-c", script],
            [*command, "-n", str(paths[1]), "true"],
            1,
        ),
        ([*command, str(paths[0]), "sh", "-c", script], ["flock", "-n", str(paths[1]), "true"], 1),
    ):
        holder = holds(first)
        try:
            done = subprocess.run(second, env=ENVIRONMENT, cwd=TOP, check=False, timeout=30)
            assert done.returncode == code
        finally:
            holder.terminate()
            holder.wait(30)
        done = subprocess.run(
            [word for word in second if word != "-n"], env=ENVIRONMENT, check=False, timeout=30
        )
        assert done.returncode == 0
        held.unlink()


@pytest.mark.slow
def test_no_waiter_of_eight_starves(
    paths: list[Path], program: Starts, figures: Figures, long_run: bool
) -> None:
    """Each holds the lock for 1 ms.  Asserted is that all have their turns, not how fast."""
    programs = [program() for _ in range(8)]
    for at, one in enumerate(programs):
        one.start("compete", str(paths[at % 3]), 20.0 if long_run else 4.0, 0.001)
    results = [one.result(60.0) for one in programs]
    counts, longest = [count for count, _ in results], max(wait for _, wait in results)
    assert min(counts) > max(counts) / 8, counts
    figures.add(f"8 waiters of one lock: {counts} times, longest wait {longest * 1000:.0f} ms")


# --- SQLite -------------------------------------------------------------------------------------

INSERT = """
import sqlite3, sys
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
base = sqlite3.connect(path, timeout=120, isolation_level=None)
for number in range(count):
    base.execute("BEGIN IMMEDIATE")
    total = base.execute("SELECT count(*) FROM t").fetchone()[0]
    base.execute("INSERT INTO t VALUES (?, ?, ?)", (name, number, total))
    base.execute("COMMIT")
base.close()
"""


@pytest.mark.slow
def test_sqlite_on_two_mounts(lab: Lab, figures: Figures, long_run: bool) -> None:
    """With a rollback journal: no row is lost, none is written twice, the file is sound."""
    each = 5000 if long_run else 150
    base = sqlite3.connect(lab.paths[0] / "base.db", isolation_level=None)
    base.execute("PRAGMA journal_mode=DELETE")
    base.execute("CREATE TABLE t (name TEXT, number INTEGER, total INTEGER UNIQUE)")
    began = time.monotonic()
    running = [
        subprocess.Popen([sys.executable, "-c", INSERT, path / "base.db", name, str(each)])
        for path, name in zip(lab.paths, ("a", "b"), strict=False)
    ]
    try:
        assert [one.wait(1200) for one in running] == [0, 0]
    finally:
        for one in running:
            one.kill()
            one.wait()
    took = time.monotonic() - began
    assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    for name in ("a", "b"):
        rows = base.execute("SELECT number FROM t WHERE name = ? ORDER BY number", (name,))
        assert [number for (number,) in rows] == list(range(each))
    base.close()
    figures.add(f"SQLite on two mounts: {2 * each:,} transactions, {2 * each / took:.0f} a second")


# --- deaths and pauses --------------------------------------------------------------------------


def test_a_daemon_that_ends_gives_back(program: Starts) -> None:
    with new_lab(16 << 20, 2) as lab:
        one, two = program(), program()
        a, b = one.open(lab.paths[0] / "f"), two.open(lab.paths[1] / "f")
        one.lock(a, WRITE)
        two.wait_for(b, WRITE)
        assert two.waits(0.1)
        one.kill()
        two.result(5.0)
        one = program()
        one.wait_for(one.open(lab.paths[0] / "f"), WRITE)
        assert one.waits(0.1)
        lab.mounts[1].process.send_signal(signal.SIGTERM)  # in use: detached
        one.result(30.0)
        assert lab.mounts[1].process.wait(30) == 0
        lab.mounts.pop().end()


def test_waiters_end_with_their_mount(program: Starts) -> None:
    with new_lab(16 << 20, 2) as lab:
        one, two = program(), program()
        a, b = one.open(lab.paths[0] / "f"), two.open(lab.paths[1] / "f")
        one.lock(a, WRITE)
        two.wait_for(b, WRITE)
        assert two.waits(0.1)
        lab.mounts[1].process.send_signal(signal.SIGTERM)
        refused(errno.EIO, two.result)
        assert lab.mounts[1].process.wait(30) == 0
        lab.mounts.pop().end()


@pytest.mark.slow
def test_a_killed_daemons_locks_are_freed(program: Starts) -> None:
    """As soon as it is sure that it is gone."""
    with new_lab(16 << 20, 2) as lab:
        one, two = program(), program()
        a, b = one.open(lab.paths[0] / "f"), two.open(lab.paths[1] / "f")
        one.lock(a, WRITE)
        two.wait_for(b, WRITE)
        assert two.waits(0.1)
        lab.kill(0)
        two.result(8.0)
        refused(errno.ENOTCONN, one.call, "pwrite", a, b"x", 0)


@pytest.mark.slow
def test_a_daemon_that_was_stopped_for_too_long(program: Starts) -> None:
    """Its lock is another machine's by now: the former holder cannot write."""
    with new_lab(16 << 20, 2) as lab:
        one, two = program(), program()
        here, there = (path / "f" for path in lab.paths)
        there.write_bytes(b"before")
        a, b = one.open(here), two.open(there)
        unlocked, flocked = one.open(here), one.open(here)
        source = one.open(lab.paths[0] / "source")
        one.call("pwrite", source, b"source", 0)
        one.lock(a, WRITE, 0, 10)
        one.call("flock", flocked, EX)
        one.call("pwrite", a, b"locked", 0)
        two.wait_for(b, WRITE, 5, 1)
        stop(lab.mounts[0].process.pid)
        two.result(30.0)
        two.call("pwrite", b, b"theirs", 0)
        lab.mounts[0].process.send_signal(signal.SIGCONT)
        for _ in range(2):
            refused(errno.EIO, one.call, "pwrite", a, b"mine", 0)
            refused(errno.EIO, one.call, "ftruncate", a, 0)
            refused(errno.EIO, one.call, "ftruncate", a, 100)
            refused(errno.EIO, one.call, "posix_fallocate", a, 0, 100)
            refused(errno.EIO, one.call, "copy_file_range", source, a, 3)
            refused(errno.EIO, one.call, "pwrite", flocked, b"mine", 0)
            refused(errno.EIO, one.lock, a, WRITE, 100, 1)
        assert here.read_bytes() == b"theirs"
        one.call("pwrite", unlocked, b"x", 6)
        one.lock(a, UNLOCK)
        refused(errno.EIO, one.call, "pwrite", a, b"mine", 0)
        assert LOST in lab.mounts[0].log_text()
        for fd in (a, flocked):
            one.call("close", fd)
        again = one.open(here)
        busy(one.lock, again, WRITE, 5, 1)
        two.lock(b, UNLOCK)
        one.lock(again, WRITE, 5, 1)
        one.call("pwrite", again, b"mine", 0)
        assert there.read_bytes() == b"minersx"
        two.call("flock", b, EX | NB)


@pytest.mark.slow
def test_a_short_pause_loses_nothing(program: Starts) -> None:
    with new_lab(16 << 20, 2) as lab:
        one, two = program(), program()
        a, b = one.open(lab.paths[0] / "f"), two.open(lab.paths[1] / "f")
        one.lock(a, WRITE)
        two.wait_for(b, WRITE)
        stop(lab.mounts[0].process.pid)
        assert two.waits(5.0)
        lab.mounts[0].process.send_signal(signal.SIGCONT)
        one.call("pwrite", a, b"mine", 0)
        assert two.waits(0.1)
        one.lock(a, UNLOCK)
        two.result(5.0)


@pytest.mark.slow
def test_evicting_a_stopped_mount_frees_its_locks(program: Starts) -> None:
    with new_lab(16 << 20, 2) as lab:
        one, two = program(), program()
        a, b = one.open(lab.paths[0] / "f"), two.open(lab.paths[1] / "f")
        one.lock(a, WRITE)
        two.wait_for(b, WRITE)
        stop(lab.mounts[0].process.pid)
        slots = subprocess.run(
            [sys.executable, "-m", "ivshmemfs.cli", "peers", str(lab.region)],
            env=ENVIRONMENT, check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        (line,) = (text for text in slots if str(lab.mounts[0].process.pid) in text.split())
        words = [sys.executable, "-m", "ivshmemfs.cli", "evict", str(lab.region), line.split()[0]]
        done = subprocess.run(
            [*words, "--force"], env=ENVIRONMENT, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        two.result(8.0)
        lab.mounts[0].process.send_signal(signal.SIGCONT)
        refused(errno.EIO, one.call, "pwrite", a, b"x", 0)


# --- surroundings -------------------------------------------------------------------------------


def test_a_full_region(program: Starts) -> None:
    """Locks are had or refused, and giving back always succeeds."""
    with new_lab(1 << 20, 2) as lab:
        one, two = program(), program()
        a, b = one.open(lab.paths[0] / "f"), two.open(lab.paths[1] / "f")
        one.lock(a, WRITE, 0, 100)
        with (lab.paths[0] / "filler").open("wb", buffering=0) as filler:
            refused(errno.ENOSPC, for_ever, lambda _: filler.write(b"x" * 4096))
        refused(errno.ENOLCK, for_ever, lambda at: two.lock(b, WRITE, 200 + 2 * at, 1))
        one.lock(a, UNLOCK, 0, 100)
        two.call("close", b)
        b = two.open(lab.paths[1] / "f")
        two.lock(b, WRITE)
        two.lock(b, UNLOCK)
        one.lock(a, WRITE)
        (lab.paths[0] / "filler").unlink()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (f"{EVERYTHING},locks=local", "locks=local"),
        (f"{EVERYTHING},loop=trio", "pyfuse3"),
        ("allow_other,ro", "read-only"),
    ],
)
def test_where_locks_stay_on_one_mount(program: Starts, options: str, why: str) -> None:
    with new_lab(16 << 20, 1) as lab:
        (lab.paths[0] / "f").write_bytes(b"x")
        mount = lab.add(options)
        one, near, far = program(), program(), program()
        flags = os.O_RDONLY
        a, b = (each.open(mount.path / "f", flags) for each in (one, near))
        c = far.open(lab.paths[0] / "f", os.O_RDWR)
        for each, fd in ((one, a), (near, b)):
            each.lock(fd, READ)
            each.call("close", each.open(mount.path / "f", flags))
        one.call("flock", a, EX)
        busy(near.call, "flock", b, EX | NB)
        far.call("flock", c, EX | NB)
        far.lock(c, WRITE)
        lines = mount.log_text().splitlines()
        (line,) = (one for one in lines if "locks of programs" in one)
        assert "on this mount only" in line
        assert why in line


def test_requests_that_were_not_agreed_on(kernel: Kernel) -> None:
    """Where the kernel keeps the locks it asks for none, and for no close more than once."""
    _, fh = kernel.create(b"f")
    lock = protocol.LK_IN.pack(fh, 1, 0, 10, protocol.F_WRLCK, 7, 0)
    for opcode in (protocol.GETLK, protocol.SETLK, protocol.SETLKW):
        assert kernel.send(opcode, lock) is None
        assert kernel.answer() == (errno.ENOSYS, b"")
    assert kernel.send(protocol.FLUSH, protocol.FLUSH_IN.pack(fh, 1)) is None
    assert kernel.answer() == (errno.ENOSYS, b"")


def test_every_close_is_told_once_locks_are_shared(paths: list[Path], program: Starts) -> None:
    """The kernel asks no more after an ENOSYS, and would lose the end of locks."""
    one, two = program(), program()
    for _ in range(3):
        a, b = one.open(paths[0]), two.open(paths[1])
        one.lock(a, WRITE)
        busy(two.lock, b, WRITE)
        one.call("close", one.open(paths[0]))
        two.lock(b, WRITE)
        two.call("close", b)
        one.call("close", a)
