"""What the commands say of a region that is being repaired."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.fsck.image import read_superblocks
from ivshmemfs.shm.repair import RepairSession
from tests.cli.conftest import complains, impatient, ivshmemfs
from tests.support.mounts import eventually, needs_fuse
from tests.support.regions import TestRegion


@pytest.fixture
def turn(formatted: TestRegion) -> Iterator[RepairSession]:
    """The region's repair, under way."""
    memory = formatted.region().memory
    turn = RepairSession(memory, read_superblocks(memory).usable.geometry)
    turn.take(force=False)
    yield turn
    turn.give_up()


def test_they_say_who_repairs_it(
    formatted: TestRegion, turn: RepairSession, tmp_path: Path
) -> None:
    assert words.under_repair(turn.marked)
    says = f"the region is being repaired by pid {os.getpid()} on "
    (tmp_path / "place").mkdir()
    for command in (["mount", formatted.path, tmp_path / "place"], ["info", formatted.path]):
        complains(impatient("REPAIR_SECONDS=0.3", *command), 32, says)
    listed = ivshmemfs("peers", formatted.path).stdout.splitlines()
    assert listed[0].startswith(says)
    assert listed[1] == "no machine has it mounted for writing"
    assert "under repair" in ivshmemfs("dump", formatted.path, "words").stdout
    assert "next_ino" in ivshmemfs("dump", formatted.path, "root").stdout
    linked = Path(f"/dev/shm/ivshmemfs-repair-test-{os.getpid()}")
    try:
        os.link(formatted.path, linked)
        lines = ivshmemfs("list").stdout.splitlines()
        assert any(str(linked) in line and ", being repaired" in line for line in lines)
    finally:
        linked.unlink(missing_ok=True)


def test_one_that_ends_soon_is_waited_for(formatted: TestRegion, turn: RepairSession) -> None:
    threading.Timer(1.0, turn.give_up).start()
    assert "0 of 16" in ivshmemfs("info", formatted.path).stdout


@needs_fuse
def test_a_mount_waits_and_goes_on(formatted: TestRegion, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = ivshmemfs("mount", "-o", f"log={log}", formatted.path, place)
    assert done.returncode == 0, done.stderr
    memory = formatted.region().memory
    turn = RepairSession(memory, read_superblocks(memory).usable.geometry)
    (place / "before").mkdir()
    turn.take(force=False)
    threading.Timer(3.0, turn.give_up).start()
    (place / "meanwhile").mkdir()
    assert not words.under_repair(memory.load(COMMIT_OFFSET))
    assert sorted(os.listdir(place)) == ["before", "meanwhile"]
    assert eventually(lambda: "is over" in log.read_text())
    told = [line for line in log.read_text().splitlines() if "repair" in line]
    assert len(told) == 2, told
    assert f"the region is being repaired by pid {os.getpid()} on " in told[0]
    assert "the repair of the region is over" in told[1]
    assert ivshmemfs("umount", place).returncode == 0
