"""Which of the three times each operation sets, and setting them."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.posix.conftest import GROUP, USER
from tests.posix.raising import fails
from tests.support.lab import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]

OLD = 1_000_000_000_123_456_789
SECOND = 10**9


def times(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns


def changed_by(path: Path, call: Callable[[], object]) -> str:
    """Which of a(ccess), m(odification) and c(hange) time a call moves to the present."""
    os.utime(path, ns=(OLD, OLD), follow_symlinks=False)
    before = times(path)
    time.sleep(0.02)  # the clock of files runs in steps of some milliseconds
    floor = time.time_ns() - 2 * 10**7
    call()
    after = times(path)
    for old, new in zip(before, after, strict=True):
        assert new == old or floor <= new <= time.time_ns() + 10**7
    pairs = zip("amc", before, after, strict=True)
    return "".join(letter for letter, old, new in pairs if old != new)


def with_file(path: Path, flags: int, call: Callable[[int], object]) -> Callable[[], None]:
    """A call that opens a file around another call."""

    def opened() -> None:
        fd = os.open(path, flags)
        try:
            call(fd)
        finally:
            os.close(fd)

    return opened


def test_what_touches_a_file(here: Path, there: Path) -> None:
    path = here / "file"
    path.write_bytes(b"content")
    rw = os.O_RDWR
    assert changed_by(path, with_file(path, rw, lambda fd: os.write(fd, b"x"))) == "mc"
    assert changed_by(path, with_file(path, rw, lambda fd: os.pwrite(fd, b"x", 10**6))) == "mc"
    assert changed_by(path, with_file(path, rw, lambda fd: os.write(fd, b""))) == ""
    assert changed_by(path, with_file(path, rw, lambda fd: os.ftruncate(fd, 5))) == "mc"
    assert changed_by(path, with_file(path, rw, os.fsync)) == ""
    assert changed_by(path, with_file(path, rw | os.O_TRUNC, lambda fd: None)) == "mc"
    assert changed_by(path, with_file(path, rw | os.O_TRUNC, lambda fd: None)) == "mc"
    assert changed_by(path, with_file(path, rw, lambda fd: os.posix_fallocate(fd, 0, 1))) == "mc"
    assert changed_by(path, lambda: os.truncate(path, 100)) == "mc"
    assert changed_by(path, lambda: os.truncate(path, 50)) == "mc"
    assert changed_by(path, lambda: path.chmod(0o600)) == "c"
    assert changed_by(path, lambda: os.chown(path, 5, 6)) == "c"
    assert changed_by(path, lambda: os.chown(path, -1, -1)) == "c"
    assert changed_by(path, lambda: os.setxattr(path, "user.a", b"")) == "c"
    assert changed_by(path, lambda: os.removexattr(path, "user.a")) == "c"
    assert changed_by(path, lambda: os.link(path, here / "link")) == "c"
    assert changed_by(path, lambda: os.unlink(here / "link")) == "c"
    assert changed_by(path, lambda: os.stat(path)) == ""
    assert changed_by(path, lambda: (there / "file").write_bytes(b"elsewhere")) == "mc"


def test_renaming_sets_the_change_time(here: Path) -> None:
    for make in (lambda p: p.touch(), lambda p: p.mkdir(), lambda p: os.symlink("x", p)):
        path, to = here / f"a{make}", here / f"b{make}"
        make(path)
        before = times(path)
        time.sleep(0.02)
        path.rename(to)
        after = times(to)
        assert after[:2] == before[:2]
        assert after[2] > before[2]


def test_what_touches_a_directory(here: Path) -> None:
    (here / "dir").mkdir()
    (here / "to").mkdir()
    folder, to = here / "dir", here / "to"
    (here / "file").touch()
    changing: list[Callable[[], object]] = [
        lambda: (folder / "file").touch(),
        lambda: (folder / "sub").mkdir(),
        lambda: os.symlink("x", folder / "link"),
        lambda: os.mkfifo(folder / "fifo"),
        lambda: os.link(here / "file", folder / "hard"),
        lambda: os.rename(folder / "file", folder / "moved"),
        lambda: os.unlink(folder / "moved"),
        lambda: os.rmdir(folder / "sub"),
        lambda: os.rename(folder / "link", to / "link"),
        lambda: os.rename(to / "link", folder / "link"),
    ]
    for call in changing:
        assert changed_by(folder, call) == "mc"
    keeping: list[Callable[[], object]] = [
        lambda: (folder / "hard").chmod(0o600),
        lambda: (folder / "hard").write_bytes(b"x"),
        lambda: fails(errno.ENOENT, os.unlink, folder / "none"),
        lambda: fails(errno.EEXIST, os.mkdir, folder / "hard"),
        lambda: os.rename(folder / "hard", here / "file"),  # two names of one file: nothing
    ]
    for call in keeping:
        assert changed_by(folder, call) == ""
    assert changed_by(folder, lambda: folder.chmod(0o700)) == "c"


def test_moving_a_directory_does_not_modify_it(here: Path) -> None:
    (here / "dir").mkdir()
    (here / "to").mkdir()
    os.utime(here / "dir", ns=(OLD, OLD))
    os.rename(here / "dir", here / "to" / "dir")
    assert times(here / "to" / "dir")[:2] == (OLD, OLD)


def test_new_files_are_of_now(here: Path) -> None:
    before = time.time_ns() - 2 * 10**7
    for make in (lambda p: p.touch(), lambda p: p.mkdir(), lambda p: os.symlink("x", p), os.mkfifo):
        path = here / f"it{make}"
        make(path)
        for value in times(path):
            assert before <= value <= time.time_ns() + 10**7


def test_time_does_not_run_backwards(here: Path) -> None:
    """However changes and settings to the present alternate."""
    path, last = here / "file", 0
    for number in range(300):
        if number % 2:
            path.touch()
        else:
            path.write_bytes(b"x")
        found = path.stat()
        assert found.st_mtime_ns >= last
        assert found.st_ctime_ns >= found.st_mtime_ns
        last = found.st_mtime_ns


# --- setting times ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [0, 1, OLD, -1, -SECOND, -2**31 * SECOND, (2**31 - 1) * SECOND, 2**31 * SECOND,
     2**32 * SECOND + 5, 2**33 * SECOND - 1],
)  # fmt: skip
def test_any_moment_can_be_set(here: Path, there: Path, moment: int) -> None:
    for make in (lambda p: p.touch(), lambda p: p.mkdir(), lambda p: os.symlink("x", p)):
        path = here / f"it{make}"
        make(path)
        os.utime(path, ns=(moment, moment + 1), follow_symlinks=False)
        assert times(there / path.name)[:2] == (moment, moment + 1)


@pytest.mark.parametrize("seconds", [2**34, -(2**35), 2**40, 2**62])
def test_moments_that_cannot_be_stored(here: Path, seconds: int) -> None:
    """The nearest that can be stored is, as Linux does it elsewhere."""
    path = here / "file"
    path.touch()
    os.utime(path, (seconds, seconds))
    assert abs(path.stat().st_mtime) <= abs(seconds)
    assert (path.stat().st_mtime < 0) == (seconds < 0)


def test_omitting_and_now(here: Path, user: Actor) -> None:
    """UTIME_OMIT leaves a time alone; UTIME_NOW is the time of the call."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    now, omit, at_fdcwd = (1 << 30) - 1, (1 << 30) - 2, -100

    def utimens(path: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> int:
        spec = (ctypes.c_long * 4)(*atime, *mtime)
        result = libc.utimensat(at_fdcwd, os.fsencode(path), spec, 0)
        return ctypes.get_errno() if result else 0

    path = here / "file"
    path.touch()
    assert utimens(path, (5, 6), (7, 8)) == 0
    assert times(path)[:2] == (5 * SECOND + 6, 7 * SECOND + 8)
    before = times(path)
    assert utimens(path, (0, omit), (0, omit)) == 0
    assert times(path) == before
    assert utimens(path, (0, omit), (9, 0)) == 0
    assert times(path)[:2] == (5 * SECOND + 6, 9 * SECOND)
    assert utimens(path, (9, 1), (0, omit)) == 0
    assert times(path)[:2] == (9 * SECOND + 1, 9 * SECOND)
    floor = time.time_ns() - 2 * 10**7
    assert utimens(path, (0, omit), (0, now)) == 0
    assert times(path)[0] == 9 * SECOND + 1
    assert floor <= times(path)[1] <= time.time_ns() + 10**7
    assert utimens(path, (0, now), (0, now)) == 0
    atime, mtime, ctime = times(path)
    assert atime == mtime
    assert abs(ctime - mtime) < 2 * 10**7
    assert utimens(path, (0, 10**9), (0, 0)) == errno.EINVAL


def test_who_may_set_times(here: Path, user: Actor, other: Actor) -> None:
    path = here / "file"
    path.touch()
    os.chown(path, USER, GROUP)
    path.chmod(0o666)
    user.utime(str(path), (1, 2))
    fails(errno.EPERM, other.utime, str(path), (1, 2))
    other.utime(str(path))  # the present: all that may write
    path.chmod(0o644)
    fails(errno.EACCES, other.utime, str(path))
    user.utime(str(path))
    path.chmod(0o444)
    user.utime(str(path))


def test_modes_do_not_matter_to_a_time(here: Path) -> None:
    path = here / "file"
    path.touch()
    path.chmod(0)
    os.utime(path, ns=(1, 2))
    assert times(path)[:2] == (1, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0
