"""Checking a region that others are writing to: no false alarm, no store."""

from __future__ import annotations

import mmap
import os
import signal
import time

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Busy, FsError, NoSpace
from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.region import Memory
from tests.support.damage import Knife, Names, sample
from tests.support.regions import ROOT, TestRegion, put

SECONDS = 60.0  # after which writers end by themselves


def work(fs: Filesystem, until: float, stop: mmap.mmap) -> None:
    """Create, overwrite and remove without a pause, until `stop` is set."""
    turn = 0
    while not stop[0] and time.monotonic() < until:
        turn += 1
        name = b"busy%d-%d" % (os.getpid(), turn % 7)
        try:
            put(fs, Names.folder, name, b"x" * (turn * 97 % 4000))
            if turn % 3 == 0:
                fs.unlink(Names.folder, name, ROOT)
            if turn % 5 == 0:
                fs.mkdir(1, name, 0o755, ROOT)
                fs.rmdir(1, name, ROOT)
        except (Busy, NoSpace, FsError):
            time.sleep(0.001)


def start_worker(made: TestRegion, stop: mmap.mmap) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        fs = made.mount()
        work(fs, time.monotonic() + SECONDS, stop)
        fs.unmount()
        code = 0
    finally:
        os._exit(code)


def test_no_false_alarm_beside_writers(made: TestRegion) -> None:
    stop = mmap.mmap(-1, 1)
    children = [start_worker(made, stop) for _ in range(2)]
    region = made.region(readonly=True)
    checks = commits = 0
    last = 0
    until = time.monotonic() + SECONDS * 0.9
    while (checks <= 5 or commits <= 2) and time.monotonic() < until:
        try:
            report = fsck.check(region)
        except Busy:
            continue
        assert report.clean, str(report)
        now = region.memory.load(COMMIT_OFFSET)
        commits += now != last
        last = now
        checks += 1
    stop[0] = 1
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert checks > 5
    assert commits > 2
    report = fsck.check(region)
    assert not report.findings, str(report)


def test_damage_is_found_beside_idle_mounts(made: TestRegion) -> None:
    fs = made.mount()
    Knife(made.region().memory).edit_inode(Names.small, nlink=9)
    assert not fsck.check(made.region(readonly=True)).clean
    fs.unmount()


def test_what_is_in_flight_is_no_leak(made: TestRegion) -> None:
    memory = made.region().memory
    knife = Knife(memory)
    _, incarnation, counter = words.split_state(knife.slot(2))
    for state, leaked in ((words.ACTIVE, 0), (words.DEAD, 0), (words.IDLE, 3), (words.FREE, 3)):
        knife.set_slot(2, words.make_state(state, incarnation, counter))
        for block in [b for b in range(knife.geometry.block_count) if not knife.tag(b)][:3]:
            knife.set_tag(block, words.make_tag(2, incarnation, counter))
        report = fsck.check(memory)
        texts = [f.text for f in report.findings if f.invariant == 29]
        assert texts == (
            [f"{leaked} claimed blocks cannot be reached from the root"] if leaked else []
        )
        memory.write(0, sample())


def next_commit(memory: Memory) -> None:
    """Another peer commits; the root stays the same."""
    word = memory.load(COMMIT_OFFSET)
    memory.store(COMMIT_OFFSET, word + (1 << words.BLOCK_BITS))


def test_what_was_overtaken_does_not_count(made: TestRegion) -> None:
    memory, other = made.region().memory, made.region().memory
    knife = Knife(other)
    block = knife.pointers(Names.orphan)[0][0]  # among the last that are looked at
    tag, overtaken = knife.tag(block), []

    def overtake() -> None:
        knife.set_tag(block, tag)
        next_commit(other)
        overtaken.append(True)

    knife.set_tag(block, 0)
    assert not fsck.check(memory).clean
    memory.trap(60, overtake, loads=True)
    report = fsck.check(memory)
    assert overtaken
    assert not report.findings, str(report)


def test_damage_behind_a_moving_commit_word_is_found(made: TestRegion) -> None:
    memory, other = made.region().memory, made.region().memory
    Knife(other).edit_inode(Names.small, nlink=9)
    memory.trap(60, lambda: next_commit(other), loads=True)
    assert not fsck.check(memory).clean


def test_a_check_that_is_always_overtaken_gives_up(made: TestRegion) -> None:
    memory, other = made.region().memory, made.region().memory
    Knife(other).edit_inode(Names.small, nlink=9)

    def overtake() -> None:
        next_commit(other)
        memory.trap(40, overtake, loads=True)

    memory.trap(40, overtake, loads=True)
    with pytest.raises(Busy, match="try again"):
        fsck.check(memory)


def test_a_check_stores_nothing(made: TestRegion) -> None:
    region = made.region()
    before = made.path.read_bytes()
    fsck.check(region)
    assert region.memory.stores == 0
    assert made.path.read_bytes() == before


@pytest.mark.slow
def test_a_worker_that_is_killed_leaves_no_damage(made: TestRegion) -> None:
    region = made.region(readonly=True)
    for turn in range(5):
        child = start_worker(made, mmap.mmap(-1, 1))
        time.sleep(0.1 + 0.037 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        report = fsck.check(region)
        assert report.clean, str(report)
    report = fsck.repair(made.region())
    assert not report.findings, str(report)
