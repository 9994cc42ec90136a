"""Random calls about locks, made on a tmpfs and on mounts of a region: both must answer alike."""

from __future__ import annotations

import errno
import fcntl
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.fuse.locker import GETLK, OFD_GETLK, OFD_SETLK, READ, SETLK, UNLOCK, WRITE, Program
from tests.support.figures import Figures
from tests.support.lab import Lab, needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]
PROGRAMS, FILES = 3, 2  # programs, and open files of each
SHORT, LONG = 400, 4000  # calls of one sequence
#: Seconds for which a lock may still be held after the last close of its file, of which the kernel
#: tells in the background.
TOLD = 5.0


class Call(NamedTuple):
    """One call of one program, through one of its open files."""

    program: int
    file: int
    verb: str
    arguments: tuple[int, ...]


class World:
    """The same programs on files of one kind."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.programs = [Program() for _ in paths]
        self.fds = [
            [program.open(path) for _ in range(FILES)]
            for program, path in zip(self.programs, paths, strict=True)
        ]

    def do(self, call: Call) -> object:
        """What it came to, as far as it can be compared."""
        program, fd = self.programs[call.program], self.fds[call.program][call.file]
        try:
            if call.verb == "lock":
                got = program.call("lock", fd, *call.arguments)
                # Of several locks in the way any may be told.
                return got[0] == UNLOCK if call.arguments[0] in (GETLK, OFD_GETLK) else None
            if call.verb == "flock":
                return program.call("flock", fd, *call.arguments)
            if call.verb == "reopen":
                program.call("close", fd)
                self.fds[call.program][call.file] = program.open(self.paths[call.program])
                return None
            if call.verb == "dup":
                return program.call("close", program.call("dup", fd))
            return program.call(call.verb, fd)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def end(self) -> None:
        for program in self.programs:
            program.kill()


def calls(chance: random.Random, count: int) -> Iterator[Call]:
    """Calls with ranges that often touch."""
    for _ in range(count):
        program, file = chance.randrange(PROGRAMS), chance.randrange(FILES)
        verb = chance.choices(("lock", "flock", "reopen", "dup", "fork_that_closes"),
                              (80, 15, 2, 1, 1))[0]  # fmt: skip
        arguments: tuple[int, ...] = ()
        if verb == "lock":
            command = chance.choice((SETLK, SETLK, SETLK, OFD_SETLK, OFD_SETLK, GETLK, OFD_GETLK))
            kinds = [READ, WRITE] if command in (GETLK, OFD_GETLK) else [READ, WRITE, UNLOCK]
            start = chance.choice((0, 5, 10, 15, 20, 1 << 40))
            arguments = (command, chance.choice(kinds), start, chance.choice((0, 1, 5, 10, 15)))
        elif verb == "flock":
            how = chance.choice((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN))
            arguments = (how | fcntl.LOCK_NB,)
        yield Call(program, file, verb, arguments)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab(16 << 20, PROGRAMS) as made:
        yield made


@pytest.mark.parametrize("spread", [False, True], ids=["one mount", "three mounts"])
def test_locks_are_as_on_a_tmpfs(
    lab: Lab, spread: bool, long_run: bool, only_case: str | None, figures: Figures
) -> None:
    seeds = [int(only_case)] if only_case else range(20 if long_run else 2)
    for seed in seeds:
        name = f"twin-{spread}-{seed}"
        here = [lab.paths[at if spread else 0] / name for at in range(PROGRAMS)]
        with tempfile.TemporaryDirectory(prefix="ivshmemfs-twin-", dir="/dev/shm") as folder:
            worlds = [World(here), World([Path(folder) / name] * PROGRAMS)]
            try:
                compare(worlds, seed, LONG if long_run else SHORT)
            finally:
                for world in worlds:
                    world.end()
    made = len(seeds) * (LONG if long_run else SHORT)
    where = "three mounts" if spread else "one mount"
    figures.add(f"calls about locks on {where}: {made:,}, all answered as on a tmpfs")


def compare(worlds: list[World], seed: int, count: int) -> None:
    """Make the calls in both worlds."""
    made: list[Call] = []
    closed = False
    for call in calls(random.Random(seed), count):
        made.append(call)
        expected: Any = worlds[1].do(call)
        got = worlds[0].do(call)
        end = time.monotonic() + TOLD
        # What the last close of a file gives back, the kernel tells later.
        while got != expected and closed and expected in (None, True) and time.monotonic() < end:
            got = worlds[0].do(call)
        closed |= call.verb == "reopen"
        assert got == expected, f"--case {seed}: call {len(made)}, after {made[-8:]}"
