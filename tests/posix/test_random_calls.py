"""Random calls by several users on one and on three mounts, each repeated on a tmpfs.

The result of each call, and the tree every now and then, must be the same in both places.  A
failure prints the seed and the last calls; ``--case SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.posix.calls import NO_DEVICE, UTIME_NOW, UTIME_OMIT, Call, Errno
from tests.posix.twin import CALLERS, GROUP, OTHER, OWNER, SECOND_GROUP, Node, look
from tests.support.figures import Figures
from tests.support.lab import Lab, needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]

LARGEST = 200_000
SLOTS = 8
LONG = "n" * 256
USERS = ("root", "root", "owner", "owner", "other")
MODES = (0o777, 0o755, 0o644, 0o600, 0o666, 0o1777, 0o2775, 0o4755, 0o6711, 0o555, 0o400, 0)


class Generator:
    """Random calls, most of them of what was there a little while ago."""

    def __init__(self, seed: int, mounts: int) -> None:
        self.chance = random.Random(seed)
        self.mounts = mounts
        self.slots: dict[int, tuple[int, str, bool]] = {}  # mount, caller, whether it appends
        self.known: list[str] = []
        self.folders: list[str] = []
        self.makers: list[Callable[[], Call]] = [
            self.create, self.create, self.write_file, self.mkdir, self.mkdir, self.make_other,
            self.remove, self.remove, self.rename, self.rename, self.rename_flags, self.link,
            self.symlink, self.chmod, self.chown, self.truncate, self.utimens, self.attribute,
            self.look, self.look, self.access,
        ]  # fmt: skip

    def step(self) -> tuple[int, str, Call]:
        """The mount, the caller and the call."""
        if self.slots and self.chance.random() < 0.45:
            slot = self.chance.choice(list(self.slots))
            mount, caller, appends = self.slots[slot]
            return mount, caller, self.with_slot(slot, appends)
        mount, caller = self.chance.randrange(self.mounts), self.chance.choice(USERS)
        if self.chance.random() < 0.2:
            return mount, caller, self.open(mount, caller)
        return mount, caller, self.chance.choice(self.makers)()

    # --- of paths ---

    def path(self) -> str:
        kind = self.chance.random()
        if kind < 0.5 and self.known:
            return self.chance.choice(self.known)
        if kind < 0.85 and self.folders:
            return f"{self.chance.choice(self.folders)}/{self.chance.choice('abcd')}"
        words = [self.chance.choice("abcd") for _ in range(self.chance.choice((1, 1, 2, 2, 3, 4)))]
        odd = len(words) > 1 and self.chance.random() < 0.2
        return "/".join(words) + (self.chance.choice(("/", "/.", "/..", "/" + LONG)) if odd else "")

    def told(self, call: Call, result: object) -> None:
        """What came of a call."""
        if call[0] == "f keep" and isinstance(result, Errno):
            self.slots.pop(call[1])

    def knows(self, tree: dict[str, Node]) -> None:
        """What is there now."""
        self.known = [path for path in tree if path != "."]
        self.folders = [path for path, node in tree.items() if node.facts[0].startswith("0o4")]

    def data(self) -> bytes:
        length = self.chance.choice((0, 1, 100, 4096, 5000, 20_000))
        return bytes([self.chance.randrange(1, 256)]) * length

    def offset(self) -> int:
        chance = self.chance
        return chance.choice((0, 1, 4095, 4096, 8192, chance.randrange(LARGEST)))

    def create(self) -> Call:
        flags = self.chance.choice((0, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW))
        return "open", self.path(), flags | os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, self.mode()

    def mode(self) -> int:
        return self.chance.choice(MODES if self.chance.random() < 0.4 else (0o777, 0o666))

    def write_file(self) -> Call:
        return "write_new", self.path(), self.data(), self.mode()

    def mkdir(self) -> Call:
        return "mkdir", self.path(), self.mode()

    def make_other(self) -> Call:
        kind = self.chance.choice((stat.S_IFIFO, stat.S_IFCHR, stat.S_IFREG, stat.S_IFSOCK))
        return "mknod", self.path(), kind | self.mode(), NO_DEVICE if kind == stat.S_IFCHR else 0

    def remove(self) -> Call:
        return self.chance.choice(("unlink", "unlink", "rmdir")), self.path()

    def rename(self) -> Call:
        return "rename", self.path(), self.path()

    def rename_flags(self) -> Call:
        return "rename2", self.path(), self.path(), self.chance.choice((1, 2, 2))

    def link(self) -> Call:
        return "link", self.path(), self.path(), self.chance.random() < 0.3

    def symlink(self) -> Call:
        return "symlink", self.chance.choice(("a", "../b", "a/b/c", "../../c", ".")), self.path()

    def chmod(self) -> Call:
        return "chmod", self.path(), self.mode()

    def owners(self) -> tuple[int, int]:
        return (self.chance.choice((-1, 0, OWNER, OTHER)),
                self.chance.choice((-1, 0, GROUP, SECOND_GROUP)))  # fmt: skip

    def chown(self) -> Call:
        return self.chance.choice(("chown", "lchown")), self.path(), *self.owners()

    def truncate(self) -> Call:
        # Not to 0: tmpfs does not change the times of a file that is empty already.
        return "truncate", self.path(), max(self.offset(), 1)

    def moments(self) -> tuple[tuple[int, int], tuple[int, int]]:
        values = ((0, UTIME_NOW), (0, UTIME_OMIT), (self.chance.randrange(10**6), 7))
        return self.chance.choice(values), self.chance.choice(values)

    def utimens(self) -> Call:
        return "utimens", self.path(), *self.moments(), self.chance.choice((0, 0x100))

    def attribute(self) -> Call:
        name = self.chance.choice(("user.a", "user.b", "trusted.c"))
        value = b"v" * self.chance.choice((0, 10, 1000))
        return self.chance.choice([
            ("setxattr", self.path(), name, value, self.chance.choice((0, 1, 2))),
            ("getxattr", self.path(), name), ("removexattr", self.path(), name),
            ("listxattr", self.path()),
        ])  # fmt: skip

    def look(self) -> Call:
        return self.chance.choice(("stat", "lstat", "listdir", "readlink", "chdir")), self.path()

    def access(self) -> Call:
        return "access", self.path(), self.chance.randrange(8)

    # --- of descriptors ---

    def open(self, mount: int, caller: str) -> Call:
        chance, slot = self.chance, self.chance.randrange(SLOTS)
        flags = chance.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY)) | os.O_NONBLOCK
        flags |= chance.choice((0, 0, os.O_CREAT, os.O_CREAT, os.O_APPEND, os.O_TRUNC,
                                os.O_CREAT | os.O_APPEND, os.O_DIRECTORY, os.O_TMPFILE,
                                os.O_TMPFILE | os.O_EXCL))  # fmt: skip
        self.slots[slot] = mount, caller, bool(flags & os.O_APPEND)
        return "f keep", slot, self.path(), flags, self.mode()

    def with_slot(self, slot: int, appends: bool) -> Call:
        chance = self.chance
        calls: list[Call] = [
            ("f pread", slot, chance.choice((0, 1, 5000, 30_000)), self.offset()),
            ("f pread", slot, 30_000, 0),
            ("f pwrite", slot, self.data(), self.offset()),
            ("f pwrite", slot, self.data(), self.offset()),
            ("f truncate", slot, self.offset()),
            ("f stat", slot), ("f stat", slot), ("f sync", slot), ("f list", slot),
            ("f chmod", slot, self.mode()), ("f chown", slot, *self.owners()),
            ("f utimens", slot, *self.moments()),
            ("f setxattr", slot, "user.a", b"w" * 20),
            ("f link", slot, self.path()),
            ("f fallocate", slot, chance.choice((0, 1, 3)), self.offset(),
             chance.choice((0, 100, 4096, 30_000))),
            ("f pwrite to end", slot, self.data()),
            ("f map", slot, chance.randrange(5000), 3000),
        ]  # fmt: skip
        if not appends:  # whose offset is as the own machine knows the size
            calls += [
                ("f seek", slot, self.offset(), os.SEEK_SET),
                ("f seek", slot, chance.randrange(-50, 50), chance.choice((1, 2))),
                ("f read", slot, 3000), ("f write", slot, self.data()),
                ("f writev", slot, self.data(), b"middle", self.data()),
            ]  # fmt: skip
        if chance.random() < 0.03:
            self.slots[slot] = (*self.slots[slot][:2], True)
            return "f append", slot
        if chance.random() < 0.1:
            self.slots.pop(slot)
            return "f close", slot
        return chance.choice(calls)


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """A tmpfs that leaves access times alone."""
    with tempfile.TemporaryDirectory(prefix="ivshmemfs-model-") as folder:
        words = ["mount", "-t", "tmpfs", "-o", "noatime,mode=0777", "model", folder]
        subprocess.run(words, check=True)
        yield Path(folder)
        subprocess.run(["umount", folder], check=True)


def _facts(tree: dict[str, Node]) -> dict[str, object]:
    return {path: node.facts for path, node in tree.items()}


def _shortened(call: Call) -> str:
    return repr(tuple(w[:1] + b"*%d" % len(w) if isinstance(w, bytes) else w for w in call))


def compare(model: Path, places: Sequence[Path], seed: int, count: int) -> None:
    """So many random calls in `model` and on the mounts of `places`."""
    below = "/".join("down" for _ in range(12))  # so that no symbolic link leads outside
    for top in (model, places[0]):
        (top / below).mkdir(parents=True)
        (top / below).chmod(0o777)
    actors = {name: Actor(*who) for name, who in CALLERS.items() if name in USERS}
    generator = Generator(seed, len(places))
    done: list[str] = []
    try:
        for number in range(count):
            mount, caller, call = generator.step()
            done.append(f"{number}: mount {mount}: {caller}: {_shortened(call)}")
            want = actors[caller].batch(str(model / below), [call])[0]
            got = actors[caller].batch(str(places[mount] / below), [call])[0]
            assert got == want
            generator.told(call, want)
            if number % 20 == 0:
                generator.knows(look(model / below))
            if number % 100 == 99:
                seen = generator.chance.choice(places)
                assert _facts(look(seen)) == _facts(look(model))
        for place in places:
            assert _facts(look(place)) == _facts(look(model))
    except BaseException:
        print(f"--case {seed}\n" + "\n".join(done[-300:]))
        raise
    finally:
        for actor in actors.values():
            actor.close()
        shutil.rmtree(model)
        shutil.rmtree(places[0])


def _seeds(only_case: str | None, long_run: bool) -> list[int]:
    if only_case is not None:
        return [int(only_case)]
    return list(range(12 if long_run else 4))


@pytest.mark.slow
@pytest.mark.parametrize("mounts", [1, 3])
def test_random_calls(
    lab: Lab, model: Path, mounts: int, long_run: bool, only_case: str | None, figures: Figures
) -> None:
    count = 5000 if long_run or only_case else 400
    for seed in _seeds(only_case, long_run):
        places = [path / f"calls{seed}" for path in lab.paths[:mounts]]
        compare(model / f"calls{seed}", places, seed, count)
        figures.count(f"random calls compared with a tmpfs, {mounts} mounts", count, f"{seed}")
