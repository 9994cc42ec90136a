"""A mount's private memory is bounded, for any number of files that it has seen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.regions import TestRegion, new_region

FILES = 40_000
GROWTH = 28 << 10  # KiB; an idle mount has just over 30 MiB and the limit is 64 MiB
SCRIPT = """
import sys
from pathlib import Path
from ivshmemfs.engine import ROOT_INO, Context, Filesystem
from ivshmemfs.region import open_region

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

root = Context(0, 0)
with open_region(sys.argv[1]) as region:
    fs = Filesystem.mount(region)
    before = resident()
    for number in range(int(sys.argv[2]) // 100):
        folder = fs.mkdir(ROOT_INO, b"%d" % number, 0o755, root).ino
        for name in range(100):
            fs.mknod(folder, b"%d" % name, 0o100644, 0, root)
    for number in range(int(sys.argv[2]) // 100):
        folder = fs.lookup(ROOT_INO, b"%d" % number).ino
        for name in range(100):
            fs.lookup(folder, b"%d" % name)
    print(resident() - before)
    fs.unmount()
"""


def growth(made: TestRegion, files: int) -> int:
    """Return by how many KiB a process grows that makes `files` files and looks them up."""
    command = [sys.executable, "-c", SCRIPT, str(made.path), str(files)]
    return int(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)


@pytest.mark.slow
def test_seeing_many_files_takes_little_memory() -> None:
    with new_region(512 << 20) as made:
        assert growth(made, FILES) < GROWTH
