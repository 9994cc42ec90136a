"""`-o notify`: programs that watch on one mount learn what another mount does."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from ivshmemfs.fuse import replayer
from tests.support.figures import Figures
from tests.support.inotify import Event, Inotify
from tests.support.lab import EVERYTHING, PATIENCE, Lab, Mount, needs_fuse, needs_root, new_lab
from tests.support.mounts import eventually
from tests.support.programs import find, missing

pytestmark = [needs_fuse, needs_root]

#: A mount whose permissions the kernel checks, and one that only root may use.
WAYS = {"all": f"{EVERYTHING},notify", "root": "notify"}
#: Events of a program's reading, or of the way in which it writes; not compared.
IGNORED = ("OPEN", "ACCESS", "CLOSE_NOWRITE")

FAN_NONBLOCK, FAN_MARK_ADD, FAN_CLOSE_WRITE, FAN_EVENT_ON_CHILD = 2, 1, 8, 0x08000000
FAN_EVENT = struct.Struct("=IBBHQii")
AT_FDCWD = -100
MNT_DETACH = 2

_numbers = itertools.count()


@pytest.fixture(scope="module", params=WAYS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two mounts with the option: the first changes, the second watches."""
    with new_lab(128 << 20, 2, WAYS[request.param]) as made:
        yield made


def _replayers(mount: Mount) -> list[int]:
    """The processes that are children of a daemon."""
    path = Path(f"/proc/{mount.process.pid}/task/{mount.process.pid}/children")
    return [int(word) for word in path.read_text().split()]


