"""Several mounts of one region: what one does the others see at once, and nothing is torn."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import random
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ivshmemfs.format.geometry import HINT_OFFSET
from ivshmemfs.format.words import make_hint
from ivshmemfs.region import open_region
from tests.posix.calls import CALLS
from tests.posix.processes import in_processes
from tests.posix.raising import fails
from tests.support.figures import Figures
from tests.support.lab import Lab, needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]

EXCHANGE = 2  # of renameat2(2)


# --- seen at once -----------------------------------------------------------------------------


def test_every_change_is_seen_at_once(places: list[Path]) -> None:
    one, two, three = places
    for number in range(50):
        name = f"n{number}"
        for place in places:
            assert not (place / name).exists()  # and no mount remembers that
        (one / name).write_bytes(b"v1")
        assert (two / name).read_bytes() == b"v1"
        (two / name).write_bytes(b"version 2")
        assert (three / name).stat().st_size == 9
        assert (one / name).read_bytes() == b"version 2"
        (three / name).chmod(0o604)
        assert (one / name).stat().st_mode & 0o777 == 0o604
        os.rename(two / name, two / "renamed")
        assert not (three / name).exists()
        assert "renamed" in os.listdir(one)
        os.unlink(one / "renamed")
        assert os.listdir(two) == []
        assert not (three / "renamed").exists()


def test_open_files_see_what_others_write(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"")
    reader = os.open(here / "file", os.O_RDONLY)
    writer = os.open(there / "file", os.O_WRONLY)
    for number in range(200):
        os.pwrite(writer, b"%06d" % number, 0)
        assert os.pread(reader, 6, 0) == b"%06d" % number
        os.pwrite(writer, b"x", number * 1000 + 6)
        assert os.fstat(reader).st_size == number * 1000 + 7
        assert os.lseek(reader, 0, os.SEEK_END) == number * 1000 + 7
    os.ftruncate(writer, 6)
    assert os.read(reader, 10) == b""
    assert os.pread(reader, 10, 0) == b"000199"
    os.close(reader)
    os.close(writer)


def test_open_directories_see_what_others_do(here: Path, there: Path) -> None:
    folder = os.open(here, os.O_RDONLY)
    for number in range(20):
        (there / f"{number}").touch()
        assert len(os.listdir(folder)) == number + 1
        assert os.stat(f"{number}", dir_fd=folder).st_size == 0
    for number in range(20):
        (there / f"{number}").unlink()
        fails(errno.ENOENT, lambda name=f"{number}": os.stat(name, dir_fd=folder))
    os.close(folder)


def test_a_current_directory_that_others_move(places: list[Path]) -> None:
    (places[0] / "a" / "b").mkdir(parents=True)
    folder = os.open(places[0] / "a" / "b", os.O_RDONLY)
    os.rename(places[1] / "a" / "b", places[1] / "moved")
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    assert (places[2] / "moved" / "file").exists()
    assert os.stat("..", dir_fd=folder).st_ino in (
        places[0].stat().st_ino,
        (places[0] / "a").stat().st_ino,  # the kernel's own memory of the way down
    )
    os.close(folder)


@pytest.mark.parametrize("look", [False, True], ids=["blindly", "after a look"])
def test_a_directory_that_another_machine_moved(places: list[Path], look: bool) -> None:
    """It can be used, moved on and moved back, also when the kernel knows its old place."""
    one, two, _ = places
    for number in range(6):
        (one / "a" / f"d{number}" / "sub").mkdir(parents=True)
        (one / "b" / f"e{number}").mkdir(parents=True)
        (one / "a" / f"d{number}" / "file").write_text(f"{number}")
    inside = os.open(one / "a" / "d0", os.O_RDONLY)
    for number in range(6):
        ino = (one / "a" / f"d{number}" / "sub").parent.stat().st_ino
        os.rename(two / "a" / f"d{number}", two / f"m{number}")
        if look:
            assert (one / f"m{number}" / "file").read_text() == f"{number}"
            assert (one / f"m{number}").stat().st_ino == ino
        os.rename(one / f"m{number}", one / "b" / f"e{number}" / "in")
        assert (one / "b" / f"e{number}" / "in").stat().st_ino == ino
        assert (two / "b" / f"e{number}" / "in" / "file").read_text() == f"{number}"
        os.rename(two / "b" / f"e{number}" / "in", two / "a" / f"d{number}")
        os.mkdir(one / "a" / f"d{number}" / "new")
        os.rename(one / "a" / f"d{number}" / "sub", one / "a" / f"d{number}" / "new" / "sub")
        assert sorted(os.listdir(two / "a" / f"d{number}")) == ["file", "new"]
    assert os.stat("file", dir_fd=inside).st_size == 1
    assert sorted(os.listdir(inside)) == ["file", "new"]
    os.close(inside)
    found = {path.name for path in (one / "a").rglob("sub")}
    assert found == {"sub"}


def test_something_else_by_the_same_name(here: Path, there: Path) -> None:
    """What the kernel knows of a name never outlives what another machine puts in its place."""
    (here / "one").mkdir()
    (here / "two").write_text("2")
    opened = os.open(here / "one", os.O_RDONLY)
    os.rmdir(there / "one")
    (there / "one").write_text("a file now")
    os.unlink(there / "two")
    (there / "two" / "sub").mkdir(parents=True)
    assert (here / "one").read_text() == "a file now"
    assert os.listdir(here / "two") == ["sub"]
    assert os.listdir(opened) == []
    fails(errno.ENOENT, lambda: os.mkdir("new", dir_fd=opened))
    os.close(opened)
    fails(errno.EISDIR, os.unlink, here / "two")
    fails(errno.ENOTDIR, os.rmdir, here / "one")
    os.symlink("one", here / "link")
    assert (here / "link").read_text() == "a file now"
    os.unlink(there / "link")
    os.symlink("two", there / "link")
    assert os.listdir(here / "link") == ["sub"]
    os.rename(there / "two", there / "three")
    os.rename(there / "one", there / "two")
    os.rename(there / "three", there / "one")
    fails(errno.ENOTDIR, os.listdir, here / "two")
    assert os.listdir(here / "one") == ["sub"]


def test_a_fifo_that_another_machine_removes(here: Path, there: Path) -> None:
    """A program that has it open goes on, as with a file."""
    os.mkfifo(here / "fifo", 0o600)
    fd = os.open(here / "fifo", os.O_RDWR | os.O_NONBLOCK)
    os.unlink(there / "fifo")
    assert os.fstat(fd).st_nlink == 0
    os.fchmod(fd, 0o640)
    assert os.fstat(fd).st_mode == stat.S_IFIFO | 0o640
    os.write(fd, b"through")
    assert os.read(fd, 100) == b"through"
    os.close(fd)
    fails(errno.ENOENT, os.stat, here / "fifo")


@pytest.mark.slow
def test_directories_that_everybody_moves(places: list[Path], long_run: bool) -> None:
    """Only what rename(2) says, never ESTALE, and no directory is lost or below itself."""
    rounds = 2000 if long_run else 200
    allowed = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL)
    for number in range(12):
        (places[0] / f"d{number}").mkdir()

    def expected(error: OSError) -> None:
        if error.errno not in allowed:
            raise error

    def move(place: Path, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            walk = os.walk(place, onerror=expected)
            known = [Path(top, name) for top, folders, _ in walk for name in folders]
            known = chance.sample(known, len(known) // 2) or [place / "d0"]
            source, to = chance.choice(known), chance.choice([place, *known])
            try:
                os.rename(source, to / source.name)
            except OSError as error:
                expected(error)

    in_processes([lambda s=s, place=place: move(place, s) for s, place in enumerate(places * 2)])  # type: ignore[misc]
    for place in places:
        assert sorted(path.name for path in place.rglob("*")) == sorted(f"d{n}" for n in range(12))


def test_two_machines_move_two_directories_into_each_other(places: list[Path]) -> None:
    """One succeeds, the other is refused; there is never a ring."""
    one, two, three = places
    for number in range(30):
        (one / f"a{number}").mkdir()
        (one / f"b{number}").mkdir()

    def swallow(place: Path, eater: str, eaten: str) -> None:
        for number in range(30):
            with suppress(OSError):
                os.rename(place / f"{eaten}{number}", place / f"{eater}{number}" / "in")

    in_processes([lambda: swallow(one, "a", "b"), lambda: swallow(two, "b", "a")])
    for number in range(30):
        left = [name for name in (f"a{number}", f"b{number}") if (three / name).is_dir()]
        assert len(left) == 1
        assert os.listdir(three / left[0]) == ["in"]


# --- locks made of names ----------------------------------------------------------------------


def _exclusive(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _linked(path: Path) -> bool:
    try:
        os.link(path.parent / f"own{os.getpid()}", path)
    except FileExistsError:
        return False
    return True


def _renamed(path: Path) -> bool:
    """The process that moves the one token away has it."""
    try:
        os.rename(path.parent / "token", path.parent / f"mine{os.getpid()}")
    except FileNotFoundError:
        return False
    return True


def _renamed_alike(path: Path) -> bool:
    """The same, with one new name for all."""
    try:
        os.rename(path.parent / "token", path)
    except FileNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("take", [_exclusive, _made, _linked, _renamed, _renamed_alike])
def test_exactly_one_gets_a_lock(
    places: list[Path], take: Callable[[Path], bool], long_run: bool
) -> None:
    """Six processes on three mounts; a counter that only the holder changes loses nothing."""
    rounds = 200 if long_run else 30
    counter = places[0] / "counter"
    counter.write_text("0")
    (places[0] / "token").touch()

    def contend(place: Path) -> None:
        os.close(os.open(place / f"own{os.getpid()}", os.O_CREAT | os.O_WRONLY))
        for _ in range(rounds):
            lock = place / "lock"
            while not take(lock):
                time.sleep(0.0005)
            value = int((place / "counter").read_text())
            (place / "counter").write_text(str(value + 1))
            if take is _renamed:
                os.rename(place / f"mine{os.getpid()}", place / "token")
            elif take is _renamed_alike:
                os.rename(lock, place / "token")
            elif take is _made:
                lock.rmdir()
            else:
                lock.unlink()

    in_processes([lambda place=place: contend(place) for place in places * 2])  # type: ignore[misc]
    assert counter.read_text() == str(6 * rounds)


# --- claiming by renaming to one new name -----------------------------------------------------


class Start:
    """Lets processes begin each round at the same moment."""

    def __init__(self, processes: int) -> None:
        self._arrived = mmap.mmap(-1, 8 * processes)
        self._processes = processes

    def wait(self, who: int, number: int) -> None:
        """Wait until all have come to round `number`, which is counted from 1."""
        mine = slice(8 * who, 8 * who + 8)
        self._arrived[mine] = number.to_bytes(8, "little")
        while any(
            int.from_bytes(self._arrived[8 * n : 8 * n + 8], "little") < number
            for n in range(self._processes)
        ):
            os.sched_yield()


CLAIMS = (
    ("file", "y"),
    ("file", "../cur/x"),
    ("file", "over"),
    ("file", "own"),
    ("linked file", "y"),
    ("directory", "y"),
    ("directory", "../cur/x"),
    ("directory", "own"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "to"), CLAIMS)
def test_exactly_one_claims_by_renaming(
    places: list[Path], kind: str, to: str, long_run: bool, figures: Figures
) -> None:
    """`new/x` becomes `cur/x`, as mail and job queues claim things; every machine tries it."""
    seconds = 15 if long_run else 1.2
    claimers = places[:2]
    for folder in ("new", "cur", "other"):
        (places[0] / folder).mkdir()
    start, last = Start(len(claimers)), mmap.mmap(-1, 8)
    won = mmap.mmap(-1, 1 << 20)  # by round, a byte for each process

    def make(number: int) -> None:
        source = places[0] / "new" / f"x{number}"
        if kind == "directory":
            source.mkdir()
        else:
            source.touch()
        if kind == "linked file":
            os.link(source, places[0] / "other" / f"x{number}")
        if to == "over":
            (places[0] / "new" / f"over{number}").touch()

    def named(number: int, who: int) -> str:
        return f"{to}{number}{who if to == 'own' else ''}"

    def clear(number: int) -> None:
        for who in range(len(claimers)):
            with suppress(FileNotFoundError):
                (Path.rmdir if kind == "directory" else Path.unlink)(
                    places[0] / "new" / named(number, who)
                )
        (places[0] / "other" / f"x{number}").unlink(missing_ok=True)

    def claim(place: Path, who: int) -> None:
        end = time.monotonic() + seconds
        new = place / "new"
        for number in itertools.count(1):
            if who == 0:
                clear(number - 2)  # a round that both have left, or the region becomes full
                make(number)
                over = time.monotonic() > end or (number + 2) * len(claimers) > len(won)
                last[:] = (number if over else 0).to_bytes(8, "little")
            start.wait(who, number)
            with suppress(FileNotFoundError):
                os.rename(new / f"x{number}", new / named(number, who))
                won[number * len(claimers) + who] = 1
            if int.from_bytes(last[:], "little") == number:
                return

    in_processes([lambda w=w, place=place: claim(place, w) for w, place in enumerate(claimers)])  # type: ignore[misc]
    rounds = int.from_bytes(last[:], "little")
    each = [won[n * len(claimers) : (n + 1) * len(claimers)] for n in range(1, rounds + 1)]
    wrong = sum(sum(one) != 1 for one in each)
    figures.add(f"claims of a {kind} by renaming it to {to}: {rounds:,}, {wrong} wrong")
    assert not wrong


def test_two_machines_exchange_two_names(places: list[Path], long_run: bool) -> None:
    """Each exchange takes effect, so two of them change nothing, and no kernel skips one."""
    seconds, claimers = 15 if long_run else 1.5, places[:2]
    (places[0] / "a").write_text("a")
    (places[0] / "b").write_text("b")
    start, last = Start(len(claimers)), mmap.mmap(-1, 8)

    def exchange(place: Path, who: int) -> None:
        end = time.monotonic() + seconds
        for number in itertools.count(1):
            if who == 0:
                last[:] = (number if time.monotonic() > end else 0).to_bytes(8, "little")
            start.wait(who, 2 * number - 1)
            CALLS["rename2"](str(place / "a"), str(place / "b"), EXCHANGE)
            start.wait(who, 2 * number)
            assert (place / "a").read_text() == "a", number
            if int.from_bytes(last[:], "little") == number:
                return

    in_processes([lambda w=w, place=place: exchange(place, w) for w, place in enumerate(claimers)])  # type: ignore[misc]


def rename_in(folder: int, old: str, new: str) -> None:
    """Rename within an open directory: two look-ups, and nothing else, by this thread."""
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def test_a_file_renamed_elsewhere_between_two_looks(here: Path, there: Path) -> None:
    """It is the same file to everything that one program does with both names."""
    for number in range(20):
        old, new = f"old{number}", f"new{number}"
        (here / old).write_text(old)
        locked = os.open(here / old, os.O_RDWR)
        fcntl.flock(locked, fcntl.LOCK_EX)
        folder = os.open(here, os.O_PATH)
        before = os.stat(old, dir_fd=folder)
        os.rename(there / old, there / new)
        after = os.stat(new, dir_fd=folder)  # the very next look-up of this thread
        assert (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev)
        again = os.open(new, os.O_RDWR, dir_fd=folder)
        assert os.path.samestat(os.fstat(again), before)
        fails(errno.EAGAIN, fcntl.flock, again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fails(errno.ENOENT, rename_in, folder, old, new)
        assert os.pread(again, 100, 0) == old.encode()
        os.close(again)
        os.close(locked)
        os.close(folder)


def test_hard_links_are_one_file_to_rename(here: Path, there: Path) -> None:
    """Nothing is to be done for two names of one file, also when they come from elsewhere."""
    (here / "a").write_text("1")
    os.link(there / "a", there / "b")
    assert os.stat(here / "a").st_ino == os.stat(here / "b").st_ino
    os.rename(here / "a", here / "b")
    assert sorted(os.listdir(there)) == ["a", "b"]
    folder = os.open(here, os.O_PATH)
    os.stat("a", dir_fd=folder)
    os.unlink(there / "a")
    fails(errno.ENOENT, rename_in, folder, "a", "b")
    assert os.listdir(here) == ["b"]
    os.close(folder)


# --- appending --------------------------------------------------------------------------------


def test_appending_loses_and_tears_no_line(places: list[Path], long_run: bool) -> None:
    count = 10_000 if long_run else 500
    (places[0] / "log").touch()

    def append(place: Path, who: int) -> None:
        chance = random.Random(who)
        fd = os.open(place / "log", os.O_WRONLY | os.O_APPEND)
        for number in range(count):
            line = b"%d %d " % (who, number) + b"x" * chance.randrange(200) + b" end\n"
            assert os.write(fd, line) == len(line)
        os.close(fd)

    calls = [lambda w=w, place=place: append(place, w) for w, place in enumerate(places)]
    in_processes(calls, 600)
    seen: Counter[int] = Counter()
    for line in (places[0] / "log").read_bytes().splitlines():
        words = line.split(b" ")
        assert words[-1] == b"end"
        assert int(words[1]) == seen[int(words[0])]
        seen[int(words[0])] += 1
    assert seen == dict.fromkeys(range(3), count)


# --- at once ----------------------------------------------------------------------------------


def test_rename_ping_pong(places: list[Path], long_run: bool) -> None:
    """A name that others keep replacing is always there, whole, and never stale."""
    rounds = 3000 if long_run else 300
    (places[0] / "name").write_bytes(b"0" * 5000)
    stop = places[0] / "stop"

    def replace(place: Path, who: int) -> None:
        for number in range(rounds):
            new = place / f"new{who}"
            new.write_bytes(b"%d" % (number % 10) * 5000)
            os.rename(new, place / "name")
        (place / f"done{who}").touch()

    def read(place: Path) -> None:
        while not stop.exists():
            content = (place / "name").read_bytes()
            assert len(content) == 5000
            assert len(set(content)) == 1
            assert (place / "name").stat().st_size == 5000
            os.close(os.open(place / "name", os.O_CREAT | os.O_RDWR))
            if all((place / f"done{who}").exists() for who in range(2)):
                stop.touch()

    in_processes([
        lambda: replace(places[0], 0),
        lambda: replace(places[1], 1),
        lambda: read(places[0]),
        lambda: read(places[1]),
        lambda: read(places[2]),
    ], 300)  # fmt: skip


def test_two_directories_swap_their_contents(places: list[Path], long_run: bool) -> None:
    """Names move to and fro between two directories on three mounts; none is lost or doubled."""
    rounds = 1000 if long_run else 150
    for folder in ("a", "b"):
        (places[0] / folder).mkdir()
    for number in range(30):
        (places[0] / "a" / f"{number}").write_text(f"{number}")

    def shuffle(place: Path, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            name = str(chance.randrange(30))
            source, to = chance.sample(["a", "b"], 2)
            try:
                os.rename(place / source / name, place / to / name)
            except FileNotFoundError:
                continue

    in_processes([lambda s=s, place=place: shuffle(place, s) for s, place in enumerate(places)])  # type: ignore[misc]
    found = os.listdir(places[1] / "a") + os.listdir(places[2] / "b")
    assert sorted(found) == sorted(map(str, range(30)))
    for folder in ("a", "b"):
        for path in (places[0] / folder).iterdir():
            assert path.read_text() == path.name


def test_create_and_unlink_of_one_name(places: list[Path], long_run: bool) -> None:
    """No error but that the name is there, or is not."""
    rounds = 1500 if long_run else 200

    def play(place: Path, seed: int) -> None:
        chance = random.Random(seed)
        path = place / "name"
        for _ in range(rounds):
            try:
                match chance.randrange(6):
                    case 0:
                        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
                    case 1:
                        path.unlink()
                    case 2:
                        path.write_bytes(b"x" * 100)
                    case 3:
                        assert path.read_bytes() in (b"", b"x" * 100)
                    case 4:
                        path.stat()
                    case 5:
                        os.truncate(path, 0)
            except FileNotFoundError:
                continue

    in_processes([lambda s=s, place=place: play(place, s) for s, place in enumerate(places * 2)])  # type: ignore[misc]


def test_making_and_removing_one_directory(places: list[Path], long_run: bool) -> None:
    rounds = 1500 if long_run else 200
    expected = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)

    def play(place: Path, seed: int) -> None:
        chance = random.Random(seed)
        path = place / "dir"
        for _ in range(rounds):
            try:
                match chance.randrange(6):
                    case 0:
                        path.mkdir()
                    case 1:
                        path.rmdir()
                    case 2:
                        os.close(os.open(path / "in", os.O_CREAT | os.O_RDWR, 0o600))
                    case 3:
                        (path / "in").unlink()
                    case 4:
                        assert os.listdir(path) in ([], ["in"])
                    case 5:
                        path.stat()
            except OSError as error:
                if error.errno not in expected:
                    raise

    in_processes([lambda s=s, place=place: play(place, s) for s, place in enumerate(places * 2)])  # type: ignore[misc]


def test_unlinking_while_others_read(places: list[Path]) -> None:
    path = places[0] / "file"
    content = random.Random(3).randbytes(3 << 20)
    path.write_bytes(content)

    def read(place: Path) -> None:
        with (place / "file").open("rb", buffering=0) as file:
            (place / f"open{os.getpid()}").touch()
            while path.exists():
                time.sleep(0.001)
            got = b"".join(iter(lambda: file.read(10_000), b""))
        assert got == content

    def remove() -> None:
        while len(list(places[0].glob("open*"))) < 3:
            time.sleep(0.005)
        (places[1] / "file").unlink()

    in_processes([*[lambda place=place: read(place) for place in places], remove])


def test_truncating_while_others_read_and_write(places: list[Path], long_run: bool) -> None:
    """A reader sees whole writes, or zeros, or the end: never anything else."""
    rounds = 2000 if long_run else 250
    block = 5000
    (places[0] / "file").touch()

    def write() -> None:
        chance = random.Random(1)
        fd = os.open(places[0] / "file", os.O_RDWR)
        for number in range(rounds):
            os.pwrite(fd, bytes([number % 255 + 1]) * block, chance.randrange(20) * block)
        os.close(fd)
        (places[0] / "done").touch()

    def cut() -> None:
        chance = random.Random(2)
        while not (places[1] / "done").exists():
            os.truncate(places[1] / "file", chance.randrange(20) * block)

    def read() -> None:
        fd = os.open(places[2] / "file", os.O_RDONLY)
        while not (places[2] / "done").exists():
            for number in range(20):
                got = os.pread(fd, block, number * block)
                assert len(got) in (0, block)
                assert len(set(got)) <= 1, Counter(got)
        os.close(fd)

    in_processes([write, cut, read])


def test_copying_a_tree_while_another_removes_it(places: list[Path]) -> None:
    for folder in range(8):
        (places[0] / "tree" / f"d{folder}").mkdir(parents=True)
        for number in range(25):
            (places[0] / "tree" / f"d{folder}" / f"f{number}").write_bytes(b"%d" % number * 300)

    def copy() -> None:
        failures: list[tuple[str, str, str]] = []
        try:
            shutil.copytree(places[1] / "tree", places[1] / "copy")
        except shutil.Error as error:
            failures = error.args[0]
        except FileNotFoundError:
            pass
        assert all("No such file" in why for _, _, why in failures), failures

    in_processes([copy, lambda: shutil.rmtree(places[0] / "tree")])
    assert not (places[2] / "tree").exists()
    if (places[2] / "copy").exists():
        for path in (places[2] / "copy").rglob("f*"):
            assert path.read_bytes() in (b"", path.name[1:].encode() * 300)


def test_two_machines_build_one_tree(places: list[Path]) -> None:
    """`mkdir -p` and writing the same names at once from everywhere."""

    def build(place: Path, who: int) -> None:
        for number in range(60):
            folder = place / "tree" / f"{number % 7}" / f"{number % 5}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}-{who}").write_text(f"{who}")

    in_processes([lambda w=w, place=place: build(place, w) for w, place in enumerate(places)])  # type: ignore[misc]
    found = [path for path in (places[0] / "tree").rglob("*") if path.is_file()]
    assert len(found) == 180
    assert all(path.read_text() == path.name.split("-")[1] for path in found)


# --- deaths -----------------------------------------------------------------------------------


@pytest.fixture
def mortal() -> Iterator[Lab]:
    with new_lab(16 << 20, 3) as lab:
        yield lab


@pytest.mark.slow
def test_a_file_that_is_open_on_a_machine_that_dies(mortal: Lab) -> None:
    """Unlinked there or here, it goes when no living peer holds it, and its room comes back."""
    one, two, three = mortal.paths
    free = os.statvfs(one).f_bfree
    (one / "theirs").write_bytes(bytes(1 << 20))
    (one / "ours").write_bytes(b"o" * (1 << 20))
    theirs = os.open(two / "theirs", os.O_RDONLY)
    ours = os.open(one / "ours", os.O_RDONLY)
    os.unlink(three / "theirs")
    os.unlink(two / "ours")
    assert os.pread(theirs, 5, 1000) == bytes(5)
    assert os.statvfs(one).f_bfree < free - 400
    mortal.kill(1)
    assert os.pread(ours, 5, (1 << 20) - 5) == b"ooooo"
    assert os.fstat(ours).st_nlink == 0
    os.close(ours)
    end = time.monotonic() + 20
    while os.statvfs(one).f_bfree != free and time.monotonic() < end:
        time.sleep(0.1)
    assert os.statvfs(one).f_bfree == free
    fails((errno.ENOTCONN, errno.ECONNABORTED), os.pread, theirs, 5, 0)
    with suppress(OSError):
        os.close(theirs)


def test_others_go_on_when_machines_die_at_work(mortal: Lab) -> None:
    def work(place: Path, who: int) -> None:
        with suppress(OSError):  # the daemon dies in the middle
            for number in itertools.count():
                path = place / f"{who}-{number % 10}"
                path.write_bytes(b"%d" % who * 3000)
                os.rename(path, place / f"moved-{who}-{number % 7}")

    pids = []
    for who in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                work(mortal.paths[who], who)
            finally:
                os._exit(0)
        pids.append(pid)
    time.sleep(0.5)
    mortal.kill(0)
    (mortal.paths[2] / "after").write_bytes(b"still here")
    time.sleep(0.2)
    mortal.kill(1)
    for pid in pids:
        os.waitpid(pid, 0)
    three = mortal.paths[2]
    assert (three / "after").read_bytes() == b"still here"
    for path in three.glob("moved-*"):
        assert path.read_bytes() in (path.name[6].encode() * 3000, b"")
    shutil.rmtree(three / "again", ignore_errors=True)
    mortal.add()
    assert sorted(os.listdir(mortal.paths[3])) == sorted(os.listdir(three))


def test_who_died_while_committing_blocks_nobody(lab: Lab, here: Path) -> None:
    """A hint that is never given back is taken over, each time within 0.1 s."""
    taken = []
    with (
        open_region(str(lab.region)) as region,
        (here / "f").open("wb", buffering=0) as file,
    ):
        for number in range(21):
            region.memory.store(HINT_OFFSET, make_hint(200, 0, number))
            started = time.monotonic()
            file.write(b"x")
            taken.append(time.monotonic() - started)
    assert (here / "f").stat().st_size == 21
    assert sorted(taken)[10] < 0.1  # the machine may be busy with something else now and then
