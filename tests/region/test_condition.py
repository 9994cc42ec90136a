"""What became of a region since it was opened: told for files, and for devices in sysfs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmemfs.region import Condition, create_file, open_region
from tests.region.backends import SIZE, make_pci


def replace(path: Path) -> None:
    create_file(path.with_name("new"), SIZE)
    path.with_name("new").rename(path)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda path: path.touch(), Condition.SOUND),
        (lambda path: os.truncate(path, SIZE * 2), Condition.SOUND),
        (Path.unlink, Condition.DELETED),
        (lambda path: path.rename(path.with_name("other")), Condition.RENAMED),
        (replace, Condition.REPLACED),
        (lambda path: os.truncate(path, SIZE - 1), Condition.CUT),
    ],
    ids=["touched", "grown", "deleted", "renamed", "replaced", "cut"],
)
@pytest.mark.parametrize("readonly", [False, True])
def test_files(
    tmp_path: Path, act: Callable[[Path], object], told: Condition, readonly: bool
) -> None:
    path = tmp_path / "region"
    create_file(path, SIZE)
    with open_region(str(path), readonly=readonly) as region:
        assert region.condition() is Condition.SOUND
        act(path)
        assert region.condition() is told


def test_what_ends_again(tmp_path: Path) -> None:
    path = tmp_path / "region"
    create_file(path, SIZE)
    with open_region(str(path)) as region:
        path.rename(tmp_path / "away")
        assert region.condition() is Condition.RENAMED
        (tmp_path / "away").rename(path)
        os.truncate(path, 0)
        assert region.condition() is Condition.CUT
        os.truncate(path, SIZE)
        assert region.condition() is Condition.SOUND


def test_a_path_that_cannot_be_looked_at_counts_as_sound(tmp_path: Path) -> None:
    (tmp_path / "to").symlink_to("region")
    create_file(tmp_path / "region", SIZE)
    with open_region(f"{tmp_path}/to") as region:
        (tmp_path / "to").unlink()
        (tmp_path / "to").symlink_to("to")
        assert region.condition() is Condition.SOUND


def test_a_device_that_is_unplugged_and_plugged_in_again(tmp_path: Path) -> None:
    device = make_pci(tmp_path, combining=False, machine="x86_64")
    with open_region("pci", roots=device.roots) as region:
        assert region.condition() is Condition.SOUND
        device.file.parent.rename(tmp_path / "gone")
        assert region.condition() is Condition.UNPLUGGED
        make_pci(tmp_path, combining=False, machine="x86_64")
        assert region.condition() is Condition.REPLACED


def test_the_descriptor_is_let_go_of(tmp_path: Path) -> None:
    create_file(tmp_path / "region", SIZE)
    before = len(os.listdir("/proc/self/fd"))
    region = open_region(f"{tmp_path}/region")
    region.close()
    region.close()
    assert len(os.listdir("/proc/self/fd")) == before
