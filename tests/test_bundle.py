"""The bundle for machines without a network installs from what it carries alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_bundle_installs_without_a_network(tmp_path: Path) -> None:
    if not (TOP / ".venv").exists() or not sys.executable.startswith(str(TOP / ".venv")):
        pytest.skip("builds on the environment that scripts/setup makes")
    bundle = tmp_path / "bundle.sh"
    subprocess.run(["sh", TOP / "scripts/bundle", bundle], check=True, timeout=300)
    target = tmp_path / "opt"
    # An index that does not exist: anything that is not carried along would fail.
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1"}
    environment.pop("PIP_FIND_LINKS", None)
    subprocess.run(["sh", bundle, target], check=True, timeout=300, env=environment)
    size = subprocess.run(
        [target / "bin/mkfs.ivshmemfs", "--size", "1M", tmp_path / "region"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "1 MiB" in size.stdout
    listed = subprocess.run(
        [target / "bin/fsck.ivshmemfs", "-n", tmp_path / "region"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
