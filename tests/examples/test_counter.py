"""examples/counter.c: programs in C and Python share a word, and no addition is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivshmemfs
from tests.support.checks import assert_clean
from tests.support.mounts import ENVIRONMENT, PATIENCE, TOP
from tests.support.programs import find
from tests.support.regions import TestRegion, new_region

ADDITIONS = 20_000


@pytest.fixture
def made() -> Iterator[TestRegion]:
    """A region of 16 MiB."""
    with new_region(16 << 20) as region:
        yield region
        assert_clean(region)


def ivshmemfs_map(*words: str) -> str:
    """Run `ivshmemfs map`; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "ivshmemfs", "map", *words],
        capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT, check=True,
    )  # fmt: skip
    return done.stdout


def test_additions_of_all_programs_count(made: TestRegion, tmp_path: Path) -> None:
    compiler, file = find("cc"), f"{made.path}:/counter"
    ivshmemfs_map("--create", "4096", file)
    (tmp_path / "counter.h").write_text(ivshmemfs_map("--c", file))
    program = tmp_path / "counter"
    source = TOP / "examples" / "counter.c"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}"]
    subprocess.run([compiler, *flags, "-o", str(program), str(source)], check=True)
    running = [
        subprocess.Popen([program, str(ADDITIONS)], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    with ivshmemfs.open(made.path) as fs, fs.map("/counter") as counter:
        for _ in range(ADDITIONS):
            word = counter.load(0)
            while (seen := counter.cas(0, word, word + 1)) != word:
                word = seen
        assert [process.wait(PATIENCE) for process in running] == [0, 0]
        assert counter.load(0) == 3 * ADDITIONS
        assert int.from_bytes(fs.read_bytes("/counter")[:8], "little") == 3 * ADDITIONS