def _heard(watch: Inotify, there: Path, seconds: float = PATIENCE) -> None:
    """Wait until the mount reports what happens in *there*, a watched directory."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        probe = there / f"probe{next(_numbers)}"
        probe.touch()
        seen = eventually(lambda: any(e.name.startswith("probe") for e in watch.read()), 0.2)
        probe.unlink()
        if seen:
            _settle(watch, there)
            return
    raise AssertionError("no event comes")


def _settle(watch: Inotify, there: Path) -> list[Event]:
    """The events so far.  All changes of one look precede those of the next look."""
    found: list[Event] = []
    for _ in range(2):
        name = f"fence{next(_numbers)}"
        (there / name).touch()
        found += watch.until(("CREATE", name))
        (there / name).unlink()
    return [event for event in found if not event.name.startswith(("fence", "probe"))]


# --- the same events as on a tmpfs --------------------------------------------------------------


class Row(NamedTuple):
    """An operation in directories `one` and `two`, and how its events may differ on a mount."""

    do: Callable[[Path], object]
    before: Callable[[Path], object] = lambda _top: None
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()


def _write(path: Path, text: str, mode: str = "w") -> None:
    with path.open(mode) as file:
        file.write(text)


def _twice(top: Path) -> None:
    (top / "one/twice").touch()
    os.link(top / "one/twice", top / "two/twice")


def _two_files(top: Path) -> None:
    (top / "one/over").touch()
    (top / "two/over").touch()


TABLE = {
    "create": Row(lambda top: (top / "one/new").touch()),
    "create and write": Row(lambda top: _write(top / "one/full", "x")),
    "mkdir": Row(lambda top: (top / "one/folder").mkdir()),
    "nested": Row(lambda top: (top / "one/deep/er").mkdir(parents=True)),
    "write": Row(
        lambda top: _write(top / "one/w", "contents"), lambda top: (top / "one/w").touch()
    ),
    "append": Row(
        lambda top: _write(top / "one/a", "more", "a"), lambda top: _write(top / "one/a", "x")
    ),
    "truncate": Row(
        lambda top: os.truncate(top / "one/t", 1),
        lambda top: _write(top / "one/t", "long"),
        more=("CLOSE_WRITE one/t",),
    ),
    "chmod": Row(lambda top: (top / "one/c").chmod(0o600), lambda top: (top / "one/c").touch()),
    "chmod of a directory": Row(
        lambda top: (top / "one/cd").chmod(0o700), lambda top: (top / "one/cd").mkdir()
    ),
    "chmod of the watched one": Row(
        lambda top: (top / "two").chmod(0o700), lambda top: (top / "two").chmod(0o755)
    ),
    "times": Row(
        lambda top: os.utime(top / "one/times", (1, 1)),
        lambda top: (top / "one/times").touch(),
        more=("MODIFY one/times", "CLOSE_WRITE one/times"),
        less=("ATTRIB one/times",),
    ),
    "rename within": Row(
        lambda top: os.rename(top / "one/r", top / "one/s"), lambda top: (top / "one/r").touch()
    ),
    "rename across": Row(
        lambda top: os.rename(top / "one/x", top / "two/x"), lambda top: (top / "one/x").touch()
    ),
    "rename of a directory": Row(
        lambda top: os.rename(top / "one/dx", top / "two/dx"), lambda top: (top / "one/dx").mkdir()
    ),
    "rename over": Row(
        lambda top: os.rename(top / "one/over", top / "two/over"),
        _two_files,
    ),
    "rename out": Row(
        lambda top: os.rename(top / "one/out", top / "out"),
        lambda top: (top / "one/out").touch(),
        more=("DELETE one/out",),
        less=("MOVED_FROM one/out",),
    ),
    "rename in": Row(
        lambda top: os.rename(top / "in", top / "one/in"),
        lambda top: (top / "in").touch(),
        more=("CREATE one/in", "CLOSE_WRITE one/in"),
        less=("MOVED_TO one/in",),
    ),
    "link": Row(
        lambda top: os.link(top / "one/l", top / "two/l"), lambda top: (top / "one/l").touch()
    ),
    "unlink one of two": Row(
        lambda top: (top / "one/twice").unlink(), _twice, more=("ATTRIB two/twice",)
    ),
    "symlink": Row(lambda top: os.symlink("target", top / "one/symlink")),
    "fifo": Row(lambda top: os.mkfifo(top / "one/fifo")),
    "unlink": Row(lambda top: (top / "one/u").unlink(), lambda top: (top / "one/u").touch()),
    "unlink a symlink": Row(
        lambda top: (top / "one/us").unlink(), lambda top: os.symlink("x", top / "one/us")
    ),
    "rmdir": Row(lambda top: (top / "one/rm").rmdir(), lambda top: (top / "one/rm").mkdir()),
    "write the watched file": Row(lambda top: _write(top / "one/file", "more", "a")),
    "chmod the watched file": Row(lambda top: (top / "one/file").chmod(0o640)),
    "rename the watched file": Row(lambda top: os.rename(top / "one/file", top / "two/file")),
    "unlink the watched file": Row(lambda top: (top / "two/file").unlink()),
    "rmdir the watched directory": Row(lambda top: (top / "one/sub").rmdir()),
}


def _prepare(top: Path) -> None:
    (top / "one/sub").mkdir(parents=True)
    (top / "two").mkdir()
    _write(top / "one/file", "contents")


def _compared(events: list[Event]) -> set[str]:
    """What the table compares: kinds and names, without the order."""
    found = [e for e in events if e.kind not in IGNORED]
    return {f"{e.kind} {e.place}{'/' if e.name else ''}{e.name}" for e in found}


@pytest.mark.slow
def test_the_same_events_as_on_a_tmpfs(lab: Lab) -> None:
    name = f"table{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    tmpfs = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ivshmemfs-notify-"))
    wrong: dict[str, tuple[set[str], set[str]]] = {}
    watched = ("one", "two", "one/file", "one/sub")
    try:
        for top in (there, tmpfs):
            _prepare(top)
        with (
            Inotify(*(here / path for path in watched)) as mine,
            Inotify(*(tmpfs / path for path in watched)) as model,
        ):
            for folder in ("one", "two", "one/sub"):
                _heard(mine, there / folder)
            for title, row in TABLE.items():
                for top in (there, tmpfs):
                    row.before(top)
                _settle(mine, there / "two")
                model.read()
                for top in (there, tmpfs):
                    row.do(top)
                got, expected = _settle(mine, there / "two"), model.read()
                cookies = Counter(e.cookie for e in got if e.cookie)
                assert set(cookies.values()) <= {2, 3}, got  # MOVE_SELF may have it, too
                ours = _compared(got)
                theirs = (_compared(expected) - set(row.less)) | set(row.more)
                if ours != theirs:
                    wrong[title] = ours - theirs, theirs - ours
        assert not wrong, "\n".join(f"{key}: more, less {value}" for key, value in wrong.items())
        assert sorted(os.listdir(here / "one")) == sorted(os.listdir(there / "one"))
    finally:
        shutil.rmtree(tmpfs)


# --- what this mount does itself ----------------------------------------------------------------


def test_own_changes_are_reported_once(lab: Lab) -> None:
    """Both mounts change one directory at the same time."""
    name = f"both{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    with Inotify(here) as watch:
        _heard(watch, there)
        events: list[Event] = []

        def foreign() -> None:
            for number in range(300):
                (there / f"foreign{number}").touch()

        thread = threading.Thread(target=foreign)
        thread.start()
        for number in range(300):
            (here / f"own{number}").touch()
            events += watch.read()
        thread.join()
        events += _settle(watch, there)
        created = Counter(event.name for event in events if event.kind == "CREATE")
        names = {f"{whose}{number}" for whose in ("own", "foreign") for number in range(300)}
        assert {name: count for name, count in created.items() if name in names} == dict.fromkeys(
            names, 1
        )


def test_only_own_changes(lab: Lab) -> None:
    here = lab.paths[1] / f"own{next(_numbers)}"
    there = lab.paths[0] / here.name
    here.mkdir()
    with Inotify(here) as watch:
        _heard(watch, there)
        for number in range(100):
            path = here / f"{number}"
            path.write_text("x")
            os.rename(path, here / f"m{number}")
            (here / f"m{number}").unlink()
        counts = Counter((e.kind, e.name) for e in _settle(watch, there) if e.kind != "MODIFY")
        assert set(counts.values()) == {1}


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_burst_while_the_mount_works(lab: Lab) -> None:
    """2,000 foreign files; the mount reads and writes meanwhile, and sees each file once."""
    name = f"burst{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    (there / "data").write_bytes(b"x" * 100_000)
    with Inotify(here, mask=0x100) as watch:
        _heard(watch, there)
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                assert (here / "data").stat().st_size == 100_000
                assert len((here / "data").read_bytes()) == 100_000

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for number in range(2000):
                (there / f"{number}").touch()
            events = watch.until(("CREATE", "1999"), seconds=120)  # it is paced
        finally:
            done.set()
            thread.join()
        events += _settle(watch, there)
        assert Counter(e.name for e in events if e.name.isdigit()) == {
            str(number): 1 for number in range(2000)
        }
        assert len(os.listdir(here)) == len(os.listdir(there))


def _available(process: subprocess.Popen[str]) -> str:
    """What a process has printed since."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    try:
        return os.read(process.stdout.fileno(), 1 << 16).decode()
    except BlockingIOError:
        return ""


