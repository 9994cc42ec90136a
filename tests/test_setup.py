"""scripts/setup says what it lacks: an ordinary user without sudo is told so."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="this is not Debian")
def test_a_user_without_sudo_is_told_what_root_has_to_type(tmp_path: Path) -> None:
    for name in ("dirname", "mkdir", "sed", "tail", "cat", "apt-get"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    for name, text in (("id", "echo 1000"), ("dpkg-query", "exit 1")):  # nothing is installed
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", TOP / "scripts/setup"], capture_output=True, text=True, check=False,
        timeout=60, env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "need root or sudo: type 'apt-get install fuse3 libfuse3-dev" in line
    assert "online" not in line
