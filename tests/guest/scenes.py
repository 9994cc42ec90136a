"""What machines do to one directory at the same time: ``scenes.py SCENE PLACE WHO COUNT``.

Run on the host and in guests, with nothing but the standard library.  Exit status 0 means that
nothing was seen which may not be.  A machine that has changed things leaves ``done-WHO``.  One that
only looks goes on until there are as many of those as ``COUNT`` says.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

BLOCK = 5000


def append(place: Path, who: str, count: int) -> None:
    """Append so many lines, each with one call."""
    chance = random.Random(who)
    fd = os.open(place / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in range(count):
        line = f"{who} {number} {'x' * chance.randrange(200)} end\n".encode()
        assert os.write(fd, line) == len(line)
    os.close(fd)


# --- exclusion --------------------------------------------------------------------------------


def _exclusive(path: Path, _who: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def _made(path: Path, _who: str) -> None:
    path.mkdir()


def _linked(path: Path, who: str) -> None:
    os.link(path.parent / f"own-{who}", path)


def _renamed(path: Path, who: str) -> None:
    """The machine that moves the one token away has it."""
    os.rename(path.parent / "token", path.parent / f"mine-{who}")


def exclude(place: Path, who: str, count: int, take: Callable[[Path, str], None]) -> None:
    """Count up a plain file so many times, each time under a lock that a name is."""
    (place / f"own-{who}").touch()
    lock = place / "lock"
    for _ in range(count):
        while True:
            try:
                take(lock, who)
                break
            except (FileExistsError, FileNotFoundError):
                time.sleep(0.001)
        counter = place / "counter"
        counter.write_text(str(int(counter.read_text()) + 1))
        if take is _renamed:
            os.rename(place / f"mine-{who}", place / "token")
        elif take is _made:
            lock.rmdir()
        else:
            lock.unlink()


def locked(place: Path, _who: str, count: int, take: Callable[[int, int], None]) -> None:
    """Count up a plain file so many times, each time under a lock of an open file."""
    counter = place / "counter"
    fd = os.open(place / "token", os.O_RDWR)
    for _ in range(count):
        take(fd, fcntl.LOCK_EX)
        counter.write_text(str(int(counter.read_text()) + 1))
        take(fd, fcntl.LOCK_UN)
    os.close(fd)


# --- changes under the eyes of others ---------------------------------------------------------


def replace(place: Path, who: str, count: int) -> None:
    """Move new files over one name."""
    for number in range(count):
        new = place / f"new-{who}"
        new.write_bytes(b"%d" % (number % 10) * BLOCK)
        os.rename(new, place / "name")


def watch(place: Path, who: str, count: int) -> None:
    """The name is there throughout, with one whole file."""
    while len(list(place.glob("done-*"))) < count:
        content = (place / "name").read_bytes()
        assert len(content) == BLOCK, len(content)
        assert len(set(content)) == 1
        assert (place / "name").stat().st_size == BLOCK


def write(place: Path, who: str, count: int) -> None:
    """Blocks of one letter anywhere in a file."""
    chance = random.Random(who)
    fd = os.open(place / "file", os.O_RDWR)
    for number in range(count):
        os.pwrite(fd, bytes([number % 255 + 1]) * BLOCK, chance.randrange(20) * BLOCK)
    os.close(fd)


def cut(place: Path, who: str, count: int) -> None:
    """Truncate the file to whole blocks."""
    chance = random.Random(who)
    for _ in range(count):
        os.truncate(place / "file", chance.randrange(20) * BLOCK)


def read(place: Path, who: str, count: int) -> None:
    """See whole blocks, or zeros, or the end."""
    fd = os.open(place / "file", os.O_RDONLY)
    while len(list(place.glob("done-*"))) < count:
        for number in range(20):
            got = os.pread(fd, BLOCK, number * BLOCK)
            assert len(got) in (0, BLOCK), len(got)
            assert len(set(got)) <= 1
    os.close(fd)


def hold(place: Path, who: str, count: int) -> None:
    """Read a file to its end that is removed meanwhile."""
    content = (place / "kept").read_bytes()
    with (place / "kept").open("rb", buffering=0) as file:
        (place / f"open-{who}").touch()
        while len(list(place.glob("done-*"))) < count:
            time.sleep(0.01)
        assert not (place / "kept").exists()
        assert b"".join(iter(lambda: file.read(10_000), b"")) == content


def remove(place: Path, who: str, count: int) -> None:
    """Remove the file once so many have it open."""
    while len(list(place.glob("open-*"))) < count:
        time.sleep(0.01)
    (place / "kept").unlink()


def copy(place: Path, who: str, count: int) -> None:
    """Copy a tree that is being removed: what is gone is gone, and nothing else goes wrong."""
    failures: list[tuple[str, str, str]] = []
    try:
        shutil.copytree(place / "tree", place / f"copy-{who}")
    except shutil.Error as error:
        failures = error.args[0]
    except FileNotFoundError:
        pass
    assert all("No such file" in why for _, _, why in failures), failures


def prune(place: Path, who: str, count: int) -> None:
    """Remove the tree."""
    shutil.rmtree(place / "tree")


# --- names that were not there ----------------------------------------------------------------


def ask(place: Path, who: str, count: int) -> None:
    """Look for names before they are made, and again as soon as they are said to be."""
    for number in range(count):
        wanted = place / f"thing-{number}"
        assert not wanted.exists()
        (place / f"want-{number}").touch()
        while not (place / f"have-{number}").exists():
            assert not (place / "never").exists()
        assert wanted.read_text() == f"{number}"
        assert f"thing-{number}" in os.listdir(place)
        wanted.unlink()


def answer(place: Path, who: str, count: int) -> None:
    """Make what the other has asked for."""
    for number in range(count):
        while not (place / f"want-{number}").exists():
            time.sleep(0.001)
        (place / f"thing-{number}").write_text(f"{number}")
        (place / f"have-{number}").touch()


SCENES: dict[str, Callable[[Path, str, int], None]] = {
    "append": append,
    "exclusive": partial(exclude, take=_exclusive),
    "made": partial(exclude, take=_made),
    "linked": partial(exclude, take=_linked),
    "renamed": partial(exclude, take=_renamed),
    "flock": partial(locked, take=fcntl.flock),
    "fcntl": partial(locked, take=fcntl.lockf),
    "replace": replace,
    "watch": watch,
    "write": write,
    "cut": cut,
    "read": read,
    "hold": hold,
    "remove": remove,
    "copy": copy,
    "prune": prune,
    "ask": ask,
    "answer": answer,
}
#: Those that look until the others are done.
LOOKING = ("watch", "read", "hold")


def main() -> None:
    scene, place, who, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    SCENES[scene](place, who, count)
    if scene not in LOOKING:
        (place / f"done-{who}").touch()


if __name__ == "__main__":
    main()
