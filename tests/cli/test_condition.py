"""What happens to a region under a mount is said: once in the log, in `list` and in `peers`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmemfs.region import Condition, open_region
from tests.cli.conftest import complains, ivshmemfs
from tests.support.mounts import eventually, mount_lines, needs_fuse, run, stop
from tests.support.regions import TestRegion

pytestmark = needs_fuse


def make_anew(path: Path) -> None:
    path.unlink()
    assert run(sys.executable, "-m", "mkfs", "--size", "1M", path).returncode == 0


def format_anew(path: Path) -> None:
    assert run(sys.executable, "-m", "mkfs", "--force", "--force", path).returncode == 0


def fill(path: Path, byte: bytes) -> None:
    with open_region(str(path)) as region:
        region.memory.write(0, byte * region.size)


ACTS: list[tuple[Condition, Callable[[Path], object], bool]] = [
    (Condition.DELETED, Path.unlink, False),
    (Condition.RENAMED, lambda path: path.rename(path.with_name("other")), False),
    (Condition.REPLACED, make_anew, False),
    (Condition.CUT, lambda path: os.truncate(path, 4096), False),
    (Condition.ONES, lambda path: fill(path, b"\xff"), False),
    (Condition.OVERWRITTEN, lambda path: fill(path, b"x"), False),
    (Condition.REFORMATTED, format_anew, False),
    (Condition.REFORMATTED, format_anew, True),
    (Condition.REPLACED, make_anew, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "act", "readonly"),
    ACTS,
    ids=[f"{told.name}{'-readonly' * readonly}" for told, _act, readonly in ACTS],
)
def test_what_happens_to_a_region_is_said_once(
    formatted: TestRegion,
    place: Path,
    tmp_path: Path,
    condition: Condition,
    act: Callable[[Path], object],
    readonly: bool,
) -> None:
    log = tmp_path / "log"
    options = f"log={log}{',ro' * readonly}"
    assert ivshmemfs("mount", "-o", options, formatted.path, place).returncode == 0

    def lines() -> list[str]:
        return [line for line in log.read_text().splitlines() if condition.explained in line]

    assert f"{place}\n" in ivshmemfs("list").stdout
    act(formatted.path)
    assert eventually(lines)
    line = f"{place} ({condition.value})"
    assert line in ivshmemfs("list").stdout
    told = ivshmemfs("peers", formatted.path).stderr
    assert line in told or f"mount {place}: {condition.value}" in told
    run("ls", place)
    if not formatted.path.exists():
        complains(ivshmemfs("info", formatted.path), 32, "not there any more", line)
        complains(ivshmemfs("info", place), 32, "not there any more", line)
    ivshmemfs("umount", place)
    assert not mount_lines(place)
    assert len(lines()) == 1
    assert "Traceback" not in log.read_text()
    trouble = [line for line in log.read_text().splitlines() if " ERROR " in line]
    assert not [line for line in trouble if ": upkeep: " in line]


def test_that_it_is_over_is_said_too(formatted: TestRegion, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ivshmemfs("mount", "-o", f"log={log}", formatted.path, place).returncode == 0
    away = formatted.path.with_name("away")
    formatted.path.rename(away)
    assert eventually(lambda: f"({Condition.RENAMED.value})" in ivshmemfs("list").stdout)
    away.rename(formatted.path)
    assert eventually(lambda: "the region is sound again; it was renamed" in log.read_text())
    assert f"{place}\n" in ivshmemfs("list").stdout
    (place / "f").write_text("goes on")
    ivshmemfs("umount", place)


def test_a_daemon_that_is_stopped_or_dead_is_shown(formatted: TestRegion, place: Path) -> None:
    assert ivshmemfs("mount", formatted.path, place).returncode == 0
    pid = int(ivshmemfs("peers", formatted.path).stdout.splitlines()[1].split()[2])
    stop(pid)
    assert f"{place} (daemon stopped)\n" in ivshmemfs("list").stdout
    os.kill(pid, 9)
    assert eventually(lambda: f"{place} (daemon dead)\n" in ivshmemfs("list").stdout)
    ivshmemfs("umount", place)


@pytest.mark.slow
def test_many_looks_do_not_hide_the_daemon(formatted: TestRegion, place: Path) -> None:
    from ivshmemfs.fuse import lifeline, mountpoint

    assert ivshmemfs("mount", formatted.path, place).returncode == 0
    entry = mountpoint.find(str(place))
    assert entry is not None
    for _ in range(3):
        assert all(lifeline.condition(entry) == "" for _ in range(lifeline.BACKLOG // 2))
        grip = lifeline.grasp(entry.device)
        assert grip is not None
        with grip:
            assert not lifeline.wait_for_end(grip, 2)
    assert ivshmemfs("umount", place).returncode == 0
