"""scripts/aarch64-check refuses at once what would fail late: blanks in paths, a cache in use."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/aarch64-check"

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="on ARM64 the tests themselves run"
)


def refused(cache: Path) -> str:
    done = subprocess.run(
        ["/bin/sh", SCRIPT, "--exchange"], capture_output=True, text=True, check=False,
        timeout=60, env={**os.environ, "IVSHMEMFS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr


def test_a_blank_in_a_path_is_refused(tmp_path: Path) -> None:
    assert "a blank in a path" in refused(tmp_path / "my cache")
    assert not any(tmp_path.iterdir())


def test_a_second_run_on_one_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aarch64").mkdir()
    with (tmp_path / "aarch64/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run uses" in refused(tmp_path)
