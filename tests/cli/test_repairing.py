"""What the commands say of a region that is being repaired."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.format import words
from ivshmemfs.fsck.image import read_superblocks
from ivshmemfs.shm.repair import Turn
from tests.cli.conftest import complains, ivshmemfs
from tests.regions import TestRegion


@pytest.fixture
def turn(formatted: TestRegion) -> Iterator[Turn]:
    """The region's repair, under way."""
    memory = formatted.region().memory
    turn = Turn(memory, read_superblocks(memory).usable.geometry)
    turn.take(force=False)
    yield turn
    turn.give_up()


def test_they_say_who_repairs_it(formatted: TestRegion, turn: Turn, tmp_path: Path) -> None:
    assert words.under_repair(turn.marked)
    says = f"the region is being repaired by pid {os.getpid()} on "
    (tmp_path / "place").mkdir()
    complains(ivshmemfs("mount", formatted.path, tmp_path / "place"), 32, says)
    complains(ivshmemfs("info", formatted.path), 32, says)
    listed = ivshmemfs("peers", formatted.path).stdout.splitlines()
    assert listed[0].startswith(says)
    assert (
        listed[1]
        == "nobody has it mounted for writing (a read-only mount leaves no trace in the region)"
    )
    linked = Path(f"/dev/shm/ivshmemfs-repair-test-{os.getpid()}")
    try:
        os.link(formatted.path, linked)
        lines = ivshmemfs("list").stdout.splitlines()
        assert any(str(linked) in line and ", being repaired" in line for line in lines)
    finally:
        linked.unlink(missing_ok=True)


def test_one_that_ends_soon_is_waited_for(formatted: TestRegion, turn: Turn) -> None:
    threading.Timer(1.0, turn.give_up).start()
    assert "0 of 16" in ivshmemfs("info", formatted.path).stdout