def test_entr_runs_its_command_again(lab: Lab) -> None:
    find("entr")
    name = f"entr{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.write_text("0\n")
    # -n: without a terminal; -d and -r are for editors and servers.
    with subprocess.Popen(
        ["entr", "-n", "cat", str(here)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as entr:  # fmt: skip
        assert entr.stdin is not None
        assert entr.stdout is not None
        try:
            print(here, file=entr.stdin, flush=True)
            entr.stdin.close()
            assert entr.stdout.readline() == "0\n"

            def seen() -> bool:  # it waits for the end of a row of changes
                there.write_text(f"{next(_numbers)}\n")
                assert entr.stdout is not None
                return bool(select.select([entr.stdout], [], [], 1.0)[0])

            assert eventually(seen)
        finally:
            entr.kill()


WATCHDOG = """
import sys
from watchdog.events import FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver

class Printer(FileSystemEventHandler):
    def on_any_event(self, event):
        print(event.event_type, event.src_path.rpartition("/")[2], flush=True)

observer = InotifyObserver()
observer.schedule(Printer(), sys.argv[1], recursive=True)
observer.start()
observer.join()
"""


def test_pythons_watchdog(lab: Lab) -> None:
    """Its recursive observer also follows directories that another machine makes."""
    python = "/usr/bin/python3"  # whose packages are Debian's
    if subprocess.run([python, "-c", "import watchdog"], stderr=subprocess.DEVNULL).returncode:
        missing("python3-watchdog is not installed: sh scripts/setup --programs")
    name = f"dog{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    with subprocess.Popen(
        [python, "-c", WATCHDOG, str(here)], stdout=subprocess.PIPE, text=True
    ) as dog:
        assert dog.stdout is not None
        said = ""

        def heard(*lines: str) -> bool:
            nonlocal said
            said += _available(dog)
            return all(f"{line}\n" in said for line in lines)

        def ready() -> bool:
            (there / f"probe{next(_numbers)}").touch()
            return heard() and "created probe" in said

        try:
            assert eventually(ready)
            (there / "sub").mkdir()
            assert eventually(lambda: heard("created sub"))

            def inside() -> bool:
                (there / "sub" / f"in{next(_numbers)}").touch()
                return heard() and "created in" in said

            assert eventually(inside)
            (there / "sub" / "file").write_text("contents")
            assert eventually(lambda: heard("created file", "modified file", "closed file"))
            (there / "sub" / "file").rename(there / "moved")
            assert eventually(lambda: heard("moved file"))
            (there / "moved").unlink()
            assert eventually(lambda: heard("deleted moved"))
        finally:
            dog.kill()


def test_tail_follows_a_file(lab: Lab) -> None:
    name = f"log{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.write_text("first\n")
    with subprocess.Popen(["tail", "-F", str(here)], stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        try:
            assert tail.stdout.readline() == "first\n"
            for number in range(3):
                with there.open("a") as file:
                    file.write(f"{number}\n")
                assert tail.stdout.readline() == f"{number}\n"
        finally:
            tail.kill()


def test_inotifywait(lab: Lab) -> None:
    find("inotifywait")
    name = f"wait{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    command = ["inotifywait", "-q", "-m", "-e", "create", "--format", "%f", str(here)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as wait:
        assert wait.stdout is not None
        os.set_blocking(wait.stdout.fileno(), False)

        def seen() -> bool:
            (there / f"probe{next(_numbers)}").touch()
            return bool(wait.stdout and wait.stdout.read())

        try:
            assert eventually(seen)
        finally:
            wait.kill()


def test_directories_open_here_survive_a_move(lab: Lab) -> None:
    name = f"moved{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    (there / "a/inner").mkdir(parents=True)
    (there / "b").mkdir()
    (there / "a/inner/file").write_text("x")
    fd = os.open(here / "a/inner", os.O_RDONLY)
    with Inotify(here / "a", here / "b", here / "a/inner") as watch:
        _heard(watch, there / "a")
        _heard(watch, there / "b")
        os.rename(there / "a/inner", there / "b/inner")
        events = watch.until(("MOVED_TO", "inner"), ("MOVE_SELF", ""))
        assert os.stat("file", dir_fd=fd).st_size == 1
        assert os.listdir(fd) == ["file"]
        assert os.readlink(f"/proc/self/fd/{fd}") == str(here / "b/inner")
        (here / "b/inner/new").write_text("y")
        assert sorted(os.listdir(there / "b/inner")) == ["file", "new"]
        (there / "b/inner/foreign").touch()
        events = watch.until(("CREATE", "foreign"))
        assert [e.place for e in events if e.name == "foreign"][:1] == ["inner"]
        os.rename(there / "b/inner", there / "inner")  # to a directory without a watch
        watch.until(("DELETE", "inner"))
        assert sorted(os.listdir(fd)) == ["file", "foreign", "new"]
        os.close(os.open("late", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        assert (there / "inner/late").exists()
    os.close(fd)


def test_a_daemon_that_cannot_open_by_handle() -> None:
    """The replayer then walks the kernel's path to a directory."""
    prefix = ["setpriv", "--bounding-set", "-dac_read_search", "--inh-caps", "-dac_read_search"]
    with new_lab(16 << 20, 1, WAYS["root"]) as lab:
        there = lab.paths[0]
        here = lab.region.with_name("walked")
        here.mkdir()
        log = here.with_suffix(".log")
        words = [sys.executable, "-m", "ivshmemfs.cli", "mount", "-o", f"notify,log={log}"]
        subprocess.run([*prefix, *words, str(lab.region), str(here)], check=True, timeout=PATIENCE)
        try:
            (there / "a/b").mkdir(parents=True)
            with Inotify(here / "a/b", here / "a") as watch:
                _heard(watch, there / "a/b")
                os.rename(there / "a/b", there / "a/c")
                watch.until(("MOVED_TO", "c"), ("MOVE_SELF", ""))
                _heard(watch, there / "a/c")
                (there / "a/c/file").mkdir()
                events = watch.until(("CREATE", "file"))
                assert {event.place for event in events if event.name == "file"} == {"b"}
        finally:
            umount = [sys.executable, "-m", "ivshmemfs.cli", "umount", str(here)]
            subprocess.run(umount, check=True, timeout=PATIENCE)


def test_a_watch_below_a_directory_that_another_machine_renames(lab: Lab) -> None:
    name = f"above{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    (there / "a/sub").mkdir(parents=True)
    with Inotify(here / "a/sub") as watch:
        _heard(watch, there / "a/sub")
        os.rename(there / "a", there / "b")
        (there / "b/sub/one").touch()
        watch.until(("CREATE", "one"))
        assert os.listdir(here / "b/sub") == ["one"]  # the kernel gets a second node for it
        (there / "b/sub/two").touch()
        watch.until(("CREATE", "two"))


def test_what_the_replayer_showed_is_not_kept(lab: Lab) -> None:
    """After each event the mount shows the truth, for each kind of file."""
    name = f"truth{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    with Inotify(here) as watch:
        _heard(watch, there)
        for number in range(20):
            path = there / f"{number}"
            if number % 2:
                os.symlink("target", path)
            else:
                path.mkdir()
            watch.until(("CREATE", path.name))
            assert (here / path.name).lstat().st_mode == path.lstat().st_mode
            path.unlink() if number % 2 else path.rmdir()
            path.write_text("a file now")
            watch.until(("DELETE", path.name))
            assert (here / path.name).read_text() == "a file now"


def test_claims_stay_exclusive_while_changes_are_repeated(lab: Lab) -> None:
    """Two machines rename one file and one directory: each time exactly one succeeds."""
    name = f"claims{next(_numbers)}"
    places = [path / name for path in lab.paths]
    places[0].mkdir()
    (places[0] / "won").mkdir()
    rounds = 150
    with Inotify(places[1], places[1] / "won") as watch:
        _heard(watch, places[0])
        start = threading.Barrier(2)
        won: list[list[str]] = [[], []]

        def claim(number: int) -> None:
            place = places[number]
            for turn in range(rounds):
                if not number:
                    (place / f"f{turn}").touch()
                    (place / f"d{turn}").mkdir()
                start.wait(PATIENCE)
                for kind in "fd":
                    with suppress(FileNotFoundError):
                        os.rename(place / f"{kind}{turn}", place / "won" / f"{kind}{turn}-{number}")
                        won[number].append(f"{kind}{turn}")
                start.wait(PATIENCE)

        threads = [threading.Thread(target=claim, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won[0] + won[1]) == sorted(
            f"{kind}{turn}" for kind in "fd" for turn in range(rounds)
        )
        _settle(watch, places[0])
        listed = [sorted(os.listdir(place / "won")) for place in places]
        assert listed[0] == listed[1]
        assert len(listed[0]) == 2 * rounds


def test_fanotify_marks_count(lab: Lab) -> None:
    name = f"fanotify{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.fanotify_init(FAN_NONBLOCK, os.O_RDONLY)
    if fd < 0 and ctypes.get_errno() == errno.ENOSYS:
        pytest.skip("this kernel has no fanotify")
    assert fd >= 0
    try:
        mask = ctypes.c_uint64(FAN_CLOSE_WRITE | FAN_EVENT_ON_CHILD)
        marked = libc.fanotify_mark(fd, FAN_MARK_ADD, mask, AT_FDCWD, os.fsencode(here))
        assert marked == 0, os.strerror(ctypes.get_errno())

        def heard() -> bool:
            _write(there / "file", "x")
            try:
                event = os.read(fd, FAN_EVENT.size)
            except BlockingIOError:
                return False
            opened: int = FAN_EVENT.unpack(event)[-2]
            path = os.readlink(f"/proc/self/fd/{opened}")
            os.close(opened)
            return path == str(here / "file")

        assert eventually(heard)
    finally:
        os.close(fd)


def test_latency(lab: Lab, figures: Figures) -> None:
    name = f"latency{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    with Inotify(here) as watch:
        _heard(watch, there)
        taken = []
        for number in range(100):
            begun = time.perf_counter()
            (there / f"{number}").mkdir()
            watch.until(("CREATE", f"{number}"))
            taken.append(time.perf_counter() - begun)
    figures.add(f"a foreign mkdir is told after {statistics.median(taken) * 1e3:.1f} ms (median)")


# --- the replayer -------------------------------------------------------------------------------


def test_a_killed_replayer_is_started_again(lab: Lab) -> None:
    name = f"killed{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    lab.expected = "the replayer died"
    with Inotify(here) as watch:
        _heard(watch, there)
        (old,) = _replayers(lab.mounts[1])
        for number in range(50):
            (there / f"{number}").touch()
        os.kill(old, signal.SIGKILL)
        for number in range(50):
            (there / f"{number}").unlink()
        assert eventually(lambda: _replayers(lab.mounts[1]) not in ([], [old]))
        _heard(watch, there)
    assert os.listdir(here) == os.listdir(there)
    assert lab.mounts[1].log_text().count("the replayer died") == 1


def test_a_hidden_proc_is_told() -> None:
    """As in a container whose /proc belongs to another pid namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(PATIENCE)
        words = ["unshare", "--pid", "--fork", sys.executable, "-I", "-S", replayer.__file__]
        words += [str(theirs.fileno()), "/", "0:1", "0"]
        subprocess.run(words, pass_fds=(theirs.fileno(),), check=True, timeout=PATIENCE)
        assert ours.recv(100) == replayer.NO_PROC


def test_events_wait_for_the_next_replayer(lab: Lab) -> None:
    name = f"waits{next(_numbers)}"
    there, here = (path / name for path in lab.paths)
    there.mkdir()
    lab.expected = "the replayer died"
    with Inotify(here) as watch:
        _heard(watch, there)
        (old,) = _replayers(lab.mounts[1])
        os.kill(old, signal.SIGSTOP)
        for number in range(50):
            (there / f"{number}").touch()
            time.sleep(0.02)
        os.kill(old, signal.SIGKILL)
        watch.until(("CREATE", "10"), ("CREATE", "49"))


def test_an_unmount_at_rest_is_not_busy() -> None:
    with new_lab(16 << 20, 2, WAYS["all"]) as lab:
        there, here = lab.paths
        with Inotify(here) as watch:
            _heard(watch, there)
            (there / "last").touch()
            watch.until(("CLOSE_WRITE", "last"))
            device = here.stat().st_dev
            (replayer,) = _replayers(lab.mounts[1])
            assert eventually(lambda: os.stat(f"/proc/{replayer}/cwd").st_dev != device)
            subprocess.run(["umount", str(here)], check=True, timeout=PATIENCE)
            lab.mounts[1].process.wait(PATIENCE)
        assert not Path(f"/proc/{replayer}").exists()
        lab.mounts.pop()


@contextmanager
def _changes(there: Path, pause: float = 0.002) -> Iterator[None]:
    """Another machine makes and removes a file all the time."""
    done = threading.Event()

    def change() -> None:
        while not done.wait(pause):
            (there / "file").touch()
            (there / "file").unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _stopped_inside(replayer: int, device: int) -> None:
    """Stop the replayer at a moment when its current directory is the mount."""

    def is_inside() -> bool:
        os.kill(replayer, signal.SIGSTOP)
        if os.stat(f"/proc/{replayer}/cwd").st_dev == device:
            return True
        os.kill(replayer, signal.SIGCONT)
        return False

    assert eventually(is_inside)


def _umount(path: Path, flags: int = 0) -> int:
    """Call umount2(2) once; return the errno, 0 for success."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.umount2(os.fsencode(path), flags) else 0


@pytest.mark.parametrize("flags", [0, MNT_DETACH], ids=["plain", "lazy"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_replayer_at_work_makes_no_mount_busy(goes_on: bool, flags: int) -> None:
    with new_lab(16 << 20, 2, WAYS["all"]) as lab:
        there, here = lab.paths
        with Inotify(here) as watch:
            _heard(watch, there)
            device = here.stat().st_dev
            (replayer,) = _replayers(lab.mounts[1])
            with _changes(there):
                _stopped_inside(replayer, device)
                assert _umount(here, flags) == 0
                if goes_on:
                    os.kill(replayer, signal.SIGCONT)
                mount = lab.mounts.pop()
                assert mount.process.wait(PATIENCE) == 0
        assert not Path(f"/proc/{replayer}").exists()


def test_a_mount_is_unmounted_at_once_while_changes_come() -> None:
    """Two attempts: the kernel counts the system call that copies the mount as a use of it."""
    with new_lab(16 << 20, 1, WAYS["all"]) as lab, _changes(lab.paths[0], 0.0005):
        for _ in range(8):
            mount = lab.add(WAYS["all"])
            with Inotify(mount.path) as watch:
                watch.until(("CREATE", "file"))
                assert _umount(mount.path) == 0 or _umount(mount.path) == 0
                assert mount.process.wait(PATIENCE) == 0
            lab.mounts.pop()
            mount.path.rmdir()


@pytest.mark.parametrize("way", ["command", "signal"])
def test_an_unmount_while_changes_come(way: str) -> None:
    with new_lab(16 << 20, 2, WAYS["all"]) as lab:
        there, here = lab.paths
        with Inotify(here) as watch:
            _heard(watch, there)
            with _changes(there, 0.005):
                watch.until(("CREATE", "file"))
                mount = lab.mounts.pop()
                if way == "signal":
                    mount.process.send_signal(signal.SIGTERM)
                else:
                    words = [sys.executable, "-m", "ivshmemfs.cli", "umount", str(here)]
                    subprocess.run(words, check=True, timeout=PATIENCE)
                assert mount.process.wait(PATIENCE) == 0
        assert "in use" not in mount.log_text()


def test_a_daemon_that_dies_takes_its_replayer_along() -> None:
    with new_lab(16 << 20, 1, WAYS["all"]) as lab:
        mount = lab.mounts.pop()
        assert eventually(lambda: _replayers(mount))
        (replayer,) = _replayers(mount)
        mount.kill()
        assert eventually(lambda: not Path(f"/proc/{replayer}").exists())


def test_without_the_option_there_is_no_replayer() -> None:
    with new_lab(16 << 20, 2, EVERYTHING) as lab:
        there, here = lab.paths
        with Inotify(here) as watch:
            (there / "file").touch()
            assert (here / "file").exists()
            assert _replayers(lab.mounts[1]) == []
            assert [event for event in watch.read() if event.kind == "CREATE"] == []


@pytest.mark.slow
def test_many_changes_are_told_as_one() -> None:
    """A stopped replayer: the queue is bounded, and the watchers are told to list again."""
    with new_lab(64 << 20, 2, WAYS["all"]) as lab:
        there, here = lab.paths
        with Inotify(here) as watch:
            _heard(watch, there)
            (replayer,) = _replayers(lab.mounts[1])
            os.kill(replayer, signal.SIGSTOP)
            for number in range(3000):
                (there / f"{number}").touch()
                if not number % 1000:
                    time.sleep(0.05)
            os.kill(replayer, signal.SIGCONT)
            watch.until(("ATTRIB", ""))
            _heard(watch, there)


@pytest.mark.parametrize(("other", "says"), [("loop=trio", "loop=poll"), ("ro", "read-write")])
def test_options_that_exclude_it(other: str, says: str) -> None:
    words = [sys.executable, "-m", "ivshmemfs.cli", "mount", "-o", f"notify,{other}", "x", "/mnt"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode
    assert "'notify'" in result.stderr
    assert says in result.stderr
