"""Repairs of a damaged region that real processes mount and write to at the same time."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.errors import Busy, FsError, InUse
from ivshmemfs.shm import watch
from tests.support.checks import assert_sound
from tests.support.damage import Knife, Names, sample
from tests.support.figures import Figures
from tests.support.regions import ROOT, TestRegion, get, new_region

SHORT, LONG = 25, 500
SPAN = 0.4  # seconds over which all of them start
PATIENCE = 20.0  # seconds for one round at most
FILES = 6  # of each writer
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE", 0.0)


# --- the damage -----------------------------------------------------------------------------


def wrong_counts(k: Knife, _: random.Random) -> None:
    k.edit_root(used=1, inodes=1, orphans=7)
    k.edit_inode(Names.big, nlink=7, blocks=3)


def lost_tags(k: Knife, chance: random.Random) -> None:
    used = [b for b in range(k.geometry.block_count) if k.tag(b) and b != k.root]
    for block in chance.sample(used, 20):
        k.set_tag(block, 0)


def lost_root(k: Knife, _: random.Random) -> None:
    k.flip(k.root, 70, seal=False)


def lost_table(k: Knife, _: random.Random) -> None:
    k.flip(k.place_of(Names.big)[0], 70, seal=False)


def lost_directory(k: Knife, _: random.Random) -> None:
    k.flip(k.interior_of(Names.crowd), 70, seal=False)


def leaks(k: Knife, chance: random.Random) -> None:
    free = [b for b in range(k.geometry.block_count) if not k.tag(b)]
    for block in chance.sample(free, 30):
        k.set_tag(block, k.tag(k.root))


DAMAGE = (wrong_counts, lost_tags, lost_root, lost_table, lost_directory, leaks)


# --- the actors -----------------------------------------------------------------------------


def patiently(call: Callable[[], T]) -> T:
    """Again while a repair or another writer is at it, or the damage is in the way."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except (Busy, InUse, FsError):
            if time.monotonic() > end:
                raise
            time.sleep(0.002)


def content(seed: int, number: int) -> bytes:
    return random.Random(seed * 100 + number).randbytes(1 + number * 613)


def write_whole(fs: Filesystem, name: bytes, text: bytes) -> None:
    flags = os.O_WRONLY | os.O_TRUNC
    handle, _ = patiently(lambda: fs.create(ROOT_INO, name, 0o600, flags, ROOT))
    assert patiently(lambda: fs.write(handle, 0, text)) == len(text)
    patiently(lambda: fs.release(handle))


def write_files(made: TestRegion, seed: int, told: int) -> None:
    """Create some files, tell of each that is there, and look at those told of again."""
    fs = patiently(made.mount)
    for number in range(FILES):
        write_whole(fs, b"w%d-%d" % (seed, number), content(seed, number))
        os.write(told, b"%d %d\n" % (seed, number))
        seen = number // 2
        assert patiently(lambda: get(fs, ROOT_INO, b"w%d-%d" % (seed, seen))) == content(seed, seen)  # noqa: B023
        patiently(fs.tick)
        time.sleep(0.002)
    patiently(fs.unmount)


def repair_it(made: TestRegion, force: bool) -> None:
    """Until it is done; with force in the end, under mounts that are in the way."""
    until = time.monotonic() + (0 if force else 2 * SPAN)
    with made.region() as region:
        report = patiently(lambda: fsck.repair(region, force=time.monotonic() > until))
    assert report.clean, str(report)


def child(action: Callable[[], None], after: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        time.sleep(after)
        action()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


class Round:
    """One damaged region, its writers and its repairs."""

    def __init__(self, made: TestRegion, seed: int) -> None:
        self.made = made
        self.chance = random.Random(seed)
        self.told, self._tell = os.pipe()
        self.writers: list[int] = []

    def damage(self) -> None:
        with self.made.region() as region:
            for do in self.chance.sample(DAMAGE, 2):
                with suppress(IndexError):  # the first left nothing for the second to cut
                    do(Knife(region.memory), self.chance)

    def run(self) -> set[tuple[int, int]]:
        """All at once; the files that writers were told are there."""
        chance = self.chance
        for seed in range(1, 4):
            action = self._writer(seed)
            self.writers.append(child(action, chance.uniform(0, SPAN)))
        if chance.random() < 0.3:  # a repair that dies somewhere
            dying = child(lambda: repair_it(self.made, True), chance.uniform(0, SPAN / 2))
            time.sleep(chance.uniform(0.05, SPAN))
            os.kill(dying, signal.SIGKILL)
            os.waitpid(dying, 0)
        force = chance.random() < 0.6
        repair = child(lambda: repair_it(self.made, force), chance.uniform(0, SPAN / 2))
        self._stop_some()
        codes = [
            os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [*self.writers, repair]
        ]
        assert not any(codes), f"exit codes {codes}"
        os.close(self._tell)
        with os.fdopen(self.told) as told:
            return {(int(a), int(b)) for a, b in (line.split() for line in told)}

    def _writer(self, seed: int) -> Callable[[], None]:
        return lambda: write_files(self.made, seed, self._tell)

    def _stop_some(self) -> None:
        for pid in self.chance.sample(self.writers, 2):
            time.sleep(self.chance.uniform(0, SPAN / 4))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0, SPAN / 4))
            os.kill(pid, signal.SIGCONT)


def one_round(seed: int) -> int:
    image = sample()
    with new_region(len(image)) as made:
        made.path.write_bytes(image)
        case = Round(made, seed)
        case.damage()
        told = case.run()
        with made.region() as region:
            report = fsck.repair(region)  # all others have left
            assert report.clean, str(report)
            assert_sound(region.memory)
        fs = made.mount()
        for writer, number in told:
            name = b"w%d-%d" % (writer, number)
            assert get(fs, ROOT_INO, name) == content(writer, number), name
        fs.unmount()
        return len(told)


@pytest.mark.slow
def test_nothing_is_lost_that_a_mount_commits(
    long_run: bool, figures: Figures, only_case: str | None
) -> None:
    if only_case is not None:
        one_round(int(only_case))
        return
    files, rounds = 0, LONG if long_run else SHORT
    for seed in range(rounds):
        try:
            files += one_round(seed)
        except BaseException as error:
            error.add_note(f"again: pytest {__file__} --case {seed}")
            raise
    figures.add(f"repairs beside mounts: {rounds} rounds, {files:,} files acknowledged, 0 lost")
