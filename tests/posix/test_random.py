"""Random operations on one file, on one and on several mounts, against a model in memory.

The idea is that of the old file system exerciser: any sequence of reads, writes, truncations,
mappings and reopenings must leave what the model says.  A failure prints the seed and the
operations that led to it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.lab import SHARED_MAPPINGS, Lab, needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]

LARGEST = 300_000
KEEP, PUNCH, ZERO = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Exerciser:
    """One file under several mounts, and what it must contain."""

    def __init__(self, paths: list[Path], seed: int, *, shared: bool = False) -> None:
        self.paths = paths
        self.chance = random.Random(seed)
        self.model = bytearray()
        self.log: list[str] = []
        self.shared = shared
        self.fds = [os.open(path, os.O_CREAT | os.O_RDWR) for path in paths]

    def run(self, count: int) -> None:
        """So many random steps; then everything is compared."""
        steps = [self.read, self.read, self.write, self.write, self.append, self.truncate,
                 self.stat, self.reopen, self.map_read, self.blank, self.blank, self.reserve,
                 self.copy, self.holes]  # fmt: skip
        if self.shared:
            steps.append(self.map_write)
        try:
            for _ in range(count):
                self.chance.choice(steps)(self.chance.randrange(len(self.fds)))
            for path in self.paths:
                assert path.read_bytes() == self.model
        except BaseException:
            print("\n".join(self.log[-40:]))
            raise
        finally:
            for fd in self.fds:
                os.close(fd)

    def place(self, beyond: int = 0) -> tuple[int, int]:
        """An offset and a length, often at the edges of blocks and pages."""
        kind = self.chance.randrange(4)
        offset = self.chance.randrange(LARGEST)
        length = self.chance.randrange(1, 70_000)
        if kind == 0:
            offset -= offset % 4096
        elif kind == 1:
            offset = max(offset - offset % 1024 - 1, 0)
        elif kind == 2:
            length = self.chance.randrange(1, 20)
        if not beyond:
            offset = min(offset, len(self.model))
        return offset, min(length, LARGEST - offset)

    def note(self, text: str) -> None:
        self.log.append(text)

    def write(self, who: int) -> None:
        offset, length = self.place(beyond=1)
        data = self.chance.randbytes(length)
        self.note(f"{who}: write {length} at {offset}")
        assert os.pwrite(self.fds[who], data, offset) == length
        self._store(offset, data)

    def _store(self, offset: int, data: bytes) -> None:
        self.model.extend(bytes(max(offset - len(self.model), 0)))
        self.model[offset : offset + len(data)] = data

    def append(self, who: int) -> None:
        if len(self.model) > LARGEST:
            return
        data = self.chance.randbytes(self.chance.randrange(1, 9000))
        self.note(f"{who}: append {len(data)}")
        fd = os.open(self.paths[who], os.O_WRONLY | os.O_APPEND)
        assert os.write(fd, data) == len(data)
        os.close(fd)
        self.model.extend(data)

    def read(self, who: int) -> None:
        offset, length = self.place()
        self.note(f"{who}: read {length} at {offset}")
        assert os.pread(self.fds[who], length, offset) == self.model[offset : offset + length]

    def truncate(self, who: int) -> None:
        size = self.chance.choice([0, 1, 500, 900, 4096, self.chance.randrange(LARGEST)])
        self.note(f"{who}: truncate to {size}")
        if self.chance.random() < 0.5:
            os.ftruncate(self.fds[who], size)
        else:
            os.truncate(self.paths[who], size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def blank(self, who: int) -> None:
        """Punch a hole, or have a range zeroed, which may make the file longer."""
        offset, length = self.place(beyond=1)
        length = max(length, 1)
        mode = self.chance.choice((PUNCH | KEEP, ZERO, ZERO | KEEP))
        self.note(f"{who}: fallocate {mode} {length} at {offset}")
        _fallocate(self.fds[who], mode, offset, length)
        if not mode & KEEP:
            self.model.extend(bytes(max(offset + length - len(self.model), 0)))
        end = min(offset + length, len(self.model))
        if end > offset:
            self.model[offset:end] = bytes(end - offset)

    def reserve(self, who: int) -> None:
        offset, length = self.place(beyond=1)
        length = max(length, 1)
        mode = self.chance.choice((0, KEEP))
        self.note(f"{who}: fallocate {mode} {length} at {offset}")
        _fallocate(self.fds[who], mode, offset, length)
        if not mode:
            self.model.extend(bytes(max(offset + length - len(self.model), 0)))

    def copy(self, who: int) -> None:
        """A part of the file to another place in it."""
        offset, length = self.place()
        to = self.chance.randrange(LARGEST)
        length = min(length, len(self.model) - offset, LARGEST - to, abs(to - offset))
        if length < 1:
            return
        self.note(f"{who}: copy {length} from {offset} to {to}")
        fd, data = self.fds[who], bytes(self.model[offset : offset + length])
        done = 0
        for _attempt in range(3):
            os.fstat(fd)  # as cp(1) does: the kernel copies no further than it knows the file
            # A look while the daemon drops pages of the file leaves the kernel with the old length.
            done += os.copy_file_range(fd, fd, length - done, offset + done, to + done)
            if done == length:
                break
        assert done == length
        self._store(to, data)

    def holes(self, who: int) -> None:
        """Where the file says that it has no data, there are zeros."""
        self.note(f"{who}: holes")
        at, size = 0, len(self.model)
        while at < size:
            try:
                data = os.lseek(self.fds[who], at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = size
            assert not any(self.model[at:data])
            if data < size:
                at = os.lseek(self.fds[who], data, os.SEEK_HOLE)
                assert data < at <= size
            else:
                at = size

    def stat(self, who: int) -> None:
        self.note(f"{who}: stat")
        assert os.fstat(self.fds[who]).st_size == len(self.model)
        assert self.paths[who].stat().st_size == len(self.model)

    def reopen(self, who: int) -> None:
        self.note(f"{who}: reopen")
        os.close(self.fds[who])
        self.fds[who] = os.open(self.paths[who], os.O_RDWR)

    def map_read(self, who: int) -> None:
        """A fresh private mapping shows what the file holds."""
        if not self.model:
            return
        offset, length = self.place()
        self.note(f"{who}: map privately, read {length} at {offset}")
        flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ
        with mmap.mmap(self.fds[who], len(self.model), flags, access) as mapping:
            assert mapping[offset : offset + length] == self.model[offset : offset + length]

    def map_write(self, who: int) -> None:
        """What is written through a shared mapping is in the file when it is flushed."""
        if not self.model:
            return
        offset, length = self.place()
        data = self.chance.randbytes(min(length, len(self.model) - offset))
        self.note(f"{who}: map shared, write {len(data)} at {offset}")
        with mmap.mmap(self.fds[who], len(self.model), mmap.MAP_SHARED) as mapping:
            mapping[offset : offset + len(data)] = data
            if self.chance.random() < 0.5:  # coherent on one mount even before
                assert os.pread(self.fds[who], len(data), offset) == data
            mapping.flush()
        self._store(offset, data)


def steps(long_run: bool) -> int:
    return 20_000 if long_run else 700


@pytest.mark.parametrize("seed", range(3))
def test_one_mount(here: Path, seed: int, long_run: bool) -> None:
    Exerciser([here / "file"], seed, shared=SHARED_MAPPINGS).run(steps(long_run))


@pytest.mark.parametrize("seed", range(3))
def test_three_mounts(places: list[Path], seed: int, long_run: bool) -> None:
    paths = [place / "file" for place in places]
    Exerciser(paths, seed, shared=SHARED_MAPPINGS).run(steps(long_run))


@pytest.mark.parametrize("seed", range(2))
def test_several_names_of_one_file(places: list[Path], seed: int, long_run: bool) -> None:
    (places[0] / "file").touch()
    os.link(places[0] / "file", places[0] / "name")
    os.symlink("name", places[0] / "link")
    paths = [places[0] / "file", places[1] / "name", places[0] / "link", places[2] / "link"]
    Exerciser(paths, seed).run(steps(long_run))


@pytest.fixture
def cached() -> object:
    with new_lab(16 << 20, 1, "allow_other,mmap") as lab:
        yield lab


@pytest.mark.parametrize("seed", range(2))
def test_through_the_page_cache(cached: Lab, seed: int, long_run: bool) -> None:
    """With -o mmap, one mount by itself is as exact as the other way."""
    Exerciser([cached.paths[0] / "file"], seed, shared=True).run(steps(long_run))


# --- trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_random_trees(places: list[Path], seed: int, long_run: bool) -> None:
    """Names, links and moves at random from three mounts give the same tree as on a local disk."""
    chance = random.Random(seed)
    model = places[0].parent.parent / f"model{seed}"
    model.mkdir()
    for number in range(5000 if long_run else 500):
        step = chance.choice(["mkdir", "rmdir", "write", "unlink", "rename", "link", "symlink"])
        one, two = (_some_path(chance) for _ in range(2))
        arguments = [one, two] if step in ("rename", "link") else [one]
        want = _outcome(step, model, arguments)
        got = _outcome(step, chance.choice(places), arguments)
        assert got == want, (number, step, arguments)
        if number % 50 == 0:
            assert _listing(chance.choice(places)) == _listing(model)
    for place in places:
        assert _listing(place) == _listing(model)


def _some_path(chance: random.Random) -> str:
    return "/".join(chance.choice("abcd") for _ in range(chance.randrange(1, 5)))


def _outcome(step: str, top: Path, arguments: list[str]) -> object:
    paths = [top / argument for argument in arguments]
    calls: dict[str, Callable[[], object]] = {
        "mkdir": lambda: paths[0].mkdir(),
        "rmdir": lambda: paths[0].rmdir(),
        "write": lambda: paths[0].write_bytes(arguments[0].encode() * 1000),
        "unlink": lambda: paths[0].unlink(),
        "rename": lambda: os.rename(*paths),
        "link": lambda: os.link(*paths, follow_symlinks=False),
        "symlink": lambda: os.symlink("a/b", paths[0]),
    }
    try:
        calls[step]()
    except OSError as error:
        return error.errno
    return None


def _listing(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for folder, _, files in os.walk(top):
        status = os.lstat(folder)
        found[os.path.relpath(folder, top)] = status.st_mode, status.st_nlink
        for name in files:
            path = Path(folder, name)
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else path.read_bytes()
            found[os.path.relpath(path, top)] = status.st_mode, status.st_nlink, content
        for name in os.listdir(folder):
            path = Path(folder, name)
            if path.is_symlink():
                found[os.path.relpath(path, top)] = os.readlink(path)
    return found
