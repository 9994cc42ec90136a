"""Formatted regions, mount points, and the command itself, each with a bound on its time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import mount_lines, release, run
from tests.support.regions import TestRegion, new_region

MIB = 1 << 20


def ivshmemfs(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; its exit code, output and complaints."""
    return run(sys.executable, "-m", "ivshmemfs.cli", *words, env=environment, timeout=60)


def impatient(*words: object) -> subprocess.CompletedProcess[str]:
    """The same with shorter waits, given as NAME=SECONDS before the other words."""
    return run(sys.executable, "-m", "tests.support.impatient", *words, timeout=60)


def complains(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Check that a command ended with *code* and one line on stderr with all *words* in it."""
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("ivshmemfs: ")
    assert "Traceback" not in result.stderr
    assert "Errno" not in result.stderr
    assert "internal error" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def formatted() -> Iterator[TestRegion]:
    """A region of one MiB with a filesystem."""
    with new_region(MIB) as region:
        yield region


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Path]]:
    """Three empty directories; what is mounted there is unmounted in the end."""
    made = [tmp_path / name for name in ("A", "B", "C")]
    for path in made:
        path.mkdir()
    try:
        yield made
    finally:
        for path in made:
            if mount_lines(path):
                ivshmemfs("umount", "--lazy", path)
                release(path)


@pytest.fixture
def place(places: list[Path]) -> Path:
    """One of them."""
    return places[0]
