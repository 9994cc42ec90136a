"""Other names and a larger region for a filesystem that exists: nothing is lost, also by deaths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import (
    FormatError,
    FsError,
    GeometryMismatch,
    InUse,
    NoSpace,
    RegionSize,
    StaleHandle,
    UnderRepair,
)
from ivshmemfs.format import geometry, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, REPAIR_OFFSET
from ivshmemfs.region import Memory, open_region
from ivshmemfs.region.condition import Condition
from ivshmemfs.shm import amendment, watch
from ivshmemfs.shm.repair import RepairSession
from tests.support.checks import assert_clean, detailed_tree
from tests.support.damage import SIZE, sample
from tests.support.figures import Figures
from tests.support.regions import ROOT, TestRegion, get, new_region, put

NEW_UUID = bytes(range(16))
MIB = 1 << 20


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestRegion]:
    """The sample region, of 512 KiB."""
    monkeypatch.setattr(watch, "SILENCE", 0.0)  # the dead of these tests are dead
    with new_region(SIZE) as region:
        region.path.write_bytes(sample())
        yield region


def grow(path: Path, size: int) -> geometry.Geometry | None:
    os.truncate(path, size)
    with open_region(str(path)) as region:
        return amendment.enlarge(region.memory)


def present(path: Path) -> superblock.Superblock:
    return superblock.decode(path.read_bytes()[:512], path.stat().st_size)


def fill_up(fs: Filesystem) -> None:
    for at in range(1000):
        put(fs, 1, b"full%d" % at, bytes([at % 255 + 1]) * 5000)


def whole(made: TestRegion) -> dict[bytes, object]:
    return dict(detailed_tree(made.mount(readonly=True)))


# --- what they do -----------------------------------------------------------------------------


def test_names_change_and_nothing_else(made: TestRegion) -> None:
    before, was = whole(made), present(made.path)
    with open_region(str(made.path)) as region:
        amendment.rename(region.memory, label="neu", uuid=NEW_UUID)
    assert present(made.path) == was._replace(label="neu", uuid=NEW_UUID)
    assert whole(made) == before
    fs = made.mount()
    put(fs, 1, b"more", b"names are still hashed as before")
    fs.unmount()
    assert fsck.check(made.region().memory).clean


@pytest.mark.slow
def test_a_region_grows_again_and_again(made: TestRegion) -> None:
    before = whole(made)
    content: dict[bytes, bytes] = {}
    for size in (MIB, 2 * MIB, 4 * MIB, 8 * MIB, 64 * MIB):
        old = grow(made.path, size)
        assert old is not None
        assert old.region_size < size == present(made.path).geometry.region_size
        fs = made.mount()
        name = b"%d" % size
        content[name] = os.urandom(min(size // 3, 2 * MIB))
        put(fs, 1, name, content[name])
        fs.unmount()
        with open_region(str(made.path), readonly=True) as region:
            assert fsck.check(region.memory).clean
    fs = made.mount()
    for name, wanted in content.items():
        handle = fs.open(fs.lookup(1, name).ino, os.O_RDONLY, ROOT)
        for at in range(0, len(wanted), MIB // 4):
            assert fs.read(handle, at, MIB // 4) == wanted[at : at + MIB // 4]
        fs.release(handle)
        fs.unlink(1, name, ROOT)
    fs.unmount()
    assert whole(made) == before
    assert grow(made.path, 64 * MIB) is None


def test_a_full_region_grows(made: TestRegion) -> None:
    fs = made.mount()
    with pytest.raises(NoSpace):
        fill_up(fs)
    fs.unmount()
    before = whole(made)
    assert grow(made.path, MIB)
    assert whole(made) == before
    put(made.mount(), 1, b"and more", b"x" * 200_000)
    assert fsck.check(made.region().memory).clean


def test_a_device_with_garbage_behind_its_blocks(made: TestRegion) -> None:
    with made.path.open("ab") as file:
        file.write(os.urandom(MIB))
    before_size = made.path.stat().st_size
    assert grow(made.path, before_size)
    fs = made.mount()
    assert get(fs, 1, b"small") == b"a few bytes"
    put(fs, 1, b"sparse again", b"")
    handle = fs.open(fs.lookup(1, b"sparse again").ino, os.O_RDWR, ROOT)
    fs.write(handle, 300_000, b"end")
    assert not any(fs.read(handle, 0, 300_000))
    fs.release(handle)
    fs.unmount()
    with open_region(str(made.path), readonly=True) as region:
        assert fsck.check(region.memory).clean


def test_too_little_room_is_refused_and_changes_nothing(made: TestRegion) -> None:
    with pytest.raises(RegionSize, match=r"too few for its tag table; \d+ bytes in all are"):
        grow(made.path, SIZE + 1024)
    os.truncate(made.path, SIZE)
    assert made.path.read_bytes() == sample()


# --- refusals ---------------------------------------------------------------------------------


def test_living_peers_are_named(made: TestRegion) -> None:
    fs = made.mount()
    memory = made.region().memory
    told = rf"in use by 1 peer\(s\): slot \d+ \(idle, pid {os.getpid()} on "
    with pytest.raises(InUse, match=told):
        amendment.rename(memory, label="x")
    with pytest.raises(InUse, match=told):
        grow(made.path, MIB)
    os.truncate(made.path, SIZE)
    put(fs, 1, b"still", b"here")
    fs.unmount()
    assert_clean(made)


def test_living_mounts_go_on_under_another_name(made: TestRegion) -> None:
    fs, looker = made.mount(), made.mount(readonly=True)
    amendment.rename(made.region().memory, label="other", uuid=NEW_UUID, force=True)
    put(fs, 1, b"later", b"content")
    assert get(looker, 1, b"later") == b"content"
    assert fs.condition() is Condition.SOUND
    fs.tick()
    fs.unmount()
    assert present(made.path).label == "other"


def test_a_reader_from_before_reads_nothing_wrong(made: TestRegion) -> None:
    """It leaves no trace, so nothing can refuse; it finds no block under its former geometry."""
    looker = made.mount(readonly=True)
    assert get(looker, 1, b"small") == b"a few bytes"
    grow(made.path, 2 * MIB)
    fs = made.mount()
    for at in range(300):
        put(fs, 1, b"small", b"%d" % at * 3000)
        with pytest.raises(StaleHandle):
            get(looker, 1, b"small")
    assert looker.condition() is not Condition.SOUND


def test_a_repair_that_died_goes_first(made: TestRegion) -> None:
    memory = made.region().memory
    session = RepairSession(memory, present(made.path).geometry)
    session.take(force=False)
    with pytest.raises(InUse, match="being repaired by pid"):
        amendment.rename(memory, label="x")


def test_others_are_told_what_is_going_on(made: TestRegion) -> None:
    memory = made.region().memory
    session = RepairSession(memory, present(made.path).geometry, amends=True)
    session.take(force=False)
    with pytest.raises(UnderRepair, match="being given another name or size by pid"):
        made.mount()


@pytest.mark.parametrize("at", [superblock.OFFSET, COMMIT_OFFSET])
def test_what_is_no_filesystem_is_refused(at: int, made: TestRegion) -> None:
    memory = made.region().memory
    memory.zero(at, 512 if at == superblock.OFFSET else 8)
    with pytest.raises(FormatError):
        amendment.rename(memory, label="x")


# --- deaths -----------------------------------------------------------------------------------


def dies(path: Path, after: int, act: Callable[[Memory], object]) -> bool:
    """A process that does `act` and is gone before store `after`; whether it was done."""
    child = os.fork()
    if child == 0:
        try:
            with open_region(str(path)) as region:
                region.memory.trap(after, lambda: os._exit(7))
                act(region.memory)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 7)
    return code == 0


def rename(memory: Memory) -> None:
    amendment.rename(memory, label="neu", uuid=NEW_UUID)


def enlarge_again(memory: Memory) -> None:
    """For a region that was made larger before: its former tag table is behind the blocks."""
    amendment.enlarge(memory)


def by_running_again(path: Path, act: Callable[[Memory], object]) -> None:
    with open_region(str(path)) as region:
        act(region.memory)


def by_fsck(path: Path, act: Callable[[Memory], object]) -> None:
    """fsck ends what was begun; before the first superblock only the same again can."""
    with open_region(str(path)) as region:
        try:
            fsck.repair(region)
        except GeometryMismatch:  # which says to run resize
            act(region.memory)


@pytest.mark.slow
@pytest.mark.parametrize("act", [rename, amendment.enlarge, enlarge_again])
@pytest.mark.parametrize("recover", [by_running_again, by_fsck])
def test_a_death_before_any_store(
    recover: Callable[[Path, Callable[[Memory], object]], None],
    act: Callable[[Memory], object],
    made: TestRegion,
    figures: Figures,
) -> None:
    """Also one more death of the process that goes on."""
    if act is enlarge_again:
        grow(made.path, MIB)
    expected = whole(made)
    larger = act is not rename
    before = made.path.read_bytes() + bytes(MIB if larger else 0)
    points = 0
    for after in range(10_000):
        made.path.write_bytes(before)
        done = dies(made.path, after, act)
        if after % 2:
            dies(made.path, after % 29, act)
        recover(made.path, act)
        with open_region(str(made.path), readonly=True) as region:
            report = fsck.check(region.memory)
            assert report.clean, f"stopped before store {after}:\n{report}"
        assert whole(made) == expected, after
        if recover is by_running_again:
            assert present(made.path).label == ("" if larger else "neu")
        points += 1
        if done:
            break
    assert points > 10
    figures.count("amendments that died", points, f"{act.__name__}, {recover.__name__}")


def test_a_signal_leaves_what_another_run_completes(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the new superblock the region is given back; after it the mark stays."""
    expected = whole(made)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted(place: object, name: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupt)
            grow(made.path, MIB)

    with pytest.raises(KeyboardInterrupt):
        interrupted(amendment, "_copy_tags")
    os.truncate(made.path, SIZE)
    assert whole(made) == expected
    child = os.fork()
    if child == 0:
        try:
            interrupted(RepairSession, "publish")
        except KeyboardInterrupt:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    word = made.region().memory.load(COMMIT_OFFSET)
    assert words.under_repair(word)
    assert grow(made.path, MIB)
    assert whole(made) == expected
    assert made.region().memory.load(REPAIR_OFFSET) >> words.SLOT_SHIFT == words.FREE


def test_a_zombie_from_before_commits_nothing(made: TestRegion) -> None:
    """Its slot is given away by an administrator; the region grows while it sleeps."""
    zombie: Filesystem = made.mount()
    zombie.table.retire(zombie.peer_id[0], zombie.table.state(zombie.peer_id[0]))
    assert grow(made.path, MIB)
    expected = whole(made)
    with pytest.raises(FsError):
        put(zombie, 1, b"late", b"x" * 5000)
    assert whole(made) == expected
    assert fsck.check(made.region().memory).clean
