"""TAB in a real bash: regions, labels, mount points, options, and names within a region."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO
from tests.support.lab import needs_fuse, new_lab
from tests.support.mounts import ENVIRONMENT, TOP
from tests.support.regions import ROOT, TestRegion, new_region

SCRIPT = TOP / "packaging" / "completion.bash"
#: What bash does when TAB is pressed at the end of a line.
PRESS = r"""
source "$1"
COMP_LINE=$2 COMP_POINT=${#2} COMP_WORDS=($2) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { echo "compopt $*"; }
set -- ${2%% *}
_ivshmemfs_complete "$1"
printf '%s\n' "${COMPREPLY[@]}"
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def press(line: str) -> list[str]:
    """What bash offers for a line."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", PRESS, "bash", SCRIPT, line], capture_output=True, text=True,
        timeout=60, check=True, env={**ENVIRONMENT, "PATH": path},
    )  # fmt: skip
    assert done.stderr == ""
    return [word for word in done.stdout.split("\n") if word]


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(1 << 20) as made:
        fs = made.mount()
        folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
        fs.mknod(ROOT_INO, b"file one", 0o100644, 0, ROOT)
        fs.mknod(folder, b"inner", 0o100644, 0, ROOT)
        fs.unmount()
        yield made


def test_commands_and_options() -> None:
    assert press("ivshmemfs mou") == ["mount"]
    assert "--timeout" in press("ivshmemfs wait --t")
    assert "--size" in press("mkfs.ivshmemfs --si")


@pytest.mark.parametrize("command", ["ivshmemfs info", "mkfs.ivshmemfs", "fsck.ivshmemfs -n"])
def test_regions(region: TestRegion, command: str) -> None:
    there = Path(f"/dev/shm/ivshmemfs-complete-{os.getpid()}")  # where they are looked for
    shutil.copy(region.path, there)
    try:
        offered = press(f"{command} /dev/shm/ivshm")
    finally:
        there.unlink()
    assert str(there) in offered
    assert "compopt -o default" in offered
    assert "label=" in press(f"{command} la")


def test_names_in_a_region(region: TestRegion) -> None:
    spec = str(region.path)
    assert f"{spec.partition(':')[2]}" == ""  # a path without a colon
    assert "/folder/" in press(f"ivshmemfs ls {spec}:/fo")
    assert "/file\\ one" in press(f"ivshmemfs cat {spec}:/f")
    assert press(f"ivshmemfs cat {spec}:/folder/i")[-1] == "/folder/inner"
    assert "/folder/" in press(f"ivshmemfs get {spec} /fo")
    assert press(f"ivshmemfs ls {spec}:/none/x") == ["compopt -o default"]


def test_a_damaged_region_offers_nothing_and_says_nothing(region: TestRegion) -> None:
    with region.path.open("r+b") as file:
        file.write(os.urandom(1 << 19))
    assert press(f"ivshmemfs ls {region.path}:/") == ["compopt -o default"]


@needs_fuse
def test_mount_points() -> None:
    with new_lab(mounts=1) as lab:
        place = str(lab.paths[0])
        assert place in press(f"ivshmemfs umount {place[:-1]}")
        assert place in press(f"ivshmemfs peers {place[:-1]}")
