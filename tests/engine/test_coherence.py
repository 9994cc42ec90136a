"""Mounts whose maps of the region disagree refuse to write; looks go on, and unmounting works."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import FsError
from ivshmemfs.format import peer
from ivshmemfs.region import Memory, open_region
from ivshmemfs.shm.coherence import PATIENCE
from tests.support.regions import TestRegion, get, put

HOT = range(peer.STATE_OFFSET, peer.NONCE_OFFSET + 8, 8)


class Side:
    """A mount, and its own stale view of the region."""

    def __init__(self, fs: Filesystem, memory: Memory) -> None:
        self.fs = fs
        self.memory = memory
        self.at = fs.table.offset(fs.peer_id[0])

    def reach(self, other: Side, places: range) -> None:
        """Let the other side see words of this mount's slot."""
        for place in places:
            other.memory.store(self.at + place, self.memory.load(self.at + place))

    def tick(self, other: Side) -> None:
        self.fs.tick()
        self.reach(other, HOT)

    def told(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def sides(roomy: TestRegion, tmp_path: Path) -> Iterator[list[Side]]:
    """Two mounts; of a slot's words that another stores, each sees the hot ones alone."""
    first = roomy.region()
    one = Filesystem.mount(first)
    put(one, 1, b"before", b"seen by both")
    shutil.copy(roomy.path, tmp_path / "stale")
    with open_region(str(tmp_path / "stale")) as second:
        two = Filesystem.mount(second)
        both = [Side(one, first.memory), Side(two, second.memory)]
        both[1].reach(both[0], range(0, peer.SLOT_SIZE, 8))
        yield both
        two.unmount()
        one.unmount()
    first.memory.zero(both[1].at, peer.SLOT_SIZE)  # what the mapping that is gone had there


def test_stale_views_end_in_a_refusal(sides: list[Side], caplog: pytest.LogCaptureFixture) -> None:
    one, two = sides
    put(one.fs, 1, b"early", b"allowed: nothing is known yet")
    for _ in range(PATIENCE + 6):
        one.tick(two)
        two.tick(one)
    for side in sides:
        with pytest.raises(FsError) as refused:
            put(side.fs, 1, b"late", b"refused")
        assert refused.value.errno == errno.EROFS
        assert get(side.fs, 1, b"before") == b"seen by both"
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2
    assert all("do not see the same memory" in line and "-o ro" in line for line in said)
    caplog.clear()


def test_mounts_of_one_region_agree(roomy: TestRegion) -> None:
    one, two = roomy.mount(), roomy.mount()
    for _ in range(8):
        one.tick()
        two.tick()
    assert [other.coherence for other in one.table.peers()] == ["agrees", "agrees"]
    put(one, 1, b"late", b"allowed")
    two.unmount()
    one.unmount()
