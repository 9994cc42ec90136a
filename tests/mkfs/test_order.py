"""In which order a filesystem is stored, and what others see meanwhile."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import FsError, IvshmemfsError
from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET, plan
from ivshmemfs.region import DEVICE, NORMAL, WRITE_COMBINING, Memory, open_region
from ivshmemfs.shm import exclusion
from mkfs import writer
from mkfs.initial import Parameters, initial_filesystem
from tests.support.regions import ROOT, TestRegion, get, new_region, put

SIZE = 256 << 10
OLD = b"what stood here before" * 100


class Stopped(Exception):
    """The peer dies here."""


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(SIZE) as region:
        fs = region.mount()
        put(fs, 1, b"file", OLD)
        fs.unmount()
        yield region


def format_anew(memory: Memory, seed: int = 3, fresh: bool = False) -> None:
    parameters = Parameters(os.urandom(16))
    writer.format_region(memory, plan(SIZE), parameters, fresh=fresh, chance=random.Random(seed))


def mountable(made: TestRegion) -> Filesystem | None:
    try:
        return made.mount()
    except (IvshmemfsError, OSError):
        return None


def stop() -> None:
    raise Stopped


def test_a_death_at_any_store_leaves_old_new_or_nothing(made: TestRegion) -> None:
    before = made.path.read_bytes()
    outcomes: list[str] = []
    for after in range(10_000):
        made.path.write_bytes(before)
        with open_region(str(made.path)) as region:
            region.memory.trap(after, stop)
            try:
                format_anew(region.memory)
            except Stopped:
                finished = False
            else:
                finished = True
        fs = mountable(made)
        if fs is None:
            outcomes.append("nothing")
        else:
            names = [name for name, _, _ in fs.readdir(fs.opendir(1), 0)]
            outcomes.append("old" if b"file" in names else "new")
            assert outcomes[-1] == "new" or get(fs, 1, b"file") == OLD
            fs.unmount()
            assert not fsck.check(made.region(readonly=True)).findings
        if finished:
            break
    # Before the first store all is old, after the last all is new, and between nothing mounts.
    turns = [b for a, b in zip(["", *outcomes], outcomes, strict=False) if a != b]
    assert turns == ["old", "nothing", "new"]
    assert outcomes.count("nothing") > 10


def test_a_death_half_way_can_be_repeated_or_repaired(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        region.memory.trap(1, stop)
        with pytest.raises(Stopped):
            format_anew(region.memory)
    with made.region() as region:
        assert region.memory.load(COMMIT_OFFSET) == 0
        report = fsck.repair(region)  # only the commit word was stored: all is there still
        assert report.clean, str(report)
    fs = made.mount()
    assert get(fs, 1, b"file") == OLD


def test_a_live_mount_notices(made: TestRegion) -> None:
    fs = made.mount()
    handle = fs.open(fs.lookup(1, b"file").ino, os.O_RDWR, ROOT)
    with made.region() as region:
        format_anew(region.memory)
    for attempt in (
        lambda: fs.lookup(1, b"file"),
        lambda: fs.read(handle, 0, 10),
        lambda: fs.write(handle, 0, b"zombie"),
        lambda: fs.mkdir(1, b"dir", 0o755, ROOT),
    ):
        with pytest.raises(FsError) as error:
            attempt()
        assert error.value.errno == errno.ESTALE
    assert fsck.check(made.region(readonly=True)).clean


def test_transactions_under_way_get_a_moment(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusion, "GRACE", 60.0)
    fs = made.mount()
    with open_region(str(made.path)) as region:
        memory, at = region.memory, 4096
        idle = memory.load(at)
        active = idle & (1 << 56) - 1 | words.ACTIVE << 56
        memory.store(at, active)
        ended = threading.Timer(0.15, lambda: memory.store(at, idle))
        ended.start()
        before = time.monotonic()
        format_anew(memory)
        assert 0.1 < time.monotonic() - before < 30.0
        ended.join()
    assert fsck.check(made.region(readonly=True)).clean
    del fs


def test_a_transaction_that_does_not_end_is_not_waited_for(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusion, "GRACE", 0.05)
    made.mount()
    with open_region(str(made.path)) as region:
        word = region.memory.load(4096)
        region.memory.store(4096, word & (1 << 56) - 1 | words.ACTIVE << 56)
        before = time.monotonic()
        format_anew(region.memory)
        assert 0.04 < time.monotonic() - before < 30.0


@pytest.mark.parametrize("access", [NORMAL, DEVICE, WRITE_COMBINING])
def test_the_same_bytes_on_every_kind_of_mapping(made: TestRegion, access: int) -> None:
    geometry, parameters = plan(SIZE), Parameters(bytes(16), "label", 1, 2, 3)
    made.path.write_bytes(bytes(SIZE))
    descriptor = os.open(made.path, os.O_RDWR)
    memory = Memory(descriptor, SIZE, access=access)
    os.close(descriptor)
    writer.format_region(memory, geometry, parameters, chance=random.Random(9))
    memory.close()
    image = initial_filesystem(geometry, parameters, random.Random(9))
    expected = bytearray(SIZE)
    for at, raw in (
        (0, image.superblock),
        (2048, image.superblock),
        (1024, image.commit.to_bytes(8, "little")),
        (4096, image.peer_table),
        *((geometry.data_offset + n * 1024, raw) for n, raw in image.blocks.items()),
        *((geometry.tags_offset + n * 8, image.tag.to_bytes(8, "little")) for n in image.blocks),
    ):
        expected[at : at + len(raw)] = raw
    assert made.path.read_bytes() == bytes(expected)


def test_a_fresh_region_is_not_cleared(made: TestRegion) -> None:
    made.path.write_bytes(bytes(SIZE))
    with made.region() as region:
        format_anew(region.memory, fresh=True)
        few = region.memory.stores
    made.path.write_bytes(bytes(SIZE))
    with made.region() as region:
        format_anew(region.memory)
        assert region.memory.stores > few


@pytest.mark.parametrize("block_size", [1024, 2048, 4096, 16384])
@pytest.mark.parametrize("peers", [1, 16, 255])
def test_every_geometry_is_clean_and_mounts(block_size: int, peers: int) -> None:
    with new_region(2 << 20, block_size=block_size, peer_count=peers) as made:
        report = fsck.check(made.region(readonly=True))
        assert not report.findings, str(report)
        fs = made.mount()
        put(fs, 1, b"file", b"x" * 5000)
        fs.unmount()
        report = fsck.check(made.region(readonly=True))
        assert not report.findings, str(report)


def test_tags_of_a_new_filesystem_are_of_the_past() -> None:
    geometry = plan(SIZE)
    for seed in range(50):
        image = initial_filesystem(geometry, Parameters(bytes(16)), random.Random(seed))
        _, incarnation, _ = words.split_tag(image.tag)
        state = int.from_bytes(image.peer_table[:8], "little")
        assert words.split_state(state)[0] == words.FREE
        assert (words.split_state(state)[1] - incarnation) & words.INCARNATION_MASK == 1
        assert words.split_commit(image.commit)[0] > 0
