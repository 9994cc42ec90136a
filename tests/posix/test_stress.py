"""Many processes at once do everything to one small tree, from one and from three mounts.

There is no model.  No call may fail in a way that its manual page does not know.  No reader may see
a block that is made of two writes.  When it is over, all mounts must agree, and the region must
be sound (`Lab.close`).  A failure prints the seed; ``--case SEED`` repeats it.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.calls import CALLS, UTIME_NOW, Call
from tests.posix.processes import in_processes
from tests.posix.twin import look
from tests.support.figures import Figures
from tests.support.lab import needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]

UNIT = 512
LARGEST = 200 * UNIT
#: What calls may fail with while all others move, make and remove everything.
EXPECTED = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL,
    errno.EPERM, errno.ELOOP, errno.ENODATA, errno.ENXIO, errno.EBUSY, errno.ENOSPC,
}  # fmt: skip


class Worker:
    """One process: random calls of paths and of files that it has open."""

    def __init__(self, top: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.top = top
        self.fds: list[int] = []
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        os.chdir(self.top)
        steps: list[Callable[[], None]] = [
            self.create, self.create, self.write, self.write, self.write, self.read, self.read,
            self.truncate, self.walk, self.path_call, self.path_call, self.path_call, self.close,
        ]  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step = self.chance.choice(steps)
            try:
                step()
                self.counts[step.__name__] += 1
            except OSError as error:
                if error.errno not in EXPECTED:
                    print(f"{step.__name__}: {error!r}", file=sys.stderr)
                    raise
        os.chdir("/")

    def path(self) -> str:
        return "/".join(self.chance.choice("abcde") for _ in range(self.chance.randrange(1, 5)))

    def create(self) -> None:
        flags = self.chance.choice((0, os.O_EXCL, os.O_TRUNC))
        fd = os.open(self.path(), flags | os.O_CREAT | os.O_RDWR | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(fd).st_mode) or len(self.fds) > 20:
            os.close(fd)
        else:
            self.fds.append(fd)

    def write(self) -> None:
        """Whole units, each of one letter."""
        if self.fds:
            data = bytes([self.chance.randrange(1, 256)]) * UNIT * self.chance.randrange(1, 60)
            os.pwrite(self.chance.choice(self.fds), data, self.chance.randrange(200) * UNIT)

    def read(self) -> None:
        if self.fds:
            found = os.pread(
                self.chance.choice(self.fds), LARGEST, self.chance.randrange(200) * UNIT
            )
            for at in range(0, len(found), UNIT):
                unit = found[at : at + UNIT]
                assert len(unit) == UNIT
                assert unit == unit[:1] * UNIT, Counter(unit)

    def truncate(self) -> None:
        if self.fds:
            os.ftruncate(self.chance.choice(self.fds), self.chance.randrange(200) * UNIT)

    def close(self) -> None:
        if self.fds:
            os.close(self.fds.pop(self.chance.randrange(len(self.fds))))

    def walk(self) -> None:
        """List everything; no name appears twice."""
        for _, folders, files in os.walk("."):
            assert len(set(folders + files)) == len(folders) + len(files)

    def path_call(self) -> None:
        one, two, chance = self.path(), self.path(), self.chance
        calls: list[Call] = [
            ("mkdir", one), ("mkdir", one), ("mkdir", one), ("rmdir", one), ("unlink", one),
            ("rename", one, two), ("rename", one, two),
            ("rename2", one, two, chance.choice((1, 2, 4))),
            ("link", one, two), ("symlink", chance.choice(("a", "../b", "c/d")), one),
            ("mkfifo", one), ("mknod", one, stat.S_IFREG | 0o644), ("chmod", one, 0o755),
            ("chown", one, chance.randrange(3), -1), ("stat", one), ("lstat", one),
            ("listdir", one), ("readlink", one), ("setxattr", one, "user.a", b"v" * 50),
            ("removexattr", one, "user.a"), ("listxattr", one), ("statvfs", one),
            ("utimens", one, (0, UTIME_NOW), (1, 2)),
        ]  # fmt: skip
        name, *arguments = chance.choice(calls)
        CALLS[name](*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("mounts", [1, 3])
def test_everybody_does_everything(
    mounts: int, long_run: bool, only_case: str | None, figures: Figures
) -> None:
    seconds, workers = (120.0, 9) if long_run else (6.0, 6)
    seed = int(only_case) if only_case is not None else 0
    with new_lab(64 << 20, mounts) as lab:
        paths = [lab.paths[number % mounts] / "tree" for number in range(workers)]
        paths[0].mkdir()
        counted = lab.region.with_suffix(".counts")

        def work(number: int) -> None:
            worker = Worker(paths[number], seed * 100 + number)
            worker.run(seconds)
            with counted.open("a") as file:
                file.write(f"{sum(worker.counts.values())}\n")

        print(f"--case {seed}")
        in_processes([lambda n=n: work(n) for n in range(workers)], seconds + 120)  # type: ignore[misc]
        trees = [look(path / "tree") for path in lab.paths]
        facts = [{name: (node.ino, node.facts) for name, node in tree.items()} for tree in trees]
        assert all(one == facts[0] for one in facts)
        done = sum(map(int, counted.read_text().split()))
        assert done > 100
    figures.add(f"{workers} processes at once on {mounts} mounts: {done} calls that succeeded")
